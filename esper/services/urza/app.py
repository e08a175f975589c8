"""Urza's HTTP interface: a FastAPI application over a store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from esper.configs import EsperConfig
from esper.services.urza.http.auth import Access, check_exposure
from esper.services.urza.http.metrics import Metrics
from esper.services.urza.http.openapi import document_of
from esper.services.urza.http.problem_responses import install_problem_responses
from esper.services.urza.http.rate_limit import RateLimit
from esper.services.urza.http.request_limits import BodyLimit, Deadline, Gate
from esper.services.urza.http.request_log import RequestLog
from esper.services.urza.http.store_threads import StoreThreads
from esper.services.urza.routes import blueprints, claims, health, kernels, uploads
from esper.services.urza.routes.services import Services
from esper.services.urza.storage.store import UrzaStore
from esper.version import __version__

__all__ = ["create_app"]

_DESCRIPTION = "The store of Esper's blueprints and kernels. Errors are problem documents (RFC 9457)."


def create_app(store: UrzaStore, config: EsperConfig, *, on_submit: Callable[[str], None] | None = None) -> FastAPI:
    """The application that serves `store` as the section `urza` of `config` says.

    `on_submit` is called with the id of each blueprint that was not there before, on the event loop: it must return at
    once and not raise, as `esper.services.tezzeret.queue.Dispatch.submitted` does. The store stays the caller's to
    close. Raises :class:`~esper.configs.ConfigError` if there are no tokens although strangers could ask.
    """
    check_exposure(config)
    urza = config.urza

    app = _App(
        title="Urza",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,  # its pages fetch scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    install_problem_responses(app)
    metrics = Metrics(store)
    app.state.services = Services(store, StoreThreads(), metrics, on_submit)
    for each in (health, blueprints, kernels, claims, uploads):
        app.include_router(each.router)
    # the last one is the outermost
    app.add_middleware(BodyLimit, upload_bytes=int(urza.max_body_mb * 2**20))
    app.add_middleware(Gate, access=Access(urza.tokens), rate=RateLimit(urza.rate_per_second, urza.rate_burst))
    app.add_middleware(Deadline, seconds=urza.request_timeout)
    app.add_middleware(RequestLog, metrics=metrics)
    return app


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = document_of(self)
        return self.openapi_schema
