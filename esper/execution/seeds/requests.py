"""What has been asked of a model's seeds: which request is the latest, and which loads are under way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.execution.lifecycle import LifecycleError, SeedLifecycleState
from esper.execution.plans.alpha import AlphaSchedule
from esper.execution.plans.runtime import Runtime

if TYPE_CHECKING:
    from esper.execution.kasmina_layer import KasminaLayer

__all__ = ["LoadRequest", "SeedRequest", "SeedRequests"]

_Key = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class SeedRequest:
    """What is asked of one seed. `ticket` tells whether it is still the latest request for it."""

    layer: KasminaLayer
    seed: int
    ticket: int
    staged: Future[bool]

    @property
    def key(self) -> tuple[int, int]:
        return self.layer.site, self.seed

    def answer(self, staged: bool) -> None:
        """Say whether it is staged, unless that was said before."""
        with contextlib.suppress(InvalidStateError):
            self.staged.set_result(staged)


@dataclass(frozen=True, slots=True, eq=False)
class LoadRequest(SeedRequest):
    """A kernel, by `reference`, and how it is to be attached; `first_alpha` is `alpha`'s first value, checked."""

    reference: str
    alpha: float | AlphaSchedule
    first_alpha: float
    trainable: bool
    isolate: bool


class SeedRequests:
    """The requests of one model. Everything here is read and changed under the runtime's lock, :meth:`wanted` apart."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._tickets: dict[_Key, int] = {}  # the number of each seed's latest request
        self._loads: dict[_Key, LoadRequest] = {}  # without an end yet; who takes one out answers its future
        self._waiting: tuple[frozenset[_Key], Future[None]] | None = None  # seeds that something is prepared for
        self.fossilizing: set[_Key] = set()
        """Seeds whose fossil is staged and not yet committed."""

    def begin(self, load: LoadRequest) -> None:
        """`load` is under way."""
        self._loads[load.key] = load

    def end(self, request: SeedRequest) -> bool:
        """Whether `request` was a load under way, which it is no more."""
        under_way = self._loads.get(request.key) is request
        if under_way:
            del self._loads[request.key]
        return under_way

    def under_way(self, layer: KasminaLayer, seed: int) -> LoadRequest | None:
        """The load of this seed that is under way."""
        return self._loads.get((layer.site, seed))

    def is_loading(self, layer: KasminaLayer, seed: int) -> bool:
        """Whether a load of this seed is under way."""
        return (layer.site, seed) in self._loads

    def take_ticket(self, layer: KasminaLayer, seed: int) -> int:
        """Something else is asked of a seed: its number. Who prepares for what was asked before, learns of it."""
        key = (layer.site, seed)
        self._tickets[key] = self._tickets.get(key, 0) + 1
        if self._waiting is not None and key in self._waiting[0] and not self._waiting[1].done():
            self._waiting[1].set_result(None)
        return self._tickets[key]

    def latest(self, layer: KasminaLayer, seed: int) -> SeedRequest:
        """A request with the seed's latest ticket."""
        return SeedRequest(layer, seed, self._tickets[layer.site, seed], Future())

    def wanted(self, request: SeedRequest) -> bool:
        """Whether nothing else has been asked of the seed since."""
        return self._tickets[request.key] == request.ticket

    def call_off(self, layer: KasminaLayer, seed: int) -> tuple[LoadRequest | None, int]:
        """End whatever was asked of a seed before: the load that was under way, and a ticket for what comes instead.

        Once the lock is let go, the load's future has to be answered.
        """
        return self._loads.pop((layer.site, seed), None), self.take_ticket(layer, seed)

    def refuse_fossil(self, layer: KasminaLayer, seed: int) -> None:
        """Raise `LifecycleError` for a seed that is a fossil or becomes one, and `IndexError` for one that is none."""
        if layer.state.lifecycle(seed) is SeedLifecycleState.FOSSILIZED or (layer.site, seed) in self.fossilizing:
            raise LifecycleError(f"seed {seed} of layer {layer.layer_name!r} is FOSSILIZED, which is for good")

    @contextlib.contextmanager
    def called_off(self, requests: Sequence[SeedRequest]) -> Iterator[Future[None]]:
        """A future that is done as soon as a later request is made for one of the seeds. Takes the lock itself."""
        future: Future[None] = Future()
        with self._runtime.lock:
            self._waiting = frozenset(request.key for request in requests), future
            if not all(self.wanted(request) for request in requests):
                future.set_result(None)
        try:
            yield future
        finally:
            with self._runtime.lock:
                self._waiting = None
