"""fp16 and int8 between real nodes, and what profile, solver and simulator make of them."""

import json
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from local_nodes import local_nodes, one_thread
from toy_chain import SPEC, constant_scenario, random_cuts, toy_profile, toy_scenario

from agents import deploy, evaluate
from agents.arms.paper import PaperSettings, SplitModel
from agents.cli import run_command
from agents.nodes import fit_calibration
from env._chain import Chain
from env._late import CLOUD, FOG, HOP, LateBinding
from env._stations import RequestStore
from env.late import LateRule
from env.predict import CostModel, PlanTable
from env.simulator import Simulator
from executor import transfer
from executor._records import RequestRecord
from executor.client import Client
from executor.cluster import Cluster, NodeConfig
from executor.codec import Affine, as_float32, encode
from executor.errors import ConfigError, HandshakeError, ProfileError, RequestError
from executor.model import build_chain, sample_input
from executor.plan import Plan
from executor.ports import reserve_port
from executor.profile import Conversion, Profile

__all__ = ["one_thread"]  # a fixture that holds here

NET = """
import torch
from torch import nn

INPUT_SHAPE = (1, 3, 32, 32)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten(1))
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x):
        return self.head(self.pool(self.second(self.first(x))))


def build():
    return Net()
"""
NAMES = ("edge", "fog", "cloud")
FLOAT, HALF, BYTE = "float32", "fp16", "int8"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.py"
    path.write_text(NET)
    return f"{path}:build"


@pytest.fixture(scope="module")
def chain(model):
    return build_chain(model)


def make_cluster(model, forms):
    with ExitStack() as stack:
        ports = [reserve_port(stack) for _ in NAMES]
    nodes = tuple(
        NodeConfig(name, "127.0.0.1", port, transfer=form)
        for name, port, form in zip(NAMES, ports, (*forms, FLOAT), strict=True)
    )
    return Cluster(model, "none", nodes, threads=1)


def quantised(chain, x, cuts, forms):
    """The output of a plan, computed here: what crosses a hop is encoded once, where it is made."""
    n, y = chain.spec.n_units, x.numpy()
    for k, (start, stop) in enumerate(zip((0, *cuts), (*cuts, n), strict=True)):
        if stop > start:
            y = chain.run(torch.from_numpy(as_float32(y)), start, stop).numpy()
        if stop < n and not isinstance(y, Affine) and y.dtype == np.float32:
            y = encode(y, forms[k])
    return torch.from_numpy(y)


@pytest.mark.parametrize("forms", [(HALF, HALF), (BYTE, BYTE), (BYTE, HALF), (FLOAT, BYTE)])
def test_nodes_compute_what_the_encoded_activations_give(model, chain, forms):
    n = chain.spec.n_units
    x = sample_input(3, chain.spec.input_shape)
    plain = chain.run(x, 0, n)
    cluster = make_cluster(model, forms)
    with local_nodes(cluster), Client(cluster) as client:
        client.connect()
        assert [node["transfer"] for node in client.nodes] == [*forms, FLOAT]
        differs = 0
        for cuts in ((1, 2), (0, 0), (0, 2), (1, 1), (2, n), (n, n), (0, n), (n - 1, n - 1)):
            reply = client.submit(x, Plan(cuts)).result()
            assert torch.equal(reply.output, quantised(chain, x, cuts, forms)), cuts
            crosses = cuts[0] < n and (forms[0] != FLOAT or cuts[1] < n)
            assert crosses or torch.equal(reply.output, plain)
            differs += not torch.equal(reply.output, plain)
            error = (reply.output - plain).abs().max() / plain.abs().max()
            assert error < 0.02, (cuts, error)
        assert differs > 3
        # A value that has no code fails its request with the reason, and the next one works.
        bad = x.clone()
        bad[0, 0, 0, 0] = float("inf")
        if BYTE in forms:
            with pytest.raises(RequestError, match="int8 holds finite values only"):
                client.submit(bad, Plan((0, 0))).result()
        assert client.submit(x, Plan((1, 2))).result().record.tries == 1


def test_a_running_chain_s_profile_has_what_conversions_take(model, chain):
    n, x = chain.spec.n_units, sample_input(0, chain.spec.input_shape)
    cluster = make_cluster(model, (BYTE, HALF))
    with local_nodes(cluster) as nodes, Client(cluster) as client:
        client.connect()
        for k in range(3):
            unit_s, conversions = client.profile_times(k, 2)
            assert len(unit_s) == n
            assert [c.form for c in conversions] == [HALF, BYTE]
            half, byte = conversions
            for cut in range(n):
                y = chain.run(x, 0, cut).numpy()
                assert half.cut_bytes[cut] == encode(y, HALF).nbytes
                assert byte.cut_bytes[cut] == encode(y, BYTE).body.nbytes
            assert min(half.encode_s + half.decode_s + byte.encode_s + byte.decode_s) > 0
        estimate = nodes[1]._computer
        header = client.submit(x, Plan((1, 2))).result().record
        assert header.work_s[1] > 0 and estimate.backlog_s(0.0) == 0.0


