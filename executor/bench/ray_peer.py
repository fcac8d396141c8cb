"""Ray actors, one per node, chained by object references. Only where Ray is installed."""

from __future__ import annotations

import importlib.util

__all__ = ["missing"]


def missing() -> str:
    """Why it cannot be used."""
    return "" if importlib.util.find_spec("ray") else "not installed"
