"""A simulated store and as many simulated ranks as one likes, which run the real agreement."""

from __future__ import annotations

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from esper.distributed import agreement as ag

__all__ = ["Simulation", "Weather"]


@dataclass(frozen=True)
class Weather:
    """How things go wrong. Times are in steps of a training loop."""

    delay: float = 0.5
    """The longest time that a message takes."""
    loss: float = 0.0
    """The share of messages to the store, or from it, that are lost, and sent again later."""
    step: float = 1.0
    """The longest time that a forward takes."""
    lead: int = 3
    """What the coordinator thinks that a ballot takes."""
    late: float = 5.0
    """The longest time until a rank asks for a change."""
    crashes: dict[int, float] = field(default_factory=dict)
    """When a rank ends, by rank."""
    pauses: dict[int, tuple[float, float]] = field(default_factory=dict)
    """From when to when a rank does nothing at all."""


class _Rank:
    def __init__(self, rank: int) -> None:
        self.member = ag.Member(rank)
        self.flips: dict[int, list[str]] = {}
        """What came into force at each forward."""
        self.outcome: dict[str, bool] = {}
        self.bound_since: float | None = None
        self.longest_wait = 0.0


class Simulation:
    """`wishes[rank]` are the changes that a rank asks for, in its order, and what they are for it."""

    def __init__(
        self,
        wishes: list[dict[str, str]],
        weather: Weather,
        seed: int,
        failures: set[tuple[int, str]] = frozenset(),  # type: ignore[assignment]  # nobody writes to it
        called_off: set[tuple[int, str]] = frozenset(),  # type: ignore[assignment]  # as above
    ) -> None:
        self.weather = weather
        self.random = random.Random(seed)
        self.ranks = [_Rank(rank) for rank in range(len(wishes))]
        self.coordinator = ag.Coordinator(self.ranks[0].member, len(wishes))
        self.store: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.now = 0.0
        self._events: list[tuple[float, int, int, Callable[[], None]]] = []
        self._count = 0
        self._watching: dict[str, list[Callable[[], None]]] = defaultdict(list)
        self._called_off = called_off
        for rank, each in enumerate(self.ranks):
            self._run(rank, each.member.follow())
            self._later(rank, self.random.random() * weather.step, lambda rank=rank: self._forward(rank))
            for change, what in wishes[rank].items():
                reason = "no such kernel" if (rank, change) in failures else ""
                vote = self._vote(rank, change, ag.Vote(what, reason))
                self._later(
                    rank, self.random.random() * weather.late, lambda rank=rank, vote=vote: self._run(rank, vote)
                )
        self._run(0, self.coordinator.run())

    def run(self, until: float) -> None:
        """Let time pass."""
        while self._events and self._events[0][0] <= until:
            self.now, _, rank, event = heapq.heappop(self._events)
            crash = self.weather.crashes.get(rank)
            begin, end = self.weather.pauses.get(rank, (0.0, 0.0))
            if crash is not None and self.now >= crash:
                continue
            if begin <= self.now < end:
                self._later(rank, end - self.now, event)
            else:
                event()

    def _later(self, rank: int, delay: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + delay, self._count, rank, event))

    # -- training ------------------------------------------------------------------------------------------------------

    def _forward(self, rank: int) -> None:
        member = self.ranks[rank].member
        member.forward += 1
        if member.forward >= member.mark and member.arrive():
            self._run(rank, member.veto())
        self._go_on(rank)

    def _go_on(self, rank: int) -> None:
        each = self.ranks[rank]
        if each.member.is_bound:
            each.bound_since = self.now if each.bound_since is None else each.bound_since
            self._later(rank, 0.05, lambda: self._go_on(rank))
            return
        if each.bound_since is not None:
            each.longest_wait = max(each.longest_wait, self.now - each.bound_since)
            each.bound_since = None
        changes = each.member.due()
        if changes:
            each.flips[each.member.forward] = changes
        self._later(rank, self.random.uniform(0.5, 1.0) * self.weather.step, lambda: self._forward(rank))

    # -- the store -----------------------------------------------------------------------------------------------------

    def _vote(self, rank: int, change: str, vote: ag.Vote) -> ag.Steps:
        if vote.reason:
            yield ag.Set(ag.failure_key(change), f"rank {rank}: {vote.reason}")
        yield ag.Set(ag.vote_key(change, rank), vote.text())
        if rank == 0:
            self.coordinator.note(change)

    def _run(self, rank: int, steps: ag.Steps, result: Any = None) -> None:
        """Go on with a generator, up to the next thing that takes time."""
        try:
            step = steps.send(result)
            while isinstance(step, ag.Learn):
                self._learn(rank, step)
                step = steps.send(None)
        except StopIteration:
            return
        self._perform(rank, step, lambda result: self._run(rank, steps, result))

    def _learn(self, rank: int, step: ag.Learn) -> None:
        outcome = self.ranks[rank].outcome
        changes = dict.fromkeys(step.ballot.changes, True) if step.go else {}
        refused = dict.fromkeys(step.ballot.refused, False) if step.go is None else {}
        for change, good in (changes | refused).items():
            assert change not in outcome, f"{change} was decided twice"
            outcome[change] = good

    def _perform(self, rank: int, step: ag.Step, done: Callable[[Any], None]) -> None:
        if isinstance(step, ag.Pause):
            lead = self.weather.lead
            self._later(rank, self.random.random(), lambda: done(lead))
            return
        if isinstance(step, ag.Prepare):
            off = {change: "called off" for change in step.changes if (rank, change) in self._called_off}
            self._later(rank, self.weather.delay * self.random.random(), lambda: done(off))
            return
        self.requests[type(step).__name__] += 1
        answered = False

        def answer(result: Any) -> None:
            nonlocal answered
            if not answered:
                answered = True
                done(result)

        def ask() -> None:
            if answered:
                return
            if not self._is_lost():
                self._later(rank, self._delay(), lambda: at_store(step))
            if self.weather.loss:
                self._later(rank, 2 * self.weather.delay, ask)  # nothing was heard: ask again

        def at_store(step: ag.Step) -> None:
            if isinstance(step, ag.Get) and step.key not in self.store:
                self._watching[step.key].append(lambda: at_store(step))
                return
            result = self._at_store(step)
            if not self._is_lost():
                self._later(rank, self._delay(), lambda: answer(result))

        ask()

    def _delay(self) -> float:
        return self.random.random() * self.weather.delay / 2

    def _is_lost(self) -> bool:
        return self.random.random() < self.weather.loss

    def _at_store(self, step: ag.Step) -> Any:
        match step:
            case ag.Get(key):
                return self.store[key]
            case ag.GetAll(keys):
                return [self.store[key] for key in keys]
            case ag.There(keys):
                return all(key in self.store for key in keys)
            case ag.Set(key, value):
                self._write(key, value)
            case ag.Decide(key, value):
                if key not in self.store:
                    self._write(key, value)
                return self.store[key]
            case ag.Delete(keys):
                for key in keys:
                    self.store.pop(key, None)
        return None

    def _write(self, key: str, value: str) -> None:
        self.store[key] = value
        for waiting in self._watching.pop(key, []):
            waiting()

    # -- what came of it -----------------------------------------------------------------------------------------------

    def flips(self) -> Iterator[tuple[int, int, tuple[str, ...]]]:
        """Every flip of every rank: rank, forward, changes."""
        for rank, each in enumerate(self.ranks):
            for forward, changes in each.flips.items():
                yield rank, forward, tuple(changes)
