"""How an activation crosses a hop: as it is, as fp16, or as int8 with a scale per channel.

- "float32": the values themselves.
- "fp16": IEEE half precision, round to nearest: half the bytes. A relative error of at most 2^-11
  down to 6.1e-5, an absolute one of at most 2^-25 below. NaN and infinity stay what they are; a
  finite value beyond 65504 is refused.
- "int8": q = round((x - low) / scale) in 0..255, with low = min and scale = (max - min) / 255 of
  each channel, so that x is told to half a scale: a quarter of the bytes, and 8 bytes per channel.
  Channels are dim 1 of an activation N x C x H x W, where each has at least 4 values; any other
  activation has one. A constant channel is exact (and one whose values lie within 3e-36 counts as
  constant). NaN and infinity are refused.

Refused means that the request fails with the reason: what arrives never silently is something else.

The int8 body, little-endian: scale (C x f32), low (C x f32), then q (u8 each, in tensor order).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from executor.errors import ConfigError, WireError

__all__ = [
    "TRANSFERS",
    "Affine",
    "as_float32",
    "channels",
    "check_affine",
    "check_transfer",
    "coded_bytes",
    "encode",
    "form_of",
    "parse_transfers",
]

TRANSFERS = ("float32", "fp16", "int8")

_FORMS = {"float32": "float32", "float16": "fp16"}
_FLOAT = np.dtype("<f4")
_LEVELS = np.float32(255)
_INFINITE_HALF = 0x7C00
_LEAST_VALUES = 4  # of a channel with its own scale: with fewer, int8 would be larger than float32
_LEAST_SCALE = np.finfo(np.float32).tiny  # a smaller one has no finite inverse


class Affine(NamedTuple):
    """An int8 body and the shape of the tensor it stands for."""

    body: NDArray[np.uint8]
    shape: tuple[int, ...]


def check_transfer(value: object, where: str) -> str:
    """The value, if it names a transfer.

    Raises:
        ConfigError: It does not; names `where`.
    """
    if value not in TRANSFERS:
        raise ConfigError(f"{where}: transfer must be one of {', '.join(TRANSFERS)}, got {value!r}")
    return str(value)


def parse_transfers(text: str, n_hops: int) -> tuple[str, ...]:
    """An option's transfers, one per hop: "fp16" for every hop, or "fp16,int8".

    Raises:
        ConfigError: An unknown one, or not one per hop.
    """
    given = text.split(",")
    forms = tuple(check_transfer(name.strip(), "--transfer") for name in given)
    if len(forms) not in (1, n_hops):
        raise ConfigError(
            f"--transfer: expected one for all hops or one for each of {n_hops}, got {text!r}"
        )
    return forms * n_hops if len(forms) == 1 else forms


def channels(shape: Sequence[int]) -> int:
    """How many scales an activation of this shape has as int8."""
    by_channel = len(shape) == 4 and shape[0] * shape[2] * shape[3] >= _LEAST_VALUES
    return shape[1] if by_channel else 1


def coded_bytes(transfer: str, shape: Sequence[int]) -> int:
    """Bytes of a body of that shape."""
    if transfer == "int8":
        return math.prod(shape) + 8 * channels(shape)
    return math.prod(shape) * (2 if transfer == "fp16" else 4)


def form_of(dtype: np.dtype[Any] | None, affine: bool) -> str | None:
    """Which of `TRANSFERS` a body of that dtype is; None if it is none of them."""
    if affine:
        return "int8"
    return _FORMS.get(dtype.name) if dtype is not None else None


def encode(x: NDArray[Any], transfer: str) -> NDArray[Any] | Affine:
    """What crosses the hop for a float32 activation; with "float32" that is `x` itself.

    Raises:
        WireError: Its values have no place in that form (see above), or it has none.
    """
    if transfer == "float32":
        return x
    if not x.size:
        raise WireError("an activation without values cannot be sent")
    return _half(x) if transfer == "fp16" else _affine(x)


def as_float32(coded: NDArray[Any] | Affine) -> NDArray[np.float32]:
    """The activation that a body of any form stands for; a float32 one is handed through.

    Raises:
        WireError: The scales of an int8 body are no such scales.
    """
    if isinstance(coded, Affine):
        return _from_affine(coded)
    if coded.dtype == np.float16:
        import torch  # ten times as fast as numpy at this; a client can spare it

        half: NDArray[np.float32] = torch.from_numpy(coded).float().numpy()
        return half
    return coded


def check_affine(coded: Affine) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and lows of an int8 body, C values each.

    Raises:
        WireError: Not finite, negative, or of values that float32 does not hold.
    """
    n_channels = channels(coded.shape)
    if coded.body.nbytes != math.prod(coded.shape) + 8 * n_channels:
        raise WireError(f"an int8 body of shape {coded.shape} has not {coded.body.nbytes} bytes")
    scale, low = np.frombuffer(coded.body, _FLOAT, 2 * n_channels).reshape(2, n_channels)
    with np.errstate(over="ignore", invalid="ignore"):
        high = low + _LEVELS * scale
    if not (np.isfinite(high).all() and np.isfinite(low).all() and scale.min() >= 0.0):
        raise WireError("scales of an int8 body must be finite and >= 0, and so its values finite")
    return scale, low


def _half(x: NDArray[np.float32]) -> NDArray[np.float16]:
    import torch  # see above

    half: NDArray[np.float16] = torch.from_numpy(x).half().numpy()
    if (half.view(np.uint16) & 0x7FFF).max() >= _INFINITE_HALF:
        lost = np.isinf(half) & np.isfinite(x)
        if lost.any():
            raise WireError(
                f"fp16 holds values up to 65504, the activation has {x[lost][0]:.6g}; send float32"
            )
    return half


def _affine(x: NDArray[np.float32]) -> Affine:
    n_channels = channels(x.shape)
    values = x.reshape(_grouped(x.shape))
    low = values.min(axis=2).min(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        span = values.max(axis=2).max(axis=0) - low
    if not np.isfinite(span).all():
        raise WireError("int8 holds finite values only, the activation has others; send float32")
    scale = span / _LEVELS
    scale[scale < _LEAST_SCALE] = 0.0
    steps = np.divide(np.float32(1.0), scale, out=np.zeros_like(scale), where=scale > 0.0)
    q = np.subtract(values, low[:, None])
    q *= steps[:, None]
    q += np.float32(0.5)  # what is cut off below rounds to the nearest
    head = 8 * n_channels
    body = np.empty(head + x.size, dtype=np.uint8)
    body[:head] = np.concatenate([scale, low]).astype(_FLOAT).view(np.uint8)
    np.copyto(body[head:].reshape(values.shape), q, casting="unsafe")
    return Affine(body, x.shape)


def _from_affine(coded: Affine) -> NDArray[np.float32]:
    scale, low = check_affine(coded)
    q = coded.body[8 * len(scale) :].reshape(_grouped(coded.shape))
    values = np.multiply(q, scale[:, None], dtype=np.float32)
    values += low[:, None]
    return values.reshape(coded.shape)


def _grouped(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape as batch x channels with a scale x values."""
    n_channels = channels(shape)
    batch = shape[0] if n_channels > 1 else 1
    return batch, n_channels, math.prod(shape) // (batch * n_channels)
