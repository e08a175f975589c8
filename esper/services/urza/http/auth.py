"""Authorisation of requests: bearer tokens with scopes, or everybody on a loopback address in development."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import Scope

from esper.configs import ConfigError, EsperConfig, UrzaToken
from esper.services.errors import ForbiddenError, UnauthorisedError

__all__ = ["OPEN_PATHS", "Access", "Caller", "check_exposure", "needed_scope"]

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
"""What needs no token."""

_READING_POSTS = frozenset({"/api/v1/kernels/query"})
_BEARER = b"bearer "


def check_exposure(config: EsperConfig) -> None:
    """Raises :class:`ConfigError` if there are no tokens although others than this machine's users could ask."""
    if config.urza.tokens:
        return
    if config.environment == "production":
        raise ConfigError(
            "urza.tokens is empty, and in the environment 'production' Urza answers nobody without a token; set "
            "urza.tokens, or environment to 'development'"
        )
    if not _is_loopback(config.urza.host):
        raise ConfigError(
            f"urza.host is {config.urza.host!r}, where others can reach it, and urza.tokens is empty; set urza.tokens, "
            "or urza.host to '127.0.0.1'"
        )


def needed_scope(method: str, path: str) -> str | None:
    """The scope that a request needs; None if it needs no token. What is not known needs one, too."""
    if path in OPEN_PATHS:
        return None
    if path == "/internal" or path.startswith("/internal/"):
        return "worker"
    if path.startswith("/api/") and method not in ("GET", "HEAD") and path not in _READING_POSTS:
        return "submit"
    return "read"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is. `name` is None for somebody without a token."""

    name: str | None
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class _KnownToken:
    digest: bytes
    caller: Caller


class Access:
    """Recognises callers and says what they may not do. Keeps digests of the tokens only. Immutable."""

    def __init__(self, tokens: Sequence[UrzaToken]) -> None:
        self._tokens = tuple(
            _KnownToken(_digest(each.token.get_secret_value().encode()), Caller(each.name, frozenset(each.scopes)))
            for each in tokens
        )

    def caller(self, scope: Scope) -> Caller | None:
        """Whose token the request shows; None if it shows none that is known.

        Takes the same time whatever is shown: digests are compared, each in constant time, and all of them.
        """
        shown = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(shown) != 1 or shown[0][: len(_BEARER)].lower() != _BEARER:
            return None
        digest = _digest(shown[0][len(_BEARER) :].strip())
        found = None
        for each in self._tokens:
            if hmac.compare_digest(each.digest, digest):
                found = each.caller
        return found

    def check(self, scope: Scope, caller: Caller | None) -> None:
        """Raises ``UnauthorisedError`` or ``ForbiddenError`` unless `caller` may make this request."""
        needed = needed_scope(scope["method"], scope["path"])
        if needed is None:
            return
        if not self._tokens:
            _check_local(scope)
        elif caller is None:
            raise UnauthorisedError(
                "this needs a token that Urza knows; send it as `Authorization: Bearer …`, from the setting urza.token"
            )
        elif needed not in caller.scopes:
            raise ForbiddenError(
                f"this needs a token with the scope {needed!r}; the token {caller.name!r} has "
                f"{', '.join(sorted(caller.scopes))}"
            )


def _check_local(scope: Scope) -> None:
    """Without tokens: no web page that a user of this machine looks at may use their browser to reach the store."""
    headers = {name: value for name, value in scope["headers"] if name in (b"host", b"origin")}
    if b"origin" in headers:
        raise ForbiddenError("Urza answers no web pages; without urza.tokens, a request with `Origin` is refused")
    host = headers.get(b"host", b"").decode("latin-1")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if not _is_loopback(name):
        raise ForbiddenError("without urza.tokens, Urza is reached by a loopback address only, such as 127.0.0.1")


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
