"""Learning on the nodes: lessons, when they take effect, and what a wrong profile cost."""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from local_nodes import until

from agents import wrong_profile
from agents.arms.runtime import PolicyController
from agents.learning.finetuning import FinetuneSettings, Learner, Lesson, Window
from agents.learning.hindsight import HindsightSettings
from agents.learning.online import BackgroundLearner, FineTuned, finetune
from agents.learning.policy import (
    ResidualSolverPolicy,
    export_arrays,
    load_policy,
    policy_kwargs,
)
from agents.learning.training import TrainingSettings, to_checkpoint
from agents.studies.regained import Spent, analyse, worst_window
from env.offloading import observation_space
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.state import Encoder
from env.synthetic import synthetic_profile
from executor.errors import ConfigError
from executor.model import model_spec
from executor.profile import Profile

SMALL = FinetuneSettings(
    window=3,
    hindsight=HindsightSettings(n_envs=4, intervals=4, epochs=1),
    judge_envs=4,
    judge_steps=5,
)


@pytest.fixture(scope="module")
def model() -> CostModel:
    scenario = Scenario.load()
    return CostModel(synthetic_profile(model_spec("alexnet"), scenario), scenario)


def a_policy(model: CostModel) -> ResidualSolverPolicy:
    """An untrained policy: the solver."""
    return ResidualSolverPolicy(
        observation_space(Encoder(model)), spaces.Discrete(len(model.plans)), lambda _: 1e-4,
        **policy_kwargs(model, width=8),
    )  # fmt: skip


def a_learner(model: CostModel, settings: FinetuneSettings = SMALL, seed: int = 1) -> Learner:
    return Learner(
        a_policy(model), model.scenario, model.references, TrainingSettings(), settings, seed
    )


def a_window(model: CostModel, length: int = 3) -> Window:
    size = Encoder(model).size
    rng = np.random.default_rng(0)
    return Window(
        rng.normal(size=(length, size)).astype(np.float32) * 0.1,
        rng.integers(len(model.plans), size=length),
        -rng.random(length),
        np.zeros(size, dtype=np.float32),
    )


def outcome(learner: Learner, model: CostModel, ratios: list[tuple[float, float, float]]) -> Lesson:
    """A lesson whose comparisons come out as given, one after the other."""
    found = iter(ratios)
    learner._ratio = lambda *_: next(found)  # type: ignore[method-assign]  # scripted
    return learner.learn(a_window(model), model.profile)


def test_a_lesson_repeats_with_its_seed_and_moves_only_the_tuned_policy(model: CostModel) -> None:
    first, second = (a_learner(model) for _ in range(2))
    for learner in (first, second):  # the policies begin alike
        learner._tuned.load_state_dict(first._first.state_dict())
    lessons = [x.learn(a_window(model), model.profile) for x in (first, second)]
    assert lessons[0].losses == pytest.approx(lessons[1].losses)
    assert lessons[0].cost_ratio == lessons[1].cost_ratio
    moved = [
        not torch.equal(a, b)
        for a, b in zip(
            first._first.state_dict().values(), first._tuned.state_dict().values(), strict=True
        )
    ]
    assert any(moved)


def test_promotes_only_what_is_better_and_rolls_back_what_is_no_longer(model: CostModel) -> None:
    learner = a_learner(model)
    kept = outcome(learner, model, [(0.99, 0.97, 1.01)])
    assert kept.event == "kept" and learner._deployed is learner._first
    promoted = outcome(learner, model, [(0.98, 0.97, 0.99)])
    assert promoted.event == "promoted" and learner._deployed is not learner._first
    assert any((promoted.arrays[k] != kept.arrays[k]).any() for k in ("w1", "w3"))
    stays = outcome(learner, model, [(1.0, 0.9, 1.1), (1.0, 0.99, 1.01)])
    assert stays.event == "kept"
    assert all((stays.arrays[k] == promoted.arrays[k]).all() for k in stays.arrays)
    back = outcome(learner, model, [(1.0, 0.9, 1.1), (1.05, 1.01, 1.09)])
    assert back.event == "rolled back" and learner._deployed is learner._first
    assert all((back.arrays[k] == kept.arrays[k]).all() for k in kept.arrays)


def test_learns_to_avoid_what_costs_more(model: CostModel) -> None:
    """On a plan that always cost more than expected, the probability falls."""
    settings = replace(SMALL, live_weight=200.0, kl_weight=0.0)
    learner = a_learner(model, settings)
    window = a_window(model, 8)
    window = replace(window, observations=np.tile(window.observations[:1], (8, 1)))
    seen = torch.as_tensor(window.observations[:1])

    def probabilities() -> torch.Tensor:
        distribution = learner._tuned.get_distribution(seen).distribution
        assert isinstance(distribution, torch.distributions.Categorical)
        first: torch.Tensor = distribution.probs[0].detach()
        return first

    bad, good = probabilities().argsort(descending=True)[:2].tolist()
    window = replace(window, actions=np.array([bad, good] * 4), rewards=np.array([-50.0, 0.0] * 4))
    before = probabilities()[bad]
    learner.learn(window, model.profile)
    assert probabilities()[bad] < before


