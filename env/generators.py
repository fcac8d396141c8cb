"""Generators that ship with the product: parameters of a process by name, from `generators.toml`.

They were fitted to measured traces by `benchmarks/fit_generators.py`; a scenario names one with
`{ kind = "generator", name = "ucc5g-dl" }` and needs no trace. docs/traces.md says how well they
resemble what they were fitted to.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from executor.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["JitterConstants", "generator", "generator_names", "jitter_constants"]

FILE = Path(__file__).parent / "generators.toml"


@dataclass(frozen=True)
class JitterConstants:
    """White noise of log(bandwidth) within a second.

    Attributes:
        cell_s: Length of a cell.
        white_sigma: Standard deviation per cell; of another length, as one over its square root.
    """

    cell_s: float
    white_sigma: float


@cache
def _tables() -> dict[str, Any]:
    tables: dict[str, Any] = tomllib.loads(FILE.read_text())
    return tables


def generator_names() -> tuple[str, ...]:
    """All names."""
    return tuple(_tables()["generators"])


def generator(name: str) -> dict[str, Any]:
    """Parameters of a "markov" `Process`, by field.

    Raises:
        ConfigError: There is no such generator.
    """
    tables = _tables()["generators"]
    if name not in tables:
        raise ConfigError(f"no generator {name!r}; there are {', '.join(tables)}")
    return dict(tables[name])


def jitter_constants() -> JitterConstants:
    """The fitted white part of sub-second jitter."""
    return JitterConstants(**_tables()["jitter"])
