"""Imports go one way: between the packages, and between the rooms of agents/."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND = {"agents.cli", "agents.nodes", "agents.paired"}  # what the rooms and commands share
# What each may import of this project, besides itself; a command, any of it.
MAY_IMPORT = {
    "executor": set(),
    "env": {"executor"},
    "ground": {"executor", "env"},
    "agents.arms": {"executor", "env", "ground"},
    "agents.learning": {"executor", "env", "ground", "agents.arms"},
    "agents.studies": {"executor", "env", "ground", "agents.arms"},
    "agents.report": {"executor", "env", "ground", "agents.studies"},
    "agents.serving": {"executor", "env", "ground", "agents.arms", "agents.learning"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path)
    for top in ("executor", "env", "agents")
    for path in ROOT.glob(f"{top}/**/*.py")
}


def room(module: str) -> str:
    if module in GROUND:
        return "ground"
    parts = module.split(".")
    if parts[0] != "agents":
        return parts[0]
    inside = ".".join(parts[:2])
    return inside if inside in MAY_IMPORT else "agents"


@functools.cache
def imported(module: str) -> set[str]:
    """The project's modules that one names, wherever in it: also inside functions."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES) or {node.module}
    ours = {name for name in found if name.split(".")[0] in MAY_IMPORT or name.startswith("agents")}
    assert ours <= MODULES, f"{module}: no such module: {ours - MODULES}"
    return ours


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_room_imports_only_what_lies_below_it(name):
    inside = {m for m in MODULES if room(m) == name}
    assert inside
    wrong = {
        f"{m} -> {target}"
        for m in inside
        for target in imported(m)
        if room(target) not in MAY_IMPORT[name] | {name}
    }
    assert not wrong


def test_no_command_is_imported_but_to_run_it():
    commands = {m for m in MODULES if room(m) == "agents"} - {"agents"}
    assert "agents.deploy" in commands
    assert not {m for m in MODULES if imported(m) & commands}
