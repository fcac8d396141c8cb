"""The live system's accounting and state, with a stand-in for the client (no sockets).

The real client and nodes are exercised in test_commands.py.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
from stable_baselines3.common.env_checker import check_env

from agents.nodes import random_inputs
from env.closed import ClosedLoop
from env.conditions import BYTES_PER_S_PER_MBPS, Conditions
from env.live import LiveSystem
from env.predict import CostModel
from env.scenario import Process, Scenario
from env.simulator import Simulator
from env.state import Encoder, SystemState, idle_probes
from env.synthetic import synthetic_profile
from env.system import System
from executor.client import NodeStatus, Reply, RequestRecord
from executor.errors import RequestRefused, RequestTimeout
from executor.model import model_spec
from executor.plan import Plan
from executor.testbed import Testbed


class StandInClient:
    """Answers every request at once, as if it had taken 0.1 s on the last node."""

    def __init__(self) -> None:
        self.fail: Exception | None = None
        self.probe_fails: Exception | None = None
        self.refuse = False
        self.probes: list[tuple[int, int]] = []
        self.plans: list[Plan] = []
        self.statuses: dict[int, NodeStatus] = {}
        self.in_flight = 0

    def submit(
        self,
        x: Any,
        plan: Plan,
        scheduled_s: float | None = None,
        *,
        timeout_s: float | None = None,
        late: Any = (),
    ) -> Future[Any]:
        self.late, self.timeout_s = late, timeout_s
        if self.refuse:
            raise RequestRefused("full")
        self.plans.append(plan)
        future: Future[Any] = Future()
        if self.fail is not None:
            future.set_exception(self.fail)
            return future
        assert scheduled_s is not None
        record = RequestRecord(
            request_id=len(self.plans), plan=plan.cuts, scheduled_s=scheduled_s,
            submitted_s=scheduled_s, completed_s=scheduled_s + 0.01,
            stage_s=(0.0, 0.0, 0.008), work_s=(0.0, 0.0, 0.004), queue_s=(0.0, 0.0, 0.0),
            hop_s=(0.001, 0.001), transmit_s=(0.0005, 0.0005),
        )  # fmt: skip
        future.set_result(Reply(np.zeros(1), record))
        return future

    def be_patient(self, patience_s) -> None:
        self.patience_s = patience_s

    def status(self) -> dict[int, NodeStatus]:
        return self.statuses

    def probe(self, hop: int, payload_bytes: int, repeats: int = 3) -> list[float]:
        self.probes.append((hop, payload_bytes))
        if self.probe_fails is not None:
            raise self.probe_fails
        return [0.01] * repeats


@pytest.fixture
def model() -> CostModel:
    scenario = Scenario.load().replace(interval_s=0.05, episode_s=0.5, rate_rps=200.0)
    return CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)


def test_records_what_was_spent(model: CostModel) -> None:
    client = StandInClient()
    live = LiveSystem(model, client, lambda i: i)
    assert isinstance(live, System)
    try:
        live.reset(1)
        cuts = np.array([[3, 8]])
        results = [live.step(cuts, np.array([[65536.0, 0.0]])) for _ in range(4)]
        results.append(live.drain_completed())
    finally:
        live.close()
    arrived = sum(int(r.record.arrived[0]) for r in results)
    completed = sum(int(r.record.completed[0]) for r in results)
    assert arrived == completed == len(client.plans) > 10
    assert set(client.plans) == {Plan((3, 8))}
    assert sum(r.record.outstanding_s[0] for r in results) == pytest.approx(0.01 * completed)
    assert sum(r.record.latency_sum_s[0] for r in results) == pytest.approx(0.01 * completed)
    active = sum(r.record.node_active_s[0] for r in results)
    assert active == pytest.approx([0.0, 0.0, 0.004 * completed])
    rows = np.concatenate([r.completed.cuts for r in results if r.completed is not None])
    assert rows.shape == (completed, 2)


def test_how_slow_the_nodes_were_is_held_against_the_profile(model: CostModel) -> None:
    """The stand-in takes 4 ms on the cloud whatever it is asked, and nothing elsewhere."""
    asked = [(3, 8), (0, 0), (8, 8)]
    cloud_s = [sum(model.profile.nodes[2].unit_s[j:]) for _, j in asked]
    cloud_s = [s + model.profile.nodes[2].stage_overhead_s for s in cloud_s]
    client = StandInClient()
    live = LiveSystem(model, client, lambda i: i)
    try:
        live.reset(1)
        assert live.slowness().tolist() == [1.0, 1.0, 1.0]
        for cuts in asked:
            live.step(np.array([cuts]))
        live.drain()
        found = live.slowness()
        profiled_s = sum(cloud_s[asked.index(plan.cuts)] for plan in client.plans)
        assert len(set(client.plans)) == 3
        assert found == pytest.approx([1.0, 1.0, 0.004 * len(client.plans) / profiled_s])
        live.reset(1)
        assert live.slowness().tolist() == [1.0, 1.0, 1.0]
    finally:
        live.close()


@pytest.mark.parametrize(
    ("failure", "charged"), [(None, True), (RequestTimeout("silent"), True),
                             (RequestRefused("full"), False)],
)  # fmt: skip
def test_probes_are_charged_as_transmission(
    model: CostModel, failure: Exception | None, charged: bool
) -> None:
    """What a probe sent counts, answered or not; on a hop that frames measure none is due."""
    client = StandInClient()
    fresh = {"hop_bytes_per_s": 5e6, "hop_age_s": 0.0, "received_s": time.monotonic() + 60.0}
    stale = {**fresh, "received_s": time.monotonic() - 60.0}
    client.statuses = {k: NodeStatus(node=k, down=False, **s) for k, s in enumerate((fresh, stale))}
    live = LiveSystem(model, client, lambda i: i)
    n = model.profile.spec.n_units
    try:
        probes = idle_probes(live.reset(1), model.scenario)
        client.probe_fails = failure
        assert probes.tolist() == [[0.0, model.scenario.probing.payload_bytes]]
        record = live.step(np.array([[n, n]]), probes).record
        record.add(live.step(np.array([[n, n]])).record)
        record.add(live.drain())
    finally:
        live.close()
    frames = 0.0005 * record.completed[0]
    sent = record.hop_transmit_s[0] - frames
    expected = probes[0, 1] / 5e6 if charged else 0.0
    assert sent == pytest.approx([0.0, expected], abs=1e-9)


def test_a_plan_for_each_request_and_its_cut_table(model: CostModel) -> None:
    late = CostModel(model.profile, model.scenario.replace(late_binding=True))
    client = StandInClient()
    live = LiveSystem(late, client, lambda i: i)
    asked: list[SystemState] = []

    def glance(state: SystemState) -> np.ndarray:
        asked.append(state)
        return np.array([[3, 8 if len(asked) % 2 else 14]])

    try:
        live.reset(1)
        live.step(np.array([[3, 10]]))
        (table,) = client.late
        assert table.node == 1 and table.rows[0] == (table.rows[0][0], 10)
        n_units = late.profile.spec.n_units
        assert set(client.plans) == {Plan((3, 10))} and table.rows[-1] == (np.inf, n_units)
        client.plans.clear()
        live.glance = glance
        live.step(np.array([[3, 10]]))
        assert live.step(np.array([[n_units, n_units]])).state.cuts[0, 0] == 3
    finally:
        live.close()
    assert len(client.plans) == len(asked) > 5
    assert client.plans[:4] == [Plan((3, 8)), Plan((3, 14))] * 2
    assert tuple(asked[1].cuts[0]) == (3, 8)


def test_requests_get_the_time_that_the_system_is_told(model: CostModel) -> None:
    client = StandInClient()
    live = LiveSystem(model, client, lambda i: i)
    try:
        live.reset(1)
        live.step(np.array([[3, 8]]))
        assert client.timeout_s is None  # the client's own
        live.timeout_s = 5.0
        live.step(np.array([[3, 8]]))
    finally:
        live.close()
    assert client.timeout_s == 5.0


def test_refused_and_failed_requests_are_lost(model: CostModel) -> None:
    client = StandInClient()
    live = LiveSystem(model, client, lambda i: i)
    try:
        live.reset(1)
        client.refuse = True
        refused = live.step(np.array([[0, 0]])).record
        client.refuse, client.fail = False, RequestTimeout("no answer")
        failed = live.step(np.array([[0, 0]])).record
    finally:
        live.close()
    for record in (refused, failed):
        assert record.lost[0] == record.arrived[0] > 0 and record.completed[0] == 0


def test_what_a_run_out_does_not_finish_in_time_is_lost(
    model: CostModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second answer comes a second late; this run-out has 20 ms, as all have 20 deadlines."""
    monkeypatch.setattr("env.live.DRAIN_DEADLINES", 0.02 / model.references.deadline_s)
    open_: list[tuple[Future[Any], Reply]] = []

    class SlowClient(StandInClient):
        def submit(self, x: Any, plan: Plan, *args: Any, **kwargs: Any) -> Future[Any]:
            reply: Reply = super().submit(x, plan, *args, **kwargs).result()
            late_s = float(len(self.plans) % 2)
            record = replace(reply.record, completed_s=reply.record.completed_s + late_s)
            open_.append((Future(), replace(reply, record=record)))
            return open_[-1][0]

    def answer() -> None:
        for future, reply in open_:
            future.set_result(reply)

    live = LiveSystem(model, SlowClient(), lambda i: i)
    timer = threading.Timer(0.05, answer)
    try:
        live.reset(1)
        assert live.step(np.array([[3, 8]])).record.completed[0] == 0
        timer.start()
        record = live.drain()
        timer.join()
    finally:
        timer.cancel()
        live.close()
    assert record.lost[0] == -(-len(open_) // 2) > 2
    assert record.completed[0] == len(open_) // 2
    # Lost ones are charged until they are given up, and not for longer.
    assert record.union_s[0] == pytest.approx(0.02)


def test_in_a_closed_loop_a_request_waits_for_the_probes_and_the_next_for_its_answer(
    model: CostModel,
) -> None:
    events: list[str] = []

    class SlowClient(StandInClient):
        def submit(self, x: Any, plan: Plan, *args: Any, **kwargs: Any) -> Future[Any]:
            events.append("submit")
            answer = super().submit(x, plan, *args, **kwargs)
            late: Future[Any] = Future()

            def reply() -> None:
                events.append("reply")
                late.set_result(answer.result())

            threading.Timer(0.02, reply).start()
            return late

        def probe(self, hop: int, payload_bytes: int, repeats: int = 3) -> list[float]:
            time.sleep(0.02)
            events.append("probe")
            return super().probe(hop, payload_bytes, repeats)

    client = SlowClient()
    loop = ClosedLoop(model, client, lambda i: i)
    try:
        state = loop.reset(1)
        events.clear()
        steps = [loop.step(np.array([[3, 8]]), np.array([[1024.0, 0.0]])) for _ in range(3)]
        assert events == ["probe", "submit", "reply"] * 3
        client.refuse = True
        lost = loop.step(np.array([[3, 8]])).record
    finally:
        loop.close()
    assert (lost.arrived[0], lost.lost[0], lost.completed[0]) == (1, 1, 0)
    for step in steps:
        record = step.record
        assert record.arrived[0] == record.completed[0] == 1 and record.lost[0] == 0
        # The stand-in's 10 ms, and none of the probe's 20.
        assert record.latency_sum_s[0] == pytest.approx(0.01)
        assert record.union_s[0] == pytest.approx(0.01)
        assert step.state.arrival_rps == state.arrival_rps == model.rate_rps()
        assert step.state.in_flight[0] == 0.0


def test_conditions_are_those_of_the_simulator(model: CostModel) -> None:
    played: dict[tuple[str, int], list[float]] = {}
    began: list[tuple[int, float, int]] = []

    class Recorder:
        def play_rate(self, hop: int, t0_s: float, dt_s: float, mbps: Any) -> None:
            assert dt_s == 0.05
            began.append((len(mbps), t0_s - time.monotonic(), len(client.probes)))
            played["hop", hop] = list(mbps)

        def play_load(self, node: int, t0_s: float, dt_s: float, values: Any) -> None:
            played["node", node] = list(values)

    client = StandInClient()
    live = LiveSystem(model, client, lambda i: i, Recorder())
    simulator = Simulator(model, 1, 3, rate_rps=200.0)
    try:
        live.reset(3)
        simulator.reset(3)
        cuts = np.array([[0, 0]])
        arrived = [(int(live.step(cuts).record.arrived[0]),
                    int(simulator.step(cuts).record.arrived[0])) for _ in range(5)]  # fmt: skip
        whole = dict(played)
        live.drain()
    finally:
        live.close()
    assert all(a == b for a, b in arrived) and sum(a for a, _ in arrived) > 10
    assert len(whole) == 5 and all(len(v) >= 10 for v in whole.values())
    # What is open at the end is run out on both under what conditions lately were.
    simulator.reset(3)
    lately = None
    for interval in simulator.record(5).intervals:
        lately = interval.smoothed(lately, model.scenario.interval_s)
    for hop in range(2):
        rate = lately.hop_bytes_per_s[0, hop, 0] / BYTES_PER_S_PER_MBPS
        assert played["hop", hop] == pytest.approx([rate])
    for node in range(3):
        assert played["node", node] == pytest.approx([1.0 - lately.node_speed[0, node, 0]])
    # Held as they begin until the hops were probed, then played from a moment to come.
    (*_, held), (_, ahead_s, probed) = began[1], began[2]
    assert [n for n, *_ in began[:2]] == [1, 1] and held == 0 and probed == 2 and ahead_s > 0


def test_every_hop_is_probed_before_the_first_decision(model: CostModel) -> None:
    client = StandInClient()
    client.probe_fails = RequestTimeout("silent")
    live = LiveSystem(model, client, lambda i: i)
    try:
        first = live.reset(1)  # an unanswered probe does not stop it
        assert sorted(client.probes) == [(0, 65536), (1, 65536)]
        # What was measured before says nothing: hops are as slow as not to have answered in time.
        slowest = 65536 / live.scenario.probing.idle_s
        client.statuses = {h: NodeStatus(h, hop_bytes_per_s=1e6, hop_age_s=60.0) for h in range(2)}
        for state in (first, live.step(np.array([[0, 0]])).state):
            assert state.bytes_per_s.tolist() == [[slowest, slowest]]
            assert state.bandwidth_age_s.max() < 0.5 * live.scenario.probing.idle_s
        now = time.monotonic()
        client.statuses[1] = NodeStatus(1, hop_bytes_per_s=1e6, hop_age_s=0.0, received_s=now)
        step = live.step(np.array([[0, 0]]))
        assert step.state.bytes_per_s.tolist() == [[slowest, 1e6]]
    finally:
        live.close()
    assert step.record.hop_transmit_s.sum() == pytest.approx(0.001 * step.record.completed[0])


def test_an_outage_is_told_once(model: CostModel, caplog: pytest.LogCaptureFixture) -> None:
    client = StandInClient()
    live = LiveSystem(model, client, lambda i: i)
    cuts, probe = np.array([[0, 0]]), np.array([[0.0, 65536.0]])

    def told(failure: Exception | None) -> int:
        caplog.clear()
        client.probe_fails = failure
        live.step(cuts, probe)
        live.step(cuts)  # by now the probe's end was collected
        return sum("probe of hop 1 failed" in r.message for r in caplog.records)

    try:
        live.reset(1)
        down = RequestTimeout("silent")
        assert [told(x) for x in (down, down, None, down)] == [1, 0, 0, 1]
    finally:
        live.close()


def test_a_delay_that_varies_is_played_and_a_constant_one_is_not(model: CostModel) -> None:
    played: dict[int, list[float]] = {}

    class Recorder:
        def play_rate(self, *_: Any) -> None: ...
        def play_load(self, *_: Any) -> None: ...

        def play_delay(self, hop: int, t0_s: float, dt_s: float, delay_s: Any) -> None:
            assert dt_s == 0.05
            played[hop] = list(delay_s)

    delay = Process("markov", (0.01, 0.05), dwell_s=0.2)
    first, second = model.scenario.hops
    hops = (first, replace(second, one_way_delay_s=delay))
    varying = CostModel(model.profile, model.scenario.replace(hops=hops))
    live = LiveSystem(varying, StandInClient(), lambda i: i, Recorder())
    try:
        live.reset(5)
    finally:
        live.close()
    conditions = Conditions(varying.scenario, np.array([200.0]), 5)
    drawn = [float(conditions.next().hop_delay_s[0, 1, 0]) for _ in range(10)]
    assert list(played) == [1] and played[1][:10] == drawn and len(set(drawn)) == 2


def test_one_encoder_for_simulator_and_nodes(model: CostModel) -> None:
    """A live status that says what the simulator's state says is encoded the same."""
    simulator = Simulator(model, 1, 0, rate_rps=200.0)
    simulator.reset(0)
    cuts = np.array([[3, 8]])
    state: SystemState = simulator.step(cuts, np.full((1, 2), 65536.0)).state
    client = StandInClient()
    live = LiveSystem(model, client, lambda i: i)
    try:
        live.reset(0)
        live.step(cuts)
        now = time.monotonic()
        for k in range(3):
            hop = {} if k == 2 else {
                "hop_bytes_per_s": float(state.bytes_per_s[0, k]),
                "hop_age_s": float(state.bandwidth_age_s[0, k]),
                "hop_rtt_s": float(state.rtt_s[0, k]),
                "hop_backlog_bytes": int(state.hop_backlog_bytes[0, k]),
            }  # fmt: skip
            client.statuses[k] = NodeStatus(
                node=k, received_s=now, down=False, load=float(state.node_load[0, k]),
                backlog_s=float(state.node_backlog_s[0, k]), **hop,
            )  # fmt: skip
        seen = live._state()
    finally:
        live.close()
    # What the client itself counts is not part of a node's status.
    seen.arrival_rps, seen.in_flight = state.arrival_rps, state.in_flight
    seen.latency_ratio = state.latency_ratio
    encoder = Encoder(model)
    assert encoder.encode_state(seen) == pytest.approx(encoder.encode_state(state), abs=2e-3)


def test_sb3_accepts_the_environment_over_real_nodes(model: CostModel) -> None:
    """Three real processes behind shaped hops, stepped in real time."""
    scenario = Scenario.load().replace(interval_s=0.2, episode_s=1.0, rate_rps=5.0)
    with Testbed("alexnet") as testbed, testbed.client() as client:
        real = CostModel(model.profile, scenario)
        live = LiveSystem(real, client, random_inputs(), testbed)
        try:
            game = gymnasium.make("Offloading-v0", system=live, disable_env_checker=True)
            check_env(game.unwrapped)
            game.reset(seed=1)
            ends = [game.step(0)[2:4] for _ in range(5)]
            assert ends == [(False, False)] * 4 + [(False, True)]
        finally:
            live.close()
