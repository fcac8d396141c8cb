"""Writes small trace files."""

import numpy as np


def csv(path, header, rows):
    path.write_text("\n".join([header, *(",".join(map(repr, r)) for r in rows)]) + "\n")
    return path


def tiny_root(path):
    """A folder laid out like measured traces, two files of each source."""
    names = {
        "bandwidth": ["pam25drive_a-UL-1", "pam25drive_a-DL-1", "saturatr_X-down", "saturatr_X-up",
                      "ucc5g_d-DL", "nyumets_b", "hsdpa_bus-1-DL"],
        "rtt": ["p_atnt-1", "p_tmobile-1", "p_verizon-1"],
        "load": ["awsnab_a", "bitbrains_a"],
        "arrivals": ["nab_a", "azurellm23_a"],
    }  # fmt: skip
    column = {"bandwidth": "mbps", "rtt": "rtt_ms", "load": "load", "arrivals": "rate_rps"}
    rng = np.random.default_rng(0)
    for folder, files in names.items():
        (path / folder).mkdir()
        for name in files:
            rows = [(float(t), float(v)) for t, v in enumerate(rng.uniform(0.1, 1.0, 40))]
            csv(path / folder / f"{name}.csv", f"time_s,{column[folder]}", rows)
    return path
