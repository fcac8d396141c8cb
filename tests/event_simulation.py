"""A plain event-by-event simulation of one environment, to hold the batched simulator against."""

import heapq
from dataclasses import dataclass, field

from toy_chain import SPEC

from env._chain import REPLY_RATE_FLOOR


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

    def run(self, items):
        free = dict.fromkeys(range(len(self.rates)), 0.0)
        due = dict.fromkeys(range(len(self.rates)), 0.0)
        heap = [(item.arrival_s, i, 0, item) for i, item in enumerate(items)]
        heapq.heapify(heap)
        while heap:
            t, i, step, item = heapq.heappop(heap)
            if step == len(item.route):
                item.completion_s = t + sum(
                    self.delay(h, t)
                    + SPEC.cut_bytes[-1] / max(self.rate(2 * h + 1, t), REPLY_RATE_FLOOR)
                    for h in item.back
                )
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
