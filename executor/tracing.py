"""Any traceable network as a chain of units, found with torch.fx.

The traced operations stand in their order of execution. A *cut point* lies where exactly one tensor
computed so far is still needed, and that tensor is float32; a unit is the stretch from one cut
point to the next. So a residual, inception or attention block is one unit, since its input or its
branches are needed until it ends. Parameters are not state: they live in the unit that reads them.

Three kinds of stretch would only multiply plans, and join a neighbour. Of those without a
convolution, matrix product or matrix-shaped parameter (normalisation, activation, dropout, reshape,
padding, concatenated tokens, ...), one that keeps the size ends the unit before it, and one that
enlarges its tensor begins the unit after it, so that the small side can be cut. A first one has no
unit before it and begins the next too. One that shrinks its tensor (a pooling) is its own unit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from executor.errors import ConfigError, one_line
from executor.flops import FlopCounter

__all__ = ["Unit", "head_start", "trace_units"]

_LITERALS = (int, float, bool, str, torch.dtype, type(None))


@dataclass
class Unit:
    """A stretch of the traced network.

    Attributes:
        name: Dotted name of the module it is, or begins with.
        graph: One placeholder (the activation before it), one output; targets are qualified names
            in the network that was traced.
        modules: Names of the leaf modules and of parameters' owners in it, in order.
        flops: Floating-point operations of its convolutions and matrix products.
    """

    name: str
    graph: fx.Graph
    modules: tuple[str, ...]
    flops: int


@dataclass
class _Stretch:
    """Nodes of a unit to be, in order, with what enters and leaves."""

    nodes: list[fx.Node]
    enters: fx.Node
    leaves: fx.Node
    flops: int
    mixes: bool  # holds a matrix-shaped parameter
    modules: tuple[str, ...]

    @property
    def light(self) -> bool:
        return not self.flops and not self.mixes

    def then(self, other: _Stretch) -> _Stretch:
        # What joins for being light gives the unit no name.
        named = [part.modules for part in (self, other) if not part.light] or [self.modules]
        return _Stretch(
            self.nodes + other.nodes,
            self.enters,
            other.leaves,
            self.flops + other.flops,
            self.mixes or other.mixes,
            tuple(name for modules in named for name in modules),
        )


@dataclass
class _Trace:
    """A traced graph and what running it once showed."""

    net: nn.Module
    graph: fx.Graph
    values: dict[fx.Node, Any] = field(default_factory=dict)
    flops: dict[fx.Node, int] = field(default_factory=dict)

    def n_bytes(self, node: fx.Node) -> int:
        return int(self.values[node].nbytes)


def trace_units(net: nn.Module, input_shape: tuple[int, ...], label: str) -> list[Unit]:
    """Cut a network at every useful cut point.

    Runs it once, operation by operation: on the meta device that costs nothing.

    Args:
        net: The network in inference mode, its parameters on the meta device or the CPU.
        input_shape: Shape of its input.
        label: What to call it in errors.

    Raises:
        ConfigError: It cannot be traced (the reason is torch.fx's or the network's own), does not
            map one float32 tensor to one, or has no cut point.
    """
    try:
        trace = _run(_Trace(net, _Tracer().trace(net, _defaults(net))), input_shape)
    except Exception as error:  # the network's own code may raise anything
        raise ConfigError(
            f"model {label} cannot be traced by torch.fx: {type(error).__name__}: {one_line(error)}"
        ) from error
    (output,) = (node for node in trace.graph.nodes if node.op == "output")
    result = output.args[0]
    if not isinstance(result, fx.Node) or not _is_activation(trace.values.get(result)):
        raise ConfigError(
            f"model {label}: expected one float32 tensor as output, got "
            f"{_kind(trace.values[result] if isinstance(result, fx.Node) else result)}"
        )
    stretches = _merge(trace, _stretches(trace))
    if len(stretches) < 2:
        raise ConfigError(
            f"model {label} has no point with a single live tensor to cut at (all of it is one "
            "unit)"
        )
    units: list[Unit] = []
    for stretch in stretches:
        modules = _modules(_with_constants(trace, stretch.nodes, stretch.enters))
        name = _name(stretch)
        taken = sum(unit.name.partition("#")[0] == name for unit in units)
        name = f"{name}#{taken + 1}" if taken else name
        units.append(Unit(name, _subgraph(trace, stretch), modules, stretch.flops))
    return units


def head_start(units: list[Unit]) -> int:
    """Index of the classifier head's first unit.

    The head is the outermost module that ends the network without being all of it: of the prefixes
    of the last named module (`classifier` of `classifier.1`), the shortest one under which some
    units lie entirely and others do not. Those units are the head. It is the last unit where names
    say nothing.
    """
    named = [unit.modules for unit in units if unit.modules]
    parts = named[-1][-1].split(".") if named else []
    for length in range(1, len(parts) + 1):
        prefix = parts[:length]
        for k, unit in enumerate(units):
            if unit.modules and all(m.split(".")[:length] == prefix for m in unit.modules):
                if k > 0:
                    return k
                break
    return len(units) - 1


class _Tracer(fx.Tracer):
    """Keeps torch's own modules whole; looks into all others.

    What a network computes from its own parameters and buffers alone is part of the graph, too:
    evaluated while tracing, it would stay what the weights were then.
    """

    proxy_buffer_attributes = True


def _defaults(net: nn.Module) -> dict[str, Any]:
    """Values for every argument of `forward` but the first."""
    first, *others = inspect.signature(net.forward).parameters.values()
    if first.kind is first.VAR_POSITIONAL or any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in others
    ):
        raise TypeError(f"forward{inspect.signature(net.forward)} must take one tensor")
    return {p.name: p.default for p in others if p.default is not p.empty}


def _run(trace: _Trace, input_shape: tuple[int, ...]) -> _Trace:
    """Run the graph once, note every value, and put plain values (sizes, flags) in place."""
    parameters = list(trace.net.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    x = torch.zeros(input_shape, device=device)
    module = fx.GraphModule(trace.net, trace.graph)
    interpreter = fx.Interpreter(module)
    with torch.no_grad(), FlopCounter() as counter:
        before = 0
        inputs = 0
        for node, copy in zip(trace.graph.nodes, module.graph.nodes, strict=True):
            if node.op == "output":
                continue
            if node.op == "placeholder":
                inputs += 1
                # Any further one is an argument that was given its default.
                value = x if inputs == 1 else node.args[0] if node.args else None
            else:
                value = interpreter.run_node(copy)
            interpreter.env[copy] = value
            trace.values[node] = value
            total = counter.total
            trace.flops[node] = total - before
            before = total
    for node in list(trace.graph.nodes):
        value = trace.values.get(node)
        if node.op not in ("placeholder", "output") and _is_literal(value):
            for user in list(node.users):
                user.args = fx.node.map_arg(user.args, _put(node, value))
                user.kwargs = fx.node.map_arg(user.kwargs, _put(node, value))
    for node in reversed(list(trace.graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            # What ends in a plain value, or is an assertion on one, has been evaluated.
            if _is_literal(trace.values[node]):
                trace.graph.erase_node(node)
    return trace


def _put(node: fx.Node, value: Any) -> Callable[[fx.Node], Any]:
    return lambda n: value if n is node else n


def _is_literal(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_literal, value))
    return isinstance(value, _LITERALS)


def _is_activation(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype}"
    return f"a {type(value).__name__}"


def _computed(trace: _Trace) -> list[fx.Node]:
    """Nodes that depend on the input, in order; the others are constants of their users.

    So is the device: every unit can take it from its own input.
    """
    computed: dict[fx.Node, None] = {}
    for node in trace.graph.nodes:
        if node.op == "placeholder" and not computed:
            computed[node] = None
        elif isinstance(trace.values.get(node), torch.device):
            continue
        elif node.op != "output" and any(arg in computed for arg in node.all_input_nodes):
            computed[node] = None
    return list(computed)


def _stretches(trace: _Trace) -> list[_Stretch]:
    """The stretches between all cut points."""
    order = _computed(trace)
    position = {node: k for k, node in enumerate(order)}
    last_use = {
        node: max(
            (len(order) if user.op == "output" else position.get(user, -1) for user in node.users),
            default=-1,
        )
        for node in order
    }
    stretches: list[_Stretch] = []
    live: set[fx.Node] = {order[0]}
    enters, since = order[0], 1
    for k in range(1, len(order)):
        live.add(order[k])
        live = {node for node in live if last_use[node] > k}
        if len(live) != 1:
            continue
        (leaves,) = live
        if not _is_activation(trace.values[leaves]):
            continue
        nodes = order[since : k + 1]
        flops = sum(trace.flops[node] for node in nodes)
        reads = _with_constants(trace, nodes, enters)
        mixes = any(sum(size > 1 for size in p.shape) > 1 for p in _parameters(trace, reads))
        stretches.append(_Stretch(nodes, enters, leaves, flops, mixes, _modules(reads)))
        enters, since = leaves, k + 1
    return stretches


def _merge(trace: _Trace, stretches: Iterable[_Stretch]) -> list[_Stretch]:
    """Join the stretches that are no units of their own; see the module's docstring."""
    merged: list[_Stretch] = []
    pending: _Stretch | None = None
    for stretch in stretches:
        if pending is not None:
            stretch, pending = pending.then(stretch), None
        if stretch.light:
            grown = trace.n_bytes(stretch.leaves) - trace.n_bytes(stretch.enters)
            if grown == 0 and merged:
                merged[-1] = merged[-1].then(stretch)
                continue
            if grown >= 0:
                pending = stretch
                continue
        merged.append(stretch)
    if pending is not None:
        merged.append(merged.pop().then(pending) if merged else pending)
    return merged


