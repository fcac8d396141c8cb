"""Keys and allow-lists: made, listed, refused by name; strangers are kept out and counted."""

import datetime
import os
import socket
import stat
import threading
from contextlib import contextmanager, suppress

import pytest
import zmq
from local_nodes import until

from executor._sockets import HandshakeMonitor, authenticate, bind_router, connect_dealer
from executor.cluster import Cluster, DirectLink, NodeConfig
from executor.errors import ConfigError
from executor.keys import AllowList, PublicKey, load_public, load_secret, main, make_key
from executor.node import main as node_main

NAMES = ("client", "edge", "fog", "cloud")
PAST = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)


def chain(keys_dir, fog_allow=(), **settings):
    nodes = (
        NodeConfig("edge", "127.0.0.1", 0),
        NodeConfig("fog", "127.0.0.1", 0, allow=fog_allow),
        NodeConfig("cloud", "127.0.0.1", 0),
    )
    return Cluster("alexnet", "none", nodes, keys_dir=keys_dir and str(keys_dir), **settings)


@pytest.fixture
def folder(tmp_path):
    keys = tmp_path / "keys"
    for name in NAMES:
        make_key(keys, name)
    return keys


@pytest.fixture
def cluster_file(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text('keys_dir = "keys"\n' + chain(None).to_toml())
    return path


def test_the_command_makes_a_cluster_s_keys_and_lists_them(cluster_file, tmp_path, capsys):
    assert main(["--cluster", str(cluster_file), "--days", "30"]) == 0
    made = capsys.readouterr().out
    keys = tmp_path / "keys"
    assert {p.name for p in keys.iterdir()} == {
        f"{name}.{suffix}" for name in NAMES for suffix in ("key", "key_secret")
    }
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    for name in NAMES:
        assert stat.S_IMODE((keys / f"{name}.key_secret").stat().st_mode) == 0o600
        public, (own, secret) = load_public(keys, name), load_secret(keys, name)
        assert public == own and zmq.curve_public(secret) == own.z85
        assert public.fingerprint in made
        left = public.expires - datetime.datetime.now(datetime.timezone.utc)
        assert datetime.timedelta(days=29) < left <= datetime.timedelta(days=30)
    assert "fog: fog.key_secret, edge.key, cloud.key" in made
    assert main(["--cluster", str(cluster_file), "--add", "tablet"]) == 0
    assert main(["--cluster", str(cluster_file), "--list"]) == 0
    listed = capsys.readouterr().out
    assert "accepted by: cloud" in listed and "accepted by: nobody" in listed
    assert load_public(keys, "tablet").expires is None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "holds keys of client, edge, fog, cloud already"),
        (["--add", "fog"], "not overwritten"),
        (["--add", "../fog"], "a name is letters"),
        (["--days", "0"], "--days must be in 1.."),
        (["--days", "x"], "invalid int value"),
        (["--list", "--days", "3"], "--list makes no keys"),
        (["--list", "--out", "nowhere"], "nowhere is not readable"),
        (["--out", "/proc/keys"], "/proc/keys"),
        (["--cluster", "absent.toml"], "absent.toml"),
        (["--lsit"], "--lsit"),
    ],
)
def test_a_wrong_argument_is_one_line_and_code_2(cluster_file, folder, capsys, args, words):
    before = {p: p.read_bytes() for p in folder.iterdir()}
    try:
        code = main(["--cluster", str(cluster_file), *args])
    except SystemExit as ended:
        code = ended.code
    err = capsys.readouterr().err
    assert code == 2 and words in err and err.count("\n") == 1
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def spoil_mode(path, mode):
    return lambda folder: (folder / path).chmod(mode)


def spoil_text(path, text):
    return lambda folder: (folder / path).write_text(text)


def expire(name):
    def spoil(folder):
        for suffix in ("key", "key_secret"):
            (folder / f"{name}.{suffix}").unlink()
        make_key(folder, name, PAST)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "allow", "words"),
    [
        (
            spoil_mode("fog.key_secret", 0o644),
            (),
            "fog.key_secret can be read by others (mode 644)",
        ),
        (spoil_mode("fog.key_secret", 0o640), (), "chmod 600"),
        (spoil_mode("edge.key", 0o666), (), "edge.key can be changed by others"),
        (spoil_mode("", 0o777), (), "keys can be changed by others"),
        (lambda folder: (folder / "fog.key_secret").unlink(), (), "no secret key"),
        (lambda folder: (folder / "edge.key").unlink(), (), "allow-list: no key edge.key"),
        (lambda folder: (folder / "cloud.key").unlink(), (), "no key cloud.key"),
        (lambda folder: None, ("edge", "tablte"), "allow-list: no key tablte.key"),
        (lambda folder: make_key(folder, "tablet"), ("edge", "tablte"), "did you mean 'tablet'?"),
        (spoil_text("edge.key", "curve\n"), (), "edge.key is no readable CURVE key"),
        (spoil_text("edge.key", 'curve\n  public-key = "abc"\n'), (), "is no readable CURVE key"),
        (expire("edge"), (), "edge.key expired on 2020-01-01"),
        (expire("fog"), (), "fog.key_secret expired"),
        (expire("cloud"), (), "cloud.key expired"),
    ],
)
def test_a_node_with_unusable_keys_names_them_and_ends_with_2(
    folder, tmp_path, capsys, spoil, allow, words
):
    spoil(folder)
    path = tmp_path / "cluster.toml"
    cloud = NodeConfig("cloud", "127.0.0.1", 1)
    nodes = (*chain(folder, allow).nodes[:2], cloud)
    path.write_text(Cluster("alexnet", "none", nodes, keys_dir=str(folder)).to_toml())
    assert node_main(["--role", "fog", "--cluster", str(path)]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("keys_dir", "allow", "words"),
    [
        (None, ("edge",), "no effect without keys_dir"),
        ("k", ("client",), "must hold 'edge'"),
        ("k", ("edge", "edge"), "twice"),
        ("k", ("edge", "a b"), "names of keys"),
    ],
)
def test_allow_lists_that_cannot_be_meant_are_refused(keys_dir, allow, words):
    with pytest.raises(ConfigError, match=words):
        chain(keys_dir, allow)


