"""One connection to a Redis server: it is made when needed, again when it broke, and no wait on it is without an end.

Commands are packed and answers read by redis-py; what is waited for, and for how long, is decided here.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, Connection, UnixDomainSocketConnection, parse_url
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.retry import Retry

from esper.services.oona.errors import BusAddressError, BusAuthenticationError, BusUnavailableError

__all__ = ["Backoff", "Command", "RedisAddress", "RedisLink", "is_passing"]

_log = logging.getLogger("esper.services.oona_client")  # one part of `ESPER_LOGS`

Command = tuple[str | bytes | int, ...]

_LOOK_EVERY = 0.05  # seconds between two looks at whether the wait for an answer was called off
_LAST_MOMENT = 1.0  # seconds
_PASSING = (ReadOnlyError, ClusterDownError, TryAgainError)
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # seconds, seconds, probes


def is_passing(error: ResponseError) -> bool:
    """Whether a server that answers so may answer otherwise soon: it loads its data, or another one takes over."""
    return isinstance(error, _PASSING)


@dataclass(frozen=True)
class RedisAddress:
    """Where a server is and how long it may take. Raises :class:`BusAddressError` for a URL that is none."""

    url: str = field(repr=False)
    connect_timeout: float = 2.0
    """Seconds."""
    socket_timeout: float = 5.0
    """Seconds that an answer may take."""
    name: str = field(init=False)
    """The URL without the password."""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            credentials, _, host = parts.netloc.rpartition("@")
            user = f"{credentials.partition(':')[0]}@" if credentials.partition(":")[0] else ""
            object.__setattr__(self, "name", urlunsplit((parts.scheme, user + host, parts.path, "", "")))
            self._parsed()
            if parts.scheme != "unix" and parts.path.strip("/") and not parts.path.strip("/").isdigit():
                raise ValueError(f"{parts.path.strip('/')!r} is not the number of a database")
            if parts.scheme == "unix" and not parts.path:
                raise ValueError("it has no path")
            self.connection()
        except (ValueError, TypeError) as cause:
            shown = getattr(self, "name", "the URL")
            raise BusAddressError(
                f"{shown} is no address of a Redis server ({cause}); give one like redis://host:6379/0, "
                "rediss://user:password@host:6379/0 or unix:///path/to/socket"
            ) from None  # the cause may show the password

    def connection(self) -> AbstractConnection:
        """A connection that is not connected yet."""
        options = self._parsed()
        kind: type[AbstractConnection] = options.pop("connection_class", Connection)
        if not issubclass(kind, UnixDomainSocketConnection):
            probes = {getattr(socket, name): value for name, value in _KEEPALIVE.items() if hasattr(socket, name)}
            options = {"socket_keepalive": True, "socket_keepalive_options": probes, **options}
        return kind(
            **{
                **options,
                "socket_connect_timeout": self.connect_timeout,
                "socket_timeout": self.socket_timeout,
                "retry": Retry(NoBackoff(), 0),
                "protocol": 2,
                "decode_responses": False,
            }
        )

    def _parsed(self) -> dict[str, Any]:
        return dict(parse_url(self.url))  # type: ignore[no-untyped-call]  # redis-py leaves it untyped


class Backoff:
    """Waits that double from `first` to `longest` seconds, of which a random half to the whole is waited."""

    def __init__(self, first: float = 0.05, longest: float = 1.0) -> None:
        self._first = first
        self._longest = longest
        self._next = first

    def seconds(self) -> float:
        """How long to wait this time."""
        waited, self._next = self._next, min(self._next * 2, self._longest)
        return waited * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Begin with the shortest wait again."""
        self._next = self._first