def test_a_chain_without_transfers_is_profiled_as_ever(model):
    cluster = make_cluster(model, (FLOAT, FLOAT))
    with local_nodes(cluster), Client(cluster) as client:
        client.connect()
        assert client.profile_times(1, 1)[1] == ()


def test_another_setting_on_a_node_or_a_node_that_reads_no_int8_fails_the_handshake(model):
    cluster = make_cluster(model, (BYTE, FLOAT))
    plain = replace(cluster, nodes=tuple(replace(n, transfer=FLOAT) for n in cluster.nodes))
    with local_nodes(plain), Client(cluster) as client:
        with pytest.raises(HandshakeError, match="node edge: expected transfer 'int8', got 'floa"):
            client.connect()
    with local_nodes(cluster) as nodes:
        with Client(plain) as client, pytest.raises(HandshakeError, match="got 'int8'"):
            client.connect()
        for key in ("transfer", "reads"):  # as a version before transfers
            del nodes[2]._core.config.hello[key]
        with Client(cluster) as client:
            with pytest.raises(HandshakeError, match="node cloud: it cannot read int8") as caught:
                client.connect()
            assert "\n" not in str(caught.value)


def test_a_cluster_file_holds_the_setting():
    nodes = [NodeConfig(n, "127.0.0.1", 5000 + k) for k, n in enumerate(NAMES)]
    plain = Cluster("alexnet", "none", tuple(nodes))
    assert "transfer" not in plain.to_toml() and plain.transfers == (FLOAT, FLOAT)
    nodes[0] = replace(nodes[0], transfer=HALF)
    cluster = Cluster("alexnet", "none", tuple(nodes))
    assert Cluster.from_toml(cluster.to_toml()) == cluster
    assert cluster.transfers == (HALF, FLOAT)
    for bad in ('"fp8"', "8", "true"):
        text = plain.to_toml().replace('name = "fog"', f'name = "fog"\ntransfer = {bad}')
        with pytest.raises(ConfigError, match="node fog: transfer must be one of float32, fp16"):
            Cluster.from_toml(text)
    with pytest.raises(ConfigError, match="no effect on the last node"):
        Cluster("alexnet", "none", (*nodes[:2], replace(nodes[2], transfer=HALF)))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["--transfer", "fp8"], "--transfer: transfer must be one of"),
        (["--transfer", "fp16,fp16,int8"], "one for each of 2"),
        (["--transfer", "fp16", "--cluster", "cluster.toml"], "in the cluster file"),
    ],
)
def test_a_wrong_option_is_one_line(command, words, capsys):
    argv = ["--controller", "solver", *command]
    assert run_command(lambda: deploy.main(argv)) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_the_simulator_takes_transfers_from_its_profile_only(capsys):
    assert evaluate.main(["--model", "alexnet", "--arms", "static", "--transfer", "fp16"]) == 2
    err = capsys.readouterr().err
    assert "the profile says it" in err and err.count("\n") == 1


def with_transfers(profile, forms, factor=1.0, scale=1.0):
    """The profile with transfers, and conversions of which all are different."""
    n, sizes = profile.spec.n_units, np.array(profile.spec.cut_bytes[:-1])
    nodes = []
    for k, node in enumerate(profile.nodes):
        conversions = tuple(
            Conversion(
                form,
                tuple(int(s) for s in (sizes / 2 if form == HALF else sizes / 4 + 24) * scale),
                tuple(factor * 1e-4 * (k + 1) * (c + 1) * (f + 1) for c in range(n)),
                tuple(factor * 3e-5 * (k + 1) * (c + 2) * (f + 1) for c in range(n)),
            )
            for f, form in enumerate((HALF, BYTE))
        )
        form = forms[k] if k < len(forms) else FLOAT
        nodes.append(replace(node, transfer=form, conversions=conversions))
    return profile.with_changes(nodes=tuple(nodes))


def by_hand(profile, cuts):
    """Work per node and bytes per hop of one plan: followed through the chain step by step."""
    n = profile.spec.n_units
    work, sizes, coded = [], [], FLOAT
    bounds = (0, *cuts, n)
    for k, node in enumerate(profile.nodes):
        start, stop = bounds[k], bounds[k + 1]
        seconds, busy = 0.0, stop > start
        table = {c.form: c for c in node.conversions}
        if busy:
            if coded != FLOAT:
                seconds += table[coded].decode_s[start]
            seconds += sum(node.unit_s[start:stop])
            coded = FLOAT
        if k < len(cuts) and stop < n:
            if coded == FLOAT and node.transfer != FLOAT:
                coded, busy = node.transfer, True
                seconds += table[coded].encode_s[stop]
            sizes.append(table[coded].cut_bytes[stop] if coded != FLOAT else SPEC.cut_bytes[stop])
        elif k < len(cuts):
            sizes.append(0)
        work.append(seconds + node.stage_overhead_s if busy else 0.0)
        if stop == n:
            coded = FLOAT
    return work, sizes


