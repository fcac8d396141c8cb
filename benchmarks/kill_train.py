"""Kill -9 of a training at random moments: each is resumed to the end.

python benchmarks/kill_train.py --kills 20            # train.py with its nodes: a valid checkpoint?
python benchmarks/kill_train.py --kills 20 --simulator  # the simulator phase alone: the same bits?

With `--folder DIR --minutes 4` it stops after so long, and the next call goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from agents.arms.runtime import Checkpoint
from agents.learning.hindsight import HindsightSettings
from agents.learning.resume import ResumePoint
from agents.learning.training import TrainingSettings, train_policy
from env.predict import CostModel
from env.scenario import Scenario
from env.synthetic import synthetic_profile
from executor.files import write_atomic
from executor.model import model_spec

ROOT = Path(__file__).resolve().parent.parent
FILES = {"policy.zip", "policy.npz", "profile.json", "metadata.json"}
SAVE_EVERY_S = 0.2


def train_simulator(path: Path, steps: int) -> None:
    """Train on a built-in profile, resuming if there is something; leave weights in path.npz."""
    scenario = Scenario.load()
    model = CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)
    hindsight = HindsightSettings(rounds=1)
    settings = TrainingSettings(
        hindsight=hindsight, steps=steps, validate_every=steps // 4, validation_envs=48
    )
    point = ResumePoint(path, "alexnet", scenario, {"training": asdict(settings)}, SAVE_EVERY_S)
    print("resuming " if point.load() else "beginning", flush=True)
    result = train_policy(point.cost_model() or model, settings, resume=point)
    weights = {k: v.numpy() for k, v in result.ppo.policy.state_dict().items()}
    np.savez(path.with_suffix(".npz"), allow_pickle=False, **weights)


def command(directory: Path, args: argparse.Namespace, *more: str) -> list[str]:
    if args.simulator:
        path = str(directory / "training.resume")
        return [sys.executable, __file__, "--child", path, "--steps", str(args.steps)]
    line = [sys.executable, "train.py", "--model", "alexnet", "--rounds", "1"]
    line += [
        "--steps",
        str(args.steps),
        "--online-steps",
        "2",
        "--live-intervals",
        "1",
        "--checkpoint",
        str(directory),
    ]
    return [*line, "--runs", str(directory.parent / "runs"), *more]


def start(line: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        line, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(line: list[str]) -> str:
    """Run to the end; returns the output, or leaves if it failed."""
    process = start(line)
    out, _ = process.communicate(timeout=900)
    if process.returncode:
        sys.exit(f"training ended with {process.returncode}:\n{out[-2000:]}")
    return out


def check(directory: Path, whole: Path, simulator: bool) -> None:
    """Leave with 1 unless what the resumed training left is what it should be."""
    if simulator:
        name = "training.npz"
        with np.load(directory / name) as ours, np.load(whole / name) as theirs:
            if set(ours) != set(theirs) or any((ours[k] != theirs[k]).any() for k in ours):
                sys.exit("other weights than without the kill")
        return
    Checkpoint.load(directory, "alexnet")
    left = {path.name for path in directory.iterdir()}
    if left != FILES:
        sys.exit(f"expected {sorted(FILES)}, got {sorted(left)}")


def main() -> None:
    """Kill, resume, check; leaves with 1 at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--simulator", action="store_true", help="the simulator phase alone")
    parser.add_argument("--steps", type=int, default=163_840, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep what was done here, and go on from there")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no kill after these")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        train_simulator(args.child, args.steps)
        return
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        until_s = time.monotonic() + 60.0 * args.minutes
        state = begin(folder, args)
        for kill in range(len(state["kills"]), args.kills):
            if time.monotonic() > until_s:
                print(f"{kill} of {args.kills} kills so far; call again to go on")
                return
            state["kills"].append(one_kill(folder, kill, state["whole_s"], args))
            write_atomic(folder / "state.json", json.dumps(state).encode())
        resumed = sum(k["resumed"] for k in state["kills"][: args.kills])
    print(f"{args.kills} kills, all as they should be; {resumed} resumed in the middle")


def begin(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What was done so far in this folder; at first, a training without a kill."""
    settings = {"simulator": args.simulator, "steps": args.steps, "seed": args.seed}
    file, whole = folder / "state.json", folder / "whole"
    if file.exists():
        state: dict[str, Any] = json.loads(file.read_text())
        if state["settings"] != settings:
            sys.exit(f"{folder} was begun with {state['settings']}, not {settings}")
        return state
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir(parents=True)
    begun_s = time.monotonic()
    finish(command(whole, args))
    state = {"settings": settings, "whole_s": time.monotonic() - begun_s, "kills": []}
    print(f"uninterrupted: {state['whole_s']:.1f} s", flush=True)
    write_atomic(file, json.dumps(state).encode())
    return state


def one_kill(folder: Path, kill: int, whole_s: float, args: argparse.Namespace) -> dict[str, Any]:
    """Kill a training at a random moment, resume it, check what it leaves."""
    directory = folder / f"kill-{kill}" / "alexnet"
    shutil.rmtree(directory.parent, ignore_errors=True)
    directory.mkdir(parents=True)
    process = start(command(directory, args))
    after_s = random.Random(f"{args.seed}/{kill}").uniform(0.0, whole_s)
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()
    killed = process.returncode < 0
    found = "resuming " in finish(command(directory, args, "--resume"))
    check(directory, folder / "whole", args.simulator)
    shutil.rmtree(directory.parent)
    how = "resumed" if found else "began anew"
    what = how if killed else f"had ended; {how}"
    print(f"kill {kill + 1} after {after_s:5.1f} s: {what}, as it should be", flush=True)
    return {"after_s": round(after_s, 1), "killed": killed, "resumed": found}


if __name__ == "__main__":
    main()
