"""Nodes as hosts. What needs root, pyroute2 and the kernel's help skips with its reason."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from executor._cgroups import CpuGroups
from executor.chaos import main as chaos
from executor.child import Child
from executor.errors import ConfigError
from executor.model import build_chain, sample_input
from executor.netns import NetnsRelay, check_isolation, unavailable
from executor.pacing import StepTrace
from executor.plan import Plan
from executor.testbed import Testbed, TestbedHop, TestbedNode

DEADLINE_S = 60.0


# Where it cannot be had.


def test_a_clear_reason_where_namespaces_cannot_be_had(monkeypatch):
    check_isolation("none", testbed=False)
    with pytest.raises(ConfigError, match="for nodes of the testbed"):
        check_isolation("netns", testbed=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="needs Linux, this is darwin"):
        check_isolation("netns", testbed=True)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="needs root, this is user 1000"):
        Testbed("alexnet", isolation="netns")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setitem(sys.modules, "pyroute2", None)
    with pytest.raises(ConfigError, match=r"pip install 'splitpilot\[netns\]'"):
        Testbed("alexnet", isolation="netns")
    with pytest.raises(ConfigError, match="isolation must be one of none, netns, got 'vm'"):
        Testbed("alexnet", isolation="vm")


def test_a_command_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert chaos(["--isolation", "netns"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "executor.chaos: --isolation netns needs root, this is user 1000"
    ]


@pytest.mark.parametrize(
    ("mounts", "controllers", "subtree", "expected"),
    [
        ("", None, None, "no cgroup with a cpu controller"),
        ("c {at} cgroup2 rw 0 0", "memory", "memory", "no cgroup with a cpu controller"),
        ("c {at} cgroup2 rw 0 0", "cpu memory", "memory", "echo [+]cpu > "),
    ],
)
def test_a_kernel_without_cpu_groups(tmp_path, mounts, controllers, subtree, expected):
    own = tmp_path / "own"
    own.write_text("0::/\n")
    table = tmp_path / "mounts"
    table.write_text(mounts.format(at=tmp_path))
    if controllers is not None:
        (tmp_path / "cgroup.controllers").write_text(controllers)
        (tmp_path / "cgroup.subtree_control").write_text(subtree)
    with pytest.raises(ConfigError, match=expected):
        CpuGroups.find(table, own)


def test_cpu_groups_of_both_versions(tmp_path):
    own = tmp_path / "own"
    own.write_text("3:cpu,cpuacct:/mine\n0::/\n")
    table = tmp_path / "mounts"
    v1 = tmp_path / "v1" / "mine"
    v1.mkdir(parents=True)
    table.write_text(f"c {tmp_path} cgroup2 rw 0 0\nc {v1.parent} cgroup rw,cpu,cpuacct 0 0\n")
    groups = CpuGroups.find(table, own)
    assert groups == CpuGroups(v1, 1)  # a v1 controller is not v2's; within our own group
    group = groups.create("a", 0.25)
    assert (group / "cpu.cfs_period_us").read_text() == "20000"
    assert (group / "cpu.cfs_quota_us").read_text() == "5000"
    (v1 / "cpu.cfs_quota_us").write_text("50000")
    (v1 / "cpu.cfs_period_us").write_text("100000")
    group = groups.create("c", 1.5)  # the base itself has half a core
    assert (group / "cpu.cfs_quota_us").read_text() == "10000"
    v2 = tmp_path / "v2"
    v2.mkdir()
    for name in ("cgroup.controllers", "cgroup.subtree_control"):
        (v2 / name).write_text("cpu memory")
    table.write_text(f"c {v2} cgroup2 rw 0 0\n")
    groups = CpuGroups.find(table, own)
    assert groups == CpuGroups(v2, 2)
    assert (groups.create("b", 0.0001) / "cpu.max").read_text() == "1000 20000"
    assert groups.names() == ["b"]


def test_a_trace_names_its_next_step():
    trace = StepTrace(10.0, 0.5, [1.0, 2.0, 3.0])
    assert [trace.next_step_s(t) for t in (0.0, 9.9, 10.0, 10.5, 10.7)] == [
        10.5, 10.5, 10.5, 11.0, 11.0
    ]  # fmt: skip
    assert trace.next_step_s(11.0) == trace.next_step_s(99.0) == float("inf")


# Where it can.


@pytest.fixture(scope="module")
def possible():
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)


def ours():
    """Names of namespaces and CPU groups that some splitpilot made."""
    found = os.listdir("/run/netns") if Path("/run/netns").is_dir() else []
    names = {*found, *CpuGroups.find().names()}
    return {name for name in names if name.startswith("splitpilot-")}


def left(had):
    """Names made since, whose keeper has ended."""
    from executor._namespaces import _keeps

    return {name for name in ours() - had if not _keeps(int(name.split("-")[1]))}


def host():
    """The host's own interfaces, addresses, routes and queueing disciplines."""
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        return (
            [(x["index"], x.get_attr("IFLA_IFNAME"), x["flags"]) for x in ip.get_links()],
            [(x["index"], x.get_attr("IFA_ADDRESS")) for x in ip.get_addr()],
            [str(x["attrs"]) for x in ip.get_routes(family=socket.AF_INET)],
            [(x["index"], x.get_attr("TCA_KIND")) for x in ip.get_qdiscs()],
        )


