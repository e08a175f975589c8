"""The agreement of ranks about changes, as two programs without threads, clocks or torch.

Every rank is a :class:`Member`; the first one is the :class:`Coordinator` too. Both are generators that yield what
they want done (:data:`Step`), by a store in which a key is written once and kept until it is deleted, and are sent the
result. `esper.distributed.ranks` runs them over torch's store, the tests over a simulated one.

A change is what all ranks ask of one seed, or of the same ones together, as the n-th thing. Each rank votes for it once
it has made ready for it. The coordinator puts changes for which all have voted on a ballot, with the number of a
forward a little ahead. A member answers yes only if it has not begun that forward, and from then on is bound: it begins
that forward only once it knows the verdict, which is a register that is written once. The coordinator writes "go" after
all have answered yes; a member that comes near the forward before it knows the verdict tries to write "void", so that
it need not wait for the others, and the change is put on a later ballot.

So all ranks change at the forward of the ballot whose verdict is "go", or none does; and no ballot is open beside
another, so that a forward has one plan.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

__all__ = [
    "NEVER", "Answer", "Ballot", "Coordinator", "Decide", "Delete", "Get", "GetAll", "Learn", "Member", "Pause",
    "Prepare", "Set", "Step", "Steps", "There", "Vote", "change_key", "failure_key", "joint_target", "vote_key",
]  # fmt: skip

NEVER = 2**63
_GO, _VOID = "go", "void"


@dataclass(frozen=True, slots=True)
class Get:
    """The value of `key`, as soon as there is one."""

    key: str


@dataclass(frozen=True, slots=True)
class GetAll:
    """The values of `keys`, which are there."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class There:
    """Whether all of `keys` have values."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Set:
    """Write `value`."""

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Decide:
    """Write `value` unless there is one; the one that is there then."""

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Forget `keys`, which nobody reads any more."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prepare:
    """Make ready for exactly `changes`, from here on to be kept so; the reasons why some cannot be had, by change."""

    changes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Learn:
    """Told to this rank: a ballot was opened, or with `go` there is a verdict on it."""

    ballot: Ballot
    go: bool | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """Let time pass: `idle` until there is something to do, else a little.

    The result is how many forwards this rank will begin in the time that a ballot takes; 0 if it has stopped.
    """

    idle: bool


Step = Get | GetAll | There | Set | Decide | Delete | Prepare | Learn | Pause
Steps = Generator[Step, Any, None]


class _Text:
    """Something that is written into the store as JSON."""

    __slots__ = ()

    def text(self) -> str:
        return json.dumps([getattr(self, name) for name in self.__dataclass_fields__])  # type: ignore[attr-defined]  # of subclasses

    @classmethod
    def read(cls, text: str) -> Self:
        return cls(*json.loads(text))


@dataclass(frozen=True, slots=True)
class Vote(_Text):
    """A rank is ready for a change, or says why not. `what` it is: the same on all ranks."""

    what: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Ballot(_Text):
    """`changes` that are to come into force `at` the forward of that number, and what cannot (`refused`, with reasons).

    From forward `near` on a member that does not know the verdict tries to void it. `asks` are requests that the
    coordinator's rank makes of all.
    """

    number: int
    changes: Sequence[str] = ()
    at: int = 0
    near: int = 0
    refused: Mapping[str, str] = field(default_factory=dict)
    asks: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Answer(_Text):
    """A member's answer to a ballot: yes, or that it came too `late`, or what it `failed` at; and how far it is."""

    forward: int
    late: bool = False
    failed: Mapping[str, str] = field(default_factory=dict)


def change_key(target: str, number: int) -> str:
    """The change that is the `number`-th thing asked of `target`."""
    return f"{target}#{number}"


def joint_target(targets: Sequence[str]) -> str:
    """What stands for several targets of which something is asked together, on all ranks in the same order."""
    if len(targets) == 1:
        return targets[0]
    digest = hashlib.sha256("\n".join(targets).encode()).hexdigest()[:16]
    return f"{targets[0]} and {len(targets) - 1} more, {digest}"


