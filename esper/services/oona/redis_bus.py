"""A bus between processes and machines, on Redis Streams (Redis 6.2 or later, or Valkey)."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable, Sequence

from redis.exceptions import ResponseError

from esper.configs import OonaConfig, RedisConfig
from esper.contracts.messages import OonaMessage
from esper.forking import reset_after_fork
from esper.services.oona.bus import BusSubscription
from esper.services.oona.errors import BusAddressError, BusRefusedError, BusUnavailableError
from esper.services.oona.redis_group import GroupSubscription
from esper.services.oona.redis_link import Backoff, RedisAddress, RedisLink, is_passing
from esper.services.oona.redis_subscription import LiveSubscription, RedisSubscription
from esper.services.oona.streams import Streams

__all__ = ["RedisBus"]


class RedisBus:
    """A :class:`~esper.services.oona.Bus` whose messages lie in one stream of a Redis server for each topic.

    Nothing is connected before it is needed; :meth:`ping` says whether the server can be used. Safe for threads. In a
    forked child it works as well; subscriptions from before the fork are closed there.
    """

    def __init__(self, redis: RedisConfig, oona: OonaConfig | None = None, *, patience: float = 1.0) -> None:
        """`patience` is for how many seconds one call of :meth:`send` tries a server that cannot be reached.

        Raises :class:`~esper.services.oona.BusAddressError` if `redis` has no URL, or one that cannot be one.
        """
        oona = OonaConfig() if oona is None else oona
        if redis.url is None:
            raise BusAddressError("no Redis server is set; set redis.url, for example to redis://host:6379/0")
        if not patience > 0:
            raise ValueError(f"patience is {patience}; it must be above 0")
        self._address = RedisAddress(redis.url.get_secret_value(), redis.connect_timeout, redis.socket_timeout)
        self._streams = Streams(redis.prefix, oona.max_length, oona.max_deliveries, oona.claim_idle_seconds)
        self._patience = patience
        self._subscriptions: weakref.WeakSet[RedisSubscription] = weakref.WeakSet()
        self._start_afresh()
        reset_after_fork(self)

    def _start_afresh(self) -> None:
        self._sending = threading.Lock()
        self._guard = threading.Lock()
        self._begin_sending()

    def _begin_sending(self) -> None:
        self._stop = threading.Event()
        self._link = RedisLink(self._address, "publishing", self._stop)

    def after_fork(self) -> None:
        """Begin afresh; see `esper.forking`."""
        self._link.forget()
        self._start_afresh()
        for subscription in list(self._subscriptions):
            subscription.after_fork()
        self._subscriptions = weakref.WeakSet()

    def __deepcopy__(self, memo: object) -> RedisBus:
        return self  # a copied model goes on using this connection

    def __repr__(self) -> str:
        return f"RedisBus({self._address.name!r}, prefix={self._streams.prefix!r})"

    def ping(self) -> None:
        """See whether the server can be reached and lets us in.

        Raises :class:`~esper.services.oona.BusUnavailableError`, or its subclass ``BusAuthenticationError``.
        """
        link = RedisLink(self._address, None, threading.Event())
        try:
            (answer,) = link.call(("PING",))
            if isinstance(answer, ResponseError):
                raise link.lost(answer)
        finally:
            link.drop()

    def send(self, messages: Sequence[OonaMessage]) -> None:
        """Append `messages` to their streams, all at once. Blocks, at most for `patience` and one answer's time.

        Raises :class:`~esper.services.oona.BusUnavailableError` with what is not sent, if the server cannot be reached
        for that long or :meth:`close` is called, and :class:`~esper.services.oona.BusRefusedError` for messages that
        the server does not take. A message may arrive twice when the connection broke, with one `event_id`.
        """
        with self._sending:
            if self._stop.is_set():  # closed before, and used again
                self._begin_sending()
            stop, backoff, deadline = self._stop, Backoff(), time.monotonic() + self._patience
            unsent, refused = list(messages), {}
            while unsent:
                try:
                    answers = self._link.call(*(self._streams.add(message) for message in unsent))
                except BusUnavailableError as error:
                    failure = error
                else:
                    waiting = []
                    for message, answer in zip(unsent, answers, strict=True):
                        if isinstance(answer, ResponseError):
                            if is_passing(answer):
                                failure = BusUnavailableError(f"{self._address.name} is not ready: {answer}")
                                waiting.append(message)
                            else:
                                refused[message.event_id] = (message, answer)
                    unsent = waiting
                if unsent and (stop.is_set() or time.monotonic() >= deadline):
                    failure.unsent = [*unsent, *(message for message, _ in refused.values())]
                    raise failure
                if unsent:
                    stop.wait(backoff.seconds())
        if refused:
            reasons = sorted({str(answer) for _, answer in refused.values()})
            raise BusRefusedError(
                f"{self._address.name} refused {len(refused)} messages: {'; '.join(reasons)}",
                [message for message, _ in refused.values()],
            )

    def subscribe(self, topics: Iterable[str], *, group: str | None = None) -> BusSubscription:
        """See :class:`~esper.services.oona.Bus`. Tries the server once; if it is not there, receiving goes on trying.

        A group stays at the server when its last member has gone, and what is sent meanwhile waits for the next one.
        """
        wanted = sorted({str(topic) for topic in topics})
        if not wanted:
            raise ValueError("there are no topics to subscribe to")
        if group is None:
            subscription: RedisSubscription = LiveSubscription(self._address, self._streams, wanted, self._forget)
        else:
            subscription = GroupSubscription(self._address, self._streams, wanted, self._forget, group)
        with self._guard:
            self._subscriptions.add(subscription)
        return subscription

    def close(self) -> None:
        """Close all subscriptions and end a :meth:`send` under way; the bus may be used again."""
        with self._guard:
            subscriptions = list(self._subscriptions)
        for subscription in subscriptions:
            subscription.close()
        self._stop.set()
        if self._sending.acquire(timeout=1.0):  # or a send is about to give up, and drops the connection
            try:
                self._link.drop()
            finally:
                self._sending.release()

    def _forget(self, subscription: RedisSubscription) -> None:
        with self._guard:
            self._subscriptions.discard(subscription)
