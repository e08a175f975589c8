"""Receiving from Redis: what a subscription does by itself, and one that reads everything from its beginning on."""

from __future__ import annotations

import heapq
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from redis.exceptions import ResponseError

from esper.contracts.messages import OonaMessage
from esper.services.oona.errors import BusUnavailableError
from esper.services.oona.recent_ids import RecentIds
from esper.services.oona.redis_link import Backoff, Command, RedisAddress, RedisLink
from esper.services.oona.streams import Entry, Position, StreamId, Streams, StreamState, entries_of

__all__ = ["LiveSubscription", "RedisSubscription"]

_log = logging.getLogger("esper.services.oona_client")  # one part of `ESPER_LOGS`
_LONGEST_BLOCK = 1.0  # seconds that one command waits at the server
_LAST_NUMBER = 2**64 - 1


class RedisSubscription(ABC):
    """A :class:`~esper.services.oona.BusSubscription` over a connection of its own.

    :meth:`receive` belongs to one thread, :meth:`close` to any. A server that cannot be reached is tried again for as
    long as somebody waits in :meth:`receive`.
    """

    def __init__(
        self,
        address: RedisAddress,
        streams: Streams,
        topics: Sequence[str],
        on_close: Callable[[RedisSubscription], None],
    ) -> None:
        self._address = address
        self._streams = streams
        self._keys = [streams.key(topic) for topic in topics]
        self._on_close = on_close
        self._stop = threading.Event()
        self._purpose = f"a subscription to {', '.join(topics)}"
        self._link = RedisLink(address, self._purpose, self._stop)
        self._since = time.monotonic()
        self._positions: dict[str, Position] = {}
        self._prepared = False
        self._answer_by = 0.0
        self._receiver: int | None = None
        self._arrived: deque[tuple[Entry, OonaMessage]] = deque()
        self._recent = RecentIds()
        self._dropped = 0
        self.unreadable = 0
        """Entries that were no messages."""
        try:
            self._prepare(late=False)
        except BusUnavailableError:  # the link has logged it; the first receive() goes on trying
            _log.debug("subscribed without a server")

    # -- BusSubscription -----------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._stop.is_set()

    @property
    def dropped(self) -> int:
        """Messages that were trimmed from their streams before they were read."""
        return self._dropped

    def receive(self, timeout: float | None = None, limit: int = 512) -> Sequence[OonaMessage]:
        """See :class:`~esper.services.oona.BusSubscription`."""
        self._receiver = threading.get_ident()
        deadline = None if timeout is None else time.monotonic() + timeout
        backoff = Backoff()
        while not self._stop.is_set():
            try:
                if not self._arrived:
                    self._look(limit, deadline)
                    backoff.reset()
            except BusUnavailableError:  # the link has logged it
                self._prepared = False
                self._stop.wait(_least(backoff.seconds(), deadline))
            messages = self._hand_out(limit)
            if messages or (deadline is not None and time.monotonic() >= deadline):
                return messages
        self._finish()
        return ()

    def close(self) -> None:
        """See :class:`~esper.services.oona.BusSubscription`. On another thread than the one that receives: at once.

        That thread's next :meth:`receive` settles what it had received.
        """
        if self._stop.is_set():
            return
        self._stop.set()
        self._on_close(self)
        if self._receiver == threading.get_ident():
            self._finish()

    def after_fork(self) -> None:
        """Closed in the child, whose parent goes on with the connection; see `esper.forking`."""
        self._link.forget()
        self._stop = threading.Event()
        self._stop.set()
        self._link = RedisLink(self._address, self._purpose, self._stop)
        self._arrived.clear()

    # -- what a subscription of one kind does --------------------------------------------------------------------------

    def _follow(self, key: str, state: StreamState) -> None:
        """Take note of what a stream is."""
        self._dropped += self._positions[key].follow(state)

    @abstractmethod
    def _begin(self, states: dict[str, StreamState]) -> None:
        """The connection is there, and positions are known: what has to be done before reading."""

    @abstractmethod
    def _request(self, limit: int, block: Command) -> list[Command]:
        """The commands that ask for messages, `block` in the one that may wait; none if some have arrived."""

    @abstractmethod
    def _take(self, answers: list[Any]) -> Iterable[Entry]:
        """The entries in the answers to :meth:`_request`. Raises `ResponseError` if it has to be begun again."""

    @abstractmethod
    def _refuse(self, entry: Entry, reason: str) -> None:
        """`entry` is no message."""

    @abstractmethod
    def _handed_out(self, entry: Entry) -> None:
        """The message of `entry` is on its way to whoever receives, or was already when it came before."""

    @abstractmethod
    def _settle(self) -> None:
        """Those received before count as handled."""

    @abstractmethod
    def _finish(self) -> None:
        """The last that the receiving thread does: it closes the connection."""

    # -- reading -------------------------------------------------------------------------------------------------------

    def _prepare(self, *, late: bool = True) -> None:
        """Connect, and find out where to read on: from the moment of subscription, even if there was no server then."""
        *answers, clock = self._link.call(*(("XINFO", "STREAM", key) for key in self._keys), ("TIME",))
        states = {key: StreamState.of(answer) for key, answer in zip(self._keys, answers, strict=True)}
        elapsed = time.monotonic() - self._since
        for key, state in states.items():
            if key in self._positions:
                self._follow(key, state)
            elif late:
                milliseconds = int(clock[0]) * 1000 + int(clock[1]) // 1000 - int(elapsed * 1000)
                since: StreamId = (milliseconds - 1, _LAST_NUMBER)
                self._positions[key] = Position(min(since, state.last), None)
            else:
                self._positions[key] = Position(state.last, state.added)
        self._begin(states)
        self._prepared = True

    def _look(self, limit: int, deadline: float | None) -> None:
        """Ask for messages and wait for the answer, until `deadline`; it may as well come in the next call."""
        if not self._link.waits:
            if not self._prepared or not self._link.connected:
                self._prepare()
            self._settle()
            seconds = _least(min(_LONGEST_BLOCK, self._address.socket_timeout / 2), deadline)
            block = ("BLOCK", max(1, int(seconds * 1000))) if seconds > 0 else ()
            request = self._request(limit, block)
            if not request:
                return
            self._link.send(*request)
            self._answer_by = time.monotonic() + seconds + self._address.socket_timeout
        wait = max(0.0, self._answer_by - time.monotonic())
        at_least = 0.0 if deadline is None else min(self._address.socket_timeout, 0.05)
        answers = self._link.answers(max(at_least, _least(wait, deadline)))
        if answers is None:
            if time.monotonic() >= self._answer_by:
                raise self._link.lost("it did not answer in time")
            return
        try:
            self._keep(self._take(answers))
        except ResponseError as error:
            self._prepared = False
            if "NOGROUP" not in str(error):
                raise self._link.lost(error) from None

    def _keep(self, entries: Iterable[Entry]) -> None:
        """Read the messages of `entries`; in the order of sending, as far as the senders' clocks tell across topics."""
        read: list[tuple[Entry, OonaMessage]] = []
        for entry in entries:
            try:
                read.append((entry, entry.message()))
            except ValueError as error:
                self.unreadable += 1
                _log.warning("entry %s of %s is no message: %s", entry.text_id, entry.key, error)
                self._refuse(entry, str(error))
        streams = [list(group) for _, group in groupby(read, lambda pair: pair[0].key)]
        self._arrived.extend(heapq.merge(*streams, key=lambda pair: (pair[0].id[0], pair[1].timestamp)))

    def _hand_out(self, limit: int) -> Sequence[OonaMessage]:
        messages: list[OonaMessage] = []
        while self._arrived and len(messages) < limit:
            entry, message = self._arrived.popleft()
            fresh = self._recent.add(message.event_id)
            if fresh:
                messages.append(message)
            self._handed_out(entry)
        return tuple(messages)


