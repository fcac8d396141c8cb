"""Fits the shipped generators to measured traces: `python benchmarks/fit_generators.py TRACES`.

TRACES holds bandwidth/, rtt/, load/ and arrivals/ (formats: `env.traces`). Writes
`env/generators.toml` (or `--out`) and prints, per generator, the traces' statistics beside its own.

A generator is a Markov-modulated log-normal with outages, fitted by moments of the logarithm:
- outages: rate, mean length and mean value of the stretches below 1 % of the mean (of a delay:
  above 5 x the median);
- the autocorrelation of the rest at lags up to 60 samples is matched by a slow and a fast
  exponential; the slow one's time constant is the regimes' dwell time, the fast one is the noise;
- the regimes are equally likely; their levels are the means of as many equal parts of the sorted
  logarithms, drawn together so that levels and noise have the traces' log-variance, then scaled to
  the traces' mean.
Loads have additive noise; arrivals are in multiples of each trace's mean. Data with a step longer
than 1 s are sped up by TIME_SCALE.

With `--mahimahi DIR` (packet-by-packet recordings) the white part of sub-second jitter is fitted
too: the within-second variance of 50 ms means beyond what extrapolating the 1 s means explains.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from env._play import Jitter, fit_jitter, played
from env.conditions import Conditions
from env.generators import FILE, jitter_constants
from env.scenario import HopSetup, NodeSetup, Process, Scenario
from env.traces import Trace, load_traces
from executor.errors import ConfigError

F64 = NDArray[np.float64]

TIME_SCALE = 60.0
LAGS = np.array([1, 2, 3, 5, 8, 12, 20, 30, 45, 60])
REGIMES = 12
CELL_S = 0.05
NOTHING = 0.01  # of the mean: an outage
SPIKE = 5.0  # times the median: a delay's outage
# name: (folder, file pattern, quantity)
FAMILIES = {
    "hsdpa-dl": ("bandwidth", "hsdpa_*", "mbps"),
    "nyumets-ul": ("bandwidth", "nyumets_*", "mbps"),
    "pam25drive-dl": ("bandwidth", "pam25drive_*-DL-*", "mbps"),
    "pam25drive-ul": ("bandwidth", "pam25drive_*-UL-*", "mbps"),
    "saturatr-dl": ("bandwidth", "saturatr_*-down*", "mbps"),
    "saturatr-ul": ("bandwidth", "saturatr_*-up*", "mbps"),
    "ucc5g-dl": ("bandwidth", "ucc5g_*", "mbps"),
    "rtt-atnt": ("rtt", "*_atnt-*", "rtt_ms"),
    "rtt-tmobile": ("rtt", "*_tmobile-*", "rtt_ms"),
    "rtt-verizon": ("rtt", "*_verizon-*", "rtt_ms"),
    "load-awsnab": ("load", "awsnab_*", "load"),
    "load-bitbrains": ("load", "bitbrains_*", "load"),
    "arrivals-azurellm23": ("arrivals", "azurellm23_*", "rate_rps"),
    "arrivals-nab": ("arrivals", "nab_*", "rate_rps"),
}


def correlations(series: Sequence[F64], lags: Iterable[int]) -> F64:
    """Autocorrelation about the pooled mean; NaN marks what does not count."""
    mean, variance = np.nanmean(np.concatenate(series)), np.nanvar(np.concatenate(series))
    out = []
    for lag in lags:
        products = np.concatenate(
            [(x[lag:] - mean) * (x[:-lag] - mean) for x in series if len(x) > lag]
        )
        out.append(np.nanmean(products) / max(variance, 1e-12))
    return np.array(out)


def two_exponentials(correlation: F64, dt_s: float) -> tuple[float, float, float]:
    """Share and time constant of the slow part, and the fast one's, by search over a grid."""
    best = (np.inf, 1.0, 1.0, 1.0)
    t = LAGS * dt_s
    for slow in np.geomspace(5.0, 120.0, 24):
        for fast in np.geomspace(0.4, 4.0, 12):
            a, b = np.exp(-t / slow), np.exp(-t / fast)
            # share * a + (1 - share) * b = correlation, least squares in the share
            share = float(np.clip((correlation - b) @ (a - b) / ((a - b) @ (a - b)), 0.05, 0.98))
            error = float(np.sum((share * a + (1 - share) * b - correlation) ** 2))
            if error < best[0]:
                best = (error, share, float(slow), float(fast))
    return best[1:]


