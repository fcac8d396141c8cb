"""cluster.toml: which nodes make up the chain, where they listen and who may talk to them.

    model = "mobilenet_v2"
    weights = "none"

    [[nodes]]
    name = "edge"
    host = "127.0.0.1"
    port = 5550
    device = "pi4"

    [[nodes]]
    name = "cloud"
    host = "192.168.1.20"
    port = 5551
    device = "server"
    connect = "192.168.1.20:5551"    # what the node before it dials; host:port unless given

The nodes stand in the order of the chain. A request whose plan leaves the nodes between empty can
go past them, when one of them is down, over a direct link:

    [[direct]]
    from = "edge"
    to = "cloud"
    connect = "203.0.113.7:5552"     # what `from` dials; the host and port of `to` unless given

Off loopback a node wants CURVE keys (`keys_dir`, with `NAME.key` and `NAME.key_secret` per node and
for the client, as written by `executor.keys`) or the explicit `--insecure`. With keys a node
accepts the keys named in its `allow`, by default those of the nodes that dial it (the one before
it, or the client for the first, and where a direct link to it starts), and nobody else.
"""

from __future__ import annotations

import ipaddress
import json
import math
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from executor.codec import check_transfer
from executor.errors import ConfigError
from executor.modelref import absolute_model, model_label

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["KEY_NAME", "Cluster", "DirectLink", "NodeConfig", "is_loopback"]

KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_WILDCARDS = ("*", "0.0.0.0", "::")


