"""The parts of Urza that its routes work with, as a FastAPI dependency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from esper.services.urza.http.metrics import Metrics
from esper.services.urza.http.store_threads import StoreThreads
from esper.services.urza.storage.store import UrzaStore

__all__ = ["Services", "Urza"]


@dataclass(frozen=True, slots=True)
class Services:
    """One for each application, as `app.state.services`."""

    store: UrzaStore
    threads: StoreThreads
    metrics: Metrics
    on_submit: Callable[[str], None] | None
    """Called with the id of each blueprint that is to be compiled."""


async def _services(request: Request) -> Services:  # FastAPI calls what is not async on a thread
    services: Services = request.app.state.services
    return services


Urza = Annotated[Services, Depends(_services)]
