"""What to do when a node dies: health, deadlines, tries and detours, without sockets or clocks.

The client's loop tells the machine what happened (a request was submitted, a reply or heartbeat
came, time passed) and carries out the instructions it gets back. The machine's promises:

- A submitted request ends exactly once, in `Complete` or `Fail`, at its deadline at the latest.
- Nothing is sent over a link, or to a node, that is known not to answer, nor to a process whose
  handshake was not checked (a node that comes back with another boot id is asked who it is first).
- A plan that was refused for want of room is not sent again before the node wants it; what is
  submitted meanwhile is refused at once.
- A request is sent at most `MAX_TRIES` times; it keeps its id, so that nodes drop what is double.

A request is sent again when a node reports it lost, when its way breaks, or when a hop on its way
has moved nothing for half of the request's time. A hop that has merely fallen silent breaks the way
once it has been so for as long as the caller is patient: where the way around it costs more than
most silences last, waiting is better. The plan asked for is kept where it can be served
(over a direct link if need be); else the first preferred plan that can; else the plan with the
dead node's stage given to the next node; else the plan cut short at the last node that can be
reached. If the first node itself is away, requests wait for it until their deadline.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from executor._listeners import silent_after_s
from executor.plan import Plan, find_route

__all__ = [
    "MAX_TRIES",
    "MOST_PATIENCE_S",
    "SILENT_AFTER_S",
    "Complete",
    "Counts",
    "Fail",
    "Greet",
    "Instruction",
    "Recovery",
    "Send",
]

MAX_TRIES = 12
# Seven heartbeats (or three and a half, where a node has many to tell): on two busy cores a healthy
# node has been seen 0.3 s late.
SILENT_AFTER_S = 0.7
# A node dials a silent neighbour anew after 4 s, and what was on its way is lost then.
MOST_PATIENCE_S = 3.5
# A node heard so often since one behind it was is not what keeps that one from being heard.
_PASSED_ON = 5
_GREET_PERIOD_S = 0.2
# After so many losses at one node a request looks for a way around it, whatever its heartbeats say.
_LOSSES = 2
_RETRYABLE = frozenset({"hop_down", "lost", "damaged", "wrong_model", "draining"})


@dataclass(frozen=True)
class Send:
    """Send a request's input under a plan.

    Attributes:
        seq: The request.
        plan: The plan of this try.
        tries: Number of this try, from 1.
        direct: Whether the way uses direct links.
        late: Whether the request's cut tables go with it: the first time, on a whole chain.
    """

    seq: int
    plan: Plan
    tries: int
    direct: bool
    late: bool = False


@dataclass(frozen=True)
class Complete:
    """The reply just taken is this request's, which was sent `tries` times."""

    seq: int
    tries: int


@dataclass(frozen=True)
class Fail:
    """The request ends in an error.

    Attributes:
        seq: The request.
        code: "timeout", "refused" or "failed".
        reason: What to tell the caller.
        wait_s: Where it was refused: seconds after which to ask for this plan again.
    """

    seq: int
    code: str
    reason: str
    wait_s: float = 0.0


@dataclass(frozen=True)
class Greet:
    """Ask the nodes who they are (a handshake): one came back as another process."""


Instruction = Send | Complete | Fail | Greet


@dataclass
class Counts:
    """What became of the requests so far.

    Attributes:
        submitted: Requests taken in.
        completed: Ended in an output.
        failed: Ended in an error, at the deadline or before.
        retried: Completed after more than one try.
        rerouted: Tries under another plan or way than the one asked for.
        late_replies: Replies to requests that had ended already; dropped.
        refused_nodes: Processes refused because their handshake did not fit (other weights).
    """

    submitted: int = 0
    completed: int = 0
    failed: int = 0
    retried: int = 0
    rerouted: int = 0
    late_replies: int = 0
    refused_nodes: int = 0


@dataclass(slots=True)
class _Open:
    """A request without an end; `plan` is None while it waits for a way.

    `route` is the nodes it passes, or with cut tables may pass.
    """

    asked: Plan
    deadline_s: float
    patience_s: float
    plan: Plan | None = None
    route: tuple[int, ...] = ()
    tries: int = 0
    sent_s: float = 0.0
    reason: str = ""
    losses: dict[int, int] = field(default_factory=dict)
    avoid: set[int] = field(default_factory=set)
    late: bool = False


