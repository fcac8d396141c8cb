"""A scenario: model, nodes, hops, arrivals, cost weights and interval, in one TOML file.

The simulator, the local testbed and real nodes all read it. `Scenario.load` reads a file;
`default_scenario` gives the shipped one.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from env.generators import generator
from executor.errors import ConfigError
from executor.link import MIN_PROBE_BYTES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["CostWeights", "HopSetup", "NodeSetup", "Probing", "Process", "Scenario"]

T = TypeVar("T")
SHIPPED = Path(__file__).parent / "scenarios"
MAX_ONE_WAY_DELAY_S = 5.0


@dataclass(frozen=True)
class Process:
    """One exogenous quantity over time.

    That is a hop's bandwidth (Mbit/s) or one-way delay (s), a node's load (0..0.9), or a multiplier
    of the mean arrival rate.

    Attributes:
        kind: "constant" (`levels[0]`), "markov" (regimes with noise and outages), "trace"
            (measured, played from files), or "generator": the "markov" process that ships under
            `name`; it then reads as that.
        levels: Constant value, or the regimes' means, in the quantity's unit.
        dwell_s: Mean seconds in a regime before another is drawn.
        sigma: Noise: of log(value) when `log` is true, else of the value.
        correlation_s: Time constant of the noise (AR(1)).
        log: Multiplicative log-normal noise of mean 1 (bandwidth) or additive (load).
        outage_per_s: Rate at which outages start.
        outage_s: Mean outage duration.
        outage_value: The value during an outage.
        minimum: Lower clip.
        maximum: Upper clip.
        path: Trace files (kind "trace"): a file, a folder, a glob pattern, or several of them, in
            the formats of `env.traces`. Each environment draws one of them and where to begin.
            Round trips (`rtt_ms`) are halved to one-way delays; arrivals are divided by their mean.
        scale: Factor on the values of a trace or generator.
        time_scale: Seconds of a trace per second played: 60 turns 5-minute data into one value
            every 5 s.
        jitter: Fill in what happens between a trace's samples (`env._play`); false holds them.
        name: Of the generator (`env/generators.toml`).
    """

    kind: str = "constant"
    levels: tuple[float, ...] = (1.0,)
    dwell_s: float = 20.0
    sigma: float = 0.0
    correlation_s: float = 5.0
    log: bool = True
    outage_per_s: float = 0.0
    outage_s: float = 1.0
    outage_value: float = 0.0
    minimum: float = 0.0
    maximum: float = float("inf")
    path: str | tuple[str, ...] = ()
    scale: float = 1.0
    time_scale: float = 1.0
    jitter: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "markov", "trace", "generator"):
            raise ConfigError(
                f"process kind must be constant, markov, trace or generator, got {self.kind!r}"
            )
        if isinstance(self.path, str):
            object.__setattr__(self, "path", (self.path,) if self.path else ())
        if self.kind == "trace" and not self.path:
            raise ConfigError("a trace process needs `path`, the files to play")
        if not self.levels or min(self.levels) < 0:
            raise ConfigError(f"process levels must be >= 0 and not empty, got {self.levels}")
        for name in ("dwell_s", "correlation_s", "outage_s", "scale", "time_scale"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"process {name} must be positive, got {getattr(self, name)}")
        if self.kind == "generator":
            self._become(generator(self.name))

    def scaled(self, factor: float) -> Process:
        """The same with all its values multiplied."""
        if self.kind == "trace":
            return dataclasses.replace(self, scale=self.scale * factor)
        return dataclasses.replace(
            self,
            levels=tuple(factor * level for level in self.levels),
            sigma=self.sigma if self.log else factor * self.sigma,
            outage_value=factor * self.outage_value,
            minimum=factor * self.minimum,
            maximum=factor * self.maximum,
        )

    def _become(self, parameters: dict[str, Any]) -> None:
        """Take on a generator's parameters, scaled."""
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in parameters.items()
        }
        as_fitted = Process(**{**values, "kind": "markov"})
        for name, value in vars(as_fitted.scaled(self.scale)).items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class NodeSetup:
    """A node: its name, device class (power table) and, for the testbed, its emulated speed.

    Attributes:
        name: Role, e.g. "edge".
        device: Key of `executor.energy.DEVICE_POWER`.
        ratio: Testbed only: how many times slower than one core of this machine.
        load: Share of the CPU taken by others, 0..0.9.
    """

    name: str
    device: str
    ratio: float = 1.0
    load: Process = field(default_factory=lambda: Process(levels=(0.0,), log=False))


