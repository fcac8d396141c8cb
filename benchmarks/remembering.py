"""What must a policy remember, and would harder conditions teach it more? An ablation.

PYTHONPATH=. python benchmarks/remembering.py --model alexnet --traces DIR    # an hour of a core

Trains policies from the solver, in hindsight alone and otherwise alike (`agents.learning`), that

  stacked8     see the last 8 states side by side, as the shipped ones do
  newest       see the newest state alone
  stacked32    see the last 32
  recurrent    see the last 32 through a gated recurrent unit (GRU)
  curriculum   are as stacked8, but from the fifth round on half of a round's conditions are those
               of three times as many in which the policy does worst beside the solver (after
               Genet, arXiv 2202.05940)

and compares them with the solver on conditions that taught nobody: the scenario's own, varied ones
(`env.mixture`), and with --traces a part of the measured ones at 0.4, 0.8 and 1.1 of capacity. The
last weights count, whatever they do on validation. Means of the conditions' ratios of cost.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agents.arms.controllers import Solver
from agents.arms.runtime import ActorController
from agents.cli import CHECKPOINTS, Parser, load_profile, positive_int, run_command
from agents.learning.hindsight import HindsightSettings, Learner, gather_lessons
from agents.learning.policy import demand_features
from agents.learning.training import TrainingSettings
from agents.learning.validation import Judge, mean_cost, overall, own_and_varied
from env.mixture import MixedConditions
from env.predict import CostModel
from env.scenario import Scenario
from env.simulator import Simulator
from env.splits import split
from env.state import Encoder, SystemState
from env.tape import Tape, record_conditions
from executor.errors import ConfigError
from executor.files import write_json

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
HELD_OUT_SEED = 8_500_000
TRACE_RATES = (0.4, 0.8, 1.1)
# States seen, whether through a recurrent unit, whether hard conditions are preferred.
VARIANTS = {
    "stacked8": (8, False, False),
    "newest": (1, False, False),
    "stacked32": (32, False, False),
    "recurrent": (32, True, False),
    "curriculum": (8, False, True),
}
UNIFORM_ROUNDS, CANDIDATES = 4, 3


class Remembering(Encoder):
    """The encoder with a history of another length."""

    def __init__(self, model: CostModel, depth: int) -> None:
        super().__init__(model)
        self.depth = depth
        self.size = depth * self.features + 1 + len(model.plans)

    def new_history(self, batch: int) -> F32:
        """An empty history, shape [B, depth * features]."""
        return np.zeros((batch, self.depth * self.features), dtype=np.float32)

    def push(self, history: F32, state: SystemState) -> F32:
        """A new history with `state` in front."""
        kept = history[:, : (self.depth - 1) * self.features]
        return np.concatenate([self.encode_state(state), kept], axis=1)


class Network(nn.Module):
    """As `agents.learning.policy`: the solver plus a correction that starts at zero."""

    def __init__(
        self, encoder: Remembering, demand: F32, settings: TrainingSettings, recurrent: bool
    ) -> None:
        super().__init__()
        width, plans = settings.width, len(demand)
        self.shape, self.tau = (encoder.depth, encoder.features), settings.tau
        self.plans, self.demand = plans, torch.from_numpy(demand)
        self.gru = nn.GRU(encoder.features, width, batch_first=True) if recurrent else None
        seen = width if recurrent else encoder.depth * encoder.features
        self.body = nn.Sequential(
            nn.Linear(seen + 1 + plans, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )
        self.dense, self.prices = nn.Linear(width, plans), nn.Linear(width, demand.shape[1])
        for head in (self.dense, self.prices):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        """Logits [B, A] of observations [B, S]."""
        history, rest = seen[:, : -1 - self.plans], seen[:, -1 - self.plans :]
        excess = rest[:, 1:]
        if self.gru is not None:
            oldest_first = history.reshape(-1, *self.shape).flip(1)
            history = self.gru(oldest_first)[1][0]
        hidden = self.body(torch.cat([history, rest[:, :1], torch.exp(-excess)], dim=1))
        correction = self.dense(hidden) + self.prices(hidden) @ self.demand.T
        logits: torch.Tensor = correction - excess / self.tau
        return logits


class TorchActor:
    """A network as an `agents.arms.runtime.Actor`."""

    def __init__(self, encoder: Remembering, network: Network) -> None:
        self.encoder: Encoder = encoder
        self._network = network

    def observe(self, history: F32, state: SystemState) -> F32:
        """The observation."""
        return self.encoder.observe(history, state)

    def logits(self, seen: F32) -> F32:
        """Logits of the candidate plans."""
        with torch.no_grad():
            found: F32 = self._network(torch.from_numpy(seen)).numpy()
        return found

    def lesson(self, seen: F32, plans: I64) -> tuple[F32, I64]:
        """The observation and the plans."""
        return seen, plans


class Trained:
    """A policy of one kind, as far as it has learned.

    Args:
        model: What it decides for.
        kind: One of `VARIANTS`.
        seed: Everything drawn depends on it.
        lessons: How much it learns.
    """

    def __init__(self, model: CostModel, kind: str, seed: int, lessons: HindsightSettings) -> None:
        torch.manual_seed(seed)
        depth, recurrent, self._hard = VARIANTS[kind]
        self._settings, self._lessons = TrainingSettings(), lessons
        self._model, self._depth = model, depth
        encoder = Remembering(model, depth)
        self._network = Network(encoder, demand_features(model), self._settings, recurrent)
        self._seed, self.name = seed, kind

    def controller(self) -> ActorController:
        """It as a controller, that looks no further than the coming interval."""
        return ActorController(
            self.name, lambda model: TorchActor(Remembering(model, self._depth), self._network)
        )

    def learn(self) -> None:
        """All rounds."""
        system = self._settings.mixture.system(self._model)
        rng = np.random.default_rng([self._seed, 4])

        def logits(seen: torch.Tensor, plans: torch.Tensor) -> torch.Tensor:
            every: torch.Tensor = self._network(seen)
            return every.gather(1, plans)

        learner = Learner([*self._network.parameters()], logits, self._lessons, self._seed)
        actor = TorchActor(Remembering(system, self._depth), self._network)
        for tape in self._tapes(system, rng):
            drawn = int(rng.integers(2**62))
            learner.learn(gather_lessons(system, actor, tape.play(), drawn, self._lessons))

    def _tapes(self, system: CostModel, rng: np.random.Generator) -> Iterator[Tape]:
        """Every round's conditions."""
        settings, lessons = self._settings, self._lessons
        length = lessons.intervals + lessons.lookahead
        for done in range(lessons.rounds):
            hard = self._hard and done >= UNIFORM_ROUNDS
            count = lessons.n_envs * (CANDIDATES if hard else 1)
            conditions = MixedConditions(
                self._model, settings.mixture, settings.rates, count, int(rng.integers(2**62))
            )
            tape = record_conditions(conditions, length)
            if not hard:
                yield tape
                continue
            costs = [
                mean_cost(c, Simulator(system, count, 0, conditions=tape.play()), 0, length)
                for c in (self.controller(), Solver())
            ]
            gap = costs[0] / np.maximum(costs[1], 1e-9)
            # Own and varied conditions keep their shares in the half that is taken as it comes.
            usual = np.arange(count)[:: 2 * CANDIDATES]
            rest = np.setdiff1d(np.arange(count), usual)
            worst = rest[np.argsort(-gap[rest])][: lessons.n_envs - len(usual)]
            chosen = np.sort(np.concatenate([usual, worst]))
            yield Tape(
                [i.take(chosen) for i in tape.intervals], tape.rate_rps[chosen], tape.substep_s
            )


