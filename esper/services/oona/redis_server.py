"""The address of a Redis server: its clients, what their errors mean, and the log of its outages."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from redis import ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.connection import UnixDomainSocketConnection, parse_url
from redis.exceptions import AuthenticationError, AuthorizationError, ResponseError
from redis.retry import Retry

from esper.services.oona.errors import BusAddressError, BusAuthenticationError, BusUnavailableError

__all__ = ["OutageLog", "RedisServer"]

_log = logging.getLogger("esper.services.oona_client")  # one part of `ESPER_LOGS`
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # seconds, seconds, probes


@dataclass(frozen=True)
class RedisServer:
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
            if parts.scheme != "unix" and parts.path.strip("/") and not parts.path.strip("/").isdigit():
                raise ValueError(f"{parts.path.strip('/')!r} is not the number of a database")
            if parts.scheme == "unix" and not parts.path:
                raise ValueError("it has no path")
            pool = self._pool()
            pool.connection_class(**pool.connection_kwargs)  # it would refuse an unknown option only when it connects
        except (ValueError, TypeError) as cause:
            shown = getattr(self, "name", "the URL")
            raise BusAddressError(
                f"{shown} is no address of a Redis server ({cause}); give one like redis://host:6379/0, "
                "rediss://user:password@host:6379/0 or unix:///path/to/socket"
            ) from None  # the cause may show the password

    def client(self) -> Redis:
        """A client with a pool of its own, for any number of threads; nothing is connected yet.

        It tries nothing again by itself: only who asks knows what was lost with a connection.
        """
        return Redis(connection_pool=self._pool())

    def unavailable(self, why: Exception) -> BusUnavailableError:
        """What an error of a client means for who uses it."""
        text = str(why).lower()
        if isinstance(why, (AuthenticationError, AuthorizationError)) or (
            isinstance(why, ResponseError) and ("auth" in text or "password" in text)
        ):
            return BusAuthenticationError(
                f"{self.name} does not accept the user name or password ({why}); see redis.url"
            )
        if "name or service not known" in text or "nodename nor servname" in text or "name resolution" in text:
            return BusUnavailableError(f"{self.name} cannot be reached, its host name is not known; see redis.url")
        return BusUnavailableError(
            f"{self.name} cannot be reached ({why}); is the server running, and is redis.url right?"
        )

    def _pool(self) -> ConnectionPool:
        url: dict[str, Any] = dict(parse_url(self.url))  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
        probes = {getattr(socket, name): value for name, value in _KEEPALIVE.items() if hasattr(socket, name)}
        keepalive = {"socket_keepalive": True, "socket_keepalive_options": probes}
        return ConnectionPool(
            **{
                **({} if url.get("connection_class") is UnixDomainSocketConnection else keepalive),
                **url,
                "socket_connect_timeout": self.connect_timeout,
                "socket_timeout": self.socket_timeout,
                "retry": Retry(NoBackoff(), 0),
                "protocol": 2,
                "decode_responses": False,
            }
        )


class OutageLog:
    """One line in the log when `purpose` cannot reach the server any more, and one when it can again."""

    def __init__(self, server: RedisServer, purpose: str) -> None:
        self._server = server
        self._purpose = purpose
        self._out = False

    def lost(self, why: Exception) -> BusUnavailableError:
        """Take note of a failure; returns the error to raise."""
        error = self._server.unavailable(why)
        if not self._out:
            self._out = True
            _log.warning("%s: %s", self._purpose, error)
        return error

    def reached(self) -> None:
        """Take note of a success."""
        if self._out:
            self._out = False
            _log.info("%s reaches %s again", self._purpose, self._server.name)
