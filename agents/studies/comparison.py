"""What `python -m agents.evaluate` compares: cells of conditions and rates, as plain numbers."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from agents.arms.controllers import ARMS
from agents.arms.runtime import Checkpoint
from agents.arms.scoring import N_NODES
from agents.cli import CHECKPOINTS, load_profile, numbers, progress, transfers
from agents.studies import cells
from agents.studies.cells import Cell
from agents.studies.compare import BATTERY_WH, ArmRun, per_row, summarise, versus
from agents.studies.provenance import provenance, without_folders
from agents.studies.workers import spread, workers
from env.conditions import BYTES_PER_S_PER_MBPS, mean_delay_s
from env.predict import CostModel
from env.scenario import Scenario
from env.splits import Condition, split
from env.synthetic import synthetic_model
from executor.errors import ConfigError
from executor.modelref import model_label
from executor.profile import Profile

__all__ = ["compare", "hop_class"]

log = logging.getLogger(__name__)

POLICY_ARMS = ("policy-zeroed", "policy-greedy", "policy", "guarded")
LAN_RTT_S = 0.010


def compare(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run everything that was asked for; returns the results as plain numbers.

    Args:
        args: Of `agents.evaluate`.
        console: Shows how far it is.

    Raises:
        ConfigError: Arguments that do not go together, or a file that cannot be read.
    """
    if args.startup_s is not None and not args.startup_s >= 0:
        raise ConfigError(f"--startup-s must be >= 0, got {args.startup_s}")
    count = workers(args.workers)
    if count != 1 and args.backend == "testbed":
        raise ConfigError("--workers is for the simulator: on the testbed runs take turns")
    if args.per_request and args.backend != "testbed":
        raise ConfigError(
            "--per-request is for --backend testbed; in the simulator --interval 0.05 comes close"
        )
    if args.recalibrate and args.backend != "testbed":
        raise ConfigError(
            "--recalibrate is for --backend testbed; a simulator is as its profile says "
            "(a wrong profile: agents.wrong_profile)"
        )
    conditions = [replace(c, scenario=_at_cadence(args, c.scenario)) for c in _conditions(args)]
    scenario = conditions[0].scenario
    rates = numbers("--rates", args.rates, "fractions", "0.4,0.8", 100.0)
    name = model_label(args.model)
    directory = args.checkpoint or CHECKPOINTS / name
    arms = _arms(args.arms, directory, scenario.n_nodes, console)
    if "oracle" in arms and args.backend == "testbed":
        raise ConfigError("arm oracle knows the future, which only --backend simulator can tell")
    checkpoint = Checkpoint.load(directory, name) if set(arms) & set(POLICY_ARMS) else None
    profile = _profile(args, directory, scenario)
    pieces: list[_Piece] = []
    for condition in conditions:
        played = condition.scenario
        at_rates = [played.replace(capacity_fraction=f, rate_rps=0.0) for f in rates] or [played]
        what = (condition.name, condition.change_every_s)
        pieces += [_Piece(args, profile, s, arms, checkpoint, *what) for s in at_rates]
    done = _play(pieces, count, console)
    per_condition = len(pieces) // len(conditions)
    by_condition = [done[i : i + per_condition] for i in range(0, len(done), per_condition)]
    by_rate: dict[str, list[Cell]] = {}
    for cell in done:
        by_rate.setdefault(f"{cell.fraction:.3g}", []).append(cell)
    return {
        "model": name,
        "backend": args.backend,
        "rates": [c.fraction for c in by_condition[0]],
        "scenario": without_folders(str(args.scenario or "default")),
        "seeds": args.seeds,
        "repeats": args.repeats if args.backend == "testbed" else 1,
        "interval_s": scenario.interval_s,
        "late_binding": scenario.late_binding,
        **({"per_request": True} if args.per_request else {}),
        **({"recalibrate": True} if args.recalibrate else {}),
        **({"transfers": profile.transfers} if set(profile.transfers) != {"float32"} else {}),
        "hops": ", ".join(dict.fromkeys(hop_class(c.scenario) for c in conditions)),
        "intervals": done[0].n_intervals,
        "meters": {
            "compute": "constant power x compute time: 12 W edge, 15 W fog, 31.8 W cloud",
            "full": {
                n.name: f"power model of {n.power.device}: {n.power.source}" for n in profile.nodes
            },
            "profiled_with": {n.name: n.meter for n in profile.nodes},
        },
        "units": {
            "cost": "per arrived request; 1 edge-only request, unloaded, costs the weights' sum",
            "latency_ms": "from scheduled arrival to output",
            "energy_j": "per completed request",
            "regret": "cost over the clairvoyant oracle's, pair by pair",
            "decide_us": "CPU time of one decision for one environment; the oracle's count as none",
            "profile_s": "computed: forward passes x the slowest node's profiled pass",
            "switch_ms": "by construction: every frame carries its plan, so a switch stops nothing",
            "battery_h": f"{BATTERY_WH:g} Wh at the edge's mean power, idling included",
        },
        "made": {**provenance(profile, args.command), "first_seed": args.first_seed},
        "arms": _pooled(done)["arms"],
        "by_rate": {rate: _pooled(some) for rate, some in by_rate.items()},
        **(_families(conditions, by_condition) if conditions[0].family else {}),
        **({"split": args.split or "test"} if args.traces is not None else {}),
        "trajectory": _trajectory(conditions[0].name, by_condition[0]),
    }