class RedisLink:
    """A connection for one thread at a time. `purpose` stands in the log, once when it breaks and once when it is back.

    Without a purpose nothing is logged. `stop` calls off whatever is waited for. Every failure of the connection is a
    :class:`BusUnavailableError`, and leaves the link without one; the next command makes another.
    """

    def __init__(self, address: RedisAddress, purpose: str | None, stop: threading.Event) -> None:
        self._address = address
        self._purpose = purpose
        self._stop = stop
        self._connection: AbstractConnection | None = None
        self._expected = 0
        self._received: list[Any] = []
        self._broken = False

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._connection is not None

    @property
    def waits(self) -> bool:
        """Whether commands were sent whose answers have not been read."""
        return self._expected > 0

    def call(self, *commands: Command) -> list[Any]:
        """Send `commands` at once and return their answers, an error answer as a `ResponseError` in the list."""
        self.send(*commands)
        answers = self.answers(self._address.socket_timeout)
        if answers is None:
            raise self.lost("the wait was called off" if self._stop.is_set() else "it did not answer in time")
        return answers

    def last_call(self, *commands: Command) -> None:
        """Send `commands` and wait for a moment until they are done, even on `stop`. Then close the connection."""
        self.send(*commands)
        if self.answers(min(_LAST_MOMENT, self._address.socket_timeout), heed_stop=False) is None:
            raise self.lost("it did not answer in time")
        self.drop()

    def send(self, *commands: Command) -> None:
        """Send `commands`, connecting first if need be; their answers are to be read with :meth:`answers`."""
        try:
            if self._connection is None:
                connection = self._address.connection()
                connection.connect()  # type: ignore[no-untyped-call]  # as above
                self._connection = connection
            packed = self._connection.pack_commands(commands)  # type: ignore[no-untyped-call]  # as above
            self._connection.send_packed_command(packed, check_health=False)  # type: ignore[no-untyped-call]  # as above
        except (RedisError, OSError) as error:
            raise self.lost(error) from None
        self._expected, self._received = len(commands), []

    def answers(self, seconds: float, *, heed_stop: bool = True) -> list[Any] | None:
        """The answers to what was sent, or None if they are not there after `seconds`, or on `stop`.

        They can be waited for again then.
        """
        deadline = time.monotonic() + seconds
        connection = self._connection
        if connection is None:
            raise self.lost("the connection is gone")
        try:
            while len(self._received) < self._expected:
                if connection.can_read(max(0.0, min(_LOOK_EVERY, deadline - time.monotonic()))):
                    self._received.append(self._answer(connection))
                elif (heed_stop and self._stop.is_set()) or time.monotonic() >= deadline:
                    return None
        except (RedisError, OSError) as error:
            raise self.lost(error) from None
        answers, self._received, self._expected = self._received, [], 0
        if self._broken:
            _log.info("%s reaches %s again", self._purpose, self._address.name)
            self._broken = False
        return answers

    @staticmethod
    def _answer(connection: AbstractConnection) -> Any:
        try:
            return connection.read_response()
        except ResponseError as error:
            return error.with_traceback(None)  # which would keep alive whatever the callers hold

    def drop(self) -> None:
        """Close the connection. What was sent on it and not answered may or may not have been done."""
        connection, self._connection, self._expected = self._connection, None, 0
        self._received = []
        if connection is not None:
            connection.disconnect()  # type: ignore[no-untyped-call]  # as above

    def forget(self) -> None:
        """Leave the connection to the process that this one was forked from."""
        self._connection, self._expected, self._received = None, 0, []

    def lost(self, why: Exception | str) -> BusUnavailableError:
        """Give the connection up, and say why: the error to raise."""
        self.drop()
        error = self._unavailable(why)
        if self._purpose is not None and not self._broken and not self._stop.is_set():
            self._broken = True
            _log.warning("%s: %s", self._purpose, error)
        return error

    def _unavailable(self, why: Exception | str) -> BusUnavailableError:
        name = self._address.name
        if isinstance(why, (AuthenticationError, AuthorizationError)):
            return BusAuthenticationError(f"{name} does not accept the user name or password ({why}); see redis.url")
        text = str(why).lower()
        if isinstance(why, ResponseError) and ("auth" in text or "password" in text):
            return BusAuthenticationError(f"{name} does not accept the user name or password ({why}); see redis.url")
        if "name or service not known" in text or "nodename nor servname" in text or "name resolution" in text:
            return BusUnavailableError(f"{name} cannot be reached, its host name is not known; see redis.url")
        return BusUnavailableError(f"{name} cannot be reached ({why}); is the server running, and is redis.url right?")
