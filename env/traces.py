"""Measured traces: one loader for the formats in use, strict about what it reads.

Formats, told apart by the first line:

- CSV with a header. The first column is `time_s` (or `time`), the others name what was measured:
  `mbps` (bandwidth), `rtt_ms` (round trip), `load` (0..1), `rate_rps` (arrivals); a column `run`
  numbers stretches of measurement between which time passed unmeasured (they are joined).
- mahimahi: one whole number per line, the millisecond at which one 1500-byte packet can be
  delivered; kept to the millisecond, repeated with the period of its last line, as mahimahi does.

A CSV value holds from its time to the next one's. Files of one source share the beginning of their
name up to the first underscore: their *family*. Errors are `ConfigError`s naming file and line.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from executor.errors import ConfigError

__all__ = ["MTU_BYTES", "QUANTITIES", "Trace", "load_trace", "load_traces"]

F64 = NDArray[np.float64]

QUANTITIES = ("mbps", "rtt_ms", "load", "rate_rps")
TIME_NAMES = ("time_s", "time")
MTU_BYTES = 1500
MBPS_PER_PACKET_PER_MS = MTU_BYTES * 8 / 1e3
MAX_GAP_STEPS = 10  # a longer silence inside a stretch is a hole, not a lost sample
SUFFIXES = (".csv", ".up", ".down")


@dataclass(frozen=True, eq=False)
class Trace:
    """One measured series: means over consecutive steps.

    Attributes:
        name: The file's name, without .csv.
        quantity: One of `QUANTITIES`.
        dt_s: Seconds per sample.
        values: Shape [n], >= 0, in the quantity's unit; read-only.
        native: Recorded packet by packet (mahimahi): nothing is known to be missing within a step.
    """

    name: str
    quantity: str
    dt_s: float
    values: F64
    native: bool = False

    @property
    def family(self) -> str:
        """The source it comes from."""
        return self.name.split("_", 1)[0]

    @property
    def duration_s(self) -> float:
        """Length of the trace, and the period with which it repeats."""
        return self.dt_s * len(self.values)


def load_traces(paths: str | Sequence[str], quantity: str) -> tuple[Trace, ...]:
    """All traces that `paths` name, in the order of their names.

    Args:
        paths: Files, folders (their .csv, .up and .down files) or glob patterns.
        quantity: Which column to read.

    Raises:
        ConfigError: Nothing is there, or a file cannot be read as such a trace.
    """
    found: set[Path] = set()
    for text in [paths] if isinstance(paths, str) else paths:
        path = Path(text)
        if path.is_dir():
            files = [p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file()]
        elif glob.has_magic(text) and not path.exists():
            files = [p for p in map(Path, glob.glob(text)) if p.is_file()]
        else:
            files = [path]
        if not files:
            raise ConfigError(f"no trace at {text}: expected {', '.join(SUFFIXES)} files there")
        found.update(files)
    return tuple(load_trace(p, quantity) for p in sorted(found))


def load_trace(path: str | Path, quantity: str) -> Trace:
    """Read one file.

    Args:
        path: The file.
        quantity: "mbps", "rtt_ms", "load" or "rate_rps".

    Raises:
        ConfigError: Unreadable, empty, another quantity, a row that is not numeric, negative, out
            of order, or after a gap; names file and line.
    """
    file = Path(path)
    if quantity not in QUANTITIES:
        raise ConfigError(f"a trace holds one of {', '.join(QUANTITIES)}, got {quantity!r}")
    try:
        stat = file.stat()
        return _load(file, quantity, (stat.st_mtime_ns, stat.st_size))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read trace {file}: {error}") from error


@lru_cache(maxsize=1024)
def _load(path: Path, quantity: str, version: tuple[int, int]) -> Trace:
    """Parse a file; `version` tells its contents from earlier ones of the same name."""
    lines = path.read_text().splitlines()
    first = next((line.strip() for line in lines if line.strip()), "")
    if not first:
        raise ConfigError(f"trace {path} is empty")
    if "," not in first:
        if quantity != "mbps":
            raise ConfigError(f"trace {path} is a mahimahi file: it has no {quantity}")
        dt_s, values, native = 0.001, _mahimahi(path, lines), True
    else:
        (dt_s, values), native = _csv(path, lines, quantity), False
    values.flags.writeable = False
    name = path.name if native else path.stem
    return Trace(name, quantity, dt_s, values, native)


def _mahimahi(path: Path, lines: list[str]) -> F64:
    """Mbit/s in each millisecond; a packet at millisecond m arrives by the end of the m-th."""
    last, at_ms = 0, []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        where = f"trace {path} line {number}"
        if not (text.isascii() and text.isdigit()):
            raise ConfigError(
                f"{where}: expected a whole number of milliseconds >= 0 (mahimahi), or a CSV "
                f"header in line 1, got {line!r}"
            )
        ms = int(text)
        if ms < last:
            raise ConfigError(f"{where}: milliseconds must not decrease, got {ms} after {last}")
        last = ms
        at_ms.append(ms)
    if last == 0:
        raise ConfigError(f"trace {path} lasts 0 ms: its last line must be above 0")
    packets = np.bincount(np.maximum(np.array(at_ms) - 1, 0), minlength=last)
    mbps: F64 = packets.astype(np.float64) * MBPS_PER_PACKET_PER_MS
    return mbps


def _csv(path: Path, lines: list[str], quantity: str) -> tuple[float, F64]:
    """Step and means of a CSV's column."""
    head = next(i for i, line in enumerate(lines) if line.strip())
    names = [name.strip() for name in lines[head].split(",")]
    known = set(QUANTITIES) | {"run"}
    if names[0] not in TIME_NAMES or len(set(names)) < len(names) or not set(names[1:]) <= known:
        raise ConfigError(
            f"trace {path} line {head + 1}: expected a header like `time_s,{quantity}`, got "
            f"{lines[head]!r}"
        )
    if quantity not in names:
        raise ConfigError(f"trace {path} has no column {quantity}: it has {', '.join(names)}")
    column, run_column = names.index(quantity), names.index("run") if "run" in names else None
    times: list[float] = []
    values: list[float] = []
    runs: list[float] = []
    numbers: list[int] = []
    for number, line in enumerate(lines[head + 1 :], start=head + 2):
        if not line.strip():
            continue
        where = f"trace {path} line {number}"
        try:
            row = [float(x) for x in line.split(",")]
        except ValueError:
            row = []
        if len(row) != len(names) or not all(map(math.isfinite, row)):
            raise ConfigError(f"{where}: expected {len(names)} finite numbers, got {line!r}")
        value = row[column]
        if value < 0 or (quantity == "load" and value > 1) or (quantity == "rtt_ms" and value == 0):
            allowed = {"load": "lie in 0..1", "rtt_ms": "be positive"}.get(quantity, "be >= 0")
            raise ConfigError(f"{where}: {quantity} must {allowed}, got {value:g}")
        if times and row[0] <= times[-1]:
            raise ConfigError(f"{where}: time must increase, got {row[0]:g} after {times[-1]:g}")
        times.append(row[0])
        values.append(value)
        runs.append(row[run_column] if run_column is not None else 0.0)
        numbers.append(number)
    if len(times) < 2:
        raise ConfigError(f"trace {path}: expected at least two rows, got {len(times)}")
    return _on_grid(path, np.array(times), np.array(values), np.array(runs), numbers)


