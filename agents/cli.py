"""What the commands share: arguments, one-line errors, progress bars."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from env.scenario import Scenario
from executor.arguments import Parser
from executor.codec import TRANSFERS, parse_transfers
from executor.errors import ConfigError, SplitpilotError
from executor.logs import add_log_arguments, configure_logging
from executor.modelref import model_label
from executor.profile import Profile

__all__ = [
    "CHECKPOINTS",
    "MODEL_HELP",
    "Parser",
    "add_base_argument",
    "add_transfer_argument",
    "load_profile",
    "model_argument",
    "numbers",
    "progress",
    "run_command",
    "run_study",
    "transfers",
]

# What writing meets on a full or read-only disk, in a library's hands too (TensorBoard's files).
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
MODEL_HELP = "a torchvision classification model's name, or FILE.py:FUNCTION"
CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"


def model_argument(name: str) -> str:
    """An argument type: a torchvision classification model, or FILE.py:FUNCTION made absolute."""
    from executor.networks import check_model

    try:
        return check_model(name)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def load_profile(path: Path, model: str, scenario: Scenario) -> Profile:
    """A model's stored profile.

    Raises:
        ConfigError: It is unreadable, of another model, or of another number of nodes.
    """
    profile = Profile.load(path)
    if profile.spec.name != model_label(model):
        raise ConfigError(f"profile {path} is of {profile.spec.name}, not {model}")
    if profile.n_nodes != scenario.n_nodes:
        raise ConfigError(
            f"profile {path} has {profile.n_nodes} nodes, the scenario {scenario.n_nodes}"
        )
    return profile


def add_base_argument(parser: argparse.ArgumentParser) -> None:
    """--base, of commands that train a model's own policy (`agents.arms.policy_all.load_base`)."""
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="start from this policy for all models (agents.train_all), or from the solver: none "
        "(default: checkpoints/all on three nodes, else none)",
    )


def positive_float(text: str) -> float:
    """An argument type: a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def positive_int(text: str) -> int:
    """An argument type: a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def add_transfer_argument(parser: argparse.ArgumentParser) -> None:
    """The option of commands that start a testbed; `transfers` reads it."""
    parser.add_argument(
        "--transfer",
        help=f"testbed only: how activations cross the hops, {', '.join(TRANSFERS)}, or one per "
        "hop like fp16,int8 (docs/transfer.md; default: float32). It is profiled, so that solver "
        "and simulator know it. On a cluster set `transfer` in cluster.toml",
    )


def transfers(text: str | None, n_hops: int, testbed: bool, instead: str) -> tuple[str, ...]:
    """Per hop, the transfer that --transfer names; none where it was not given.

    Args:
        text: What was given.
        n_hops: Hops of the chain.
        testbed: Whether a testbed is started, which alone can be told.
        instead: What to do where none is.

    Raises:
        ConfigError: An unknown transfer, not one per hop, or no testbed.
    """
    if text is None:
        return ()
    if not testbed:
        raise ConfigError(f"--transfer is of the testbed; {instead}")
    return parse_transfers(text, n_hops)


def numbers(
    option: str, text: str | None, what: str, example: str, most: float = float("inf")
) -> list[float]:
    """An option's comma-separated numbers, all different; none where it was not given.

    Args:
        option: Its name, "--rates".
        text: What was given.
        what: What the numbers are: "seconds".
        example: Such numbers.
        most: They lie between 0 and this, both left out.

    Raises:
        ConfigError: They are not; says what was expected.
    """
    if text is None:
        return []
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} must be {what} like {example}, got {text!r}") from error
    if not all(0 < x < most for x in values) or len(set(values)) < len(values):
        raise ConfigError(f"{option} must be different {what} above 0, got {text!r}")
    return values


def run_study(
    module: str,
    parser: argparse.ArgumentParser,
    main: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
) -> int:
    """Run a command that writes down how it was called (`args.command`).

    Args:
        module: "agents.chains".
        parser: Of its arguments; those of logging are added.
        main: Runs it; returns the exit code.
        argv: Its words; the process's own when None.
    """
    add_log_arguments(parser)
    args = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    args.command = " ".join([f"python -m {module}", *words])
    configure_logging(args)
    return run_command(lambda: main(args))


def run_command(main: Callable[[], int]) -> int:
    """Run a command; a bad setting is one line and exit code 2, Ctrl-C is 130."""
    try:
        return main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SplitpilotError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _FULL:
            raise
        print(
            f"error: cannot write {error.filename or 'a file'}: {error.strerror}", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


@contextmanager
def progress(console: Console | None = None) -> Iterator[Progress]:
    """A progress display with a description, a bar, a note and the time taken."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield bar
