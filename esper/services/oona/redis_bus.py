"""A bus between processes and machines, on Redis Streams (Redis 6.2 or later, or Valkey)."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from redis.backoff import EqualJitterBackoff
from redis.exceptions import (
    ClusterDownError,
    ConnectionError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.retry import Retry

from esper.configs import OonaConfig, RedisConfig
from esper.contracts.messages import OonaMessage
from esper.forking import reset_after_fork
from esper.services.oona.bus import BusSubscription
from esper.services.oona.errors import BusAddressError, BusRefusedError, BusUnavailableError
from esper.services.oona.redis_group import GroupSubscription
from esper.services.oona.redis_server import OutageLog, RedisServer
from esper.services.oona.redis_subscription import RedisSubscription
from esper.services.oona.streams import Streams

__all__ = ["RedisBus"]

_PASSING = (ReadOnlyError, ClusterDownError, TryAgainError)  # another server takes over: the next answer may differ
_FURTHER_ATTEMPTS = 2  # at a connection that is refused or breaks; an answer that does not come is not waited for twice


class RedisBus:
    """A :class:`~esper.services.oona.Bus` whose messages lie in one stream of a Redis server for each topic.

    Nothing is connected before it is needed; :meth:`ping` says whether the server can be used. Safe for threads. In a
    forked child it works as well; subscriptions from before the fork are closed there.
    """

    def __init__(self, redis: RedisConfig, oona: OonaConfig | None = None) -> None:
        """Raises :class:`~esper.services.oona.BusAddressError` if `redis` has no URL, or one that cannot be one."""
        oona = OonaConfig() if oona is None else oona
        if redis.url is None:
            raise BusAddressError("no Redis server is set; set redis.url, for example to redis://host:6379/0")
        self._server = RedisServer(redis.url.get_secret_value(), redis.connect_timeout, redis.socket_timeout)
        self._streams = Streams(redis.prefix, oona.max_length, oona.max_deliveries, oona.claim_idle_seconds)
        self._outage = OutageLog(self._server, "publishing")
        self._client = self._server.client()
        self._subscriptions: weakref.WeakSet[RedisSubscription] = weakref.WeakSet()
        self._guard = threading.Lock()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Close subscriptions, see `esper.forking`. The client sees by itself that its connections are the parent's."""
        self._guard = threading.Lock()
        for subscription in list(self._subscriptions):
            subscription.after_fork()
        self._subscriptions = weakref.WeakSet()

    def __deepcopy__(self, memo: object) -> RedisBus:
        return self  # a copied model goes on using this client

    def __repr__(self) -> str:
        return f"RedisBus({self._server.name!r}, prefix={self._streams.prefix!r})"

    def ping(self) -> None:
        """See whether the server can be reached and lets us in.

        Raises :class:`~esper.services.oona.BusUnavailableError`, or its subclass ``BusAuthenticationError``.
        """
        client = self._server.client()  # who is in already is not asked for the password again
        try:
            client.ping()
        except (RedisError, OSError) as error:
            raise self._server.unavailable(error) from None
        finally:
            client.connection_pool.disconnect()

    def send(self, messages: Sequence[OonaMessage]) -> None:
        """Append `messages` to their streams, all at once. Blocks, for about one answer's time at most.

        Raises :class:`~esper.services.oona.BusUnavailableError` with what is not sent, if the server cannot be reached,
        and :class:`~esper.services.oona.BusRefusedError` for messages that the server does not take. A message may
        arrive twice when the connection broke, with one `event_id`.
        """
        retry = Retry(EqualJitterBackoff(cap=0.5, base=0.05), _FURTHER_ATTEMPTS, (ConnectionError,))
        try:
            answers: list[Any] = retry.call_with_retry(lambda: self._append(messages), lambda _: None)
        except (RedisError, OSError) as cause:
            raise self._unsent(cause, messages) from None
        failed = [message for message, each in zip(messages, answers, strict=True) if isinstance(each, ResponseError)]
        errors = [each.with_traceback(None) for each in answers if isinstance(each, ResponseError)]
        for error in errors:
            if isinstance(error, _PASSING):
                raise self._unsent(error, failed)
        self._outage.reached()
        if failed:
            reasons = "; ".join(sorted({str(error) for error in errors}))
            raise BusRefusedError(f"{self._server.name} refused {len(failed)} messages: {reasons}", failed)

    def _append(self, messages: Sequence[OonaMessage]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for message in messages:
            self._streams.append(pipeline, message)
        return pipeline.execute(raise_on_error=False)

    def _unsent(self, why: Exception, messages: Sequence[OonaMessage]) -> BusUnavailableError:
        error = self._outage.lost(why)
        error.unsent = list(messages)
        return error

    def subscribe(self, topics: Iterable[str], *, group: str | None = None) -> BusSubscription:
        """See :class:`~esper.services.oona.Bus`. Tries the server once; if it is not there, receiving goes on trying.

        A group stays at the server when its last member has gone, and what is sent meanwhile waits for the next one.
        """
        wanted = sorted({str(topic) for topic in topics})
        if not wanted:
            raise ValueError("there are no topics to subscribe to")
        if group is None:
            subscription = RedisSubscription(self._server, self._client, self._streams, wanted)
        else:
            subscription = GroupSubscription(self._server, self._client, self._streams, wanted, group)
        with self._guard:
            self._subscriptions.add(subscription)
        return subscription

    def close(self) -> None:
        """Close all subscriptions, and connections that nobody is using; the bus may be used again."""
        with self._guard:
            subscriptions, self._subscriptions = list(self._subscriptions), weakref.WeakSet()
        for subscription in subscriptions:
            subscription.close()
        self._client.connection_pool.disconnect(inuse_connections=False)
