"""The live page: its data, and the page itself in a headless browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from agents.arms.controllers import Static, cloud_only
from agents.arms.guard import GuardedController, GuardSettings
from agents.serving.dashboard import dashboard_routes
from agents.serving.telemetry import Telemetry, describe_plan
from env.cost import Cost
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.synthetic import synthetic_profile
from executor._http import HttpServer, Response
from executor._records import NodeStatus
from executor.model import model_spec

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMIUM_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


class Feed:
    """A deployment of the guarded cloud-only arm in the simulator, told to a telemetry."""

    def __init__(self, model_name: str = "alexnet") -> None:
        scenario = Scenario.load().replace(capacity_fraction=0.4, rate_rps=0.0)
        profile = synthetic_profile(model_spec(model_name), scenario)
        self.model = CostModel(profile, scenario)
        self.system = Simulator(self.model, 1, 3, record_requests=True)
        self.cost = Cost(profile, self.model.references, scenario)
        policy = Static("policy", cloud_only(profile.spec, 3))
        self.controller = GuardedController(policy, GuardSettings(stale_s=5.0))
        self.controller.reset(self.model, 1)
        self.telemetry = Telemetry()
        self.state, self.last, self.steps = self.system.reset(), None, 0

    def begin(self) -> None:
        self.telemetry.begin(self.model, self.controller.name, self.model.rate_rps())

    def step(self, reason: str | None = None) -> None:
        decision = self.controller.decide(self.state, self.last)
        self.last = self.system.step(decision.cuts, decision.probe_bytes)
        self.state = self.last.state
        self.steps += 1
        reason = self.controller.reason if reason is None else reason
        now_s = time.monotonic()
        self.telemetry.add(
            time_s=float(self.steps),
            plan=tuple(map(int, decision.cuts[0])),
            by="solver" if reason else "policy",
            reason=reason,
            decide_s=1e-4,
            result=self.last,
            cost=self.cost,
            statuses={
                k: NodeStatus(k, received_s=now_s - 0.05, down=False, queue_len=k) for k in range(2)
            },
        )


@pytest.fixture
def feed() -> Feed:
    feed = Feed()
    feed.begin()
    return feed


@pytest.fixture
def server(feed: Feed) -> Iterator[HttpServer]:
    with HttpServer("dashboard", "127.0.0.1", 0, dashboard_routes(feed.telemetry)) as server:
        yield server


def get(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_data_says_what_runs_where_and_why(feed: Feed, server: HttpServer) -> None:
    for _ in range(3):
        feed.step()
    feed.step(reason="bandwidth stale")
    status, body = get(server.url + "/data.json?since=2")
    data = json.loads(body)
    assert status == 200 and data["state"] == "serving"
    about, now = data["about"], data["now"]
    assert about["model"] == "alexnet" and len(about["units"]) + 1 == len(about["cut_bytes"])
    assert [n["name"] for n in about["nodes"]] == ["edge", "fog", "cloud"]
    assert [n["down"] for n in now["nodes"]] == [False, False, True]
    assert now["by"] == "solver" and now["reason"] == "bandwidth stale"
    assert [p["n"] for p in data["points"]] == [3, 4]
    assert [p["fallback"] for p in data["points"]] == [False, True]
    assert [e["by"] for e in data["events"]] == ["policy", "solver"]
    totals = data["totals"]
    assert totals["decisions"] == 4 and totals["fallbacks"] == {"bandwidth stale": 1}
    assert totals["arrived"] >= totals["completed"] > 0


def test_what_is_kept_is_bounded_and_numbers_go_on(feed: Feed) -> None:
    for _ in range(650):
        feed.step()
    page = feed.telemetry.page(0)
    assert len(page["points"]) == 600 and page["points"][-1]["n"] == 650
    assert len(page["events"]) <= 50
    assert feed.telemetry.page(650)["points"] == []


def test_before_the_first_interval_and_after_the_last() -> None:
    feed = Feed()
    page = feed.telemetry.page(0)
    assert page["state"] == "starting" and page["now"] == {} and page["points"] == []
    assert feed.telemetry.health() == (False, {"status": "starting", "reason": ""})
    feed.begin()
    feed.step()
    feed.telemetry.drain()
    well, facts = feed.telemetry.health()
    assert not well and facts["status"] == "draining" and facts["nodes"][0]["heard_ago_s"] < 30
    before = feed.telemetry.page(0)["totals"]["completed"]
    feed.telemetry.end(feed.system.drain_completed(), feed.cost)
    after = feed.telemetry.page(0)
    assert after["state"] == "ended" and after["totals"]["completed"] >= before
    json.dumps(after, allow_nan=False)


def test_health_names_the_silent_edge(feed: Feed) -> None:
    feed.step()
    assert feed.telemetry.health()[0]
    feed.last = None
    decision = feed.controller.decide(feed.state, None)
    result = feed.system.step(decision.cuts)
    feed.telemetry.add(
        time_s=2.0, plan=(0, 0), by="policy", reason="", decide_s=0.0, result=result,
        cost=feed.cost, statuses={},
    )  # fmt: skip
    well, facts = feed.telemetry.health()
    assert not well and facts["reason"] == "node edge is silent"


def test_the_server_answers_bad_requests_with_words(server: HttpServer) -> None:
    assert get(server.url + "/nothing") == (404, b"no such page; there are: /, /data.json\n")
    status, body = get(server.url + "/data.json?since=-1")
    assert status == 400 and "expected a number" in json.loads(body)["error"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(server.url, method="POST"), timeout=10)
    with refused.value as error:
        assert error.code == 501


def test_a_page_that_fails_is_500_and_the_server_goes_on() -> None:
    def broken(query: Mapping[str, str]) -> Response:
        raise RuntimeError("on purpose")

    routes = {"/broken": broken, "/well": dashboard_routes(Telemetry())["/"]}
    with HttpServer("test", "127.0.0.1", 0, routes) as server:
        assert get(server.url + "/broken") == (500, b"failed; see the log\n")
        assert get(server.url + "/well")[0] == 200


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = dashboard_routes(Telemetry())["/"]({}).body.decode()
    assert "default-src 'none'" in page
    for outside in ("https://", "src=", "@import", "url(", "innerHTML"):
        assert outside not in page
    assert page.count("http://") == 1 and "http://www.w3.org/2000/svg" in page


def test_plans_in_words() -> None:
    names = ["edge", "fog", "cloud"]
    assert describe_plan((3, 14), names, 21) == "edge 0-3 | fog 3-14 | cloud 14-21"
    assert describe_plan((0, 0), names, 21) == "edge relays | fog relays | cloud 0-21"
    assert describe_plan((21, 21), names, 21) == "edge 0-21"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
def test_the_page_renders_the_plan_and_updates(feed: Feed, tmp_path: Path) -> None:
    for _ in range(30):
        feed.step()
    routes = dashboard_routes(feed.telemetry)
    polls = []

    def data(query: Mapping[str, str]) -> Response:
        """Every poll finds one interval more; from the third on the solver decides."""
        polls.append(query)
        feed.step(reason="bandwidth stale" if len(polls) >= 3 else "")
        return routes["/data.json"](query)

    with HttpServer("test", "127.0.0.1", 0, {**routes, "/data.json": data}) as server:
        done = subprocess.run(
            [str(CHROMIUM), *CHROMIUM_FLAGS, f"--user-data-dir={tmp_path / 'profile'}",
             "--virtual-time-budget=6000", "--dump-dom", server.url + "/"],
            capture_output=True, text=True, timeout=90,
        )  # fmt: skip
    dom = done.stdout
    assert done.returncode == 0, done.stderr[-2000:]
    # It polled again and again, each time for what was new, and shows what came last.
    assert len(polls) >= 4
    assert [int(q["since"]) for q in polls[:3]] == [0, 31, 32]
    for part in ("alexnet", "guarded-policy", "serving", "cloud 0–20", "edge → fog → cloud",
                 "602 kB", "bandwidth stale", "Mbit/s", "silent"):  # fmt: skip
        assert part in dom, part
    assert dom.count("<path") >= 7
    assert '<section id="waiting" class="wide" hidden' in dom
    shown = feed.telemetry.page(0)["totals"]
    assert f"{len(polls) + 30} made" in dom and shown["decisions"] == len(polls) + 30
