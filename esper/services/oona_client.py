"""The client of the bus: a training loop may publish with it, since it never waits and never raises."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import BaseModel

from esper.contracts.messages import OonaMessage
from esper.forking import reset_after_fork
from esper.services.oona.bus import MAX_MESSAGE_BYTES, Bus
from esper.services.oona.errors import BusRefusedError, BusUnavailableError
from esper.services.oona.memory import InMemoryBus
from esper.services.oona.message_size import size_at_least
from esper.services.oona.receiving import MessageStream, Subscription

__all__ = ["MessageStream", "OonaClient", "OonaStats", "Subscription"]

_log = logging.getLogger(__name__)
_REPORT_EVERY = 30.0  # seconds between two warnings about dropped messages
_MOST_FOR_ONE = 16  # bytes of JSON for one that `size_at_least` counts: a float has 24, and two are counted
_TRY_AGAIN_AFTER = 0.5  # seconds


@dataclass(frozen=True, slots=True)
class OonaStats:
    """Counts since the client was made: every published message is sent, dropped, failed or still queued."""

    published: int
    sent: int
    dropped: int
    """Pushed out of the full queue by later ones, or published after closing."""
    failed: int
    """Could not be written as JSON, were too large, refused by the bus, or not sent before the client was closed."""
    queued: int
    """Wait to be sent, those included that are being sent."""
    last_error: str = ""
    """Why the latest attempt to send something did not succeed; empty if it did."""


@dataclass(frozen=True, slots=True)
class _Draft:
    topic: str
    payload: BaseModel
    trace_id: str | None
    timestamp: datetime


class _Marker(threading.Event):
    """Stands in the queue among the messages; set once all before it are gone. The `last` one ends the thread."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.last = last


