"""How a model is named: a torchvision name, or a function in a file of the user's own.

    resnet50
    nets/mine.py:build

A reference is read from a command line or from a node's own cluster file, never from the wire:
what travels between nodes is only the label, which names no path. No torch is needed here.
"""

from __future__ import annotations

from pathlib import Path

from executor.errors import ConfigError

__all__ = ["absolute_model", "file_reference", "model_label"]


def file_reference(model: str) -> tuple[Path, str] | None:
    """File and function of `FILE.py:FUNCTION`; None where `model` is a plain name.

    Raises:
        ConfigError: It names a Python file, but no function in it.
    """
    path, colon, function = model.rpartition(":")
    if model.endswith(".py") or (colon and path.endswith(".py") and not function.isidentifier()):
        raise ConfigError(
            f"model {model!r}: expected FILE.py:FUNCTION, the function (or class) in it that makes "
            "the model"
        )
    return (Path(path), function) if path.endswith(".py") else None


def model_label(model: str) -> str:
    """What a model is called in profiles, checkpoints and handshakes.

    The name itself, or FILE.FUNCTION without folders: machines keep the file where they like.
    """
    reference = file_reference(model)
    return model if reference is None else f"{reference[0].stem}.{reference[1]}"


def absolute_model(model: str, base: Path | None = None) -> str:
    """The same model, its file's path absolute; relative ones start at `base` (default: here)."""
    reference = file_reference(model)
    if reference is None:
        return model
    path, function = reference
    return f"{((base or Path()) / path).absolute()}:{function}"