class LiveSubscription(RedisSubscription):
    """Everything that comes, once: what is lost over a fallen connection is read after it."""

    def _begin(self, states: dict[str, StreamState]) -> None:
        pass

    def _request(self, limit: int, block: Command) -> list[Command]:
        ids = [self._positions[key].text for key in self._keys]
        read: Command = ("XREAD", *block, "COUNT", limit, "STREAMS", *self._keys, *ids)
        return [*(("XINFO", "STREAM", key) for key in self._keys), read]

    def _take(self, answers: list[Any]) -> Iterable[Entry]:
        *states, read = answers
        if isinstance(read, ResponseError):
            raise read
        entries = list(entries_of(read))
        for key, state in zip(self._keys, states, strict=True):
            self._follow(key, StreamState.of(state))
        for entry in entries:
            self._positions[entry.key].read(entry)
        return entries

    def _refuse(self, entry: Entry, reason: str) -> None:
        pass  # it is logged and counted, and there is nobody who could handle it better

    def _handed_out(self, entry: Entry) -> None:
        pass

    def _settle(self) -> None:
        pass

    def _finish(self) -> None:
        self._link.drop()


def _least(seconds: float, deadline: float | None) -> float:
    return seconds if deadline is None else max(0.0, min(seconds, deadline - time.monotonic()))
