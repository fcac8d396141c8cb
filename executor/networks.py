"""Where networks come from: torchvision's classification models, and files of the user's own.

Importing torchvision is left to the first call: it is slow, and a node that only relays or a
solver that only needs sizes from a stored profile never pays for it.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from executor.errors import ConfigError, one_line
from executor.modelref import absolute_model, file_reference

__all__ = [
    "INPUT_SHAPE",
    "Network",
    "check_model",
    "load_network",
    "network_names",
    "trained_state",
]

INPUT_SHAPE = (1, 3, 224, 224)
_INPUT_SHAPES = {"inception_v3": (1, 3, 299, 299)}
# Off training, auxiliary heads never run. With `transform_input` trained weights get the input
# scale they were trained with.
_WITHOUT_AUX = {"aux_logits": False, "transform_input": True, "init_weights": False}
_ARGUMENTS: dict[str, dict[str, Any]] = {"googlenet": _WITHOUT_AUX, "inception_v3": _WITHOUT_AUX}

_log = logging.getLogger(__name__)
_op_schemas: list[Any] = []  # a torch Library's definitions die with the object


@dataclass(frozen=True)
class Network:
    """A model before it is cut.

    Attributes:
        module: The module on the CPU, in inference mode; the parameters of torchvision's models
            have no values yet (whatever lies in their memory).
        input_shape: Shape of its one float32 input.
        source: The bytes of the user's file it comes from; empty for torchvision's.
    """

    module: nn.Module
    input_shape: tuple[int, ...]
    source: bytes = b""


def load_network(model: str) -> Network:
    """Make a network.

    Args:
        model: A torchvision classification model's name, or `FILE.py:FUNCTION`. That file is run:
            pass only what the user named on this machine.

    Raises:
        ConfigError: Unknown name (close ones are listed), or the file makes no module.
    """
    check_model(model)
    reference = file_reference(model)
    if reference is not None:
        return _own_network(*reference)
    models = torchvision_models()
    make = functools.partial(models.get_model, model, weights=None, **_ARGUMENTS.get(model, {}))
    with _values_left_out():
        module: nn.Module = make()
    return Network(module.eval(), _INPUT_SHAPES.get(model, INPUT_SHAPE))


@contextlib.contextmanager
def _values_left_out() -> Iterator[None]:
    """Let modules made within draw no first values, which are to be replaced.

    Drawing VGG16's takes a second, and touches all of its memory. (On the meta device there would
    be nothing to draw, but most of its operations import torch's compiler: 67 MiB and 2 s.)
    """
    functions = vars(nn.init)
    fillers = {name: f for name, f in functions.items() if name[0] != "_" and name[-1] == "_"}
    functions.update(dict.fromkeys(fillers, _left_as_it_is))
    try:
        yield
    finally:
        functions.update(fillers)


def _left_as_it_is(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def check_model(model: str) -> str:
    """The model itself, its file's path absolute; nothing is made or run.

    Raises:
        ConfigError: Unknown name (close ones are listed), or no such file.
    """
    reference = file_reference(model)
    if reference is not None:
        if not reference[0].is_file():
            raise ConfigError(f"model {model!r}: there is no file {reference[0]}")
        return absolute_model(model)
    if model not in network_names():
        close = difflib.get_close_matches(model, network_names(), n=4, cutoff=0.5)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ConfigError(
            f"unknown model {model!r}; expected a torchvision classification model or "
            f"FILE.py:FUNCTION{hint}"
        )
    return model


@functools.cache
def network_names() -> tuple[str, ...]:
    """Names of torchvision's classification models."""
    models = torchvision_models()
    return tuple(models.list_models(module=models))


def trained_state(model: str) -> dict[str, torch.Tensor]:
    """The weights torchvision trained for a model, downloaded once and cached by torch.

    Raises:
        ConfigError: They cannot be downloaded.
    """
    try:
        weights = torchvision_models().get_model_weights(model).DEFAULT
        state: dict[str, torch.Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"cannot download torchvision's weights of {model}: {one_line(error)}; use the path "
            'of a state dict, or weights = "none"'
        ) from error
    return state


def _own_network(path: Path, function: str) -> Network:
    """Run the user's file and call the function in it."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read model file {path}: {one_line(error)}") from error
    where = f"model file {path}"
    name = f"splitpilot_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py file has a loader
    file: Any = importlib.util.module_from_spec(spec)
    sys.modules[name] = file  # where a dataclass or a pickle in it looks
    try:
        spec.loader.exec_module(file)
        make = getattr(file, function, None)
        if not callable(make):
            raise ConfigError(f"{where}: it has no function or class {function!r}")
        module = make()
    except ConfigError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"{where}: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{where}: {function}() must return a torch.nn.Module, got {type(module).__name__}"
        )
    shape = getattr(file, "INPUT_SHAPE", INPUT_SHAPE)
    if (
        not isinstance(shape, tuple | list)
        or not 2 <= len(shape) <= 8
        or not all(isinstance(size, int) and size > 0 for size in shape)
    ):
        raise ConfigError(
            f"{where}: INPUT_SHAPE must be 2 to 8 positive sizes such as (1, 3, 224, 224), got "
            f"{shape!r}"
        )
    return Network(module.float().eval(), tuple(shape), source)


@functools.cache
def torchvision_models() -> Any:
    """torchvision.models, also where torchvision's compiled operators do not match torch.

    A CUDA build of torchvision beside a CPU build of torch refuses to import for want of the
    schemas of two operators that no model here uses. Declaring them is enough.
    """
    try:
        return _import_models()
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        _log.info("torchvision's compiled operators are missing; declaring their schemas")
    make_library: Any = torch.library.Library  # untyped in some versions of torch
    library = make_library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _op_schemas.append(library)
    return _import_models()


def _import_models() -> Any:
    """Import torchvision.models; torch's compiler comes along only where it has to."""
    try:
        with _compiler_left_out():
            return _imported("torchvision.models")
    except ImportError:  # this version asks the compiler for more
        return _imported("torchvision.models")


def _imported(module: str) -> Any:
    """The module, with nothing left of an import of its package that failed."""
    package = module.partition(".")[0]
    if package not in sys.modules:
        for name in [m for m in sys.modules if m.partition(".")[0] == package]:
            del sys.modules[name]
    return importlib.import_module(module)


@contextlib.contextmanager
def _compiler_left_out() -> Iterator[None]:
    """Keep `torchvision.ops.roi_align`, which no model here uses, from importing torch's compiler.

    It takes one function from there, at 67 MiB and 2 s of CPU time for every node. It gets one that
    imports the compiler when it is called.
    """
    names = ("torch._dynamo", "torch._dynamo.utils")
    if names[0] in sys.modules:
        yield
        return
    stand_ins: list[Any] = [types.ModuleType(name) for name in names]
    stand_ins[0].__path__ = []
    stand_ins[1].is_compile_supported = _is_compile_supported
    sys.modules.update(zip(names, stand_ins, strict=True))
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


def _is_compile_supported(device_type: str) -> bool:
    return bool(importlib.import_module("torch._dynamo.utils").is_compile_supported(device_type))
