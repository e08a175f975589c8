"""Documents of blueprints, which workers compile: what comes over HTTP is the blueprint, or an error."""

from __future__ import annotations

import pytest

from esper.services.errors import StoreCorruptError
from tests.services.broken_server import answer, broken
from tests.services.shelf import blueprint

DOCUMENT = blueprint(1).to_json().encode()
TAG = f'"{blueprint(1).id}"'


@pytest.mark.parametrize(
    ("body", "kind"), [(b"<html>Please log in</html>", "text/html"), (DOCUMENT[:-1], "application/json"), (b"", None)]
)
def test_another_document_is_asked_for_once_more_and_then_refused(body: bytes, kind: str | None) -> None:
    with broken(answer(200, body, kind, ETag=TAG)) as (server, store):
        with pytest.raises(StoreCorruptError, match="twice"):
            store.blueprints.document(blueprint(1).id)
        assert len(server.requests) == 2


def test_one_that_breaks_off_goes_on() -> None:
    rest = answer(206, DOCUMENT[50:], ETag=TAG, Content_Range=f"bytes 50-{len(DOCUMENT) - 1}/{len(DOCUMENT)}")
    with broken(answer(200, DOCUMENT, ETag=TAG, cut=50), rest) as (server, store):
        assert store.blueprints.document(blueprint(1).id) == DOCUMENT
        assert [request.headers.get("range") for request in server.requests] == [None, "bytes=50-"]