def test_a_node_accepts_its_neighbour_unless_it_is_told_otherwise():
    cluster = chain("k", ("edge", "tablet"), client="agent")
    assert [cluster.allowed(node) for node in cluster.nodes] == [
        ("agent",),
        ("edge", "tablet"),
        ("fog",),
    ]
    assert Cluster.from_toml(cluster.to_toml()) == cluster
    with pytest.raises(ConfigError, match="allow must be a list"):
        Cluster.from_toml(cluster.to_toml().replace('["edge", "tablet"]', '"edge"'))


def test_an_expired_key_is_refused_at_the_handshake():
    fresh = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=1)
    allowed = AllowList([PublicKey("a", b"A" * 40, PAST), PublicKey("b", b"B" * 40, fresh)])
    assert [allowed.callback("*", k * 40) for k in (b"A", b"B", b"C")] == [False, True, False]


@contextmanager
def fog(cluster):
    """The fog's door alone: its socket, and who was refused at it."""
    with zmq.Context() as ctx:
        auth = authenticate(ctx, cluster, cluster.nodes[1])
        router, port = bind_router(ctx, cluster, cluster.nodes[1])
        monitor = HandshakeMonitor(ctx, router)
        try:
            yield router, port, monitor
        finally:
            router.close()
            monitor.close()
            auth.stop()


def test_only_the_allow_list_gets_in_and_strangers_are_counted(folder, tmp_path):
    """Every .key of the folder used to be let in; now the client's is a stranger to the fog."""
    cluster = chain(folder)
    others = tmp_path / "others"
    make_key(others, "edge")
    (others / "fog.key").write_bytes((folder / "fog.key").read_bytes())
    wrong_server = tmp_path / "wrong"
    make_key(wrong_server, "fog")
    for suffix in ("key", "key_secret"):
        name = f"edge.{suffix}"
        (wrong_server / name).write_bytes((folder / name).read_bytes())
    (wrong_server / "edge.key_secret").chmod(0o600)
    with fog(cluster) as (router, port, monitor), zmq.Context() as ctx:
        target = NodeConfig("fog", "127.0.0.1", port)

        def dial(keys_dir, name):
            dealer = connect_dealer(ctx, chain(keys_dir), target, name)
            dealer.sndtimeo = 5000
            with suppress(zmq.Again):  # who is refused at once has no way left to send on
                dealer.send(name.encode())
            return dealer

        def refused():
            monitor.read()
            return monitor.unauthenticated

        strangers = [(folder, "client"), (others, "edge"), (wrong_server, "edge"), (None, "edge")]
        for keys_dir, name in strangers:
            before = refused()
            with dial(keys_dir, name):
                until(lambda before=before: refused() > before, 20.0)
        before = refused()
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as scanner:
                scanner.sendall(b"GET / HTTP/1.0\r\n\r\n" + bytes(64))
        until(lambda: refused() >= before + 3, 20.0)
        assert router.poll(0) == 0, "a stranger's message came through"
        with dial(folder, "edge"):
            assert router.poll(20_000)
            assert router.recv_multipart()[1:] == [b"edge"]


def test_the_port_of_a_running_node_is_refused_by_name(folder):
    """A second node on the same port."""
    cluster = chain(folder)
    with fog(cluster) as (_, port, _), zmq.Context() as ctx:
        again = NodeConfig("fog", "127.0.0.1", port)
        with pytest.raises(ConfigError, match=f"fog cannot bind 127.0.0.1:{port}"):
            bind_router(ctx, cluster, again)


def test_a_key_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        make_key(tmp_path, "edge")
    assert list(tmp_path.iterdir()) == []


def test_two_makers_of_one_key_do_not_both_win(tmp_path):
    wins = []

    def race():
        try:
            wins.append(make_key(tmp_path, "edge"))
        except ConfigError:
            pass

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1 and load_public(tmp_path, "edge") == wins[0]


def test_a_node_at_the_end_of_a_direct_link_accepts_whoever_dials_it():
    links = (DirectLink("edge", "cloud"),)
    cluster = chain("k", direct=links)
    assert cluster.allowed(cluster.nodes[2]) == ("fog", "edge")
    nodes = (*cluster.nodes[:2], NodeConfig("cloud", "127.0.0.1", 0, allow=("fog",)))
    with pytest.raises(ConfigError, match="cloud: allow must hold 'edge', which dials it"):
        Cluster("alexnet", "none", nodes, keys_dir="k", direct=links)
