"""This executor, its floor and its peers, in turns: `python -m executor.bench`.

Echoes of tensors through three processes, then split models, all on loopback and with one thread
per process, then a short part over shaped hops. Exit code 1 if an output was wrong, 2 for a wrong
argument.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor.arguments import Parser
from executor.errors import ConfigError, SplitpilotError
from executor.figures import load_pyplot
from executor.files import write_json

if TYPE_CHECKING:
    from executor.bench.cases import Case

_SIZES_KIB = (4, 64, 512, 1024, 3072, 12288)
_MODELS = ("alexnet", "mobilenet_v2", "vgg16")
_IN_FLIGHT = (1, 4, 8)
_CASE_LIMIT_S = 120.0
_LONG_REQUEST_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        _check(args)
        return _run(args)
    except SplitpilotError as error:
        print(f"executor.bench: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m executor.bench", description=__doc__)
    add = parser.add_argument
    add("--model", action="append", help="model to split; may be repeated (alexnet)")
    add("--full", action="store_true", help="all three models, and more of everything")
    add("--rounds", type=int, help="requests per system and case, one at a time (60)")
    add("--seconds", type=float, help="no further round of a case begins after these (12)")
    add("--sizes", help="sizes to echo in KiB, e.g. 4,64,1024; none for no echo")
    add("--systems", help="what to compare, e.g. executor,grpc (all that can run here)")
    add("--long", type=int, metavar="N", help="instead: N requests, another plan every 50")
    add("--memory", action="store_true", help="instead: memory of real nodes, on every backend")
    add("--backends", help="for --memory, e.g. eager,onnx (all that can run here)")
    add("--json", type=Path, help="write the figures here")
    add("--plot", type=Path, help="draw the comparison here (PNG, SVG, PDF)")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Fill in what was not given, and refuse what cannot be run.

    Raises:
        ConfigError: An argument is wrong.
    """
    args.model = args.model or list(_MODELS if args.full else _MODELS[:1])
    args.rounds = (200 if args.full else 60) if args.rounds is None else args.rounds
    args.seconds = (90.0 if args.full else 12.0) if args.seconds is None else args.seconds
    if args.rounds < 2:
        raise ConfigError(f"--rounds must be at least 2, got {args.rounds}")
    if not 0 < args.seconds <= 3600:
        raise ConfigError(f"--seconds must be in 0..3600, got {args.seconds:g}")
    if args.long is not None and args.long < 1:
        raise ConfigError(f"--long must be at least 1, got {args.long}")
    args.sizes = _sizes(args.sizes)
    for path in (args.json, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"cannot write {path}: there is no folder {path.absolute().parent}")
    if args.plot is not None:
        load_pyplot()  # missing, it is missed before anything is measured


def _sizes(text: str | None) -> list[int]:
    """Sizes in bytes."""
    if text == "none":
        return []
    words = text.split(",") if text is not None else _SIZES_KIB
    try:
        sizes = [int(word) for word in words]
    except ValueError:
        sizes = [0]
    if not all(1 <= size <= 48 * 1024 for size in sizes):
        raise ConfigError(f"--sizes must be whole KiB in 1..49152, or none; got {text!r}")
    return [1024 * size for size in sizes]


def _run(args: argparse.Namespace) -> int:
    import torch

    from executor.bench.hosts import in_process
    from executor.bench.measure import Effort, run_case
    from executor.bench.report import facts, plot, summary, table
    from executor.bench.systems import find_systems
    from executor.networks import check_model

    for model in args.model:
        check_model(model)
    if args.long is not None:
        return _run_long(args)
    if args.memory:
        return _run_memory(args)
    systems, missing = find_systems()
    if args.systems is not None:
        known = {name.replace(" ", "-"): name for name in (*systems, *missing)}
        asked = args.systems.split(",")
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise ConfigError(f"unknown system {unknown[0]!r}; known: {', '.join(known)}")
        names = [known[name] for name in asked]
        systems = {name: systems[name] for name in names if name in systems}
        missing = {name: missing[name] for name in names if name in missing}
    if not systems:
        raise ConfigError(f"nothing to measure; {missing}")
    for name, why in missing.items():
        print(f"{name} skipped: {why}", flush=True)
    torch.set_num_threads(1)
    effort = Effort(args.rounds, args.seconds)
    limit_s = _CASE_LIMIT_S + 10 * args.seconds
    done: list[dict[str, Any]] = []
    for case in _cases(args):
        done.append(summary(in_process(partial(run_case, case, systems, effort), limit_s)))
        print(table(done[-1:]), flush=True)
    _store({"facts": facts(), "missing": missing, "cases": done}, args.json)
    if args.plot is not None:
        plot(done, args.plot)
    wrong = sum(s["wrong"] for case in done for s in case["systems"].values())
    if wrong:
        print(f"executor.bench: {wrong} outputs were wrong", file=sys.stderr)
    return 1 if wrong else 0


def _run_long(args: argparse.Namespace) -> int:
    """The long run of the first model; returns the exit code."""
    import torch

    from executor.bench.cases import build_model, model_case
    from executor.bench.hosts import in_process
    from executor.bench.longrun import describe, run_long

    torch.set_num_threads(1)
    case = model_case(build_model(args.model[0]), 3)
    limit_s = _CASE_LIMIT_S + _LONG_REQUEST_S * args.long
    result = in_process(lambda: run_long(case, args.long), limit_s)
    print(describe(result))
    _store(result, args.json)
    return 1 if result["wrong"] else 0


def _run_memory(args: argparse.Namespace) -> int:
    """What each model costs a node; returns the exit code."""
    from executor.backends import available_backends
    from executor.bench.memory import describe_memory, run_memory

    usable = available_backends()
    backends = args.backends.split(",") if args.backends else usable
    for name in backends:
        if name not in usable:
            raise ConfigError(f"backend {name!r} cannot be used here; {', '.join(usable)} can")
    result = run_memory(args.model, backends)
    print(describe_memory(result))
    _store(result, args.json)
    return 0


def _store(result: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        write_json(path, result)


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    """The cases, made when their turn comes."""
    from executor.bench.cases import build_model, echo_case, model_case
    from executor.testbed import DEFAULT_HOPS

    for n_bytes in args.sizes:
        yield echo_case(n_bytes)
    for number, model in enumerate(args.model):
        chain = build_model(model)
        yield model_case(chain, 2, _IN_FLIGHT if args.full else ())
        three = model_case(chain, 3, _IN_FLIGHT if args.full or number == 0 else ())
        yield three
        if number == 0:
            yield three.shaped(DEFAULT_HOPS)


if __name__ == "__main__":
    # Read by the libraries that torch brings when they are loaded, so before that.
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "GRPC_VERBOSITY": "NONE"}
    sys.exit(main())
