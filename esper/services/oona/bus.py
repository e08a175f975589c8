"""The bus protocol: what a transport for messages must do. Called on threads of its own, never on one that trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from esper.contracts.messages import OonaMessage

__all__ = ["MAX_MESSAGE_BYTES", "Bus", "BusSubscription"]

MAX_MESSAGE_BYTES = 2**20
"""Of a message as JSON. Writing and reading a larger one would hold up every thread of a process that trains."""


class BusSubscription(Protocol):
    """Messages of some topics, from the moment of subscription on, each once: those of an `event_id` seen before are
    left out."""

    def receive(self, timeout: float | None = None, limit: int = 512) -> Sequence[OonaMessage]:
        """The next messages, at least one and at most `limit`; waits for them up to `timeout` seconds.

        With a server that hangs it may take longer, by the time that an answer may take. Those of one topic come in the
        order of sending. Empty when the time is over or the subscription was closed. Those received before count as
        handled, also by a call after closing.
        """
        ...

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called, here or by closing the bus."""
        ...

    @property
    def dropped(self) -> int:
        """Messages that this subscription never saw, because it, or its group, fell too far behind."""
        ...

    def close(self) -> None:
        """Stop receiving; wakes whoever waits in :meth:`receive`."""
        ...


class Bus(Protocol):
    """A transport."""

    def send(self, messages: Sequence[OonaMessage]) -> None:
        """Hand over messages, in order. May block for a few seconds.

        Raises :class:`~esper.services.oona.BusUnavailableError` with those that have to be sent again, and
        :class:`~esper.services.oona.BusRefusedError` with those that cannot be sent.
        """
        ...

    def subscribe(self, topics: Iterable[str], *, group: str | None = None) -> BusSubscription:
        """Receive `topics`. Members of one `group`, which must name the same topics, share each message out."""
        ...

    def close(self) -> None:
        """Close all subscriptions."""
        ...