@dataclass(frozen=True)
class NodeConfig:
    """One node of the chain.

    Attributes:
        name: Role, e.g. "edge"; letters, digits, `_`, `.`, `-`.
        host: Address the node binds.
        port: TCP port the node binds; 0 takes any free one (the node prints it when it serves).
        connect_host: What the neighbour before it (the client, for the first) dials; `host` unless
            given. In the testbed this is the relay.
        connect_port: Port to dial; `port` unless given.
        device: Device class, which picks the power figures ("pi4", "laptop", "server", ...).
        torch_device: "cpu" or "cuda".
        allow: Names of the keys it accepts; empty for the default, see `Cluster.allowed`.
        metrics_port: TCP port of `/metrics` and `/healthz`; 0 for none.
        transfer: How activations leave it for the nodes after it: "float32" (as they are), "fp16"
            or "int8" (`executor.codec`). One that came in another form goes on as it came.
    """

    name: str
    host: str
    port: int
    connect_host: str = ""
    connect_port: int = 0
    device: str = "laptop"
    torch_device: str = "cpu"
    allow: tuple[str, ...] = ()
    metrics_port: int = 0
    transfer: str = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not KEY_NAME.fullmatch(self.name):
            raise ConfigError(
                f"node name must be letters, digits, '_', '.' or '-' (at most 64), got "
                f"{self.name!r}"
            )
        for field in ("host", "connect_host", "device", "torch_device"):
            if not isinstance(getattr(self, field), str):
                raise ConfigError(
                    f"node {self.name}: {field} must be a string, got {getattr(self, field)!r}"
                )
        for field in ("port", "connect_port", "metrics_port"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 65535:
                raise ConfigError(f"node {self.name}: {field} must be in 0..65535, got {value!r}")
        if not self.host or any(c.isspace() or c == "/" for c in self.host + self.connect_host):
            raise ConfigError(f"node {self.name}: host must be an address, got {self.host!r}")
        if not self.connect_host:
            if self.host in _WILDCARDS and self.connect_port:
                raise ConfigError(f"node {self.name}: connect needs a host, bound is {self.host}")
            object.__setattr__(self, "connect_host", self.host)
        if not self.connect_port:
            object.__setattr__(self, "connect_port", self.port)
        check_transfer(self.transfer, f"node {self.name}")
        for name in self.allow:
            if not isinstance(name, str) or not KEY_NAME.fullmatch(name):
                raise ConfigError(f"node {self.name}: allow must list names of keys, got {name!r}")
        if len(set(self.allow)) != len(self.allow):
            raise ConfigError(f"node {self.name}: allow names a key twice: {list(self.allow)}")

    def bind_endpoint(self) -> str:
        """ZeroMQ endpoint this node binds (port 0 becomes a wildcard)."""
        return f"tcp://{_bracket(self.host)}:{self.port or '*'}"

    def connect_endpoint(self) -> str:
        """ZeroMQ endpoint the neighbour before this node dials.

        Raises:
            ConfigError: The address to dial is a wildcard or its port is not known.
        """
        if self.connect_host in _WILDCARDS or not self.connect_port:
            raise ConfigError(
                f"node {self.name}: cannot dial {self.connect_host}:{self.connect_port}; "
                f'set connect = "host:port"'
            )
        return f"tcp://{_bracket(self.connect_host)}:{self.connect_port}"


@dataclass(frozen=True)
class DirectLink:
    """A link past the nodes between two nodes of the chain.

    Attributes:
        source: Name of the node that dials.
        target: Name of the node that is dialled, at least two places further on.
        connect_host: Address to dial; the target's `host` unless given.
        connect_port: Port to dial; the target's `port` unless given.
    """

    source: str
    target: str
    connect_host: str = ""
    connect_port: int = 0


@dataclass(frozen=True)
class Cluster:
    """The chain of nodes and the model they run.

    Attributes:
        model: A torchvision classification model's name, or `FILE.py:FUNCTION`.
        weights: "none" (seeded), "DEFAULT" (torchvision's) or a path to a state dict.
        nodes: The chain, N >= 2 nodes in order.
        max_queue: Requests a node queues before it refuses.
        threads: Torch threads per node; None takes torch's own choice (the testbed uses 1).
        backend: What computes, one of `executor.backends.BACKENDS` or "auto" (measured at start).
            With "eager" everywhere, like machines give the same bits wherever the model is cut.
        keys_dir: Folder of CURVE certificates; None means plain TCP.
        direct: Links past nodes, at most one from each node.
        client: Name of the key that this machine's client uses.
        peer_rate_rps: Messages a second that a node takes from one connection in the long run.
    """

    model: str
    weights: str
    nodes: tuple[NodeConfig, ...]
    max_queue: int = 64
    threads: int | None = None
    backend: str = "eager"
    keys_dir: str | None = None
    direct: tuple[DirectLink, ...] = ()
    client: str = "client"
    peer_rate_rps: float = 2000.0

    def __post_init__(self) -> None:
        for field in ("model", "weights", "backend"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value:
                raise ConfigError(f"cluster: {field} must be a non-empty string, got {value!r}")
        model_label(self.model)  # refuses a file without a function
        if len(self.nodes) < 2:
            raise ConfigError(f"cluster: a chain needs at least 2 nodes, got {len(self.nodes)}")
        names = [node.name for node in self.nodes]
        if len(set(names)) != len(names):
            raise ConfigError(f"cluster: node names must differ, got {names}")
        if not _positive_int(self.max_queue):
            raise ConfigError(f"cluster: max_queue must be a positive count, got {self.max_queue}")
        if self.threads is not None and not _positive_int(self.threads):
            raise ConfigError(f"cluster: threads must be a positive count, got {self.threads}")
        if self.keys_dir is not None and not isinstance(self.keys_dir, str):
            raise ConfigError(f"cluster: keys_dir must be a folder's path, got {self.keys_dir!r}")
        for link in self.direct:
            if self.index(link.target) < self.index(link.source) + 2:
                raise ConfigError(
                    f"cluster: a direct link leads past at least one node of the chain, got "
                    f"{link.source} to {link.target}"
                )
        if len(self.direct_links) != len(self.direct):
            raise ConfigError("cluster: at most one direct link may start at each node")
        if not isinstance(self.client, str) or not KEY_NAME.fullmatch(self.client):
            raise ConfigError(f"cluster: client must be the name of a key, got {self.client!r}")
        if self.client in names:
            raise ConfigError(f"node name {self.client!r} is taken by the client's keys; rename it")
        rate = self.peer_rate_rps
        if not isinstance(rate, int | float) or isinstance(rate, bool) or not 1 <= rate < math.inf:
            raise ConfigError(f"cluster: peer_rate_rps must be at least 1, got {rate!r}")
        if self.nodes[-1].transfer != "float32":
            raise ConfigError(
                f"node {names[-1]}: transfer = {self.nodes[-1].transfer!r} has no effect on the "
                "last node, whose output stays float32; leave it out"
            )
        self._check_allow()

    def _check_allow(self) -> None:
        """Refuse allow-lists that protect nothing or break the chain."""
        for k, node in enumerate(self.nodes):
            if node.allow and self.keys_dir is None:
                raise ConfigError(
                    f"node {node.name}: allow = {list(node.allow)} has no effect without keys_dir"
                )
            for name in self._dialled_by(node) if node.allow and k else ():
                if name not in node.allow:
                    raise ConfigError(
                        f"node {node.name}: allow must hold {name!r}, which dials it, got "
                        f"{list(node.allow)}"
                    )

    def _dialled_by(self, node: NodeConfig) -> tuple[str, ...]:
        """Names of the keys of whoever dials `node`."""
        k = self.index(node.name)
        before = self.nodes[k - 1].name if k else self.client
        return (before, *(link.source for link in self.direct if link.target == node.name))

    @property
    def model_name(self) -> str:
        """What the model is called on every machine, wherever its file lies."""
        return model_label(self.model)

    @property
    def n_nodes(self) -> int:
        """Number of nodes N."""
        return len(self.nodes)

    @property
    def transfers(self) -> tuple[str, ...]:
        """Per hop, how activations cross it that no node before has encoded."""
        return tuple(node.transfer for node in self.nodes[:-1])

    @property
    def direct_links(self) -> dict[int, int]:
        """The direct links by index, from node -> to node."""
        return {self.index(link.source): self.index(link.target) for link in self.direct}

    def direct_target(self, node: int) -> NodeConfig | None:
        """Whom node `node` dials directly, as it must be dialled; None without such a link."""
        for link in self.direct:
            if self.index(link.source) == node:
                far = self.nodes[self.index(link.target)]
                host, port = link.connect_host or far.host, link.connect_port or far.port
                return replace(far, connect_host=host, connect_port=port)
        return None

    def index(self, name: str) -> int:
        """Position of node `name` in the chain.

        Raises:
            ConfigError: No node has that name; lists the names there are.
        """
        for i, node in enumerate(self.nodes):
            if node.name == name:
                return i
        known = ", ".join(node.name for node in self.nodes)
        raise ConfigError(f"unknown role {name!r}; the cluster has: {known}")

    def allowed(self, node: NodeConfig) -> tuple[str, ...]:
        """Names of the keys that `node` accepts: its `allow`, or else of whoever dials it."""
        return node.allow or self._dialled_by(node)

    def check_exposure(self, node: NodeConfig, insecure: bool) -> None:
        """Refuse to listen off loopback without keys.

        Raises:
            ConfigError: `node` would bind a reachable address, there are no CURVE keys, and the
                caller did not say `insecure`.
        """
        if self.keys_dir is None and not insecure and not is_loopback(node.host):
            raise ConfigError(
                f"node {node.name}: {node.host} is reachable from outside and no keys are set; "
                f"give keys_dir (CURVE), or pass --insecure"
            )

    @classmethod
    def from_toml(cls, text: str, where: str = "cluster.toml", base: Path | None = None) -> Cluster:
        """Read a cluster from TOML text.

        Args:
            text: The TOML.
            where: What to call it in errors.
            base: Folder that a relative `keys_dir`, weights or model file is relative to.

        Raises:
            ConfigError: The text is no TOML, or a key is missing, unknown or has a bad value.
        """
        try:
            raw = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{where}: not valid TOML ({error})") from error
        _known(raw, {f.name for f in fields(cls)}, where)
        nodes = raw.pop("nodes", None)
        if not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
            raise ConfigError(f"{where}: expected [[nodes]] tables")
        direct = raw.pop("direct", [])
        if not isinstance(direct, list) or not all(isinstance(link, dict) for link in direct):
            raise ConfigError(f"{where}: direct links are [[direct]] tables")
        raw.setdefault("weights", "none")
        if "model" not in raw:
            raise ConfigError(f'{where}: expected a top-level model = "..."')
        if base is not None:
            if isinstance(raw.get("keys_dir"), str):
                raw["keys_dir"] = str((base / raw["keys_dir"]).absolute())
            if isinstance(raw["model"], str):
                raw["model"] = absolute_model(raw["model"], base)
            if isinstance(raw["weights"], str) and raw["weights"] not in ("none", "DEFAULT"):
                raw["weights"] = str((base / raw["weights"]).absolute())
        try:
            links = tuple(_direct(link) for link in direct)
            return cls(nodes=tuple(_node(node) for node in nodes), direct=links, **raw)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Cluster:
        """Read a cluster from the file `path`.

        Raises:
            ConfigError: The file is unreadable or its content is wrong; names the file.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read cluster file {path}: {error}") from error
        return cls.from_toml(text, str(path), path.parent)

    def to_toml(self) -> str:
        """The cluster as TOML text, which `from_toml` reads back equal."""
        lines = [f"model = {_quote(self.model)}", f"weights = {_quote(self.weights)}"]
        lines.append(f"max_queue = {self.max_queue}")
        if self.backend != "eager":
            lines.append(f"backend = {_quote(self.backend)}")
        if self.threads is not None:
            lines.append(f"threads = {self.threads}")
        if self.keys_dir is not None:
            lines.append(f"keys_dir = {_quote(self.keys_dir)}")
        if self.client != "client":
            lines.append(f"client = {_quote(self.client)}")
        lines.append(f"peer_rate_rps = {float(self.peer_rate_rps)}")
        for node in self.nodes:
            lines += ["", "[[nodes]]", f"name = {_quote(node.name)}", f"host = {_quote(node.host)}"]
            lines += [f"port = {node.port}", f"device = {_quote(node.device)}"]
            lines.append(f"torch_device = {_quote(node.torch_device)}")
            if node.transfer != "float32":
                lines.append(f"transfer = {_quote(node.transfer)}")
            if node.metrics_port:
                lines.append(f"metrics_port = {node.metrics_port}")
            if (node.connect_host, node.connect_port) != (node.host, node.port):
                connect = f"{_bracket(node.connect_host)}:{node.connect_port}"
                lines.append(f"connect = {_quote(connect)}")
            if node.allow:
                lines.append(f"allow = [{', '.join(map(_quote, node.allow))}]")
        for link in self.direct:
            lines += ["", "[[direct]]", f"from = {_quote(link.source)}"]
            lines.append(f"to = {_quote(link.target)}")
            if link.connect_host:
                connect = f"{_bracket(link.connect_host)}:{link.connect_port}"
                lines.append(f"connect = {_quote(connect)}")
        return "\n".join(lines) + "\n"


def is_loopback(host: str) -> bool:
    """Whether `host` can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _node(raw: dict[str, Any]) -> NodeConfig:
    """Build a node from its TOML table."""
    where = f"node {raw.get('name', '?')}"
    known = {f.name for f in fields(NodeConfig)} - {"connect_host", "connect_port"} | {"connect"}
    _known(raw, known, where)
    missing = sorted({"name", "host", "port"} - raw.keys())
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    raw = dict(raw)
    connect = raw.pop("connect", None)
    if connect is not None:
        raw["connect_host"], raw["connect_port"] = _host_port(connect, where)
    if "allow" in raw:
        if not isinstance(raw["allow"], list) or not raw["allow"]:
            raise ConfigError(
                f'{where}: allow must be a list of key names, e.g. ["client"], got {raw["allow"]!r}'
            )
        raw["allow"] = tuple(raw["allow"])
    return NodeConfig(**raw)


def _direct(raw: dict[str, Any]) -> DirectLink:
    """Build a direct link from its TOML table."""
    where = f"direct link from {raw.get('from', '?')}"
    _known(raw, {"from", "to", "connect"}, where)
    for key in ("from", "to"):
        if not isinstance(raw.get(key), str):
            raise ConfigError(f"{where}: {key} must be a node's name, got {raw.get(key)!r}")
    host, port = _host_port(raw["connect"], where) if "connect" in raw else ("", 0)
    return DirectLink(raw["from"], raw["to"], host, port)


def _host_port(value: object, where: str) -> tuple[str, int]:
    match = re.fullmatch(r"\[?([^\]\s]+?)\]?:(\d{1,5})", str(value))
    if not match or not 0 < int(match[2]) <= 65535:
        raise ConfigError(f'{where}: connect must be "host:port", got {value!r}')
    return match[1], int(match[2])


def _known(raw: dict[str, Any], known: set[str], where: str) -> None:
    """Refuse keys nobody reads: a misspelt setting must not pass for a default."""
    unknown = sorted(raw.keys() - known)
    if unknown:
        raise ConfigError(f"{where}: unknown {', '.join(unknown)}; known: {sorted(known)}")


def _positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _quote(text: str) -> str:
    """A TOML basic string; JSON's escapes are a subset of TOML's, bar DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
