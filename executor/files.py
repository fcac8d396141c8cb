"""Files that are whole or not there: written aside, synced, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from executor.errors import ConfigError

__all__ = ["write_atomic", "write_json", "write_together"]


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` beside `path` and rename it, so a reader never sees half a file.

    Raises:
        ConfigError: It cannot be written (no space, no permission, ...); what was there stays.
    """
    write_together({Path(path): data})


def write_json(path: Path, values: Any) -> None:
    """Write plain values as JSON, as `write_atomic` does."""
    write_atomic(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write several files aside, and rename them only when all are on the disk.

    Each is whole at any moment. They are renamed in their order, so a power cut or a kill between
    two renames can leave new files beside old ones; the last should hold the others' digests.

    Raises:
        ConfigError: One cannot be written; all that were there stay as they were.
    """
    aside = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    path = next(iter(files))
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(path)
            with open(aside[path], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(aside[path], path)
        for folder in {path.parent for path in files}:
            _sync_folder(folder)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}; what was there is unchanged"
        ) from error
    finally:
        for part in aside.values():
            with contextlib.suppress(OSError):
                part.unlink()


def _remove_stale(path: Path) -> None:
    """Remove what a killed process left of its attempt at this file."""
    for part in path.parent.glob(f".{path.name}.*.part"):
        pid = part.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make renames last over a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
