"""What the compute backends gain over eager torch, whole and split, and the memory they take.

python benchmarks/backends.py

One thread. Passes of all backends take turns, and CPU seconds of the computing thread are compared,
so that other work on the machine hits all alike. "Kept" is the split model's speed-up over the
split eager model, as a share of the whole model's; for onnx the whole model is one session that
fuses across all units, as who uses onnxruntime alone would have it. Memory is the anonymous
resident memory of a fresh process that served three passes, less that of one that only imported
torch, torchvision and onnxruntime.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from executor.backends import available_backends, build_backend, onnx_unit
from executor.model import MODELS, UnitChain, model_spec, sample_input, unit_costs


def pass_s(chain: UnitChain, x: torch.Tensor, cuts: tuple[int, ...]) -> float:
    """CPU seconds of one pass, each stage on bytes as from the wire."""
    total_s = 0.0
    for start, stop in pairwise(cuts):
        begun_s = time.thread_time()
        x = chain.run(x, start, stop)
        total_s += time.thread_time() - begun_s
        x = x.clone()
    return total_s


def compare(model: str, rounds: int) -> None:
    spec = model_spec(model)
    n = spec.n_units
    cuts = {"whole": (0, n), "split": (0, *spec.static_plan, n)}
    chains = {name: build_backend(name, model)[0] for name in available_backends()}
    x = sample_input(0, spec.input_shape)
    if "onnx" in chains:
        chains["single"] = single_session(chains["eager"], x)
    taken: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds + 1):
        for name, chain in chains.items():
            for form, at in cuts.items() if name != "single" else [("whole", (0, 1))]:
                taken.setdefault((name, form), []).append(pass_s(chain, x, at))
    ms = {key: 1e3 * statistics.median(times[1:]) for key, times in taken.items()}
    weights_mib = sum(cost.param_bytes for cost in unit_costs(model)) / 2**20
    base_kib = resident_kib("", "")
    print(f"{model}: split at {spec.static_plan}, weights {weights_mib:.0f} MiB")
    for name in available_backends():
        reference = "single" if name == "onnx" else name
        whole = ms["eager", "whole"] / ms[reference, "whole"]
        split = ms["eager", "split"] / ms[name, "split"]
        held_mib = (resident_kib(name, model) - base_kib) / 1024
        print(
            f"  {name:6} whole {ms[reference, 'whole']:7.1f} ms ({whole:.2f} x)  "
            f"split {ms[name, 'split']:7.1f} ms ({split:.2f} x)  kept {split / whole:4.0%}  "
            f"memory {held_mib:4.0f} MiB (bound {1.2 * weights_mib + 100:.0f})",
            flush=True,
        )


class WholeModel(UnitChain):
    """A chain of one unit that is the whole model."""

    def run(
        self,
        x: torch.Tensor,
        start: int,
        stop: int,
        is_wanted: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """All of it."""
        with torch.inference_mode():
            y: torch.Tensor = self.units[0](x)
            return y


def single_session(chain: UnitChain, x: torch.Tensor) -> UnitChain:
    return WholeModel.like(chain, [onnx_unit(nn.Sequential(*chain.units), x)])


def resident_kib(backend: str, model: str) -> int:
    """Anonymous resident memory of a fresh process with the model, or with none."""
    command = [sys.executable, __file__, "--resident", backend, model]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def print_resident(backend: str, model: str) -> None:
    torch.set_num_threads(1)
    if model:
        chain, _ = build_backend(backend, model)
        x = sample_input(0, chain.spec.input_shape)
        for _ in range(3):
            chain.run(x, 0, chain.spec.n_units)
    else:
        model_spec("alexnet")
        if "onnx" in available_backends():
            __import__("onnx")
            __import__("onnxruntime")
    with open("/proc/self/status", encoding="ascii") as file:
        print(next(int(line.split()[1]) for line in file if line.startswith("RssAnon")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--resident", nargs=2, metavar=("BACKEND", "MODEL"), help="for itself")
    args = parser.parse_args()
    if args.resident:
        print_resident(*args.resident)
        return
    torch.set_num_threads(1)
    for model in args.models:
        compare(model, args.rounds)


if __name__ == "__main__":
    main()
