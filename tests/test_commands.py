"""The commands as a user runs them: the main job end to end, and what bad input gets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from local_nodes import SMALL_NET
from stable_baselines3 import PPO

import train
from agents import deploy, evaluate
from agents.arms.runtime import Checkpoint
from agents.cli import run_command
from agents.learning.resume import FILE_NAME
from executor.errors import ConfigError

ROOT = Path(__file__).parent.parent


# What these tests start inherits this: others' nodes on this machine are not taken for ours.
MARK = f"SPLITPILOT_TESTS={os.getpid()}"
os.environ["SPLITPILOT_TESTS"] = str(os.getpid())


def children_of_tests() -> set[str]:
    """Command lines of node and relay processes of these tests now running."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            ours = MARK.encode() in (entry / "environ").read_bytes().split(b"\0")
        except (OSError, UnicodeDecodeError):
            continue
        if ours and ("executor.node" in line or "executor.relay" in line):
            found.add(f"{entry.name} {line}")
    return found


def run(*args: str, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout_s,
        env={**os.environ, "COLUMNS": "120"},
    )


def short_scenario(directory: Path) -> Path:
    """The default scenario with episodes of 20 s, so that validating takes a fifth."""
    path = directory / "short.toml"
    text = (ROOT / "env" / "scenarios" / "default.toml").read_text()
    assert "episode_s = 200.0" in text
    path.write_text(text.replace("episode_s = 200.0", "episode_s = 20.0"))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint made by the main job, shortened: killed once, and resumed."""
    directory = tmp_path_factory.mktemp("trained")
    before = children_of_tests()
    args = [
        "train.py", "--model", "alexnet", "--rounds", "1", "--steps", "8192", "--online-steps", "3",
        "--live-intervals", "2", "--checkpoint", str(directory / "alexnet"),
        "--runs", str(directory / "runs"), "--scenario", str(short_scenario(directory)),
    ]  # fmt: skip
    saved = directory / "alexnet" / FILE_NAME
    with subprocess.Popen([sys.executable, *args], cwd=ROOT, stdout=subprocess.DEVNULL) as first:
        deadline_s = time.monotonic() + 240
        while not saved.exists() and first.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.01)
        first.kill()
    assert saved.exists()
    done = run(*args, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"resuming {saved}" in done.stdout.replace("\n", "")
    assert "SHORT" in done.stdout and "candidate plans" in done.stdout
    assert children_of_tests() <= before
    return directory


def test_train_leaves_policy_curves_and_nothing_else(trained: Path) -> None:
    checkpoint = Checkpoint.load(trained / "alexnet", "alexnet")
    assert checkpoint.metadata["finetuning"]["steps"] == 3
    assert {p.name for p in (trained / "alexnet").iterdir()} == {
        "policy.zip", "policy.npz", "profile.json", "metadata.json"
    }  # fmt: skip
    model = PPO.load(trained / "alexnet" / "policy.zip", device="cpu")
    assert model.action_space.n == len(checkpoint.plans)
    assert len(list((trained / "runs").rglob("events.out.tfevents.*"))) >= 2


def test_train_goes_on_from_a_saved_profile_without_nodes(trained: Path, tmp_path: Path) -> None:
    profile = trained / "alexnet" / "profile.json"
    args = [
        "--model", "alexnet", "--profile", str(profile), "--rounds", "0", "--steps", "8192",
        "--checkpoint", str(tmp_path / "alexnet"), "--runs", str(tmp_path / "runs"),
        "--scenario", str(short_scenario(tmp_path)),
    ]  # fmt: skip
    before = children_of_tests()
    assert train.main(args) == 0
    assert children_of_tests() <= before
    checkpoint = Checkpoint.load(tmp_path / "alexnet", "alexnet")
    assert (tmp_path / "alexnet" / "profile.json").read_bytes() == profile.read_bytes()
    assert "finetuning" not in checkpoint.metadata and "policy" in checkpoint.metadata["simulator"]
    with zipfile.ZipFile(tmp_path / "alexnet" / "policy.zip") as archive:
        assert not any(str(tmp_path).encode() in archive.read(n) for n in archive.namelist())
    assert not (tmp_path / "alexnet" / FILE_NAME).exists()
    args[1] = "vgg16"
    with pytest.raises(ConfigError, match="is of alexnet, not vgg16"):
        train.main(args)


def test_deploy_serves_with_the_policy(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "summary.json"
    before = children_of_tests()
    done = run(
        "-m", "agents.deploy", "--model", "alexnet", "--duration", "4", "--rate", "4",
        "--checkpoint", str(trained / "alexnet"), "--json", str(out), "--runs", str(tmp_path),
        "--late-binding", "--interval", "0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(out.read_text())
    requests = summary["requests"]
    assert summary["decisions"] == 8 and summary["controller"] == "guarded-policy"
    assert summary["per_request"] is True
    assert requests["submitted"] == requests["completed"] + requests["lost"] > 0
    assert summary["energy_j_per_request"]["full"]["total"] > 0
    assert "cost per request" in done.stdout
    assert list(tmp_path.rglob("events.out.tfevents.*"))
    assert children_of_tests() <= before


def test_interrupted_deploy_ends_with_a_summary(tmp_path: Path) -> None:
    before, out = children_of_tests(), tmp_path / "summary.json"
    with subprocess.Popen(
        [sys.executable, "-m", "agents.deploy", "--model", SMALL_NET, "--controller", "cloud",
         "--rate", "4", "--json", str(out), "--runs", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        assert process.stdout is not None
        for line in process.stdout:
            if "in flight" in line:
                break
        # As a terminal does: Ctrl-C reaches the whole foreground group.
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        watchdog.cancel()
    assert process.returncode == 0, stderr[-2000:]
    assert "summary" in stdout
    assert json.loads(out.read_text())["interrupted"] is True
    assert children_of_tests() <= before


def test_evaluate_in_the_simulator(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    code = run_command(
        lambda: evaluate.main(
            ["--model", "alexnet", "--backend", "simulator", "--arms", "policy,policy-zeroed",
             "--seeds", "3", "--intervals", "10", "--checkpoint", str(trained / "alexnet"),
             "--json", str(out)]
        )
    )  # fmt: skip
    assert code == 0
    arms = json.loads(out.read_text())
    text = json.dumps(arms)
    for key in ("policy-zeroed", "versus_static", "decide_us", "p99", "battery_h"):
        assert key in text


BAD = [
    (train.main, ["--model", "lenet"], "unknown model 'lenet'"),
    (train.main, ["--steps", "-3"], "at least 1"),
    (train.main, ["--online-steps", "-1"], "--online-steps"),
    (train.main, ["--profile", "p.json", "--cluster", "c.toml"], "without nodes"),
    (train.main, ["--scenario", "/nowhere.toml"], "cannot read scenario"),
    (deploy.main, ["--checkpoint", "/nowhere"], "python train.py --model alexnet"),
    (deploy.main, ["--controller", "oracle"], "invalid choice"),
    (
        deploy.main,
        ["--controller", "cloud", "--per-request"],
        "--controller policy, policy-all, solver; got cloud",
    ),
    (deploy.main, ["--rate", "0"], "positive number"),
    (deploy.main, ["--duration", "nan"], "positive number"),
    (deploy.main, ["--controller", "edge", "--cluster", "/nowhere.toml"], "/nowhere.toml"),
    (deploy.main, ["--controller", "edge", "--source", "/nowhere"], "folder of images"),
    (evaluate.main, ["--model", "lenet"], "unknown model 'lenet'"),
    (evaluate.main, ["--model", "alexnet", "--arms", "magic"], "magic"),
    (evaluate.main, ["--model", "alexnet", "--split", "test"], "--traces DIR"),
    (evaluate.main, ["--model", "alexnet", "--conditions", "x"], "--traces DIR"),
    (evaluate.main, ["--model", "alexnet", "--traces", "no-such-folder"], "no traces"),
    (evaluate.main, ["--model", "alexnet", "--seeds", "0"], "seeds"),
    (evaluate.main, ["--model", "alexnet", "--isolation", "netns"], "for nodes of the testbed"),
    (train.main, ["--cluster", "x.toml", "--isolation", "netns"], "for nodes of the testbed"),
    (
        deploy.main,
        ["--controller", "edge", "--cluster", "x.toml", "--isolation", "netns"],
        "for nodes of the testbed",
    ),
]


@pytest.mark.parametrize(("main", "argv", "expected"), BAD)
def test_bad_input_is_one_line_and_code_2(
    main: object, argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(main)
    try:
        code = run_command(lambda: main(argv))
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2
    assert expected in error
    assert len(error.strip().splitlines()) == 1


def test_bad_scenarios_name_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (ROOT / "env" / "scenarios" / "default.toml").read_text()
    cases = {
        good.replace("interval_s = 1.0", "interval_s = 99.0"): "interval_s must lie",
        good.replace("levels = [25.0, 45.0, 80.0]", "levels = [0.0]"): "bandwidth must be positive",
        good.replace("max_in_flight", "max_inflight"): "unknown key",
        good.replace("[weights]", "[weights"): "cannot read scenario",
    }
    for i, (text, expected) in enumerate(cases.items()):
        path = tmp_path / f"{i}.toml"
        path.write_text(text)
        argv = ["--scenario", str(path)]
        assert run_command(lambda argv=argv: train.main(argv)) == 2
        assert expected in capsys.readouterr().err


def test_checkpoint_of_another_model_is_refused(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", "vgg16", "--checkpoint", str(trained / "alexnet")]
    assert run_command(lambda: deploy.main(argv)) == 2
    assert "made for alexnet, not vgg16" in capsys.readouterr().err
