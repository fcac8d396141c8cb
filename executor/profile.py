"""The profile: what the nodes and hops were measured to cost, on disk as JSON.

A profile is written once at startup (`executor.profiler`) and read by the simulator, the solvers
and the policy's encoder. Times are unloaded seconds; a loaded node is slower by 1 / (1 - load).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.codec import check_transfer
from executor.errors import ConfigError, ProfileError
from executor.files import write_atomic
from executor.plan import ModelSpec

__all__ = ["Conversion", "HopModel", "NodePower", "NodeProfile", "Profile"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class NodePower:
    """A device class's electrical power, in watts, and where the figures come from."""

    device: str
    idle_w: float
    compute_w: float
    transmit_w: float
    source: str


@dataclass(frozen=True)
class Conversion:
    """What a form of transfer (`executor.codec`) takes on a node; the output is never encoded.

    Attributes:
        form: "fp16" or "int8".
        cut_bytes: Bytes that cross at each cut in that form, cuts 0..n - 1.
        encode_s: Unloaded seconds to encode the activation at each cut, n values.
        decode_s: Unloaded seconds to decode it, n values.
    """

    form: str
    cut_bytes: tuple[int, ...]
    encode_s: tuple[float, ...]
    decode_s: tuple[float, ...]

    def check(self, n_units: int) -> None:
        """Raise ConfigError unless it is of a model of `n_units`."""
        check_transfer(self.form, "conversion")
        for name in ("cut_bytes", "encode_s", "decode_s"):
            values = getattr(self, name)
            if len(values) != n_units:
                raise ConfigError(f"{self.form}: {len(values)} {name}, expected {n_units}")
            if not all(np.isfinite(values)) or min(values) < 0:
                raise ConfigError(f"{self.form}: {name} must be finite and >= 0")


@dataclass(frozen=True)
class NodeProfile:
    """One node's measured cost.

    Attributes:
        name: Role, e.g. "edge".
        unit_s: Unloaded seconds per unit, n values.
        stage_overhead_s: Seconds per request that ran a stage here, beyond its units.
        power: The device class's watts.
        meter: Name of the energy meter behind the figures.
        transfer: How activations leave it for the next node (`executor.cluster.NodeConfig`).
        conversions: What that takes, of every form in use on the chain; empty where none is.
    """

    name: str
    unit_s: tuple[float, ...]
    stage_overhead_s: float
    power: NodePower
    meter: str
    transfer: str = "float32"
    conversions: tuple[Conversion, ...] = ()

    def conversion(self, form: str) -> Conversion:
        """What a form takes here.

        Raises:
            ProfileError: It was not measured.
        """
        for conversion in self.conversions:
            if conversion.form == form:
                return conversion
        raise ProfileError(
            f"node {self.name}: what {form} takes was not measured; profile the nodes anew"
        )

    def scaled(self, factor: float) -> NodeProfile:
        """The same node, `factor` times as slow."""
        conversions = tuple(
            replace(
                c,
                encode_s=tuple(s * factor for s in c.encode_s),
                decode_s=tuple(s * factor for s in c.decode_s),
            )
            for c in self.conversions
        )
        return replace(
            self,
            unit_s=tuple(s * factor for s in self.unit_s),
            stage_overhead_s=self.stage_overhead_s * factor,
            conversions=conversions,
        )


@dataclass(frozen=True)
class HopModel:
    """One hop: transfer seconds of s bytes = frame_overhead_s + s / bytes_per_s + one way delay.

    Attributes:
        bytes_per_s: Bandwidth when it was probed.
        rtt_s: Round-trip time of an empty frame (twice the one-way delay).
        frame_overhead_s: Seconds per frame beyond bytes and propagation (framing, copies, relay).
    """

    bytes_per_s: float
    rtt_s: float
    frame_overhead_s: float = 0.0


