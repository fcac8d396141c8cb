"""Floating-point operations of what runs, by torch's own formulas, without loading its compiler.

`torch.utils.flop_counter.FlopCounterMode` gives the same numbers, but its first operation imports
`torch._dynamo`: 3 s of CPU time on a slow core, in every node that starts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.backends.mha
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["FlopCounter", "attention_in_parts"]

_FORMULAS = dict(flop_registry)
_ATEN = torch.ops.aten
if hasattr(_ATEN, "_scaled_dot_product_flash_attention_for_cpu"):  # torch knows the GPU's alone
    _FORMULAS[_ATEN._scaled_dot_product_flash_attention_for_cpu] = _FORMULAS[
        _ATEN._scaled_dot_product_flash_attention
    ]


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # so in torch
    """A context manager that counts the operations of convolutions and matrix products within it.

    Attributes:
        total: Floating-point operations so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # so in torch
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what skips it has to import it first

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # a composite operation counts as its parts
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        out = func(*args, **kwargs)
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


@contextlib.contextmanager
def attention_in_parts() -> Iterator[None]:
    """Compute attention by its parts within: its fused layer for inference has no formula."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