@dataclass(frozen=True)
class _Piece:
    """A cell to play, wherever that is."""

    args: argparse.Namespace
    profile: Profile
    scenario: Scenario
    arms: list[str]
    checkpoint: Checkpoint | None
    name: str
    change_every_s: float | None

    def play(self, bar: Progress | None = None) -> Cell:
        model = CostModel(self.profile, self.scenario)
        with _quiet_guards():
            cell = Cell(
                self.args, model, self.arms, self.checkpoint, self.name, self.change_every_s, bar
            )
            cell.run()
        return cell


def _play(pieces: Sequence[_Piece], count: int | str, console: Console) -> list[Cell]:
    """Every cell, in the order of the pieces, however many are played at once."""
    with progress(console) as bar:
        if count == 1:
            return [piece.play(bar) for piece in pieces]
        task = bar.add_task("cells", total=len(pieces), note=f"{count} at once")
        done: dict[int, Cell] = {}
        for place, cell in spread(_Piece.play, pieces, count):
            done[place] = cell
            bar.advance(task)
        return [done[place] for place in range(len(pieces))]


@contextmanager
def _quiet_guards() -> Iterator[None]:
    """Keep the guards from telling of every fall-back: there is one for each environment."""
    log = logging.getLogger("agents.arms.guard")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _families(conditions: Sequence[Condition], cells_: Sequence[list[Cell]]) -> dict[str, Any]:
    """The results by condition, by family of conditions, and by kind of hops."""

    def pooled_by(labels: list[str]) -> dict[str, Any]:
        return {
            label: _pooled(
                [c for x, row in zip(labels, cells_, strict=True) if x == label for c in row]
            )
            for label in dict.fromkeys(labels)
        }

    hops = [hop_class(c.scenario) for c in conditions]
    return {
        "by_condition": {
            condition.name: {
                "family": condition.family,
                "hops": kind,
                "change_every_s": condition.change_every_s,
                "by_rate": {f"{c.fraction:.3g}": _pooled([c]) for c in row},
                "arms": _pooled(row)["arms"],
            }
            for condition, kind, row in zip(conditions, hops, cells_, strict=True)
        },
        "by_family": pooled_by([c.family for c in conditions]),
        "by_hops": pooled_by(hops),
    }


