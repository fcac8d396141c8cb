"""Floating-point operations of what runs, by torch's own formulas, without loading its compiler.

`torch.utils.flop_counter.FlopCounterMode` gives the same numbers, but its first operation imports
`torch._dynamo`: 3 s of CPU time on a slow core, in every node that starts.
"""

from __future__ import annotations

from typing import Any

import torch.backends.mha
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["FlopCounter"]

_FORMULAS = dict(flop_registry)
_ATEN = torch.ops.aten
if hasattr(_ATEN, "_scaled_dot_product_flash_attention_for_cpu"):  # torch knows the GPU's alone
    _FORMULAS[_ATEN._scaled_dot_product_flash_attention_for_cpu] = _FORMULAS[
        _ATEN._scaled_dot_product_flash_attention
    ]


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # so in torch
    """A context manager that counts the operations of convolutions and matrix products within it.

    Attention is computed by its parts within it: its fused kernel for inference has no formula.

    Attributes:
        total: Floating-point operations so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # so in torch
        self.total = 0
        self._fused: list[bool] = []

    def __enter__(self) -> FlopCounter:
        self._fused.append(torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        super().__enter__()  # type: ignore[no-untyped-call]  # so in torch
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]  # so in torch
        torch.backends.mha.set_fastpath_enabled(self._fused.pop())

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
