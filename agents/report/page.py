"""One self-contained page of tables and figures: nothing is fetched, nothing has to be built."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from executor.errors import ConfigError
from executor.files import write_atomic

__all__ = ["Page", "Section", "Table", "figure", "interval", "made_section", "render"]

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass
class Table:
    """Rows of text under columns.

    Attributes:
        columns: Their heads; the first names the row.
        rows: As many values each.
        caption: Above the table.
        strong: The row of this name stands out.
        text: Columns of words, set to the left and wrapped.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    strong: str = ""
    text: Sequence[str] = ()


@dataclass
class Section:
    """A part of the page: what it shows in words, then figures, tables, and tables to unfold."""

    id: str
    title: str
    lead: list[str] = field(default_factory=list)
    figures: list[dict[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    more: list[Table] = field(default_factory=list)
    more_title: str = ""


@dataclass
class Page:
    """What a page says.

    Attributes:
        title: Its head.
        subtitle: One line below.
        tiles: Figures that stand out: value and label.
        warnings: What makes results doubtful.
        sections: The rest.
    """

    title: str
    subtitle: str
    tiles: list[Mapping[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


def figure(svg: str, alt: str, caption: str) -> dict[str, str]:
    """A figure for a section.

    Args:
        svg: The picture.
        alt: What it shows, for who cannot see it.
        caption: Below it.
    """
    return {"data": base64.b64encode(svg.encode()).decode(), "alt": alt, "caption": caption}


def interval(value: Mapping[str, float], digits: int = 3) -> str:
    """A mean and its 95 % interval: "0.861 (0.84 to 0.88)"."""
    mean, low, high = (f"{value[k]:.{digits}f}" for k in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def made_section(how: Mapping[str, Any], seeds: str) -> Section:
    """How the results came to be.

    Args:
        how: From `agents.studies.provenance.provenance`.
        seeds: In words.
    """
    rows = [
        ["command", how["command"]],
        ["seeds", seeds],
        ["splitpilot", how["version"]],
        ["python, numpy, torch", f"{how['python']}, {how['numpy']}, {how['torch']}"],
        ["machine", f"{how['machine']}, {how['cores']} cores"],
        ["profile (SHA-256)", how.get("profile_sha256", "none")],
    ]
    lead = ["Folders are left out of the command. Times measured are this machine's."]
    return Section(
        "made", "How it was made", lead, tables=[Table(["", "what"], rows, text=["what"])]
    )


def render(page: Page, directory: Path) -> Path:
    """Write `index.html` into a folder, which is made; returns its path.

    Raises:
        ConfigError: jinja2 is missing, or the folder cannot be written.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ConfigError(
            "a report needs jinja2: pip install 'splitpilot[plot]' (or pip install jinja2)"
        ) from error
    settings = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = settings.from_string(TEMPLATE.read_text()).render(**vars(page))
    path = directory / "index.html"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {directory}: {error.strerror}") from error
    write_atomic(path, text.encode())
    return path