FORMS = [(HALF, HALF), (BYTE, FLOAT), (FLOAT, BYTE), (HALF, BYTE)]


@pytest.mark.parametrize("forms", FORMS)
def test_solver_and_simulator_know_sizes_and_conversions(forms):
    profile = with_transfers(toy_profile(3), forms)
    rng = np.random.default_rng(0)
    cuts = np.unique(random_cuts(rng, 300, 2), axis=0)
    expected = [by_hand(profile, tuple(map(int, row))) for row in cuts]
    table = PlanTable(profile, [Plan(tuple(map(int, row))) for row in cuts])
    np.testing.assert_allclose(table.work_s, [work for work, _ in expected], atol=1e-12)
    np.testing.assert_array_equal(table.hop_bytes, [sizes for _, sizes in expected])
    model = CostModel(profile, toy_scenario(3))
    works = Chain(model).work_of(cuts)
    for station in range(5):
        of_table = (table.hop_bytes if station % 2 else table.work_s)[:, station // 2]
        np.testing.assert_allclose(np.maximum(works[station], 0.0), of_table, atol=1e-12)
        assert np.array_equal(works[station] < 0, of_table == 0)
    splits = SplitModel(model, PaperSettings())
    for row in cuts:
        at = splits.index(Plan(tuple(map(int, row))))
        np.testing.assert_array_equal(splits._bytes[at], by_hand(profile, tuple(row))[1])


@pytest.mark.parametrize("forms", FORMS)
def test_late_binding_fixes_the_same_works(forms):
    profile = with_transfers(toy_profile(3), forms)
    scenario = toy_scenario(3, late_binding=True)
    chain = Chain(CostModel(profile, scenario))
    cuts = np.array([(i, j) for i in range(SPEC.n_units) for j in range(i, SPEC.n_units + 1)])
    store = RequestStore(5, len(cuts), 2, record=True, late_rows=4)
    store.extend(len(cuts))
    store.cuts[:, 0] = cuts[:, 0]
    LateBinding(profile).fix(store, np.arange(len(cuts)), cuts[:, 1])
    works = chain.work_of(cuts)
    np.testing.assert_allclose(store.work[FOG], np.maximum(works[FOG], 0.0), atol=1e-12)
    for station in (HOP, CLOUD):
        np.testing.assert_allclose(store.work[station], works[station], atol=1e-12)


def test_transfers_that_cost_nothing_and_save_nothing_change_nothing():
    plain, scenario = toy_profile(3), toy_scenario(3, late_binding=True)
    coded = with_transfers(plain, (HALF, HALF), factor=0.0, scale=2.0)
    states = []
    for profile in (plain, coded):
        model = CostModel(profile, scenario)
        sim = Simulator(model, 8, 3)
        sim.late_rule = LateRule(model)
        rng = np.random.default_rng(1)
        for _ in range(10):
            # An edge without units would queue its input to encode it.
            result = sim.step(np.maximum(random_cuts(rng, 8, 2), 1))
        states.append((result.record.outstanding_s, sim.drain().latency_sum_s))
    np.testing.assert_array_equal(states[0], states[1])


@pytest.mark.parametrize("forms", FORMS)
def test_a_lone_request_takes_what_the_table_says(forms):
    profile = with_transfers(toy_profile(3), forms)
    scenario = constant_scenario(mbps=8.0, rate_rps=0.5)
    model = CostModel(profile, scenario)
    for cuts in ((2, 4), (0, 0), (0, 3), (3, 3)):
        work, sizes = by_hand(profile, cuts)
        sim = Simulator(model, 1, 5, record_requests=True)
        parts = [sim.step(np.array([cuts])).completed for _ in range(20)] + [
            sim.drain_completed().completed
        ]
        done = [p for p in parts if len(p.env)]
        assert done
        for part in done:
            np.testing.assert_allclose(part.work_s, np.tile(work, (len(part.env), 1)), atol=1e-9)
            transmit = np.array(sizes) / 1e6
            np.testing.assert_allclose(part.transmit_s, np.tile(transmit, (len(part.env), 1)))


def test_late_tables_count_conversions():
    scenario = toy_scenario(3, late_binding=True)
    plain, coded = (
        CostModel(p, scenario)
        for p in (toy_profile(3), with_transfers(toy_profile(3), (BYTE, BYTE)))
    )
    state = Simulator(plain, 1, 0).reset(0)
    cuts = np.array([[2, 4]])
    _, level, _ = LateRule(plain)._lines(state, cuts)
    _, cheaper, _ = LateRule(coded)._lines(state, cuts)
    _, slower, _ = LateRule(
        CostModel(with_transfers(toy_profile(3), (BYTE, BYTE), factor=50.0), scenario)
    )._lines(state, cuts)
    assert cheaper[0, -1] < level[0, -1] < slower[0, -1]


def test_calibration_leaves_conversions_out_of_the_scale_of_units():
    profile = with_transfers(toy_profile(3), (BYTE, BYTE))
    records = []
    for i, cuts in enumerate([(2, 4), (0, 0), (0, 4), (3, 5), (1, 3)]):
        work, sizes = by_hand(profile, cuts)
        bare = [
            w - n.stage_overhead_s if w else 0.0 for w, n in zip(work, profile.nodes, strict=True)
        ]
        transmit = [s / 4e6 for s in sizes]
        back = [0.008 + 4000 / 4e6 + hop.frame_overhead_s for hop in profile.hops]
        crossed = [b for b, size in zip(back, sizes, strict=True) if size]
        latency = sum(work) + sum(transmit) + sum(crossed)
        records.append(
            RequestRecord(i, cuts, 0.0, 0.0, latency, tuple(bare), tuple(bare), (0.0,) * 3,
                          tuple(transmit), tuple(transmit))
        )  # fmt: skip
    fitted = fit_calibration(profile, records)
    for node, was in zip(fitted.nodes, profile.nodes, strict=True):
        np.testing.assert_allclose(node.unit_s, was.unit_s, rtol=1e-6)
        assert node.conversions == was.conversions


def test_a_profile_s_file_holds_transfers_and_without_them_is_what_it_was():
    plain = toy_profile(3)
    text = plain.to_json()
    assert "transfer" not in text and "conversions" not in text
    assert Profile.from_json(text) == plain
    coded = with_transfers(plain, (HALF, BYTE))
    assert Profile.from_json(coded.to_json()) == coded
    assert coded.shape_digest() == plain.shape_digest()
    slower = coded.nodes[1].scaled(2.0)
    assert slower.unit_s[0] == 2 * coded.nodes[1].unit_s[0]
    assert slower.conversions[1].encode_s[3] == 2 * coded.nodes[1].conversions[1].encode_s[3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n: n.update(transfer="fp8"), "transfer must be one of"),
        (lambda n: n.update(conversions=n["conversions"][:1]), "int8 takes was not measured"),
        (lambda n: n["conversions"][0].update(encode_s=[0.1]), "1 encode_s, expected 6"),
        (lambda n: n["conversions"][0]["decode_s"].__setitem__(2, -1.0), "finite and >= 0"),
        (lambda n: n["conversions"][0].pop("form"), "not a readable profile"),
    ],
)
def test_a_profile_whose_conversions_are_not_known_is_refused(change, words):
    raw = json.loads(with_transfers(toy_profile(3), (BYTE, BYTE)).to_json())
    change(raw["nodes"][1])
    with pytest.raises(ProfileError, match=words):
        Profile.from_json(json.dumps(raw))