def fit(traces: Sequence[Trace], quantity: str) -> dict[str, Any]:
    """A generator's parameters."""
    series = [played(t) for t in traces]
    dt_s = traces[0].dt_s / (TIME_SCALE if traces[0].dt_s > 1 else 1.0)
    multiplicative = quantity != "load"
    everything = np.concatenate(series)
    out = [outages(x, everything, quantity) for x in series]
    away = np.concatenate(out)
    within = [np.where(o, np.nan, x) for x, o in zip(series, out, strict=True)]
    values = np.sort(everything[~away])
    if multiplicative:
        values = np.log(values)
    share, dwell_s, correlation_s = two_exponentials(correlations(within, LAGS), dt_s)
    parts = np.array([part.mean() for part in np.array_split(values, REGIMES)])
    result: dict[str, Any] = {"maximum": 1.0}
    if multiplicative:
        pull = np.sqrt(share * values.var() / parts.var())
        sigma = float(np.sqrt((1.0 - share) * values.var()))
        levels = np.exp(parts.mean() + min(pull, 1.0) * (parts - parts.mean()))
        levels *= everything[~away].mean() / levels.mean()
        result["maximum"] = float(everything[~away].max())
    else:
        levels = parts
        # Additive; the levels have the whole spread already.
        sigma = 0.5 * float(np.sqrt((1.0 - share) * values.var()))
    result["minimum"] = 0.0 if away.any() or not multiplicative else float(everything.min())
    result |= {
        "levels": [float(f"{x:.4g}") for x in levels],
        "dwell_s": dwell_s,
        "sigma": sigma,
        "correlation_s": correlation_s,
        "log": multiplicative,
    }
    if away.any():
        starts = sum(int(np.sum(o[1:] & ~o[:-1])) + int(o[0]) for o in out)
        result["outage_per_s"] = starts / (np.sum(~away) * dt_s)
        result["outage_s"] = np.sum(away) * dt_s / starts
        result["outage_value"] = float(everything[away].mean())
        result["maximum"] = max(result["maximum"], result["outage_value"])
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}


def outages(values: F64, everything: F64, quantity: str) -> NDArray[np.bool_]:
    """Where a series is out: next to nothing of a rate; far above the usual of a delay."""
    if quantity == "load":
        return np.zeros(len(values), dtype=bool)
    if quantity == "rtt_ms":
        return values > SPIKE * np.median(everything)
    below: NDArray[np.bool_] = values < NOTHING * everything.mean()
    return below


def generated(parameters: dict[str, Any], quantity: str, dt_s: float, count: int) -> list[F64]:
    """Means over `dt_s` of what a generator draws in `count` environments."""
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in parameters.items()
    }
    process = Process("markov", **values)
    nodes = tuple(NodeSetup(f"n{k}", "pi4") for k in range(2))
    hop = HopSetup(process if quantity == "mbps" else Process(levels=(1.0,)))
    if quantity == "rtt_ms":
        hop = HopSetup(Process(levels=(1.0,)), process)
    if quantity in ("load", "rate_rps"):
        # Either is a process like a bandwidth, whose values are not clipped further.
        hop = HopSetup(process)
    scenario = Scenario(nodes=nodes, hops=(hop,), interval_s=dt_s, substep_s=0.1)
    conditions = Conditions(scenario, np.full(count, 1e-3), 0)
    drawn = [conditions.next() for _ in range(600)]
    if quantity == "rtt_ms":
        rows = np.stack([c.hop_delay_s[:, 0].mean(axis=1) for c in drawn], axis=1)
    else:
        rows = np.stack([c.hop_bytes_per_s[:, 0].mean(axis=1) * 8e-6 for c in drawn], axis=1)
    return list(rows)


def describe(series: Sequence[F64]) -> str:
    """Mean, deviation, autocorrelation at lags 1 and 5, share below 1 % of the mean, quantiles."""
    x = np.concatenate(series)
    first, fifth = correlations(series, [1, 5])
    quantiles = " ".join(f"{q:8.3g}" for q in np.quantile(x, [0.05, 0.25, 0.5, 0.75, 0.95]))
    out = np.mean(x < NOTHING * x.mean())
    return f"{x.mean():8.3g} {x.std():8.3g} {first:6.2f} {fifth:6.2f} {out:6.3f} {quantiles}"