def hop_class(scenario: Scenario) -> str:
    """The kind of hops: LAN-like where every mean round trip is below 10 ms, else WAN-like."""
    longest_s = max(2.0 * mean_delay_s(h) for h in scenario.hops)
    return "LAN-like" if longest_s < LAN_RTT_S else "WAN-like"


def _pooled(parts: list[Cell]) -> dict[str, Any]:
    """What the arms did over all conditions of several cells."""
    names = parts[0].runs
    overruns: dict[str, float] = {}
    for part in parts:
        for node, share in part.overruns.items():
            overruns[node] = max(share, overruns.get(node, 0.0))
    return {
        "rate_rps": float(np.mean([p.model.rate_rps() for p in parts])),
        "startup_s": max(p.startup * p.model.scenario.interval_s for p in parts),
        "overrun_share": overruns,
        "cost_rows": {
            name: [x for p in parts for x in per_row(p.runs[name], p.model)["cost"].tolist()]
            for name in names
        },
        "arms": summarise(
            {name: ArmRun.stack([p.runs[name] for p in parts]) for name in names},
            parts[0].model,
            {name: float(np.mean([p.decide_us[name] for p in parts])) for name in names},
        ),
        **_simulated(parts),
    }


def _simulated(parts: list[Cell]) -> dict[str, Any]:
    """What the arms did in the simulator beside the testbed (`Cell.simulated`); {} if nothing."""
    names = list(parts[0].simulated)
    if not names:
        return {}
    runs = {name: ArmRun.stack([p.simulated[name] for p in parts]) for name in names}
    model = parts[0].model
    return {
        "simulated": {
            "slowness": {
                node: float(np.mean([p.slowness[node] for p in parts]))
                for node in parts[0].slowness
            },
            "cost_rows": {name: per_row(run, model)["cost"].tolist() for name, run in runs.items()},
            "arms": {
                name: {
                    "cost": float(per_row(run, model)["cost"].mean()),
                    "versus": {
                        other: versus(run, runs[other], model)["cost_ratio"]
                        for other in names
                        if other != name
                    },
                }
                for name, run in runs.items()
            },
        }
    }


