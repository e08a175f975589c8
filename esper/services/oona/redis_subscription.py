"""A subscription over Redis, which receives everything. A member of a group differs in what it overrides."""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from redis import Redis
from redis.backoff import EqualJitterBackoff
from redis.exceptions import RedisError, ResponseError

from esper.contracts.messages import OonaMessage
from esper.services.oona.recent_ids import RecentIds
from esper.services.oona.redis_server import OutageLog, RedisServer
from esper.services.oona.streams import Entry, Position, StreamId, Streams, StreamState, entries_of

__all__ = ["RedisSubscription"]

_log = logging.getLogger("esper.services.oona_client")  # one part of `ESPER_LOGS`
_LONGEST_BLOCK = 0.5  # seconds that one command waits at the server, and closing for it
_LAST_NUMBER = 2**64 - 1
_BACKOFF = EqualJitterBackoff(cap=1.0, base=0.05)


class RedisSubscription:
    """A :class:`~esper.services.oona.BusSubscription` over a client that it shares with its bus.

    It receives everything that comes, once: what is lost over a fallen connection is read after it. :meth:`receive`
    belongs to one thread, :meth:`close` to any. A server that cannot be reached is tried again for as long as somebody
    waits in :meth:`receive`.
    """

    def __init__(self, server: RedisServer, client: Redis, streams: Streams, topics: Sequence[str]) -> None:
        self._client = client
        self._streams = streams
        self._keys = [streams.key(topic) for topic in topics]
        self._outage = OutageLog(server, f"a subscription to {', '.join(topics)}")
        self._longest_block = min(_LONGEST_BLOCK, server.socket_timeout / 2)
        self._stop = threading.Event()
        self._since = time.monotonic()
        self._positions: dict[str, Position] = {}
        self._prepared = False
        self._receiver: int | None = None
        self._arrived: deque[tuple[Entry, OonaMessage]] = deque()
        self._recent = RecentIds()
        self._dropped = 0
        self.unreadable = 0
        """Entries that were no messages."""
        try:
            self._prepare(late=False)
        except (RedisError, OSError) as error:  # the first receive() goes on trying
            self._outage.lost(error)

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
        failures = 0
        while not self._stop.is_set():
            try:
                if not self._arrived:
                    self._look(limit, deadline)
                    self._outage.reached()
                    failures = 0
            except (RedisError, OSError) as error:
                self._prepared = False
                made_again = isinstance(error, ResponseError) and "NOGROUP" in str(error)
                if not made_again and not self._stop.is_set():
                    failures += 1
                    self._outage.lost(error)
                    self._stop.wait(_least(_BACKOFF.compute(failures), deadline))
            messages = self._hand_out(limit)
            if messages or (deadline is not None and time.monotonic() >= deadline):
                return messages
        self._finish()
        return ()

    def close(self) -> None:
        """See :class:`~esper.services.oona.BusSubscription`.

        On another thread than the one that receives it returns at once; that thread's :meth:`receive` returns when the
        server has answered, and its next one settles what it had received.
        """
        if not self._stop.is_set():
            self._stop.set()
            if self._receiver == threading.get_ident():
                self._finish()

    def after_fork(self) -> None:
        """Closed in the child, whose parent goes on; see `esper.forking`."""
        self._stop = threading.Event()
        self._stop.set()
        self._arrived.clear()

    # -- what a member of a group does differently ---------------------------------------------------------------------

    def _begin(self) -> None:
        """The server is there, at first or again, and positions are known: what has to be done before reading."""

    def _look_behind(self, limit: int) -> None:
        """Get what was handed out before and is not handled; those received before count as handled."""

    def _read(self, client: Redis, limit: int, block: int | None = None) -> Any:
        """Read what is new, with a client or into a pipeline; `block` is for how many ms the server waits for some."""
        return client.xread({key: self._positions[key].text for key in self._keys}, count=limit, block=block)

    def _follow(self, key: str, state: StreamState, groups: Any = None) -> None:
        """Take note of what a stream is, and `groups` of it just before reading, and count what was trimmed unread."""
        del groups  # what others have read
        self._dropped += self._positions[key].follow(state)

    def _take(self, entries: list[Entry]) -> list[Entry]:
        """Those of `entries`, just read, that are there."""
        for entry in entries:
            self._positions[entry.key].read(entry)
        return entries

    def _refuse(self, entry: Entry, reason: str) -> None:
        """`entry` is no message; that is logged and counted already."""

    def _handed_out(self, entry: Entry) -> None:
        """The message of `entry` is on its way to whoever receives, or was already when it came before."""

    def _finish(self) -> None:
        """The last that the receiving thread does."""

    # -- reading -------------------------------------------------------------------------------------------------------

    def _prepare(self, *, late: bool = True) -> None:
        """Find out where to read on: from the moment of subscription, even if there was no server then."""
        pipeline = self._client.pipeline(transaction=True)
        for key in self._keys:
            pipeline.xinfo_stream(key)
        pipeline.time()
        *answers, (seconds, microseconds) = pipeline.execute(raise_on_error=False)
        elapsed = time.monotonic() - self._since
        for key, state in zip(self._keys, map(StreamState.of, answers), strict=True):
            if key in self._positions:
                self._follow(key, state)
            elif late:
                milliseconds = seconds * 1000 + microseconds // 1000 - int(elapsed * 1000)
                since: StreamId = (milliseconds - 1, _LAST_NUMBER)
                self._positions[key] = Position(min(since, state.last), None)
            else:
                self._positions[key] = Position(state.last, state.added)
        self._begin()
        self._prepared = True

    def _look(self, limit: int, deadline: float | None) -> None:
        """Take the messages that are there, or wait for some, until `deadline` at most."""
        if not self._prepared:
            self._prepare()
        self._look_behind(limit)
        if not self._arrived:
            self._take_what_is_there(limit)
        seconds = _least(self._longest_block, deadline)
        if not self._arrived and seconds > 0 and not self._stop.is_set():
            answer = self._read(self._client, limit, max(1, int(seconds * 1000)))
            self._keep(self._take(entries_of(answer)))

    def _take_what_is_there(self, limit: int) -> None:
        """Read without waiting, and count what was trimmed unread: in one step, so that one member alone counts it."""
        pipeline = self._client.pipeline(transaction=True)
        for key in self._keys:
            pipeline.xinfo_stream(key)
            pipeline.xinfo_groups(key)
        self._read(pipeline, limit)
        *looks, read = pipeline.execute(raise_on_error=False)
        if isinstance(read, ResponseError):
            raise read
        for key, answer, groups in zip(self._keys, looks[::2], looks[1::2], strict=True):
            self._follow(key, StreamState.of(answer), groups)
        self._keep(self._take(entries_of(read)))

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
            if self._recent.add(message.event_id):
                messages.append(message)
            self._handed_out(entry)
        return tuple(messages)


def _least(seconds: float, deadline: float | None) -> float:
    return seconds if deadline is None else max(0.0, min(seconds, deadline - time.monotonic()))
