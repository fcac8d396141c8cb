"""Nodes that die and come back, over sockets; and the chaos suite in short."""

import json
import threading
from contextlib import ExitStack, contextmanager

import pytest
import torch
from local_nodes import free_ports, nothing_is_left_behind, one_thread, until
from test_nodes import MODEL, N

from executor import chaos
from executor._chaos import FAULTS
from executor.chaos import Report, main, run
from executor.client import Client
from executor.cluster import Cluster, DirectLink, NodeConfig
from executor.errors import RequestTimeout
from executor.model import build_chain, sample_input
from executor.node import Node
from executor.plan import Plan
from executor.testbed import TestbedHop, TestbedNode

__all__ = ["nothing_is_left_behind", "one_thread"]  # fixtures that hold here too

DEADLINE_S = 20.0
NAMES = ("edge", "fog", "cloud")
FAST_NODES = (
    TestbedNode("edge", 1.5, "pi4"),
    TestbedNode("fog", 1.2, "laptop"),
    TestbedNode("cloud", 1.0, "server"),
)
FAST_HOPS = (TestbedHop(400.0, 0.001), TestbedHop(400.0, 0.002))


class Chain:
    """Three nodes as threads of this process, each of which can be ended and started again."""

    def __init__(self, stack, direct=()):
        ports = free_ports(3)
        nodes = tuple(NodeConfig(n, "127.0.0.1", p) for n, p in zip(NAMES, ports, strict=True))
        self.cluster = Cluster(MODEL, "none", nodes, threads=1, direct=direct)
        self.running = {}
        for name in NAMES:
            self.start(name)
        stack.callback(lambda: [self.end(name) for name in tuple(self.running)])

    def start(self, name, weights="none"):
        cluster = Cluster(MODEL, weights, self.cluster.nodes, threads=1, direct=self.cluster.direct)
        node = Node(cluster, name)
        thread = threading.Thread(target=node.serve)
        thread.start()
        self.running[name] = (node, thread)

    def end(self, name):
        node, thread = self.running.pop(name)
        node.stop()
        thread.join()
        node.close()


@contextmanager
def serving(**options):
    with ExitStack() as stack:
        chain = Chain(stack, options.pop("direct", ()))
        client = stack.enter_context(Client(chain.cluster, **options))
        client.connect(20.0)
        yield chain, client


@pytest.fixture(scope="module")
def expected():
    x = sample_input(7)
    return x, build_chain(MODEL).run(x, 0, N)


def test_a_node_comes_back_without_the_others_and_with_other_weights_is_refused(tmp_path, expected):
    from torchvision.models import get_model

    x, output = expected
    torch.manual_seed(5)
    torch.save(get_model(MODEL).state_dict(), tmp_path / "other.pt")
    with serving() as (chain, client):

        def plan_used():
            reply = client.submit(x, Plan((3, 10))).result(30)
            assert torch.equal(reply.output, output)
            return reply.record.plan

        until(lambda: plan_used() == (3, 10), DEADLINE_S)
        chain.end("fog")
        assert plan_used() == (N, N)
        chain.start("fog", str(tmp_path / "other.pt"))
        until(lambda: client.counts.refused_nodes, DEADLINE_S)
        assert plan_used() == (N, N) and client.status()[1].down
        chain.end("fog")
        chain.start("fog")
        until(lambda: plan_used() == (3, 10), DEADLINE_S)
        assert client.counts.refused_nodes == 1 and client.counts.failed == 0
        chain.end("cloud")
        until(lambda: plan_used() == (3, N), DEADLINE_S)


def test_requests_wait_for_the_first_node(expected):
    x, output = expected
    with serving() as (chain, client):
        until(
            lambda: not client.status()[0].down, DEADLINE_S
        )  # before it is heard it counts as down
        chain.end("edge")
        until(lambda: client.status()[0].down, DEADLINE_S)
        waiting = client.submit(x, Plan((3, 10)))
        with pytest.raises(RequestTimeout, match="edge"):
            client.submit(x, Plan((3, 10)), timeout_s=0.2).result(20)
        assert not waiting.done()
        chain.start("edge")
        assert torch.equal(waiting.result(30).output, output)


def test_a_direct_link_serves_past_the_dead_fog(expected):
    x, output = expected
    with serving(direct=(DirectLink("edge", "cloud"),)) as (chain, client):
        chain.end("fog")
        until(
            lambda: [client.status()[k].down for k in range(3)] == [False, True, False], DEADLINE_S
        )

        def record():
            reply = client.submit(x, Plan((3, 10))).result(30)
            assert torch.equal(reply.output, output)
            return reply.record

        # A hop's time is known to half the best ping; a link dialled anew starts over.
        edge, _ = chain.running["edge"]
        until(lambda: (edge._core.direct.clock.rtt_s or 1.0) < 0.002, DEADLINE_S)
        # A busy machine may make the cloud look silent for a moment, and the edge do it alone.
        until(lambda: record().plan == (3, 3), DEADLINE_S)
        past = next(r for r in iter(record, None) if r.plan == (3, 3))
        assert past.hop_s[0] == 0 < past.hop_s[1] >= past.transmit_s[1]
        assert past.stage_s[0] > 0 < past.stage_s[2]
        chain.end("cloud")
        assert record().plan == (N, N)


def test_the_chaos_suite_in_short():
    names = ("stop fog", "flip bits on hop 0")
    report = run(
        MODEL,
        0.1,
        seed=2,
        direct=True,
        faults=[fault for fault in FAULTS if fault.name in names],
        nodes=FAST_NODES,
        hops=FAST_HOPS,
        gone=False,
    )
    assert report.ok, report.plain()
    assert {outcome.name for outcome in report.outcomes} == set(names)
    assert report.unaccounted == 0 and "wrong" not in report.ends
    assert report.ends["completed"] == sum(report.ends.values())
    assert json.loads(json.dumps(report.plain()))["recovery"]["around_excess_s"]["n"] >= 1


def test_wrong_and_unaccounted_requests_end_with_1(monkeypatch, capsys):
    def report(**found):
        return lambda model, minutes, seed, **_: Report(model, seed, False, **found)

    for found, code in (
        ({"ends": {"completed": 3, "timeout": 1}}, 0),
        ({"ends": {"completed": 3, "wrong": 1}}, 1),
        ({"ends": {"completed": 3}, "unaccounted": 1}, 1),
        ({"problems": ["a node with other weights was used"]}, 1),
    ):
        monkeypatch.setattr(chaos, "run", report(**found))
        assert main([]) == code
    assert "other weights was used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--minutes", "0"], "--minutes must be positive"),
        (["--minutes", "nan"], "--minutes must be positive"),
        (["--faults", "kill fgo"], "kill fgo"),
    ],
)
def test_wrong_arguments_end_with_2_and_one_line(capsys, args, words):
    assert main(args) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
