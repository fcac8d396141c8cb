"""What computes a stretch of units: one interface, several engines.

- `eager`: torch as it is. The reference: on one machine any split gives the whole model's bits.
- `tuned`: torch with batch norms folded into the convolutions before them, in channels-last.
- `onnx`: onnxruntime, sessions of one to four units (`pip install "splitpilot[onnx]"`), CPU only.

Each serves any stretch [a, b) from the one copy of the weights it holds: `tuned` folds in place,
and `onnx` lends torch's large matrices to its sessions. Their outputs agree with eager's within
1e-4 of max |y|.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib.util
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from executor.errors import ConfigError, one_line
from executor.model import UnitChain, build_chain, sample_input
from executor.plan import ModelSpec

__all__ = ["BACKENDS", "available_backends", "build_backend", "onnx_unit"]

BACKENDS = ("eager", "tuned", "onnx")
TRIALS = 3
# Onnxruntime's own cost per session (reordering, no fusion across its ends) is a fifth of
# MobileNetV2's pass; runs of this many units win back most of it, for a second copy of what the
# sessions hold. That copy (twice, see `_exported`) is made where it keeps a node within 1.2 copies
# of the weights and 100 MiB, half of which onnxruntime takes anyway.
FUSED_UNITS = 4
FUSED_BYTES = 50 * 2**20

_log = logging.getLogger(__name__)


def available_backends(device: str = "cpu") -> tuple[str, ...]:
    """The backends that can run here on a torch device."""
    found = [name for name in BACKENDS if name != "onnx" or _missing(device) is None]
    return tuple(found)


def build_backend(
    name: str, model: str, weights: str = "none", seed: int = 0, device: str = "cpu"
) -> tuple[UnitChain, str]:
    """Build a model on a backend.

    Args:
        name: One of `BACKENDS`, or "auto": each that is available runs a few whole passes, and the
            fastest one stays.
        model: As `executor.model.build_chain`, and so are the other arguments.
        weights: See there.
        seed: See there.
        device: See there.

    Returns:
        The chain, and the name of its backend.

    Raises:
        ConfigError: Unknown backend, a package it needs is missing, it cannot take this model or
            device, or as `build_chain`.
    """
    if name == "auto":
        name = _fastest(lambda each: build_backend(each, model, weights, seed, device)[0], device)
    if name not in BACKENDS:
        raise ConfigError(f"unknown backend {name!r}; expected auto, {', '.join(BACKENDS)}")
    if name == "onnx" and (reason := _missing(device)):
        raise ConfigError(reason)
    chain = build_chain(model, weights, seed, device)
    if name != "eager":
        chain = _MAKERS[name](chain)
    _return_freed_memory()
    return chain, name


def _fastest(build: Callable[[str], UnitChain], device: str) -> str:
    taken_s: dict[str, float] = {}
    for name in available_backends(device):
        try:
            chain = build(name)
        except ConfigError as error:
            if name == "eager":
                raise
            _log.warning("backend %s is left out: %s", name, error)
            continue
        x = sample_input(0, chain.spec.input_shape).to(chain.device)
        times_s = []
        for _ in range(TRIALS + 1):
            begun_s = time.perf_counter()
            chain.run(x, 0, chain.spec.n_units).cpu()
            times_s.append(time.perf_counter() - begun_s)
        taken_s[name] = min(times_s[1:])
    _log.info("whole passes: %s", {name: f"{t * 1e3:.1f} ms" for name, t in taken_s.items()})
    return min(taken_s, key=taken_s.__getitem__)


def _return_freed_memory() -> None:
    """Give what building took back to the system; glibc would keep it for the node's life."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _missing(device: str) -> str | None:
    """Why onnxruntime cannot be used; None if it can."""
    if torch.device(device).type != "cpu":
        return f"backend onnx runs on the CPU, not on {device!r}; use eager or tuned"
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            return f'backend onnx needs {package}: pip install "splitpilot[onnx]"'
    return None


