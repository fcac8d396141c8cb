"""Who decides: the controller protocol, the static arms, the queue-aware solver, the arms by name.

A controller is asked once per interval for a plan for every environment of a batch. It sees the
measured state and what the last interval returned, never the conditions to come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from env.predict import CostModel
from env.state import SystemState, idle_probes
from executor.errors import ConfigError
from executor.plan import ModelSpec, Plan

if TYPE_CHECKING:
    from agents.arms.oracle import PlanSequence
    from agents.arms.runtime import Checkpoint
    from env.system import StepResult

__all__ = [
    "ARMS",
    "ArmContext",
    "Controller",
    "Decision",
    "Glancing",
    "Solver",
    "Static",
    "cloud_only",
    "edge_only",
    "fog_only",
    "make_arm",
    "static_thirds",
]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass
class Decision:
    """What a controller wants for the coming interval.

    Attributes:
        cuts: [B, H] the plan of each environment.
        probe_bytes: [B, H] size of the probe to send over each hop at the interval's start, 0 for
            none; None for none anywhere.
    """

    cuts: I64
    probe_bytes: F64 | None = None


class Controller(Protocol):
    """State in, plan out; batched over environments that share a model and a scenario."""

    name: str

    def reset(self, model: CostModel, batch: int) -> None:
        """Forget everything and start on `batch` environments of `model`'s system."""
        ...

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        """The plans for the coming interval; `last` is what the one before returned, if any."""
        ...


@runtime_checkable
class Glancing(Protocol):
    """A controller that can also be asked between its decisions, for a single request."""

    def glance(self, state: SystemState) -> I64:
        """The plans [B, H] for a request in this state; changes nothing."""
        ...


def edge_only(spec: ModelSpec, n_nodes: int) -> Plan:
    """Everything on the first node."""
    return Plan((spec.n_units,) * (n_nodes - 1))


def fog_only(spec: ModelSpec, n_nodes: int) -> Plan:
    """Everything on the second node (of two: the last)."""
    return Plan((0,) + (spec.n_units,) * (n_nodes - 2))


def cloud_only(spec: ModelSpec, n_nodes: int) -> Plan:
    """Everything on the last node."""
    return Plan((0,) * (n_nodes - 1))


def static_thirds(spec: ModelSpec, n_nodes: int) -> Plan:
    """The reference's rough thirds (arXiv 2605.09623); other chains get equal shares of units.

    The head stays on the last node in either case.
    """
    if n_nodes == 3:
        return Plan(spec.static_plan)
    shares = (round(spec.n_units * k / n_nodes) for k in range(1, n_nodes))
    return Plan(tuple(min(cut, spec.head_start) for cut in shares))


class Static:
    """One plan for ever.

    Args:
        name: The arm's name.
        plan: The plan, or one per environment as cuts of shape [B, H].
    """

    def __init__(self, name: str, plan: Plan | I64) -> None:
        self.name = name
        self._plan = plan

    def reset(self, model: CostModel, batch: int) -> None:
        """Check that the plan fits the model, and lay it out for the batch."""
        n_units, n_nodes = model.profile.spec.n_units, model.profile.n_nodes
        if isinstance(self._plan, Plan):
            self._plan.check(n_units, n_nodes)
            self._cuts = np.tile(np.array(self._plan.cuts, dtype=np.int64), (batch, 1))
            return
        if self._plan.shape != (batch, n_nodes - 1):
            raise ConfigError(
                f"static cuts must have shape {(batch, n_nodes - 1)}, got {self._plan.shape}"
            )
        self._cuts = self._plan

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        """The plan, and no probes: nothing here would use them."""
        return Decision(self._cuts)


class Solver:
    """Queue-aware: of the plans that can be served, that of lowest predicted cost.

    Hops that nothing measured for a while are probed (`idle_probes`).
    """

    def __init__(self, name: str = "solver") -> None:
        self.name = name

    def reset(self, model: CostModel, batch: int) -> None:
        """Decide for `model`'s system from now on."""
        self._model = model

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        """The cheapest candidate per environment."""
        return Decision(self.glance(state), idle_probes(state, self._model.scenario))

    def glance(self, state: SystemState) -> I64:
        """The cheapest candidate per environment."""
        cost, usable = self._model.predict(state).cost, self._model.usable(state)
        if usable is not None:
            cost = np.where(usable, cost, np.inf)
        best: I64 = self._model.table.cuts[cost.argmin(axis=1)]
        return best


