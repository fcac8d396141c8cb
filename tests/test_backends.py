"""Every backend computes what eager computes, at every stretch, from one copy of the weights."""

from __future__ import annotations

import argparse
import importlib.util
from contextlib import closing

import pytest
import torch
from local_nodes import SMALL_NET

from agents.cli import model_argument
from executor import backends
from executor.backends import BACKENDS, available_backends, build_backend
from executor.child import Child
from executor.client import Client
from executor.cluster import Cluster, NodeConfig
from executor.errors import ConfigError
from executor.model import MODELS, build_chain, sample_input
from executor.plan import Plan, candidate_cuts

TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def difference(y, expected):
    return float((y - expected).abs().max() / expected.abs().max())


def need(backend):
    if backend not in available_backends():
        pytest.skip('onnx and onnxruntime are not installed (pip install -e ".[onnx]")')


@pytest.fixture(scope="module", params=MODELS)
def eager(request):
    """The reference: one of each shipped model, for all backends in turn."""
    return build_chain(request.param)


@pytest.mark.parametrize("backend", ["tuned", "onnx"])
def test_a_backend_agrees_with_eager_at_every_candidate_cut(eager, backend):
    need(backend)
    model = eager.spec.name
    chain, name = build_backend(backend, model)
    assert (name, chain.digest, chain.spec) == (backend, eager.digest, eager.spec)
    n = chain.spec.n_units
    x = sample_input(1)
    expected = eager.run(x, 0, n)
    assert difference(chain.run(x, 0, n), expected) < TOLERANCE
    # One pass over the chain, cut at every candidate, against eager's activations there.
    previous, ours, theirs = 0, x, x
    for cut in candidate_cuts(chain.spec)[1:]:
        before = ours.clone()
        y = chain.run(ours, previous, cut)
        assert torch.equal(ours, before)
        theirs = eager.run(theirs, previous, cut)
        assert y.is_contiguous()
        assert y.nbytes == chain.spec.cut_bytes[cut]
        assert difference(y, theirs) < TOLERANCE
        previous, ours = cut, y
    assert chain.run(x, 3, 3) is x


@pytest.mark.parametrize("backend", ["tuned", "onnx"])
def test_every_single_unit_can_be_run(backend):
    """As the profiler does; units that work in place leave their input alone."""
    need(backend)
    chain, _ = build_backend(backend, "alexnet")
    y = sample_input(2)
    for k in range(chain.spec.n_units):
        before = y.clone()
        z = chain.run(y, k, k + 1)
        assert torch.equal(y, before), k
        y = z


def test_what_cannot_run_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="expected auto, eager, tuned, onnx"):
        build_backend("fast", "alexnet")
    with pytest.raises(ConfigError, match="runs on the CPU"):
        build_backend("onnx", "alexnet", device="cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert available_backends() == ("eager", "tuned")
    with pytest.raises(ConfigError, match=r"pip install .*\[onnx\]"):
        build_backend("onnx", "alexnet")


def test_auto_takes_the_fastest(monkeypatch):
    tried = []
    monkeypatch.setattr(backends, "_fastest", lambda build, device: tried.append(device) or "tuned")
    _, name = build_backend("auto", "squeezenet1_1")
    assert (name, tried) == ("tuned", ["cpu"])
    monkeypatch.undo()
    _, name = build_backend("auto", "squeezenet1_1")
    assert name in BACKENDS


def test_a_node_names_its_backend_and_a_mixed_chain_agrees(tmp_path):
    eager = build_chain(SMALL_NET)
    n = eager.spec.n_units
    cloud = NodeConfig("cloud", "127.0.0.1", 0)
    edge = NodeConfig("edge", "127.0.0.1", 0)
    with closing(
        Child("cloud", "executor.node", node_args("cloud", SMALL_NET, (edge, cloud), tmp_path))
    ) as last:
        cloud = NodeConfig("cloud", "127.0.0.1", int(last.read_line(60.0).split()[1]))
        args = [*node_args("edge", SMALL_NET, (edge, cloud), tmp_path), "--backend", "eager"]
        with closing(Child("edge", "executor.node", args)) as first:
            edge = NodeConfig("edge", "127.0.0.1", int(first.read_line(60.0).split()[1]))
            with Client(Cluster(SMALL_NET, "none", (edge, cloud))) as client:
                hello = client.connect(30.0)
                assert [node["backend"] for node in hello] == ["eager", "tuned"]
                x = sample_input(3, eager.spec.input_shape)
                reply = client.submit(x, Plan((9,))).result(60.0)
    assert difference(torch.as_tensor(reply.output), eager.run(x, 0, n)) < TOLERANCE


def node_args(role, model, nodes, directory):
    path = directory / f"{role}.toml"
    cluster = Cluster(model, "none", nodes, threads=1, backend="tuned")
    assert Cluster.from_toml(cluster.to_toml()) == cluster
    path.write_text(cluster.to_toml())
    return ["--role", role, "--cluster", str(path), "--control-stdin"]


def test_the_commands_take_any_model(tmp_path):
    assert model_argument("resnet50") == "resnet50"
    file = tmp_path / "mine.py"
    file.write_text("")
    assert model_argument(f"{file}:build") == f"{file}:build"
    for bad in ("resnet51", "absent.py:build", "mine.py"):
        with pytest.raises(argparse.ArgumentTypeError):
            model_argument(bad)
