"""The soak: an hour at 80 % of capacity with every fault of the chaos suite, and nothing may grow.

python benchmarks/soak.py --json soak.json                    # one hour
python benchmarks/soak.py --minutes 3                         # does it work here?

What the chain can do is measured first, without faults. Then `executor.chaos` breaks it at random
moments while memory, open files and threads of every process are sampled. Leaves with 1 if an
output was wrong, a request did not end exactly once, another promise was broken, or a process grew
past its bounds after it had settled. (The process of the load keeps a record of every request.)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from executor import chaos
from executor.errors import SplitpilotError
from executor.files import write_json
from executor.model import MODELS
from executor.testbed import Testbed

SHARE = 0.8
PERIOD_S = 1.0
# From when it serves a process is given so long to settle; shorter lives say nothing.
SETTLE_S = 30.0
MAX_GROWN_MIB = 50.0
MAX_GROWN_FILES = 16


@dataclass(frozen=True)
class Sample:
    """A process at one moment."""

    at_s: float
    rss_mib: float
    files: int
    threads: int


@dataclass
class Life:
    """One process from when it serves, or the load begins, to its end."""

    name: str
    pid: int
    samples: list[Sample] = field(default_factory=list)

    @property
    def judged(self) -> bool:
        """Whether it lived long enough to tell growth from settling."""
        return self.samples[-1].at_s - self.samples[0].at_s >= 2 * SETTLE_S

    def grown(self, value: Callable[[Sample], float]) -> float:
        """Median of the last five samples less that of the first five after settling."""
        settled_s = self.samples[0].at_s + SETTLE_S
        settled = [s for s in self.samples if s.at_s >= settled_s]
        first, last = settled[:5], settled[-5:]
        return statistics.median(map(value, last)) - statistics.median(map(value, first))

    def plain(self) -> dict[str, Any]:
        """For the report."""
        first, last = self.samples[0], self.samples[-1]
        values: dict[str, Any] = {
            "name": self.name,
            "pid": self.pid,
            "seconds": round(last.at_s - first.at_s, 1),
            "first": asdict(first),
            "last": asdict(last),
            "most_rss_mib": max(s.rss_mib for s in self.samples),
            "most_files": max(s.files for s in self.samples),
        }
        if self.judged:
            values["grown_mib"] = round(self.grown(lambda s: s.rss_mib), 1)
            values["grown_files"] = self.grown(lambda s: s.files)
        return values


class Watch(threading.Thread):
    """Samples the processes of a testbed, and this one, while it is entered."""

    def __init__(self, testbed: Testbed) -> None:
        """Prepare."""
        super().__init__(name="soak-watch", daemon=True)
        self.lives: dict[int, Life] = {}
        self._testbed = testbed
        self._over = threading.Event()

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        """Sample until it is left."""
        while not self._over.wait(PERIOD_S):
            for name, pid in {**self._testbed.pids, "load": os.getpid()}.items():
                sample = look(pid)
                if sample is not None:
                    self.lives.setdefault(pid, Life(name, pid)).samples.append(sample)


def look(pid: int) -> Sample | None:
    """A process now; None if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if "VmRSS" not in fields:
        return None
    rss_mib = int(fields["VmRSS"].split()[0]) / 1024
    return Sample(round(time.monotonic(), 1), round(rss_mib, 1), files, int(fields["Threads"]))


def grown(lives: list[Life]) -> list[str]:
    """Who grew past the bounds, in words."""
    out = []
    for life in lives:
        if not life.judged:
            continue
        mib, files = life.grown(lambda s: s.rss_mib), life.grown(lambda s: s.files)
        if mib > MAX_GROWN_MIB:
            out.append(f"{life.name} ({life.pid}) grew by {mib:.0f} MiB")
        if files > MAX_GROWN_FILES:
            out.append(f"{life.name} ({life.pid}) opened {files:.0f} files and kept them")
    return out


def main() -> int:
    """Soak; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="alexnet")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="of faults and load")
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()
    if not (math.isfinite(args.minutes) and args.minutes > 0):
        parser.error(f"--minutes must be positive, got {args.minutes}")
    watches: list[Watch] = []

    def watch(testbed: Testbed) -> Watch:
        watches.append(Watch(testbed))
        return watches[-1]

    console = Console()
    try:
        report = chaos.run(
            args.model,
            args.minutes,
            args.seed,
            direct=True,
            gone=False,
            of_capacity=SHARE,
            watch=watch,
            console=console,
        )
    except SplitpilotError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    lives = [life for one in watches for life in one.lives.values()]
    problems = [*report.problems, *grown(lives)]
    if not lives:
        problems.append("no process was watched")
    if args.json:
        values = {
            **report.plain(),
            "problems": problems,
            "ok": report.ok and not problems,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "processes": [life.plain() for life in lives],
        }
        write_json(args.json, values)
    ends = ", ".join(f"{n} {what}" for what, n in sorted(report.ends.items()))
    console.print(
        f"{report.seconds / 60:.1f} minutes at {report.rate_rps:.2f} of "
        f"{report.capacity_rps:.2f} requests/s, {len(report.outcomes)} faults: {ends}; "
        f"{report.retried} of them retried, {report.unaccounted} unaccounted"
    )
    recovery = report.plain()["recovery"]
    console.print(f"recovery: {json.dumps(recovery)}")
    judged = [life for life in lives if life.judged]
    for name in sorted({life.name for life in judged}):
        mine = [life for life in judged if life.name == name]
        console.print(
            f"{name}: {len(mine)} lives judged, grew by at most "
            f"{max(life.grown(lambda s: s.rss_mib) for life in mine):.1f} MiB and "
            f"{max(life.grown(lambda s: s.files) for life in mine):.0f} open files"
        )
    for problem in problems:
        console.print(f"broken: {problem}")
    return 0 if report.ok and not problems else 1


if __name__ == "__main__":
    sys.exit(main())
