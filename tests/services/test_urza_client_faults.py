"""The Urza client where Urza, or what stands between, fails: what is asked again, how often, and what is said."""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from esper.configs import UrzaConfig
from esper.services.contracts import KernelQuery
from esper.services.errors import (
    NameTakenError,
    RateLimitedError,
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreFullError,
    UnauthorisedError,
    UrzaProtocolError,
    UrzaUnavailableError,
)
from esper.services.urza_client import RemoteStore
from tests.services.broken_server import (
    GOOD,
    TOKEN,
    Behaviour,
    BrokenServer,
    answer,
    ask,
    broken,
    client_settings,
    drip,
    endless,
    free_port,
    hang_up,
    problem,
    reset,
    silence,
)

# -- no answer ---------------------------------------------------------------------------------------------------------


def test_nobody_listens() -> None:
    port = free_port()
    store = RemoteStore(client_settings(f"http://127.0.0.1:{port}", retries=2))
    with pytest.raises(UrzaUnavailableError, match=rf"Urza at http://127.0.0.1:{port} cannot be reached.*urza\.url"):
        ask(store)
    with BrokenServer(GOOD, port=port):
        assert ask(store) == 2.5, "it is found as soon as it is there"
    store.close()


def test_a_host_that_does_not_exist() -> None:
    store = RemoteStore(client_settings("http://no-such-host.invalid:8321", retries=0))
    with pytest.raises(UrzaUnavailableError, match=r"http://no-such-host\.invalid:8321 cannot be reached"):
        ask(store)
    store.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (None, "set urza.url"),
        ("http://[::1", "cannot be a URL"),
        ("http://localhost:port", "cannot be a URL"),
        ("http://someone:password@localhost:1", "token into urza.token"),
    ],
)
def test_a_url_that_cannot_be_used(url: str | None, message: str) -> None:
    store = RemoteStore(client_settings(url))
    with pytest.raises(UrzaUnavailableError, match=message) as caught:
        ask(store)
    assert "password@" not in str(caught.value)
    store.close()


@pytest.mark.parametrize("trouble", [silence, hang_up, reset, answer(body=b'{"seconds": 2.5}', cut=4)])
def test_what_had_no_answer_is_asked_again(trouble: Behaviour) -> None:
    with broken(trouble, trouble, GOOD) as (server, store):
        assert ask(store) == 2.5
        assert server.asked == ["GET /internal/v1/blueprints/next-lease-end"] * 3


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (silence, r"said nothing for 0\.3 s; .*urza\.client\.timeout"),
        (hang_up, "broke off"),
        (reset, "broke off"),
        (answer(body=b'{"seconds": 2.5}', cut=4), "broke off"),
    ],
)
def test_attempts_are_bounded_and_the_error_says_what_happened(trouble: Behaviour, message: str) -> None:
    with broken(trouble, retries=3) as (server, store):
        with pytest.raises(UrzaUnavailableError, match=f"Urza at {server.url} {message}"):
            ask(store)
        assert len(server.requests) == 4


def test_an_answer_may_be_slow_as_long_as_it_goes_on() -> None:
    with broken(drip(b'{"seconds": 2.5}', 0.05)) as (server, store):
        assert ask(store) == 2.5
        assert len(server.requests) == 1


def test_an_answer_that_trickles_is_given_up() -> None:
    """One that never ends would hold up every load of a process that is waiting."""
    with broken(drip(b" " * 1000, 0.02), timeout=0.05, retries=1) as (server, store):
        with pytest.raises(UrzaUnavailableError, match=r"sends too slowly \(\d+ bytes in 0\.\d s\); look"):
            ask(store)
        assert len(server.requests) == 2


def test_so_is_a_download() -> None:
    with broken(drip(b"x" * 1000, 0.02, "application/octet-stream"), timeout=0.05, retries=1) as (server, store):
        with pytest.raises(UrzaUnavailableError, match="sends too slowly"):
            store.kernels.content("0" * 64)
        assert len(server.requests) == 2


# -- answers that are errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_server_or_proxy_in_trouble_is_asked_again(status: int) -> None:
    with broken(answer(status, b"<html>", "text/html"), GOOD) as (server, store):
        assert ask(store) == 2.5
        assert len(server.requests) == 2


def test_a_server_in_trouble_for_good() -> None:
    with broken(answer(502, b"<html>", "text/html"), retries=2) as (server, store):
        with pytest.raises(UrzaUnavailableError, match=f"Urza at {server.url} answers 502 with text/html.*proxy"):
            ask(store)
        assert len(server.requests) == 3


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_asks_for_time_is_given_it(status: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "esper")
    busy = problem(status, "store-busy", Retry_After="1")
    with broken(busy, GOOD) as (server, store):
        assert ask(store) == 2.5
        assert "attempt 2 follows in 1." in caplog.text
        assert len(server.requests) == 2


def test_the_time_may_be_given_as_a_date(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "esper")
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
    with broken(problem(503, "timeout", Retry_After=soon), GOOD) as (server, store):
        assert ask(store) == 2.5
        assert re.search(r"attempt 2 follows in [1-3]\.", caplog.text)
        assert len(server.requests) == 2


