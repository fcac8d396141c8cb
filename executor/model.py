"""A network as a chain of units that can be cut between any two of them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from executor._weights import digest_of, seed_weights, seeded_tensor, stored_state
from executor.errors import ConfigError, StageAbandoned, one_line
from executor.flops import FlopCounter, attention_in_parts
from executor.modelref import model_label
from executor.networks import INPUT_SHAPE, Network, load_network, trained_state
from executor.plan import ModelSpec, candidate_cuts
from executor.tracing import head_start, trace_units

__all__ = ["MODELS", "UnitChain", "UnitCost", "build_chain", "model_spec", "sample_input"]
__all__ += ["unit_costs"]

# Cut by hand, as the reference work (arXiv 2605.09623) cuts them; any other model is traced.
MODELS: tuple[str, ...] = ("alexnet", "vgg16", "mobilenet_v2")
# The reference work's rough thirds, as cuts.
STATIC_PLANS = {"alexnet": (10, 14), "vgg16": (11, 31), "mobilenet_v2": (10, 19)}

_log = logging.getLogger(__name__)


class UnitChain:
    """A model in inference mode, as n units run one after another.

    Attributes:
        spec: Names, cut sizes and the rest of what a plan needs.
        units: The n modules, in order; not to be changed.
        digest: First 16 hex characters of a SHA-256; equal digests mean equal weights.
        device: Where the weights are.
    """

    def __init__(
        self, spec: ModelSpec, units: list[nn.Module], writes_input: Sequence[bool], digest: str
    ) -> None:
        """Take the units as they are.

        Args:
            spec: What they are.
            units: n modules in inference mode, weights in place.
            writes_input: Per unit, whether it overwrites its input.
            digest: Of the weights.
        """
        self.spec = spec
        self.units = units
        self.digest = digest
        self.device = torch.device("cpu")
        self._writes_input = tuple(writes_input)

    def run(
        self,
        x: torch.Tensor,
        start: int,
        stop: int,
        is_wanted: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """Run units [start, stop) on x.

        Args:
            x: Activation at cut `start`, float32, on the chain's device. It is never modified.
            start: First unit, 0..n.
            stop: One past the last unit, start..n.
            is_wanted: Asked before every unit; once it says no, the rest is not run.

        Returns:
            The activation at cut `stop`, contiguous: what crosses a cut is the same bytes whether
            or not it is cut there. It shares no memory with x, unless start == stop: then it is x.

        Raises:
            ConfigError: Not 0 <= start <= stop <= n.
            StageAbandoned: `is_wanted` said no.
        """
        if not 0 <= start <= stop <= len(self.units):
            raise ConfigError(
                f"{self.spec.name} has units 0..{len(self.units)}, got [{start}, {stop})"
            )
        y = self._enter(x) if start < stop else x
        with torch.inference_mode():
            for k, unit in self._schedule(start, stop):
                if is_wanted is not None and not is_wanted():
                    raise StageAbandoned(f"units [{k}, {stop}) are not wanted any more")
                if self._writes_input[k] and _share_memory(x, y):
                    y = y.clone()
                y = self._between(unit(y))
            if start < stop:
                y = self._leave(y)
            # Dropout and flatten hand their input through.
            if start < stop and _share_memory(x, y):
                y = y.clone()
        return y

    def _schedule(self, start: int, stop: int) -> Iterable[tuple[int, nn.Module]]:
        """What to call for units [start, stop): first unit of each call, and the module."""
        return zip(range(start, stop), self.units[start:stop], strict=True)

    def _enter(self, x: torch.Tensor) -> torch.Tensor:
        """The form in which the first unit takes the stage's input."""
        return x

    def _between(self, y: torch.Tensor) -> torch.Tensor:
        """The form in which the next unit takes a unit's output: what a cut would make of it."""
        return y.contiguous()

    def _leave(self, y: torch.Tensor) -> torch.Tensor:
        """The form in which the stage's output leaves: contiguous."""
        return y

    @classmethod
    def like(cls, chain: UnitChain, units: list[nn.Module]) -> UnitChain:
        """A chain of other modules that compute what `chain`'s units compute."""
        made = cls(chain.spec, units, chain._writes_input, chain.digest)
        made.device = chain.device
        return made

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


@dataclass(frozen=True)
class UnitCost:
    """What running a unit once takes, from shapes alone.

    Attributes:
        flops: Floating-point operations of its convolutions and matrix products.
        param_bytes: Bytes of its parameters.
        io_bytes: Bytes of its input and output.
    """

    flops: int
    param_bytes: int
    io_bytes: int


@dataclass(frozen=True)
class _Survey:
    """All that is known of a model without its weights."""

    spec: ModelSpec
    costs: tuple[UnitCost, ...]
    writes_input: tuple[bool, ...]
    cut: _Cut


class _Cut:
    """How a network falls into units: by hand, or traced."""

    def __init__(self, network: Network, model: str) -> None:
        self._by_hand = model in MODELS
        if self._by_hand:
            names = list(_units_by_hand(network.module))
            self.head_start = names.index("pool" if "pool" in names else "classifier.0")
            return
        self._traced = trace_units(network.module, network.input_shape, model_label(model))
        self.head_start = head_start(self._traced)

    def units(self, net: nn.Module) -> dict[str, nn.Module]:
        """The units of `net`, which has the traced network's structure; weights are shared."""
        if self._by_hand:
            return _units_by_hand(net)
        return {unit.name: fx.GraphModule(net, unit.graph) for unit in self._traced}


