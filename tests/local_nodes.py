"""Nodes of a cluster as threads of the test's process, and free ports for them."""

import itertools
import os
import socket
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch

from executor.node import Node

SMALL_NET = f"{Path(__file__).with_name('small_net.py')}:make"


# Below the ports that the kernel gives whoever asks for any, and each test process its own.
PORTS = itertools.cycle(range(10_000 + os.getpid() % 100 * 200, 10_200 + os.getpid() % 100 * 200))


def free_ports(count):
    """Ports that nobody listens on; they stay free until they are bound."""
    free = []
    for port in itertools.islice(PORTS, 200):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            return free
    raise AssertionError(f"no {count} of 200 ports are free")


@contextmanager
def local_nodes(cluster, ratio=None, clusters=None):
    """The cluster's nodes as threads of this process."""
    with ExitStack() as stack:
        nodes = []
        for index, config in enumerate(cluster.nodes):
            node = Node(clusters[index] if clusters else cluster, config.name, ratio=ratio)
            stack.callback(node.close)
            thread = threading.Thread(target=node.serve)
            thread.start()
            stack.callback(thread.join)
            stack.callback(node.stop)
            nodes.append(node)
        yield nodes


def until(condition, timeout_s=10.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.02)


def gone(pid):
    """Whether the process has ended (a zombie whose parent is not us counts)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    def threads():
        return {t for t in threading.enumerate() if "Garbage" not in type(t).__name__}

    before = threads()
    yield
    assert threads() <= before
