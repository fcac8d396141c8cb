"""Small JSON bodies: what is no plain object of finite values, or too large, is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from executor.errors import WireError

__all__ = ["MAX_JSON_BYTES", "decode_json", "encode_json"]

MAX_JSON_BYTES = 2**20

_MAX_DIGITS = 32


def encode_json(value: Mapping[str, Any]) -> bytes:
    """A JSON body.

    Raises:
        WireError: The object is too large or is not plain JSON.
    """
    try:
        data = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise WireError(f"not plain JSON: {error}") from error
    if len(data) > MAX_JSON_BYTES:
        raise WireError(f"JSON body of {len(data)} bytes is over the bound of {MAX_JSON_BYTES}")
    return data


def decode_json(body: bytes | memoryview | None) -> dict[str, Any]:
    """Read a JSON body.

    Raises:
        WireError: There is none, it is too large, or it is not an object of finite values.
    """
    if body is None or len(body) > MAX_JSON_BYTES:
        got = "none" if body is None else f"{len(body)} bytes"
        raise WireError(f"expected a JSON body of at most {MAX_JSON_BYTES} bytes, got {got}")
    try:
        value = json.loads(
            bytes(body), parse_float=_finite, parse_constant=_finite, parse_int=_short_int
        )
    except (ValueError, RecursionError) as error:
        raise WireError(f"body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WireError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _short_int(text: str) -> int:
    # Older Pythons take seconds for a number of a million digits.
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:32]} is not a finite number")
    return value