@dataclass(frozen=True)
class HopSetup:
    """A hop: bandwidth over time, and the one-way propagation delay.

    Attributes:
        bandwidth: In Mbit/s.
        one_way_delay_s: A number, or a process in seconds (a constant one becomes its number);
            what is sent arrives in order, and never later than `MAX_ONE_WAY_DELAY_S` after.
    """

    bandwidth: Process
    one_way_delay_s: float | Process = 0.005

    def __post_init__(self) -> None:
        if max(self.bandwidth.levels) <= 0 and self.bandwidth.kind != "trace":
            raise ConfigError(f"hop bandwidth must be positive, got {self.bandwidth.levels} Mbit/s")
        delay = self.one_way_delay_s
        if isinstance(delay, Process) and delay.kind == "constant":
            delay = delay.levels[0]
            object.__setattr__(self, "one_way_delay_s", delay)
        if not isinstance(delay, Process) and not 0 <= delay <= MAX_ONE_WAY_DELAY_S:
            raise ConfigError(
                f"one_way_delay_s must lie in 0..{MAX_ONE_WAY_DELAY_S:g} s, got {delay}"
            )

    @property
    def delay(self) -> Process | None:
        """The delay's process; None where it is constant."""
        return self.one_way_delay_s if isinstance(self.one_way_delay_s, Process) else None


@dataclass(frozen=True)
class CostWeights:
    """Weights of the cost, inside the reference's ranges (arXiv 2605.09623, search step)."""

    latency: float = 0.3
    edge_energy: float = 0.6
    total_energy: float = 0.2


