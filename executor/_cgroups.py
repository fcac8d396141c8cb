"""CPU quotas of process groups, by cgroup of version 1 (`cpu.cfs_quota_us`) or 2 (`cpu.max`)."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from executor.errors import ConfigError

__all__ = ["PERIOD_S", "CpuGroups"]

# Short, so that a stage of a few ms is slowed down rather than stopped and let go.
PERIOD_S = 0.02
_MIN_QUOTA_US = 1000  # the kernel takes no less


@dataclass(frozen=True)
class CpuGroups:
    """Where groups with a CPU quota can be made.

    Attributes:
        base: The group they are made in.
        version: 1 or 2.
    """

    base: Path
    version: int

    @classmethod
    def find(
        cls, mounts: Path = Path("/proc/self/mounts"), own: Path = Path("/proc/self/cgroup")
    ) -> CpuGroups:
        """This machine's.

        Raises:
            ConfigError: There is no hierarchy whose groups can be given a share of the CPU.
        """
        unified = None
        for line in mounts.read_text().splitlines():
            _, at, kind, options = line.split()[:4]
            if kind == "cgroup" and "cpu" in options.split(","):
                # Within our own group, so that what limits us limits our children.
                inner = Path(at) / _own_group(own).lstrip("/")
                return cls(inner if inner.is_dir() else Path(at), 1)
            if kind == "cgroup2":
                unified = unified or Path(at)
        if unified is None or "cpu" not in _words(unified / "cgroup.controllers"):
            raise ConfigError("the kernel offers no cgroup with a cpu controller")
        if "cpu" not in _words(unified / "cgroup.subtree_control"):
            raise ConfigError(
                f"{unified} gives its groups no cpu controller; allow it: "
                f"echo +cpu > {unified}/cgroup.subtree_control"
            )
        return cls(unified, 2)

    def create(self, name: str, cores: float) -> Path:
        """Make a group that gets at most `cores` cores in every period; returns its folder.

        Raises:
            OSError: It cannot be made.
        """
        group = self.base / name
        group.mkdir()
        period_us = round(PERIOD_S * 1e6)
        quota_us = max(_MIN_QUOTA_US, round(min(cores, self._limit()) * period_us))
        if self.version == 1:
            (group / "cpu.cfs_period_us").write_text(str(period_us))
            (group / "cpu.cfs_quota_us").write_text(str(quota_us))
        else:
            (group / "cpu.max").write_text(f"{quota_us} {period_us}")
        return group

    def _limit(self) -> float:
        """Cores that the base itself may use: version 1 refuses a group in it any more."""
        try:
            quota_us, period_us = (
                int((self.base / f"cpu.cfs_{what}_us").read_text()) for what in ("quota", "period")
            )
        except (OSError, ValueError):
            return math.inf
        return quota_us / period_us if quota_us > 0 else math.inf

    def names(self) -> list[str]:
        """Names of the groups there are."""
        return [path.name for path in self.base.iterdir() if path.is_dir()]

    def remove(self, name: str) -> bool:
        """Remove a group; false if processes are left in it."""
        try:
            os.rmdir(self.base / name)
        except FileNotFoundError:
            pass
        except OSError:
            return False
        return True


def _own_group(own: Path) -> str:
    """Our group in the version 1 hierarchy with the cpu controller; "/" if it is not told."""
    for line in own.read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if "cpu" in controllers.split(","):
            return group
    return "/"


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
