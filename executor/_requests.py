"""Reading what a node is asked, and saying no to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from executor._hop import Parts
from executor.errors import WireError
from executor.wire import Header, Kind, parse_header

__all__ = ["Refusal", "check_size", "over_rate", "short", "split", "whole"]

MAX_CONTROL_BYTES = 4096


class Refusal(Exception):
    """A request cannot be served; the code and reason go back to the client.

    Attributes:
        code: Names the kind.
        to: The node that could not be reached; None where it is about this one.
    """

    def __init__(self, code: str, reason: str, to: int | None = None) -> None:
        super().__init__(reason)
        self.code = code
        self.to = to


def split(parts: Parts) -> tuple[Header, memoryview | None]:
    """Parse the header; the body is checked later, when there is somebody to answer."""
    if len(parts) not in (1, 2):
        raise WireError(f"a message has 1 or 2 parts, got {len(parts)}")
    return parse_header(parts[0]), memoryview(parts[1]) if len(parts) == 2 else None


def check_size(header: Header) -> None:
    """Raise a WireError for a control frame that is larger than any that is meant."""
    if header.kind is not Kind.INFER and header.body_bytes > MAX_CONTROL_BYTES:
        raise WireError(
            f"a {header.kind.name} carries at most {MAX_CONTROL_BYTES} bytes, got "
            f"{header.body_bytes}"
        )


def over_rate(rate_rps: float) -> Refusal:
    """The refusal for a peer that sends more messages a second than this."""
    return Refusal("refused", f"more than {rate_rps:g} messages/s from one peer; send slower")


def whole(request: Mapping[str, Any], field: str, low: int, high: int) -> int:
    """The whole number in `low`..`high` under `field`; anything else is a WireError."""
    value = request.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise WireError(f"{field} must be a whole number in {low}..{high}, got {value!r}")
    return value


def short(value: float | None) -> float | None:
    """Six significant digits are enough, and keep the heartbeat small."""
    return None if value is None else float(f"{value:.6g}")
