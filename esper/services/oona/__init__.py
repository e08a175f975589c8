"""Oona carries messages: one interface, and a transport inside one process. `redis_bus` has the one through Redis."""

from esper.services.oona.bus import Bus, BusSubscription
from esper.services.oona.errors import (
    BusAddressError,
    BusAuthenticationError,
    BusError,
    BusRefusedError,
    BusUnavailableError,
)
from esper.services.oona.memory import InMemoryBus

__all__ = [
    "Bus",
    "BusAddressError",
    "BusAuthenticationError",
    "BusError",
    "BusRefusedError",
    "BusSubscription",
    "BusUnavailableError",
    "InMemoryBus",
]
