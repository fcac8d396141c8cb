"""Trace files, how they are played, generators, and the split into families."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_files import csv, tiny_root

from agents import evaluate
from env._play import CELL_S, Jitter, TracePlayer, _averaged, fit_jitter
from env.conditions import Conditions, mean_delay_s, process_mean
from env.generators import generator, generator_names
from env.predict import CostModel
from env.scenario import SHIPPED, HopSetup, NodeSetup, Process, Scenario
from env.simulator import Simulator
from env.splits import PARTS, split
from env.synthetic import synthetic_profile
from env.traces import MTU_BYTES, Trace, load_trace, load_traces
from executor.errors import ConfigError
from executor.model import model_spec

# Beside a checkout, not in it.
FOLDERS = [p / "shared" / "traces" for p in Path(__file__).resolve().parents]
MEASURED = next((p for p in FOLDERS if p.is_dir()), None)
SCENARIOS = sorted(p.stem for p in SHIPPED.glob("*.toml"))

values_mbps = st.lists(st.floats(0.0, 1e4, allow_subnormal=False), min_size=2, max_size=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


@settings(max_examples=60, deadline=None)
@given(values=values_mbps, dt=st.sampled_from([0.1, 0.5, 1.0, 300.0]), start=st.integers(0, 100))
def test_a_csv_reads_back_as_written(folder, values, dt, start):
    rows = [(start + dt * k, v) for k, v in enumerate(values)]
    trace = load_trace(csv(folder / "src_a.csv", "time_s,mbps", rows), "mbps")
    assert (trace.name, trace.family, trace.native) == ("src_a", "src", False)
    assert trace.dt_s == pytest.approx(dt)
    np.testing.assert_allclose(trace.values, values, rtol=1e-12)
    with pytest.raises(ValueError):
        trace.values[0] = 1.0


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.floats(0.5, 3.0), min_size=3, max_size=40),
    values=st.lists(st.floats(0.0, 100.0), min_size=41, max_size=41),
)
def test_uneven_steps_keep_the_integral(folder, steps, values):
    times = np.concatenate([[0.0], np.cumsum(steps)])
    rows = list(zip(times.tolist(), values, strict=False))
    trace = load_trace(csv(folder / "u.csv", "time_s,mbps", rows), "mbps")
    lengths = np.append(steps, np.median(steps))
    expected = float(np.dot(values[: len(times)], lengths))
    scale = times[-1] + np.median(steps)
    # The grid has whole steps: their length is rounded, the mean is kept.
    assert trace.values.mean() * scale == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_columns_are_chosen_by_name(tmp_path):
    path = csv(tmp_path / "t.csv", "time,mbps,rtt_ms", [(0, 5, 40), (1, 6, 50), (2, 7, 60)])
    assert load_trace(path, "mbps").values.tolist() == [5, 6, 7]
    assert load_trace(path, "rtt_ms").values.tolist() == [40, 50, 60]
    with pytest.raises(ConfigError, match="no column load"):
        load_trace(path, "load")
    with pytest.raises(ConfigError, match="one of"):
        load_trace(path, "volts")


def test_runs_are_joined_and_lost_samples_held(tmp_path):
    rows = [(0, 10, 0), (1, 20, 0), (3, 30, 0), (500, 40, 1), (501, 50, 1)]
    trace = load_trace(csv(tmp_path / "t.csv", "time_s,rtt_ms,run", rows), "rtt_ms")
    np.testing.assert_allclose(trace.values, [10, 20, 20, 30, 40, 50])


@pytest.mark.parametrize(
    ("text", "quantity", "message"),
    [
        ("", "mbps", "is empty"),
        ("time_s,mbps\n0,1\n", "mbps", "two rows"),
        ("time_s,mbps\n0,1\n1,x\n2,3\n", "mbps", "line 3: expected 2 finite numbers"),
        ("time_s,mbps\n0,1\n1,nan\n2,3\n", "mbps", "line 3: expected 2 finite numbers"),
        ("time_s,mbps\n0,1\n1,2,3\n", "mbps", "line 3: expected 2 finite numbers"),
        ("time_s,mbps\n0,1\n1,-2\n", "mbps", "line 3: mbps must be >= 0, got -2"),
        ("time_s,load\n0,1\n1,1.5\n", "load", "line 3: load must lie in 0..1"),
        ("time_s,rtt_ms\n0,1\n1,0\n", "rtt_ms", "line 3: rtt_ms must be positive"),
        ("time_s,mbps\n0,1\n\n1,2\n1,3\n", "mbps", "line 5: time must increase, got 1 after 1"),
        ("time_s,mbps\n0,1\n1,2\n2,2\n30,3\n", "mbps", "line 5: a gap of 28 s"),
        ("volts,mbps\n0,1\n1,2\n", "mbps", "line 1: expected a header"),
        ("0,1\n1,2\n", "mbps", "line 1: expected a header"),
        ("time_s,mbps,watts\n0,1,1\n1,2,1\n", "mbps", "line 1: expected a header"),
        ("5\n7\n6\n", "mbps", "line 3: milliseconds must not decrease, got 6 after 7"),
        ("5\n-7\n", "mbps", "line 2: expected a whole number of milliseconds"),
        ("5\n7.5\n", "mbps", "line 2: expected a whole number"),
        ("0\n0\n", "mbps", "lasts 0 ms"),
        ("5\n7\n", "rtt_ms", "is a mahimahi file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, quantity, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_trace(path, quantity)
    assert str(path) in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read trace"):
        load_trace(tmp_path / "none.csv", "mbps")
    with pytest.raises(ConfigError, match="no trace at"):
        load_traces(str(tmp_path), "mbps")
    with pytest.raises(ConfigError, match="no trace at"):
        load_traces(str(tmp_path / "*.csv"), "mbps")


def test_files_folders_and_patterns(tmp_path):
    for name in ("b_1", "a_1", "a_2"):
        csv(tmp_path / f"{name}.csv", "time_s,mbps", [(0, 1), (1, 2)])
    (tmp_path / "m.down").write_text("3\n9\n")
    (tmp_path / "notes.md").write_text("no trace")
    names = [t.name for t in load_traces(str(tmp_path), "mbps")]
    assert names == ["a_1", "a_2", "b_1", "m.down"]
    both = [str(tmp_path / "a_*.csv"), str(tmp_path / "a_1.csv")]
    assert [t.name for t in load_traces(both, "mbps")] == ["a_1", "a_2"]


def test_a_rewritten_file_is_read_again(tmp_path):
    path = csv(tmp_path / "t.csv", "time_s,mbps", [(0, 1), (1, 2)])
    load_trace(path, "mbps")
    csv(path, "time_s,mbps", [(0, 1), (1, 2), (2, 4)])
    assert load_trace(path, "mbps").values.tolist() == [1, 2, 4]


@settings(max_examples=60, deadline=None)
@given(
    at_ms=st.lists(st.integers(0, 3000), min_size=1, max_size=400).map(sorted),
    offset=st.floats(0.0, 0.999),
    step_ms=st.sampled_from([1, 7, 50, 200]),
)
def test_mahimahi_bytes_are_conserved(folder, at_ms, offset, step_ms):
    if at_ms[-1] == 0:
        at_ms[-1] = 1
    path = folder / "cell.down"
    path.write_text("".join(f"{ms}\n" for ms in at_ms))
    trace = load_trace(path, "mbps")
    assert trace.native and trace.duration_s == pytest.approx(at_ms[-1] / 1e3)
    bytes_ = trace.values * 1e6 / 8 * trace.dt_s
    assert bytes_.sum() == pytest.approx(MTU_BYTES * len(at_ms))
    # By any millisecond, exactly the packets due.
    due = np.searchsorted(at_ms, np.arange(1, at_ms[-1] + 1), side="right")
    np.testing.assert_allclose(np.cumsum(bytes_), MTU_BYTES * due, atol=1e-3)
    # Played from anywhere, step by step and round the end: three laps carry three times the bytes.
    player = TracePlayer((trace,), 1.0, 1.0, True)
    player.reset(np.random.default_rng(0), 1, np.array([offset]))
    step_s, count = step_ms / 1e3, 3 * at_ms[-1]
    means = player.means(0.0, step_s, count)
    assert means.min() >= 0.0
    total = means.sum() * step_s * 1e6 / 8
    assert total == pytest.approx(3 * step_ms * MTU_BYTES * len(at_ms), rel=1e-6)


def series_trace(values, quantity="mbps", dt_s=1.0):
    return Trace("src_t", quantity, dt_s, np.asarray(values, dtype=float))


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(0.0, 500.0, allow_subnormal=False), min_size=12, max_size=60))
def test_jitter_keeps_every_second(values):
    for quantity, unit in (("mbps", 1.0), ("load", 1.0), ("rtt_ms", 1 / 2000.0)):
        trace = series_trace(values, quantity)
        player = TracePlayer((trace,), 2.0, 1.0, True)
        player.reset(np.random.default_rng(1), 1, np.zeros(1))
        fine = player.means(0.0, 0.1, 10 * len(values))[0].reshape(-1, 10)
        np.testing.assert_allclose(
            fine.mean(axis=1), 2.0 * unit * np.array(values), rtol=1e-6, atol=1e-6
        )
        assert (fine >= 0).all() and not fine[np.array(values) == 0].any()


def test_jitter_is_that_of_the_seed_and_can_be_left_out():
    rng = np.random.default_rng(3)
    trace = series_trace(np.exp(0.3 * rng.standard_normal(200)))

    def play(seed, jitter=True):
        player = TracePlayer((trace,), 1.0, 1.0, jitter)
        player.reset(np.random.default_rng(seed), 1, np.zeros(1))
        return player.means(0.0, CELL_S, 4000)[0]

    np.testing.assert_array_equal(play(1), play(1))
    assert not np.allclose(play(1), play(2))
    held = play(1, jitter=False).reshape(200, 20)
    np.testing.assert_allclose(held, np.tile(trace.values[:, None], (1, 20)))
    # Within a second nobody can tell the rest of it from its first tenth.
    fine = play(1).reshape(200, 10, 2).mean(axis=2)
    assert fine.std(axis=1).mean() > 0.1


@pytest.mark.parametrize(("sigma", "rate"), [(0.8, 0.2), (0.5, 1.0)])
def test_the_fit_recovers_a_process_from_its_means(sigma, rate):
    rng, cells, n = np.random.default_rng(0), 50, 6000
    decay = np.exp(-rate / cells)
    noise = sigma * np.sqrt(1 - decay**2) * rng.standard_normal(n * cells)
    x = np.empty(n * cells)
    level = sigma * rng.standard_normal()
    for i, e in enumerate(noise):
        level = decay * level + e
        x[i] = level
    fitted = fit_jitter([np.exp(x.reshape(n, cells).mean(axis=1))])
    assert fitted.rate == pytest.approx(rate, rel=0.25)
    assert fitted.sigma == pytest.approx(sigma, rel=0.15)
    assert _averaged(1e-4, 2) / _averaged(1e-4, 1) == pytest.approx(2.5, rel=1e-2)


def test_nothing_is_fitted_to_too_little():
    assert fit_jitter([np.array([1.0, 2.0, 1.0])]) == Jitter(0.0, 1.0)
    assert fit_jitter([np.zeros(100)]) == Jitter(0.0, 1.0)


def test_units_of_what_is_played(tmp_path):
    rtt = csv(tmp_path / "r.csv", "time_s,rtt_ms", [(k, 80.0) for k in range(20)])
    rate = csv(tmp_path / "a.csv", "time_s,rate_rps", [(k, 0.01 * (k % 2)) for k in range(20)])
    load = csv(tmp_path / "l.csv", "time_s,load", [(300 * k, 0.1 * (k % 3)) for k in range(12)])
    delay = Process("trace", path=str(rtt))
    arrivals = Process("trace", path=str(rate))
    busy = Process("trace", path=str(load), time_scale=150.0, jitter=False)
    scenario = Scenario(
        nodes=(NodeSetup("a", "pi4"), NodeSetup("b", "pi4", load=busy)),
        hops=(HopSetup(Process(levels=(10.0,)), delay),),
        arrivals=arrivals,
        substep_s=0.5,
    )
    assert mean_delay_s(scenario.hops[0]) == pytest.approx(0.04)
    assert process_mean(arrivals, "rate_rps") == pytest.approx(1.0)
    conditions = Conditions(scenario, np.full(400, 5.0), 0)
    drawn = [conditions.next() for _ in range(24)]
    np.testing.assert_allclose(np.stack([d.hop_delay_s for d in drawn]), 0.04)
    assert np.mean([d.arrival_count.mean() for d in drawn]) == pytest.approx(5.0, rel=0.05)
    # 5 minutes in 2 s: the lap of 12 samples takes 24 s, and holds each sample once.
    load_mean = 1.0 - np.mean([d.node_speed[:, 1].mean(axis=1) for d in drawn], axis=0)
    np.testing.assert_allclose(load_mean, 0.1, atol=1e-9)


def test_environments_draw_different_traces_and_places(tmp_path):
    for k in range(5):
        rows = [(t, 10.0 * (k + 1)) for t in range(30)]
        csv(tmp_path / f"s_{k}.csv", "time_s,mbps", rows)
    hop = HopSetup(Process("trace", path=str(tmp_path), jitter=False))
    scenario = Scenario.load().replace(hops=(hop, hop))
    first = Conditions(scenario, np.ones(64), 3).next().hop_bytes_per_s * 8e-6
    again = Conditions(scenario, np.ones(64), 3).next().hop_bytes_per_s * 8e-6
    np.testing.assert_array_equal(first, again)
    assert set(first[:, 0, 0].round().tolist()) == {10.0, 20.0, 30.0, 40.0, 50.0}
    assert not np.array_equal(first[:, 0], first[:, 1])


def test_the_default_scenario_draws_what_it_always_drew():
    """Bit for bit: digests of the conditions before traces and delays moved in."""
    for interval_s, expected in ((1.0, "4646bd005332bd6e"), (0.2, "7f006f6694153b77"),
                                 (2.5, "e24c064897c6cb14")):  # fmt: skip
        scenario = Scenario.load().replace(interval_s=interval_s)
        conditions = Conditions(scenario, np.linspace(1, 9, 7), 1234)
        digest = hashlib.sha256()
        for _ in range(60):
            c = conditions.next()
            for array in (c.hop_bytes_per_s, c.node_speed, c.arrival_env, c.arrival_offset_s,
                          c.arrival_count):  # fmt: skip
                digest.update(np.ascontiguousarray(array).tobytes())
        assert digest.hexdigest()[:16] == expected


def test_a_generator_is_its_parameters_scaled():
    for name in generator_names():
        process = Process("generator", name=name)
        assert process.kind == "markov" and process.levels == tuple(generator(name)["levels"])
    one, ten = (Process("generator", name="hsdpa-dl", scale=s) for s in (1.0, 10.0))
    assert process_mean(ten) == pytest.approx(10.0 * process_mean(one))
    assert (ten.maximum, ten.sigma) == (10.0 * one.maximum, one.sigma)
    with pytest.raises(ConfigError, match="no generator 'x'; there are hsdpa-dl"):
        Process("generator", name="x")


@pytest.mark.parametrize("name", [None, "lte"])
def test_a_process_can_be_made_slower_or_faster(name):
    for hop, factor in zip(Scenario.load(name).hops, (0.5, 2.0), strict=True):
        scaled = hop.bandwidth.scaled(factor)
        assert process_mean(scaled) == pytest.approx(factor * process_mean(hop.bandwidth))
        assert scaled.maximum == pytest.approx(factor * hop.bandwidth.maximum)


@pytest.mark.parametrize("name", SCENARIOS)
def test_shipped_scenarios_run(name):
    scenario = Scenario.load(name)
    model = CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)
    sim = Simulator(model, 32, 0)
    arrived = 0
    for _ in range(20):
        plan = model.predict(sim.step(model.table.cuts[:1].repeat(32, 0)).state).cost.argmin(axis=1)
        result = sim.step(model.table.cuts[plan])
        arrived += result.record.arrived.sum()
        assert np.isfinite(result.state.rtt_s).all()
        delayed = [hop.delay is not None or hop.one_way_delay_s > 0 for hop in scenario.hops]
        assert (result.state.rtt_s[:, delayed] > 0).all() and (result.state.rtt_s >= 0).all()
    assert arrived > 100


@pytest.mark.parametrize(
    ("delay", "message"),
    [("-1.0", "0..5 s"), ("9.0", "0..5 s"), ('"x"', "expected float"),
     ('{ kind = "trace" }', "needs `path`")],
)  # fmt: skip
def test_a_wrong_delay_is_named(tmp_path, delay, message):
    text = (SHIPPED / "default.toml").read_text()
    path = tmp_path / "s.toml"
    path.write_text(text.replace("one_way_delay_s = 0.010", f"one_way_delay_s = {delay}"))
    with pytest.raises(ConfigError, match=message):
        Scenario.load(path)


def sources(conditions):
    """Every file that a part's conditions play, by what it is played as."""
    files = {"bandwidth": set(), "rtt": set(), "load": set(), "arrivals": set()}
    for c in conditions:
        s = c.scenario
        for hop in s.hops:
            files["bandwidth"] |= set(hop.bandwidth.path)
            files["rtt"] |= set(hop.delay.path) if hop.delay else set()
        for node in s.nodes:
            files["load"] |= set(node.load.path)
        files["arrivals"] |= set(s.arrivals.path)
    return files


