"""Measured traces as training, validation and test conditions, no source in two of them.

`split(root)` takes a folder with bandwidth/, rtt/, load/ and arrivals/ (formats: `env.traces`),
whose file names begin with their source. docs/traces.md says why the sources are dealt as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from env.scenario import HopSetup, Process, Scenario
from executor.errors import ConfigError

__all__ = ["PARTS", "Condition", "Part", "Split", "split"]

LOAD_TIME_SCALE = 60.0  # 5-minute data: one value every 5 s
SUBSTEP_S = 0.2
UPLINK, DOWNLINK = ("-UL-", "-up"), ("-DL-", "-DL", "-down")


@dataclass(frozen=True)
class Part:
    """The sources of one part.

    Attributes:
        bandwidth: Sources, each with the factors it is played at (1 is as measured).
        carrier: Whose round trips.
        load: Source of the fog's and the cloud's load.
        arrivals: Source of the arrivals' shape.
        arrivals_time_scale: Seconds of that trace per second played.
    """

    bandwidth: dict[str, tuple[float, ...]]
    carrier: str
    load: str
    arrivals: str
    arrivals_time_scale: float


PARTS = {
    "train": Part({"pam25drive": (1.0, 0.25)}, "atnt", "bitbrains", "azurellm23", 1.0),
    "validation": Part({"saturatr": (1.0, 4.0)}, "tmobile", "bitbrains", "azurellm23", 1.0),
    "test": Part(
        {"ucc5g": (1.0,), "nyumets": (1.0,), "hsdpa": (1.0, 10.0)}, "verizon", "awsnab", "nab", 60.0
    ),
}


@dataclass(frozen=True)
class Condition:
    """One set of conditions.

    Attributes:
        name: Bandwidth source, its factor where it is not 1, and arrivals: "hsdpa-x10-steady".
        family: The bandwidth's source.
        scenario: Plays the traces.
        change_every_s: Bandwidth and load change at this pace (`env.changing`), not at their own.
    """

    name: str
    family: str
    scenario: Scenario
    change_every_s: float | None = None


@dataclass(frozen=True)
class Split:
    """Conditions to train on, to choose checkpoints on, and to test on."""

    train: tuple[Condition, ...]
    validation: tuple[Condition, ...]
    test: tuple[Condition, ...]

    def part(self, name: str) -> tuple[Condition, ...]:
        """The part of that name.

        Raises:
            ConfigError: There is none.
        """
        if name not in PARTS:
            raise ConfigError(f"a split has the parts {', '.join(PARTS)}, got {name!r}")
        part: tuple[Condition, ...] = getattr(self, name)
        return part


def split(root: str | Path, base: Scenario | None = None) -> Split:
    """Deal the traces under `root` into three parts.

    The edge-fog hop plays a source's uplink, the next hop its downlink (both play all of it where
    it has one direction only), drawn independently. The last hop's delay plays the carrier's round
    trips; every node but the edge has a measured load. Each bandwidth comes with the part's
    measured arrivals, and with steady (Poisson) ones.

    Args:
        root: The folder.
        base: Gives all else (nodes, weights, interval, the other hops' delays); the shipped
            default when None.

    Raises:
        ConfigError: A source has no files there.
    """
    base = base or Scenario.load()
    folder = Path(root)
    parts = {name: tuple(_conditions(folder, base, part)) for name, part in PARTS.items()}
    return Split(**parts)


def _files(folder: Path, pattern: str) -> tuple[str, ...]:
    files = sorted(str(p) for p in folder.glob(pattern) if p.is_file())
    if not files:
        raise ConfigError(
            f"no traces {folder / pattern}: expected a folder with bandwidth/, rtt/, load/ and "
            "arrivals/, files named SOURCE_NAME.csv"
        )
    return tuple(files)


def _direction(files: tuple[str, ...], marks: tuple[str, ...]) -> tuple[str, ...]:
    """The files of one direction; all where none or every one is marked."""
    marked = tuple(f for f in files if any(m in Path(f).stem for m in marks))
    return marked or files


def _conditions(folder: Path, base: Scenario, part: Part) -> list[Condition]:
    delay = Process("trace", path=_files(folder / "rtt", f"*_{part.carrier}-*"))
    load = Process(
        "trace",
        path=_files(folder / "load", f"{part.load}_*"),
        time_scale=LOAD_TIME_SCALE,
        maximum=0.9,
    )
    shape = Process(
        "trace",
        path=_files(folder / "arrivals", f"{part.arrivals}_*"),
        time_scale=part.arrivals_time_scale,
    )
    nodes = (base.nodes[0], *(replace(n, load=load) for n in base.nodes[1:]))
    conditions = []
    for source, scales in part.bandwidth.items():
        files = _files(folder / "bandwidth", f"{source}_*")
        for scale in scales:
            hops = []
            for h, hop in enumerate(base.hops):
                path = _direction(files, DOWNLINK if h else UPLINK)
                last = h == len(base.hops) - 1
                bandwidth = Process("trace", path=path, scale=scale)
                hops.append(HopSetup(bandwidth, delay if last else hop.one_way_delay_s))
            name = source if scale == 1.0 else f"{source}-x{scale:g}"
            for kind, arrivals in ((part.arrivals, shape), ("steady", Process())):
                scenario = base.replace(
                    nodes=nodes, hops=tuple(hops), arrivals=arrivals, substep_s=SUBSTEP_S
                )
                conditions.append(Condition(f"{name}-{kind}", source, scenario))
    return conditions
