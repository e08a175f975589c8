"""Requests to one Urza: connections, retries, and errors that are those of the store."""

from __future__ import annotations

import hashlib
import logging
import math
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from pydantic import SecretStr, ValidationError

from esper.configs import UrzaConfig
from esper.services.errors import (
    RateLimitedError,
    StoreCorruptError,
    StoreFullError,
    StoreReadOnlyError,
    StoreSchemaError,
    UnauthorisedError,
    UrzaProtocolError,
    UrzaUnavailableError,
)
from esper.services.problems import MEDIA_TYPE, ProblemDocument, error_of
from esper.services.urza_client.retry import LONGEST_REQUESTED_WAIT, CircuitBreaker, RetryBudget, backoff

__all__ = ["Answer", "UrzaTransport"]

_log = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0
_IDLE_CONNECTIONS = 16
_IDLE_SECONDS = 15.0  # less than Urza keeps a connection, so that it is not closed while a request is on its way
_MAX_DOCUMENT = 64 * 2**20
_SLOWEST = 1024  # bytes a second on average, of an answer that takes ...
_SLOW = 10  # ... as many times longer than silence may
_TROUBLE = {429, 500, 502, 503, 504}
_LASTING = (StoreCorruptError, StoreFullError, StoreReadOnlyError, StoreSchemaError)  # the same would come again
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout)
_AS_IT_IS = {"Accept-Encoding": "identity"}  # the hash is that of the bytes, not of what a proxy makes of them
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/\d+")
_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    headers: httpx.Headers
    body: bytes = field(repr=False)
    attempts: int = 1
    """How often it was asked for; an attempt before the last may have done its work, and its answer be lost."""

    @property
    def is_good(self) -> bool:
        """Whether it is no error."""
        return self.status < httpx.codes.MULTIPLE_CHOICES or self.status == httpx.codes.NOT_MODIFIED


_Receive = Callable[[httpx.Response], tuple[int, httpx.Headers, bytes]]


