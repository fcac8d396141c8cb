"""Weights: seeded ones that show errors, and those read from a file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from executor.errors import ConfigError, one_line

__all__ = ["digest_of", "seed_weights", "seeded_tensor", "stored_state"]


def seeded_tensor(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Seeded values of zero mean and unit variance, float32; the same bytes on every machine."""
    return _uniform_(torch.empty(shape), math.sqrt(3.0), _generator(seed))


@torch.no_grad()
def seed_weights(net: nn.Module, input_shape: tuple[int, ...], seed: int, images: int = 4) -> None:
    """Kaiming weights, and batch-norm statistics of seeded inputs.

    With torchvision's own initialisation MobileNetV2's logits differ by 1e-10 between inputs, so a
    reply to another request, or zeros, would pass for the right one; ConvNeXt's layer scale of
    1e-6 and ViT's zero class token would hide their blocks alike. Here every matrix is Kaiming
    uniform, scales of normalisations are 1, biases 0, and all else (tokens, position tables, layer
    scales) is uniform in (-1, 1).

    Args:
        net: The network, in float32 on the CPU; put into inference mode.
        input_shape: Shape of its input.
        seed: Chooses the values.
        images: Inputs that the statistics are of; they are another choice of values.
    """
    generator = _generator(seed)
    norms = []
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.reset_parameters()
            if module.track_running_stats:
                norms.append(module)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if "bias" in name and parameter.ndim == 1:
                parameter.zero_()
            elif "weight" in name and parameter.ndim == 1:
                parameter.fill_(1.0)
            elif "weight" in name:
                _uniform_(parameter, math.sqrt(6.0 / parameter[0].numel()), generator)
            else:
                _uniform_(parameter, 1.0, generator)
    if not norms:
        return
    # In float64 and then rounded to 8 bits, the statistics too are the same on every machine.
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    batch = torch.empty((images * input_shape[0], *input_shape[1:]))
    net.eval().double()(_uniform_(batch, math.sqrt(3.0), generator).double())
    for hook in hooks:
        hook.remove()
    net.float()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _uniform_(tensor: torch.Tensor, bound: float, generator: torch.Generator) -> torch.Tensor:
    """Fill with values uniform in (-bound, bound), bit for bit the same on every machine.

    torch's own distributions differ in the last bit between processors, which would give nodes of
    different kinds different digests. Here only the last operation rounds.
    """
    tensor.random_(0, 2**24, generator=generator)
    return tensor.sub_(2**23 - 0.5).mul_(bound / 2**23)


def _take_statistics(norm: nn.Module, args: tuple[torch.Tensor]) -> None:
    assert isinstance(norm, _BatchNorm)
    over = [d for d in range(args[0].ndim) if d != 1]
    var, mean = torch.var_mean(args[0], dim=over, correction=0)
    norm.running_mean, norm.running_var = (s.bfloat16().double() for s in (mean, var))


def stored_state(path: str) -> Mapping[str, Any]:
    """The state dict in a file.

    Raises:
        ConfigError: There is none.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a file of another kind makes torch.load raise is open-ended
        raise ConfigError(
            f'weights: expected "none", "DEFAULT" or the path of a state dict, cannot read '
            f"{path!r}: {one_line(error)}"
        ) from error
    if not isinstance(state, Mapping):
        raise ConfigError(f"weights {path!r}: expected a state dict, got {type(state).__name__}")
    return state


def digest_of(net: nn.Module, source: bytes = b"") -> str:
    """First 16 hex characters of the SHA-256 over the state dict.

    Names, dtypes, shapes and bytes go in, and the model file's bytes for a user's own model: its
    code is no part of a state dict.
    """
    digest = hashlib.sha256(source)
    for name, tensor in net.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
