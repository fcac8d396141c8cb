"""The whole state of a batch of environments between two intervals, kept so as to go on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from env._bandwidth import Bandwidth
from env._outages import Outages
from env._pings import Pings
from env._stations import RequestStore, Station
from env.conditions import IntervalConditions
from env.state import SystemState
from executor.errors import ConfigError

__all__ = ["Queued", "Snapshot"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Queued:
    """The R open requests and probes of B environments, by environment.

    Attributes:
        count: [B] of each environment.
        arrival_s, is_probe: [R] as in `RequestStore`.
        work: [S, R] likewise.
        cuts: [R, H] likewise.
        wall_s, wait_s: [S, R], [R] likewise; empty where they are not recorded.
        late_limit_s, late_cut: [rows, R] likewise; empty without late binding.
        place: [R] the station each is at, or -1: its output is on its way back.
        due_s: [R] when it is (or was) there, or back at the edge; from the interval's end.
        served, start_s: [S, B] what each station keeps of the request in service.
    """

    count: I64
    arrival_s: F64
    is_probe: NDArray[np.bool_]
    work: F64
    cuts: I64
    wall_s: F64
    wait_s: F64
    late_limit_s: F64
    late_cut: I64
    place: I64
    due_s: F64
    served: F64
    start_s: F64

    @classmethod
    def of(cls, store: RequestStore, stations: Sequence[Station], back: tuple[I64, F64]) -> Queued:
        """What is open now; `back` holds slots and times of outputs on their way."""
        batch = stations[0].batch
        contents = [station.contents() for station in stations]
        lists = [back, *((slot, ready) for slot, ready, _, _ in contents)]
        slot = np.concatenate([x[0] for x in lists])
        place = np.repeat(np.arange(len(lists)) - 1, [len(x[0]) for x in lists])
        order = np.argsort(store.env.take(slot), kind="stable")
        slot = slot.take(order)
        wall_s, wait_s = store.wall_s, store.wait_s
        limit_s, late_cut = store.late_limit_s, store.late_cut
        if wall_s.size:
            wall_s, wait_s = wall_s[:, slot], wait_s[slot]
        if limit_s.size:
            limit_s, late_cut = limit_s[:, slot], late_cut[:, slot]
        return cls(
            count=np.bincount(store.env.take(slot), minlength=batch),
            arrival_s=store.arrival_s.take(slot),
            is_probe=store.is_probe.take(slot),
            work=store.work.take(slot, axis=1),
            cuts=store.cuts.take(slot, axis=0),
            wall_s=wall_s,
            wait_s=wait_s,
            late_limit_s=limit_s,
            late_cut=late_cut,
            place=place.take(order),
            due_s=np.concatenate([x[1] for x in lists]).take(order),
            served=np.stack([served for _, _, served, _ in contents]),
            start_s=np.stack([start for _, _, _, start in contents]),
        )

    def put(self, index: I64, store: RequestStore, stations: Sequence[Station]) -> tuple[I64, F64]:
        """Fill an empty store and stations: environment b gets what index[b] has here.

        Returns slots and times of the outputs on their way back.
        """
        count = self.count.take(index)
        env = np.repeat(np.arange(len(index)), count)
        first = (np.cumsum(self.count) - self.count).take(index)
        of = np.arange(len(env)) + np.repeat(first - (np.cumsum(count) - count), count)
        new = store.extend(len(env))
        store.env[new] = env
        store.arrival_s[new] = self.arrival_s.take(of)
        store.is_probe[new] = self.is_probe.take(of)
        for row, work in zip(store.work, self.work, strict=True):
            row[new] = work.take(of)
        store.cuts[new] = self.cuts.take(of, axis=0)
        if store.wall_s.size:
            store.wall_s[:, new], store.wait_s[new] = self.wall_s[:, of], self.wait_s[of]
        if store.late_limit_s.size:
            store.late_limit_s[:, new] = self.late_limit_s[:, of]
            store.late_cut[:, new] = self.late_cut[:, of]
        place, due_s = self.place.take(of), self.due_s.take(of)
        for s, station in enumerate(stations):
            slot = np.flatnonzero(place == s)
            station.put(
                slot, due_s.take(slot), self.served[s].take(index), self.start_s[s].take(index)
            )
        back = np.flatnonzero(place < 0)
        return back, due_s.take(back)


@dataclass(frozen=True)
class Snapshot:
    """B environments of one simulator; opaque: made and read by `env.simulator.Simulator`.

    Attributes:
        time_s: Simulation time, one for all.
        n_ref, completed_rps, in_flight: [B].
        bandwidth: What frames have measured.
        probing: [B, H].
        due_s: [B, H] when each hop's newest frame arrives, where delays vary.
        pings: What pings have measured; None where delays are constant.
        outages: Which hops are down.
        state: What a controller sees.
        lately: What conditions lately were, for a run-out; None before the first interval.
        queued: The open requests.
        recorded: Whether the requests' rows are kept.
    """

    time_s: float
    n_ref: F64
    completed_rps: F64
    in_flight: I64
    bandwidth: Bandwidth
    due_s: F64
    pings: Pings | None
    outages: Outages
    probing: NDArray[np.bool_]
    state: SystemState
    lately: IntervalConditions | None
    queued: Queued
    recorded: bool

    @property
    def batch(self) -> int:
        """Number of environments B."""
        return len(self.n_ref)

    def check(self, index: I64, n_stations: int, recording: bool) -> None:
        """Raise ConfigError unless a simulator can go on from these environments."""
        if not (len(index) and 0 <= index.min() <= index.max() < self.batch):
            raise ConfigError(f"a snapshot's environments are 0..{self.batch - 1}, got {index}")
        if self.queued.work.shape[0] != n_stations:
            raise ConfigError("a snapshot of another chain of nodes cannot be restored here")
        if recording and not self.recorded:
            raise ConfigError("this simulator records requests and the snapshot's did not")
