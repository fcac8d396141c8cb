"""What transfers other than float32 change of a plan's demand: sizes, and seconds of conversion.

The rule is the executor's (`executor._compute`, `executor._nodecore`): a node encodes what it sends
down in the form of its hop, unless it only passes on what came encoded already; a node that runs
units decodes what it gets.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from executor.codec import TRANSFERS
from executor.profile import Profile

__all__ = ["TransferCosts", "transfer_costs"]

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]


def transfer_costs(profile: Profile) -> TransferCosts | None:
    """The costs of a profile's transfers; None where all are float32."""
    return TransferCosts(profile) if set(profile.transfers) != {"float32"} else None


class TransferCosts:
    """Sizes and seconds, for plans `cuts` [..., H] on N nodes.

    Attributes:
        most_s: [N] most seconds that one request's conversions can take on a node.
    """

    def __init__(self, profile: Profile) -> None:
        n, n_nodes = profile.spec.n_units, profile.n_nodes
        self._n, self._n_nodes = n, n_nodes
        self._form_of_hop = np.array([TRANSFERS.index(t) for t in profile.transfers])
        self._bytes: F64 = np.tile(profile.cut_bytes(), (len(TRANSFERS), 1))
        self._encode_s, self._decode_s = np.zeros((2, n_nodes, len(TRANSFERS), n + 1))
        for k, node in enumerate(profile.nodes):
            for c in node.conversions:
                form = TRANSFERS.index(c.form)
                self._bytes[form, :n] = c.cut_bytes
                self._encode_s[k, form, :n] = c.encode_s
                self._decode_s[k, form, :n] = c.decode_s
        self.most_s: F64 = self._encode_s.max(axis=(1, 2)) + self._decode_s.max(axis=(1, 2))

    def hop_bytes(self, cuts: I64) -> F64:
        """Bytes that cross each hop [..., H]; where it is not crossed, those of the output."""
        size: F64 = self._bytes[self._forms(cuts), cuts]
        return size

    def node_s(self, cuts: I64) -> tuple[F64, Mask]:
        """Seconds of conversion, and whether the request has a job at all, both [..., N]."""
        forms = self._forms(cuts)
        seconds = np.zeros((*cuts.shape[:-1], self._n_nodes))
        visited = np.zeros(seconds.shape, dtype=bool)
        before: I64 = np.zeros(cuts.shape[:-1], dtype=np.int64)
        came: I64 = np.zeros(cuts.shape[:-1], dtype=np.int64)
        for k in range(self._n_nodes):
            last = k == self._n_nodes - 1
            after = np.full_like(before, self._n) if last else cuts[..., k]
            runs = after > before
            seconds[..., k] = runs * self._decode_s[k, came, before]
            visited[..., k] = runs
            if not last:
                form = self._form_of_hop[k]
                encodes = (after < self._n) & (form > 0) & (runs | (came == 0))
                seconds[..., k] += encodes * self._encode_s[k, form, after]
                visited[..., k] |= encodes
                before, came = after, forms[..., k]
        return seconds, visited

    def _forms(self, cuts: I64) -> I64:
        """The form that crosses each hop, as an index of `TRANSFERS`, [..., H]."""
        forms = np.empty(cuts.shape, dtype=np.int64)
        forms[..., 0] = self._form_of_hop[0]
        for h in range(1, cuts.shape[-1]):
            only_passed_on = (cuts[..., h] == cuts[..., h - 1]) & (forms[..., h - 1] > 0)
            forms[..., h] = np.where(only_passed_on, forms[..., h - 1], self._form_of_hop[h])
        return forms
