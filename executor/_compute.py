"""A node's compute: a fair, bounded queue, what runs its jobs, and what is left to do."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from executor._fairness import FairBuffer
from executor.codec import Affine, as_float32, encode, form_of
from executor.errors import SplitpilotError, StageAbandoned
from executor.model import UnitChain
from executor.pacing import Pacer
from executor.profile import Conversion
from executor.profiler import profile_conversions, profile_units
from executor.wire import Header, payload_of

__all__ = ["Computer", "FairQueue", "Job", "Outcome", "WorkEstimate", "turn_until_s"]

_log = logging.getLogger(__name__)
_SMOOTHING = 0.3
_SHORT_S = 0.0005
_ALIGN_BYTES, _ALIGNED_BYTES = 64, 128 * 1024


@dataclass(slots=True, eq=False)
class Job:
    """A stage to run, or a profile to take (`profile_repeats` set).

    Attributes:
        header: The request.
        body: The stage's input.
        start: First unit.
        stop: One past the last unit; `start` where the input only is to be encoded for the hop.
        profile_repeats: Timed passes per unit; 0 for a stage.
        choose: Gives another `stop` when the stage's turn has come (late binding).
        until_s: When its turn must have come (the node's clock); after that it is not run.
        abandoned: Set, from any thread, when nobody wants the output any more: a stage under way
            ends before its next unit.
    """

    header: Header
    body: memoryview | None = None
    start: int = 0
    stop: int = 0
    profile_repeats: int = 0
    choose: Callable[[], int] | None = None
    until_s: float = float("inf")
    abandoned: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job: an output, unit times, or the reason it failed; none if abandoned.

    `stop` is one past the last unit that was run, which a job may choose late. An output that goes
    on over the hop is in the form that it crosses in.
    """

    job: Job
    start_s: float
    end_s: float
    work_s: float = 0.0
    output: NDArray[np.generic] | Affine | None = None
    unit_s: tuple[float, ...] = ()
    error: str = ""
    stop: int = 0
    conversions: tuple[Conversion, ...] = ()

    def profile(self) -> dict[str, Any]:
        """The measured times as a PROFILE_REPLY carries them."""
        values: dict[str, Any] = {"unit_s": list(self.unit_s)}
        if self.conversions:
            values["conversions"] = [asdict(conversion) for conversion in self.conversions]
        return values


class FairQueue:
    """Jobs of several clients: round-robin over clients, first come first served within one."""

    def __init__(self, bound: int) -> None:
        """Set the bound on queued jobs, all clients together."""
        self._bound = bound
        self._lock = threading.Lock()
        self._jobs: FairBuffer[Job] = FairBuffer()
        self._overdue: list[Job] = []
        self._closed = False

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job) -> Job | None:
        """Queue a job; returns the job that is refused instead, or for which there is no room.

        None if there was room. At the bound that is the newest job of the client which has had
        the most, or else `job` itself (`FairBuffer.displace`).
        """
        with self._lock:
            if self._closed:
                return job
            displaced = None
            if len(self._jobs) >= self._bound:
                displaced = self._jobs.displace(job.header.client)
                if displaced is None:
                    return job
            self._jobs.put(job.header.client, job)
            return displaced

    def get(self, now_s: float = float("-inf")) -> Job | None:
        """The next job that is not overdue; None if there is none, or once the queue is closed."""
        with self._lock:
            if self._closed:
                return None
            self._set_aside(now_s)
            return self._jobs.take() if self._jobs else None

    def overdue(self, now_s: float) -> list[Job]:
        """Take out the jobs whose turn did not come in time, those that `get` passed over too."""
        with self._lock:
            self._set_aside(now_s)
            out, self._overdue = self._overdue, []
            return out

    def discard(self, client: bytes, seq: int) -> None:
        """Take a request's job out, if it still queues."""
        with self._lock:
            self._jobs.discard(lambda job: job.header.seq == seq, client)

    def close(self) -> None:
        """Forget what is queued and let `get` return None."""
        with self._lock:
            self._closed = True
            self._jobs.clear()
            self._overdue.clear()

    def snapshot(self) -> list[Job]:
        """The queued jobs, in no particular order."""
        with self._lock:
            return self._jobs.items()

    def _set_aside(self, now_s: float) -> None:
        if self._jobs:
            self._overdue += self._jobs.discard(lambda job: job.until_s <= now_s)