class Scripted:
    """A learner whose lessons are over when the test says so."""

    def __init__(self, lesson: Lesson) -> None:
        self.lesson = lesson
        self.asked: list[tuple[Window, Profile]] = []
        self.futures: list[Future[Lesson]] = []

    def submit(self, window: Window, profile: Profile) -> Future[Lesson]:
        self.asked.append((window, profile))
        self.futures.append(Future())
        return self.futures[-1]

    def close(self) -> None:
        pass


def live(model: CostModel, controller: FineTuned, intervals: int, state, last, simulator):
    for _ in range(intervals):
        decision = controller.decide(state, last)
        last = simulator.step(decision.cuts, decision.probe_bytes)
        state = last.state
    return state, last


def test_a_lesson_takes_effect_when_the_next_window_ends(model: CostModel) -> None:
    checkpoint = to_checkpoint(model, a_policy(model), {})
    arrays = {k: v.copy() for k, v in checkpoint.arrays.items()}
    arrays["b3"][7] = 1e6  # wants plan 7, whatever comes
    lesson = Lesson("promoted", arrays, {}, (0.9, 0.8, 0.95), {})
    learner = Scripted(lesson)
    controller = FineTuned(checkpoint, learner, SMALL)
    simulator = Simulator(model, 1, 3, record_requests=True)
    state = simulator.reset(3)
    controller.reset(model, 1)
    state, last = live(model, controller, 3, state, None, simulator)
    assert not learner.asked
    state, last = live(model, controller, 1, state, last, simulator)
    ((window, profile),) = learner.asked
    assert profile is model.profile and window.actions.shape == window.rewards.shape == (3,)
    assert (window.rewards < 0).all() and window.observations.shape == (
        3,
        controller._actor.encoder.size,
    )
    state, last = live(model, controller, 3, state, last, simulator)
    assert len(learner.asked) == 1 and not controller.lessons  # not over: that window is left out
    learner.futures[0].set_result(lesson)
    state, last = live(model, controller, 2, state, last, simulator)
    assert not controller.lessons
    state, last = live(model, controller, 2, state, last, simulator)
    assert controller.lessons == [lesson] and len(learner.asked) == 2
    assert tuple(controller.decide(state, last).cuts[0]) == model.plans[7].cuts


