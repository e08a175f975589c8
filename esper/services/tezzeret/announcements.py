"""The remote compiler: what this process hears of workers that run elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from esper.contracts.messages import TopicNames
from esper.errors import EsperError
from esper.services.oona_client import OonaClient, Subscription
from esper.services.tezzeret.watchers import Watchers

__all__ = ["Announcements", "Compiler"]


class Compiler(Protocol):
    """Whoever compiles for a platform; `esper.services.tezzeret.service.TezzeretService` in an embedded one."""

    @property
    def failure(self) -> EsperError | None: ...

    def ask(self) -> None: ...

    def watched(self, changed: Callable[[], None]) -> AbstractContextManager[None]: ...

    def stop(self) -> None: ...


class Announcements:
    """Listens on the bus for blueprints that were finished, from the first time that somebody waits for one."""

    failure: EsperError | None = None
    """What keeps a fleet from working is in its own log."""

    def __init__(self, oona: OonaClient) -> None:
        self._oona = oona
        self._lock = threading.Lock()
        self._watchers = Watchers()
        self._subscription: Subscription | None = None

    def ask(self) -> None:
        """Nothing: Urza tells its workers of every submission."""

    @contextmanager
    def watched(self, changed: Callable[[], None]) -> Iterator[None]:
        """Have `changed` called, on a thread, whenever a blueprint was finished somewhere."""
        with self._lock:
            if self._subscription is None or self._subscription.closed:
                self._subscription = self._oona.subscribe(
                    TopicNames.VALIDATION_KERNEL_CHARACTERIZED, lambda _message: self._watchers.tell()
                )
        with self._watchers.added(changed):
            yield

    def stop(self) -> None:
        """Stop listening, and wake whoever waits."""
        with self._lock:
            subscription, self._subscription = self._subscription, None
        if subscription is not None:
            subscription.close()
        self._watchers.tell()
