"""How results came to be, as plain numbers: command, versions, cores, the profile's digest."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from importlib import metadata
from typing import Any

import numpy as np

from executor.profile import Profile

__all__ = ["provenance", "without_folders"]


def provenance(profile: Profile | None, command: str) -> dict[str, Any]:
    """What a reader needs to make results again; nothing in it tells where they were made.

    Args:
        profile: The profile that they rest on, if it is one.
        command: As it was typed; folders are taken out of it.
    """
    import torch

    try:
        version = metadata.version("splitpilot")
    except metadata.PackageNotFoundError:
        version = "not installed"
    facts: dict[str, Any] = {
        "command": without_folders(command),
        "version": version,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count() or 1,
    }
    if profile is not None:
        digest = hashlib.sha256(profile.to_json().encode()).hexdigest()
        facts["profile_sha256"] = digest[:16]
    return facts


def without_folders(text: str) -> str:
    """A text with every path in it cut down to its last part."""
    return re.sub(r"[^\s=,]*/(?=[^\s=,])", "", text)
