"""Downloads of the Urza client: broken off and resumed, wrong, too long."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from esper.services.errors import (
    StoreCorruptError,
    UrzaProtocolError,
    UrzaUnavailableError,
)
from tests.services.broken_server import (
    GOOD,
    Behaviour,
    answer,
    ask,
    broken,
    endless,
    problem,
)
from tests.services.shelf import blueprint

DATA = bytes(range(256)) * 400
DIGEST = hashlib.sha256(DATA).hexdigest()
ETAG = f'"{DIGEST}"'
BINARY = "application/octet-stream"
DOCUMENT = blueprint(1).to_json().encode()
TAG = f'"{blueprint(1).id}"'


def part(start: int, *, etag: str = ETAG, cut: int | None = None, data: bytes = DATA) -> Behaviour:
    """The rest of the data from `start`."""
    span = f"bytes {start}-{len(data) - 1}/{len(data)}"
    return answer(206, data[start:], BINARY, cut=cut, ETag=etag, Content_Range=span)


def whole(data: bytes = DATA, *, etag: str = ETAG, cut: int | None = None, **headers: str) -> Behaviour:
    return answer(200, data, BINARY, cut=cut, ETag=etag, **headers)


def test_a_download_goes_on_where_it_broke_off() -> None:
    with broken(whole(cut=1000), part(1000, cut=500), part(1500)) as (server, store):
        assert store.kernels.content(DIGEST) == (DATA, ())
        ranges = [(request.headers.get("range"), request.headers.get("if-range")) for request in server.requests]
        assert ranges == [(None, None), ("bytes=1000-", ETAG), ("bytes=1500-", ETAG)]


def test_a_download_that_hangs_goes_on() -> None:
    async def stall(request: object, writer: asyncio.StreamWriter) -> bool:
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(DATA)}\r\nContent-Type: {BINARY}\r\nETag: {ETAG}\r\n\r\n"
        writer.write(head.encode() + DATA[:1000])
        await asyncio.sleep(3600)
        return False

    with broken(stall, part(1000)) as (server, store):
        assert store.kernels.content(DIGEST) == (DATA, ())
        assert [request.headers.get("range") for request in server.requests] == [None, "bytes=1000-"]


def test_a_download_of_another_version_starts_afresh() -> None:
    with broken(whole(b"old" * 1000, etag='"old"', cut=1000), whole()) as (server, store):
        assert store.kernels.content(DIGEST) == (DATA, ())
        assert server.requests[1].headers["if-range"] == '"old"'


@pytest.mark.parametrize("etag", ['W/"weak"', "bare", ""])
def test_without_a_strong_tag_a_download_starts_afresh(etag: str) -> None:
    with broken(whole(etag=etag, cut=1000), whole()) as (server, store):
        assert store.kernels.content(DIGEST) == (DATA, ())
        assert [request.headers.get("range") for request in server.requests] == [None, None]


def test_a_download_that_broke_off_after_its_last_byte() -> None:
    async def all_but_the_end(request: object, writer: asyncio.StreamWriter) -> bool:
        head = f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: {BINARY}\r\nETag: {ETAG}\r\n\r\n"
        writer.write(head.encode() + f"{len(DATA):x}\r\n".encode() + DATA + b"\r\n")
        await writer.drain()
        return False

    with broken(all_but_the_end, problem(416, "range-not-satisfiable")) as (server, store):
        assert store.kernels.content(DIGEST) == (DATA, ())
        assert [request.headers.get("range") for request in server.requests] == [None, f"bytes={len(DATA)}-"]


def test_a_download_that_breaks_off_every_time() -> None:
    with broken(whole(cut=10), part(10, cut=10), part(20, cut=10), retries=2) as (server, store):
        with pytest.raises(UrzaUnavailableError, match="broke off"):
            store.kernels.content(DIGEST)
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    "span", ["bytes 0-9/10", f"bytes 1001-{len(DATA) - 1}/{len(DATA)}", "bytes */5", "", "lines 3"]
)
def test_a_part_that_was_not_asked_for(span: str) -> None:
    wrong = answer(206, DATA[1000:], BINARY, ETag=ETAG, Content_Range=span)
    with broken(whole(cut=1000), wrong) as (server, store):
        with pytest.raises(UrzaProtocolError, match="another part"):
            store.kernels.content(DIGEST)
        assert len(server.requests) == 2


def test_wrong_bytes_are_asked_for_once_more() -> None:
    with broken(whole(DATA[::-1]), whole()) as (server, store):
        assert store.kernels.content(DIGEST) == (DATA, ())
        assert [request.headers.get("range") for request in server.requests] == [None, None]


def test_wrong_bytes_twice_are_an_error() -> None:
    with broken(whole(DATA[::-1])) as (server, store):
        with pytest.raises(StoreCorruptError, match=f"{DIGEST[:12]}.*twice"):
            store.kernels.content(DIGEST)
        assert len(server.requests) == 2


def test_a_wrong_part_is_fetched_anew_as_a_whole() -> None:
    with broken(whole(cut=1000), part(1000, data=DATA[::-1]), whole()) as (server, store):
        assert store.kernels.content(DIGEST) == (DATA, ())
        assert [request.headers.get("range") for request in server.requests] == [None, "bytes=1000-", None]


def test_a_page_in_place_of_a_kernel() -> None:
    with broken(answer(200, b"<html>log in", "text/html")) as (server, store):
        with pytest.raises(StoreCorruptError, match="what stands between"):
            store.kernels.content(DIGEST)
        assert len(server.requests) == 2


def test_more_bytes_than_are_allowed() -> None:
    with broken(answer(200, b"", BINARY, length=2**40, ETag=ETAG)) as (server, store):
        with pytest.raises(StoreCorruptError, match=f"announces {2**40} bytes"):
            store.kernels.content(DIGEST)
        assert len(server.requests) == 1


def test_a_kernel_without_an_end() -> None:
    with broken(endless(ETag=ETAG), timeout=30) as (server, store):
        with pytest.raises(StoreCorruptError, match="sends more than"):
            store.kernels.content(DIGEST)
        assert len(server.requests) == 1


def test_more_bytes_than_announced_are_not_read() -> None:
    longer = answer(200, DATA + b"HTTP/1.1 200 OK\r\n\r\n", BINARY, length=len(DATA), ETag=ETAG)
    with broken(longer, GOOD) as (_, store):
        assert store.kernels.content(DIGEST) == (DATA, ())
        assert ask(store) == 2.5, "what was left over is not taken for the next answer"


@pytest.mark.parametrize("header", ["not base64!", "e30=", "WzFd", "bnVsbA==", "////"])
def test_a_signature_that_is_none(header: str) -> None:
    with broken(whole(Esper_Signature=header)) as (_, store), pytest.raises(UrzaProtocolError, match="signature"):
        store.kernels.content(DIGEST)


def test_an_attachment_is_checked_against_its_tag() -> None:
    with broken(whole(DATA[::-1]), whole()) as (server, store):
        assert store.kernels.attachment(DIGEST, "a-target") == DATA
        assert len(server.requests) == 2
    with broken(whole(etag="")) as (server, store), pytest.raises(StoreCorruptError):
        store.kernels.attachment(DIGEST, "a-target")


def test_an_attachment_that_is_known_is_not_sent_again() -> None:
    with broken(answer(304, b"", None, ETag=ETAG)) as (server, store):
        assert store.kernels.attachment(DIGEST, "a-target", known=DATA) is DATA
        assert [request.headers["if-none-match"] for request in server.requests] == [ETAG]


@pytest.mark.parametrize(
    ("body", "kind"), [(b"<html>Please log in</html>", "text/html"), (DOCUMENT[:-1], "application/json"), (b"", None)]
)
def test_another_document_is_asked_for_once_more_and_then_refused(body: bytes, kind: str | None) -> None:
    with broken(answer(200, body, kind, ETag=TAG)) as (server, store):
        with pytest.raises(StoreCorruptError, match="twice"):
            store.blueprints.document(blueprint(1).id)
        assert len(server.requests) == 2


def test_a_document_that_breaks_off_goes_on() -> None:
    rest = answer(206, DOCUMENT[50:], ETag=TAG, Content_Range=f"bytes 50-{len(DOCUMENT) - 1}/{len(DOCUMENT)}")
    with broken(answer(200, DOCUMENT, ETag=TAG, cut=50), rest) as (server, store):
        assert store.blueprints.document(blueprint(1).id) == DOCUMENT
        assert [request.headers.get("range") for request in server.requests] == [None, "bytes=50-"]
