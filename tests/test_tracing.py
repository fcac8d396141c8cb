"""Any torchvision classification model, and a user's own, as a chain of units."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from env.scenario import Scenario
from env.synthetic import synthetic_model
from executor.errors import ConfigError
from executor.model import build_chain, model_spec, sample_input, unit_costs
from executor.networks import load_network
from executor.plan import Plan, candidate_cuts, candidate_plans, is_constrained
from executor.testbed import Testbed, TestbedHop, TestbedNode

# Name, units, candidate cuts, the head's first unit, static thirds.
EXPECTED = {
    "resnet18": (12, 8, "fc", (5, 11)),
    "resnet50": (20, 5, "fc", (16, 19)),
    "googlenet": (18, 11, "fc", (8, 17)),
    "efficientnet_b0": (40, 31, "classifier.1", (19, 39)),
    "vit_b_16": (28, 28, "heads.head", (13, 27)),
    "convnext_tiny": (24, 21, "classifier.2", (11, 23)),
    "squeezenet1_1": (22, 16, "classifier.1", (10, 20)),
}
# Built on the CPU: RegNet computes its widths, Swin keeps index tables.
OTHER_KINDS = ("regnet_y_400mf", "swin_t", "inception_v3")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_cut_is_the_whole_model_bit_for_bit(name):
    """Each stretch runs on the bytes that would cross; the last one gives the whole's output."""
    spec = model_spec(name)
    n_units, n_cuts, head, static = EXPECTED[name]
    assert (spec.n_units, len(candidate_cuts(spec))) == (n_units, n_cuts)
    assert (spec.unit_names[spec.head_start], spec.static_plan) == (head, static)
    assert len(set(spec.unit_names)) == n_units
    assert is_constrained(Plan(static), spec)
    chain = build_chain(name)
    x = sample_input(1, spec.input_shape)
    activations = [x]
    for k in range(n_units):
        before = activations[k].clone()
        y = chain.run(activations[k], k, k + 1)
        assert torch.equal(activations[k], before), f"unit {k} overwrites its input"
        assert y.dtype == torch.float32
        assert y.is_contiguous()
        assert y.nbytes == spec.cut_bytes[k + 1]
        activations.append(torch.from_numpy(y.numpy().copy()))
    whole = chain.run(x, 0, n_units)
    assert torch.equal(activations[-1], whole)
    # All stretches between neighbouring cuts, fused as a node runs them.
    cuts = candidate_cuts(spec)
    for start, stop in pairwise(cuts):
        assert torch.equal(chain.run(activations[start], start, stop), activations[stop])
    other = chain.run(sample_input(2, spec.input_shape), 0, n_units)
    assert float((other - whole).abs().max() / whole.abs().max()) > 0.03


