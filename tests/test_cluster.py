"""cluster.toml: read, written, and refused in one clear line."""

from dataclasses import replace

import pytest

from executor.cluster import Cluster, DirectLink, NodeConfig, is_loopback
from executor.errors import ConfigError

TOML = """
model = "mobilenet_v2"
[[nodes]]
name = "edge"
host = "127.0.0.1"
port = 5550
device = "pi4"
[[nodes]]
name = "cloud"
host = "0.0.0.0"
port = 5551
connect = "10.0.0.7:6000"
"""


def test_it_reads_and_fills_in_defaults():
    cluster = Cluster.from_toml(TOML)
    edge, cloud = cluster.nodes
    assert (cluster.model, cluster.weights, cluster.max_queue) == ("mobilenet_v2", "none", 64)
    assert (edge.connect_host, edge.connect_port) == ("127.0.0.1", 5550)
    assert edge.bind_endpoint() == edge.connect_endpoint() == "tcp://127.0.0.1:5550"
    assert cloud.bind_endpoint() == "tcp://0.0.0.0:5551"
    assert cloud.connect_endpoint() == "tcp://10.0.0.7:6000"
    assert cluster.index("cloud") == 1


def test_it_round_trips(tmp_path):
    nodes = (
        NodeConfig("edge", "127.0.0.1", 0, device="pi5"),
        NodeConfig("fog", "::1", 7, "2001:db8::1", 8),
        NodeConfig("cloud", "cloud.local", 9, torch_device="cuda"),
    )
    cluster = Cluster("vgg16", 'a "b"\\c\x7f', nodes, max_queue=3, threads=2, keys_dir="/k/é")
    assert Cluster.from_toml(cluster.to_toml()) == cluster
    for link in (DirectLink("edge", "cloud"), DirectLink("edge", "cloud", "::1", 77)):
        linked = replace(cluster, direct=(link,))
        assert Cluster.from_toml(linked.to_toml()) == linked


DIRECT = """
[[nodes]]
name = "far"
host = "127.0.0.1"
port = 5552
[[direct]]
from = "edge"
to = "far"
connect = "10.0.0.9:7000"
"""


def test_a_direct_link_leads_past_a_node():
    cluster = Cluster.from_toml(TOML + DIRECT)
    assert cluster.direct_links == {0: 2}
    assert cluster.direct_target(0).connect_endpoint() == "tcp://10.0.0.9:7000"
    assert cluster.direct_target(1) is None
    plain = Cluster.from_toml(TOML + DIRECT.replace('connect = "10.0.0.9:7000"', ""))
    assert plain.direct_target(0).connect_endpoint() == "tcp://127.0.0.1:5552"
    for old, new, words in (
        ('to = "far"', 'to = "cloud"', "past at least one node"),
        ('to = "far"', 'to = "fra"', "unknown role 'fra'"),
        ('to = "far"', "", "to must be a node's name"),
        ("connect", "conect", "unknown conect"),
        (":7000", ":0", '"host:port"'),
    ):
        with pytest.raises(ConfigError, match=words):
            Cluster.from_toml(TOML + DIRECT.replace(old, new))
    twice = DIRECT + '[[direct]]\nfrom = "edge"\nto = "far"\n'
    with pytest.raises(ConfigError, match="at most one direct link"):
        Cluster.from_toml(TOML + twice)


def test_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "c.toml").write_text('keys_dir = "keys"\nweights = "w.pt"\n' + TOML)
    cluster = Cluster.load(tmp_path / "c.toml")
    assert cluster.keys_dir == str(tmp_path / "keys")
    assert cluster.weights == str(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("5550", "70000", "0..65535"),
        ("5550", '"5550"', "0..65535"),
        ('"edge"', '"cloud"', "must differ"),
        ('"edge"', '"a b"', "node name"),
        ('"edge"', "3", "node name"),
        ('"edge"', '"client"', "rename"),
        ("port = 5550", "", "missing port"),
        ("port = 5550", "port = 5550\nprot = 1", "unknown prot"),
        ("10.0.0.7:6000", "10.0.0.7", "host:port"),
        ('model = "mobilenet_v2"', "", "model"),
        ('model = "mobilenet_v2"', "model = 3", "non-empty string"),
        ('model = "mobilenet_v2"', 'model = "x"\nmax_queue = 0', "max_queue"),
        ('model = "mobilenet_v2"', 'model = "x"\nthreads = true', "threads"),
        ('model = "mobilenet_v2"', 'model = "x"\nmodle = 1', "unknown modle"),
        ('"127.0.0.1"', "1", "must be a string"),
        ('"127.0.0.1"', '"tcp://h"', "must be an address"),
        ("[[nodes]]", "[[nodes", "not valid TOML"),
    ],
)
def test_mistakes_are_named_in_one_line(old, new, words):
    with pytest.raises(ConfigError) as caught:
        Cluster.from_toml(TOML.replace(old, new, 1), "my.toml")
    assert words in str(caught.value)
    assert str(caught.value).startswith("my.toml: ")
    assert "\n" not in str(caught.value)


def test_nodes_must_be_tables():
    with pytest.raises(ConfigError, match=r"expected \[\[nodes\]\]"):
        Cluster.from_toml('model = "alexnet"\nnodes = 3')


def test_a_chain_needs_two_nodes():
    with pytest.raises(ConfigError, match="at least 2 nodes, got 1"):
        Cluster("alexnet", "none", (NodeConfig("edge", "127.0.0.1", 1),))


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        Cluster.load(tmp_path / "absent.toml")
    (tmp_path / "bin.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"bin\.toml"):
        Cluster.load(tmp_path / "bin.toml")


def test_an_unknown_role_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'fgo'.*edge, cloud"):
        Cluster.from_toml(TOML).index("fgo")


def test_nobody_dials_a_wildcard_or_an_unknown_port():
    with pytest.raises(ConfigError, match="connect"):
        NodeConfig("a", "0.0.0.0", 5).connect_endpoint()
    with pytest.raises(ConfigError, match="connect"):
        NodeConfig("a", "127.0.0.1", 0).connect_endpoint()


def test_listening_off_loopback_wants_keys_or_a_word():
    cluster = Cluster.from_toml(TOML)
    edge, cloud = cluster.nodes
    cluster.check_exposure(edge, insecure=False)
    cluster.check_exposure(cloud, insecure=True)
    with pytest.raises(ConfigError, match="--insecure"):
        cluster.check_exposure(cloud, insecure=False)
    Cluster.from_toml('keys_dir = "k"\n' + TOML).check_exposure(cloud, insecure=False)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("*", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
    ],
)
def test_is_loopback(host, expected):
    assert is_loopback(host) is expected