def white_sigma(traces: Sequence[Trace]) -> float:
    """The white part of jitter from native recordings: median over the recordings.

    Of each: the mean squared relative deviation of 50 ms means from their second's mean, less what
    the process fitted to the 1 s means has; as the sigma of a log-normal.
    """
    cells, rng, excess = round(1.0 / CELL_S), np.random.default_rng(0), []
    print(f"{'within-second std of 50 ms means':34s} {'native':>7s} {'extrapolated':>13s}")
    for trace in traces:
        n = len(trace.values) // 1000
        fine = trace.values[: 1000 * n].reshape(n * cells, -1).mean(axis=1).reshape(n, cells)
        seconds = fine.mean(axis=1)
        live = seconds > 0
        native = np.mean((fine[live] / seconds[live, None]).var(axis=1))
        process = fit_jitter([seconds])
        explained = _within(process, cells, rng)
        excess.append(max(0.0, native - explained))
        print(f"{trace.name:34s} {np.sqrt(native):7.2f} {np.sqrt(explained):13.2f}")
    return float(np.sqrt(np.log1p(np.median(excess))))


def _within(process: Jitter, cells: int, rng: np.random.Generator) -> float:
    """Mean relative variance within a sample of an Ornstein-Uhlenbeck log-normal."""
    x = rng.standard_normal(20000) * process.sigma
    decay, rows = np.exp(-process.rate / cells), []
    for _ in range(cells):
        rows.append(np.exp(x))
        x = decay * x + process.sigma * np.sqrt(1 - decay**2) * rng.standard_normal(len(x))
    y = np.array(rows)
    return float(np.mean((y / y.mean(axis=0)).var(axis=0)))


def toml(jitter: dict[str, float], generators: dict[str, dict[str, Any]]) -> str:
    """The file's text."""
    lines = [
        "# Written by benchmarks/fit_generators.py from measured traces; see docs/traces.md for",
        "# their sources and how well each generator resembles them. Fields: env.scenario.Process.",
        "# Bandwidth in Mbit/s, rtt-* one-way delay in s, arrivals-* in multiples of the mean;",
        "# load-* and arrivals-nab are 5-minute data sped up 60 times.",
        "",
        "[jitter]",
        *(f"{k} = {v:.4g}" for k, v in jitter.items()),
    ]
    for name, parameters in generators.items():
        lines += ["", f"[generators.{name}]"]
        for key, value in parameters.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            lines.append(f"{key} = {text}")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, help="folder with bandwidth/, rtt/, load/, arrivals/")
    parser.add_argument("--mahimahi", type=Path, help="folder of mahimahi files, for the jitter")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    constants = jitter_constants()
    jitter = {"cell_s": constants.cell_s, "white_sigma": constants.white_sigma}
    generators: dict[str, dict[str, Any]] = {}
    try:
        if args.mahimahi is not None:
            jitter = {
                "cell_s": CELL_S,
                "white_sigma": white_sigma(load_traces(str(args.mahimahi), "mbps")),
            }
            print(f"white sigma per {CELL_S:g} s cell: {jitter['white_sigma']:.3f}\n")
        print(
            f"{'':32s} {'mean':>8s} {'std':>8s} {'ac1':>6s} {'ac5':>6s} {'out':>6s} "
            + " ".join(f"{q:>8s}" for q in ("5 %", "25 %", "50 %", "75 %", "95 %"))
        )
        for name, (folder, pattern, quantity) in FAMILIES.items():
            traces = load_traces(str(args.traces / folder / f"{pattern}.csv"), quantity)
            generators[name] = fit(traces, quantity)
            dt_s = traces[0].dt_s / (TIME_SCALE if traces[0].dt_s > 1 else 1.0)
            drawn = generated(generators[name], quantity, dt_s, 64)
            print(f"{name:20s} {len(traces):3d} traces {describe([played(t) for t in traces])}")
            print(f"{'':20s}   generator {describe(drawn)}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.write_text(toml(jitter, generators))
    return 0


if __name__ == "__main__":
    sys.exit(main())