class WorkEstimate:
    """Unloaded seconds a stage is expected to take: profiled, or as measured so far."""

    def __init__(self, n_units: int) -> None:
        """Start knowing nothing: every stage counts 0 s until one was measured."""
        self._n_units = n_units
        self._prefix_s: NDArray[np.float64] | None = None
        self._stage_s: dict[tuple[int, int], float] = {}
        self._mean_unit_s = 0.0

    def learn_profile(self, unit_s: tuple[float, ...]) -> None:
        """Take the profile's unit seconds, n values; they stand from now on."""
        self._prefix_s = np.concatenate([[0.0], np.cumsum(unit_s)])

    def learn_stage(self, start: int, stop: int, work_s: float) -> None:
        """Take one measured stage; used as long as there is no profile."""
        old = self._stage_s.get((start, stop), work_s)
        self._stage_s[start, stop] = old + _SMOOTHING * (work_s - old)
        if stop == start:
            return
        per_unit = work_s / (stop - start)
        old = self._mean_unit_s or per_unit
        self._mean_unit_s = old + _SMOOTHING * (per_unit - old)

    def stage_s(self, start: int, stop: int) -> float:
        """Expected unloaded seconds of units [start, stop)."""
        if self._prefix_s is not None and start < stop:
            return float(self._prefix_s[stop] - self._prefix_s[start])
        return self._stage_s.get((start, stop), self._mean_unit_s * (stop - start))


