"""Late binding: the tables from which a node picks its own cut when a request's turn comes.

A plan is made before its request has left; by the time a middle node begins on it, the hop behind
that node may have filled up or run empty. So a frame may carry, for any middle node, a short table
of (largest backlog of the node's hop in seconds, cut): the node takes the first row whose backlog
is not exceeded, and where all are, the plan's own cut. The executor needs no controller for that.

A cut never falls below the one the request came over, and later cuts are raised with it, so what
runs is always a plan of the same model: the output does not change. The reply names it.

On the wire a header's tables are: their number (u8), then of each the node (u8), the number of
rows (u8), and per row an f64 and a u16, little-endian.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from executor.errors import ConfigError, WireError
from executor.plan import Plan

__all__ = [
    "MAX_ROWS",
    "MAX_TABLES",
    "CutTable",
    "check_tables",
    "chooser",
    "pack_tables",
    "parse_tables",
    "rebound",
]

MAX_TABLES = 16
MAX_ROWS = 16

_COUNTS = struct.Struct("<BB")
_ROW = struct.Struct("<dH")


@dataclass(frozen=True)
class CutTable:
    """One node's table.

    Attributes:
        node: The node it is for: neither the chain's first nor its last.
        rows: (largest hop backlog in seconds, cut), backlogs rising; the last may be infinite.
    """

    node: int
    rows: tuple[tuple[float, int], ...]

    def __post_init__(self) -> None:
        if self.node < 1:
            raise ConfigError(f"a cut table is for a node after the first, got node {self.node}")
        if not 1 <= len(self.rows) <= MAX_ROWS:
            raise ConfigError(f"a cut table has 1..{MAX_ROWS} rows, got {len(self.rows)}")
        least_s = -math.inf
        for backlog_s, cut in self.rows:
            if not (backlog_s >= 0.0 and backlog_s > least_s):
                raise ConfigError(
                    "backlogs of a cut table must be >= 0 s and rise, got "
                    f"{[row[0] for row in self.rows]}"
                )
            if cut < 0:
                raise ConfigError(f"cuts of a cut table must be >= 0, got {cut}")
            least_s = backlog_s

    def check(self, n_units: int, n_nodes: int) -> None:
        """Raise ConfigError unless the table fits a model of `n_units` on `n_nodes`."""
        if self.node > n_nodes - 2:
            raise ConfigError(
                f"a cut table is for one of the nodes 1..{n_nodes - 2}, with a hop before and "
                f"behind; got node {self.node}"
            )
        if max(cut for _, cut in self.rows) > n_units:
            raise ConfigError(f"cuts of a cut table must lie in 0..{n_units}, got {self.rows}")

    def cut_at(self, backlog_s: float, planned: int) -> int:
        """The cut for a hop that holds so many seconds of frames."""
        return next((cut for limit_s, cut in self.rows if backlog_s <= limit_s), planned)


def rebound(plan: Plan, node: int, cut: int) -> Plan:
    """The plan with another cut behind `node`: at least the one before it, and none after less."""
    cuts = list(plan.cuts)
    cuts[node] = max(cut, cuts[node - 1]) if node else cut
    for later in range(node + 1, len(cuts)):
        cuts[later] = max(cuts[later], cuts[later - 1])
    return Plan(tuple(cuts))


class _Hop(Protocol):
    def backlog_s(self, now_s: float) -> float | None: ...


def chooser(
    tables: Sequence[CutTable], node: int, hop: _Hop | None, start: int, planned: int
) -> Callable[[], int] | None:
    """What picks a node's cut when a request's turn has come; None where no table is for it.

    Args:
        tables: Those of the request.
        node: The node.
        hop: The hop behind it; while its backlog is not known, the plan's own cut stands.
        start: The cut that the request came over.
        planned: The plan's cut.
    """
    table = next((table for table in tables if table.node == node), None)
    if table is None or hop is None:
        return None

    def choose() -> int:
        backlog_s = hop.backlog_s(time.monotonic())
        return planned if backlog_s is None else max(start, table.cut_at(backlog_s, planned))

    return choose


def check_tables(tables: Sequence[CutTable], n_units: int, n_nodes: int) -> None:
    """Raise ConfigError unless the tables may go with one request."""
    for table in tables:
        table.check(n_units, n_nodes)
    if len(tables) > MAX_TABLES or len({table.node for table in tables}) < len(tables):
        nodes = [table.node for table in tables]
        raise ConfigError(f"at most {MAX_TABLES} cut tables, one per node; got nodes {nodes}")


def pack_tables(tables: Sequence[CutTable]) -> bytes:
    """The tables' bytes.

    Raises:
        WireError: A value has no place in the layout.
    """
    if len(tables) > MAX_TABLES:
        raise WireError(f"a header holds at most {MAX_TABLES} cut tables, got {len(tables)}")
    try:
        parts = [bytes([len(tables)])]
        for table in tables:
            parts.append(_COUNTS.pack(table.node, len(table.rows)))
            parts += [_ROW.pack(*row) for row in table.rows]
    except struct.error as error:
        raise WireError(f"a cut table does not fit the wire's layout: {error}") from error
    return b"".join(parts)


def parse_tables(data: bytes | memoryview) -> tuple[CutTable, ...]:
    """Read what `pack_tables` wrote; nothing may follow it.

    Raises:
        WireError: These are no tables; says why.
    """
    if not data or not 1 <= data[0] <= MAX_TABLES:
        got = data[0] if data else "nothing"
        raise WireError(f"expected 1..{MAX_TABLES} cut tables, got {got}")
    tables: list[CutTable] = []
    position = 1
    try:
        for _ in range(data[0]):
            node, n_rows = _COUNTS.unpack_from(data, position)
            position += _COUNTS.size
            if n_rows > MAX_ROWS:
                raise WireError(f"a cut table has 1..{MAX_ROWS} rows, got {n_rows}")
            end = position + n_rows * _ROW.size
            rows = tuple(_ROW.unpack_from(data, p) for p in range(position, end, _ROW.size))
            position = end
            tables.append(CutTable(node, rows))
    except (ConfigError, struct.error) as error:
        raise WireError(f"bad cut table: {error}") from error
    if position != len(data):
        raise WireError(f"{len(data) - position} bytes follow the cut tables")
    if len({table.node for table in tables}) < len(tables):
        raise WireError(f"two cut tables for one node: {[table.node for table in tables]}")
    return tuple(tables)
