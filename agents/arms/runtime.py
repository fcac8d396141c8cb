"""The policy at work: state in, plan out, in numpy (importing this does not import torch)."""

from __future__ import annotations

import collections
import copy
import hashlib
import io
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agents.arms.controllers import Decision
from agents.arms.lookahead import Lookahead
from agents.arms.scoring import SCORING_ARRAYS, ScoringActor
from env.cost import References
from env.predict import CostModel
from env.state import HISTORY, Encoder, SystemState, idle_probes
from executor.errors import ConfigError
from executor.files import write_together
from executor.plan import Plan
from executor.profile import Profile

if TYPE_CHECKING:
    from env.system import StepResult

__all__ = [
    "Actor",
    "ActorController",
    "Checkpoint",
    "PolicyController",
    "PolicyNetwork",
    "ResidualActor",
    "base_of",
    "encoder_on",
    "metadata_text",
    "read_verified",
    "with_base",
]

log = logging.getLogger(__name__)

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
FORMAT_VERSION = 1
ARRAYS = ("w1", "b1", "w2", "b2", "w3", "b3", "tau")
BASE = "base_"


def with_base(arrays: Mapping[str, F32], base: Mapping[str, F32]) -> dict[str, F32]:
    """A policy's arrays with those of the policy for all models that it corrects."""
    return {**arrays, **{BASE + name: array for name, array in base.items()}}


def base_of(arrays: Mapping[str, F32]) -> dict[str, F32]:
    """The base's among a policy's arrays; empty if it has none."""
    return {k.removeprefix(BASE): array for k, array in arrays.items() if k.startswith(BASE)}


def encoder_on(model: CostModel, base: Mapping[str, F32]) -> Encoder:
    """The encoder for a policy that corrects `base`, or the solver where that is empty."""
    return Encoder(model, ScoringActor(model, base).excess if base else None)


class PolicyNetwork:
    """The actor: observation -> logits.

    Args:
        arrays: From `agents.learning.policy.export_arrays`: w1 [S, h], b1, w2 [h, h], b2,
            w3 [h, A], b3, tau [1], and those of its base (`with_base`), if it has one.
        zeroed: Leave all that was learned out (the solver remains).

    Attributes:
        base: The arrays of the policy for all models that this one corrects; empty where it
            corrects the solver.
    """

    def __init__(self, arrays: dict[str, F32], zeroed: bool = False) -> None:
        self._zeroed = zeroed
        self.load(arrays)

    def load(self, arrays: dict[str, F32]) -> None:
        """Go on with other weights of the same shapes."""
        self._a = arrays
        self.base = {} if self._zeroed else base_of(arrays)
        self._n_actions = arrays["w3"].shape[1]
        self._inverse_tau = np.float32(1.0) / arrays["tau"][0]

    def logits(self, observation: F32) -> F32:
        """Logits, shape [B, A], of observations [B, S]."""
        excess = observation[:, -self._n_actions :]
        prior: F32 = excess * -self._inverse_tau
        if self._zeroed:
            return prior
        a = self._a
        view = observation.copy()
        np.exp(-excess, out=view[:, -self._n_actions :])
        hidden = np.tanh(view @ a["w1"] + a["b1"])
        hidden = np.tanh(hidden @ a["w2"] + a["b2"])
        logits: F32 = hidden @ a["w3"] + a["b3"] + prior
        return logits