@dataclass(frozen=True)
class ArmContext:
    """What an arm may need to be made.

    Attributes:
        model: The system's cost model.
        checkpoint: The trained policy; None when there is none.
        hindsight: Finds the best static plan of each environment on the very conditions of the
            comparison, cuts [B, H] (`agents.studies.compare.best_static_cuts`).
        foresight: Finds the cheapest sequence of plans on those conditions
            (`agents.arms.oracle.search`).
    """

    model: CostModel
    checkpoint: Checkpoint | None = None
    hindsight: Callable[[], I64] | None = None
    foresight: Callable[[], PlanSequence] | None = None


def _static(
    name: str, plan: Callable[[ModelSpec, int], Plan]
) -> Callable[[ArmContext], Controller]:
    def make(context: ArmContext) -> Controller:
        profile = context.model.profile
        return Static(name, plan(profile.spec, profile.n_nodes))

    return make


def _best_static(context: ArmContext) -> Controller:
    if context.hindsight is None:
        raise ConfigError("arm best-static needs a simulator to try every plan in; there is none")
    return Static("best-static", context.hindsight())


def _oracle(context: ArmContext) -> Controller:
    from agents.arms.oracle import Oracle

    if context.foresight is None:
        raise ConfigError("arm oracle needs a simulator whose future it can know; there is none")
    return Oracle(context.foresight())


def _linucb(context: ArmContext) -> Controller:
    from agents.arms.bandit import LinUCB

    return LinUCB()


def _predictive(context: ArmContext) -> Controller:
    from agents.arms.predictive import Predictive

    return Predictive()


def _mpc(context: ArmContext) -> Controller:
    from agents.arms.mpc import ModelPredictive

    return ModelPredictive()


def _paper(name: str, every: int | None, constrained: bool) -> Callable[[ArmContext], Controller]:
    def make(context: ArmContext) -> Controller:
        from agents.arms.paper import Paper, PaperSettings

        return Paper(PaperSettings(every_inferences=every, constrained=constrained), name)

    return make


def _trained(context: ArmContext) -> Checkpoint:
    if context.checkpoint is None:
        raise ConfigError(
            "the policy arms need a checkpoint; make one with "
            f"`python train.py --model {context.model.profile.spec.name}`"
        )
    return context.checkpoint


def _policy_zeroed(context: ArmContext) -> Controller:
    from agents.arms.runtime import PolicyController

    return PolicyController(_trained(context), zeroed=True)


def _policy_greedy(context: ArmContext) -> Controller:
    from agents.arms.runtime import PolicyController

    controller = PolicyController(_trained(context))
    controller.name = "policy-greedy"
    return controller


def _policy(context: ArmContext) -> Controller:
    from agents.arms.lookahead import Lookahead
    from agents.arms.runtime import PolicyController

    return PolicyController(_trained(context), ahead=Lookahead())


def _guarded(context: ArmContext) -> Controller:
    from agents.arms.guard import GuardedController
    from agents.arms.per_row import PerRow

    return PerRow("guarded", lambda: GuardedController(_policy(context)))


def _policy_all(context: ArmContext) -> Controller:
    from agents.arms.lookahead import Lookahead
    from agents.arms.policy_all import ScoringPolicy, scoring_controller
    from agents.cli import CHECKPOINTS

    return scoring_controller(ScoringPolicy.load(CHECKPOINTS / "all"), Lookahead())


ARMS: dict[str, Callable[[ArmContext], Controller]] = {
    "edge": _static("edge", edge_only),
    "fog": _static("fog", fog_only),
    "cloud": _static("cloud", cloud_only),
    "static": _static("static", static_thirds),
    "best-static": _best_static,
    "paper": _paper("paper", 100, False),
    "paper-1s": _paper("paper-1s", None, False),
    "paper-constrained": _paper("paper-constrained", 100, True),
    "paper-1s-constrained": _paper("paper-1s-constrained", None, True),
    "solver": lambda context: Solver(),
    "predictive": _predictive,
    "mpc": _mpc,
    "linucb": _linucb,
    "policy-zeroed": _policy_zeroed,
    "policy-greedy": _policy_greedy,
    "policy": _policy,
    "guarded": _guarded,
    "policy-all": _policy_all,
    "oracle": _oracle,
}


def make_arm(name: str, context: ArmContext) -> Controller:
    """The arm of that name.

    Raises:
        ConfigError: No such arm, or what it needs is missing from `context`.
    """
    if name not in ARMS:
        raise ConfigError(f"unknown arm {name!r}; expected one of {', '.join(ARMS)}")
    return ARMS[name](context)
