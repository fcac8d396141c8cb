"""What fp16 and int8 transfers do to a model's output: `python -m executor.transfer --model M`.

Photographs that scikit-image ships are run whole in float32, and again with the activation at one
cut encoded and decoded (`executor.codec`), each cut and form in turn. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from executor.arguments import Parser
from executor.codec import TRANSFERS, Affine, as_float32, encode
from executor.errors import ConfigError, SplitpilotError
from executor.files import write_json
from executor.images import image_input
from executor.model import UnitChain, build_chain
from executor.networks import check_model
from executor.plan import candidate_cuts

__all__ = ["main", "measure", "photographs"]

_PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "rocket.jpg",
)
_FORMS = TRANSFERS[1:]


def photographs(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The photographs in scikit-image's package, as inputs of a shape, by name.

    They are read from the installed files: its `data` functions would download what is missing.

    Raises:
        ConfigError: scikit-image is not installed, or not with its photographs.
    """
    try:
        import skimage
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            "the photographs are scikit-image's: pip install 'splitpilot[photos]' "
            "(or pip install scikit-image)"
        ) from error
    folder = Path(skimage.__file__).parent / "data"
    inputs = {}
    for name in _PHOTOGRAPHS:
        try:
            with Image.open(folder / name) as image:
                inputs[name.partition(".")[0]] = image_input(image, shape)
        except OSError as error:
            raise ConfigError(f"scikit-image ships no readable {name}: {error}") from error
    return inputs


def measure(
    chain: UnitChain, inputs: Sequence[torch.Tensor], cuts: Sequence[int]
) -> list[dict[str, Any]]:
    """Errors of the output per cut and form, and what converting takes on this machine.

    Args:
        chain: The model.
        inputs: What is run.
        cuts: Where activations are converted, in 0..n - 1.

    Returns:
        Rows with `cut`, `form`, `bytes` and `float32_bytes`; of the relative errors `l2`
        (|y - y'| / |y|) and `max` (max |y - y'| / max |y|) the `mean_` and `worst_` over the
        inputs; `same_top1`, how many inputs keep their largest output; and `encode_ms`,
        `decode_ms`, medians. Where an input is refused (`executor.codec`): `refused`, the reason.
    """
    n = chain.spec.n_units
    outputs = [_numpy(chain.run(x.to(chain.device), 0, n)) for x in inputs]
    rows = []
    for cut in cuts:
        activations = [_numpy(chain.run(x.to(chain.device), 0, cut)) for x in inputs]
        for form in _FORMS:
            row = {"cut": cut, "unit": chain.spec.unit_names[cut], "form": form}
            try:
                row |= _errors(chain, cut, form, activations, outputs)
            except SplitpilotError as error:
                row["refused"] = str(error)
            rows.append(row)
    return rows


def _errors(
    chain: UnitChain,
    cut: int,
    form: str,
    activations: Sequence[NDArray[np.float32]],
    outputs: Sequence[NDArray[np.float32]],
) -> dict[str, Any]:
    l2, largest, encode_ms, decode_ms, same, n_bytes = [], [], [], [], 0, 0
    for x, y in zip(activations, outputs, strict=True):
        began_s = time.perf_counter()
        coded = encode(x, form)
        encoded_s = time.perf_counter()
        decoded = as_float32(coded)
        decode_ms.append(1e3 * (time.perf_counter() - encoded_s))
        encode_ms.append(1e3 * (encoded_s - began_s))
        n_bytes = (coded.body if isinstance(coded, Affine) else coded).nbytes
        z = _numpy(chain.run(torch.from_numpy(decoded), cut, chain.spec.n_units))
        l2.append(float(np.linalg.norm(z - y) / np.linalg.norm(y)))
        largest.append(float(np.abs(z - y).max() / np.abs(y).max()))
        same += int(z.argmax() == y.argmax())
    return {
        "bytes": n_bytes,
        "float32_bytes": chain.spec.cut_bytes[cut],
        "mean_l2": statistics.fmean(l2),
        "worst_l2": max(l2),
        "mean_max": statistics.fmean(largest),
        "worst_max": max(largest),
        "same_top1": same,
        "encode_ms": statistics.median(encode_ms),
        "decode_ms": statistics.median(decode_ms),
    }


def _numpy(y: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = y.cpu().numpy()
    return array


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (2: bad input, one line on stderr)."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except SplitpilotError as error:
        print(f"executor.transfer: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    check_model(args.model)
    torch.set_num_threads(1)
    chain = build_chain(args.model, args.weights)
    cuts = _cuts(args.cuts, chain)
    inputs = photographs(chain.spec.input_shape)
    rows = measure(chain, list(inputs.values()), cuts)
    trained = args.weights != "none"
    if not trained:
        for row in rows:
            row.pop("same_top1", None)  # of random weights it says nothing
    weights = (
        f"weights {args.weights}"
        if trained
        else "random weights (--weights none): errors are of these; no top-1 agreement is given"
    )
    print(f"{chain.spec.name}, {len(inputs)} photographs of scikit-image, {weights}")
    print(_table(rows, len(inputs), trained))
    if args.json is not None:
        write_json(
            args.json,
            {
                "model": chain.spec.name,
                "weights": args.weights,
                "digest": chain.digest,
                "photographs": list(inputs),
                "rows": rows,
            },
        )
    return 0


def _cuts(text: str | None, chain: UnitChain) -> list[int]:
    n = chain.spec.n_units
    if text is None:
        return [cut for cut in candidate_cuts(chain.spec) if cut < n]
    try:
        cuts = [int(part) for part in text.split(",")]
    except ValueError:
        cuts = []
    if not cuts or not all(0 <= cut < n for cut in cuts):
        raise ConfigError(f"--cuts must be cuts of {chain.spec.name} in 0..{n - 1}, got {text!r}")
    return cuts


def _table(rows: Sequence[dict[str, Any]], n_inputs: int, trained: bool) -> str:
    """The rows as text; errors in per cent."""
    head = f"{'cut':>4} {'form':<5} {'bytes':>9} {'saved':>6} {'L2 %':>9} {'worst':>9} {'max %':>9}"
    head += f" {'worst':>9} {'enc ms':>7} {'dec ms':>7}" + ("  top-1" if trained else "")
    lines = [head]
    for row in rows:
        begin = f"{row['cut']:>4} {row['form']:<5} "
        if "refused" in row:
            lines.append(begin + f"refused: {row['refused']}")
            continue
        errors = (row[k] for k in ("mean_l2", "worst_l2", "mean_max", "worst_max"))
        line = f"{row['bytes']:>9} {1 - row['bytes'] / row['float32_bytes']:>6.1%} "
        line += " ".join(f"{100 * error:>9.4f}" for error in errors)
        line += f" {row['encode_ms']:>7.3f} {row['decode_ms']:>7.3f}"
        lines.append(begin + line + (f"  {row['same_top1']}/{n_inputs}" if trained else ""))
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m executor.transfer", description=__doc__)
    parser.add_argument("--model", required=True, help="as in the cluster file")
    parser.add_argument("--weights", default="none", help="none (random), DEFAULT or a file")
    parser.add_argument("--cuts", help="comma-separated (default: the candidates)")
    parser.add_argument("--json", type=Path, help="write the results here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
