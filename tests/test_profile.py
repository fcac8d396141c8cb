import json
import os

import numpy as np
import pytest

from executor.errors import ConfigError, ProfileError
from executor.files import write_atomic
from executor.plan import ModelSpec
from executor.profile import HopModel, NodePower, NodeProfile, Profile
from executor.profiler import profile_units

SPEC = ModelSpec("toy", ("a", "b", "c"), (100, 40, 10, 4), (True, False, True), 2, (1, 2))


def node(name, unit_s=(0.1, 0.2, 1 / 3)):
    return NodeProfile(name, unit_s, 0.001, NodePower("pi4", 2.7, 3.7, 0.26, "a source"), "rapl")


@pytest.fixture
def profile():
    return Profile(
        SPEC,
        (node("edge"), node("fog", (0.01, 0.02, 0.03)), node("cloud", (0.0, 0.0, 1e-9))),
        (HopModel(5e6, 0.01, 0.0005), HopModel(7.5e6 / 7, 0.02)),
        "0123456789abcdef",
    )


def test_round_trip_is_exact(profile, tmp_path):
    path = tmp_path / "deep" / "profile.json"
    profile.save(path)
    assert Profile.load(path) == profile
    assert Profile.from_json(profile.to_json()) == profile


def test_prefixes_price_stages(profile):
    prefix = profile.work_prefix_s()
    assert prefix.shape == (3, 4)
    assert prefix[1, 3] - prefix[1, 1] == pytest.approx(0.05)
    np.testing.assert_array_equal(profile.cut_bytes(), [100, 40, 10, 4])
    assert profile.n_nodes == 3


def test_the_shape_digest_ignores_timings_and_sees_the_shape(profile):
    slower = profile.with_changes(nodes=tuple(node(n.name) for n in profile.nodes))
    assert slower.shape_digest() == profile.shape_digest()
    fewer = profile.with_changes(nodes=profile.nodes[:2], hops=profile.hops[:1])
    assert fewer.shape_digest() != profile.shape_digest()


def corrupt(raw, *keys, value=None, drop=False):
    at = raw
    for key in keys[:-1]:
        at = at[key]
    if drop:
        del at[keys[-1]]
    else:
        at[keys[-1]] = value
    return json.dumps(raw)


CORRUPTIONS = {
    "empty": lambda raw: "",
    "half a file": lambda raw: json.dumps(raw)[:200],
    "a list": lambda raw: json.dumps([raw]),
    "another version": lambda raw: corrupt(raw, "version", value=99),
    "no nodes": lambda raw: corrupt(raw, "nodes", drop=True),
    "one node": lambda raw: corrupt(raw, "nodes", value=raw["nodes"][:1]),
    "too few unit times": lambda raw: corrupt(raw, "nodes", 0, "unit_s", value=[0.1]),
    "text for a time": lambda raw: corrupt(raw, "nodes", 0, "unit_s", 1, value="soon"),
    "NaN": lambda raw: corrupt(raw, "nodes", 1, "unit_s", 1, value=float("nan")),
    "negative time": lambda raw: corrupt(raw, "nodes", 1, "unit_s", 1, value=-1.0),
    "dead hop": lambda raw: corrupt(raw, "hops", 0, "bytes_per_s", value=0.0),
    "unknown hop field": lambda raw: corrupt(raw, "hops", 0, "colour", value=1),
    "short static plan": lambda raw: corrupt(raw, "spec", "static_plan", value=[1]),
    "text for watts": lambda raw: corrupt(raw, "nodes", 0, "power", "idle_w", value="some"),
    "no watts": lambda raw: corrupt(raw, "nodes", 0, "power", value=None),
    "hops of numbers": lambda raw: corrupt(raw, "hops", value=[1, 2]),
    "sizes of another model": lambda raw: corrupt(raw, "spec", "cut_bytes", value=[1, 2]),
    "null spec": lambda raw: corrupt(raw, "spec", value=None),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupted_file_is_refused_by_name(profile, tmp_path, name):
    path = tmp_path / "profile.json"
    path.write_text(CORRUPTIONS[name](json.loads(profile.to_json())))
    with pytest.raises(ProfileError, match=r"profile\.json") as caught:
        Profile.load(path)
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_refused_by_name(tmp_path):
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.json", tmp_path, binary):
        with pytest.raises(ProfileError, match=str(path)):
            Profile.load(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    write_atomic(path, b"old")

    def refuse(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ConfigError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["profile.json"]


def test_a_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "profile.json"
    write_atomic(path, b"a longer first version")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["profile.json"]


class FakeChain:
    """Charges each call an overhead and each unit its cost, to a clock of its own."""

    def __init__(self, unit_s, call_s):
        import torch

        self.spec = SPEC
        self.device = torch.device("cpu")
        self.unit_s, self.call_s = unit_s, call_s
        self.clock_s = 0.0
        self.calls = []

    def run(self, x, start, stop):
        self.calls.append((start, stop))
        self.clock_s += self.call_s + sum(self.unit_s[start:stop])
        return x

    def timed(self, fn):
        before = self.clock_s
        return fn(), self.clock_s - before


def test_units_sum_to_the_whole_pass():
    chain = FakeChain((0.1, 0.3, 0.6), call_s=0.05)
    unit_s = profile_units(chain, chain.timed, repeats=4, warmup=2)
    assert sum(unit_s) == pytest.approx(1.05)
    assert unit_s[2] / unit_s[1] == pytest.approx(0.65 / 0.35)
    assert chain.calls.count((0, 3)) == 2 + 4
    assert chain.calls.count((1, 2)) == 4


def test_the_median_shrugs_off_a_hiccup():
    chain = FakeChain((0.1, 0.3, 0.6), call_s=0.0)
    calls = iter(range(1000))

    def timed(fn):
        result, work_s = chain.timed(fn)
        return result, work_s * (50.0 if next(calls) == 6 else 1.0)

    assert profile_units(chain, timed, repeats=5) == pytest.approx([0.1, 0.3, 0.6])


def test_a_node_too_fast_to_time_gives_zeros():
    chain = FakeChain((0.0, 0.0, 0.0), call_s=0.0)
    assert profile_units(chain, chain.timed, repeats=1, warmup=0) == [0.0, 0.0, 0.0]
    with pytest.raises(ConfigError, match="repeats >= 1"):
        profile_units(chain, chain.timed, repeats=0)