@pytest.fixture
def clean(possible):
    """Fails where anything is left, or the host's own network differs, during or after."""
    before = host()
    had = ours()
    yield before
    assert host() == before
    assert wait_for(lambda: not left(had)), left(had)


def wait_for(condition):
    deadline_s = time.monotonic() + DEADLINE_S
    while not (done := condition()) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return done


def test_the_kernel_holds_bytes_to_the_rate(clean):
    with NetnsRelay(["a", "b"], [1.0, 1.0], [(0, 1)]) as relay:
        port = relay.add_hop(5550, TestbedHop(400.0, 0.03))
        with relay.inside(1):
            server = socket.create_server(("0.0.0.0", 5550))
        with server:
            server.settimeout(DEADLINE_S)
            with relay.inside(0):
                near = socket.create_connection((relay.dial_host(0), port), DEADLINE_S)
            far, _ = server.accept()
        with near, far:
            near.settimeout(DEADLINE_S)
            far.settimeout(DEADLINE_S)
            assert near.getsockname()[0] == "10.0.1.2"  # hosts with addresses of their own
            assert far.getsockname()[0] == "10.0.2.2" == relay.node_host(1)
            begun_s = time.monotonic()
            near.sendall(b"x")
            far.recv(1)
            assert time.monotonic() - begun_s >= 0.03  # the relay's delay
            for mbps, end, other in ((8.0, near, far), (16.0, far, near)):
                relay.set_rate(0, mbps)
                time.sleep(0.2)
                n_bytes = 500_000
                begun_s = time.monotonic()
                thread = threading.Thread(target=end.sendall, args=(bytes(n_bytes),))
                thread.start()
                while n_bytes:
                    n_bytes -= len(other.recv(65536))
                taken_s = time.monotonic() - begun_s
                thread.join(DEADLINE_S)
                assert taken_s >= 0.9 * 4.0 / mbps  # never faster than the rate, either way
            assert host() == clean
            relay.play_rate(0, time.monotonic(), 0.3, [0.0, 80.0])
            time.sleep(0.05)
            near.sendall(b"y")
            begun_s = time.monotonic()
            far.recv(1)
            assert time.monotonic() - begun_s >= 0.15  # an outage is the relay's
        for extreme in (1e-9, 1e9, 20.0):
            relay.set_rate(0, extreme)
        time.sleep(0.1)
        assert relay._keeper.alive
        for bad in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(ConfigError):
                relay.set_rate(0, bad)
        with pytest.raises(ConfigError):
            relay.set_rate(1, 1.0)


