"""Late binding in the simulator against the event-by-event one, and the rule of its tables."""

import numpy as np
import pytest
from event_simulation import LateReference, first_rate, lately_of
from test_simulator import conditions_of
from toy_chain import SPEC, constant_scenario, random_cuts, toy_profile, toy_scenario

from agents.arms.branches import Branches
from agents.arms.controllers import Solver
from agents.arms.oracle import PlanSequence
from env.conditions import mean_delay_s
from env.cost import Cost
from env.late import ROWS, LateRule, LateTables
from env.predict import CostModel
from env.simulator import Simulator
from env.system import DRAIN_DEADLINES
from executor.errors import ConfigError
from executor.link import MIN_FRAME_BYTES

N = SPEC.n_units


class RandomTables:
    """Tables that make the fog choose all sorts of cuts; remembers them."""

    def __init__(self, seed):
        self.rng, self.given = np.random.default_rng(seed), []

    def tables(self, state, cuts):
        shape = (len(cuts), ROWS)
        limit = np.sort(self.rng.choice([0.0, 0.01, 0.05, 0.2, 0.7], shape), axis=1)
        limit += np.arange(ROWS) * 1e-4
        limit[:, -1] = np.where(self.rng.random(len(cuts)) < 0.5, np.inf, limit[:, -1])
        limit[self.rng.random(len(cuts)) < 0.2] = -np.inf
        limit[cuts[:, 0] >= N] = -np.inf
        tables = LateTables(limit, self.rng.integers(0, N + 1, shape))
        self.given.append(tables)
        return tables


def rollout(seed, interval_s, steps, batch=4, **changes):
    scenario = toy_scenario(3, interval_s=interval_s, late_binding=True, **changes)
    model = CostModel(toy_profile(3), scenario)
    sim = Simulator(model, batch, seed, record_requests=True)
    sim.late_rule = RandomTables(seed)
    rng = np.random.default_rng(seed + 1)
    results, plans = [], []
    for k in range(steps):
        if k % 3 == 0:
            cuts = random_cuts(rng, batch, 2)
            relay = rng.random(batch) < 0.3
            cuts[relay, 1] = cuts[relay, 0]
        plans.append(cuts.copy())
        results.append(sim.step(plans[-1]))
    return sim, model, results, sim.drain_completed(), plans