def _trajectory(condition: str, row: list[Cell]) -> dict[str, Any]:
    """What one condition looked like, and what every arm did: the middle rate's first seed."""
    cell = row[len(row) // 2]
    nodes = [n.name for n in cell.model.profile.nodes]
    tape = cell.conditions()
    true = np.array([i.hop_bytes_per_s[0].mean(axis=1) for i in tape.intervals])

    def mbps(bytes_per_s: NDArray[np.float64]) -> list[list[float]]:
        rounded: list[list[float]] = np.round(bytes_per_s.T / BYTES_PER_S_PER_MBPS, 3).tolist()
        return rounded

    arms: dict[str, Any] = {}
    for name, run in cell.runs.items():
        seen = run.trajectory
        latency_ms = [None if np.isnan(x) else round(1e3 * float(x), 1) for x in seen.latency_s]
        arms[name] = {
            "cuts": seen.cuts.T.tolist(),
            "measured_mbps": mbps(seen.measured_bytes_per_s),
            "in_flight": seen.in_flight.tolist(),
            "latency_ms": latency_ms,
        }
    return {
        "condition": condition,
        "rate": f"{cell.fraction:.3g}",
        "startup": cell.startup,
        "nodes": nodes,
        "units": cell.model.profile.spec.n_units,
        "mbps": mbps(true),
        "arms": arms,
    }


def _conditions(args: argparse.Namespace) -> list[Condition]:
    """What the arms will meet: a scenario, several, measured traces, or a pace of change."""
    for option in ("split", "conditions"):
        if getattr(args, option) is not None and args.traces is None:
            raise ConfigError(f"--{option} names a part of --traces DIR; give both")
    paces = numbers("--change-every", args.change_every, "seconds", "0.05,1,60")
    names = [None] if args.scenario is None else [n for n in args.scenario.split(",") if n]
    scenarios = [Scenario.load(name) for name in names]
    if not scenarios:
        raise ConfigError(f"--scenario must name a file or a shipped one, got {args.scenario!r}")
    if len(names) > 1 and (args.traces is not None or paces):
        raise ConfigError("several --scenario go with neither --traces nor --change-every")
    if paces and (args.traces is not None or args.backend == "testbed"):
        raise ConfigError("--change-every is for the simulator, without --traces")
    if args.traces is not None:
        part = split(args.traces, scenarios[0]).part(args.split or "test")
        return _named(part, args.conditions)
    if paces:
        every = [f"every {pace:g} s" for pace in paces]
        return [Condition(e, e, scenarios[0], p) for e, p in zip(every, paces, strict=True)]
    if len(names) == 1:
        return [Condition("", "", scenarios[0])]
    for name, scenario in zip(names, scenarios, strict=True):
        for what in ("weights", "interval_s", "deadline_s", "deadline_factor", "n_nodes"):
            if getattr(scenario, what) != getattr(scenarios[0], what):
                raise ConfigError(
                    f"scenarios compared in one run must agree in {what}; {name} has "
                    f"{getattr(scenario, what)}, {names[0]} {getattr(scenarios[0], what)}"
                )
    labels = [Path(str(name)).stem for name in names]
    return [Condition(n, n, s) for n, s in zip(labels, scenarios, strict=True)]


def _named(part: Sequence[Condition], names: str | None) -> list[Condition]:
    """The conditions of those names, comma-separated; all without names."""
    if names is None:
        return [*part]
    known = {condition.name: condition for condition in part}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ConfigError(
            f"unknown conditions {', '.join(unknown)!r}; expected some of {', '.join(known)}"
        )
    return [known[name] for name in wanted]


def _at_cadence(args: argparse.Namespace, scenario: Scenario) -> Scenario:
    """The scenario with the interval and the late binding that were asked for."""
    if args.interval_s is not None:
        scenario = scenario.replace(interval_s=args.interval_s)
    return scenario.replace(late_binding=True) if args.late_binding else scenario


def _arms(text: str | None, directory: Path, n_nodes: int, console: Console) -> list[str]:
    """The arms to run, `static` always among them: every arm is compared with it."""
    if text is None or text == "all":
        arms = [name for name in ARMS if name != "oracle" or text == "all"]
        if not (directory / "policy.npz").exists():
            console.print(f"no policy in {directory}: its arms are left out", markup=False)
            arms = [name for name in arms if name not in POLICY_ARMS]
        return [name for name in arms if name != "policy-all" or n_nodes == N_NODES]
    arms = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in arms if name not in ARMS]
    if unknown or not arms:
        raise ConfigError(f"unknown arm {', '.join(unknown)!r}; expected some of {', '.join(ARMS)}")
    return [name for name in ARMS if name in arms or name == "static"]


def _profile(args: argparse.Namespace, directory: Path, scenario: Scenario) -> Profile:
    """The profile named; else, for the testbed, a fresh one, and for the simulator the stored.

    Where no checkpoint is named and none is shipped for the model, the simulator gets a synthetic
    profile; the results name its meter.
    """
    measured = args.profile is None and args.backend == "testbed"
    instead = "else the profile says it (one made by `python train.py --transfer`)"
    transfers(args.transfer, len(scenario.hops), measured, instead)
    if measured:
        with cells.make_testbed_system(args, scenario, None) as system:
            return system.model.profile
    path = args.profile or directory / "profile.json"
    if args.profile is None and not path.exists():
        if args.checkpoint is None:
            log.warning("no profile of %s: a synthetic one stands in", args.model)
            return synthetic_model(args.model, scenario)
        raise ConfigError(
            f"the simulator needs a profile and {path} does not exist: give --profile FILE, or "
            f"make a checkpoint with `python train.py --model {args.model}`"
        )
    return load_profile(path, args.model, scenario)
