"""The processes of a case: a runner that measures, and one per node of every system.

All are forked from a process that holds the chain and has no threads, so none of them loads or
builds anything, and all share the same weights: the runner first, from the bench; from it, before
it starts any library, the nodes. Each ends when its parent's end of its pipe is gone.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from executor.bench.systems import Place, Serving, System
from executor.errors import SplitpilotError

__all__ = ["BenchError", "Host", "Report", "in_process", "open_files", "resident_mib"]

START_S = 90.0
_FORK = multiprocessing.get_context("fork")


class BenchError(SplitpilotError):
    """A process of the bench failed; the message says which, and how."""


@dataclass(frozen=True)
class Report:
    """What a node's process says of itself.

    Attributes:
        stage_s: Seconds of its stages since the last report.
        memory_mib: Its anonymous resident memory.
        open_files: Its open file descriptors.
    """

    stage_s: list[float]
    memory_mib: float
    open_files: int


class Host:
    """One node of one system, in a process of its own."""

    def __init__(self, system: System, place: Place, others: list[Host]) -> None:
        """Fork it; `serve` starts the node. `others` were forked before, from the same parent."""
        self.name = f"{system.name} node {place.index}"
        self._pipe, far = _FORK.Pipe()
        inherited = [self._pipe, *(other._pipe for other in others)]
        self._process = _FORK.Process(
            target=_host, args=(system, place, far, inherited), name=self.name, daemon=True
        )
        self._process.start()
        far.close()

    def ask(self, what: str) -> None:
        """Send a command: "serve", "drain", "stop"."""
        self._pipe.send(what)

    def answer(self, timeout_s: float = START_S) -> Any:
        """What it has to say to that.

        Raises:
            BenchError: It failed, ended, or said nothing in time.
        """
        if not self._pipe.poll(timeout_s):
            raise BenchError(f"{self.name} said nothing for {timeout_s:g} s")
        try:
            done, value = self._pipe.recv()
        except EOFError:
            raise BenchError(f"{self.name} ended") from None
        if not done:
            raise BenchError(f"{self.name}: {value}")
        return value

    def close(self) -> None:
        """End it, by force where it does not end by itself."""
        with contextlib.suppress(OSError):
            self._pipe.send("stop")
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()


def _host(system: System, place: Place, pipe: Connection, inherited: list[Connection]) -> None:
    """The life of a node's process: commands come over the pipe, and each is answered."""
    for other in inherited:
        other.close()
    assert system.serve is not None
    torch.set_num_threads(1)
    node: Serving | None = None
    with contextlib.suppress(EOFError, OSError):
        while (command := pipe.recv()) != "stop":
            try:
                if command == "serve":
                    node = system.serve(place)
                    pipe.send((True, None))
                else:
                    taken_s = list(place.chain.taken_s)
                    place.chain.taken_s.clear()
                    pipe.send((True, Report(taken_s, resident_mib(), open_files())))
            except Exception as error:  # of any library; it goes to the runner
                pipe.send((False, f"{type(error).__name__}: {error}"))
    if node is not None:
        node.close()


def in_process(work: Callable[[], Any], timeout_s: float) -> Any:
    """Do something in a forked process, and return what it returns.

    Raises:
        BenchError: It failed, or took too long.
    """
    gc.collect()
    gc.freeze()  # else a collection in any of the processes goes through all of torch
    near, far = _FORK.Pipe()
    process = _FORK.Process(target=_work, args=(work, far, near), name="bench runner")
    process.start()
    far.close()
    try:
        if not near.poll(timeout_s):
            raise BenchError(f"a case took longer than {timeout_s:.0f} s")
        try:
            done, value = near.recv()
        except EOFError:
            raise BenchError("the process that measured ended early") from None
        if not done:
            raise BenchError(value)
        process.join(START_S)
        return value
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        near.close()


def _work(work: Callable[[], Any], pipe: Connection, near: Connection) -> None:
    near.close()
    try:
        answer = (True, work())
    except Exception as error:  # of any library; it goes to the bench
        answer = (False, f"{type(error).__name__}: {error}")
    pipe.send(answer)


def open_files() -> int:
    """Open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def resident_mib(pid: int | str = "self") -> float:
    """Anonymous resident memory of a process, what it shares with its parent included."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
    return kib / 1024
