"""Urza's HTTP interface: a FastAPI application over a store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from esper.configs import EsperConfig
from esper.services.urza.auth import Access, check_exposure
from esper.services.urza.health_routes import add_health_routes
from esper.services.urza.metrics import Metrics
from esper.services.urza.openapi import document_of
from esper.services.urza.problem_responses import install_problem_responses
from esper.services.urza.public_routes import add_blueprint_routes, add_kernel_routes
from esper.services.urza.rate_limit import RateLimit
from esper.services.urza.request_limits import BodyLimit, Deadline, Gate
from esper.services.urza.request_log import RequestLog
from esper.services.urza.store import UrzaStore
from esper.services.urza.store_threads import StoreThreads
from esper.services.urza.worker_routes import add_claim_routes, add_upload_routes
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
    threads = StoreThreads()
    add_health_routes(app, store, threads, metrics)
    add_blueprint_routes(app, store, threads, on_submit)
    add_kernel_routes(app, store, threads)
    add_claim_routes(app, store, threads, metrics)
    add_upload_routes(app, store, threads)
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
