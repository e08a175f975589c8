"""Messages that are too large: refused and counted, by who sends them and by who receives them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from pydantic import BaseModel

from esper.contracts.messages import OonaMessage
from esper.services.oona.bus import MAX_MESSAGE_BYTES
from esper.services.oona.redis_bus import RedisBus
from esper.services.oona_client import OonaClient
from tests.services.valkey_bus import DEAD, SUBMITTED, bus, make_bus, message, received
from tests.services.valkey_server import ValkeyProcess, valkey_server

__all__ = ["bus", "make_bus", "valkey_server"]  # fixtures


class Anything(BaseModel):
    content: object


@pytest.mark.parametrize(
    "content",
    [
        "x" * 30_000_000,
        ["y" * 1000] * 3000,
        list(range(2_000_000)),
        [0.1234567890123456] * 100_000,
        {"a": {"b": "\x00" * 300_000}},
    ],
    ids=["text", "texts", "numbers", "floats", "escaped"],
)
def test_a_large_message_is_not_sent_and_what_follows_is(content: object, caplog: pytest.LogCaptureFixture) -> None:
    with_numbers = [Anything(content={"n": number}) for number in range(2)]
    client = OonaClient()
    try:
        subscription = client.bus.subscribe([SUBMITTED])
        with caplog.at_level(logging.ERROR):
            for each in (with_numbers[0], Anything(content=content), with_numbers[1]):
                client.publish(SUBMITTED, each)
            assert client.flush(60)
        stats = client.stats()
        assert (stats.published, stats.sent, stats.failed, stats.queued) == (3, 2, 1, 0)
        assert f"has more than {MAX_MESSAGE_BYTES} bytes and is not sent" in caplog.text
        assert [each.payload["content"] for each in subscription.receive(10)] == [{"n": 0}, {"n": 1}]
    finally:
        client.close()


def test_the_largest_message_arrives() -> None:
    client = OonaClient()
    try:
        subscription = client.bus.subscribe([SUBMITTED])
        client.publish(SUBMITTED, Anything(content="x" * (MAX_MESSAGE_BYTES - 1000)))
        (got,) = subscription.receive(30)
        assert len(str(got.payload["content"])) == MAX_MESSAGE_BYTES - 1000
    finally:
        client.close()


def test_who_receives_one_all_the_same_does_not_read_it(bus: RedisBus, valkey_server: ValkeyProcess) -> None:
    member: Any = bus.subscribe([SUBMITTED], group="g")
    live: Any = bus.subscribe([SUBMITTED])
    large = OonaMessage(sender_id="another program", topic=SUBMITTED, payload={"x": "y" * 4_000_000})
    bus.send([message(1), large, message(2)])
    assert received(member, 2) == received(live, 2) == [1, 2]
    assert (member.dead_letters, member.unreadable, live.unreadable) == (1, 1, 1)
    with valkey_server.client() as client:
        ((_, letter),) = client.xrange(DEAD)
    assert "bytes, more than" in letter["reason"]
    assert len(letter["message"]) == MAX_MESSAGE_BYTES