def vote_key(change: str, rank: int) -> str:
    """Where a rank's vote for a change stands."""
    return f"vote/{change}/{rank}"


def failure_key(change: str) -> str:
    """Where a rank that cannot have a change says so, that others need not wait for the votes of all."""
    return f"failure/{change}"


def _ballot_key(number: int) -> str:
    return f"ballot/{number}"


def _answer_key(number: int, rank: int) -> str:
    return f"answer/{number}/{rank}"


def _verdict_key(number: int) -> str:
    return f"verdict/{number}"


class Member:
    """One rank. :meth:`begin` belongs to whoever trains, the rest to whoever runs :meth:`follow`; one at a time."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.forward = 0
        """The number of the forward that was begun last."""
        self.mark = NEVER
        """The forward at which :meth:`arrive` has something to do."""
        self.open: Ballot | None = None
        """The ballot that it answered with yes and of which it does not know the verdict."""
        self.decided: deque[Ballot] = deque()
        """What is to come into force, in that order."""
        self._is_vetoed = False

    @property
    def is_bound(self) -> bool:
        """Whether the forward that begins has to wait for the verdict."""
        return self.open is not None and self.forward >= self.open.at

    def arrive(self) -> bool:
        """The forward that begins is at the mark, or beyond; whether :meth:`veto` is to be run, beside training."""
        vetoes = self.open is not None and not self._is_vetoed and self.forward >= self.open.near
        self._is_vetoed |= vetoes
        self._set_mark()
        return vetoes

    def due(self) -> list[str]:
        """The changes that come into force with the forward that begins, if it is not bound."""
        changes: list[str] = []
        while self.decided and self.decided[0].at <= self.forward:
            changes += self.decided.popleft().changes
        self._set_mark()
        return changes

    def follow(self) -> Steps:
        """Answer ballots, one after the other."""
        number = 1
        while True:
            ballot = Ballot.read((yield Get(_ballot_key(number))))
            yield Delete((_answer_key(number - 1, self.rank),) if number > 1 else ())
            yield Learn(ballot)
            if ballot.changes:
                failed = yield Prepare(tuple(ballot.changes))
                late = not failed and not self._promise(ballot)
                yield Set(_answer_key(number, self.rank), Answer(self.forward, late, failed).text())
                yield Learn(ballot, self.learn(ballot, (yield Get(_verdict_key(number)))))
            number += 1

    def veto(self) -> Steps:
        """Have the open ballot decided now, so that the forward at which it is need not wait for other ranks."""
        ballot = self.open
        if ballot is not None:
            self.learn(ballot, (yield Decide(_verdict_key(ballot.number), f"{_VOID} by rank {self.rank}")))

    def learn(self, ballot: Ballot, verdict: str) -> bool:
        """Take notice of a verdict, once; whether it is "go"."""
        if self.open is not None and self.open.number == ballot.number:
            self.open = None
            if verdict == _GO:
                self.decided.append(ballot)
            self._set_mark()
        return verdict == _GO

    def _promise(self, ballot: Ballot) -> bool:
        self.open, self._is_vetoed = ballot, False
        self._set_mark()
        if self.forward < ballot.at:  # read after the mark is set: whoever trains sees the mark, or is seen here
            return True
        self.open = None
        self._set_mark()
        return False

    def _set_mark(self) -> None:
        mark = self.decided[0].at if self.decided else NEVER
        if self.open is not None:
            mark = min(mark, self.open.at if self._is_vetoed else self.open.near)
        self.mark = mark


class Coordinator:
    """The first rank's second part: it counts the votes and opens ballots. `note` and `ask` are for any thread."""

    def __init__(self, member: Member, ranks: int) -> None:
        self._member = member
        self._ranks = range(ranks)
        self._noted: deque[str] = deque()
        self._asks: deque[str] = deque()
        self._waiting: list[str] = []  # for votes
        self._ready: list[str] = []
        self._refused: dict[str, str] = {}
        self._number = 0
        self._latest = 0  # forward at which something was decided to come into force
        self._reached = 0  # forward that some rank has begun
        self._tries = 0
        self.missing: tuple[str, ...] = ()
        """The keys that it is waiting for."""

    def note(self, change: str) -> None:
        """This rank has voted for `change`."""
        self._noted.append(change)

    def ask(self, request: str) -> None:
        """Ask `request` of all ranks."""
        self._asks.append(request)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to be decided."""
        return not (self._noted or self._asks or self._waiting or self._ready or self._refused)

    def run(self) -> Steps:
        """Count votes and open ballots, for ever."""
        while True:
            lead = yield Pause(self.is_idle)
            while self._noted:
                self._waiting.append(self._noted.popleft())
            for change in tuple(self._waiting):
                yield from self._count(change)
            changes = [each for each in self._ready if not self._has_earlier(each)]
            if changes or self._refused or self._asks:
                yield from self._open(changes, lead)

    def _count(self, change: str) -> Steps:
        keys = tuple(vote_key(change, rank) for rank in self._ranks)
        if (yield There(keys)):
            votes = [Vote.read(text) for text in (yield GetAll(keys))]
            refusal = _refusal(votes)
        elif (yield There((failure_key(change),))):
            refusal = yield Get(failure_key(change))
        else:
            self.missing = keys
            return
        self._waiting.remove(change)
        if refusal:
            self._refused[change] = refusal
        else:
            self._ready.append(change)

    def _has_earlier(self, change: str) -> bool:
        """Whether something that was asked of the same seed before is not decided, and not ready either."""
        target, _, number = change.rpartition("#")
        before = [each.rpartition("#") for each in self._waiting]
        return any(each == target and int(other) < int(number) for each, _, other in before)

    def _open(self, changes: list[str], lead: int) -> Steps:
        changes.sort(key=lambda change: int(change.rpartition("#")[2]))
        self._number += 1
        ahead = max(lead, min(1, self._tries)) * 2**self._tries + 1
        at = max(max(self._member.forward, self._reached) + ahead, self._latest + 1)
        near = at - max(1, ahead // 4)
        refused, self._refused = self._refused, {}
        asks = tuple(self._asks.popleft() for _ in range(len(self._asks)))
        ballot = Ballot(self._number, changes, at, near, refused, asks)
        yield Set(_ballot_key(ballot.number), ballot.text())
        yield Delete(tuple(map(failure_key, refused)))
        if changes:
            yield from self._close(ballot)

    def _close(self, ballot: Ballot) -> Steps:
        keys = tuple(_answer_key(ballot.number, rank) for rank in self._ranks)
        self.missing = keys
        while not (yield There(keys)):
            yield Pause(False)
        self.missing = ()
        answers = [Answer.read(text) for text in (yield GetAll(keys))]
        yes = not any(each.late or each.failed for each in answers)
        self._reached = max(each.forward for each in answers)
        verdict = yield Decide(_verdict_key(ballot.number), _GO if yes else _VOID)
        if verdict == _GO:
            self._ready = [each for each in self._ready if each not in ballot.changes]
            self._latest, self._tries = ballot.at, 0
            return
        self._tries += 1
        for rank, answer in enumerate(answers):
            for change, reason in answer.failed.items():
                self._refused.setdefault(change, f"rank {rank}: {reason}")
        self._ready = [each for each in self._ready if each not in self._refused]


def _refusal(votes: Iterable[Vote]) -> str:
    """Why a change for which all ranks have voted comes to nothing; "" if it does not."""
    votes = list(votes)
    failed = [f"rank {rank}: {vote.reason}" for rank, vote in enumerate(votes) if vote.reason]
    if failed:
        return "; ".join(failed[:4])
    for rank, vote in enumerate(votes):
        if vote.what != votes[0].what:
            return f"the ranks ask for different things: rank 0 to {votes[0].what}, rank {rank} to {vote.what}"
    return ""
