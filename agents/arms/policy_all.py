"""The policy for all models (`agents.arms.scoring`): its file, and the controller that uses it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.arms.lookahead import Lookahead
from agents.arms.runtime import ActorController, metadata_text, read_verified
from agents.arms.scoring import N_NODES, SCORING_ARRAYS, ScoringActor
from agents.cli import CHECKPOINTS
from env.scenario import Scenario
from executor.errors import ConfigError
from executor.files import write_together

__all__ = ["ScoringPolicy", "load_base", "scoring_controller"]

F32 = NDArray[np.float32]
FORMAT_VERSION = 2


@dataclass(frozen=True)
class ScoringPolicy:
    """The policy on disk: policy.npz and metadata.json in one directory.

    Attributes:
        arrays: The network (`ScoringActor`).
        metadata: What it was trained on, and how it validated.
    """

    arrays: dict[str, F32]
    metadata: dict[str, Any]

    def save(self, directory: Path) -> None:
        """Write both files, or neither.

        Raises:
            ConfigError: They cannot be written; what was there stays.
        """
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer, allow_pickle=False, **{k: self.arrays[k] for k in SCORING_ARRAYS}
        )
        files = {"policy.npz": buffer.getvalue()}
        files["metadata.json"] = metadata_text({"format": FORMAT_VERSION, **self.metadata}, files)
        write_together({directory / name: data for name, data in files.items()})

    @classmethod
    def load(cls, directory: Path) -> ScoringPolicy:
        """Read it.

        Raises:
            ConfigError: Missing, damaged, or of another format.
        """
        try:
            metadata = read_verified(directory, ("policy.npz",))
            with np.load(directory / "policy.npz", allow_pickle=False) as file:
                arrays = {name: file[name] for name in SCORING_ARRAYS}
        except FileNotFoundError as error:
            raise ConfigError(
                f"no policy for all models in {directory} ({Path(error.filename).name} is "
                "missing); make one with `python -m agents.train_all`"
            ) from error
        except (OSError, KeyError, ValueError, EOFError) as error:
            raise ConfigError(f"policy {directory} is not readable: {error!r}") from error
        if metadata.get("format") != FORMAT_VERSION:
            raise ConfigError(
                f"policy {directory} has format {metadata.get('format')}, expected "
                f"{FORMAT_VERSION}; make it anew with `python -m agents.train_all`"
            )
        return cls(arrays, metadata)


def scoring_controller(policy: ScoringPolicy, ahead: Lookahead | None = None) -> ActorController:
    """The policy as a controller, for any model on three nodes.

    Args:
        policy: Its weights, and the interval it was trained with.
        ahead: How far it looks past the coming interval, as the arm `policy-all` does; None: not
            at all, as in training.
    """
    return ActorController(
        "policy-all",
        lambda model: ScoringActor(model, policy.arrays),
        policy.metadata.get("interval_s"),
        ahead,
        float(policy.arrays["tau"][0]),
    )


def load_base(text: str | None, scenario: Scenario) -> dict[str, F32]:
    """The arrays of the policy that --base names; empty for the solver.

    Raises:
        ConfigError: It was named and cannot be had, or decides for another number of nodes.
    """
    if text == "none" or (text is None and scenario.n_nodes != N_NODES):
        return {}
    if scenario.n_nodes != N_NODES:
        raise ConfigError(
            f"--base {text}: a policy for all models decides for {N_NODES} nodes, the scenario has "
            f"{scenario.n_nodes}; give --base none"
        )
    directory = CHECKPOINTS / "all" if text is None else Path(text)
    if text is None and not (directory / "policy.npz").exists():
        return {}
    return ScoringPolicy.load(directory).arrays