class OonaClient:
    """Publishes through a bounded queue and a sender thread, which starts with the first message.

    Safe for threads, signal handlers and finalisers. A forked child starts with an empty queue and its own thread.
    """

    def __init__(
        self, bus: Bus | None = None, *, name: str = "esper", queue_size: int = 2048, batch_size: int = 512
    ) -> None:
        """`bus` defaults to a new :class:`InMemoryBus`. Messages come from `sender_id`: `name`, host and process."""
        if queue_size < 1 or batch_size < 1:
            raise ValueError(f"queue_size is {queue_size} and batch_size {batch_size}; both must be at least 1")
        self.bus: Bus = bus if bus is not None else InMemoryBus()
        self._name = name
        self._queue_size = queue_size
        self._batch_size = batch_size
        self._subscriptions: list[Subscription] = []
        self._reset()
        reset_after_fork(self)

    def _reset(self) -> None:
        self.sender_id = f"{self._name}@{socket.gethostname()}:{os.getpid()}"
        self._queue: queue.SimpleQueue[_Draft | _Marker] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._closing = threading.Event()
        self._published = _Counter()
        self._dropped = _Counter()
        self._late = _Counter()  # published after close(): dropped as well, but nothing to warn about
        self._sent = self._failed = 0  # written by the sender thread only, like the next
        self._last_error = ""
        self._reported, self._reported_at = 0, -_REPORT_EVERY

    def __deepcopy__(self, memo: object) -> OonaClient:
        return self  # a copied model goes on publishing here

    def after_fork(self) -> None:
        """Begin afresh; see `esper.forking`."""
        self._subscriptions = []
        self._reset()

    def publish(self, topic: str, payload: BaseModel, *, trace_id: str | None = None) -> None:
        """Queue `payload` for `topic`. Never blocks, never raises; what cannot be kept is counted in :meth:`stats`.

        `payload` is written as JSON later, on the sender thread, so it must not change: give a frozen model.
        """
        self._published.add()
        if self._closed:
            self._late.add()
            return
        self._queue.put(_Draft(str(topic), payload, trace_id, datetime.now(UTC)))
        while self._queue.qsize() > self._queue_size and self._drop_oldest():
            pass
        if self._thread is None:
            self._start()

    def subscribe(
        self,
        topics: str | Iterable[str],
        callback: Callable[[OonaMessage], object],
        *,
        group: str | None = None,
        owner: object | None = None,
    ) -> Subscription:
        """Call `callback` for every later message of `topics`, on a thread of the subscription's own.

        An exception from `callback` is logged and counted, and the next message follows. The subscription keeps
        `callback` alive, and `owner` not: soon after it was collected, the subscription ends by itself.
        """
        wanted = [topics] if isinstance(topics, str) else list(topics)
        source = self.bus.subscribe(wanted, group=group)
        subscription = Subscription(source, callback, ",".join(wanted), one_by_one=group is not None, owner=owner)
        self._subscriptions = [each for each in self._subscriptions if not each.closed] + [subscription]
        return subscription

    def messages(self, topics: str | Iterable[str], *, group: str | None = None, size: int = 10_000) -> MessageStream:
        """Later messages of `topics` as an async iterator. Call within a running event loop.

        At most `size` messages wait for the loop; then the oldest are dropped and counted in the stream's `dropped`.
        """
        stream = MessageStream(size)
        stream.subscription = self.subscribe(topics, stream.receive, group=group)
        return stream

    def stats(self) -> OonaStats:
        """Counts since the client was made."""
        sent, failed = self._sent, self._failed
        dropped = self._dropped.value + self._late.value
        queued = max(0, self._published.value - sent - failed - dropped)
        return OonaStats(sent + failed + dropped + queued, sent, dropped, failed, queued, self._last_error)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until what was published before has been handed to the bus; False if `timeout` seconds do not do."""
        if self._thread is None or self._closed:
            return self._queue.empty()
        marker = _Marker()
        self._queue.put(marker)
        return marker.wait(timeout)

    def close(self, timeout: float = 2.0) -> None:
        """Send what is queued, for at most `timeout` seconds, and end the threads. The rest counts as dropped."""
        closed_before, self._closed = self._closed, True
        self._closing.set()
        thread = self._thread
        if thread is not None and not closed_before:
            self._queue.put(_Marker(last=True))
            if thread is not threading.current_thread():
                thread.join(timeout)
            self._drop_all()
            if thread.is_alive():  # the transport still holds it up
                self._queue.put(_Marker(last=True))
        self._report_drops(at_once=True)
        for timeout in (0.0, 2.0):  # tell all of them, before waiting for one after the other
            for subscription in self._subscriptions:
                subscription.close(timeout)
        self._subscriptions = []

    # -- the sender thread -------------------------------------------------------------------------------------------

    def _start(self) -> None:
        held = False
        try:
            [held] = map(self._starting.acquire, (False,))  # between a call and `held` an interrupt could come
            if held and self._thread is None:  # else another thread, or what this handler interrupted, is starting it
                thread = threading.Thread(target=self._run, name="esper-oona-sender", daemon=True)
                thread.start()
                self._thread = thread
        except RuntimeError as error:  # no thread can be had, for instance while the interpreter ends
            _log.warning("messages are queued but not sent: %s", error)
        finally:
            if held:
                self._starting.release()

    def _run(self) -> None:
        ended = False
        while not ended:
            batch: list[_Draft] = []
            markers: list[_Marker] = []
            for item in self._next_items():
                if isinstance(item, _Marker):
                    markers.append(item)
                else:
                    batch.append(item)
            self._send(batch)
            for marker in markers:
                marker.set()
            ended = any(marker.last for marker in markers)
            self._report_drops()

    def _next_items(self) -> list[_Draft | _Marker]:
        items = [self._queue.get()]
        try:
            while len(items) < self._batch_size:
                items.append(self._queue.get_nowait())
        except queue.Empty:
            pass
        return items

    def _send(self, drafts: list[_Draft]) -> None:
        messages = [message for draft in drafts if (message := self._message(draft)) is not None]
        while messages:
            messages = self._attempt(messages)
            if messages and self._closing.wait(_TRY_AGAIN_AFTER):
                self._failed += len(messages)
                _log.warning("%d messages were not sent before closing: %s", len(messages), self._last_error)
                messages = []

    def _attempt(self, messages: list[OonaMessage]) -> list[OonaMessage]:
        """Send what the bus takes. Returns what is to be tried again, while later messages wait in the queue."""
        unsent: list[OonaMessage] = []
        failed, error_text = 0, ""
        try:
            self.bus.send(messages)
        except BusUnavailableError as error:  # the transport has logged it
            unsent, error_text = list(error.unsent), str(error)
        except BusRefusedError as error:
            failed, error_text = len(error.refused), str(error)
            _log.error("%s", error)
        except Exception as error:  # noqa: BLE001  # whatever a transport raises, the thread goes on; counted and logged
            failed, error_text = len(messages), f"{type(error).__name__}: {error}"
            _log.exception("the bus refused %d messages", len(messages))
        self._failed += failed
        self._sent += len(messages) - len(unsent) - failed
        self._last_error = error_text
        return unsent

    def _message(self, draft: _Draft) -> OonaMessage | None:
        try:
            size = size_at_least(draft.payload, MAX_MESSAGE_BYTES)
            if size > MAX_MESSAGE_BYTES:
                self._refuse_too_large(draft)
                return None
            payload = draft.payload.model_dump(mode="json")
            fields = {} if draft.trace_id is None else {"trace_id": draft.trace_id}
            message = OonaMessage(
                sender_id=self.sender_id, timestamp=draft.timestamp, topic=draft.topic, payload=payload, **fields
            )
            if size * _MOST_FOR_ONE > MAX_MESSAGE_BYTES and len(message.model_dump_json().encode()) > MAX_MESSAGE_BYTES:
                self._refuse_too_large(draft)
                return None
            return message
        except Exception as error:  # noqa: BLE001  # a payload's own serialiser may raise anything; counted and logged
            self._failed += 1
            self._last_error = f"{type(error).__name__}: {error}"
            _log.exception("a message for %s cannot be written as JSON", draft.topic)
            return None

    def _refuse_too_large(self, draft: _Draft) -> None:
        self._failed += 1
        self._last_error = (
            f"a message for {draft.topic} has more than {MAX_MESSAGE_BYTES} bytes and is not sent; keep what is "
            "large in a store or a file, and send its name"
        )
        _log.error("%s", self._last_error)

    def _drop_oldest(self) -> bool:
        try:
            item = self._queue.get_nowait()
        except queue.Empty:
            return False
        if isinstance(item, _Marker):
            item.set()  # nothing that came before it is left
            if item.last:
                self._queue.put(item)
                return False
        else:
            self._dropped.add()
        return True

    def _drop_all(self) -> None:
        while not self._queue.empty():
            with contextlib.suppress(queue.Empty):
                if isinstance(item := self._queue.get_nowait(), _Marker):
                    item.set()
                else:
                    self._dropped.add()

    def _report_drops(self, *, at_once: bool = False) -> None:
        dropped, now = self._dropped.value, time.monotonic()
        if dropped > self._reported and (at_once or now - self._reported_at >= _REPORT_EVERY):
            _log.warning(
                "%d messages were dropped because the queue was full; %d so far", dropped - self._reported, dropped
            )
            self._reported, self._reported_at = dropped, now


class _Counter:
    """A count that may be raised from anywhere, in a signal handler too, since `next` on a counter is one step."""

    def __init__(self) -> None:
        self._steps = itertools.count()
        self._reads = 0
        self._reading = threading.Lock()

    def add(self) -> None:
        next(self._steps)

    @property
    def value(self) -> int:
        with self._reading:  # looking takes a step too, which is taken off again
            self._reads += 1
            return next(self._steps) - self._reads + 1
