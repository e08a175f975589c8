"""Requests to one Urza: connections, retries, and errors that are those of the store."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from pydantic import ValidationError

from esper.configs import UrzaConfig
from esper.services.errors import StoreCorruptError, UrzaProtocolError, UrzaUnavailableError
from esper.services.problems import MEDIA_TYPE, ProblemDocument, error_of
from esper.services.urza_client.patience import CircuitBreaker, RetryBudget, backoff

__all__ = ["Answer", "UrzaTransport"]

_log = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0
_CONNECTIONS = 16
_MAX_DOCUMENT = 64 * 2**20
_TROUBLE = {429, 500, 502, 503, 504}
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_AS_IT_IS = {"Accept-Encoding": "identity"}  # the hash is that of the bytes, not of what a proxy makes of them
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/\d+")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, if it was no error."""

    status: int
    headers: httpx.Headers
    body: bytes = field(repr=False)


class UrzaTransport:
    """For one event loop. Does not follow redirects: Urza makes none, and a token must not go elsewhere."""

    def __init__(self, settings: UrzaConfig) -> None:
        if settings.url is None:
            raise UrzaUnavailableError("there is no Urza to ask: set urza.url, for example http://localhost:8321")
        self._url = settings.url.rstrip("/")
        self._settings = settings.client
        token = settings.token
        self._client = httpx.AsyncClient(
            base_url=self._url,
            headers={} if token is None else {"Authorization": f"Bearer {token.get_secret_value()}"},
            timeout=httpx.Timeout(self._settings.timeout, connect=min(_CONNECT_SECONDS, self._settings.timeout)),
            limits=httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS),
            follow_redirects=False,
        )
        self._budget = RetryBudget()
        self._breaker = CircuitBreaker()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def request(
        self,
        method: str,
        path: str,
        *,
        repeatable: bool = True,
        headers: Mapping[str, str] | None = None,
        **content: Any,
    ) -> Answer:
        """An answer of status 2xx or 304; `content` is httpx's `json`, `params`, `content`, `files` or `data`.

        What is not `repeatable` is asked again only if it never reached the server. Raises what the store would raise,
        ``UrzaUnavailableError``, and ``UrzaProtocolError`` for what is no answer of Urza's.
        """
        attempt = 0
        while True:
            attempt += 1
            try:
                async with self._stream(method, path, headers, content) as response:
                    answer = Answer(response.status_code, response.headers, await _read(response, _MAX_DOCUMENT))
            except httpx.HTTPError as error:
                again = repeatable or isinstance(error, _NEVER_SENT)
                await self._wait_or_raise(attempt, again, None, self._unreachable(error), error)
                continue
            if answer.status in _TROUBLE and repeatable:
                await self._wait_or_raise(attempt, True, _retry_after(answer.headers), self._error(answer))
                continue
            return self._checked(answer)

    async def download(
        self, path: str, digest: str | None, most: int, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """The bytes at `path`, at most `most`, whose SHA-256 is `digest`, or what the server says it is.

        Goes on where a connection broke off. Bytes of another hash are asked for once more, and then refused. An answer
        of status 304, to `headers` that allow for it, has no bytes. Raises as :meth:`request` does, and
        ``StoreCorruptError``.
        """
        attempt, wrong, parts = 0, 0, _Parts()
        while True:
            attempt += 1
            try:
                async with self._stream(
                    "GET", path, {**_AS_IT_IS, **(headers or {}), **parts.headers()}, {}
                ) as response:
                    if response.status_code in (200, 206):
                        await parts.receive(response, most, self._url)
                        answer = Answer(200, response.headers, bytes(parts.data))
                    else:
                        answer = Answer(response.status_code, response.headers, await _read(response, _MAX_DOCUMENT))
            except httpx.HTTPError as error:
                await self._wait_or_raise(attempt, True, None, self._unreachable(error), error)
                continue
            if answer.status in _TROUBLE:
                await self._wait_or_raise(attempt, True, _retry_after(answer.headers), self._error(answer))
                continue
            self._checked(answer)
            if answer.status == httpx.codes.NOT_MODIFIED:
                return answer
            expected = digest if digest is not None else answer.headers.get("etag", "").strip('"')
            found = hashlib.sha256(answer.body).hexdigest()
            if found == expected:
                return answer
            wrong += 1
            if wrong > 1:
                raise StoreCorruptError(
                    f"Urza at {self._url} sent bytes that hash to {found[:12]}... for {expected[:12] or path}, twice; "
                    "look at its blobs, or at what stands between"
                )
            _log.warning("bytes for %s hash to %s; they are asked for once more", expected[:12], found[:12])
            parts = _Parts()

    @asynccontextmanager
    async def _stream(
        self, method: str, path: str, headers: Mapping[str, str] | None, content: Mapping[str, Any]
    ) -> AsyncIterator[httpx.Response]:
        """One attempt, which the breaker is told of."""
        wait = self._breaker.wait()
        if wait > 0:
            raise UrzaUnavailableError(
                f"Urza at {self._url} failed {self._breaker.failures} times in a row; it is asked again in {wait:.0f} s"
            )
        known = False
        try:
            async with self._client.stream(method, path, headers=dict(headers or {}), **content) as response:
                yield response
                known = True
                if response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
                    self._breaker.failed()
                else:
                    self._breaker.succeeded()
                    self._budget.earn()
        except httpx.HTTPError:
            known = True
            self._breaker.failed()
            raise
        finally:
            if not known:
                self._breaker.abandoned()

    async def _wait_or_raise(
        self,
        attempt: int,
        again: bool,
        requested: float | None,
        error: Exception,
        cause: Exception | None = None,
    ) -> None:
        if not again or attempt > self._settings.retries or not self._budget.spend():
            raise error from cause
        wait = backoff(attempt, self._settings.retry_seconds, requested)
        _log.info("%s; attempt %d follows in %.1f s", error, attempt + 1, wait)
        await asyncio.sleep(wait)

    def _unreachable(self, error: httpx.HTTPError) -> UrzaUnavailableError:
        what = str(error) or type(error).__name__
        return UrzaUnavailableError(f"Urza at {self._url} cannot be reached ({what}); start it, or correct urza.url")

    def _checked(self, answer: Answer) -> Answer:
        if answer.status < httpx.codes.MULTIPLE_CHOICES or answer.status == httpx.codes.NOT_MODIFIED:
            return answer
        raise self._error(answer)

    def _error(self, answer: Answer) -> Exception:
        if answer.headers.get("content-type", "").partition(";")[0].strip() == MEDIA_TYPE:
            try:
                return error_of(ProblemDocument.model_validate_json(answer.body))
            except ValidationError:
                pass
        said = f"{answer.status} {answer.headers.get('content-type', 'without a content type')}"
        if answer.status >= httpx.codes.INTERNAL_SERVER_ERROR:
            return UrzaUnavailableError(f"Urza at {self._url} answers {said}; look at its log, or at a proxy before it")
        return UrzaProtocolError(f"{self._url} answers {said}, which is not how Urza answers; correct urza.url")

    def not_understood(self, what: object) -> UrzaProtocolError:
        """The error for an answer of status 200 that is not what was asked for."""
        return UrzaProtocolError(f"{self._url} sent {what}; is it an Urza, and of this version of Esper?")


class _Parts:
    """What has come of a download so far, over several connections."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._etag: str | None = None

    def headers(self) -> dict[str, str]:
        """Of the next request."""
        if not self.data or self._etag is None:
            return {}
        return {"Range": f"bytes={len(self.data)}-", "If-Range": self._etag}

    async def receive(self, response: httpx.Response, most: int, url: str) -> None:
        if response.status_code == httpx.codes.PARTIAL_CONTENT:
            found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
            if found is None or int(found[1]) != len(self.data):
                raise UrzaProtocolError(f"{url} sent another part of a file than was asked for")
        else:
            self.data.clear()
        etag = response.headers.get("etag")
        self._etag = etag if etag is not None and etag.startswith('"') else None
        announced = response.headers.get("content-length", "")
        if announced.isdigit() and len(self.data) + int(announced) > most:
            raise StoreCorruptError(f"{url} announces {announced} bytes, and at most {most} are taken")
        async for chunk in response.aiter_raw():
            self.data += chunk
            if len(self.data) > most:
                raise StoreCorruptError(f"{url} sends more than {most} bytes, which are not taken")


async def _read(response: httpx.Response, most: int) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > most:
            raise UrzaProtocolError(f"{response.url.host} sends a document of more than {most} bytes; is it an Urza?")
    return bytes(body)


def _retry_after(headers: httpx.Headers) -> float | None:
    text = headers.get("retry-after", "")
    return float(text) if text.isdigit() else None