def check_split(parts):
    train, validation, test = (sources(parts.part(name)) for name in PARTS)
    for quantity in ("bandwidth", "rtt"):
        assert train[quantity] and validation[quantity] and test[quantity]
        assert not train[quantity] & validation[quantity]
    for quantity in train:
        assert not test[quantity] & (train[quantity] | validation[quantity])

    def families(part):
        return {Path(f).stem.split("_")[0] for f in sources(part)["bandwidth"]}

    assert len(families(parts.test)) >= 3
    assert not families(parts.test) & (families(parts.train) | families(parts.validation))
    assert not families(parts.validation) & families(parts.train)
    assert families(parts.test) == {c.family for c in parts.test}


def test_no_source_is_in_two_parts(tmp_path):
    parts = split(tiny_root(tmp_path))
    check_split(parts)
    uplink, downlink = parts.train[0].scenario.hops
    assert [Path(p).stem for p in uplink.bandwidth.path] == ["pam25drive_a-UL-1"]
    assert [Path(p).stem for p in downlink.bandwidth.path] == ["pam25drive_a-DL-1"]
    assert uplink.delay is None and downlink.delay is not None
    condition = parts.test[0]
    model = CostModel(
        synthetic_profile(model_spec("alexnet"), condition.scenario), condition.scenario
    )
    state = Simulator(model, 4, 0).step(model.table.cuts[:1].repeat(4, 0)).state
    assert np.isfinite(state.bytes_per_s).all()
    with pytest.raises(ConfigError, match="train, validation, test"):
        parts.part("everything")
    with pytest.raises(ConfigError, match="no traces"):
        split(tmp_path / "rtt")