@dataclass(slots=True)
class _Node:
    """What is known of a node; usable only while `boot` is the `accepted` one."""

    heard_s: float = -math.inf
    silent: bool = True
    boot: str = ""
    accepted: str = ""
    refused: str = ""
    stalled_s: float = 0.0
    every_s: float = 0.0
    n_heard: int = 0
    n_before: tuple[int, ...] = ()  # how often those before it had been heard when it last was


class Recovery:
    """The machine. Every method takes the time and returns what to do, in order.

    Attributes:
        counts: What became of the requests so far.
        preferred: Plans to fall back on, best first, before the machine's own detours.
        patience_s: For how long each hop may be silent before requests go around it.
    """

    def __init__(
        self, names: Sequence[str], n_units: int, direct: Mapping[int, int] | None = None
    ) -> None:
        """Start with no request, and no node accepted.

        Args:
            names: The nodes' names, in the order of the chain.
            n_units: The model's units.
            direct: Direct links, from node -> to node.
        """
        self.counts = Counts()
        self.preferred: tuple[Plan, ...] = ()
        self._names = tuple(names)
        self._n_units = n_units
        self._direct = dict(direct or {})
        self._nodes = [_Node() for _ in names]
        self._open: dict[int, _Open] = {}
        self._full: dict[Plan, tuple[float, str]] = {}
        self.patience_s: tuple[float, ...] = (SILENT_AFTER_S,) * (len(names) - 1)
        self._broken: set[tuple[int, int]] = set()
        self._quiet: dict[tuple[int, int], float] = {}  # links that are said not to be up, since
        self._first_link = True
        self._down: frozenset[int] = frozenset(range(len(names)))
        self._greeted_s = -math.inf

    @property
    def down(self) -> frozenset[int]:
        """Nodes that cannot be used: silent, out of reach, or not (yet) accepted."""
        return self._down

    @property
    def in_flight(self) -> int:
        """Requests without an end."""
        return len(self._open)

    def submitted(
        self, seq: int, plan: Plan, deadline_s: float, now_s: float, late: bool = False
    ) -> list[Instruction]:
        """A request was submitted, with cut tables if `late`; `seq` is new."""
        self.counts.submitted += 1
        until_s, reason = self._full.get(plan, (now_s, ""))
        if now_s < until_s:
            self.counts.failed += 1
            return [Fail(seq, "refused", reason, until_s - now_s)]
        patience_s = 0.5 * max(0.0, deadline_s - now_s)
        request = _Open(plan, deadline_s, patience_s, late=late)
        self._open[seq] = request
        return list(self._dispatch(seq, request, now_s))

    def result(self, seq: int) -> list[Instruction]:
        """An output came, whichever try it belongs to."""
        request = self._open.pop(seq, None)
        if request is None:
            self.counts.late_replies += 1
            return []
        self.counts.completed += 1
        self.counts.retried += request.tries > 1
        return [Complete(seq, request.tries)]

    def error(
        self,
        seq: int,
        tries: int,
        code: str,
        reason: str,
        node: int,
        to: int,
        now_s: float,
        wait_s: float = 0.0,
    ) -> list[Instruction]:
        """A node reported that a try failed.

        Args:
            seq: The request.
            tries: The try; an error of an older one is nobody's concern any more.
            code: The node's code; those of `_RETRYABLE` are tried again.
            reason: The node's words.
            node: The node that says so.
            to: The node it could not reach, or itself.
            now_s: Now.
            wait_s: Where there was no room: seconds for which to send it nothing of this plan.
        """
        if code == "hop_down":
            self._broken.add((node, to))
        elif code in ("wrong_model", "draining"):
            self._nodes[node].accepted = ""
        request = self._open.get(seq)
        if request is not None and request.plan is not None and request.tries == tries:
            request.reason = reason
            # Nothing leads around the first node: where it drains, the caller has to know.
            ended = code == "draining" and node == 0
            if ended or code not in _RETRYABLE:
                self._end(seq)
                refused = ended or code == "refused"
                if refused and wait_s > 0:
                    self._hold(request.asked, now_s + wait_s, reason, now_s)
                if refused and now_s >= request.deadline_s:
                    return [Fail(seq, "timeout", f"request {seq}: {reason}")]
                return [Fail(seq, "refused" if refused else "failed", reason, wait_s)]
            request.plan = None
            request.losses[to] = request.losses.get(to, 0) + 1
            if to > 0 and request.losses[to] >= _LOSSES:
                request.avoid.add(to)
        return self._update(now_s)

    def status(
        self,
        node: int,
        boot: str,
        links: Mapping[int, bool],
        stalled_s: float,
        now_s: float,
        every_s: float = 0.0,
    ) -> list[Instruction]:
        """A node's heartbeat came.

        Args:
            node: The node.
            boot: Its process, as in its handshake.
            links: For each node it dials, whether it is connected to it and hears it.
            stalled_s: For how long its hop has moved nothing while something waits on it.
            now_s: Now.
            every_s: How often it says that its heartbeats come.
        """
        state = self._nodes[node]
        state.stalled_s, state.every_s = stalled_s, every_s
        self._heard(node, now_s)
        if boot != state.boot:
            state.boot = boot
            self._broken = {link for link in self._broken if link[0] != node}
            self._quiet = {k: since for k, since in self._quiet.items() if k[0] != node}
            if node == 0:
                self._lose_all("the first node started anew")
        for target, up in links.items():
            if up:
                self._broken.discard((node, target))
                self._quiet.pop((node, target), None)
            else:
                self._quiet.setdefault((node, target), now_s)
        self._break_quiet(now_s)
        return self._update(now_s)

    def hello(self, node: int, boot: str, problem: str, now_s: float) -> list[Instruction]:
        """A node said who it is; `problem` is what is wrong with that, "" if nothing is."""
        state = self._nodes[node]
        if problem:
            if state.refused != boot:
                self.counts.refused_nodes += 1
            state.refused = boot
            if state.accepted == boot:
                state.accepted = ""
        else:
            state.accepted = state.boot = boot
            self._heard(node, now_s)
        return self._update(now_s)

    def link(self, up: bool, now_s: float) -> list[Instruction]:
        """The connection to the first node was made or lost."""
        if up == self._first_link:
            return []
        self._first_link = up
        self._nodes[0].silent = True  # it counts as up once it is heard again
        self._nodes[0].heard_s = -math.inf
        if not up:
            self._lose_all("the connection to the first node was lost")
        return self._update(now_s)

    def damaged(self, now_s: float) -> list[Instruction]:
        """A frame from the first node could not be read: any reply may have been lost."""
        self._lose_all("a damaged reply")
        return self._update(now_s)

    def tick(self, now_s: float) -> list[Instruction]:
        """Time passed: deadlines, silence, stalls, handshakes to repeat. Call every 50 ms.

        Call it when all that has come was taken in: silence is judged here alone, so that a pause
        of the client's own process does not make every node look silent.
        """
        # What a node says comes through those before it: it is as silent as the first of them that
        # was hardly heard since. (When a silence ends, they are heard again one after the other.)
        limits_s = (SILENT_AFTER_S, *self.patience_s)
        for k, node in enumerate(self._nodes):
            since = zip(self._nodes, node.n_before, strict=False)
            quiet = (j for j, (other, n) in enumerate(since) if other.n_heard - n < _PASSED_ON)
            first = next(quiet, k)
            every_s = max(other.every_s for other in self._nodes[: first + 1])
            limit_s = silent_after_s(limits_s[first], every_s)
            node.silent = now_s - self._nodes[first].heard_s > limit_s
        self._break_quiet(now_s)
        self._down = self._judge()
        late = [seq for seq, request in self._open.items() if now_s >= request.deadline_s]
        out: list[Instruction] = []
        for seq in late:
            request = self._end(seq)
            away = ", ".join(self._names[k] for k in sorted(self._down))
            hints = [f"silent nodes: {away}"] if away else []
            hints += [f"last try: {request.reason}"] if request.reason else []
            text = "; ".join([f"request {seq}: no answer before its deadline", *hints])
            out.append(Fail(seq, "timeout", text))
        return out + self._update(now_s)

    def _heard(self, node: int, now_s: float) -> None:
        state = self._nodes[node]
        state.heard_s, state.silent = now_s, False
        state.n_heard += 1
        state.n_before = tuple(other.n_heard for other in self._nodes[:node])

    def _update(self, now_s: float) -> list[Instruction]:
        """Judge the nodes anew; send what lost its way or has found one again."""
        self._down = self._judge()
        out: list[Instruction] = []
        for seq, request in list(self._open.items()):
            if request.plan is None:
                out += self._dispatch(seq, request, now_s)
                continue
            self._avoid_stalls(request, now_s)
            bad = self._down | request.avoid
            whole = bad.isdisjoint(request.route) and self._broken.isdisjoint(
                pairwise(request.route)
            )
            # Where there is no other way, what was sent may still be answered.
            if not whole and self._choose(request) is not None:
                out += self._dispatch(seq, request, now_s)
        unknown = any(n.boot not in (n.accepted, n.refused) for n in self._nodes)
        if unknown and self._first_link and now_s - self._greeted_s >= _GREET_PERIOD_S:
            self._greeted_s = now_s
            out.append(Greet())
        return out

    def _judge(self) -> frozenset[int]:
        """Nodes that are not heard, not accepted, or not reached through those that are."""
        heard = [bool(n.boot) and n.boot == n.accepted and not n.silent for n in self._nodes]
        heard[0] = heard[0] and self._first_link
        reached = [0] if heard[0] else []
        for node in reached:
            for target in (node + 1, self._direct.get(node, 0)):
                link_up = (node, target) not in self._broken
                if link_up and target < len(heard) and heard[target] and target not in reached:
                    reached.append(target)
        return frozenset(range(len(heard))) - frozenset(reached)

    def _break_quiet(self, now_s: float) -> None:
        """Count the links as broken that have not been up for longer than patience lasts.

        A node calls a link down when it has been silent for almost `SILENT_AFTER_S`.
        """
        for (node, target), since_s in self._quiet.items():
            if now_s - since_s >= self.patience_s[target - 1] - SILENT_AFTER_S:
                self._broken.add((node, target))

    def _avoid_stalls(self, request: _Open, now_s: float) -> None:
        waited_s = now_s - request.sent_s
        if waited_s < request.patience_s:
            return
        for node, target in pairwise(request.route):
            if self._nodes[node].stalled_s >= request.patience_s:
                request.avoid.add(target)

    def _dispatch(self, seq: int, request: _Open, now_s: float) -> Iterator[Instruction]:
        """Send a request under the best plan there is, or let it wait."""
        choice = self._choose(request)
        if choice is None and request.avoid:
            request.avoid.clear()  # a way that failed before is better than none
            choice = self._choose(request)
        if choice is None:
            request.plan, request.route = None, ()
            return
        if request.tries >= MAX_TRIES:
            self._end(seq)
            yield Fail(seq, "failed", f"gave up after {MAX_TRIES} tries; {request.reason}")
            return
        request.plan, request.route = choice
        request.tries += 1
        request.sent_s = now_s
        direct = any(b > a + 1 for a, b in pairwise(request.route))
        self.counts.rerouted += direct or request.plan != request.asked
        chain = tuple(range(len(self._nodes)))
        whole = self._down.isdisjoint(chain) and self._broken.isdisjoint(pairwise(chain))
        late = request.late and request.tries == 1 and whole
        if late:
            request.route = chain
        yield Send(seq, request.plan, request.tries, direct, late)

    def _choose(self, request: _Open) -> tuple[Plan, tuple[int, ...]] | None:
        """The first plan that can be served, and its way."""
        bad = self._down | request.avoid
        for plan in self._options(request.asked, bad):
            route = find_route(
                plan, self._n_units, down=bad, broken=self._broken, direct=self._direct
            )
            if route is not None:
                return plan, route
        return None

    def _options(self, asked: Plan, bad: frozenset[int]) -> Iterator[Plan]:
        yield asked
        if 0 in bad:
            return
        yield from self.preferred
        cuts = list(asked.cuts)
        if self._direct:
            for node in sorted(bad):
                if node < len(cuts):
                    cuts[node] = cuts[node - 1]
            yield Plan(tuple(cuts))
        for last in range(asked.last_node(self._n_units) - 1, -1, -1):
            rest = len(asked.cuts) - last
            yield Plan(asked.cuts[:last] + (self._n_units,) * rest)

    def _lose_all(self, reason: str) -> None:
        for request in self._open.values():
            if request.plan is not None:
                request.plan, request.route, request.reason = None, (), reason

    def _hold(self, plan: Plan, until_s: float, reason: str, now_s: float) -> None:
        """Send nothing of a plan until then: where it was refused there is no room."""
        self._full = {p: full for p, full in self._full.items() if full[0] > now_s}
        self._full[plan] = (until_s, reason)

    def _end(self, seq: int) -> _Open:
        self.counts.failed += 1
        return self._open.pop(seq)
