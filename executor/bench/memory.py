"""What a model costs a node in memory: real nodes, each beside one whose model is next to nothing.

A node is `python -m executor.node`; its anonymous resident memory is read when it has served
requests under many plans, since a backend may keep something for each stretch of units it has run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from executor.bench.hosts import resident_mib
from executor.child import Child
from executor.client import Client
from executor.cluster import Cluster, NodeConfig
from executor.model import model_spec, sample_input, unit_costs
from executor.plan import Plan, candidate_cuts
from executor.ports import HOST, reserve_port

__all__ = ["describe_memory", "run_memory"]

_START_S = 120.0
_ROUNDS = 2
# What the issue allows: this many copies of the weights, and so much besides.
_COPIES, _BESIDES_MIB = 1.2, 100.0
_NO_MODEL = """
from torch import nn

INPUT_SHAPE = (1, 4)


def make():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
"""


def run_memory(models: Sequence[str], backends: Sequence[str]) -> dict[str, Any]:
    """Measure every model on every backend.

    Returns:
        `no_model_mib`, and `nodes`: per model and backend `model`, `backend`, `weights_mib`,
        `memory_mib` (of the larger of two nodes), `bound_mib` and `within`.

    Raises:
        ConfigError: A backend cannot be used here, or cannot take a model.
        HandshakeError: A node did not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nothing.py"
        path.write_text(_NO_MODEL)
        nothing_mib = _node_mib(f"{path}:make", "eager", Path(folder))
        nodes = []
        for model in models:
            weights_mib = sum(cost.param_bytes for cost in unit_costs(model)) / 2**20
            bound_mib = nothing_mib + _COPIES * weights_mib + _BESIDES_MIB
            for backend in backends:
                memory_mib = _node_mib(model, backend, Path(folder))
                nodes.append(
                    {
                        "model": model,
                        "backend": backend,
                        "weights_mib": round(weights_mib, 1),
                        "memory_mib": round(memory_mib, 1),
                        "bound_mib": round(bound_mib, 1),
                        "within": memory_mib <= bound_mib,
                    }
                )
    return {"no_model_mib": round(nothing_mib, 1), "nodes": nodes}


def _node_mib(model: str, backend: str, folder: Path) -> float:
    """The larger of two nodes that have served every candidate cut, in MiB."""
    spec = model_spec(model)
    with ExitStack() as stack:
        nodes = tuple(
            NodeConfig(name, HOST, reserve_port(stack), torch_device="cpu")
            for name in ("edge", "cloud")
        )
        cluster = replace(Cluster(model, "none", nodes, threads=1), backend=backend)
        path = folder / "cluster.toml"
        path.write_text(cluster.to_toml())
        children = []
        for node in nodes:
            args = ["--role", node.name, "--cluster", str(path), "--control-stdin"]
            children.append(Child(f"node {node.name}", "executor.node", args))
            stack.callback(children[-1].close)
        for child in children:
            child.read_line(_START_S)
        client = stack.enter_context(Client(cluster, timeout_s=_START_S))
        client.connect(_START_S)
        x = sample_input(0, spec.input_shape)
        for _ in range(_ROUNDS):
            for cut in candidate_cuts(spec):
                client.infer(x, Plan((cut,)))
        return max(resident_mib(child.pid) for child in children)


def describe_memory(result: dict[str, Any]) -> str:
    """The measurement as text."""
    lines = [
        f"memory of a node without a model: {result['no_model_mib']:.0f} MiB; allowed: that, "
        f"{_COPIES:g} x the weights and {_BESIDES_MIB:g} MiB"
    ]
    lines += [
        f"  {n['model']:14} {n['backend']:6} {n['memory_mib']:7.0f} MiB, weights "
        f"{n['weights_mib']:.0f}, allowed {n['bound_mib']:.0f}" + ("" if n["within"] else "  OVER")
        for n in result["nodes"]
    ]
    return "\n".join(lines)