def test_a_lesson_that_fails_leaves_the_policy(
    model: CostModel, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = to_checkpoint(model, a_policy(model), {})
    learner = Scripted(Lesson("kept", checkpoint.arrays, {}, (1.0, 1.0, 1.0), {}))
    controller = FineTuned(checkpoint, learner, SMALL)
    simulator = Simulator(model, 1, 3, record_requests=True)
    state = simulator.reset(3)
    controller.reset(model, 1)
    state, last = live(model, controller, 4, state, None, simulator)
    learner.futures[0].set_exception(MemoryError("no room"))
    live(model, controller, 4, state, last, simulator)
    assert "no room" in caplog.text and not controller.lessons and len(learner.asked) == 2
    controller.finish(0.01)  # nor is the last one waited for for ever
    assert "it was not over within 0.01 s" in caplog.text and not controller.lessons


def test_a_lesson_under_way_is_left_at_the_end(model: CostModel) -> None:
    long = replace(SMALL, judge_envs=64, judge_steps=100_000)
    learner = BackgroundLearner(
        a_policy(model), model.scenario, model.references, TrainingSettings(), long, 1
    )
    lesson = learner.submit(a_window(model), model.profile)
    until(lesson.running)
    learner.close()
    with pytest.raises(BrokenProcessPool):
        lesson.result(0.0)


def test_the_plan_in_force_is_learned_from_not_the_one_wanted(model: CostModel) -> None:
    """A guard may have decided otherwise."""
    checkpoint = to_checkpoint(model, a_policy(model), {})
    learner = Scripted(Lesson("kept", checkpoint.arrays, {}, (1.0, 1.0, 1.0), {}))
    controller = FineTuned(checkpoint, learner, SMALL)
    simulator = Simulator(model, 1, 3, record_requests=True)
    state, last = simulator.reset(3), None
    controller.reset(model, 1)
    for _ in range(4):
        controller.decide(state, last)
        last = simulator.step(np.array([model.plans[9].cuts]))
        state = last.state
    controller.decide(state, last)
    assert learner.asked[0][0].actions.tolist() == [9, 9, 9]


def test_finetuning_in_a_process_of_its_own(model: CostModel) -> None:
    """On a simulator as the nodes; the process ends with it."""
    policy = a_policy(model)
    policy(torch.zeros(1, Encoder(model).size))  # as PPO leaves it: with tensors of its last pass
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    simulator = Simulator(model, 1, 3, record_requests=True)
    result = finetune(policy, simulator, TrainingSettings(), SMALL, steps=7, seed=3)
    assert result.lessons and 0.0 <= result.solver_agreement <= 1.0 and result.live_cost > 0
    assert all((policy.state_dict()[k] == v).all() for k, v in before.items())
    assert (result.policy is policy) != result.promoted
    assert result.model is not model


def test_a_learner_that_cannot_begin_or_was_closed_takes_no_windows(
    model: CostModel, caplog: pytest.LogCaptureFixture
) -> None:
    learner = BackgroundLearner()  # nothing to learn
    assert "no lessons, as their process ended at its start" in caplog.text
    with pytest.raises(RuntimeError):
        learner.submit(a_window(model), model.profile)
    learner.close()
    with pytest.raises(RuntimeError):
        learner.submit(a_window(model), model.profile)


def test_a_checkpoints_policy_goes_on_where_it_stood(model: CostModel, tmp_path: Path) -> None:
    from stable_baselines3 import PPO

    from env.vector import SimulatorVecEnv

    env = SimulatorVecEnv(model, 2)
    ppo = PPO(ResidualSolverPolicy, env, policy_kwargs=policy_kwargs(model, 0.05, 8), n_steps=4,
              batch_size=8, n_epochs=1, device="cpu")  # fmt: skip
    ppo.learn(8)
    path = tmp_path / "policy.zip"
    ppo.save(path)
    arrays = export_arrays(ppo.policy)
    loaded = load_policy(path, model, arrays)
    for name, value in ppo.policy.state_dict().items():
        assert (loaded.state_dict()[name] == value).all(), name
    env.close()
    other = CostModel(synthetic_profile(model_spec("vgg16"), model.scenario), model.scenario)
    with pytest.raises(ConfigError, match="cannot learn on"):
        load_policy(path, other, arrays)
    path.write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="cannot learn on"):
        load_policy(path, model, arrays)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="window"):
        FinetuneSettings(window=0)


def spent(*rows: list[float]) -> Spent:
    cost = np.array(rows)
    return Spent(cost, np.ones_like(cost), 30.0)


def test_shares_by_hand() -> None:
    """Windows of 2 intervals: right costs 2, wrong 4; the arm 4, then 3, then 2.2."""
    right, wrong = spent(*[[1.0, 1.0]] * 6), spent(*[[2.0, 2.0]] * 6)
    arm = spent([2.0, 2.0], [2.0, 2.0], [1.5, 1.5], [1.5, 1.5], [1.1, 1.1], [1.1, 1.1])
    found = analyse({"r": right, "w": wrong, "a": arm}, "w", "r", minutes=(1, 2, 3, 9))
    assert set(found) == {"w", "a"} and found["w"]["share"] == 0.0
    assert found["a"]["share"] == pytest.approx(1.0 - 3.2 / 6.0)
    assert found["a"]["share_by_minute"] == pytest.approx({"1": 0.0, "2": 0.5, "3": 0.9})
    assert found["a"]["share_after_first"] == pytest.approx(0.7)
    assert found["a"]["minutes_to_enough"] == 2.0  # the rest of the run after the first minute
    assert found["a"]["ci95"] is None  # two conditions give no interval
    assert arm.per_request().tolist() == [[2.0, 2.0], [1.5, 1.5], [1.1, 1.1]]


def test_the_worst_window_may_lie_anywhere() -> None:
    solver = spent(*[[1.0, 1.0]] * 5)
    arm = spent([1.0, 1.0], [1.0, 1.0], [1.0, 2.0], [1.0, 2.0], [1.0, 1.0])
    assert worst_window(arm, solver) == (2.0, 120.0)
    assert worst_window(arm, solver, pooled=True) == (1.5, 120.0)


def test_no_loss_leaves_nothing_to_regain() -> None:
    same = spent(*[[1.0, 1.0, 1.0]] * 4)
    found = analyse({"r": same, "w": same, "a": same}, "w", "r")
    assert found["a"]["minutes_to_enough"] is None and found["a"]["ci95"] is None
    assert found["a"]["share"] is None


