"""Receiving from Redis as a member of a group: each message goes to one member, and is handled at least once."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from redis.exceptions import ResponseError

from esper.services.oona.errors import BusUnavailableError
from esper.services.oona.redis_link import Command, RedisAddress
from esper.services.oona.redis_subscription import RedisSubscription
from esper.services.oona.streams import (
    DeadLetter,
    Entry,
    Streams,
    StreamState,
    entries_of,
    entries_of_stream,
)

__all__ = ["GroupSubscription"]

_log = logging.getLogger("esper.services.oona_client")  # one part of `ESPER_LOGS`
_GONE_AFTER = 10  # times as long without a sign of life as it takes until messages are claimed
_FORGET_CONSUMERS = """
for _, each in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
    local consumer = {}
    for i = 1, #each, 2 do consumer[each[i]] = each[i + 1] end
    if consumer['pending'] == 0 and consumer['idle'] > tonumber(ARGV[2]) then
        redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer['name'])
    end
end
"""


class GroupSubscription(RedisSubscription):
    """One member of a group, that is, one consumer of Redis.

    What it was handed and has not acknowledged stays its own until it has shown no progress for the time after which
    other members may claim a message. Acknowledged is what was received before, at the next :meth:`receive`.
    """

    def __init__(
        self,
        address: RedisAddress,
        streams: Streams,
        topics: Sequence[str],
        on_close: Callable[[RedisSubscription], None],
        group: str,
    ) -> None:
        self.group = group
        self.consumer = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        """The name of this member at the server."""
        self.dead_letters = 0
        """Messages that this member has put away, since nobody could handle them."""
        self._handed: list[Entry] = []
        self._own_first = False  # whether there may be messages that were handed to this member and lost on the way
        self._next_claim = 0.0
        self._counted: dict[str, int] = {}  # until which entry of each stream the trimmed ones are counted
        super().__init__(address, streams, topics, on_close)

    # -- what a subscription of one kind does --------------------------------------------------------------------------

    def _follow(self, key: str, state: StreamState) -> None:
        self._positions[key].follow(state)  # what was lost is not known from that, since other members read as well

    def _begin(self, states: dict[str, StreamState]) -> None:
        self._arrived.clear()  # these are handed to this member again, below
        self._own_first = self._receiver is not None
        idle = int(_GONE_AFTER * self._streams.claim_idle_seconds * 1000)
        for key in states:
            position = self._positions[key]
            create: Command = ("XGROUP", "CREATE", key, self.group, position.text, "MKSTREAM")
            counted: Command = () if position.index is None else ("ENTRIESREAD", position.index)
            made, _ = self._link.call((*create, *counted), ("EVAL", _FORGET_CONSUMERS, 1, key, self.group, idle))
            if counted and isinstance(made, ResponseError) and "BUSYGROUP" not in str(made):
                (made,) = self._link.call(create)  # a server before Redis 7 does not count
            if isinstance(made, ResponseError) and "BUSYGROUP" not in str(made):
                raise self._link.lost(made)
            if made == b"OK" and self._receiver is not None:
                _log.warning("the group %s of %s was gone, and is made again", self.group, key)

    def _request(self, limit: int, block: Command) -> list[Command]:
        if self._own_first:
            return [self._read(limit, "0")]
        self._claim_from_others(limit)
        if not self._arrived:
            self._take_what_is_there(limit)
        return [] if self._arrived else [self._read(limit, ">", block)]

    def _read(self, limit: int, id_: str, block: Command = ()) -> Command:
        ids = [id_] * len(self._keys)
        return ("XREADGROUP", "GROUP", self.group, self.consumer, *block, "COUNT", limit, "STREAMS", *self._keys, *ids)

    def _take_what_is_there(self, limit: int) -> None:
        """Read without waiting, and count what was trimmed unread: in one step, so that one member alone counts it."""
        looks = [(("XINFO", "STREAM", key), ("XINFO", "GROUPS", key)) for key in self._keys]
        read = self._read(limit, ">")
        *_, done = self._link.call(("MULTI",), *(look for pair in looks for look in pair), read, ("EXEC",))
        if isinstance(done, ResponseError):
            raise self._link.lost(done)
        if isinstance(done[-1], ResponseError):
            return  # the request that follows finds out as well
        for index, key in enumerate(self._keys):
            first = StreamState.of(done[2 * index]).first_index
            self._dropped += max(
                0, first - max(self._counted.get(key, 0), _entries_read(done[2 * index + 1], self.group))
            )
            self._counted[key] = first
        self._keep(self._take(done[-1:]))

    def _take(self, answers: list[Any]) -> Iterable[Entry]:
        (read,) = answers
        if isinstance(read, ResponseError):
            raise read
        entries = list(entries_of(read))
        if not entries:
            self._own_first = False
        for entry in entries:
            self._positions[entry.key].read(entry)
        return self._still_there(entries)

    def _still_there(self, entries: Iterable[Entry]) -> list[Entry]:
        there = []
        for entry in entries:
            if entry.fields is None:
                self._dropped += 1
                self._handed.append(entry)
            else:
                there.append(entry)
        return there

    def _refuse(self, entry: Entry, reason: str) -> None:
        self._bury(entry, f"no message: {reason}", 1)

    def _handed_out(self, entry: Entry) -> None:
        self._handed.append(entry)

    def _settle(self) -> None:
        if not self._handed:
            return
        for answer in self._link.call(*self._acknowledgements()):
            if isinstance(answer, ResponseError) and "NOGROUP" not in str(answer):
                raise self._link.lost(answer)
        self._handed.clear()

    def _finish(self) -> None:
        if self._link.waits:
            self._link.drop()
        if self._handed:
            try:
                self._link.last_call(*self._acknowledgements())
                self._handed.clear()
            except BusUnavailableError as error:
                _log.warning("%d handled messages will be handled again: %s", len(self._handed), error)
        self._link.drop()

    def _acknowledgements(self) -> list[Command]:
        by_key: dict[str, list[str]] = {}
        for entry in self._handed:
            by_key.setdefault(entry.key, []).append(entry.text_id)
        return [("XACK", key, self.group, *ids) for key, ids in by_key.items()]

    def after_fork(self) -> None:
        """See the base class; what was handed out is the parent's to acknowledge."""
        super().after_fork()
        self._handed.clear()

    # -- messages that others have left behind, and those that nobody can handle -------------------------------------

    def _claim_from_others(self, limit: int) -> None:
        if time.monotonic() < self._next_claim:
            return
        idle = self._streams.claim_idle_seconds
        self._next_claim = time.monotonic() + max(0.05, min(idle / 2, 30.0))
        for key in self._keys:
            (answer,) = self._link.call(
                ("XAUTOCLAIM", key, self.group, self.consumer, int(idle * 1000), "0-0", "COUNT", limit)
            )
            if isinstance(answer, ResponseError):
                if "NOGROUP" in str(answer):
                    return  # the request that follows finds out as well, and it is made again
                raise self._link.lost(answer)
            self._dropped += len(answer[2]) if len(answer) > 2 else 0  # trimmed before they were handled
            entries = self._still_there(entries_of_stream(key, answer[1]))
            if len(entries) >= limit:
                self._next_claim = 0.0  # there may be more
            deliveries = self._deliveries(key, entries)
            for entry in entries:
                count = deliveries.get(entry.text_id, 1)
                if count > self._streams.max_deliveries:
                    entries = [each for each in entries if each is not entry]
                    self._bury(entry, f"handed out {count - 1} times, and nobody finished with it", count - 1)
            self._keep(entries)

    def _deliveries(self, key: str, entries: Sequence[Entry]) -> dict[str, int]:
        """How often each of this member's entries was handed to somebody."""
        if not entries:
            return {}
        first, last = entries[0].text_id, entries[-1].text_id
        (answer,) = self._link.call(("XPENDING", key, self.group, first, last, len(entries), self.consumer))
        if isinstance(answer, ResponseError):
            raise self._link.lost(answer)
        return {each[0].decode(): each[3] for each in answer}

    def _bury(self, entry: Entry, reason: str, deliveries: int) -> None:
        letter = DeadLetter(entry, reason, self.group, self.consumer, deliveries)
        *_, done = self._link.call(
            ("MULTI",), self._streams.bury(letter), ("XACK", entry.key, self.group, entry.text_id), ("EXEC",)
        )
        if isinstance(done, ResponseError):
            raise self._link.lost(done)
        self.dead_letters += 1
        _log.warning(
            "entry %s of %s was put to the dead letters of %s: %s",
            entry.text_id,
            entry.key,
            self._streams.dead_key,
            reason,
        )


def _entries_read(groups: Any, name: str) -> int:
    """How many entries there were until the last that the group has read, from XINFO GROUPS; very many if unknown."""
    for each in groups if isinstance(groups, list) else ():
        group = dict(zip(each[::2], each[1::2], strict=True))
        if group[b"name"] == name.encode() and group.get(b"entries-read") is not None:
            return int(group[b"entries-read"])
    return 2**63