@pytest.mark.parametrize("name", ["convnext_tiny", "squeezenet1_1"])
def test_the_chain_computes_the_network(name):
    chain = build_chain(name)
    network = load_network(name).module
    network.to_empty(device="cpu")
    state = {}
    for unit in chain.units:
        state |= unit.state_dict()
    # The units' names are the network's: what they hold is all it needs.
    network.load_state_dict(state)
    x = sample_input(3)
    with torch.inference_mode():
        expected = network(x)
    y = chain.run(x, 0, chain.spec.n_units)
    # Equal but for ConvNeXt, whose own layout between blocks is not the contiguous one of a cut.
    assert float((y - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_other_kinds_of_networks_can_be_cut(name):
    spec = model_spec(name)
    assert len(candidate_plans(spec)) >= 6
    assert is_constrained(Plan(spec.static_plan), spec)
    assert sum(cost.flops for cost in unit_costs(name)) > 0
    if name == "inception_v3":
        assert spec.input_shape == (1, 3, 299, 299)
    profile = synthetic_model(name, Scenario.load())
    assert min(profile.nodes[0].unit_s) > 0


def test_a_network_with_index_tables_runs():
    chain = build_chain("swin_t")
    x = sample_input(0)
    cut = chain.spec.static_plan[0]
    n = chain.spec.n_units
    assert torch.equal(chain.run(chain.run(x, 0, cut), cut, n), chain.run(x, 0, n))


OWN = """
import torch
from torch import nn

INPUT_SHAPE = (1, 1, 28, 28)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.shift = nn.Parameter(torch.zeros(1, 8, 1, 1))
        self.head = nn.Linear(8, 10)
        self.table = torch.linspace(0.0, 1.0, 8).reshape(1, 8, 1, 1)

    def forward(self, x, scale=2.0):
        x = self.first(x)
        x.relu_()
        y = self.second(x * scale) + x + self.shift.sigmoid() + self.table
        y += y.new_ones(y.shape[1], 1, 1) + self.shift.to(y.device)
        return self.head(torch.relu_(y).mean((2, 3)))


def build():
    torch.manual_seed(5)
    return Net()


def branches():
    class Branching(Net):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    return Branching()


def two_inputs():
    class Two(Net):
        def forward(self, x, y):
            return super().forward(x + y)

    return Two()


def a_pair():
    class Pair(Net):
        def forward(self, x):
            return x, super().forward(x)

    return Pair()


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return x + self.layer(x)


def broken():
    raise OSError("no such\\nthing")


def number():
    return 7
"""


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def test_a_file_with_an_own_module_is_a_model(own_file):
    model = f"{own_file}:build"
    spec = model_spec(model)
    assert spec.name == "mine.build"
    assert spec.input_shape == (1, 1, 28, 28)
    assert spec.unit_names == ("first.0", "second", "mean", "head")
    assert spec.unit_names[spec.head_start] == "head"
    x, other = (sample_input(seed, spec.input_shape) for seed in (1, 2))
    chain = build_chain(model, weights="DEFAULT")
    net = load_network(model).module
    with torch.inference_mode():
        expected = net(x.clone())
    for cut in range(spec.n_units + 1):
        y = chain.run(x, 0, cut)
        kept = y.clone()
        assert torch.equal(chain.run(y, cut, spec.n_units), expected)
        assert torch.equal(y, kept)
    seeded = build_chain(model)
    assert seeded.digest == build_chain(model).digest != chain.digest
    y, z = (seeded.run(v, 0, spec.n_units) for v in (x, other))
    assert float((y - z).abs().max() / y.abs().max()) > 0.005
    assert min(synthetic_model(model, Scenario.load()).nodes[0].unit_s) > 0
    # Code is no part of the weights, so the file's bytes are in the digest.
    own_file.write_text(OWN + "\n# changed\n")
    assert build_chain(model).digest != seeded.digest


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("branches", "cannot be traced.*control flow"),
        ("two_inputs", "must take one tensor"),
        ("a_pair", "expected one float32 tensor as output, got a tuple"),
        ("Flat", "no point with a single live tensor"),
        ("broken", "OSError: no such thing"),
        ("number", "must return a torch.nn.Module, got int"),
        ("absent", "no function or class 'absent'"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_with_the_reason(own_file, function, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        build_chain(f"{own_file}:{function}")
    assert "\n" not in str(caught.value)


def test_names_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="close: resnet"):
        model_spec("resnet51")
    for bad in ("mine.py", "mine.py:", "mine.py:a-b"):
        with pytest.raises(ConfigError, match=r"expected FILE\.py:FUNCTION"):
            model_spec(bad)
    with pytest.raises(ConfigError, match="there is no file"):
        model_spec(f"{tmp_path / 'absent.py'}:build")


@pytest.mark.parametrize("own", [False, True])
def test_a_traced_model_over_real_processes(own, own_file):
    model = f"{own_file}:build" if own else "squeezenet1_1"
    chain = build_chain(model)
    n = chain.spec.n_units
    inputs = [sample_input(seed, chain.spec.input_shape) for seed in range(2)]
    whole = [chain.run(x, 0, n) for x in inputs]
    plans = [Plan(chain.spec.static_plan), Plan((0, n)), Plan((1, 1)), Plan((n, n))]
    nodes = [TestbedNode(name, 1.0, "server") for name in ("edge", "fog", "cloud")]
    with Testbed(model, nodes=nodes, hops=[TestbedHop(1000.0, 0.0)] * 2) as testbed:
        with testbed.client() as client:
            for plan in plans:
                replies = [client.submit(x, plan).result() for x in inputs]
                for reply, expected in zip(replies, whole, strict=True):
                    assert torch.equal(reply.output, expected), plan
