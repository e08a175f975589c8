"""The ranks of a process group, as one model of this process knows them: the gate of what they change together.

`agreement` is run here over the group's own store. Two threads do that: `esper-ranks-follow` waits for ballots and
verdicts, `esper-ranks-send` writes and, on the first rank, counts votes. Each has a connection of its own, so that
nobody else's requests wait for theirs. The thread that trains compares two numbers where a forward begins.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from esper.distributed import agreement
from esper.distributed.agreement import Ballot, Coordinator, Member, Steps
from esper.distributed.led_requests import Leading, RanksError, as_text
from esper.distributed.pace import WINDOW, Pace
from esper.distributed.store import Connection, StoreGoneError
from esper.errors import EsperError
from esper.execution.plans.runtime import Runtime
from esper.forking import reset_after_fork

__all__ = ["Ranks", "RanksError"]

_LOG = logging.getLogger("esper.distributed")
PATIENCE = 30.0
"""Seconds after which a rank says that it waits for others, and again after as long."""
_FIRST_LOOK, _LONGEST_LOOK = 0.002, 0.25


class _Change:
    """What this rank has voted for, or will."""

    def __init__(self, what: str, operations: tuple[Any, ...]) -> None:
        self.what = what
        self.operations = operations
        self.is_published = False
        self.since = time.monotonic()


class Ranks:
    """One model's peers on the other ranks of a process group.

    `store` is the group's, below a prefix that is this model's on all ranks; `carry_out` does here what the first rank
    asks of all. Made on all ranks before the same forward.
    """

    def __init__(
        self, runtime: Runtime, store: Any, rank: int, size: int, carry_out: Callable[[dict[str, Any]], object]
    ) -> None:
        self.rank = rank
        self.size = size
        self._runtime = weakref.ref(runtime, self._model_is_gone)
        self._carry_out = carry_out
        self._lock = threading.Lock()  # of all that follows; nothing else is waited for, or locked, while it is held
        self._changed = threading.Condition(self._lock)
        self._sending = threading.Condition(self._lock)
        self._member = Member(rank)
        self._coordinator = Coordinator(self._member, size) if rank == 0 else None
        self._changes: dict[str, _Change] = {}
        self._refused: dict[str, str] = {}  # before this rank asked for it
        self._numbers: dict[str, int] = {}
        self._restarts = 0
        self._to_send: deque[Steps] = deque()
        self._broken = ""
        self._is_closed = False
        self._leading = Leading()
        self._seconds = 0.01  # that a ballot takes
        self._told = time.monotonic()
        self._waiting, sending = Connection(store, rank), Connection(store, rank)
        parts = ((self._follow, self._waiting, "follow"), (self._send, sending, "send"))
        self._threads = [
            threading.Thread(target=self._work, args=(part, connection), name=f"esper-ranks-{name}", daemon=True)
            for part, connection, name in parts
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)
        reset_after_fork(self)

    def after_fork(self) -> None:
        """The child is none of the ranks; see `esper.forking`."""
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._sending = threading.Condition(self._lock)
        self._is_closed, self._threads, self._broken = True, [], "this process was forked from one of the ranks"

    @property
    def forward(self) -> int:
        """The number of the training forward that was begun last; with `commit="manual"`, of the commit."""
        return self._member.forward

    @property
    def agreed(self) -> int | None:
        """The forward at which the last of what is agreed comes into force; None if all of it is."""
        with self._lock:
            decided = self._member.decided
            return decided[-1].at if decided else None

    def close(self) -> None:
        """Take part no more; whatever is not decided by then comes to nothing, on all ranks."""
        self._end()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(2.0)

    def _model_is_gone(self, _: object) -> None:
        self._is_closed = True  # no more: whoever collects garbage may hold the lock

    def _end(self) -> None:
        with self._lock:
            self._is_closed = True
            self._sending.notify_all()

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """What this thread asks of the model in this block, all other ranks ask too; for the group's first rank.

        Raises :class:`RanksError` on any other.
        """
        if self.rank != 0:
            raise RanksError(f"only the first rank of the process group leads the others, and this is rank {self.rank}")
        self._leading.depth += 1
        try:
            yield
        finally:
            self._leading.depth -= 1

    @property
    def is_leading(self) -> bool:
        """Whether this thread is in such a block."""
        return self._leading.depth > 0

    # -- Gate ----------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """See `Gate`. Waits only where a ballot takes longer than the forwards that were reckoned for it."""
        member = self._member
        member.forward += 1
        if member.forward >= member.mark:
            self._arrive()

    def _arrive(self) -> None:
        with self._lock:
            if self._member.arrive():
                self._post(self._member.veto())
            while self._member.is_bound:
                if self._broken:
                    raise RanksError(
                        f"forward {self.forward} may be one at which the ranks change their plan, and it cannot be "
                        f"told any more: {self._broken}"
                    )
                self._changed.wait(1.0)
            for change in self._member.due():
                each = self._changes.pop(change, None)
                for operation in each.operations if each is not None else ():
                    operation.is_held = False

    def number(self, targets: Sequence[str]) -> str:
        target = agreement.joint_target(targets)
        with self._lock:
            self._numbers[target] = self._numbers.get(target, 0) + 1
            return agreement.change_key(f"{self._restarts}/{target}", self._numbers[target])

    def offer(self, change: str, what: str, *operations: Any) -> None:
        for operation in operations:
            operation.is_held = True
        with self._lock:
            self._changes[change] = _Change(what, operations)
            refused = self._broken or self._refused.pop(change, "")
            if not refused:
                self._post(self._vote(change, what))
        if refused:  # not at once: whoever offers holds the runtime's lock, and may not have let go of what it holds
            threading.Thread(target=self._fail, args=(change, refused), name="esper-ranks-refuse", daemon=True).start()

    def refuse(self, change: str, what: str, reason: str) -> None:
        with self._lock:
            self._changes.pop(change, None)
            if self._refused.pop(change, None) is None and not self._broken:
                self._post(self._vote(change, what, reason))

    def lead(self, request: Callable[[], dict[str, Any]]) -> None:
        if self._coordinator is not None and self._leading.depth:
            text = as_text(request())
            with self._lock:
                self._coordinator.ask(text)
                self._post(_nothing())

    def restart(self) -> None:
        with self._lock:
            self._restarts += 1
            self._numbers.clear()
            left = list(self._changes)
        for change in left:
            self._fail(change, "the model's state was loaded from elsewhere meanwhile")

    # -- on the background threads -------------------------------------------------------------------------------------

    def _post(self, steps: Steps) -> None:
        self._to_send.append(steps)
        self._sending.notify_all()

    def _vote(self, change: str, what: str, reason: str = "") -> Steps:
        if reason:
            yield agreement.Set(agreement.failure_key(change), f"rank {self.rank}: {reason}")
        yield agreement.Set(agreement.vote_key(change, self.rank), agreement.Vote(what, reason).text())
        if self._coordinator is not None:
            self._coordinator.note(change)

    def _work(self, part: Callable[[Connection], None], connection: Connection) -> None:
        try:
            part(connection)
        except StoreGoneError as error:
            self._break(str(error))
        except Exception as error:  # noqa: BLE001  # a thread of its own: who trains goes on, and is told
            self._break(f"{type(error).__name__}: {error}")
            _LOG.exception("the agreement with other ranks ends")

    def _break(self, reason: str) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._broken = self._broken or reason
            bound = set(self._member.open.changes) if self._member.open else set()
            decided = {change for ballot in self._member.decided for change in ballot.changes}
            left = [change for change in self._changes if change not in bound | decided]
            self._changed.notify_all()
        if left or bound:
            _LOG.warning("rank %d changes its model no more: %s", self.rank, reason)
        for change in left:
            self._fail(change, reason)

    def _follow(self, connection: Connection) -> None:
        self._drive(self._member.follow(), connection, self._perform)

    def _send(self, connection: Connection) -> None:
        coordinator = None if self._coordinator is None else self._coordinator.run()
        if coordinator is not None:
            next(coordinator)
        look, pace = WINDOW, Pace()
        while True:
            with self._lock:
                idle = self._coordinator is None or self._coordinator.is_idle
                self._sending.wait_for(lambda: self._to_send or self._is_closed, PATIENCE / 2 if idle else look)
                if self._is_closed:
                    break
                to_send, self._to_send = list(self._to_send), deque()
            for steps in to_send:
                self._drive(steps, connection, self._perform)
            self._say_who_is_missing(connection)
            if self._coordinator is None or coordinator is None or self._coordinator.is_idle:
                continue
            if pace.begin(self.forward):  # before anything is decided, see how fast forwards begin
                look = WINDOW
                continue
            look = _FIRST_LOOK if to_send else min(look * 1.3, _LONGEST_LOOK)
            self._count_votes(coordinator, connection, pace.lead(self.forward, 3 * min(self._seconds, 5.0)))
            if self._coordinator.is_idle:
                pace.end()
        connection.wake(self._waiting)
        atexit.unregister(self.close)

    def _count_votes(self, coordinator: Steps, connection: Connection, lead: int) -> None:
        """Have the coordinator go on until it wants to pause again."""
        result: Any = lead
        while not self._is_closed:
            with self._lock:
                step = coordinator.send(result)
                self._changed.notify_all()
            if isinstance(step, agreement.Pause):
                return
            if isinstance(step, agreement.Set) and step.key.startswith("ballot/"):
                self._opened = time.monotonic()
            result = self._perform(step, connection)
            if isinstance(step, agreement.Set | agreement.Decide):
                connection.ring(self.size)
            if isinstance(step, agreement.Decide):
                self._seconds += (time.monotonic() - self._opened - self._seconds) / 2

    def _drive(
        self, steps: Steps, connection: Connection, perform: Callable[[agreement.Step, Connection], Any]
    ) -> None:
        result: Any = None
        while not self._is_closed:
            with self._lock:
                try:
                    step = steps.send(result)
                except StopIteration:
                    return
                finally:
                    self._changed.notify_all()  # a verdict may be known now
            result = perform(step, connection)

    def _perform(self, step: agreement.Step, connection: Connection) -> Any:
        match step:
            case agreement.Prepare(changes):
                return self._prepare(changes)
            case agreement.Learn(ballot, go):
                return self._learn(ballot, go)
            case _:
                return connection.perform(step, lambda: self._is_closed)

    def _learn(self, ballot: Ballot, go: bool | None) -> None:
        if go is None:
            for change, reason in ballot.refused.items():
                self._fail(change, reason)
            for request in ballot.asks if self.rank != 0 else ():
                asked = json.loads(request)
                try:
                    self._carry_out(asked)
                except (EsperError, LookupError, ValueError) as error:  # before it had a number among the ranks
                    change = self.number([f"{layer}:{seed}" for layer, seed in asked["seeds"]])
                    self.refuse(change, "", f"it cannot be asked for here: {error}")
        elif go:
            with self._lock:
                changes = [self._changes[name] for name in ballot.changes if name in self._changes]
            _LOG.info("from forward %d on, on all %d ranks: %s", ballot.at, self.size, ", ".join(ballot.changes))
            for operation in (operation for change in changes for operation in change.operations):
                operation.answer(True)

    def _prepare(self, names: tuple[str, ...]) -> dict[str, str]:
        """Have exactly these changes staged, and held, beside what is staged already; or why that cannot be."""
        runtime = self._runtime()
        while runtime is not None:
            with self._lock:
                changes = {name: self._changes.get(name) for name in names}
            gone = {name: "it was called off" for name, each in changes.items() if each is None}
            new = [each for each in changes.values() if each and each.operations and not each.is_published]
            base = plan = runtime.target
            for operation in (operation for each in new for operation in each.operations):
                plan = operation.edit(plan)
            try:
                if not gone and not runtime.ready(plan):
                    runtime.prepare(plan)
            except Exception as error:  # noqa: BLE001  # law 4: it is why nobody gets the kernel
                return dict.fromkeys(names, f"{type(error).__name__}: {error}")
            with runtime.lock:
                off = [each for each in new if not all(operation.is_wanted for operation in each.operations)]
                gone.update({name: "something else was asked since" for name in names if changes[name] in off})
                if gone:
                    return gone
                if base is runtime.target:
                    for each in new:
                        each.is_published = True
                        for operation in each.operations:
                            operation.publish()
                        runtime.publish(*each.operations)
                    return {}
        return dict.fromkeys(names, "the model is gone")

    def _fail(self, name: str, reason: str) -> None:
        """A change comes to nothing."""
        runtime = self._runtime()
        with self._lock:
            each = self._changes.pop(name, None)
            if each is None:
                self._refused[name] = reason
        if each is None or runtime is None:
            return
        with runtime.lock:
            for operation in each.operations:
                if each.is_published:
                    runtime.withdraw(operation, in_any_case=True)
                operation.change, operation.is_held = "", False
        for operation in each.operations:
            operation.fail(RanksError(reason))
            operation.answer(False)

    def _say_who_is_missing(self, connection: Connection) -> None:
        now = time.monotonic()
        with self._lock:
            decided = {change for ballot in self._member.decided for change in ballot.changes}
            late = [
                each.what for name, each in self._changes.items() if now - each.since > PATIENCE and name not in decided
            ]
        if not late or now - self._told < PATIENCE:
            return
        self._told = now
        if self._coordinator is None:
            said = connection.get("missing", lambda: True) if connection.has(("missing",)) else "rank 0, which decides"
        else:
            keys = self._coordinator.missing
            missing = [key.rpartition("/")[2] for key in keys if not connection.has((key,))]
            said = ("rank " if len(missing) == 1 else "ranks ") + ", ".join(missing[:8])
            said += f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            connection.set("missing", said)
        _LOG.warning("rank %d has waited %.0f s for %s: to %s", self.rank, PATIENCE, said, "; ".join(late[:3]))


def _nothing() -> Steps:
    """Nothing to send: whoever sends looks what there is to do."""
    yield from ()
