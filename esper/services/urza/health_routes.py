"""Whether Urza runs, and how it fares: `/health` and `/metrics`."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST

from esper.services.errors import StoreError
from esper.services.problems import problem_of
from esper.services.urza.metrics import Metrics
from esper.services.urza.request_documents import Health
from esper.services.urza.store import UrzaStore
from esper.services.urza.store_threads import StoreThreads

__all__ = ["add_health_routes"]

_PATIENCE = 2.0
"""Seconds that the database has to answer."""


def add_health_routes(app: FastAPI, store: UrzaStore, threads: StoreThreads, metrics: Metrics) -> None:
    """Health for load balancers and supervisors, metrics for Prometheus."""

    async def trouble() -> str:
        try:
            async with asyncio.timeout(_PATIENCE):
                await threads.read(store.ping)
        except TimeoutError:
            return f"the database did not answer within {_PATIENCE:g} s"
        except StoreError as error:
            return problem_of(error).title
        return ""

    def health(detail: str, response: Response) -> Health:
        response.status_code = 503 if detail else 200
        response.headers["Cache-Control"] = "no-store"
        return Health(
            status="unavailable" if detail else "ok",
            live=True,
            ready=not detail,
            schema_version=store.schema_version,
            detail=detail,
        )

    unavailable = {503: {"model": Health, "description": "The database does not answer"}}

    @app.get("/health", tags=["health"], responses=unavailable)  # type: ignore[arg-type]  # FastAPI's dict is invariant
    async def get_health(response: Response) -> Health:
        """Live and ready."""
        return health(await trouble(), response)

    @app.get("/health/ready", tags=["health"], responses=unavailable)  # type: ignore[arg-type]  # as above
    async def get_ready(response: Response) -> Health:
        """Whether requests can be served: send them elsewhere while this is 503."""
        return health(await trouble(), response)

    @app.get("/health/live", tags=["health"])
    async def get_live(response: Response) -> Health:
        """Whether the process answers at all: start it anew when this fails. Says nothing about the database."""
        return health("", response)

    @app.get("/metrics", tags=["health"], response_class=Response)
    async def get_metrics() -> Response:
        """For Prometheus, in its text format."""
        return Response(await threads.read(metrics.exposition), media_type=CONTENT_TYPE_LATEST)
