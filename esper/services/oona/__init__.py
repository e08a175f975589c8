"""Oona carries messages: one interface, and a transport for it inside one process."""

from esper.services.oona.bus import Bus, BusSubscription
from esper.services.oona.memory import InMemoryBus

__all__ = ["Bus", "BusSubscription", "InMemoryBus"]