def test_the_wrong_profile_is_what_calibration_makes_of_a_wrong_round_trip(
    model: CostModel,
) -> None:
    """A round trip taken for 10 ms too short reappears in what a plan takes beside its units."""
    from agents.nodes import fit_calibration
    from executor.client import RequestRecord

    true = model.profile
    short = true.with_changes(hops=tuple(replace(h, rtt_s=h.rtt_s + 0.02) for h in true.hops))
    records = []
    for plan in ((0, 0), (0, 21), (21, 21), (3, 8), (3, 21)):
        table = CostModel(short, model.scenario).table
        row = int((table.cuts == plan).all(axis=1).argmax())
        work_s = table.work_s[row] - [n.stage_overhead_s for n in short.nodes] * table.runs[row]
        crossed = table.crossed[row]
        beside = sum(
            c * (h.rtt_s + h.frame_overhead_s + true.spec.cut_bytes[-1] / h.bytes_per_s)
            for c, h in zip(crossed, short.hops, strict=True)
        )
        records.append(
            RequestRecord(
                request_id=0, plan=plan, scheduled_s=0.0, submitted_s=0.0,
                completed_s=float(work_s.sum() + beside), stage_s=tuple(work_s),
                work_s=tuple(work_s), queue_s=(0.0,) * 3, hop_s=(0.0,) * 2, transmit_s=(0.0,) * 2,
            )
        )  # fmt: skip
    right = fit_calibration(short, records)
    mistaken = short.with_changes(hops=tuple(replace(h, rtt_s=h.rtt_s - 0.01) for h in short.hops))
    found = fit_calibration(mistaken, records)
    expected = wrong_profile.falsify(right, slower=1.0)
    assert [h.rtt_s for h in found.hops] == [h.rtt_s for h in expected.hops]
    # Only a frame over the last hop runs on the last node: which of the two takes longer than
    # the other nobody can say, so what counts is what a plan takes beside its units.
    ours, theirs = (CostModel(p, model.scenario).table for p in (found, expected))
    hops_s, nodes_s = (
        [[h.frame_overhead_s for h in p.hops] for p in (found, expected)],
        [[n.stage_overhead_s for n in p.nodes] for p in (found, expected)],
    )
    beside_s = [
        table.crossed @ hop_s + table.runs @ node_s
        for table, hop_s, node_s in zip((ours, theirs), hops_s, nodes_s, strict=True)
    ]
    assert beside_s[0] == pytest.approx(beside_s[1], abs=1e-6)


def test_only_the_fog_is_falsified(model: CostModel) -> None:
    wrong = wrong_profile.falsify(model.profile, slower=2.0, rtt_error_s=0.0)
    ratio = [
        sum(b.unit_s) / sum(a.unit_s) for a, b in zip(wrong.nodes, model.profile.nodes, strict=True)
    ]
    assert ratio == pytest.approx([1.0, 2.0, 1.0]) and wrong.hops == model.profile.hops
    with pytest.raises(ConfigError):
        wrong_profile.falsify(model.profile, slower=0.0)


def test_the_study_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    out = tmp_path / "out.json"
    args = ["--minutes", "0.2", "--conditions", "2", "--window", "5", "--json", str(out)]
    arms = "solver-right,solver-wrong,solver-recalibrated,policy-recalibrated"
    assert wrong_profile.main([*args, "--arms", arms]) == 0
    result = json.loads(out.read_text())
    assert set(result["arms"]) == set(arms.split(",")) and result["conditions"] == 2
    costs = {arm: row["cost"] for arm, row in result["arms"].items()}
    assert costs["solver-recalibrated"] > 0
    believed = result["arms"]["solver-recalibrated"]["believed"][0]
    assert believed["node_factors"][1] == pytest.approx(2.0, rel=0.05)
    assert "regained" in result["arms"]["solver-recalibrated"]
    assert "solver-recalibrated" in capsys.readouterr().out
    assert wrong_profile.main([*args, "--arms", "solver"]) == 2
    arms = "solver-right,solver-wrong"
    assert wrong_profile.main([*args, "--arms", arms, "--scenario", "lan"]) == 0
    on_lan = json.loads(out.read_text())["arms"]
    assert on_lan["solver-right"]["cost"] < 0.9 * costs["solver-right"]
    profile = tmp_path / "wrong.json"
    assert wrong_profile.main(["--write-profile", str(profile)]) == 0
    assert Profile.load(profile).nodes[1].unit_s[0] > 0


def test_the_untrained_policy_is_the_solver_whatever_is_believed(model: CostModel) -> None:
    """So an arm that believes a wrong profile decides as the solver with that profile."""
    wrong = CostModel(wrong_profile.falsify(model.profile), model.scenario, model.references)
    checkpoint = to_checkpoint(model, a_policy(model), {})
    arm = wrong_profile.Believing(PolicyController(checkpoint), wrong)
    state = Simulator(model, 1, 0).reset(0)
    arm.reset(model, 1)
    best = wrong.table.cuts[wrong.predict(state).cost.argmin()]
    assert (arm.decide(state).cuts[0] == best).all()
