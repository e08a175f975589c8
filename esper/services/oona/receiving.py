"""Receiving with a callback on a thread of its own, or with an async iterator."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable

from esper.contracts.messages import OonaMessage
from esper.services.oona.bus import BusSubscription

__all__ = ["MessageStream", "Subscription"]

_log = logging.getLogger("esper.services.oona_client")  # one part of `ESPER_LOGS`
_AT_ONCE = 512
_LOOK_FOR_OWNER_EVERY = 0.5  # seconds


class Subscription:
    """A callback that is being called. :meth:`close` ends it; also a context manager."""

    def __init__(
        self,
        source: BusSubscription,
        callback: Callable[[OonaMessage], object],
        name: str,
        *,
        one_by_one: bool = False,
        owner: object | None = None,
    ) -> None:
        """`one_by_one` takes a message when the one before is handled, and leaves the rest to others of its group."""
        self._source = source
        self._callback = callback
        self._limit = 1 if one_by_one else _AT_ONCE
        self._owner = None if owner is None else weakref.ref(owner)
        self.errors = 0
        """How often the callback raised."""
        self._thread = threading.Thread(target=self._run, name=f"esper-oona-{name}", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._source.closed

    @property
    def dropped(self) -> int:
        """Messages that came faster than the callback took them."""
        return self._source.dropped

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, timeout: float = 2.0) -> None:
        """Stop calling; waits up to `timeout` seconds for a call in progress, unless called from it."""
        self._source.close()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        wait = None if self._owner is None else _LOOK_FOR_OWNER_EVERY
        closed = False
        while not closed:
            closed = self._source.closed  # one more call then, which settles what was handled
            for message in self._source.receive(wait, self._limit):
                if self._source.closed and self._limit > 1:
                    break  # a group's message is handled all the same, for it would be taken to be
                try:
                    self._callback(message)
                except Exception:  # noqa: BLE001  # a subscriber's error must not end the subscription; counted, logged
                    self.errors += 1
                    _log.exception("a subscriber to %s raised", message.topic)
            if self._owner is not None and self._owner() is None:
                self._source.close()


class MessageStream:
    """An async iterator over messages. `async with` it, or call :meth:`close`; iteration then ends."""

    subscription: Subscription

    def __init__(self, size: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[OonaMessage | None] = asyncio.Queue()
        self._size = size
        self.dropped = 0
        """Messages that came faster than the loop took them."""

    def receive(self, message: OonaMessage) -> None:
        """Take a message on the subscription's thread."""
        self._hand_over(message)

    def __aiter__(self) -> MessageStream:
        return self

    async def __anext__(self) -> OonaMessage:
        message = await self._queue.get()
        if message is None:
            raise StopAsyncIteration
        return message

    async def __aenter__(self) -> MessageStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop receiving, and end the iteration after what has arrived."""
        self.subscription.close(timeout=0.0)
        self._hand_over(None)

    def _hand_over(self, message: OonaMessage | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._put, message)
        except RuntimeError:  # the loop was closed, and nobody is left to read
            self.subscription.close()

    def _put(self, message: OonaMessage | None) -> None:
        if message is not None and self._queue.qsize() >= self._size:
            self._queue.get_nowait()
            self.dropped += 1
        self._queue.put_nowait(message)
