import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from local_nodes import SMALL_NET, gone, until

from executor.errors import ConfigError, HandshakeError, RequestError
from executor.model import build_chain, sample_input
from executor.plan import Plan
from executor.recovery import MOST_PATIENCE_S, SILENT_AFTER_S
from executor.testbed import Testbed, TestbedHop, TestbedNode

MODEL = SMALL_NET
N_UNITS = 21
DEADLINE_S = 60.0
NODES = (
    TestbedNode("edge", 1.5, "pi4"),
    TestbedNode("fog", 1.2, "laptop"),
    TestbedNode("cloud", 1.0, "server"),
)
HOPS = (TestbedHop(400.0, 0.001), TestbedHop(400.0, 0.002))


@pytest.fixture(scope="module")
def testbed():
    with Testbed(MODEL, nodes=NODES, hops=HOPS) as testbed:
        yield testbed


@pytest.fixture(scope="module")
def client(testbed):
    return testbed.client(timeout_s=DEADLINE_S)


@pytest.fixture(scope="module")
def expected():
    """Inputs by seed, and the whole model's outputs for them, computed in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    chain = build_chain(MODEL)
    pairs = [(x, chain.run(x, 0, N_UNITS)) for x in map(sample_input, range(6))]
    torch.set_num_threads(threads)
    return pairs


@pytest.fixture
def calm(testbed):
    """Rates, delays and loads as they were, whatever the test does to them."""
    yield testbed
    for index, hop in enumerate(HOPS):
        testbed.set_cut(index, False)
        testbed.set_rate(index, hop.mbps)
        testbed.set_delay(index, hop.delay_s)
    for index in range(len(NODES)):
        testbed.set_load(index, 0.0)


def same(reply, output):
    return np.array_equal(np.asarray(reply.output), output.numpy())


def test_every_kind_of_plan_equals_the_whole_model(client, expected):
    n = N_UNITS
    plans = [(10, 19), (n, n), (0, n), (0, 0), (5, 5), (5, n), (0, 7), (14, 18)]
    futures = [
        (plan, expected[k % 6][1], client.submit(expected[k % 6][0], Plan(plan)))
        for k, plan in enumerate(plans)
    ]
    for plan, output, future in futures:
        reply = future.result(DEADLINE_S)
        assert same(reply, output), plan
        record = reply.record
        assert tuple(record.plan) == plan
        last = Plan(plan).last_node(n)
        for node in range(3):
            start, stop = Plan(plan).stage(node, n)
            ran = node <= last and start < stop
            assert (record.stage_s[node] > 0) == ran, (plan, node)
        for hop in range(2):
            assert (record.hop_s[hop] > 0) == (hop < last), (plan, hop)


def test_outputs_differ_from_input_to_input(expected):
    outputs = [output for _, output in expected]
    scale = max(float(output.abs().max()) for output in outputs)
    for k, output in enumerate(outputs[1:]):
        assert float((output - outputs[k]).abs().max()) > 0.01 * scale


def test_a_rate_change_is_felt_by_what_is_under_way(calm, client, expected):
    futures = [client.submit(x, Plan((0, 0))) for x, _ in expected]
    calm.set_rate(0, 20.0)
    for (_, output), future in zip(expected, futures, strict=True):
        assert same(future.result(DEADLINE_S), output)
    x, output = expected[0]
    reply = client.submit(x, Plan((0, 0))).result(DEADLINE_S)
    assert same(reply, output)
    assert reply.record.hop_s[0] > 0.2  # 602 KB at 20 Mbit/s are 0.24 s
    calm.play_rate(0, time.monotonic(), 0.5, [0.0, 400.0])
    start_s = time.monotonic()
    assert same(client.submit(x, Plan((0, 10))).result(DEADLINE_S), output)
    assert time.monotonic() - start_s > 0.4  # nothing passes in an outage, nothing is lost


def test_a_load_change_slows_a_node_and_not_its_work(calm, client, expected):
    x, output = expected[1]
    calm.set_load("edge", 0.8)
    until(lambda: client.status()[0].load == pytest.approx(0.8), DEADLINE_S)
    record = client.submit(x, Plan((10, 19))).result(DEADLINE_S).record
    assert record.stage_s[0] > 4.9 * record.work_s[0]
    calm.play_load(0, time.monotonic(), 1.0, [0.5])
    until(lambda: client.status()[0].load == pytest.approx(0.5), DEADLINE_S)
    reply = client.submit(x, Plan((10, 19))).result(DEADLINE_S)
    assert same(reply, output)
    assert reply.record.stage_s[0] > 1.95 * reply.record.work_s[0]


def test_a_cut_hop_fails_requests_or_delays_them_and_recovers(calm, testbed, expected):
    client = testbed.client(timeout_s=2.0)
    x, output = expected[2]
    calm.set_cut(1, True)
    time.sleep(0.2)
    try:  # every request ends: in a raised error, or right, re-run around the cloud
        assert same(client.submit(x, Plan((10, 19))).result(DEADLINE_S), output)
    except RequestError:
        pass
    assert same(client.submit(x, Plan((10, N_UNITS))).result(DEADLINE_S), output)
    calm.set_cut(1, False)

    def works():
        try:
            return same(client.submit(x, Plan((10, 19))).result(DEADLINE_S), output)
        except RequestError:
            return False

    until(works, DEADLINE_S)
    client.close()


def test_who_is_patient_waits_for_a_silent_hop_and_who_is_not_goes_around_it(calm, testbed):
    client = testbed.client(timeout_s=DEADLINE_S)
    x = sample_input(2)
    for patience_s, ran in ((MOST_PATIENCE_S, (0, 0)), (SILENT_AFTER_S, (N_UNITS, N_UNITS))):
        client.be_patient((patience_s, SILENT_AFTER_S))
        until(lambda: not any(node.down for node in client.status().values()), DEADLINE_S)
        calm.play_rate(0, time.monotonic(), 2.5, [0.0, 400.0])
        reply = client.submit(x, Plan((0, 0))).result(DEADLINE_S)
        assert reply.record.plan == ran
    for wrong in ((1.0,), (1.0, 0.1), (1.0, 4.0)):
        with pytest.raises(ConfigError, match=r"patience_s takes 2 numbers from 0\.7 to 3\.5 s"):
            client.be_patient(wrong)
    client.close()


def test_a_killed_node_is_survived_and_can_come_back(calm, testbed, expected):
    client = testbed.client(timeout_s=2.0)
    x, output = expected[3]
    old_pid = testbed.pids["cloud"]
    testbed.kill("cloud")
    assert gone(old_pid)
    with pytest.raises(HandshakeError, match="node cloud ended with code -9"):
        testbed.set_load("cloud", 0.5)
    assert same(client.submit(x, Plan((10, N_UNITS))).result(DEADLINE_S), output)
    testbed.restart("cloud")
    assert testbed.pids["cloud"] != old_pid

    def works():
        try:
            return same(client.submit(x, Plan((0, 0))).result(DEADLINE_S), output)
        except RequestError:
            return False

    until(works, DEADLINE_S)
    client.close()


def test_settings_are_checked_before_they_are_sent(testbed):
    with pytest.raises(ConfigError, match="bandwidth must be positive, got 0"):
        testbed.set_rate(0, 0.0)
    with pytest.raises(ConfigError, match="no hop 2"):
        testbed.set_rate(2, 5.0)
    with pytest.raises(ConfigError, match="no node 3"):
        testbed.set_load(3, 0.5)
    with pytest.raises(ConfigError, match="'mist'"):
        testbed.set_load("mist", 0.5)
    with pytest.raises(ConfigError, match="finite"):
        testbed.set_load(0, float("nan"))
    with pytest.raises(ConfigError, match="step must be positive"):
        testbed.play_load(0, 0.0, 0.0, [0.1])


def test_a_malformed_chain_starts_nothing():
    with pytest.raises(ConfigError, match="2 nodes and 2 hops"):
        Testbed(MODEL, nodes=NODES[:2], hops=HOPS)
    with pytest.raises(ConfigError, match=r"testbed node slow: .*ratio must be positive"):
        TestbedNode("slow", 0.0, "pi4")
    with pytest.raises(ConfigError, match="delay"):
        TestbedHop(40.0, -0.1)


def test_a_failing_node_gives_one_clear_error_and_leaves_nothing(tmp_path):
    def children():
        listing = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        return set(listing.split())

    before = children()
    missing = tmp_path / "no-such-weights.pt"
    with pytest.raises(ConfigError, match=r"no-such-weights\.pt") as error:
        Testbed(MODEL, weights=str(missing), nodes=NODES[1:], hops=HOPS[1:])
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)
    assert children() <= before


PARENT = """
import sys, time
from executor.testbed import Testbed, TestbedHop, TestbedNode
nodes = (TestbedNode("edge", 1.5, "pi4"), TestbedNode("cloud", 1.0, "server"))
testbed = Testbed(sys.argv[1], nodes=nodes, hops=(TestbedHop(400.0, 0.001),))
print(*testbed.pids.values(), flush=True)
time.sleep(600)
"""


def test_no_orphans_when_the_parent_is_killed():
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, MODEL],
        stdout=subprocess.PIPE,
        cwd=root,
        text=True,
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        assert not any(map(gone, pids))
        parent.send_signal(signal.SIGKILL)
    until(lambda: all(map(gone, pids)), DEADLINE_S)