def test_evaluate_on_measured_traces(tmp_path, capsys):
    root, out = tmp_path / "traces", tmp_path / "out.json"
    root.mkdir()
    tiny_root(root)
    argv = ["--model", "alexnet", "--traces", str(root)]
    argv += ["--split", "validation", "--arms", "solver", "--seeds", "2", "--intervals", "4"]
    argv += ["--startup-s", "1", "--rates", "0.4,0.8", "--json", str(out)]
    assert evaluate.main(argv) == 0
    result = json.loads(out.read_text())
    assert result["split"] == "validation" and set(result["by_family"]) == {"saturatr"}
    names = [
        "saturatr-azurellm23",
        "saturatr-steady",
        "saturatr-x4-azurellm23",
        "saturatr-x4-steady",
    ]
    assert list(result["by_condition"]) == names
    for condition in result["by_condition"].values():
        assert condition["family"] == "saturatr" and set(condition["by_rate"]) == {"0.4", "0.8"}
        assert set(condition["arms"]) == {"static", "solver"}
    submitted = [c["arms"]["solver"]["requests"]["submitted"] for c in
                 result["by_condition"].values()]  # fmt: skip
    assert result["arms"]["solver"]["requests"]["submitted"] == sum(submitted)
    assert evaluate.main([*argv, "--conditions", "saturatr-x4-steady"]) == 0
    alone = json.loads(out.read_text())["by_condition"]
    assert list(alone) == ["saturatr-x4-steady"]
    before, after = (x["saturatr-x4-steady"]["by_rate"] for x in (result["by_condition"], alone))
    assert all(before[rate]["cost_rows"] == after[rate]["cost_rows"] for rate in ("0.4", "0.8"))
    capsys.readouterr()
    assert evaluate.main([*argv, "--conditions", "saturatr-steady,lunar"]) == 2
    assert "unknown conditions 'lunar'; expected some of saturatr" in capsys.readouterr().err


@pytest.mark.skipif(MEASURED is None, reason="the measured traces are not part of the product")
def test_the_measured_traces_split_and_read():
    parts = split(MEASURED)
    check_split(parts)
    for condition in (*parts.train, *parts.validation, *parts.test):
        for hop in condition.scenario.hops:
            assert process_mean(hop.bandwidth) > 0
        assert 0.01 < mean_delay_s(condition.scenario.hops[-1]) < 0.1
