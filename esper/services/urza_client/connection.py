"""A connection to one Urza, made when something is asked, and the documents that come over it, checked."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from esper.configs import UrzaConfig
from esper.forking import reset_after_fork
from esper.services.errors import UrzaProtocolError, UrzaUnavailableError
from esper.services.urza_client.transport import Answer, UrzaTransport

__all__ = ["UrzaConnection"]

_Document = TypeVar("_Document", bound=BaseModel)


class UrzaConnection:
    """The Urza at `settings.url`. For any thread and for forked children; closed, it connects anew when asked."""

    def __init__(self, settings: UrzaConfig) -> None:
        self._settings = settings
        self.after_fork()
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Leave the connections to the parent; see `esper.forking`."""
        self._lock = threading.Lock()
        self._transport: UrzaTransport | None = None

    def close(self) -> None:
        """Close the connections. What others ask just then fails."""
        with self._lock:
            transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    def transport(self) -> UrzaTransport:
        """What is connected. Raises ``UrzaUnavailableError`` if nothing may be, or to a URL that cannot be one."""
        if self._settings.client.offline:
            raise UrzaUnavailableError("urza.client.offline is set: only kernels downloaded before can be used")
        with self._lock:
            if self._transport is None:
                self._transport = UrzaTransport(self._settings)
            return self._transport

    def request(self, method: str, path: str, **options: Any) -> Answer:
        """See :meth:`UrzaTransport.request`."""
        return self.transport().request(method, path, **options)

    def download(self, path: str, digest: str | None, most: int, headers: Mapping[str, str] | None = None) -> Answer:
        """See :meth:`UrzaTransport.download`."""
        return self.transport().download(path, digest, most, headers)

    def ask(self, kind: type[_Document], method: str, path: str, **options: Any) -> _Document:
        """The document that is the answer to :meth:`request`. Raises ``UrzaProtocolError`` if it is none."""
        return self.read(kind, self.request(method, path, **options))

    def read(self, kind: type[_Document], answer: Answer) -> _Document:
        """The document in `answer`."""
        return self._validated(kind, self._json(answer))

    def page(self, kind: type[_Document], answer: Answer) -> tuple[list[_Document], str | None]:
        """The documents in `answer`, and where the next page begins."""
        page = self._json(answer)
        items, cursor = page.get("items"), page.get("next_cursor")
        if not isinstance(items, list):
            raise self.not_understood("a page without items")
        if cursor is not None and not (isinstance(cursor, str) and items):
            raise self.not_understood("a page after which there is no next one, and which has one")
        return [self._validated(kind, item) for item in items], cursor

    def not_understood(self, what: object) -> UrzaProtocolError:
        """The error for an answer of status 200 that is not what was asked for."""
        return UrzaProtocolError(f"{self._settings.url} sent {what}; is it an Urza, and of this version of Esper?")

    def _json(self, answer: Answer) -> Any:
        kind = answer.headers.get("content-type", "").partition(";")[0].strip()
        if kind != "application/json":
            raise self.not_understood(kind or "something without a content type")
        try:
            document = json.loads(answer.body)
        except (ValueError, RecursionError) as cause:
            raise self.not_understood("what is not JSON, or nested too deeply") from cause
        if not isinstance(document, dict):
            raise self.not_understood(f"a {type(document).__name__}")
        return document

    def _validated(self, kind: type[_Document], document: object) -> _Document:
        try:
            return kind.model_validate(document)
        except ValidationError as cause:
            raise self.not_understood(f"a {kind.__name__} with {cause.error_count()} errors") from cause
