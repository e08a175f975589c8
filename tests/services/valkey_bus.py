"""What the tests of Oona over a real server share: messages, and buses that do not wait for long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from esper.configs import OonaConfig
from esper.contracts.messages import BlueprintSubmitted, OonaMessage, TopicNames
from esper.services.oona import BusSubscription
from esper.services.oona.redis_bus import RedisBus
from tests.services.valkey_server import ValkeyProcess

__all__ = [
    "DEAD",
    "KEY",
    "PATIENT",
    "SUBMITTED",
    "MakeBus",
    "bus",
    "ends",
    "eventually",
    "make_bus",
    "message",
    "numbers",
    "received",
    "submitted",
]

SUBMITTED = TopicNames.COMPILATION_BLUEPRINT_SUBMITTED
KEY = f"esper:oona:{SUBMITTED}"
DEAD = "esper:oona:dead"
PATIENT = {"connect_timeout": 1.0, "socket_timeout": 1.0}

MakeBus = Callable[..., RedisBus]


def message(number: int, topic: str = SUBMITTED) -> OonaMessage:
    """A message that carries a number."""
    return OonaMessage(sender_id="a test", topic=topic, payload={"n": number})


def submitted(number: int) -> BlueprintSubmitted:
    """A payload that carries a number."""
    return BlueprintSubmitted(blueprint_id=str(number))


def numbers(messages: Iterable[OonaMessage]) -> list[object]:
    """The numbers that messages carry."""
    return [each.payload["n"] for each in messages]


def received(subscription: BusSubscription, count: int, seconds: float = 20) -> list[object]:
    """The numbers of the next `count` messages, and of those that came with them; of fewer when the time is over."""
    messages: list[OonaMessage] = []
    deadline = time.monotonic() + seconds
    while len(messages) < count and time.monotonic() < deadline:
        messages += subscription.receive(timeout=0.5)
    return numbers(messages)


def ends(action: Callable[[], object]) -> None:
    """Fails if `action` hangs."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it hangs"


def eventually(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    """Fails with `what` unless `condition` becomes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.fixture
def make_bus(valkey_server: ValkeyProcess) -> Iterator[MakeBus]:
    """Makes a bus; keywords are settings of Oona. Closed at the end of the test."""
    made: list[RedisBus] = []

    def make(**oona: Any) -> RedisBus:
        made.append(RedisBus(valkey_server.config(**PATIENT), OonaConfig(**oona)))
        return made[-1]

    yield make
    for bus in made:
        bus.close()


@pytest.fixture
def bus(make_bus: MakeBus) -> RedisBus:
    return make_bus()