def build_chain(model: str, weights: str = "none", seed: int = 0, device: str = "cpu") -> UnitChain:
    """Build a model with its weights.

    Args:
        model: A torchvision classification model's name, or `FILE.py:FUNCTION` (which is run).
        weights: "none" for seeded weights (the same on every machine, and different inputs give
            clearly different outputs); "DEFAULT" for torchvision's trained weights (downloaded
            once, then cached), or those that FUNCTION made; or the path of a state dict saved with
            `torch.save`.
        seed: Chooses the weights when `weights` is "none"; otherwise unused.
        device: A torch device, e.g. "cpu" or "cuda:0".

    Raises:
        ConfigError: Unknown model or one that cannot be cut, weights that cannot be read or belong
            to another model, or a device this machine lacks.
    """
    target = _usable_device(device)
    survey = _survey(model)
    network = load_network(model)
    net = network.module
    # Tracing may leave constants of the user's code in the network, so this one is traced too.
    cut = _Cut(network, model) if network.source else survey.cut
    if weights == "none":
        _seed(net, network.input_shape, seed, model)
    elif weights != "DEFAULT" or not network.source:
        _load(net, trained_state(model) if weights == "DEFAULT" else stored_state(weights), weights,
              model_label(model))  # fmt: skip
    net.eval().requires_grad_(False)
    digest = digest_of(net, network.source)
    spec = survey.spec
    chain = UnitChain(spec, list(cut.units(net).values()), survey.writes_input, digest).to(target)
    _log.info("%s: %d units, weights %s (%s)", spec.name, spec.n_units, weights, digest)
    return chain


def model_spec(model: str) -> ModelSpec:
    """Units and cut sizes of a model, from shapes alone: no weights are made, nothing is computed.

    Only a user's own model is made and run once.

    Raises:
        ConfigError: Unknown model, or one that cannot be cut.
    """
    return _survey(model).spec


def unit_costs(model: str) -> tuple[UnitCost, ...]:
    """Per unit, what running it takes.

    Raises:
        ConfigError: As `model_spec`.
    """
    return _survey(model).costs


def sample_input(seed: int, shape: tuple[int, ...] = INPUT_SHAPE) -> torch.Tensor:
    """A seeded random image (or other input): float32, zero mean, unit variance.

    The same seed and shape give the same bytes on every machine.
    """
    return seeded_tensor(shape, seed)


@functools.cache
def _survey(model: str) -> _Survey:
    network = load_network(model)
    cut = _Cut(network, model)
    units = cut.units(network.module)
    y = torch.zeros(network.input_shape)
    cut_bytes = [y.nbytes]
    costs, writes_input = [], []
    for unit in units.values():
        version, entered = y._version, y
        with torch.no_grad(), attention_in_parts(), FlopCounter() as counter:
            y = unit(y)
        writes_input.append(entered._version != version)
        cut_bytes.append(y.nbytes)
        param_bytes = sum(p.nbytes for p in unit.parameters())
        costs.append(UnitCost(counter.total, param_bytes, sum(cut_bytes[-2:])))
    spec = ModelSpec(
        name=model_label(model),
        unit_names=tuple(units),
        cut_bytes=tuple(cut_bytes),
        has_params=tuple(cost.param_bytes > 0 for cost in costs),
        head_start=cut.head_start,
        static_plan=STATIC_PLANS.get(model, (1, 1)),
        input_shape=network.input_shape,
    )
    if model not in STATIC_PLANS:
        spec = replace(spec, static_plan=_thirds(spec))
    return _Survey(spec, tuple(costs), tuple(writes_input), cut)


def _thirds(spec: ModelSpec) -> tuple[int, int]:
    """Rough thirds as the reference work's: half the units before the head, the rest, the head.

    The first cut is the candidate nearest to the half, so that it carries no more than the input.
    """
    last = spec.head_start
    within = [k for k in candidate_cuts(spec) if 0 < k < last] or [min(1, last)]
    return min(within, key=lambda k: abs(2 * k - last)), last


def _units_by_hand(net: nn.Module) -> dict[str, nn.Module]:
    """The units of a model in `MODELS`."""
    layers: Any = net  # its attributes are torchvision's
    units: dict[str, nn.Module] = {f"features.{i}": m for i, m in enumerate(layers.features)}
    if not hasattr(layers, "avgpool"):
        units["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(1))
        units["classifier"] = layers.classifier
        return units
    units["avgpool"] = layers.avgpool
    # The flatten before the head only changes the shape, so it is no unit of its own.
    units["classifier.0"] = nn.Sequential(nn.Flatten(1), layers.classifier[0])
    units |= {f"classifier.{i}": m for i, m in enumerate(layers.classifier) if i > 0}
    return units


def _seed(net: nn.Module, input_shape: tuple[int, ...], seed: int, model: str) -> None:
    try:
        # float64 is slow on large networks; the three by hand keep what they always had.
        seed_weights(net, input_shape, seed, images=4 if model in MODELS else 2)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"model {model_label(model)}: statistics cannot be taken in float64: "
            f'{one_line(error)}; use weights = "DEFAULT" or a file'
        ) from error


def _load(net: nn.Module, state: Mapping[str, Any], weights: str, label: str) -> None:
    own = net.state_dict().keys()
    # GoogLeNet's and Inception's auxiliary heads only matter to training.
    state = {k: v for k, v in state.items() if k in own or not str(k).lower().startswith("aux")}
    try:
        net.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ConfigError(f"weights {weights!r} do not fit {label}: {one_line(error)}") from error
    net.float()


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise ConfigError(
            f"device {str(device)!r} cannot be used here: {one_line(error)}"
        ) from error
    return target


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