@dataclass(frozen=True)
class Checkpoint:
    """What `train.py` leaves in checkpoints/MODEL/ (beside policy.zip, which SB3 reads).

    Attributes:
        profile: The profile it was trained on.
        references: The frozen units of its cost.
        plans: The action space, in order.
        arrays: The actor's weights.
        metadata: Seeds, scenario, results: what metadata.json holds.
    """

    profile: Profile
    references: References
    plans: tuple[Plan, ...]
    arrays: dict[str, F32]
    metadata: dict[str, Any]

    def save(self, directory: Path, policy_zip: bytes | None = None) -> None:
        """Write policy.npz, profile.json, metadata.json and, if given, policy.zip.

        All are written aside before the first is renamed; metadata.json, which holds the others'
        digests, comes last.

        Raises:
            ConfigError: They cannot be written; what was there stays.
        """
        buffer = io.BytesIO()
        stored = with_base({k: self.arrays[k] for k in ARRAYS}, base_of(self.arrays))
        np.savez_compressed(buffer, allow_pickle=False, **stored)
        meta = {
            "format": FORMAT_VERSION,
            "model": self.profile.spec.name,
            "shape_digest": self.profile.shape_digest(),
            "plans": [list(p.cuts) for p in self.plans],
            "references": asdict(self.references),
            **self.metadata,
        }
        files = {"policy.npz": buffer.getvalue(), "profile.json": self.profile.to_json().encode()}
        if policy_zip is not None:
            files["policy.zip"] = policy_zip
        files["metadata.json"] = metadata_text(meta, files)
        write_together({directory / name: data for name, data in files.items()})

    @classmethod
    def load(cls, directory: Path, model: str | None = None) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            ConfigError: Missing, damaged, or made for another model or profile shape.
        """
        try:
            metadata = read_verified(directory, ("policy.npz", "profile.json", "policy.zip"))
            profile = Profile.load(directory / "profile.json")
            with np.load(directory / "policy.npz", allow_pickle=False) as file:
                arrays = {k: file[k] for k in ARRAYS}
                if any(k.startswith(BASE) for k in file.files):
                    arrays = with_base(arrays, {k: file[BASE + k] for k in SCORING_ARRAYS})
            references = References(**metadata["references"])
            plans = tuple(Plan(tuple(map(int, cuts))) for cuts in metadata["plans"])
            made_for, shape = metadata["model"], metadata["shape_digest"]
        except FileNotFoundError as error:
            raise ConfigError(
                f"no checkpoint in {directory} ({Path(error.filename).name} is missing); make one "
                f"with `python train.py --model {model or 'MODEL'}`"
            ) from error
        except (OSError, KeyError, TypeError, ValueError, EOFError) as error:
            raise ConfigError(f"checkpoint {directory} is not readable: {error!r}") from error
        if model is not None and made_for != model:
            raise ConfigError(
                f"checkpoint {directory} was made for {made_for}, not {model}; make one with "
                f"`python train.py --model {model}`"
            )
        if shape != profile.shape_digest():
            raise ConfigError(f"checkpoint {directory}: its profile.json belongs to another model")
        return cls(profile, references, plans, arrays, metadata)

    def check_fits(self, profile: Profile) -> None:
        """Raise ConfigError unless `profile` has the shape this policy was trained on."""
        if profile.shape_digest() != self.profile.shape_digest():
            raise ConfigError(
                f"the policy was trained for {self.profile.spec.name} with "
                f"{self.profile.spec.n_units} units on {self.profile.n_nodes} nodes, the running "
                f"nodes have {profile.spec.name} with {profile.spec.n_units} units on "
                f"{profile.n_nodes}; train again with `python train.py`"
            )


def metadata_text(metadata: dict[str, Any], files: Mapping[str, bytes]) -> bytes:
    """metadata.json's content, with the SHA-256 of these files and of the metadata itself."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    digests["metadata.json"] = _metadata_digest(metadata)
    return (json.dumps({**metadata, "sha256": digests}, indent=1) + "\n").encode()


