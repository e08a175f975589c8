"""`/health` and `/metrics`: for load balancers, supervisors and Prometheus."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from esper.services.errors import StoreError
from esper.services.problems import problem_of
from esper.services.urza.http.request_documents import Health
from esper.services.urza.routes.services import Services, Urza

__all__ = ["router"]

_PATIENCE = 2.0
"""Seconds that the database has to answer."""
_UNAVAILABLE: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "The database does not answer"}}

router = APIRouter(tags=["health"])


@router.get("/health", responses=_UNAVAILABLE)
async def get_health(response: Response, urza: Urza) -> Health:
    """Live and ready."""
    return _health(urza, await _trouble(urza), response)


@router.get("/health/ready", responses=_UNAVAILABLE)
async def get_ready(response: Response, urza: Urza) -> Health:
    """Whether requests can be served: send them elsewhere while this is 503."""
    return _health(urza, await _trouble(urza), response)


@router.get("/health/live")
async def get_live(response: Response, urza: Urza) -> Health:
    """Whether the process answers at all: start it anew when this fails. Says nothing about the database."""
    return _health(urza, "", response)


@router.get("/metrics", response_class=Response)
async def get_metrics(urza: Urza) -> Response:
    """For Prometheus, in its text format."""
    return Response(await urza.threads.read(urza.metrics.exposition), media_type=CONTENT_TYPE_LATEST)


async def _trouble(urza: Services) -> str:
    try:
        async with asyncio.timeout(_PATIENCE):
            await urza.threads.read(urza.store.ping)
    except TimeoutError:
        return f"the database did not answer within {_PATIENCE:g} s"
    except StoreError as error:
        return problem_of(error).title
    return ""


def _health(urza: Services, detail: str, response: Response) -> Health:
    response.status_code = 503 if detail else 200
    response.headers["Cache-Control"] = "no-store"
    return Health(
        status="unavailable" if detail else "ok",
        live=True,
        ready=not detail,
        schema_version=urza.store.schema_version,
        detail=detail,
    )
