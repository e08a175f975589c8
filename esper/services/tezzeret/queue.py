"""The queue of waiting blueprints, told to the workers of a fleet by Dramatiq over Redis.

A message is a hint and no more: who compiles a blueprint is settled by the store's claim. A message that comes twice
does nothing, and one that is lost is sent again by the :class:`Dispatch`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker

from esper.configs import RedisConfig
from esper.services.errors import QueueUnavailableError
from esper.services.ids import is_full_id
from esper.services.urza.storage.blueprints import BlueprintRecords

__all__ = ["CompilationQueue", "Dispatch"]

_log = logging.getLogger(__name__)
_QUEUE = "compile"
_SWEEP_LIMIT = 100
_STOP_MS = 15_000


class CompilationQueue:
    """Ids of blueprints on their way to workers. For any thread."""

    def __init__(self, settings: RedisConfig) -> None:
        """Connects at first use. Raises :class:`QueueUnavailableError` for a URL that cannot be one."""
        if settings.url is None:
            raise QueueUnavailableError(
                "a fleet's queue needs Redis: set redis.url, for example redis://localhost:6379"
            )
        try:
            self._client = redis.Redis.from_url(
                settings.url.get_secret_value(),
                socket_connect_timeout=settings.connect_timeout,
                socket_timeout=settings.socket_timeout,
                socket_keepalive=True,
            )
        except ValueError as cause:
            raise QueueUnavailableError(f"redis.url cannot be used: {cause}") from cause
        self._broker = RedisBroker(client=self._client, middleware=[], namespace=f"{settings.prefix}:tezzeret")  # type: ignore[no-untyped-call]  # Dramatiq leaves it untyped
        self._broker.declare_queue(_QUEUE)
        self._key = f"{settings.prefix}:tezzeret:{_QUEUE}"

    def put(self, blueprint_id: str) -> None:
        """Tell one worker. Raises :class:`QueueUnavailableError`."""
        message: dramatiq.Message[None] = dramatiq.Message(
            queue_name=_QUEUE, actor_name=_QUEUE, args=(blueprint_id,), kwargs={}, options={}
        )
        try:
            self._broker.enqueue(message)
        except (redis.RedisError, dramatiq.errors.ConnectionClosed) as cause:
            raise QueueUnavailableError(f"the queue of compilations cannot be reached: {cause}") from cause

    def __len__(self) -> int:
        """How many messages no worker has taken yet. Raises :class:`QueueUnavailableError`."""
        try:
            return int(self._client.llen(self._key))
        except redis.RedisError as cause:
            raise QueueUnavailableError(f"the queue of compilations cannot be reached: {cause}") from cause

    @contextmanager
    def consumed_by(self, work: Callable[[str], None]) -> Iterator[None]:
        """Call `work` with one id at a time, on a thread, until the block is left; it must not raise.

        A message counts as handled when `work` returns. One without an id in it is left out. While Redis is away,
        connecting is tried again.
        """

        def take(*told: object, **more: object) -> None:
            if len(told) == 1 and not more and isinstance(told[0], str) and is_full_id(told[0]):
                work(told[0])
            else:
                _log.warning("a message in the queue %s is not about a blueprint and left out", self._key)

        dramatiq.actor(broker=self._broker, actor_name=_QUEUE, queue_name=_QUEUE)(take)
        consumer = dramatiq.Worker(self._broker, worker_threads=1, worker_timeout=200)
        consumer.queue_prefetch = 1  # a worker takes no message that another one could begin with
        consumer.start()
        try:
            yield
        finally:
            consumer.stop(_STOP_MS)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


class Dispatch:
    """Urza's side: tells the queue of every submission, and again of what waits although nobody works on it.

    A thread does the talking, so that a submission never waits for Redis. Also a context manager.
    """

    def __init__(self, blueprints: BlueprintRecords, messages: CompilationQueue, sweep_seconds: float) -> None:
        self._blueprints = blueprints
        self._messages = messages
        self._sweep_seconds = sweep_seconds
        self._submitted: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="esper-dispatch", daemon=True)
        self._down = False

    def __enter__(self) -> Dispatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._submitted.put(None)
        self._thread.join(10.0)

    def submitted(self, blueprint_id: str) -> None:
        """Say that a blueprint was submitted. Returns at once, whatever Redis does."""
        self._submitted.put(blueprint_id)

    def _run(self) -> None:
        sweep_at = time.monotonic() + self._sweep_seconds
        while True:
            try:
                blueprint_id = self._submitted.get(timeout=max(0.0, sweep_at - time.monotonic()))
            except queue.Empty:
                self._guarded(self._sweep)
                sweep_at = time.monotonic() + self._sweep_seconds
                continue
            if blueprint_id is None:
                return
            self._guarded(partial(self._messages.put, blueprint_id))

    def _sweep(self) -> None:
        """Workers that still have messages to take will come to these blueprints by themselves."""
        if len(self._messages) == 0:
            for blueprint_id in self._blueprints.waiting(_SWEEP_LIMIT):
                self._messages.put(blueprint_id)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001  # nothing is lost: the next sweep brings what waits
            if not self._down:
                _log.warning("workers are not told of blueprints until the queue can be reached again: %s", error)
            self._down = True
        else:
            if self._down:
                _log.info("workers are told of blueprints again")
            self._down = False