class _TunedChain(UnitChain):
    """Channels-last within a stage; contiguous, as everywhere, at a cut."""

    def _enter(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    def _between(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def _leave(self, y: torch.Tensor) -> torch.Tensor:
        return y.contiguous()


def _tuned(chain: UnitChain) -> UnitChain:
    units = []
    for unit in chain.units:
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in unit.modules()):
            unit = _folded(unit)
        to_format: Any = unit.to  # torch's signature for this use is not typed
        units.append(to_format(memory_format=torch.channels_last).requires_grad_(False))
    return _TunedChain.like(chain, units)


def _folded(unit: nn.Module) -> nn.Module:
    """The unit with each batch norm that directly follows a convolution folded into it."""
    module = fx.symbolic_trace(unit)
    calls = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
    for norm in list(module.graph.nodes):
        conv = norm.args[0] if norm.op == "call_module" and norm.args else None
        if not isinstance(conv, fx.Node) or conv.op != "call_module" or len(conv.users) > 1:
            continue
        before, after = (module.get_submodule(str(node.target)) for node in (conv, norm))
        if (
            isinstance(before, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            and isinstance(after, nn.modules.batchnorm._BatchNorm)
            and after.running_var is not None
            and calls.count(str(conv.target)) == 1
        ):
            parent, _, name = str(conv.target).rpartition(".")
            setattr(module.get_submodule(parent), name, fuse_conv_bn_eval(before, after))
            norm.replace_all_uses_with(conv)
            module.graph.erase_node(norm)
    module.graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


class _OnnxChain(UnitChain):
    """Sessions of single units, and fused ones of runs of units where memory allows.

    Attributes:
        fused: By first unit, one past the last and the session.
    """

    def __init__(
        self, spec: ModelSpec, units: list[nn.Module], writes_input: Sequence[bool], digest: str
    ) -> None:
        super().__init__(spec, units, writes_input, digest)
        self.fused: dict[int, tuple[int, nn.Module]] = {}

    def _schedule(self, start: int, stop: int) -> Iterator[tuple[int, nn.Module]]:
        k = start
        while k < stop:
            end, session = self.fused.get(k, (stop + 1, None))
            if session is None or end > stop:
                end, session = k + 1, self.units[k]
            yield k, session
            k = end


class _Session(nn.Module):
    """A unit in onnxruntime."""

    def __init__(self, session: Any, shared: dict[str, Any]) -> None:
        super().__init__()
        self._session = session
        self._shared = shared
        self.lent_bytes = sum(array.nbytes for array in shared.values())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it; the output is new memory."""
        (y,) = self._session.run(None, {"x": x.numpy(), **self._shared})
        return torch.from_numpy(y)


def _onnx(chain: UnitChain) -> UnitChain:
    n = chain.spec.n_units
    activations = [sample_input(0, chain.spec.input_shape)]
    sessions: list[_Session] = []
    for k, unit in enumerate(chain.units):
        try:
            sessions.append(onnx_unit(unit, activations[k]))
        except Exception as error:  # the exporter and the parser raise many kinds
            raise ConfigError(
                f"backend onnx cannot take unit {chain.spec.unit_names[k]} of {chain.spec.name}: "
                f"{one_line(error)}"
            ) from error
        activations.append(chain.run(activations[k], k, k + 1))
    made = _OnnxChain(chain.spec, list(sessions), [False] * n, chain.digest)
    weights = sum(p.nbytes for unit in chain.units for p in unit.parameters())
    held = weights - sum(session.lent_bytes for session in sessions)
    if 3 * held <= weights // 5 + FUSED_BYTES:
        for start, stop in _runs((0, *chain.spec.static_plan, n)):
            module = nn.Sequential(*chain.units[start:stop])
            made.fused[start] = (stop, onnx_unit(module, activations[start]))
    return made


def _runs(cuts: tuple[int, ...]) -> list[tuple[int, int]]:
    """Runs of 2 to `FUSED_UNITS` units, none across one of the cuts."""
    found = []
    for start, stop in pairwise(cuts):
        found += [(k, min(k + FUSED_UNITS, stop)) for k in range(start, stop, FUSED_UNITS)]
    return [(start, stop) for start, stop in found if stop - start > 1]


def onnx_unit(unit: nn.Module, x: torch.Tensor) -> _Session:
    """A module in onnxruntime, with torch's number of threads.

    Args:
        unit: The module, in inference mode on the CPU.
        x: An input of the shape it will always get.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # An arena or spinning threads of its own would cost each session memory and CPU that others
    # need; without any arena glibc keeps more of what was freed.
    _share_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model, shared = _exported(unit, x)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return _Session(session, shared)


@functools.cache
def _share_arena() -> None:
    """Let all sessions of this process allocate from one arena, which grows by what is asked."""
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    no_limit, as_requested, default = 0, 1, -1
    ort.create_and_register_allocator(
        memory, ort.OrtArenaCfg(no_limit, as_requested, default, default)
    )


def _exported(unit: nn.Module, x: torch.Tensor) -> tuple[bytes, dict[str, Any]]:
    """A unit as an ONNX model, and the weights it takes as inputs instead of holding them.

    onnxruntime keeps two copies of what a model holds. A fully connected layer's matrix is most of
    a model's weights and gains nothing from being known ahead, so it stays torch's and is lent to
    each run; the rest (convolutions, mostly) goes in, where onnxruntime folds and reorders it.
    """
    import onnx

    file = io.BytesIO()
    export: Any = torch.onnx.export  # it takes a buffer, its type says otherwise
    with warnings.catch_warnings(), torch.no_grad():
        # It warns that it is the older exporter; the newer one wants onnxscript too.
        warnings.simplefilter("ignore")
        # A clone: units may work in place, and outside inference mode.
        export(
            unit,
            (x.clone(),),
            file,
            dynamo=False,
            input_names=["x"],
            export_params=False,
            # Off training as the unit is, but without folded weights that no state dict names.
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
        )
    model = onnx.load_from_string(file.getvalue())
    state = {name: tensor.numpy() for name, tensor in unit.state_dict().items()}
    lent = {node.input[1] for node in model.graph.node if node.op_type == "Gemm"} & state.keys()
    kept = [value for value in model.graph.input if value.name == "x" or value.name in lent]
    held = [value.name for value in model.graph.input if value.name not in lent | {"x"}]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(state[n], n) for n in held)
    return model.SerializeToString(), {name: state[name] for name in lent}


_MAKERS = {"tuned": _tuned, "onnx": _onnx}
