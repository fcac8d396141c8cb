"""A torchvision model as a chain of units that can be cut between any two of them.

Importing torchvision is left to the first call: it is slow, and a node that only relays or a
solver that only needs sizes from a stored profile never pays for it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from executor.errors import ConfigError
from executor.plan import ModelSpec

__all__ = ["MODELS", "UnitChain", "build_chain", "model_spec", "sample_input"]

MODELS: tuple[str, ...] = ("alexnet", "vgg16", "mobilenet_v2")
INPUT_SHAPE = (1, 3, 224, 224)
# The reference work's rough thirds (arXiv 2605.09623), as cuts.
STATIC_PLANS = {"alexnet": (10, 14), "vgg16": (11, 31), "mobilenet_v2": (10, 19)}
CALIBRATION_IMAGES = 4

_log = logging.getLogger(__name__)
_op_schemas: list[Any] = []  # a torch Library's definitions die with the object


class UnitChain:
    """A model in inference mode, as n units run one after another.

    Attributes:
        spec: Names, cut sizes and the rest of what a plan needs.
        units: The n modules, in order; not to be changed.
        digest: First 16 hex characters of the SHA-256 over names, dtypes, shapes and bytes of the
            state dict; equal digests mean equal weights.
        device: Where the weights are.
    """

    def __init__(self, spec: ModelSpec, model: nn.Module, units: list[nn.Module]) -> None:
        model.eval().requires_grad_(False)
        self.spec = spec
        self.units = units
        self.digest = _digest(model.state_dict())
        self.device = torch.device("cpu")
        # A unit with parameters writes its result to a new tensor before anything in-place.
        self._writes_input = [
            not has_params and any(getattr(m, "inplace", False) for m in unit.modules())
            for unit, has_params in zip(units, spec.has_params, strict=True)
        ]

    def run(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Run units [start, stop) on x.

        Args:
            x: Activation at cut `start`, float32, on the chain's device. It is never modified.
            start: First unit, 0..n.
            stop: One past the last unit, start..n.

        Returns:
            The activation at cut `stop`. It shares no memory with x, unless start == stop: then it
            is x.

        Raises:
            ConfigError: Not 0 <= start <= stop <= n.
        """
        if not 0 <= start <= stop <= len(self.units):
            raise ConfigError(
                f"{self.spec.name} has units 0..{len(self.units)}, got [{start}, {stop})"
            )
        y = x
        with torch.inference_mode():
            for k in range(start, stop):
                if self._writes_input[k] and _share_memory(x, y):
                    y = y.clone()
                y = self.units[k](y)
            # Dropout and flatten hand their input through.
            if start < stop and _share_memory(x, y):
                y = y.clone()
        return y

    def to(self, device: str | torch.device) -> UnitChain:
        """Move the weights to `device`; returns the chain itself.

        Raises:
            ConfigError: This machine has no such device.
        """
        target = _usable_device(device)
        for unit in self.units:
            unit.to(target)
        self.device = target
        return self


def build_chain(model: str, weights: str = "none", seed: int = 0, device: str = "cpu") -> UnitChain:
    """Build a model with its weights.

    Args:
        model: One of `MODELS`.
        weights: "none" for seeded weights (the same on every machine, and different inputs give
            clearly different outputs), "DEFAULT" for torchvision's trained weights (downloaded
            once, then cached), or the path of a state dict saved with `torch.save`.
        seed: Chooses the weights when `weights` is "none"; otherwise unused.
        device: A torch device, e.g. "cpu" or "cuda:0".

    Raises:
        ConfigError: Unknown model, weights that cannot be read or belong to another model, or a
            device this machine lacks.
    """
    target = _usable_device(device)
    spec = model_spec(model)
    net, units, _ = _architecture(model)
    if weights == "none":
        net.to_empty(device="cpu")
        _seed_weights(net, seed)
    else:
        state = _trained_state(model) if weights == "DEFAULT" else _stored_state(weights)
        try:
            net.load_state_dict(state, assign=True)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ConfigError(f"weights {weights!r} do not fit {model}: {_line(error)}") from error
        net.float()
    chain = UnitChain(spec, net, list(units.values())).to(target)
    _log.info("%s: %d units, weights %s (%s)", model, spec.n_units, weights, chain.digest)
    return chain


@functools.cache
def model_spec(model: str) -> ModelSpec:
    """Units and cut sizes of a model, from shapes alone: no weights are made, nothing is computed.

    Raises:
        ConfigError: Unknown model.
    """
    net, units, head_start = _architecture(model)
    net.eval()
    y = torch.empty(INPUT_SHAPE, device="meta")
    cut_bytes = [y.nbytes]
    with torch.inference_mode():
        for unit in units.values():
            y = unit(y)
            cut_bytes.append(y.nbytes)
    return ModelSpec(
        name=model,
        unit_names=tuple(units),
        cut_bytes=tuple(cut_bytes),
        has_params=tuple(any(True for _ in unit.parameters()) for unit in units.values()),
        head_start=head_start,
        static_plan=STATIC_PLANS[model],
    )


