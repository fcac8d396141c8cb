"""Floating-point operations of what runs, by torch's own formulas, without loading its compiler.

`torch.utils.flop_counter.FlopCounterMode` gives the same numbers, but its first operation imports
`torch._dynamo`: 3 s of CPU time on a slow core, in every node that starts.
"""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["FlopCounter"]


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
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out