def _on_grid(
    path: Path, times: F64, values: F64, runs: F64, numbers: list[int]
) -> tuple[float, F64]:
    """Means over equal steps of the median length; each run starts anew, the integral is kept."""
    steps = np.diff(times)
    inside = np.diff(runs) == 0
    if not inside.any():
        raise ConfigError(f"trace {path}: no run has two rows")
    dt = float(np.median(steps[inside]))
    gaps = np.flatnonzero(inside & (steps > MAX_GAP_STEPS * dt))
    if len(gaps):
        k = int(gaps[0])
        raise ConfigError(
            f"trace {path} line {numbers[k + 1]}: a gap of {steps[k]:g} s, at most "
            f"{MAX_GAP_STEPS} steps of {dt:g} s are bridged"
        )
    if inside.all() and np.allclose(steps, dt, rtol=1e-6, atol=0.0):
        return dt, values
    parts = []
    bounds = [0, *(np.flatnonzero(~inside) + 1), len(times)]
    for a, b in pairwise(bounds):
        edge = np.append(times[a:b], times[b - 1] + dt) - times[a]
        total = np.concatenate([[0.0], np.cumsum(values[a:b] * np.diff(edge))])
        n = max(1, round(edge[-1] / dt))
        grid = np.linspace(0.0, edge[-1], n + 1)
        parts.append(np.diff(np.interp(grid, edge, total)) / (edge[-1] / n))
    # The integral's differences may fall below 0 by rounding.
    return dt, np.maximum(np.concatenate(parts), 0.0)