@pytest.mark.parametrize("asked_for", ["3600", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_who_asks_for_much_time_is_not_asked_again(asked_for: str) -> None:
    with broken(problem(429, "rate-limited", "come back later", Retry_After=asked_for)) as (server, store):
        with pytest.raises(RateLimitedError, match="come back later") as caught:
            ask(store)
        assert caught.value.retry_after is not None
        assert caught.value.retry_after >= 3600
        assert len(server.requests) == 1


@pytest.mark.parametrize("header", ["soon", "-5", "1e3", "٣"])
def test_a_time_that_cannot_be_read_is_overlooked(header: str) -> None:
    busy = problem(503, "store-busy", **{"Retry-After": header.encode().decode("latin-1")})
    with broken(busy, GOOD) as (server, store):
        assert ask(store) == 2.5
        assert len(server.requests) == 2


def test_an_error_that_stays_is_the_stores() -> None:
    with broken(problem(503, "store-busy", "others hold the database"), retries=1) as (server, store):
        with pytest.raises(StoreBusyError, match="others hold the database"):
            ask(store)
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("status", "slug", "error"),
    [
        (500, "store-corrupt", StoreCorruptError),
        (507, "store-full", StoreFullError),
        (409, "name-taken", NameTakenError),
        (401, "unauthorised", UnauthorisedError),
    ],
)
def test_what_would_be_answered_likewise_is_not_asked_again(status: int, slug: str, error: type[StoreError]) -> None:
    with broken(problem(status, slug, "as it is")) as (server, store):
        for count in range(1, 12):
            with pytest.raises(error, match="as it is"):
                ask(store)
            assert len(server.requests) == count, "nor is the server left alone for it"


def test_a_problem_of_an_unknown_kind() -> None:
    with broken(problem(418, "teapot", "short and stout")) as (server, store):
        with pytest.raises(StoreError, match="short and stout") as caught:
            ask(store)
        assert type(caught.value) is StoreError
        assert len(server.requests) == 1


# -- answers that are not Urza's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strange", "message"),
    [
        (answer(200, b"<html>", "text/html"), "sent text/html"),
        (answer(200, b"{}", None), "without a content type"),
        (answer(200, b'{"seconds": '), "not JSON"),
        (answer(200, b"\xff\xfe"), "not JSON"),
        (answer(200, b"[" * 100_000), "not JSON"),
        (answer(200, b"[]"), "sent a list"),
        (answer(200, b'{"seconds": "many"}'), "errors"),
        (answer(200, b"{}"), "errors"),
        (answer(404, b"<html>", "text/html"), r"answers 404 with text/html.*urza\.url"),
        (answer(404, b"{}", None), "answers 404 with no content type"),
        (answer(400, b"{", "application/problem+json"), "answers 400"),
    ],
)  # fmt: skip
def test_another_server_is_recognised(strange: Behaviour, message: str) -> None:
    with broken(strange) as (server, store):
        with pytest.raises(UrzaProtocolError, match=message) as caught:
            ask(store)
        assert server.url in str(caught.value)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body", [b"{}", b'{"items": 3}', b'{"items": [{"id": 3}]}', b'{"items": [], "next_cursor": 3}']
)
def test_a_page_that_is_none(body: bytes) -> None:
    with broken(answer(body=body)) as (server, store):
        with pytest.raises(UrzaProtocolError):
            store.blueprints.list()
        with pytest.raises(UrzaProtocolError):
            store.kernels.query(KernelQuery())
        assert len(server.requests) == 2


def test_a_list_that_never_ends_is_left() -> None:
    with broken(answer(body=b'{"items": [], "next_cursor": "more"}')) as (server, store):
        with pytest.raises(UrzaProtocolError):
            store.blueprints.list()
        assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirection_is_not_followed_and_the_token_stays_here(status: int) -> None:
    with BrokenServer(GOOD) as elsewhere, broken(answer(status, Location=elsewhere.url)) as (server, store):
        with pytest.raises(UrzaProtocolError, match=f"answers {status}.*the way to {elsewhere.url}"):
            ask(store)
        assert len(server.requests) == 1
        assert elsewhere.requests == []


def test_a_document_without_an_end_is_left() -> None:
    with broken(endless("application/json"), timeout=5) as (server, store):
        with pytest.raises(UrzaProtocolError, match="more than"):
            ask(store)
        assert len(server.requests) == 1


# -- the token ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [silence, hang_up, reset, answer(500), problem(401, "unauthorised"), answer(404, b"<html>", "text/html"), GOOD],
)
def test_the_token_is_sent_and_nowhere_else(trouble: Behaviour, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore", "asyncio", "esper"):
        caplog.set_level(logging.DEBUG, logger=name)
    said = ""
    with broken(trouble, retries=1) as (server, store):
        try:
            ask(store)
        except StoreError as error:
            cause: BaseException | None = error
            while cause is not None:
                said += f"{cause!r} {cause}"
                cause = cause.__cause__ or cause.__context__
        assert server.requests[0].headers["authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in said
    assert TOKEN not in caplog.text
    assert TOKEN not in repr(store.settings)


@pytest.mark.parametrize("token", ["secret-secret-secret\n", "secret secret secret", "sécret-secret-secret"])
def test_a_token_that_cannot_be_one_is_refused_without_saying_it(token: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with BrokenServer(GOOD) as server:
        store = RemoteStore(UrzaConfig.model_validate({"url": server.url, "token": token}))
        with pytest.raises(UnauthorisedError, match=r"urza\.token") as caught:
            ask(store)
        store.close()
        assert server.requests == []
    assert not re.search("s.cret", f"{caught.value!r} {caught.value.__cause__} {caught.value.__context__}{caplog.text}")
