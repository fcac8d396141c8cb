"""Reading what a node is asked, and saying no to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from executor._hop import Parts
from executor.codec import TRANSFERS, Affine, check_affine, form_of
from executor.errors import ConfigError, WireError
from executor.late import check_tables
from executor.plan import ModelSpec, plan_of
from executor.wire import Header, Kind, parse_header

__all__ = [
    "ANSWERS",
    "Refusal",
    "check_size",
    "over_rate",
    "seconds",
    "split",
    "stage_of",
    "whole",
]

MAX_CONTROL_BYTES = 4096
ANSWERS = frozenset(
    {Kind.RESULT, Kind.ERROR, Kind.HELLO_REPLY, Kind.PROFILE_REPLY, Kind.PROBE_REPLY}
)


class Refusal(Exception):
    """A request cannot be served; the code and reason go back to the client.

    Attributes:
        code: Names the kind.
        to: The node that could not be reached; None where it is about this one.
        full: Whether there was no room; the client is then told when to come again.
    """

    def __init__(
        self, code: str, reason: str, to: int | None = None, *, full: bool = False
    ) -> None:
        super().__init__(reason)
        self.code = code
        self.to = to
        self.full = full


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


def stage_of(
    header: Header, body: memoryview | None, node: int, n_nodes: int, spec: ModelSpec, digest: bytes
) -> tuple[int, int]:
    """The units [start, stop) that a node computes of an inference; none where both are equal.

    Args:
        header: The inference's.
        body: Its body.
        node: The node's place in the chain.
        n_nodes: Nodes in the chain.
        spec: Its model.
        digest: First 8 bytes of its weights' digest.

    Raises:
        Refusal: It asks for other weights, or its plan does not fit this node.
        WireError: Its body is not what the plan says that it carries.
    """
    if header.digest != digest:
        raise Refusal(
            "wrong_model", f"runs weights {digest.hex()}, asked for {header.digest.hex()}"
        )
    try:
        plan = plan_of(header.cuts)
        plan.check(spec.n_units, n_nodes)
        check_tables(header.late, spec.n_units, n_nodes)
    except ConfigError as error:
        raise Refusal("bad_plan", str(error)) from None
    if node > plan.last_node(spec.n_units):
        raise Refusal("bad_plan", f"plan {plan} ends before this node")
    start, stop = plan.stage(node, spec.n_units)
    expected, form = spec.cut_bytes[start], form_of(header.dtype, header.affine)
    if form is None or 4 * math.prod(header.shape) != expected:
        got = f"{header.body_bytes} bytes of {form or header.dtype or 'no dtype'}"
        raise WireError(
            f"cut {start} carries {expected} bytes of float32 (or as many values in another form "
            f"that is known here: {', '.join(TRANSFERS[1:])}), got {got}"
        )
    if header.affine and body is not None:
        check_affine(Affine(np.frombuffer(body, np.uint8), header.shape))
    return start, stop


def over_rate(rate_rps: float) -> Refusal:
    """The refusal for a peer that sends more messages a second than this."""
    return Refusal("refused", f"more than {rate_rps:g} messages/s from one peer; send slower")


def whole(request: Mapping[str, Any], field: str, low: int, high: int) -> int:
    """The whole number in `low`..`high` under `field`; anything else is a WireError."""
    value = request.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise WireError(f"{field} must be a whole number in {low}..{high}, got {value!r}")
    return value


def seconds(values: Mapping[str, Any], field: str, most_s: float = 3600.0) -> float:
    """The duration in 0..`most_s` under `field`; anything else is a WireError."""
    value = values.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most_s:
        raise WireError(f"{field} must be seconds in 0..{most_s:g}, got {value!r}")
    return float(value)