@dataclass(frozen=True)
class Probing:
    """Active probes of a hop that carried no frame large enough to measure.

    A probe is as large as takes `transmit_s` at the bandwidth last measured: as accurate on a slow
    hop as on a fast one, and never long in the way of what serves requests.

    Attributes:
        idle_s: A hop whose bandwidth was last measured longer ago is probed.
        transmit_s: What a probe should take.
        least_bytes: Its least size.
        payload_bytes: Its largest size, and that of the first, before a hop is known.
        paper_bytes: What one two-point probe of the reference's controller sends per hop (its
            payload sizes are not stated there: 3 x (1 KiB + 64 KiB)).
    """

    idle_s: float = 3.0
    transmit_s: float = 0.02
    least_bytes: int = 4096
    payload_bytes: int = 65536
    paper_bytes: int = 3 * (1024 + 65536)

    def __post_init__(self) -> None:
        if not (self.idle_s > 0 and self.transmit_s > 0):
            raise ConfigError(
                f"idle_s and transmit_s of probing must be positive, got {self.idle_s} and "
                f"{self.transmit_s}"
            )
        if not MIN_PROBE_BYTES <= self.least_bytes <= self.payload_bytes:
            raise ConfigError(
                f"probing needs {MIN_PROBE_BYTES} <= least_bytes <= payload_bytes, got "
                f"{self.least_bytes} and {self.payload_bytes}"
            )

    @property
    def unanswered_bytes_per_s(self) -> float:
        """What a hop that does not answer its first probe within `idle_s` is slower than."""
        return self.payload_bytes / self.idle_s

    def size_bytes(self, bytes_per_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """How large a probe of a hop last measured at `bytes_per_s` is (any shape)."""
        sizes: NDArray[np.float64] = np.clip(
            np.rint(bytes_per_s * self.transmit_s), self.least_bytes, self.payload_bytes
        )
        return sizes


@dataclass(frozen=True)
class Scenario:
    """Everything that is fixed while controllers are compared.

    Attributes:
        nodes: N >= 2 nodes, edge first.
        hops: N - 1 hops.
        arrivals: Multiplier of the mean arrival rate over time (mean about 1).
        capacity_fraction: Mean arrival rate as a fraction of the best static plan's capacity.
        rate_rps: Mean arrival rate in requests/s; overrides `capacity_fraction` when not 0.
        interval_s: Time between two decisions, and an environment's step.
        substep_s: Bandwidth, load and delay are constant for at most so long (an interval has a
            whole number of sub-steps).
        episode_s: Length of an episode (truncated, never terminated).
        deadline_factor: `deadline_s` = this times the edge-only latency when `deadline_s` is 0.
        deadline_s: A request that takes longer is late.
        max_in_flight: Requests outstanding beyond which a new one is refused (lost).
        weights: The cost's weights.
        probing: Active probing.
        constrained: Offer only plans that obey the reference's rule.
        late_binding: Let the fog pick its own cut when a request's turn comes, by the backlog of
            its hop (`env.late`); for three nodes.
    """

    nodes: tuple[NodeSetup, ...]
    hops: tuple[HopSetup, ...]
    arrivals: Process = field(default_factory=Process)
    capacity_fraction: float = 0.7
    rate_rps: float = 0.0
    interval_s: float = 1.0
    substep_s: float = 1.0
    episode_s: float = 200.0
    deadline_factor: float = 4.0
    deadline_s: float = 0.0
    max_in_flight: int = 32
    weights: CostWeights = field(default_factory=CostWeights)
    probing: Probing = field(default_factory=Probing)
    constrained: bool = False
    late_binding: bool = False

    def __post_init__(self) -> None:
        if len(self.nodes) < 2 or len(self.hops) != len(self.nodes) - 1:
            raise ConfigError(
                f"a scenario needs N >= 2 nodes and N - 1 hops, got {len(self.nodes)} and "
                f"{len(self.hops)}"
            )
        if not 0.05 <= self.interval_s <= 10.0:
            raise ConfigError(f"interval_s must lie in 0.05..10 s, got {self.interval_s}")
        if not 0.001 <= self.substep_s <= 10.0:
            raise ConfigError(f"substep_s must lie in 0.001..10 s, got {self.substep_s}")
        if self.capacity_fraction <= 0 or self.rate_rps < 0:
            raise ConfigError(
                "the arrival rate must be positive: capacity_fraction "
                f"{self.capacity_fraction}, rate_rps {self.rate_rps}"
            )
        if self.max_in_flight < 1:
            raise ConfigError(f"max_in_flight must be at least 1, got {self.max_in_flight}")
        if self.late_binding and len(self.nodes) != 3:
            raise ConfigError(
                f"late_binding is for chains of 3 nodes, this scenario has {len(self.nodes)}"
            )

    @property
    def n_nodes(self) -> int:
        """Number of nodes N."""
        return len(self.nodes)

    @property
    def steps_per_episode(self) -> int:
        """Decisions in an episode."""
        return max(1, round(self.episode_s / self.interval_s))

    def replace(self, **changes: Any) -> Scenario:
        """A copy with the named fields replaced."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def load(cls, path: str | Path | None = None) -> Scenario:
        """Read a scenario file, or a shipped one by its name ("lte"); None reads the default.

        Raises:
            ConfigError: Unreadable, not TOML, an unknown key, or a value out of range.
        """
        file = SHIPPED / "default.toml" if path is None else Path(path)
        shipped = SHIPPED / f"{file}.toml"
        if not file.suffix and not file.exists() and shipped.is_file():
            file = shipped
        try:
            raw = tomllib.loads(file.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"cannot read scenario {file}: {error}") from error
        try:
            scenario = _build(cls, raw, "scenario")
        except ConfigError as error:
            raise ConfigError(f"scenario {file}: {error}") from error
        return scenario


_NESTED: dict[str, type[Any]] = {
    "nodes": NodeSetup,
    "hops": HopSetup,
    "arrivals": Process,
    "bandwidth": Process,
    "load": Process,
    "weights": CostWeights,
    "probing": Probing,
}


def _build(cls: type[T], raw: Any, where: str) -> T:
    """Make dataclass `cls` from a TOML table; every problem is a ConfigError naming the key."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected a table, got {raw!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is a dataclass
    values: dict[str, Any] = {}
    for key, value in raw.items():
        name = f"{where}.{key}"
        if key not in fields:
            raise ConfigError(f"{name}: unknown key; expected one of {', '.join(fields)}")
        if key in ("nodes", "hops"):
            if not isinstance(value, list):
                raise ConfigError(f"{name}: expected a list of tables, got {value!r}")
            values[key] = tuple(
                _build(_NESTED[key], v, f"{name}[{i}]") for i, v in enumerate(value)
            )
        elif key == "one_way_delay_s":
            values[key] = (
                _build(Process, value, name)
                if isinstance(value, dict)
                else _coerce(value, "float", name)
            )
        elif key in _NESTED:
            if isinstance(value, int | float) and not isinstance(value, bool):
                value = {"levels": [value]}
            values[key] = _build(_NESTED[key], value, name)
        else:
            values[key] = _coerce(value, str(fields[key].type), name)
    missing = [
        f.name
        for f in fields.values()
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    return cls(**values)


def _coerce(value: Any, kind: str, name: str) -> Any:
    """Check one plain value against its annotation."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "float" and number:
        return float(value)
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind.startswith("str") and isinstance(value, str):
        return value
    if "tuple[str" in kind and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if kind.startswith("tuple[float"):
        items = value if isinstance(value, list) else [value]
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in items):
            return tuple(map(float, items))
    raise ConfigError(f"{name}: expected {kind}, got {value!r}")