class Computer:
    """Runs jobs, one at a time, at the pacer's speed.

    Attributes:
        estimate: What stages are expected to take.
    """

    def __init__(
        self,
        chain: UnitChain,
        pacer: Pacer,
        queue: FairQueue,
        device: torch.device,
        transfer: str = "float32",
        forms: tuple[str, ...] = (),
    ) -> None:
        """Prepare.

        Args:
            chain: The model.
            pacer: Runs each stage.
            queue: What waits, for `backlog_s`.
            device: Where the chain's weights are.
            transfer: The form that outputs cross the hop in, and inputs passed on as float32.
            forms: Forms in use on the chain, beside float32; what they take is profiled.
        """
        self._transfer, self._forms = transfer, forms
        self._conversions: dict[str, Conversion] = {}
        self.estimate = WorkEstimate(chain.spec.n_units)
        self._chain = chain
        self._pacer = pacer
        self._queue = queue
        self._device = device
        self._current: tuple[Job, float] | None = None

    def run(self, job: Job) -> Outcome:
        """Run a job; whatever goes wrong becomes its outcome's error."""
        started_s = time.monotonic()
        self._current = (job, started_s)
        try:
            return self._profile(job) if job.profile_repeats else self._stage(job)
        except StageAbandoned:
            return Outcome(job, started_s, time.monotonic())
        except SplitpilotError as error:
            return Outcome(job, started_s, time.monotonic(), error=str(error))
        except Exception as error:
            # Whatever a request's bytes make torch raise fails that request, not the node.
            _log.warning("units [%d, %d) failed: %s", job.start, job.stop, error)
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            return Outcome(job, started_s, time.monotonic(), error=reason)
        finally:
            self._current = None

    def is_short(self, job: Job) -> bool:
        """Whether it is known to take less time than waking a thread is worth."""
        if job.profile_repeats or job.choose is not None:
            return False
        return 0.0 < self._expected_s(job) < _SHORT_S

    def backlog_s(self, now_s: float) -> float:
        """Unloaded seconds of work queued, with what remains of the current job.

        A profile being taken counts as nothing: it is asked for, not part of the load.
        """
        jobs = self._queue.snapshot()
        total_s = sum(self._expected_s(job) for job in jobs)
        current = self._current
        if current is not None and not current[0].profile_repeats:
            job, started_s = current
            done_s = max(0.0, now_s - started_s) * (1.0 - self._load(now_s))
            total_s += max(0.0, self._expected_s(job) - done_s)
        return total_s

    def _expected_s(self, job: Job) -> float:
        """Unloaded seconds a job is expected to take; a measured stage has its conversions in."""
        total_s = self.estimate.stage_s(job.start, job.stop)
        if not self._conversions or job.profile_repeats:
            return total_s
        form = form_of(job.header.dtype, job.header.affine)
        came, goes = self._conversions.get(form or ""), self._conversions.get(self._transfer)
        if came is not None and job.start < job.stop:
            total_s += came.decode_s[job.start]
        if goes is not None and job.stop < self._chain.spec.n_units:
            total_s += goes.encode_s[job.stop]
        return total_s

    def _load(self, now_s: float) -> float:
        return self._pacer.load.value_at(now_s) if self._pacer.ratio is not None else 0.0

    def _stage(self, job: Job) -> Outcome:
        """Run units [start, stop) on the body; with none of them, the body is the output.

        Reading a body that is not float32, and encoding the output for the hop, is part of the
        stage's work. What is encoded already and only goes on is left as it came.
        """
        given = payload_of(job.header, job.body)
        stop = job.stop if job.choose is None else job.choose()
        goes_on = stop < self._chain.spec.n_units
        transfer = self._transfer if goes_on else "float32"
        coded = isinstance(given, Affine) or given.dtype != np.float32
        if stop == job.start and (coded or transfer == "float32"):
            now_s = time.monotonic()
            return Outcome(job, now_s, now_s, output=given, stop=stop)

        def is_wanted() -> bool:
            return not job.abandoned

        def compute() -> NDArray[np.generic] | Affine:
            array = as_float32(given)
            if stop > job.start:
                x = _aligned(torch.from_numpy(array)).to(self._device)
                y = self._chain.run(x, job.start, stop, is_wanted)
                array = y.cpu().contiguous().numpy()
            return encode(array, transfer)

        start_s = time.monotonic()
        output, work_s = self._pacer.run(compute, is_wanted)
        end_s = time.monotonic()
        self.estimate.learn_stage(job.start, stop, work_s)
        return Outcome(job, start_s, end_s, work_s, output, stop=stop)

    def _profile(self, job: Job) -> Outcome:
        """Time every unit at this node's speed, without its background load."""
        start_s = time.monotonic()
        pacer = Pacer(self._pacer.ratio)
        unit_s = tuple(profile_units(self._chain, pacer.run, repeats=job.profile_repeats))
        conversions: tuple[Conversion, ...] = ()
        if self._forms:
            conversions = profile_conversions(
                self._chain, pacer.run, self._forms, job.profile_repeats
            )
        self.estimate.learn_profile(unit_s)
        self._conversions = {conversion.form: conversion for conversion in conversions}
        return Outcome(job, start_s, time.monotonic(), unit_s=unit_s, conversions=conversions)


def turn_until_s(header: Header, now_s: float) -> float:
    """When a request that came now must have its turn to be computed.

    In half of the time that is left to answer it: it may have to wait elsewhere, too, and what is
    answered too late has cost others their turn.
    """
    return now_s + 0.5 * header.left_s if header.left_s else float("inf")


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """A tensor from a frame, which may begin anywhere, where torch would have put it.

    A product of a matrix and a vector sums in another order at another alignment, and the last bit
    differs. Nothing larger than a classifier's input does so; that is left where it is.
    """
    if x.nbytes > _ALIGNED_BYTES or x.data_ptr() % _ALIGN_BYTES == 0:
        return x
    return x.clone()