def judges(model: CostModel, traces: Path | None, part: str, count: int) -> dict[str, Judge]:
    """What the policies are compared on."""
    settings = TrainingSettings()
    steps = min(100, model.scenario.steps_per_episode)
    held_out = own_and_varied(model, settings.mixture, settings.rates, 2 * count, HELD_OUT_SEED)
    found = {
        name: Judge({name: simulator}, HELD_OUT_SEED, steps) for name, simulator in held_out.items()
    }
    if traces is None:
        return found
    cells = {}
    for condition in split(traces, model.scenario).part(part):
        for rate in TRACE_RATES:
            scenario = condition.scenario.replace(capacity_fraction=rate, rate_rps=0.0)
            played = CostModel(model.profile, scenario, model.references)
            cells[f"{condition.name} {rate}"] = Simulator(
                played, count // 4, HELD_OUT_SEED, rate_rps=played.rate_rps()
            )
    return {**found, part: Judge(cells, HELD_OUT_SEED, 60)}


def main(argv: list[str] | None = None) -> int:
    """Train and compare."""
    parser = Parser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", default="alexnet")
    add("--kinds", default=",".join(VARIANTS), help="comma-separated")
    add("--seeds", type=positive_int, default=2, help="trainings of each kind")
    add("--rounds", type=positive_int, default=HindsightSettings.rounds)
    add("--traces", type=Path, help="the folder of measured traces")
    add("--split", choices=("validation", "test"), default="validation")
    add("--conditions", type=positive_int, default=96, help="half of those of own and varied")
    add("--json", type=Path)
    args = parser.parse_args(argv)
    kinds = args.kinds.split(",")
    unknown = [kind for kind in kinds if kind not in VARIANTS]
    if unknown:
        raise ConfigError(f"unknown kind {unknown[0]!r}; expected some of {', '.join(VARIANTS)}")
    torch.set_num_threads(1)
    scenario = Scenario.load()
    profile = load_profile(CHECKPOINTS / args.model / "profile.json", args.model, scenario)
    model = CostModel(profile, scenario)
    compared = judges(model, args.traces, args.split, args.conditions)
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(args.seeds):
        for kind in kinds:
            began = time.process_time()
            policy = Trained(model, kind, seed, HindsightSettings(rounds=args.rounds))
            policy.learn()
            took_s = time.process_time() - began
            ratios = {n: overall(j.ratios(policy.controller())) for n, j in compared.items()}
            for name, ratio in {**ratios, "cpu_s": took_s}.items():
                found.setdefault(kind, {}).setdefault(name, []).append(ratio)
            text = ", ".join(f"{name} {ratio:.4f}" for name, ratio in ratios.items())
            print(f"{args.model}, {kind}, seed {seed}: {text}, {took_s:.0f} s", flush=True)
    for kind, results in found.items():
        text = ", ".join(f"{name} {np.mean(values):.4f}" for name, values in results.items())
        print(f"{args.model}, {kind}, mean of {args.seeds}: {text}")
    if args.json is not None:
        write_json(args.json, {"model": args.model, "rounds": args.rounds, "kinds": found})
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(run_command(main))