def test_the_report_says_weights_are_random_and_gives_no_agreement(model, tmp_path, capsys):
    pytest.importorskip("skimage", reason="needs scikit-image (pip install -e '.[dev]')")
    out = tmp_path / "report.json"
    assert transfer.main(["--model", model, "--cuts", "0,1", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "random weights" in text and "top-1" not in text.splitlines()[1]
    report = json.loads(out.read_text())
    assert [(r["cut"], r["form"]) for r in report["rows"]] == [
        (0, HALF), (0, BYTE), (1, HALF), (1, BYTE)
    ]  # fmt: skip
    for row in report["rows"]:
        assert "same_top1" not in row
        assert 0 < row["mean_l2"] <= row["worst_l2"] < (0.002 if row["form"] == HALF else 0.1)
        saved = 2 if row["form"] == HALF else 4
        assert row["bytes"] == row["float32_bytes"] // saved + (24, 64)[row["cut"]] * (saved == 4)


def test_the_report_counts_top_1_where_weights_are_loaded(model, tmp_path, capsys):
    pytest.importorskip("skimage", reason="needs scikit-image (pip install -e '.[dev]')")
    weights = tmp_path / "weights.pt"
    from executor.networks import load_network

    torch.save(load_network(model).module.state_dict(), weights)
    assert transfer.main(["--model", model, "--cuts", "1", "--weights", str(weights)]) == 0
    text = capsys.readouterr().out
    assert "random" not in text and "top-1" in text.splitlines()[1] and "/6" in text
    for args, words in ((["--cuts", "99"], "--cuts must be"), (["--weights", "absent"], "absent")):
        assert transfer.main(["--model", model, *args]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