def _with_constants(trace: _Trace, nodes: list[fx.Node], enters: fx.Node) -> list[fx.Node]:
    """A stretch's nodes, each after the constants (parameters, mostly) that it reads."""
    inside = {enters}
    ordered: list[fx.Node] = []

    def visit(node: fx.Node) -> None:
        if node in inside:
            return
        inside.add(node)
        if not isinstance(trace.values[node], torch.device):
            for arg in node.all_input_nodes:
                visit(arg)
        ordered.append(node)

    for node in nodes:
        visit(node)
    return ordered


def _parameters(trace: _Trace, nodes: list[fx.Node]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for node in nodes:
        if node.op == "call_module":
            found += trace.net.get_submodule(str(node.target)).parameters()
        elif node.op == "get_attr" and isinstance(trace.values[node], nn.Parameter):
            found.append(trace.values[node])
    return found


def _subgraph(trace: _Trace, stretch: _Stretch) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    copies = {stretch.enters: x}
    for node in _with_constants(trace, stretch.nodes, stretch.enters):
        if isinstance(trace.values[node], torch.device):
            copies[node] = graph.call_function(getattr, (x, "device"))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[stretch.leaves])
    return graph


def _owner(node: fx.Node) -> str:
    """The module that a node is, or reads a parameter of; else the one whose code calls it."""
    if node.op == "call_module":
        return str(node.target)
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[0]
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack)).partition("@")[0] if stack else ""


def _modules(nodes: list[fx.Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, map(_owner, nodes))))


def _name(stretch: _Stretch) -> str:
    """The innermost module that holds all the stretch's modules, or else its first one."""
    if not stretch.modules:
        return stretch.nodes[0].name
    split = [module.split(".") for module in stretch.modules]
    shared = 0
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1
    return ".".join(split[0][:shared]) or stretch.modules[0]
