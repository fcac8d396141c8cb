"""Processes that learn or work beside a command are gone when it is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from local_nodes import gone, until

TESTS = Path(__file__).parent
DEADLINE_S = 30.0

WORKERS = """
import multiprocessing, threading, time
from agents.studies.workers import spread
work = lambda: list(spread(time.sleep, [600, 600], 2))
threading.Thread(target=work, daemon=True).start()
while len(multiprocessing.active_children()) < 2:
    time.sleep(0.05)
"""
LEARNER = """
import multiprocessing, time
from agents.learning.online import BackgroundLearner
from agents.learning.training import TrainingSettings
from small_training import make_model
from test_finetuning import SMALL, a_policy
model = make_model()
learner = BackgroundLearner(
    a_policy(model), model.scenario, model.references, TrainingSettings(), SMALL, 1
)
"""
TELL = """
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("script", "count"), [(WORKERS, 2), (LEARNER, 1)])
def test_no_process_outlives_a_killed_command(script: str, count: int) -> None:
    path = f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]\n"
    with subprocess.Popen(
        [sys.executable, "-c", path + script + TELL], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == count
        assert not any(map(gone, pids))
        parent.send_signal(signal.SIGKILL)
    until(lambda: all(map(gone, pids)), DEADLINE_S)
