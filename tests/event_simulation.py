"""A plain event-by-event simulation of one environment, to hold the batched simulator against."""

import heapq
import itertools
from dataclasses import dataclass, field, replace

import numpy as np
from toy_chain import SPEC

from env._chain import REPLY_RATE_FLOOR
from executor.link import RATE_MEMORY_S


@dataclass
class Item:
    """A request or probe of the reference simulation."""

    arrival_s: float
    route: list  # (station, work, overhead until the next station after service)
    back: list = field(default_factory=list)  # hops the output returns over
    service: dict = field(default_factory=dict)  # station -> (arrive, start, end)
    completion_s: float = float("nan")


class Reference:
    """One environment, event by event; rates and delays per sub-step, held at the end."""

    def __init__(self, profile, scenario, rates, substep_s, delays=None):
        self.profile, self.scenario = profile, scenario
        self.rates, self.substep_s = rates, substep_s
        self.delays = delays
        if delays is None:
            self.delays = [[hop.one_way_delay_s] for hop in scenario.hops]

    def rate(self, station, t):
        series = self.rates[station]
        return series[min(int(t / self.substep_s + 1e-12), len(series) - 1)]

    def delay(self, hop, t):
        series = self.delays[hop]
        return series[min(int(t / self.substep_s + 1e-12), len(series) - 1)]

    def finish(self, station, start, work):
        series, t = self.rates[station], start
        while t < float("inf"):
            k = int(t / self.substep_s + 1e-12)
            if k >= len(series) - 1:
                return t + work / series[-1] if series[-1] > 0 else float("inf")
            rate, end = series[k], (k + 1) * self.substep_s
            if rate * (end - t) >= work:
                return t + work / rate
            work -= rate * (end - t)
            t = end
        return t

    def work_done(self, station, a, b):
        """Work the station can do from a to b; 0 if b <= a."""
        series, total = self.rates[station], 0.0
        for k, rate in enumerate(series):
            start = k * self.substep_s
            end = start + self.substep_s if k < len(series) - 1 else float("inf")
            if a < end and b > start and rate > 0:
                total += rate * max(0.0, min(b, end) - max(a, start))
        return total

    def request(self, arrival_s, cuts):
        n, profile = SPEC.n_units, self.profile
        bounds = [0, *cuts, n]
        route, back = [], []
        for k in range(profile.n_nodes):
            if bounds[k + 1] > bounds[k]:
                seconds = sum(profile.nodes[k].unit_s[bounds[k] : bounds[k + 1]])
                route.append((2 * k, seconds + profile.nodes[k].stage_overhead_s, 0.0))
            if k < len(cuts) and cuts[k] < n:
                overhead = profile.hops[k].frame_overhead_s
                route.append((2 * k + 1, float(SPEC.cut_bytes[cuts[k]]), overhead))
                back.append(k)
        return Item(arrival_s, route, back)

    def way_back_s(self, item, t):
        reply = SPEC.cut_bytes[-1]
        return sum(
            self.delay(h, t) + reply / max(self.rate(2 * h + 1, t), REPLY_RATE_FLOOR)
            for h in item.back
        )

    def run(self, items):
        free = dict.fromkeys(range(len(self.rates)), 0.0)
        due = dict.fromkeys(range(len(self.rates)), 0.0)
        heap = [(item.arrival_s, i, 0, item) for i, item in enumerate(items)]
        heapq.heapify(heap)
        while heap:
            t, i, step, item = heapq.heappop(heap)
            if step == len(item.route):
                item.completion_s = t + self.way_back_s(item, t)
                continue
            station, work, overhead = item.route[step]
            start = max(t, free[station])
            end = free[station] = self.finish(station, start, work)
            item.service[station] = (t, start, end)
            if end < float("inf"):
                next_s = end
                if station % 2:  # propagation, in the order sent
                    due[station] = max(due[station] + 1e-9, end + self.delay(station // 2, end))
                    next_s = due[station] + overhead
                heapq.heappush(heap, (next_s, i, step + 1, item))


def overlap(a, b, t0, t1):
    return max(0.0, min(b, t1) - max(a, t0))


def union(spans):
    total, reached = 0.0, -1.0
    for a, b in sorted(spans):
        total += max(0.0, b - max(a, reached))
        reached = max(reached, b)
    return total


def first_rate(scenario, hop_bytes_per_s):
    """What a probe at time 0 finds; a hop that is down is slower than this, and no more known."""
    return max(hop_bytes_per_s, scenario.probing.payload_bytes / scenario.probing.idle_s)


def lately_of(intervals, scenario):
    """What a run-out meets: running means over 12 s, each interval's by its mean."""
    share = 1.0 - np.exp(-scenario.interval_s / 12.0)
    weights = share * (1.0 - share) ** np.arange(len(intervals))[::-1]
    weights[0] = (1.0 - share) ** (len(intervals) - 1)
    means = {
        name: sum(
            w * getattr(c, name).mean(axis=2, keepdims=True)
            for w, c in zip(weights, intervals, strict=True)
        )
        for name in ("hop_bytes_per_s", "node_speed", "hop_delay_s")
    }
    return replace(intervals[-1].held(), **means)


def measured_rate(frames, now_s):
    """The rate that a hop's sender knows, and the end of its newest frame; None before the first.

    `frames` are (end, seconds of service, bytes) of those that count.
    """
    ended = [f for f in frames if f[0] <= now_s]
    if not ended:
        return None
    newest = max(f[0] for f in ended)
    weights = [np.exp((f[0] - newest) / RATE_MEMORY_S) for f in ended]
    size = sum(w * f[2] for w, f in zip(weights, ended, strict=True))
    return size / sum(w * f[1] for w, f in zip(weights, ended, strict=True)), newest


class LateReference(Reference):
    """With late binding: the fog's turns are events of their own, and the tables are asked there.

    An item's `rows` are its table's (limit, cut), its `cuts` the plan; `rtt_s` is the hop's round
    trip.
    """

    def __init__(self, *args, measured_bytes, first_rate, rtt_s, **kwargs):
        super().__init__(*args, **kwargs)
        self.measured_bytes, self.first_rate = measured_bytes, first_rate
        self.rtt_s = rtt_s
        self.choices = 0

    def backlog_s(self, now_s):
        """What the sender of hop 1 reckons it holds, seconds."""
        held = [f for f in self.frames if f[0] <= now_s and f[2] > now_s]
        if not held:
            return 0.0
        frames = [(end, end - start, size) for _, start, end, counts, size in self.frames if counts]
        rate, _ = measured_rate(frames, now_s) or (self.first_rate, 0.0)
        _, start, _, counts, size = min(held, key=lambda f: f[2])
        elapsed = now_s - start - self.rtt_s
        if counts and elapsed > 0:
            rate = min(rate, size / elapsed)
        return sum(f[4] for f in held) / rate

    def choose(self, item, now_s):
        """The fog's cut now: bounds the rest of the request's route."""
        i, planned = item.cuts
        backlog = self.backlog_s(now_s)
        cut = next((c for limit, c in item.rows if backlog <= limit), planned)
        self.choices += cut != planned
        return max(i, cut)

    def bind(self, item, cut):
        """Give the request the route of another cut; what it has passed of it stays."""
        edge = [s for s in item.route if s[0] < 2]
        fresh = self.request(item.arrival_s, (item.cuts[0], cut))
        later = [s for s in fresh.route if s[0] >= 2]
        if not any(s[0] == 2 for s in later):
            later.insert(0, (2, 0.0, 0.0))
        item.route, item.back, item.cuts = [*edge, *later], fresh.back, (item.cuts[0], cut)

    def run(self, items):
        free = dict.fromkeys(range(len(self.rates)), 0.0)
        # At one moment what comes goes before whose turn it is.
        self.frames, queue, count = [], [], itertools.count()
        busy_until = 0.0
        heap = [(item.arrival_s, 0, next(count), "come", 0, item) for item in items]
        heapq.heapify(heap)

        def serve(t, step, item, station, work, overhead):
            start = max(t, free[station])
            end = free[station] = self.finish(station, start, work)
            item.service[station] = (t, start, end)
            if station == 3:
                big = work >= self.measured_bytes or not hasattr(item, "cuts")
                self.frames.append((t, start, end, big, work))
            if end < float("inf"):
                lag = self.delay(station // 2, end) + overhead if station % 2 else 0.0
                heapq.heappush(heap, (end + lag, 0, next(count), "come", step + 1, item))

        while heap:
            t, _, _, what, step, item = heapq.heappop(heap)
            if what == "turn":
                if queue and t >= busy_until:
                    arrived, step, item = queue.pop(0)
                    if item.rows:
                        self.bind(item, self.choose(item, t))
                        item.rows = ()
                    serve(arrived, step, item, *item.route[step])
                    busy_until = free[2]
                    if queue and busy_until < float("inf"):
                        heapq.heappush(heap, (busy_until, 1, next(count), "turn", 0, None))
                continue
            if step == len(item.route):
                item.completion_s = t + self.way_back_s(item, t)
                continue
            station = item.route[step][0]
            if station == 3 and getattr(item, "rows", ()) and 2 not in item.service:
                cut = self.choose(item, t)
                if cut > item.cuts[0]:
                    self.bind(item, cut)
                    station = 2
                else:
                    item.rows = ()
            if station == 2:
                queue.append((t, step, item))
                heapq.heappush(heap, (max(t, busy_until), 1, next(count), "turn", 0, None))
                continue
            serve(t, step, item, *item.route[step])
