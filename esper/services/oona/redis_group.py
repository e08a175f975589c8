"""A member of a group over Redis: each message goes to one member, and is handled at least once."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Sequence
from typing import Any

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from esper.services.oona.redis_server import RedisServer
from esper.services.oona.redis_subscription import RedisSubscription
from esper.services.oona.streams import Entry, Streams, StreamState, entries_of, entries_of_stream

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

    def __init__(self, server: RedisServer, client: Redis, streams: Streams, topics: Sequence[str], group: str) -> None:
        self.group = group
        self.consumer = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        """The name of this member at the server."""
        self.dead_letters = 0
        """Messages that this member has put away, since nobody could handle them."""
        self._handed: list[Entry] = []
        self._own_first = False  # whether there may be messages that were handed to this member and lost on the way
        self._next_claim = 0.0
        self._counted: dict[str, int] = {}  # until which entry of each stream the trimmed ones are counted
        super().__init__(server, client, streams, topics)

    def after_fork(self) -> None:
        """See the base class; what was handed out is the parent's to acknowledge."""
        super().after_fork()
        self._handed.clear()

    # -- what a subscription of one kind does --------------------------------------------------------------------------

    def _follow(self, key: str, state: StreamState, groups: Any = None) -> None:
        self._positions[key].follow(state)  # what was lost is not known from that, since other members read as well
        if groups is not None:
            known = max(self._counted.get(key, 0), _entries_read(groups, self.group))
            self._dropped += max(0, state.first_index - known)
            self._counted[key] = state.first_index

    def _begin(self) -> None:
        self._arrived.clear()  # these are handed to this member again, below
        self._own_first = self._receiver is not None
        for key in self._keys:
            if self._made_group(key) and self._receiver is not None:
                _log.warning("the group %s of %s was gone, and is made again", self.group, key)
            idle = int(_GONE_AFTER * self._streams.claim_idle_seconds * 1000)
            self._client.eval(_FORGET_CONSUMERS, 1, key, self.group, str(idle))

    def _made_group(self, key: str) -> bool:
        """Make the group of one stream; False if it is there."""
        position = self._positions[key]
        for index in dict.fromkeys((position.index, None)):
            try:
                self._client.xgroup_create(key, self.group, position.text, mkstream=True, entries_read=index)
            except ResponseError as error:
                if "BUSYGROUP" in str(error):
                    return False
                if index is None:  # else this is a server before Redis 7, which does not count
                    raise
            else:
                return True
        return False

    def _read(self, client: Redis, limit: int, block: int | None = None, *, id_: str = ">") -> Any:
        return client.xreadgroup(self.group, self.consumer, dict.fromkeys(self._keys, id_), count=limit, block=block)

    def _take(self, entries: list[Entry]) -> list[Entry]:
        return self._still_there(super()._take(entries))

    def _still_there(self, entries: list[Entry]) -> list[Entry]:
        trimmed = [entry for entry in entries if not entry.fields]
        self._dropped += len(trimmed)
        self._handed += trimmed
        return [entry for entry in entries if entry.fields]

    def _refuse(self, entry: Entry, reason: str) -> None:
        self._bury(entry, f"no message: {reason}", 1)

    def _handed_out(self, entry: Entry) -> None:
        self._handed.append(entry)

    def _finish(self) -> None:
        try:
            self._acknowledge()
        except (RedisError, OSError) as error:
            why = self._outage.lost(error)
            _log.warning("%d handled messages will be handled again: %s", len(self._handed), why)

    def _acknowledge(self) -> None:
        """Those received before are handled."""
        by_key: dict[str, list[str]] = {}
        for entry in self._handed:
            by_key.setdefault(entry.key, []).append(entry.text_id)
        for key, ids in by_key.items():
            self._client.xack(key, self.group, *ids)  # which is 0 if the group is gone
        self._handed.clear()

    # -- messages that were handed out before, and those that nobody can handle --------------------------------------

    def _look_behind(self, limit: int) -> None:
        self._acknowledge()
        if self._own_first:
            entries = entries_of(self._read(self._client, limit, id_="0"))
            self._own_first = bool(entries)
            self._keep(self._take(entries))
        if not self._arrived and time.monotonic() >= self._next_claim:
            self._claim_from_others(limit)

    def _claim_from_others(self, limit: int) -> None:
        idle = self._streams.claim_idle_seconds
        self._next_claim = time.monotonic() + max(0.05, min(idle / 2, 30.0))
        for key in self._keys:
            answer: Any = self._client.xautoclaim(key, self.group, self.consumer, int(idle * 1000), count=limit)
            self._dropped += len(answer[2]) if len(answer) > 2 else 0  # trimmed before they were handled
            entries = self._still_there(entries_of_stream(key, answer[1]))
            if len(entries) >= limit:
                self._next_claim = 0.0  # there may be more
            deliveries = self._deliveries(key, entries)
            spent = [entry for entry in entries if deliveries.get(entry.text_id, 1) > self._streams.max_deliveries]
            for entry in spent:
                count = deliveries[entry.text_id] - 1
                self._bury(entry, f"handed out {count} times, and nobody finished with it", count)
            self._keep(entry for entry in entries if entry not in spent)

    def _deliveries(self, key: str, entries: Sequence[Entry]) -> dict[str, int]:
        """How often each of this member's entries was handed to somebody."""
        if not entries:
            return {}
        first, last = entries[0].text_id, entries[-1].text_id
        pending: Any = self._client.xpending_range(key, self.group, first, last, len(entries), self.consumer)
        return {each["message_id"].decode(): each["times_delivered"] for each in pending}

    def _bury(self, entry: Entry, reason: str, deliveries: int) -> None:
        pipeline = self._client.pipeline(transaction=True)
        self._streams.bury(
            pipeline, entry, reason=reason, group=self.group, consumer=self.consumer, deliveries=deliveries
        )
        pipeline.xack(entry.key, self.group, entry.text_id)
        pipeline.execute()
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
        if each["name"] == name.encode() and each.get("entries-read") is not None:
            return int(each["entries-read"])
    return 2**63
