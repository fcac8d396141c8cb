"""Measures a chain through a connected client: the profile that everything later starts from."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from executor.energy import device_power
from executor.errors import ConfigError
from executor.link import two_point
from executor.model import model_spec, sample_input
from executor.plan import Plan
from executor.profile import HopModel, NodeProfile, Profile

if TYPE_CHECKING:
    from executor.client import Client

__all__ = ["measure_hop", "measure_profile"]

_SMALL_BYTES = 1024
# A hop so fast that noise hides a payload's size is asked again with a larger one.
_LARGE_BYTES = (256 * 1024, 1024 * 1024, 4 * 1024 * 1024)
_MAX_ROUND_TRIPS = 5
_OVERHEAD_REQUESTS = 5


def measure_hop(client: Client, hop: int, round_trips: int) -> HopModel:
    """Two-point probe of one hop; the first round trip of each size warms up and is dropped.

    Raises:
        ConfigError: Even the largest payload took no longer than the small one.
    """
    failure: ConfigError | None = None
    for large_bytes in _LARGE_BYTES:
        small_s = client.probe(hop, _SMALL_BYTES, round_trips + 1)[1:]
        large_s = client.probe(hop, large_bytes, round_trips + 1)[1:]
        try:
            return two_point(_SMALL_BYTES, small_s, large_bytes, large_s)
        except ConfigError as error:
            failure = error
    raise ConfigError(f"hop {hop}: {failure}")


def measure_profile(client: Client, repeats: int) -> Profile:
    """Unit (and conversion) times of every node, then every hop, then the overhead per stage.

    Nodes are profiled one after the other (in the testbed they share cores), at no load. Last, a
    few requests run through all nodes one at a time; what a stage took there beyond its work is
    the node's overhead.
    """
    n_nodes = client.cluster.n_nodes
    spec = model_spec(client.cluster.model)
    times = [client.profile_times(index, repeats) for index in range(n_nodes)]
    round_trips = min(repeats, _MAX_ROUND_TRIPS)
    hops = tuple(measure_hop(client, hop, round_trips) for hop in range(n_nodes - 1))
    plan = Plan(tuple(spec.n_units * (hop + 1) // n_nodes for hop in range(n_nodes - 1)))
    x = sample_input(0, spec.input_shape)
    records = [client.submit(x, plan).result().record for _ in range(_OVERHEAD_REQUESTS)]
    statuses = client.status()
    nodes = []
    for index, hello in enumerate(client.nodes):
        speed = 1.0 - statuses[index].load
        overhead_s = statistics.median(
            r.queue_s[index] + max(0.0, r.stage_s[index] * speed - r.work_s[index]) for r in records
        )
        nodes.append(
            NodeProfile(
                name=str(hello["name"]),
                unit_s=times[index][0],
                stage_overhead_s=overhead_s,
                power=device_power(str(hello["device"])),
                meter=str(hello["meter"]),
                transfer=client.cluster.nodes[index].transfer,
                conversions=times[index][1],
            )
        )
    digest = str(client.nodes[0]["digest"])
    return Profile(spec, tuple(nodes), hops, weights_digest=digest)