@dataclass(frozen=True)
class Profile:
    """The profile of a model on a chain of N nodes and N - 1 hops."""

    spec: ModelSpec
    nodes: tuple[NodeProfile, ...]
    hops: tuple[HopModel, ...]
    weights_digest: str = ""

    def __post_init__(self) -> None:
        if len(self.nodes) < 2 or len(self.hops) != len(self.nodes) - 1:
            raise ProfileError(
                f"a profile needs N >= 2 nodes and N - 1 hops, got {len(self.nodes)} and "
                f"{len(self.hops)}"
            )
        for node in self.nodes:
            if len(node.unit_s) != self.spec.n_units:
                raise ProfileError(
                    f"profile of {self.spec.name}: node {node.name} has {len(node.unit_s)} unit "
                    f"times, expected {self.spec.n_units}"
                )
            if not all(np.isfinite(node.unit_s)) or min(node.unit_s) < 0:
                raise ProfileError(f"node {node.name}: unit times must be finite and >= 0")
        self._check_transfers()
        for hop in self.hops:
            if not hop.bytes_per_s > 0:
                raise ProfileError(f"hop bandwidth must be positive, got {hop.bytes_per_s} bytes/s")

    def _check_transfers(self) -> None:
        """Refuse transfers whose cost is not known: nobody could decide with them."""
        try:
            for node in self.nodes:
                check_transfer(node.transfer, f"node {node.name}")
                for conversion in node.conversions:
                    conversion.check(self.spec.n_units)
            for k, form in enumerate(self.transfers):
                for node in self.nodes[k:] if form != "float32" else ():
                    node.conversion(form)
        except ConfigError as error:
            raise ProfileError(f"profile of {self.spec.name}: {error}") from error

    @property
    def n_nodes(self) -> int:
        """Number of nodes N."""
        return len(self.nodes)

    @property
    def transfers(self) -> tuple[str, ...]:
        """Per hop, how activations cross it that no node before has encoded."""
        return tuple(node.transfer for node in self.nodes[:-1])

    def work_prefix_s(self) -> NDArray[np.float64]:
        """Cumulative unit seconds, shape [N, n + 1]; a stage [a, b) costs prefix[b] - prefix[a]."""
        unit_s = np.array([node.unit_s for node in self.nodes])
        return np.concatenate([np.zeros((self.n_nodes, 1)), np.cumsum(unit_s, axis=1)], axis=1)

    def cut_bytes(self) -> NDArray[np.float64]:
        """Bytes at each cut, shape [n + 1]."""
        return np.array(self.spec.cut_bytes, dtype=np.float64)

    def with_changes(self, **changes: Any) -> Profile:
        """A copy with the named fields replaced."""
        return replace(self, **changes)

    def scaled(self, factors: Sequence[float]) -> Profile:
        """The same chain, node i `factors[i]` times as slow."""
        nodes = (node.scaled(f) for node, f in zip(self.nodes, factors, strict=True))
        return replace(self, nodes=tuple(nodes))

    def shape_digest(self) -> str:
        """Digest of what a checkpoint depends on: model, units, cut sizes, number of nodes."""
        shape = [self.spec.name, self.spec.unit_names, self.spec.cut_bytes, self.n_nodes]
        return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The profile as JSON text; what is off is left out, so that older versions can read it."""
        values = asdict(self)
        for node in values["nodes"]:
            if not node["conversions"]:
                del node["transfer"], node["conversions"]
        return json.dumps({"version": FORMAT_VERSION, **values}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "profile") -> Profile:
        """Read a profile from JSON text.

        Raises:
            ProfileError: The text is no profile of this format; names `where` and the field.
        """
        try:
            raw = json.loads(text)
            if not isinstance(raw, dict) or raw.get("version") != FORMAT_VERSION:
                raise ProfileError(f"expected profile format version {FORMAT_VERSION}")
            spec = raw["spec"]
            return cls(
                spec=ModelSpec(
                    name=str(spec["name"]),
                    unit_names=tuple(map(str, spec["unit_names"])),
                    cut_bytes=tuple(map(int, spec["cut_bytes"])),
                    has_params=tuple(map(bool, spec["has_params"])),
                    head_start=int(spec["head_start"]),
                    static_plan=(int(spec["static_plan"][0]), int(spec["static_plan"][1])),
                    input_shape=tuple(map(int, spec.get("input_shape", (1, 3, 224, 224)))),
                ),
                nodes=tuple(
                    NodeProfile(
                        name=str(n["name"]),
                        unit_s=tuple(map(float, n["unit_s"])),
                        stage_overhead_s=float(n["stage_overhead_s"]),
                        power=NodePower(
                            device=str(n["power"]["device"]),
                            idle_w=float(n["power"]["idle_w"]),
                            compute_w=float(n["power"]["compute_w"]),
                            transmit_w=float(n["power"]["transmit_w"]),
                            source=str(n["power"]["source"]),
                        ),
                        meter=str(n["meter"]),
                        transfer=str(n.get("transfer", "float32")),
                        conversions=tuple(
                            Conversion(
                                form=str(c["form"]),
                                cut_bytes=tuple(map(int, c["cut_bytes"])),
                                encode_s=tuple(map(float, c["encode_s"])),
                                decode_s=tuple(map(float, c["decode_s"])),
                            )
                            for c in n.get("conversions", ())
                        ),
                    )
                    for n in raw["nodes"]
                ),
                hops=tuple(
                    HopModel(**{field: float(value) for field, value in h.items()})
                    for h in raw["hops"]
                ),
                weights_digest=str(raw["weights_digest"]),
            )
        except ConfigError as error:  # the parts judge themselves, and do not know the file
            raise ProfileError(f"{where}: {error}") from error
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ProfileError(f"{where}: not a readable profile ({error!r})") from error

    def save(self, path: Path) -> None:
        """Write to `path`, aside and then renamed."""
        write_atomic(path, self.to_json().encode())

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read from `path`.

        Raises:
            ProfileError: The file is missing or is no profile.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"cannot read profile {path}: {error}") from error
        return cls.from_json(text, str(path))
