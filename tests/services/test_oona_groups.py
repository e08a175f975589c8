"""Groups over a real server: consumers that die, messages that nobody can handle, and what counts as handled."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from typing import Any

import pytest

from esper.contracts.messages import OonaMessage
from esper.services.oona.redis_bus import RedisBus
from esper.services.oona_client import OonaClient
from tests.services.programs import Program
from tests.services.valkey_bus import (
    DEAD,
    KEY,
    PATIENT,
    SUBMITTED,
    MakeBus,
    bus,
    eventually,
    make_bus,
    message,
    numbers,
    received,
)
from tests.services.valkey_server import BreakableLink, ValkeyProcess, valkey_server

__all__ = ["bus", "make_bus", "valkey_server"]  # fixtures


_CONSUMER = """
import sys
from esper.configs import OonaConfig, RedisConfig
from esper.services.oona.redis_bus import RedisBus

bus = RedisBus(RedisConfig(url=sys.argv[1]), OonaConfig(claim_idle_seconds=0.5))
member = bus.subscribe(["compilation.blueprint.submitted"], group="g")
print("ready", flush=True)
(message,) = member.receive(timeout=30, limit=1)
print(message.payload["n"], flush=True)
sys.stdin.read()
"""


def test_what_a_killed_consumer_took_goes_to_another_one(make_bus: MakeBus, valkey_server: ValkeyProcess) -> None:
    bus = make_bus(claim_idle_seconds=0.5)
    consumer = Program(_CONSUMER, valkey_server.url)
    try:
        assert consumer.read_line() == "ready"
        bus.send([message(7)])
        assert consumer.read_line() == "7"
    finally:
        os.kill(consumer.process.pid, signal.SIGKILL)
        consumer.process.communicate()
    assert received(bus.subscribe([SUBMITTED], group="g"), 1) == [7]


def test_what_was_received_counts_as_handled_at_the_next_receive_and_at_closing(
    bus: RedisBus, valkey_server: ValkeyProcess
) -> None:
    member = bus.subscribe([SUBMITTED], group="g")
    bus.send([message(0), message(1)])
    with valkey_server.client() as client:
        assert numbers(member.receive(timeout=5, limit=1)) == [0]
        assert client.xpending(KEY, "g")["pending"] == 1
        assert numbers(member.receive(timeout=5, limit=1)) == [1]
        assert client.xpending(KEY, "g")["pending"] == 1
        member.close()
        assert client.xpending(KEY, "g")["pending"] == 0


def test_a_client_that_closes_has_acknowledged_what_it_handled(bus: RedisBus, valkey_server: ValkeyProcess) -> None:
    oona, inside, go_on = OonaClient(bus), threading.Event(), threading.Event()

    def handle(_: OonaMessage) -> None:
        inside.set()
        assert go_on.wait(10)

    subscription = oona.subscribe(SUBMITTED, handle, group="g")
    bus.send([message(0), message(1)])
    assert inside.wait(10)
    threading.Timer(0.3, go_on.set).start()
    subscription.close(timeout=10)
    with valkey_server.client() as client:
        assert client.xpending(KEY, "g")["pending"] == 0
    assert received(bus.subscribe([SUBMITTED], group="g"), 1) == [1]


def test_what_is_handled_while_the_connection_breaks_is_not_handled_again(
    make_bus: MakeBus, valkey_server: ValkeyProcess
) -> None:
    member = make_bus(claim_idle_seconds=0.3).subscribe([SUBMITTED], group="g")
    make_bus().send([message(n) for n in range(3)])
    assert numbers(member.receive(timeout=5, limit=2)) == [0, 1]
    with valkey_server.client() as client:
        client.client_kill_filter(_type="normal", skipme=True)
        time.sleep(0.4)
        assert received(member, 2, seconds=3) == [2]
        assert member.receive(timeout=0.1) == ()
        assert client.xpending(KEY, "g")["pending"] == 0


def test_what_was_handed_out_over_a_connection_that_broke_is_handed_out_again_to_the_same_consumer(
    valkey_server: ValkeyProcess,
) -> None:
    with BreakableLink(valkey_server.port) as link:
        bus = RedisBus(valkey_server.config(url=f"redis://127.0.0.1:{link.port}", **PATIENT))
        member, got = bus.subscribe([SUBMITTED], group="g"), queue.Queue[object]()
        thread = threading.Thread(target=lambda: got.put(numbers(member.receive())), daemon=True)
        thread.start()
        with valkey_server.client() as client:
            eventually(lambda: client.info("clients")["blocked_clients"] == 1, "nobody waits for a message")
            link.break_at_the_next_answer()
            RedisBus(valkey_server.config()).send([message(0)])
            assert got.get(timeout=20) == [0]
            assert client.xpending(KEY, "g")["pending"] == 1
        thread.join(10)
        bus.close()


def test_a_message_that_every_consumer_dies_of_goes_to_the_dead_letters(
    make_bus: MakeBus, valkey_server: ValkeyProcess, caplog: pytest.LogCaptureFixture
) -> None:
    bus, sent = make_bus(claim_idle_seconds=0.1, max_deliveries=2), message(13)
    bus.subscribe([SUBMITTED], group="g").close()
    bus.send([sent])
    for _ in range(2):  # they take it, and are never heard of again
        time.sleep(0.15)
        assert received(bus.subscribe([SUBMITTED], group="g"), 1) == [13]
    time.sleep(0.15)
    last: Any = bus.subscribe([SUBMITTED], group="g")
    assert received(last, 1, seconds=1) == []
    assert last.dead_letters == 1
    with valkey_server.client() as client:
        ((_, letter),) = client.xrange(DEAD)
        assert client.xpending(KEY, "g")["pending"] == 0
    assert OonaMessage.model_validate_json(letter["message"]) == sent
    assert letter["reason"] == "handed out 2 times, and nobody finished with it"
    assert (letter["topic"], letter["group"], letter["deliveries"]) == (SUBMITTED, "g", "2")
    assert "dead letters" in caplog.text


@pytest.mark.parametrize("fields", [{"message": "{not json"}, {"message": '{"topic": "t"}'}, {"other": "1"}])
def test_what_is_no_message_goes_to_the_dead_letters_and_the_rest_arrives(
    bus: RedisBus, valkey_server: ValkeyProcess, fields: dict[str, str]
) -> None:
    member: Any = bus.subscribe([SUBMITTED], group="g")
    live: Any = bus.subscribe([SUBMITTED])
    with valkey_server.client() as client:
        client.xadd(KEY, fields)
        bus.send([message(1)])
        assert received(member, 1) == received(live, 1) == [1]
        assert (member.dead_letters, member.unreadable, live.unreadable) == (1, 1, 1)
        ((_, letter),) = client.xrange(DEAD)
    assert letter["reason"].startswith("no message: ")
    assert fields.get("message", "other") in letter["message"]


def test_a_message_that_was_trimmed_while_a_dead_consumer_had_it_is_counted(
    make_bus: MakeBus, valkey_server: ValkeyProcess
) -> None:
    bus = make_bus(claim_idle_seconds=0.1)
    first = bus.subscribe([SUBMITTED], group="g")
    bus.send([message(0)])
    assert received(first, 1) == [0]  # and is never heard of again
    with valkey_server.client() as client:
        client.xtrim(KEY, maxlen=0)
    time.sleep(0.2)
    second = bus.subscribe([SUBMITTED], group="g")
    bus.send([message(1)])
    assert received(second, 1) == [1]
    assert second.dropped == 1


def test_messages_that_are_trimmed_before_any_member_reads_them_are_counted_once(make_bus: MakeBus) -> None:
    bus = make_bus(max_length=100)
    bus.send([message(n) for n in range(500)])
    members = [bus.subscribe([SUBMITTED], group="g") for _ in range(2)]
    shares: list[list[object]] = [[], []]
    for _ in range(3):
        for start in range(0, 1000, 100):
            bus.send([message(n) for n in range(start, start + 100)])
        for _ in range(30):
            for member, share in zip(members, shares, strict=True):
                share += numbers(member.receive(timeout=0, limit=7))
    while late := [*members[0].receive(timeout=0.3), *members[1].receive(timeout=0.3)]:
        shares[0] += numbers(late)
    got = len(shares[0]) + len(shares[1])
    assert 0 < got < 3000
    assert members[0].dropped + members[1].dropped == 3000 - got


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_acknowledge_what_its_parent_handles(
    bus: RedisBus, valkey_server: ValkeyProcess
) -> None:
    member = bus.subscribe([SUBMITTED], group="g")
    bus.send([message(0)])
    assert received(member, 1) == [0]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if member.receive(timeout=1) == () else 2
            member.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with valkey_server.client() as client:
        assert client.xpending(KEY, "g")["pending"] == 1


def test_consumers_that_are_gone_and_left_nothing_behind_are_forgotten(
    make_bus: MakeBus, valkey_server: ValkeyProcess
) -> None:
    bus = make_bus(claim_idle_seconds=0.05)
    first, second = (bus.subscribe([SUBMITTED], group="g") for _ in range(2))
    bus.send([message(0), message(1)])
    assert numbers(first.receive(timeout=5, limit=1)) == [0]
    assert numbers(second.receive(timeout=5, limit=1)) == [1]
    first.close()  # and `second` is never heard of again
    time.sleep(0.6)
    third: Any = bus.subscribe([SUBMITTED], group="g")
    with valkey_server.client() as client:
        names = {each["name"] for each in client.xinfo_consumers(KEY, "g")}
        assert len(names) == 1, "the one that is gone is still listed, or the one with a message is not"
        assert received(third, 1) == [1]
        assert third.consumer in {each["name"] for each in client.xinfo_consumers(KEY, "g")}
