import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor._compute import WorkEstimate
from executor._load import HostLoad
from executor.errors import ConfigError, StageAbandoned
from executor.pacing import MAX_LOAD, LoadTrace, Pacer, StepTrace

VALUES = st.lists(st.one_of(st.just(0.0), st.floats(0.001, 1e8)), min_size=1, max_size=20)
TIMES = st.floats(-50.0, 50.0)
STEPS = st.floats(0.01, 10.0)


def riemann(trace, start_s, stop_s, n=20_000):
    """The integral by brute force."""
    width = (stop_s - start_s) / n
    return sum(trace.value_at(start_s + (k + 0.5) * width) for k in range(n)) * width


@settings(deadline=None)
@given(t0=TIMES, dt=STEPS, values=VALUES, start=TIMES, share=st.floats(0.0, 3.0))
def test_finish_time_inverts_the_integral(t0, dt, values, start, share):
    trace = StepTrace(t0, dt, values)
    amount = share * max(values) * dt
    finish = trace.finish_time(start, amount)
    assert finish >= start
    if finish == math.inf:
        assert values[-1] == 0
        later = t0 + len(values) * dt + abs(start) + 1
        assert trace.integral(start, later) <= amount * (1 + 1e-9)
        return
    assert trace.integral(start, finish) == pytest.approx(amount, rel=1e-6, abs=1e-5 * max(values))
    if amount > 0:  # and it is the first such time
        just_before = finish - 1e-3 * dt
        if just_before > start:
            assert trace.integral(start, just_before) < amount * (1 + 1e-9) + 1e-9


@settings(deadline=None)
@given(
    t0=TIMES, dt=STEPS, values=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=20),
    start=TIMES, first=st.floats(0.0, 20.0), second=st.floats(0.0, 20.0),
)  # fmt: skip
def test_work_in_two_parts_ends_when_the_whole_does(t0, dt, values, start, first, second):
    trace = StepTrace(t0, dt, values)
    halfway = trace.finish_time(start, first)
    assert trace.finish_time(halfway, second) == pytest.approx(
        trace.finish_time(start, first + second), abs=1e-6
    )


@settings(deadline=None)
@given(t0=TIMES, dt=STEPS, values=VALUES, a=TIMES, b=TIMES, c=TIMES)
def test_integral_adds_up_and_is_signed(t0, dt, values, a, b, c):
    trace = StepTrace(t0, dt, values)
    scale = max(values) * 100 + 1
    assert trace.integral(a, b) + trace.integral(b, c) == pytest.approx(
        trace.integral(a, c), rel=1e-9, abs=1e-9 * scale
    )
    assert trace.integral(a, b) == pytest.approx(-trace.integral(b, a), abs=1e-9 * scale)


def test_integral_against_brute_force():
    trace = StepTrace(10.0, 0.5, [4.0, 0.0, 1.0, 7.0])
    for start, stop in ((9.0, 10.2), (10.1, 11.6), (11.2, 15.0), (8.0, 20.0)):
        assert trace.integral(start, stop) == pytest.approx(riemann(trace, start, stop), rel=1e-3)


def test_values_by_hand():
    trace = StepTrace(10.0, 1.0, [2.0, 0.0, 4.0])
    assert [trace.value_at(t) for t in (5.0, 10.0, 10.99, 11.0, 12.0, 99.0)] == [2, 2, 2, 0, 4, 4]
    # 1 left of the first step gives 2, the second stalls, the third needs half a second for 2.
    assert trace.finish_time(10.0, 4.0) == pytest.approx(12.5)
    assert trace.finish_time(11.5, 4.0) == pytest.approx(13.0)
    assert trace.finish_time(9.0, 4.0) == pytest.approx(11.0)
    assert trace.finish_time(10.3, 0.0) == 10.3
    assert StepTrace(0.0, 1.0, [5.0, 0.0]).finish_time(0.0, 5.1) == math.inf


@pytest.mark.parametrize(
    ("t0", "dt", "values", "word"),
    [
        (0.0, 1.0, [], "at least one"),
        (0.0, 0.0, [1.0], "step must be positive"),
        (0.0, math.nan, [1.0], "step must be positive"),
        (math.inf, 1.0, [1.0], "start"),
        (0.0, 1.0, [1.0, -2.0], "sample 1 .* -2.0"),
        (0.0, 1.0, [math.nan], "sample 0"),
    ],
)
def test_a_bad_trace_is_refused(t0, dt, values, word):
    with pytest.raises(ConfigError, match=word):
        StepTrace(t0, dt, values)


def test_load_is_clipped_and_slows_work():
    load = LoadTrace.from_samples(100.0, 1.0, [0.0, 0.5, 7.0, -1.0])
    assert load.value_at(101.5) == pytest.approx(0.5)
    assert load.value_at(102.5) == pytest.approx(MAX_LOAD)
    assert load.value_at(500.0) == 0.0
    assert load.finish_time(100.0, 1.5) == pytest.approx(102.0)
    assert load.work_s(101.0, 103.0) == pytest.approx(0.6)
    assert LoadTrace.constant(0.8).finish_time(3.0, 1.0) == pytest.approx(8.0)
    with pytest.raises(ConfigError, match="finite"):
        LoadTrace.constant(math.nan)


