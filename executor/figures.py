"""What every figure needs: matplotlib, if it is installed, and a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from executor.errors import ConfigError

__all__ = ["load_pyplot", "save_figure"]


def load_pyplot() -> Any:
    """matplotlib.pyplot, drawing without a screen.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "plotting needs matplotlib: pip install 'splitpilot[plot]' (or pip install matplotlib)"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure and let go of it; the file's suffix says the format.

    Raises:
        ConfigError: The file cannot be written, or its suffix is no format.
    """
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the figure {path}: {error}") from error
    finally:
        load_pyplot().close(figure)