def sample_input(seed: int) -> torch.Tensor:
    """A seeded random image: 1 x 3 x 224 x 224 float32, zero mean, unit variance.

    The same seed gives the same bytes on every machine.
    """
    return _uniform_(torch.empty(INPUT_SHAPE), math.sqrt(3.0), _generator(seed))


def _architecture(model: str) -> tuple[nn.Module, dict[str, nn.Module], int]:
    """The model without memory for its weights, its units by name, and where the head starts."""
    if model not in MODELS:
        raise ConfigError(f"unknown model {model!r}; expected one of {', '.join(MODELS)}")
    models = _torchvision_models()
    with torch.device("meta"):
        net: Any = getattr(models, model)(weights=None)
    units: dict[str, nn.Module] = {f"features.{i}": m for i, m in enumerate(net.features)}
    if model == "mobilenet_v2":
        units["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(1))
        units["classifier"] = net.classifier
        return net, units, len(units) - 2
    units["avgpool"] = net.avgpool
    head_start = len(units)
    # The flatten before the head only changes the shape, so it is no unit of its own.
    units["classifier.0"] = nn.Sequential(nn.Flatten(1), net.classifier[0])
    units |= {f"classifier.{i}": m for i, m in enumerate(net.classifier) if i > 0}
    return net, units, head_start


@functools.cache
def _torchvision_models() -> Any:
    """torchvision.models, also where torchvision's compiled operators do not match torch.

    Such an install (a CUDA build of torchvision beside a CPU build of torch) refuses to import for
    want of the schemas of two operators that no model here uses. Declaring them is enough.
    """
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        _log.info("torchvision's compiled operators are missing; declaring their schemas")
    for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    make_library: Any = torch.library.Library  # untyped in some versions of torch
    library = make_library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _op_schemas.append(library)
    return importlib.import_module("torchvision.models")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _uniform_(tensor: torch.Tensor, bound: float, generator: torch.Generator) -> torch.Tensor:
    """Fill with values uniform in (-bound, bound), bit for bit the same on every machine.

    torch's own distributions differ in the last bit between processors, which would give nodes of
    different kinds different digests. Here only the last operation rounds.
    """
    tensor.random_(0, 2**24, generator=generator)
    return tensor.sub_(2**23 - 0.5).mul_(bound / 2**23)


@torch.no_grad()
def _seed_weights(net: nn.Module, seed: int) -> None:
    """Kaiming weights, and batch-norm statistics of seeded images.

    With torchvision's own initialisation MobileNetV2's logits differ by 1e-10 between inputs, so a
    reply to another request, or zeros, would pass for the right one.
    """
    generator = _generator(seed)
    norms = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            _uniform_(module.weight, math.sqrt(6.0 / module.weight[0].numel()), generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
            norms.append(module)
    if not norms:
        return
    # In float64 and then rounded to 8 bits, the statistics too are the same on every machine.
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    images = torch.empty((CALIBRATION_IMAGES, *INPUT_SHAPE[1:]))
    net.eval().double()(_uniform_(images, math.sqrt(3.0), generator).double())
    for hook in hooks:
        hook.remove()
    net.float()


def _take_statistics(norm: nn.Module, args: tuple[torch.Tensor]) -> None:
    assert isinstance(norm, nn.BatchNorm2d)
    var, mean = torch.var_mean(args[0], dim=(0, 2, 3), correction=0)
    norm.running_mean, norm.running_var = (s.bfloat16().double() for s in (mean, var))


def _trained_state(model: str) -> Mapping[str, Any]:
    try:
        weights = _torchvision_models().get_model_weights(model).DEFAULT
        state: Mapping[str, Any] = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"cannot download torchvision's weights of {model}: {_line(error)}; use the path of a "
            'state dict, or weights = "none"'
        ) from error
    return state


def _stored_state(path: str) -> Mapping[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a file of another kind makes torch.load raise is open-ended
        raise ConfigError(
            f'weights: expected "none", "DEFAULT" or the path of a state dict, cannot read '
            f"{path!r}: {_line(error)}"
        ) from error
    if not isinstance(state, Mapping):
        raise ConfigError(f"weights {path!r}: expected a state dict, got {type(state).__name__}")
    return state


def _digest(state: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise ConfigError(f"device {str(device)!r} cannot be used here: {_line(error)}") from error
    return target


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _line(error: Exception) -> str:
    """The error's message on one line, of readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