def test_a_process_gets_its_share_of_the_cpu(clean):
    burn = "import time\nt = time.process_time\nend = time.monotonic() + 1.0\ninput()\n"
    burn += "a, b = t(), time.monotonic()\nwhile time.monotonic() < b + 1.0: pass\nprint(t() - a)"
    with NetnsRelay(["a"], [15.0], []) as relay:  # 1.5 / 15: a tenth of a core
        process = subprocess.Popen(
            [sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        relay.admit(0, process.pid)
        used = float(process.communicate("\n", timeout=DEADLINE_S)[0])
        assert used <= 0.15
        relay.admit(0, process.pid)  # a process that has ended is nobody's


# Started in the background, this run may ignore SIGINT, and what it starts inherits that.
SCRIPT = """
import signal, sys, time
from executor.netns import NetnsRelay
signal.signal(signal.SIGINT, signal.default_int_handler)
with NetnsRelay(["a", "b"], [1.0, 1.0], [(0, 1)]) as relay:
    print(*relay.namespaces, flush=True)
    if sys.argv[1] == "raise":
        raise RuntimeError
    time.sleep(600)
"""


def test_nothing_is_left_however_a_run_ends(clean):
    ends = ["raise", signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
    with ExitStack() as stack:
        runs = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", SCRIPT, str(end)],
                    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                )
            )
            for end in ends
        ]  # fmt: skip
        for end, run in zip(ends, runs, strict=True):
            names = set(run.stdout.readline().split())
            assert len(names) == 2
            if end != "raise":
                assert names <= ours()
                run.send_signal(end)
            assert run.wait(DEADLINE_S) != 0
            assert wait_for(lambda names=names: not names & ours()), end


def test_the_next_run_removes_what_a_killed_keeper_left(clean, caplog):
    relay = NetnsRelay(["a"], [1.0], [])
    (name,) = relay.namespaces
    relay._keeper.kill()
    relay.close()
    assert name in ours()
    with NetnsRelay(["b"], [1.0], []) as second:
        assert name not in ours() and set(second.namespaces) <= ours()
        with NetnsRelay(["c"], [1.0], []):  # and not what another run still uses
            assert set(second.namespaces) <= ours()
    assert f"left behind: {name}" in caplog.text


def test_a_refusal_of_the_kernel_leaves_nothing(clean):
    child = Child("keeper", "executor._keeper")
    try:
        child.send({"nodes": ["a", "x" * 300], "cores": [1.0, 1.0], "hops": []})
        with pytest.raises(ConfigError, match="netns: cannot create a network namespace"):
            child.read_line(DEADLINE_S)
    finally:
        child.close()


MODEL = """
from torch import nn

def build():
    conv = nn.Conv2d(3, 4, 7, stride=8)
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 9))
"""


def test_a_chain_of_hosts_gives_the_models_output(clean, tmp_path):
    file = tmp_path / "small.py"
    file.write_text(MODEL)
    nodes = (TestbedNode("edge", 1.5, "pi4"), TestbedNode("cloud", 1.0, "server"))
    model, x = f"{file}:build", sample_input(0)
    chain = build_chain(model)
    n = chain.spec.n_units
    expected = chain.run(x, 0, n)
    with Testbed(model, nodes=nodes, hops=[TestbedHop(200.0, 0.001)], isolation="netns") as testbed:
        client = testbed.client()
        for plan in (Plan((1,)), Plan((0,)), Plan((n,))):
            assert torch.equal(client.submit(x, plan).result().output, expected)
        assert host() == clean
        spaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in testbed.pids.values()}
        assert len(spaces) == 3 and os.readlink("/proc/self/ns/net") not in spaces
        for name in ("edge", "cloud"):
            with testbed.inside():
                socket.create_connection(testbed.address(name), DEADLINE_S).close()
        groups = CpuGroups.find().base
        for k, name in enumerate(("edge", "cloud")):
            (file,) = groups.glob(f"splitpilot-*-{k}-{name}/cgroup.procs")
            assert file.read_text().split() == [str(testbed.pids[name])]
