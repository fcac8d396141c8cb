"""Every candidate plan of every model over real processes, bit for bit the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from executor.child import Child
from executor.client import Client
from executor.cluster import Cluster, NodeConfig
from executor.model import MODELS, build_chain, sample_input
from executor.plan import candidate_plans

INPUTS = 4
DEADLINE_S = 120.0


@contextmanager
def running_nodes(model: str, directory: Path) -> Iterator[Client]:
    """Three unpaced node processes on free ports, the last first so that each knows its next."""
    with ExitStack() as stack:
        nodes: list[NodeConfig] = []
        for name in ("cloud", "fog", "edge"):
            nodes.insert(0, NodeConfig(name, "127.0.0.1", 0))
            missing = [NodeConfig(f"n{i}", "127.0.0.1", 1) for i in range(3 - len(nodes))]
            path = directory / f"{name}.toml"
            path.write_text(Cluster(model, "none", (*missing, *nodes), threads=1).to_toml())
            child = Child(name, "executor.node",
                          ["--role", name, "--cluster", str(path), "--control-stdin"])  # fmt: skip
            stack.callback(child.close)
            ready = child.read_line(60.0)
            assert ready.startswith("READY ")
            nodes[0] = NodeConfig(name, "127.0.0.1", int(ready.split()[1]))
        # Eight at once wait for each other on a busy machine: for minutes, where it is VGG16.
        cluster = Cluster(model, "none", tuple(nodes), threads=1)
        client = stack.enter_context(Client(cluster, timeout_s=DEADLINE_S))
        client.connect(30.0)
        yield client


@pytest.mark.parametrize("model", MODELS)
def test_every_candidate_plan_equals_the_whole_model(model: str, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        chain = build_chain(model)
        n = chain.spec.n_units
        inputs = [sample_input(seed) for seed in range(INPUTS)]
        whole = [chain.run(x, 0, n) for x in inputs]
    finally:
        torch.set_num_threads(before)
    # The outputs of different inputs must differ, or a swapped reply would pass unseen.
    for i in range(INPUTS):
        for j in range(i):
            assert (whole[i] - whole[j]).abs().max() > 0.01 * whole[i].abs().max()
    with running_nodes(model, tmp_path) as client:
        pending = []
        for i, plan in enumerate(candidate_plans(chain.spec)):
            pending.append((i, plan, client.submit(inputs[i % INPUTS], plan)))
            if len(pending) < 8:
                continue
            check(pending, whole)
            pending = []
        check(pending, whole)


def check(pending: list, whole: list[torch.Tensor]) -> None:
    for i, plan, future in pending:
        reply = future.result(DEADLINE_S)
        assert reply.record.plan == plan.cuts
        assert torch.equal(reply.output, whole[i % INPUTS]), f"plan {plan}"
