"""Trains the one policy for all models: lessons in hindsight from many systems in turn.

Every round draws a system (a model, and how fast its nodes are), gathers lessons there under mixed
conditions (`env.mixture`) with the policy as it is, and learns from the lessons of the last rounds
together. What a lesson holds are plans' features, so those of different models mix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agents.arms.policy_all import ScoringPolicy, scoring_controller
from agents.arms.scoring import PlanEncoder, ScoringActor
from agents.learning.hindsight import HindsightSettings, Learner, gather_lessons
from agents.learning.validation import Judge, overall, own_and_varied
from env.mixture import MixedConditions, Mixture
from env.predict import CostModel
from env.scenario import Scenario
from executor.profile import Profile

__all__ = ["Scorer", "ScoringSettings", "train_for_all"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
# (rounds done, rounds, cost ratio to the solver of the last validation)
Report = Callable[[int, int, float], None]

VALIDATION_SEED = 7_100_000


@dataclass(frozen=True)
class ScoringSettings:
    """How the policy for all models is trained.

    Attributes:
        hindsight: How lessons are gathered and learned; `rounds` counts those of all systems.
        final_learning_rate: What Adam's falls to, linearly, as a share of where it starts.
        width: Hidden width.
        tau: Temperature of the solver's prior.
        rates: Arrival rates, as fractions of the best static plan's capacity.
        as_profiled: Share of the rounds in which nodes are as fast as their profile says.
        speed: Elsewhere each node is made faster or slower by up to this factor.
        mixture: Conditions trained on.
        strengths: Factors on what was learned that are tried in the end, beside 0 and 1; the one
            that validates best is kept (at 0 the policy is the solver).
        validate_every: Rounds between two validations.
        validation_envs: Environments of each kind (own, varied) per validated model.
        validation_intervals: Their length.
        seed: Everything drawn depends on it.
    """

    hindsight: HindsightSettings = field(
        default_factory=lambda: HindsightSettings(rounds=240, memory=60, epochs=1)
    )
    final_learning_rate: float = 0.1
    width: int = 64
    tau: float = 0.05
    rates: tuple[float, float] = (0.3, 1.2)
    as_profiled: float = 0.5
    speed: float = 2.5
    mixture: Mixture = field(default_factory=Mixture)
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75)
    validate_every: int = 24
    validation_envs: int = 96
    validation_intervals: int = 60
    seed: int = 0


class Scorer(nn.Module):
    """The network in torch (`agents.arms.scoring.ScoringActor` runs it in numpy)."""

    def __init__(self, view_size: int, n_features: int, width: int, tau: float) -> None:
        super().__init__()
        self.view = nn.Linear(view_size, width)
        self.plan = nn.Linear(n_features, width, bias=False)
        self.hidden = nn.Linear(width, width)
        self.score = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.score.weight)
        self.tau = tau

    def forward(
        self, view: torch.Tensor, plans: torch.Tensor, excess: torch.Tensor
    ) -> torch.Tensor:
        """Logits [r, K] of the plans whose features [r, K, F] are given."""
        hidden = torch.tanh(self.view(view)[:, None] + self.plan(plans))
        score = self.score(torch.tanh(self.hidden(hidden)))[..., 0]
        logits: torch.Tensor = score - excess / self.tau
        return logits

    def arrays(self) -> dict[str, F32]:
        """The weights for the runtime."""
        tensors = {
            "view": self.view.weight.T,
            "plan": self.plan.weight.T,
            "b1": self.view.bias,
            "w2": self.hidden.weight.T,
            "b2": self.hidden.bias,
            "w3": self.score.weight[0],
            "tau": torch.tensor([self.tau]),
        }
        return {k: np.array(v.detach().numpy(), order="C") for k, v in tensors.items()}


def train_for_all(
    profiles: Sequence[Profile],
    scenario: Scenario,
    validation: Sequence[Profile],
    settings: ScoringSettings,
    report: Report = lambda done, total, ratio: None,
    keep: Callable[[ScoringPolicy], None] = lambda policy: None,
) -> ScoringPolicy:
    """Train on these models; the weights that validate best are returned.

    Args:
        profiles: Of the models trained on; a round draws one of them.
        scenario: Nodes, hops, cost and interval; the mixture varies its conditions.
        validation: Profiles of the models that the weights are chosen on.
        settings: How.
        report: Called after every round.
        keep: Called with the weights whenever they validate better than all before.
    """
    torch.manual_seed(settings.seed)
    torch.set_num_threads(1)
    rng = np.random.default_rng([settings.seed, 5])
    lessons, rounds = settings.hindsight, settings.hindsight.rounds
    encoder = PlanEncoder(CostModel(profiles[0], scenario))
    scorer = Scorer(encoder.view_size, encoder.n_plan_features, settings.width, settings.tau)
    learner = Learner(list(scorer.parameters()), scorer, lessons, settings.seed)
    simulators = {
        f"{profile.spec.name} {part}": simulator
        for profile in validation
        for part, simulator in own_and_varied(
            CostModel(profile, scenario),
            settings.mixture,
            settings.rates,
            settings.validation_envs,
            VALIDATION_SEED,
        ).items()
    }
    judge = Judge(simulators, VALIDATION_SEED, settings.validation_intervals)

    def judged(arrays: dict[str, F32]) -> float:
        return overall(judge.ratios(scoring_controller(ScoringPolicy(arrays, {}))))

    history: list[tuple[int, float]] = []
    shuffled: list[int] = []

    def policy() -> ScoringPolicy:
        return ScoringPolicy(
            scorer.arrays(),
            {
                "models": [p.spec.name for p in profiles],
                "interval_s": scenario.interval_s,
                "training": asdict(settings),
                "validation_cost_ratio_to_solver": list(history),
            },
        )

    best, ratio = policy(), 1.0
    for done in range(1, rounds + 1):
        shuffled = shuffled or rng.permutation(len(profiles)).tolist()
        profile = profiles[shuffled.pop()]
        if rng.random() >= settings.as_profiled:
            factors = settings.speed ** rng.uniform(-1.0, 1.0, profile.n_nodes)
            profile = profile.scaled(factors.tolist())
        model = CostModel(profile, scenario)
        system, seed = settings.mixture.system(model), int(rng.integers(2**62))
        conditions = MixedConditions(model, settings.mixture, settings.rates, lessons.n_envs, seed)
        actor = ScoringActor(system, scorer.arrays())
        learner.slow_down(1.0 - (1.0 - settings.final_learning_rate) * done / rounds)
        learner.learn(gather_lessons(system, actor, conditions, seed, lessons))
        if done % settings.validate_every == 0 or done == rounds:
            ratio = judged(scorer.arrays())
            history.append((done, ratio))
            if ratio <= min(r for _, r in history):
                best = policy()
                keep(best)
        report(done, rounds, ratio)
    ratio, chosen = min(r for _, r in history), 1.0
    if ratio >= 1.0:
        ratio, chosen = 1.0, 0.0  # the solver
    for strength in settings.strengths:
        tried = judged(strengthened(best.arrays, strength))
        if tried < ratio:
            ratio, chosen = tried, strength
    metadata = {**policy().metadata, "strength": chosen, "validated": ratio}
    return ScoringPolicy(strengthened(best.arrays, chosen), metadata)


def strengthened(arrays: dict[str, F32], factor: float) -> dict[str, F32]:
    """The network with its score multiplied."""
    return {**arrays, "w3": arrays["w3"] * np.float32(factor)}
