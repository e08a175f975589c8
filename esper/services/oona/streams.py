"""The layout of messages in Redis: a stream for each topic, one field in each entry, and a stream of dead letters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from redis import Redis
from redis.exceptions import ResponseError

from esper.contracts.messages import OonaMessage
from esper.services.oona.bus import MAX_MESSAGE_BYTES

__all__ = ["Entry", "Position", "StreamId", "StreamState", "Streams", "entries_of", "entries_of_stream"]

StreamId = tuple[int, int]
"""Milliseconds and a number within them. The server gives ids that grow, from its clock."""

_ORIGIN: StreamId = (0, 0)  # before every entry
_FIELD = b"message"
_DEAD = "dead"


def stream_id(text: bytes) -> StreamId:
    """`1700000000000-0` as a value that can be compared."""
    milliseconds, _, number = text.partition(b"-")
    return int(milliseconds), int(number)


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a stream. `fields` is empty if it was trimmed after it was handed to a member of a group."""

    key: str
    id: StreamId
    fields: dict[bytes, bytes]

    @property
    def text_id(self) -> str:
        """As the server writes it."""
        return f"{self.id[0]}-{self.id[1]}"

    @property
    def raw(self) -> bytes:
        """What the message consists of; if it is none, all there is."""
        return self.fields[_FIELD] if _FIELD in self.fields else repr(self.fields).encode()

    def message(self) -> OonaMessage:
        """Raises `ValueError` if it is no message."""
        if _FIELD not in self.fields:
            raise ValueError(f"there is no field {_FIELD.decode()!r}")
        if len(self.raw) > MAX_MESSAGE_BYTES:
            raise ValueError(f"it has {len(self.raw)} bytes, more than {MAX_MESSAGE_BYTES}")
        try:
            return OonaMessage.model_validate_json(self.raw)
        except ValidationError as cause:
            first = cause.errors(include_url=False, include_input=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'message'}: {first['msg']}") from cause


def entries_of(answer: Any) -> list[Entry]:
    """The entries that a client read with XREAD or XREADGROUP."""
    return [entry for key, entries in answer or () for entry in entries_of_stream(key.decode(), entries)]


def entries_of_stream(key: str, entries: Sequence[Any]) -> list[Entry]:
    """The entries that a client read of one stream."""
    return [Entry(key, stream_id(id_), fields) for id_, fields in entries if id_ is not None]


@dataclass(frozen=True, slots=True)
class StreamState:
    """What a server says about a stream; one that does not exist is empty."""

    exists: bool
    last: StreamId
    """Of the latest entry that there ever was."""
    added: int
    """Entries that there ever were; as many as there are, on a server that does not count them (before Redis 7)."""
    length: int

    @classmethod
    def of(cls, answer: Any) -> StreamState:
        """From the answer to XINFO STREAM."""
        if isinstance(answer, ResponseError):
            return cls(False, _ORIGIN, 0, 0)
        length: int = answer["length"]
        return cls(True, stream_id(answer["last-generated-id"]), answer.get("entries-added", length), length)

    @property
    def first_index(self) -> int:
        """How many entries are gone from the beginning of the stream."""
        return self.added - self.length


@dataclass(slots=True)
class Position:
    """How far a stream has been read: the last entry's id, and how many entries there were until then, if known."""

    last: StreamId
    index: int | None

    def follow(self, state: StreamState) -> int:
        """Take note of what the stream is now, before reading on. Returns how many entries were trimmed unread.

        A stream that is younger than what was read has begun anew, on a server that lost its data: then everything in
        it is to be read.
        """
        if not state.exists or state.last < self.last:
            self.last, self.index = _ORIGIN, 0
        elif state.last == self.last:
            self.index = state.added
        elif self.index is not None and state.added < self.index:
            self.index = 0
        if self.index is None:
            return 0
        lost = max(0, state.first_index - self.index)
        self.index += lost
        return lost

    def read(self, entry: Entry) -> None:
        """`entry` has been read."""
        self.last = max(self.last, entry.id)
        if self.index is not None:
            self.index += 1

    @property
    def text(self) -> str:
        """The id, as the server writes it."""
        return f"{self.last[0]}-{self.last[1]}"


@dataclass(frozen=True, slots=True)
class Streams:
    """The keys, and how many entries are kept under each."""

    prefix: str = "esper"
    max_length: int = 100_000
    max_deliveries: int = 5
    claim_idle_seconds: float = 60.0

    def key(self, topic: str) -> str:
        """Of the stream of `topic`. Raises `ValueError` for the name under which dead letters lie."""
        if topic == _DEAD:
            raise ValueError(f"{_DEAD!r} is no topic: dead letters lie there")
        return f"{self.prefix}:oona:{topic}"

    @property
    def dead_key(self) -> str:
        """Of the stream of dead letters."""
        return f"{self.prefix}:oona:{_DEAD}"

    def append(self, client: Redis, message: OonaMessage) -> None:
        """Append `message` to its stream, with a client or into a pipeline."""
        client.xadd(self.key(message.topic), {_FIELD: message.model_dump_json()}, maxlen=self.max_length)

    def bury(self, client: Redis, entry: Entry, **about: str | int) -> None:
        """Keep a message that nobody could handle, and `about` it why."""
        topic = entry.key.removeprefix(self.key(""))
        fields: dict[Any, Any] = {"topic": topic, "id": entry.text_id, **about}
        client.xadd(self.dead_key, {_FIELD: entry.raw[:MAX_MESSAGE_BYTES], **fields}, maxlen=self.max_length)