@pytest.mark.parametrize(
    ("interval_s", "substep_s", "steps"), [(1.0, 1.0, 20), (0.2, 0.2, 60), (2.5, 0.5, 10)]
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_event_by_event_with_late_binding(interval_s, substep_s, steps, seed):
    sim, model, results, drained, plans = rollout(seed, interval_s, steps, substep_s=substep_s)
    scenario = model.scenario
    conditions, intervals = conditions_of(scenario, sim.n_ref, seed, steps)
    lately = lately_of(intervals, scenario)
    speed = np.concatenate([c.node_speed for c in [*intervals, lately]], axis=2)
    hop = np.concatenate([c.hop_bytes_per_s for c in [*intervals, lately]], axis=2)
    end = steps * interval_s + DRAIN_DEADLINES * model.references.deadline_s
    checked = choices = computed = relayed = 0
    for b in range(sim.batch):
        rates = [None] * 5
        rates[0::2], rates[1::2] = [list(s) for s in speed[b]], [list(h) for h in hop[b]]
        reference = LateReference(
            model.profile,
            scenario,
            rates,
            conditions.substep_s,
            measured_bytes=MIN_FRAME_BYTES,
            first_rate=first_rate(scenario, hop[b, 1, 0]),
            rtt_s=2.0 * mean_delay_s(scenario.hops[1]),
        )
        done = [r.completed for r in [*results, drained]]
        rows = [(c, i) for c in done for i in np.flatnonzero(c.env == b)]
        rows = [(c, i) for c, i in rows if not (c.lost[i] and c.work_s[i].sum() == 0)]
        items, planned = [], []
        for c, i in rows:
            k = min(int(c.arrival_s[i] / interval_s), steps - 1)
            cuts = tuple(int(x) for x in plans[k][b])
            item = reference.request(c.arrival_s[i], cuts)
            tables = sim.late_rule.given[k]
            item.cuts, item.rows = cuts, tuple(zip(tables.limit_s[b], tables.cut[b], strict=True))
            if tables.limit_s[b, 0] < 0.0:
                item.rows = ()
            items.append(item)
            planned.append(cuts)
        reference.run(items)
        for (c, i), item, plan in zip(rows, items, planned, strict=True):
            if c.lost[i]:
                assert not item.completion_s <= end
                continue
            assert tuple(c.cuts[i]) == item.cuts
            assert c.completion_s[i] == pytest.approx(item.completion_s, abs=1e-6)
            for k in range(3):
                _, start, stop = item.service.get(2 * k, (0, 0, 0))
                assert c.stage_s[i, k] == pytest.approx(stop - start, abs=1e-6)
                work = dict((s, w) for s, w, _ in item.route).get(2 * k, 0.0)
                assert c.work_s[i, k] == pytest.approx(work, abs=1e-12)
            for h in range(2):
                _, start, stop = item.service.get(2 * h + 1, (0, 0, 0))
                assert c.transmit_s[i, h] == pytest.approx(stop - start, abs=1e-6)
            checked += 1
            computed += plan[0] == plan[1] < item.cuts[1]
            relayed += plan[0] == item.cuts[1] < plan[1]
        choices += reference.choices
    assert checked > 80 and choices > 50 and computed > 5 and relayed > 5


def test_a_snapshot_holds_the_tables():
    sim, model, *_ = rollout(5, 0.2, 10, rate_rps=20.0)
    sim.reset(7)
    sim.late_rule = LateRule(model)
    rng = np.random.default_rng(0)
    cuts = [random_cuts(rng, 4, 2) for _ in range(12)]
    for c in cuts[:6]:
        sim.step(c)
    snapshot = sim.snapshot()
    tape = sim.record(6)
    assert (snapshot.queued.late_limit_s[0] >= 0.0).any()
    ends = []
    for _ in range(2):
        sim.restore(snapshot, np.arange(4), tape.play())
        ends.append([sim.step(c).record.outstanding_s for c in cuts[6:]])
        ends[-1].append(sim.drain().outstanding_s)
    np.testing.assert_array_equal(*ends)
    # Other places of a batch, without rows of requests, to rounding.
    other = Simulator(model, 8, 0)
    index = np.array([3, 3, 1, 0, 2, 1, 0, 2])
    other.restore(snapshot, index, tape.play(index))
    again = [other.step(c[index]).record.outstanding_s for c in cuts[6:]]
    again.append(other.drain().outstanding_s)
    np.testing.assert_allclose(again, np.array(ends[0])[:, index], atol=1e-9)


def some_state(rng, batch, **changes):
    """A state like those of a running system."""
    model = CostModel(toy_profile(3), toy_scenario(3, **changes))
    state = Simulator(model, batch, 0).reset(0)
    state.bytes_per_s = rng.uniform(1e5, 1e7, (batch, 2))
    state.node_load = rng.uniform(0.0, 0.8, (batch, 3))
    state.node_backlog_s = rng.exponential(0.2, (batch, 3))
    state.hop_backlog_bytes = rng.exponential(3e5, (batch, 2)) * rng.integers(0, 2, (batch, 2))
    state.arrival_rps = rng.uniform(0.5, 20.0, batch)
    return model, state


@pytest.mark.parametrize("constrained", [False, True])
def test_a_table_is_the_lower_envelope_of_its_lines(constrained):
    rng = np.random.default_rng(3)
    batch = 300
    model, state = some_state(rng, batch, constrained=constrained)
    rule = LateRule(model)
    cuts = np.array([p.cuts for p in model.plans])[rng.integers(len(model.plans), size=batch)]
    tables = rule.tables(state, cuts)
    options, level, slope = rule._lines(state, cuts)
    moved = 0
    for b in range(batch):
        rows = [(s, c) for s, c in zip(tables.limit_s[b], tables.cut[b], strict=True) if s >= 0.0]
        if cuts[b, 0] == N:
            assert not rows
            continue
        if rows:
            (table,) = tables.cut_tables(b)
            table.check(N, 3)
            assert table.rows == tuple(rows)
            moved += 1
        for backlog_s in (0.0, 0.003, 0.05, 0.31, 1.7, 20.0):
            cut = next((c for limit, c in rows if backlog_s <= limit), cuts[b, 1])
            line = level[b] + slope[b] * backlog_s
            own = line[options[b] == cut].min()
            least = line.min()
            assert own == pytest.approx(least, rel=1e-6, abs=1e-9) or len(rows) == ROWS
            assert cut >= cuts[b, 0] and (not constrained or cut <= SPEC.head_start)
        seen_s = state.hop_backlog_bytes[b, 1] / state.bytes_per_s[b, 1]
        at_seen = next((c for limit, c in rows if seen_s <= limit), cuts[b, 1])
        value = level[b] + slope[b] * seen_s
        assert value[options[b] == at_seen].min() >= value[-1] - 1e-9
    assert moved > 30


def test_a_full_hop_keeps_work_on_the_fog_and_an_empty_one_sends_it_on():
    model = CostModel(toy_profile(3), constant_scenario(late_binding=True))
    state = Simulator(model, 2, 0).reset(0)
    state.hop_backlog_bytes[1, 1], state.node_load[1, 1] = 4e6, 0.85
    tables = LateRule(model).tables(state, np.array([[2, 4], [2, N]]))
    first, second = tables.cut_tables(0), tables.cut_tables(1)
    assert first[0].cut_at(0.0, 4) == 4 and first[0].cut_at(30.0, 4) == N
    assert second[0].cut_at(0.0, N) < N


def test_chains_of_other_lengths_are_refused():
    with pytest.raises(ConfigError, match="3 nodes, this scenario has 4"):
        toy_scenario(4, late_binding=True)
    with pytest.raises(ConfigError, match="3 nodes, this one has 2"):
        LateRule(CostModel(toy_profile(2), toy_scenario(2)))


def test_branches_under_a_known_future_bind_late_too():
    model = CostModel(toy_profile(3), toy_scenario(3, late_binding=True))
    sim, solver = Simulator(model, 3, 2), Solver()
    tape = sim.record(12)
    sim = Simulator(model, 3, 0, conditions=tape.play())
    cost = Cost(model.profile, model.references, model.scenario)
    state, total, played = sim.reset(0), np.zeros(3), []
    solver.reset(model, 3)
    for _ in range(12):
        decision = solver.decide(state)
        played.append(decision)
        result = sim.step(decision.cuts, decision.probe_bytes)
        state, total = result.state, total + cost(result.record, np.ones(3))
    total += cost(sim.drain(), np.ones(3))
    sequence = PlanSequence.of(played)
    found = Branches(model, tape).total(sequence.cuts, 0, sequence.probe_bytes)
    np.testing.assert_allclose(found, total)
    plain = CostModel(toy_profile(3), toy_scenario(3))
    early = Branches(plain, tape).total(sequence.cuts, 0, sequence.probe_bytes)
    assert not np.allclose(early, total)