class VirtualTime:
    """A clock that only sleeping and computing move."""

    def __init__(self, cpu_share=1.0):
        self.now_s = 50.0
        self.cpu_s = 7.0
        self.cpu_share = cpu_share

    def compute(self, wall_s):
        self.now_s += wall_s
        self.cpu_s += wall_s * self.cpu_share

    def sleep(self, duration_s):
        assert duration_s > 0
        self.now_s += duration_s

    def pacer(self, ratio):
        return Pacer(
            ratio, clock=lambda: self.now_s, cpu_clock=lambda: self.cpu_s, sleep=self.sleep
        )


def test_a_stage_lasts_ratio_times_its_cpu_time():
    world = VirtualTime(cpu_share=0.25)  # preempted three quarters of the time
    pacer = world.pacer(12.0)

    def stage():
        world.compute(0.4)
        return "out"

    assert pacer.run(stage) == ("out", pytest.approx(1.2))
    assert world.now_s == pytest.approx(51.2)
    assert (pacer.stages, pacer.overruns) == (1, 0)


def test_load_stretches_a_stage_but_not_its_work():
    world = VirtualTime()
    pacer = world.pacer(4.0)
    pacer.load = LoadTrace.from_samples(51.0, 1.0, [0.5])
    _, work_s = pacer.run(lambda: world.compute(0.5))
    assert work_s == pytest.approx(2.0)
    assert world.now_s == pytest.approx(54.0)  # the first sample holds before the trace's start
    pacer.load = LoadTrace.from_samples(55.0, 1.0, [0.0, 0.9])
    pacer.run(lambda: world.compute(0.5))
    assert world.now_s == pytest.approx(54.0 + 2.0)  # ends before the load comes
    pacer.run(lambda: world.compute(0.5))
    assert world.now_s == pytest.approx(56.0 + 20.0)


def test_a_stage_that_nobody_wants_any_more_is_not_slept_out():
    world = VirtualTime()
    pacer = world.pacer(4.0)
    assert pacer.run(lambda: world.compute(0.5), lambda: True) == (None, pytest.approx(2.0))
    assert world.now_s == pytest.approx(52.0)
    with pytest.raises(StageAbandoned):
        pacer.run(lambda: world.compute(0.5), lambda: world.now_s < 53.0)
    assert world.now_s == pytest.approx(53.0, abs=0.02)


def test_overruns_are_counted_beyond_the_slack():
    world = VirtualTime(cpu_share=0.5)
    pacer = world.pacer(2.0)
    pacer.run(lambda: world.compute(0.1))  # exactly on time
    assert pacer.overruns == 0
    world.cpu_share = 0.499  # 0.2 ms late: within 1 ms
    pacer.run(lambda: world.compute(0.1))
    assert pacer.overruns == 0
    world.cpu_share = 0.4  # 20 ms late of 80
    _, work_s = pacer.run(lambda: world.compute(0.1))
    assert work_s == pytest.approx(0.08)
    assert (pacer.stages, pacer.overruns) == (3, 1)


def test_unpaced_reports_wall_time_and_ignores_load():
    world = VirtualTime(cpu_share=0.5)
    pacer = world.pacer(None)
    pacer.load = LoadTrace.constant(0.9)
    _, work_s = pacer.run(lambda: world.compute(0.3))
    assert work_s == pytest.approx(0.3)
    assert world.now_s == pytest.approx(50.3)


def test_an_error_passes_through_unpaced():
    world = VirtualTime()
    pacer = world.pacer(10.0)
    with pytest.raises(ZeroDivisionError):
        pacer.run(lambda: 1 / 0)
    assert pacer.stages == 0


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_ratio_is_refused(ratio):
    with pytest.raises(ConfigError, match="ratio must be positive"):
        Pacer(ratio)


def test_real_clocks_pace_a_real_stage():
    pacer = Pacer(3.0)
    total, work_s = pacer.run(lambda: sum(range(100_000)))
    assert total == 4_999_950_000
    assert work_s > 0


def test_work_is_estimated_from_stages_until_there_is_a_profile():
    estimate = WorkEstimate(4)
    assert estimate.stage_s(0, 4) == 0.0
    estimate.learn_stage(0, 2, 0.4)
    assert estimate.stage_s(0, 2) == pytest.approx(0.4)
    assert estimate.stage_s(1, 4) == pytest.approx(0.6)
    estimate.learn_profile((0.1, 0.2, 0.3, 0.4))
    estimate.learn_stage(0, 2, 9.0)
    assert estimate.stage_s(1, 4) == pytest.approx(0.9)


def test_host_load_is_what_others_use(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    monkeypatch.setattr("executor._load.os.cpu_count", lambda: 2)
    monkeypatch.setattr("executor._load.os.sysconf", lambda name: 100)
    monkeypatch.setattr("executor._load.time.monotonic", lambda: 0.0)
    monkeypatch.setattr("executor._load.time.process_time", lambda: 1.0)
    stat.write_text("cpu  100 0 0 500 0 0 0 0 0 0\ncpu0 1\n")
    load = HostLoad(stat)
    stat.write_text("cpu  150 20 30 600 0 0 0 0 0 0\n")
    assert load.read(0.5) == 0.0
    assert load.read(1.0) == pytest.approx(0.5)
    assert HostLoad(tmp_path / "absent").read(5.0) == 0.0
