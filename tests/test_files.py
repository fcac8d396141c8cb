"""Files are whole or as they were: kills, full disks, damage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from agents.arms.policy_all import ScoringPolicy
from agents.arms.runtime import Checkpoint, metadata_text
from agents.cli import run_command
from executor.errors import ConfigError
from executor.files import write_atomic, write_together

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "checkpoints" / "alexnet"


def python(code: str, *args: object, **settings: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings,
    )  # fmt: skip


def test_files_written_together_are_all_old_where_one_cannot_be_written(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    write_together({first: b"old a", second: b"old b"})
    blocked = tmp_path / "c"
    (blocked / "in the way").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot write"):
        write_together({first: b"new", tmp_path / "a" / "below a file": b"new"})
    assert (first.read_bytes(), second.read_bytes()) == (b"old a", b"old b")
    with pytest.raises(ConfigError, match=f"cannot write {blocked}"):
        write_atomic(blocked, b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path) -> None:
    """A real failing write: the process may not write more than 100 kB to a file."""
    path = tmp_path / "policy.npz"
    write_atomic(path, b"old")
    child = python(
        """
        import resource, signal, sys
        from pathlib import Path
        from agents.cli import run_command
        from executor.files import write_atomic
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        sys.exit(run_command(lambda: write_atomic(Path(sys.argv[1]), bytes(1_000_000))))
        """,
        path,
    )
    _, err = child.communicate(timeout=60)
    assert child.returncode == 2
    assert err.count("\n") == 1 and f"cannot write {path}: File too large" in err
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_under_a_library_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
        return 0

    assert run_command(main) == 2
    assert "No space left on device" in capsys.readouterr().err

    def broken() -> int:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        run_command(broken)


def test_a_killed_writer_leaves_the_old_file_and_its_litter_goes(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_atomic(path, bytes(4_000_000))
    child = python(
        """
        import sys
        from pathlib import Path
        from executor.files import write_atomic
        print("on", flush=True)
        value = 0
        while True:
            value = (value + 1) % 256
            write_atomic(Path(sys.argv[1]), bytes([value]) * 4_000_000)
        """,
        path,
    )
    with child:
        assert child.stdout is not None and child.stdout.readline() == "on\n"
        deadline_s = time.monotonic() + 60
        while not list(tmp_path.glob(".state.*.part")) and time.monotonic() < deadline_s:
            pass
        child.kill()
    data = path.read_bytes()
    assert len(data) == 4_000_000 and set(data) == {data[0]}
    live = tmp_path / f".state.{os.getpid()}.part.keep"
    live.touch()
    # Certain litter, whatever the kill left.
    (tmp_path / f".state.{child.pid}.part").write_bytes(b"half")
    write_atomic(path, b"next")
    assert sorted(p.name for p in tmp_path.iterdir()) == [live.name, "state"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The shipped one, saved anew."""
    Checkpoint.load(SHIPPED).save(tmp_path, (SHIPPED / "policy.zip").read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", ["policy.npz", "profile.json", "policy.zip"])
def test_a_damaged_checkpoint_file_is_refused_by_name(checkpoint: Path, name: str) -> None:
    assert Checkpoint.load(checkpoint).plans == Checkpoint.load(SHIPPED).plans
    path = checkpoint / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ConfigError, match=f"{name} is damaged or was changed"):
        Checkpoint.load(checkpoint)


def test_damaged_metadata_is_refused_by_name(checkpoint: Path) -> None:
    path = checkpoint / "metadata.json"
    text = path.read_text()
    raw = json.loads(text)
    raw["references"]["latency_s"] *= 2
    for bad in (json.dumps(raw), text[:-20], "[]", json.dumps({**raw, "sha256": 3}), ""):
        path.write_text(bad)
        with pytest.raises(ConfigError, match=r"metadata\.json is damaged"):
            Checkpoint.load(checkpoint)


def test_a_checkpoint_without_policy_zip_serves(checkpoint: Path) -> None:
    (checkpoint / "policy.zip").unlink()
    Checkpoint.load(checkpoint, "alexnet")
    (checkpoint / "policy.npz").unlink()
    with pytest.raises(ConfigError, match=r"policy\.npz is missing"):
        Checkpoint.load(checkpoint)


def test_an_old_checkpoint_without_digests_loads_with_a_warning(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoint / "metadata.json"
    raw = json.loads(path.read_text())
    del raw["sha256"]
    path.write_text(json.dumps(raw))
    Checkpoint.load(checkpoint)
    assert "are not verified" in caplog.text
    # Saving it again, with whatever was added to the metadata, records them.
    files = {n: (checkpoint / n).read_bytes() for n in ("policy.npz", "profile.json")}
    path.write_bytes(metadata_text({**raw, "note": "kept"}, files))
    caplog.clear()
    assert Checkpoint.load(checkpoint).metadata["note"] == "kept" and not caplog.text


def test_the_shipped_checkpoints_record_their_digests() -> None:
    for directory in sorted((ROOT / "checkpoints").iterdir()):
        recorded = json.loads((directory / "metadata.json").read_text())["sha256"].keys()
        if directory.name == "all":
            assert "policy.npz" in recorded
            ScoringPolicy.load(directory)
            continue
        assert {"policy.npz", "profile.json", "policy.zip"} <= recorded
        Checkpoint.load(directory, directory.name)
