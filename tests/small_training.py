"""A training of seconds, a model for it, and a policy for all models that scores at random."""

from __future__ import annotations

import torch

from agents.arms.scoring import PlanEncoder
from agents.learning.hindsight import HindsightSettings
from agents.learning.scoring_training import Scorer
from agents.learning.training import TrainingSettings
from env.predict import CostModel
from env.scenario import Scenario
from env.synthetic import synthetic_profile
from executor.model import model_spec

TINY = TrainingSettings(
    hindsight=HindsightSettings(rounds=1, n_envs=8, intervals=6),
    steps=2048,
    n_envs=32,
    rollout=16,
    batch_size=256,
    validation_envs=16,
    validate_every=1024,
)


def make_model(name: str = "alexnet") -> CostModel:
    """A model on the default scenario's nodes, with an estimated profile and short episodes."""
    torch.set_num_threads(1)
    scenario = Scenario.load().replace(episode_s=30.0)
    return CostModel(synthetic_profile(model_spec(name), scenario), scenario)


def random_scorer(model: CostModel, spread: float) -> Scorer:
    """A network whose last layer is not zero."""
    torch.manual_seed(1)
    encoder = PlanEncoder(model)
    scorer = Scorer(encoder.view_size, encoder.n_plan_features, 8, 0.05)
    torch.nn.init.normal_(scorer.score.weight, std=spread)
    return scorer