class UrzaTransport:
    """For any thread, until it is closed. The lock is held for counting only.

    Does not follow redirects: Urza makes none, and a token must not go elsewhere.
    """

    def __init__(self, settings: UrzaConfig) -> None:
        self.url = _checked_url(settings.url)
        """Without a slash at its end."""
        self._settings = settings.client
        self._client = httpx.Client(
            base_url=self.url,
            headers=_authorization(settings.token),
            timeout=httpx.Timeout(
                self._settings.timeout, connect=min(_CONNECT_SECONDS, self._settings.timeout), pool=None
            ),
            limits=httpx.Limits(  # one that hangs takes no connection from others
                max_connections=None, max_keepalive_connections=_IDLE_CONNECTIONS, keepalive_expiry=_IDLE_SECONDS
            ),
            follow_redirects=False,
        )
        self._budget = RetryBudget()
        self._breaker = CircuitBreaker()
        self._last_failure = ""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._under_way = 0
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def close(self) -> None:
        """Close the connections, for good. Who waits for an answer gets ``UrzaUnavailableError``."""
        with self._lock:
            self._closed.set()
            is_idle, open_ones = not self._under_way, list(self._sockets)
        for each in open_ones:
            _hang_up(each)
        if is_idle:  # else the last that is under way does it: a socket is closed by the thread that reads it
            self._client.close()

    @contextmanager
    def _open(self) -> Iterator[None]:
        with self._lock:
            self._check_closed()
            self._under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1
                is_last = self._closed.is_set() and not self._under_way
            if is_last:
                self._client.close()

    def _check_closed(self) -> None:
        if self._closed.is_set():
            raise UrzaUnavailableError(f"the store at {self.url} was closed while it was asked")

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """See httpx's extension `trace`: notes the sockets, so that :meth:`close` can wake who reads from them."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            opened = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets.add(opened)
                is_late = self._closed.is_set()
            if is_late:
                _hang_up(opened)

    def request(
        self,
        method: str,
        path: str,
        *,
        repeatable: bool = True,
        accepted: Collection[int] = (),
        headers: Mapping[str, str] | None = None,
        **content: Any,
    ) -> Answer:
        """One of status 2xx, 304 or one of `accepted`. `content` is httpx's `json`, `params`, `content` or `files`.

        What is not `repeatable` is asked again only if it never reached the server. Raises what the store would raise,
        ``UrzaUnavailableError``, and ``UrzaProtocolError`` for what is no answer of Urza's.
        """
        given = headers or {}
        answer = self._ask(method, path, lambda: given, content, self.document, repeatable)
        return answer if answer.status in accepted else self.checked(answer)

    def download(self, path: str, digest: str | None, most: int, headers: Mapping[str, str] | None = None) -> Answer:
        """The bytes at `path`, at most `most`, whose SHA-256 is `digest`, or what the server says it is.

        Goes on where a connection broke off. Bytes of another hash are asked for once more, and then refused. An answer
        of status 304, to `headers` that allow for it, has no bytes. Raises as :meth:`request` does, and
        ``StoreCorruptError``.
        """
        expected = found = ""
        for _ in range(2):
            parts = _Parts(most, self, {**_AS_IT_IS, **(headers or {})})
            answer = self.checked(self._ask("GET", path, parts.headers, {}, parts.receive, True))
            if answer.status == httpx.codes.NOT_MODIFIED:
                return answer
            expected = digest if digest is not None else answer.headers.get("etag", "").strip('"')
            found = hashlib.sha256(answer.body).hexdigest()
            if found == expected:
                return answer
            _log.warning("bytes of %s hash to %s...; they are asked for once more", path, found[:12])
        raise StoreCorruptError(
            f"Urza at {self.url} sent bytes that hash to {found[:12]}... for {expected[:12] or path}, twice; "
            "look at its blobs, or at what stands between"
        )

    def checked(self, answer: Answer) -> Answer:
        """`answer`, or the error that it is, raised."""
        if not answer.is_good:
            raise self._error(answer)
        return answer

    def document(self, response: httpx.Response) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and all of the body, which may be compressed."""
        body = bytearray()
        for chunk in self.in_time(response.iter_bytes()):
            body += chunk
            if len(body) > _MAX_DOCUMENT:
                raise UrzaProtocolError(
                    f"{response.url.host} sends a document of more than {_MAX_DOCUMENT} bytes; is it an Urza?"
                )
        return response.status_code, response.headers, bytes(body)

    def in_time(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """`chunks`, as long as they do not come at a trickle. Raises an ``httpx.ReadTimeout``."""
        began, received = time.monotonic(), 0
        for chunk in chunks:
            received += len(chunk)
            seconds = time.monotonic() - began
            if seconds > _SLOW * self._settings.timeout and received < _SLOWEST * seconds:
                raise _TooSlowError(f"{received} bytes in {seconds:.1f} s")
            yield chunk

    def _ask(
        self,
        method: str,
        path: str,
        headers: Callable[[], Mapping[str, str]],
        content: Mapping[str, Any],
        receive: _Receive,
        repeatable: bool,
    ) -> Answer:
        """Any answer, after as many attempts as are due. Raises ``UrzaUnavailableError`` if there is none."""
        extensions = {"trace": self._trace}
        attempt = 0
        while True:
            attempt += 1
            self._check_breaker()
            try:
                with (
                    self._open(),
                    self._client.stream(
                        method, path, headers=dict(headers()), extensions=extensions, **content
                    ) as response,
                ):
                    answer = Answer(*receive(response), attempt)
            except httpx.HTTPError as cause:
                self._check_closed()
                unreachable = self._unreachable(cause)
                self._failed(unreachable)
                may_repeat = repeatable or isinstance(cause, _NEVER_SENT)
                if not (may_repeat and self._wait(attempt, unreachable)):
                    raise unreachable from cause
            except BaseException:
                self._breaker.abandoned()
                raise
            else:
                trouble = self._trouble(answer)
                if trouble is None or answer.status == httpx.codes.TOO_MANY_REQUESTS:
                    self._breaker.succeeded()
                else:
                    self._failed(trouble)
                if trouble is None:
                    self._budget.earn()
                    return answer
                if not (repeatable and self._wait(attempt, trouble, _retry_after(answer.headers))):
                    return answer

    def _check_breaker(self) -> None:
        wait = self._breaker.wait()
        if wait > 0:
            raise UrzaUnavailableError(
                f"Urza at {self.url} failed {self._breaker.failures} times in a row and is asked again in "
                f"{math.ceil(wait)} s; the last time it {self._last_failure}"
            )

    def _failed(self, error: Exception) -> None:
        self._last_failure = str(error).removeprefix(f"Urza at {self.url} ")
        self._breaker.failed()

    def _wait(self, attempt: int, error: Exception, requested: float | None = None) -> bool:
        """Wait until the next attempt is due; False, at once, if there is none."""
        too_long = requested is not None and requested > LONGEST_REQUESTED_WAIT
        if too_long or attempt > self._settings.retries or not self._budget.spend():
            return False
        wait = backoff(attempt, self._settings.retry_seconds, requested)
        _log.info("%s; attempt %d follows in %.1f s", error, attempt + 1, wait)
        if self._closed.wait(wait):
            self._check_closed()
        return True

    def _unreachable(self, error: httpx.HTTPError) -> UrzaUnavailableError:
        said = str(error) or type(error).__name__
        if isinstance(error, _NEVER_SENT):
            what = f"cannot be reached ({said}); start it, or correct urza.url"
        elif isinstance(error, _TooSlowError):
            what = f"sends too slowly ({said}); look at the network, or at a proxy before it"
        elif isinstance(error, httpx.TimeoutException):
            what = f"said nothing for {self._settings.timeout:g} s; look at its log, or raise urza.client.timeout"
        else:
            what = f"broke off ({said}); look at its log, or at a proxy before it"
        return UrzaUnavailableError(f"Urza at {self.url} {what}")

    def _trouble(self, answer: Answer) -> Exception | None:
        """The error that `answer` is, if it may be over soon."""
        if answer.status not in _TROUBLE:
            return None
        error = self._error(answer)
        return None if isinstance(error, _LASTING) else error

    def _error(self, answer: Answer) -> Exception:
        kind = answer.headers.get("content-type", "").partition(";")[0].strip()
        if kind == MEDIA_TYPE:
            try:
                error = error_of(ProblemDocument.model_validate_json(answer.body))
            except ValidationError as cause:
                _log.debug("an answer called %s is none: %s", MEDIA_TYPE, cause)
            else:
                if isinstance(error, RateLimitedError):
                    error.retry_after = _retry_after(answer.headers)
                return error
        said = f"{answer.status} with {kind or 'no content type'}"
        if answer.status >= httpx.codes.INTERNAL_SERVER_ERROR:
            return UrzaUnavailableError(f"Urza at {self.url} answers {said}; look at its log, or at a proxy before it")
        if "location" in answer.headers:
            said += f" and the way to {answer.headers['location'][:200]}"
        return UrzaProtocolError(f"{self.url} answers {said}, which is not how Urza answers; correct urza.url")


class _TooSlowError(httpx.ReadTimeout):
    """Something comes all the time, and so little that the end is out of sight."""


class _Parts:
    """What has come of a download so far, over several connections."""

    def __init__(self, most: int, transport: UrzaTransport, headers: Mapping[str, str]) -> None:
        self._most, self._transport, self._url, self._headers = most, transport, transport.url, headers
        self._data = bytearray()
        self._received = httpx.Headers()

    def headers(self) -> Mapping[str, str]:
        """Of the next request."""
        etag = self._received.get("etag", "")
        if not self._data or not etag.startswith('"'):  # a weak tag does not stand for bytes
            return self._headers
        return {**self._headers, "Range": f"bytes={len(self._data)}-", "If-Range": etag}

    def receive(self, response: httpx.Response) -> tuple[int, httpx.Headers, bytes]:
        status = response.status_code
        if status == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE and self._data:
            return 200, self._received, bytes(self._data)  # nothing is left to come; the hash says whether that is so
        if status not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
            return self._transport.document(response)
        if status == httpx.codes.PARTIAL_CONTENT:
            found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
            if found is None or int(found[1]) != len(self._data):
                raise UrzaProtocolError(f"{self._url} sent another part of a file than was asked for")
        else:
            self._data.clear()
        self._received = response.headers
        announced = response.headers.get("content-length", "")
        if announced.isdigit() and len(self._data) + int(announced) > self._most:
            raise StoreCorruptError(f"{self._url} announces {announced} bytes, and at most {self._most} are taken")
        for chunk in self._transport.in_time(response.iter_raw()):
            self._data += chunk
            if len(self._data) > self._most:
                raise StoreCorruptError(f"{self._url} sends more than {self._most} bytes, which are not taken")
        return 200, self._received, bytes(self._data)


def _hang_up(connection: socket.socket) -> None:
    """Wake the thread that reads from or writes to `connection`, with an error or the end of what comes."""
    with suppress(OSError):  # it is closed by now
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # an SSLSocket's own would first forget its keys


def _checked_url(text: str | None) -> str:
    if text is None:
        raise UrzaUnavailableError("there is no Urza to ask: set urza.url, for example http://localhost:8321")
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as cause:
        raise UrzaUnavailableError(f"urza.url cannot be a URL: {cause}") from cause
    if url.userinfo:  # it would stand in every message
        raise UrzaUnavailableError("urza.url has a user or a password in it; put a token into urza.token")
    return text.rstrip("/")


def _authorization(token: SecretStr | None) -> dict[str, str]:
    if token is None:
        return {}
    text = token.get_secret_value()
    if not _TOKEN.fullmatch(text):  # httpx would refuse it too, and say the whole of it
        raise UnauthorisedError("urza.token has blanks, line ends or letters beyond ASCII in it, which no token has")
    return {"Authorization": f"Bearer {text}"}


def _retry_after(headers: httpx.Headers) -> float | None:
    """In seconds; RFC 9110 has a number or a date."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
