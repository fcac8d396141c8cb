"""Many edges that share a fog and a cloud: `python -m agents.edges`. Who gains, and do they herd?

Each of 1 to 200 edges has its own node, hop and arrivals, and decides for itself from what it sees:
its own queue and hop, and the STATUS of the shared fog and cloud (`env.sharing`). If all decide at
the same moment, all may leave for an empty fog together and come back together. So every adaptive
arm runs

- `at once`: all edges decide once a second, at the same moment;
- `staggered`: each does so at a moment of its own;
- `per request`: every 0.2 s, which stands for `--per-request` of the executor;
- `counting`: likewise, and shown what the others use of each shared node and hop.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from agents.arms.controllers import ARMS
from agents.arms.paper import PaperSettings
from agents.arms.runtime import Checkpoint
from agents.cli import (
    CHECKPOINTS,
    MODEL_HELP,
    Parser,
    load_profile,
    model_argument,
    positive_float,
    positive_int,
    progress,
    run_study,
)
from agents.studies.crowd import INTERVAL_S, LEAST_ROWS, STEP_S, Crowd, crowd_model
from agents.studies.provenance import provenance
from env.scenario import Scenario
from env.synthetic import synthetic_model
from executor.errors import ConfigError
from executor.files import write_json
from executor.modelref import model_label
from executor.profile import Profile

__all__ = ["main"]

USUAL_ARMS = "static,best-static,paper-1s,solver,policy,policy-all"
TRAINED = ("policy", "policy-greedy", "policy-zeroed", "guarded")
MOST_EDGES = 1000
STARTUP_S = 30


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (2: bad input, one line on stderr)."""
    return run_study("agents.edges", _parser(), _main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m agents.edges",
        description="Many edges sharing one fog and one cloud, each deciding for itself, in the "
        "simulator.",
    )
    add = parser.add_argument
    add("--model", required=True, type=model_argument, help=MODEL_HELP)
    add("--edges", default="1,2,5,10,20,50,100,200", help="sizes of the crowd, comma-separated")
    add(
        "--arms",
        default=USUAL_ARMS,
        help=f"comma-separated, of {', '.join(ARMS)} but the oracle (default: {USUAL_ARMS}; "
        "without a checkpoint those that need one are left out)",
    )
    add(
        "--rate",
        type=positive_float,
        default=0.6,
        help="requests of each edge, as a fraction of what it can do by itself (default: 0.6)",
    )
    add(
        "--capacity",
        choices=("fixed", "grows"),
        default="fixed",
        help="fog, cloud and the hop between them stay what they are for one edge, or become as "
        "many times faster as there are edges",
    )
    add("--seeds", type=positive_int, default=4, help=f"conditions; more below {LEAST_ROWS} edges")
    add("--seconds", type=positive_int, default=60, help="length of the steady state")
    add(
        "--startup-s",
        type=positive_int,
        help="seconds before it, left out (default: 30, or where the reference's scheduler takes "
        "part, what its start-up takes an edge alone)",
    )
    add("--profile", type=Path, help="profile JSON (default: the checkpoint's, else a synthetic)")
    add("--checkpoint", type=Path, help="directory (default: checkpoints/MODEL)")
    add("--json", type=Path, help="write the results here")
    return parser


def _main(args: argparse.Namespace) -> int:
    sizes = [int(x) if x.isdigit() else 0 for x in args.edges.split(",")]
    if not all(1 <= n <= MOST_EDGES for n in sizes) or len(set(sizes)) < len(sizes):
        raise ConfigError(
            f"--edges must be different numbers from 1 to {MOST_EDGES} like 1,10,100, got "
            f"{args.edges!r}"
        )
    name = model_label(args.model)
    directory = args.checkpoint or CHECKPOINTS / name
    arms = _arms(args.arms, directory)
    checkpoint = Checkpoint.load(directory, name) if set(arms) & set(TRAINED) else None
    profile, origin = _profile(args, directory)
    console = Console()
    console.width = max(console.width, 150)
    crowds = []
    with progress(console) as bar:
        task = bar.add_task("edges", total=len(sizes) * len(arms), note="")
        for edges in sizes:
            factor = edges if args.capacity == "grows" else 1
            slow, fast = (crowd_model(profile, args.rate, s, factor) for s in (INTERVAL_S, STEP_S))
            startup_s = args.startup_s or _startup_s(arms, slow.rate_rps())
            crowd = Crowd(slow, fast, edges, args.seeds, args.seconds, startup_s)
            for arm in arms:
                bar.update(task, note=f"{edges} edges, {arm}")
                crowd.run(arm, checkpoint)
                bar.advance(task)
            crowds.append(crowd.results())
    for found in crowds:
        console.print(_table(name, found))
    if args.json is not None:
        made = {**provenance(profile, args.command), "profile": origin}
        result = {"model": name, "capacity": args.capacity, "crowds": crowds, "made": made}
        write_json(args.json, result)
    return 0


def _arms(text: str, directory: Path) -> list[str]:
    arms = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in arms if name not in ARMS or name == "oracle"]
    if unknown or not arms:
        expected = ", ".join(name for name in ARMS if name != "oracle")
        raise ConfigError(f"unknown arm {', '.join(unknown)!r}; expected some of {expected}")
    if text == USUAL_ARMS and not (directory / "policy.npz").exists():
        arms = [name for name in arms if name not in TRAINED]
    return arms


def _startup_s(arms: list[str], rate_rps: float) -> int:
    """Seconds left out; the reference's scheduler starts with so many requests."""
    if not any(arm.startswith("paper") for arm in arms):
        return STARTUP_S
    settings = PaperSettings()
    requests = settings.startup_static + 3 * settings.startup_probe
    return STARTUP_S + math.ceil(1.2 * requests / rate_rps)


def _profile(args: argparse.Namespace, directory: Path) -> tuple[Profile, str]:
    """The profile, and in words where it comes from."""
    scenario = Scenario.load()
    stored = args.profile or directory / "profile.json"
    if args.profile is None and args.checkpoint is None and not stored.exists():
        return synthetic_model(args.model, scenario), "synthetic"
    return load_profile(stored, args.model, scenario), "stored"


def _table(name: str, found: dict[str, Any]) -> Table:
    title = (
        f"{name}: {found['edges']} edges, {found['rate_rps']:.2f} requests/s each, "
        f"{found['groups']} conditions; max/min: of the shares served; switches a minute"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("arm", "decide", "cost", "/ best static (95 %)", "p50 s", "p95 s", "edge J",
                   "total J", "lost %", "late %", "max/min", "switches", "leave %",
                   "fog %", "us"):  # fmt: skip
        left = column in ("arm", "decide")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for r in found["arms"]:
        ratio, served = r.get("ratio"), r["served"]["ratio"]
        table.add_row(
            r["arm"],
            r["decides"],
            f"{r['cost']:.3f}",
            f"{ratio['mean']:.3f} ({ratio['low']:.3f}..{ratio['high']:.3f})" if ratio else "",
            f"{r['latency_s']['p50']:.2f}",
            f"{r['latency_s']['p95']:.2f}",
            f"{r['edge_j']:.2f}",
            f"{r['total_j']:.2f}",
            f"{100 * r['lost']:.1f}",
            f"{100 * r['late']:.1f}",
            "-" if served is None else f"{served:.2f}",
            f"{r['switches_per_min']:.1f}",
            *(f"{100 * r[k]['mean']:.0f}+-{100 * r[k]['deviation']:.0f}" for k in
              ("leaving", "fog_busy")),
            f"{r['decide_us']['p50']:.0f}" if r["decides"] else "",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