def _metadata_digest(metadata: dict[str, Any]) -> str:
    """SHA-256 of the metadata without its digests, independent of spaces and order."""
    plain = {key: value for key, value in metadata.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_verified(directory: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Read metadata.json, and hold it and the files beside it against its digests.

    Raises:
        ConfigError: One is damaged or was changed.
        OSError: One cannot be read (a policy.zip may be missing: only further training needs it).
    """
    path = directory / "metadata.json"
    try:
        metadata = json.loads(path.read_text())
        digests = metadata.get("sha256")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"checkpoint file {path} is damaged: {error}") from error
    if digests is None:
        log.warning("checkpoint %s holds no digests: its files are not verified", directory)
        return dict(metadata)
    if not isinstance(digests, dict):
        raise ConfigError(f"checkpoint file {path} is damaged: sha256 is no table")
    for name in ("metadata.json", *names):
        if name == "metadata.json":
            found = _metadata_digest(metadata)
        elif name == "policy.zip" and not (name in digests and (directory / name).exists()):
            continue
        else:
            found = hashlib.sha256((directory / name).read_bytes()).hexdigest()
        if found != digests.get(name):
            raise ConfigError(
                f"checkpoint file {directory / name} is damaged or was changed: its SHA-256 is not "
                f"the one in metadata.json; restore it, or make a new one with train.py"
            )
    return dict(metadata)


class Actor(Protocol):
    """A policy that decides for one system; what it observes is its own affair.

    Attributes:
        encoder: Keeps the history.
    """

    encoder: Encoder

    def observe(self, history: F32, state: SystemState) -> Any:
        """What the policy sees; `history` [B, HISTORY * features] already holds `state`."""
        ...

    def logits(self, seen: Any) -> F32:
        """Logits of the candidate plans, [B, A]."""
        ...

    def lesson(self, seen: Any, plans: I64) -> tuple[NDArray[Any], ...]:
        """What learning needs to know of the plans tried, [B, K] (`agents.learning.hindsight`)."""
        ...


class ResidualActor:
    """The policy of one model (`agents.learning.policy`) as an `Actor`."""

    def __init__(self, model: CostModel, network: PolicyNetwork) -> None:
        self.encoder, self._network = encoder_on(model, network.base), network

    def observe(self, history: F32, state: SystemState) -> F32:
        """The observation, [B, size]."""
        return self.encoder.observe(history, state)

    def logits(self, seen: F32) -> F32:
        """Logits of the candidate plans, [B, A]."""
        return self._network.logits(seen)

    def lesson(self, seen: F32, plans: I64) -> tuple[F32, I64]:
        """The observation and the plans."""
        return seen, plans


class ActorController:
    """A policy as a controller.

    It was trained with states a fixed interval apart. Where decisions are closer together it sees,
    beside the newest state, those that lie so far apart.

    Args:
        name: The arm's name.
        make: The policy for a system.
        trained_s: The interval it was trained with; None for the system's own.
        ahead: How far it looks past the coming interval; None: not at all.
        tau: Units of cost per unit of logit, to look ahead with.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[CostModel], Actor],
        trained_s: float | None = None,
        ahead: Lookahead | None = None,
        tau: float = 1.0,
    ) -> None:
        self.name = name
        self._make, self._trained_s, self._ahead, self._tau = make, trained_s, ahead, tau

    def reset(self, model: CostModel, batch: int) -> None:
        """Start with an empty history; `model` is the running system's."""
        interval_s = model.scenario.interval_s
        trained_s = self._trained_s or interval_s
        known = model
        if trained_s != interval_s:
            scenario = model.scenario.replace(interval_s=trained_s)
            known = CostModel(model.profile, scenario, model.references)
        self._model, self._known, self._actor = model, known, self._make(known)
        self._apart = max(1, round(trained_s / interval_s))
        self._past: collections.deque[F32] = collections.deque(
            maxlen=(HISTORY - 1) * self._apart + 1
        )
        self._history = self._actor.encoder.new_history(batch)

    def decide(self, state: SystemState, last: StepResult | None = None) -> Decision:
        """Of the plans that can be served, that of highest logit per environment."""
        self._remember(state)
        cuts = self._best(self._history, state)
        return Decision(cuts, idle_probes(state, self._model.scenario))

    def glance(self, state: SystemState) -> I64:
        """As `decide`, with the newest state replaced by this one; nothing is remembered."""
        encoder = self._actor.encoder
        older = self._history[:, encoder.features :]
        history = np.concatenate([encoder.encode_state(state), older], axis=1)
        return self._best(history, state)

    def take(self, rows: I64) -> ActorController:
        """One that has seen what the environments `rows` of this one have."""
        taken = copy.copy(self)
        taken._past = collections.deque((x[rows] for x in self._past), self._past.maxlen)
        taken._history = self._history[rows]
        return taken

    def _best(self, history: F32, state: SystemState) -> I64:
        logits = self._actor.logits(self._actor.observe(history, state))
        usable = self._model.usable(state)
        if usable is not None:
            logits = np.where(usable, logits, -np.inf)
        if self._ahead is not None:
            logits = self._ahead.charge(self._known, state, logits, self._tau, usable)
        best: I64 = self._model.table.cuts[logits.argmax(axis=1)]
        return best

    def _remember(self, state: SystemState) -> None:
        """Take a state in: the newest, and those before it at the interval of the training."""
        if self._known.profile is not self._model.profile:  # that was recalibrated
            self._known.recalibrate(self._model.profile)
        encoder = self._actor.encoder
        if self._apart == 1:
            self._history = encoder.push(self._history, state)
            return
        self._past.append(encoder.encode_state(state))
        seen = list(self._past)[:: -self._apart]
        missing = [np.zeros_like(seen[0])] * (HISTORY - len(seen))
        self._history = np.concatenate([*seen, *missing], axis=1)


class PolicyController(ActorController):
    """The deployed policy of one model as a controller.

    Args:
        checkpoint: Weights and the profile they belong to.
        zeroed: Leave the learned correction out.
        ahead: How far it looks past the coming interval, as the arms `policy` and `guarded` do;
            None: not at all, as in training.
    """

    def __init__(
        self, checkpoint: Checkpoint, zeroed: bool = False, ahead: Lookahead | None = None
    ) -> None:
        self.checkpoint = checkpoint
        network = PolicyNetwork(checkpoint.arrays, zeroed)
        trained = checkpoint.metadata.get("scenario", {}).get("interval_s")
        super().__init__(
            "policy-zeroed" if zeroed else "policy",
            lambda model: ResidualActor(model, network),
            float(trained) if trained else None,
            ahead,
            float(checkpoint.arrays["tau"][0]),
        )

    def reset(self, model: CostModel, batch: int) -> None:
        """Start with an empty history.

        Raises:
            ConfigError: The policy was trained for another model, or for other plans.
        """
        self.checkpoint.check_fits(model.profile)
        if model.plans != self.checkpoint.plans:
            raise ConfigError(
                f"the policy chooses among {len(self.checkpoint.plans)} plans, this scenario "
                f"offers {len(model.plans)}; use the same `constrained` setting or train again"
            )
        super().reset(model, batch)
