"""Metrics of Urza for Prometheus."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from esper.services.errors import StoreError
from esper.services.urza.storage.store import UrzaStore

__all__ = ["Metrics"]

_log = logging.getLogger(__name__)

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})


class Metrics:
    """Counts requests and claims, and asks the store what it holds when it is read. One for each application."""

    def __init__(self, store: UrzaStore) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "esper_urza_requests",
            "Requests that were answered; status 499 is a client that went away first.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "esper_urza_request_seconds",
            "Seconds from a request's head to the end of its answer.",
            ("method", "route"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._claims = Counter(
            "esper_urza_claims",
            "What workers were told who asked for a blueprint, or showed a claim.",
            ("outcome",),
            registry=self._registry,
        )
        for outcome in ("claimed", "nothing", "lost"):
            self._claims.labels(outcome)
        self._registry.register(_StoreCollector(store))

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """`route` is a template, not a path: there are few of them."""
        method = method if method in _METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def claim(self, outcome: str) -> None:
        """`claimed`, `nothing` or `lost`."""
        self._claims.labels(outcome).inc()

    def exposition(self) -> bytes:
        """All of it in Prometheus's text format. Blocks."""
        return generate_latest(self._registry)


class _StoreCollector(Collector):
    def __init__(self, store: UrzaStore) -> None:
        self._store = store

    def describe(self) -> Iterator[GaugeMetricFamily]:
        yield from ()  # so that registering asks the store nothing

    def collect(self) -> Iterator[GaugeMetricFamily]:
        try:
            stats = self._store.stats()
        except StoreError as error:
            _log.warning("the store's metrics cannot be read: %s", error)
            yield GaugeMetricFamily("esper_urza_store_up", "Whether the database answers.", 0)
            return
        yield GaugeMetricFamily("esper_urza_store_up", "Whether the database answers.", 1)
        blueprints = GaugeMetricFamily("esper_urza_blueprints", "Blueprints by status.", labels=("status",))
        for status, count in stats.blueprints.items():
            blueprints.add_metric((status.value,), count)
        yield blueprints
        yield GaugeMetricFamily("esper_urza_kernels", "Kernels.", stats.kernels)
        yield GaugeMetricFamily("esper_urza_attachments", "Attachments.", stats.attachments)
        stored = GaugeMetricFamily("esper_urza_stored_bytes", "Bytes of artifacts and attachments.", labels=("kind",))
        stored.add_metric(("artifact",), stats.artifact_bytes)
        stored.add_metric(("attachment",), stats.attachment_bytes)
        yield stored
