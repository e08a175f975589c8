"""Oona over a real server that is down, dies, forgets, hangs and refuses: what is lost is counted, and nobody waits."""

from __future__ import annotations

import logging
import queue
import sys
import time

import pytest

from esper.configs import OonaConfig, RedisConfig
from esper.contracts.messages import OonaMessage
from esper.services.oona import BusAddressError, BusAuthenticationError, BusRefusedError, BusUnavailableError
from esper.services.oona.redis_bus import RedisBus
from esper.services.oona_client import OonaClient
from tests.services.programs import Program
from tests.services.valkey_bus import (
    KEY,
    PATIENT,
    SUBMITTED,
    MakeBus,
    bus,
    ends,
    eventually,
    make_bus,
    message,
    numbers,
    received,
    submitted,
)
from tests.services.valkey_server import BreakableLink, ValkeyProcess, free_port, valkey_server

__all__ = ["bus", "make_bus", "valkey_server"]  # fixtures


class TestAddresses:
    @pytest.mark.parametrize(
        "url",
        ["http://host:6379", "host:6379", "redis://host:port", "redis://host/zero", "unix://", "redis://h?no_such=1"],
    )
    def test_a_url_that_is_none_is_refused_at_once_with_an_example(self, url: str) -> None:
        with pytest.raises(BusAddressError, match=r"give one like redis://host:6379/0"):
            RedisBus(RedisConfig.model_validate({"url": url}))

    def test_no_url_is_refused(self) -> None:
        with pytest.raises(BusAddressError, match=r"set redis\.url"):
            RedisBus(RedisConfig())

    def test_the_password_shows_nowhere(self, caplog: pytest.LogCaptureFixture) -> None:
        url = f"redis://:geheim@127.0.0.1:{free_port()}/0"
        bus = RedisBus(RedisConfig.model_validate({"url": url}))
        with pytest.raises(BusUnavailableError) as caught:
            bus.ping()
        with pytest.raises(BusAddressError) as malformed:
            RedisBus(RedisConfig.model_validate({"url": "redis://:geheim@host:port"}))
        bus.subscribe([SUBMITTED]).close()
        assert caplog.text
        for text in (str(caught.value), str(malformed.value), repr(bus), caplog.text):
            assert "geheim" not in text

    def test_ping_says_what_is_wrong_and_what_to_do(self, valkey_server: ValkeyProcess) -> None:
        bus = RedisBus(valkey_server.config(**PATIENT))
        bus.ping()
        with pytest.raises(BusUnavailableError, match=r"host name is not known; see redis\.url"):
            RedisBus(RedisConfig.model_validate({"url": "redis://no-such-host.invalid:6379"})).ping()
        with valkey_server.client() as client:
            client.config_set("requirepass", "right")
            with pytest.raises(BusAuthenticationError, match=r"password .*see redis\.url"):
                bus.ping()
            wrong = f"redis://:wrong@127.0.0.1:{valkey_server.port}"
            with pytest.raises(BusAuthenticationError, match=r"password .*see redis\.url"):
                RedisBus(valkey_server.config(url=wrong)).ping()
            RedisBus(valkey_server.config(url=wrong.replace("wrong", "right"))).ping()
        valkey_server.stop()
        with pytest.raises(BusUnavailableError, match=r"cannot be reached .*is the server running"):
            bus.ping()

    def test_ping_does_not_wait_longer_than_it_is_told(self, valkey_server: ValkeyProcess) -> None:
        valkey_server.freeze()
        with pytest.raises(BusUnavailableError, match="is the server running"):
            RedisBus(valkey_server.config(connect_timeout=0.3, socket_timeout=0.3)).ping()


class TestStreams:
    def test_one_stream_for_each_topic_with_one_field_trimmed_to_its_length(self, valkey_server: ValkeyProcess) -> None:
        bus = RedisBus(valkey_server.config(prefix="lab"), OonaConfig(max_length=100))
        sent = [message(n) for n in range(1000)]
        bus.send(sent)
        bus.send([message(0, "other")])
        with valkey_server.client() as client:
            assert sorted(client.keys()) == [f"lab:oona:{SUBMITTED}", "lab:oona:other"]
            ((_, fields),) = client.xrevrange(f"lab:oona:{SUBMITTED}", count=1)
            assert list(fields) == ["message"]
            assert OonaMessage.model_validate_json(fields["message"]) == sent[-1]
            assert 100 <= client.xlen(f"lab:oona:{SUBMITTED}") < 300
        bus.close()

    def test_messages_that_are_trimmed_before_they_are_read_are_counted(self, make_bus: MakeBus) -> None:
        bus = make_bus(max_length=100)
        bus.send([message(n) for n in range(1000)])
        subscription = bus.subscribe([SUBMITTED])
        for start in range(0, 1000, 100):
            bus.send([message(n) for n in range(start, start + 100)])
        got = received(subscription, 1000, seconds=2)
        assert 0 < len(got) < 1000
        assert got == list(range(1000 - len(got), 1000))
        assert subscription.dropped == 1000 - len(got)

    def test_a_message_that_the_server_refuses_is_counted_as_failed_and_the_others_go_out(
        self, bus: RedisBus, valkey_server: ValkeyProcess, caplog: pytest.LogCaptureFixture
    ) -> None:
        with valkey_server.client() as client:
            client.set("esper:oona:taken", "a string")
        with pytest.raises(BusRefusedError, match="WRONGTYPE") as caught:
            bus.send([message(0, "taken"), message(1)])
        assert numbers(caught.value.refused) == [0]
        oona = OonaClient(bus)
        oona.publish("taken", submitted(2))
        oona.publish(SUBMITTED, submitted(3))
        assert oona.flush(10)
        oona.close()
        stats = oona.stats()
        assert (stats.sent, stats.failed) == (1, 1)
        assert "WRONGTYPE" in caplog.text
        with valkey_server.client() as client:
            assert client.xlen(KEY) == 2

    def test_the_name_of_the_dead_letters_is_no_topic(self, bus: RedisBus) -> None:
        with pytest.raises(ValueError, match="dead letters"):
            bus.send([message(0, "dead")])
        with pytest.raises(ValueError, match="dead letters"):
            bus.subscribe(["dead"])


class TestDown:
    def test_down_at_the_start_and_up_later_loses_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        server = ValkeyProcess()
        oona = OonaClient(RedisBus(server.config(**PATIENT)))
        got: queue.Queue[OonaMessage] = queue.Queue()
        oona.subscribe(SUBMITTED, got.put)
        oona.subscribe(SUBMITTED, got.put, group="g")
        for number in range(1000):
            oona.publish(SUBMITTED, submitted(number))
        eventually(lambda: "cannot be reached" in oona.stats().last_error, "the trouble does not show in the stats")
        assert oona.stats().queued == 1000
        assert "is the server running" in caplog.text
        with server:
            texts = [str(got.get(timeout=20).payload["blueprint_id"]) for _ in range(2000)]
            assert sorted(texts) == sorted([*map(str, range(1000))] * 2)
            assert oona.flush(10)
            stats = oona.stats()
            assert (stats.sent, stats.failed, stats.dropped, stats.last_error) == (1000, 0, 0, "")
            oona.close()

    def test_what_is_sent_before_a_subscriber_finds_the_server_reaches_it(self) -> None:
        server = ValkeyProcess()
        early = RedisBus(server.config(**PATIENT))
        subscriptions = [early.subscribe([SUBMITTED]), early.subscribe([SUBMITTED], group="g")]
        with server:
            RedisBus(server.config()).send([message(0)])
            assert [received(each, 1) for each in subscriptions] == [[0], [0]]
            early.close()

    def test_it_dies_and_comes_back_empty_and_all_that_is_published_meanwhile_arrives(
        self, bus: RedisBus, valkey_server: ValkeyProcess, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="esper")
        oona = OonaClient(bus)
        live: queue.Queue[OonaMessage] = queue.Queue()
        shared: queue.Queue[OonaMessage] = queue.Queue()
        oona.subscribe(SUBMITTED, live.put)
        for _ in range(2):
            oona.subscribe(SUBMITTED, shared.put, group="g")

        def both(count: int) -> list[list[str]]:
            return [
                sorted(str(each.get(timeout=20).payload["blueprint_id"]) for _ in range(count))
                for each in (live, shared)
            ]

        oona.publish(SUBMITTED, submitted(0))
        assert both(1) == [["0"], ["0"]]
        valkey_server.kill()
        for number in range(1, 301):
            oona.publish(SUBMITTED, submitted(number))
        time.sleep(0.5)
        valkey_server.start()
        assert both(300) == [sorted(map(str, range(1, 301)))] * 2
        assert oona.flush(10)
        oona.close()
        assert oona.stats().sent == 301
        assert "publishing reaches redis://127.0.0.1" in caplog.text
        assert "the group g" in caplog.text

    @pytest.mark.parametrize("id_", ["*", "5-1"], ids=["later", "its clock was put back"])
    def test_all_is_read_from_a_server_that_was_emptied_behind_ones_back(
        self, bus: RedisBus, valkey_server: ValkeyProcess, id_: str
    ) -> None:
        subscription, live = bus.subscribe([SUBMITTED], group="g"), bus.subscribe([SUBMITTED])
        bus.send([message(0)])
        assert received(subscription, 1) == received(live, 1) == [0]
        with valkey_server.client() as client:
            client.flushall()
            client.xadd(KEY, {"message": message(1).model_dump_json()}, id=id_)
        assert received(subscription, 1) == received(live, 1) == [1]

    def test_during_a_long_outage_the_oldest_are_dropped_and_all_are_accounted_for(
        self, valkey_server: ValkeyProcess
    ) -> None:
        oona = OonaClient(RedisBus(valkey_server.config(**PATIENT)), queue_size=100, batch_size=10)
        valkey_server.stop()
        for number in range(1000):
            oona.publish(SUBMITTED, submitted(number))
        valkey_server.start()
        assert oona.flush(20)
        stats = oona.stats()
        assert stats.failed == stats.queued == 0
        assert stats.sent + stats.dropped == 1000
        assert stats.dropped >= 1000 - 100 - 10
        with valkey_server.client() as client:
            entries = client.xrange(KEY)
        assert len(entries) == stats.sent
        assert '"999"' in entries[-1][1]["message"]
        oona.close()

    def test_closing_while_it_is_down_ends_and_counts_what_is_lost(
        self, bus: RedisBus, valkey_server: ValkeyProcess, caplog: pytest.LogCaptureFixture
    ) -> None:
        valkey_server.stop()
        oona = OonaClient(bus)
        oona.subscribe(SUBMITTED, lambda _: None)
        for number in range(100):
            oona.publish(SUBMITTED, submitted(number))
        ends(lambda: (oona.close(timeout=2.0), bus.close()))
        eventually(lambda: oona.stats().queued == 0, "messages stay queued for ever")
        stats = oona.stats()
        assert stats.sent == 0
        assert stats.failed + stats.dropped == 100
        assert "were not sent before closing" in caplog.text


class TestHanging:
    @pytest.mark.parametrize("trouble", ["freeze", "kill"])
    def test_ten_thousand_publishes_from_a_training_thread_and_none_waits(
        self, valkey_server: ValkeyProcess, trouble: str
    ) -> None:
        bus = RedisBus(valkey_server.config(connect_timeout=600, socket_timeout=600))
        oona = OonaClient(bus)
        oona.publish(SUBMITTED, submitted(-1))
        assert oona.flush(10)
        getattr(valkey_server, trouble)()
        ends(lambda: [oona.publish(SUBMITTED, submitted(number)) for number in range(10_000)])
        stats = oona.stats()
        assert (stats.published, stats.sent, stats.failed) == (10_001, 1, 0)
        assert stats.dropped >= 10_000 - 2048 - 2 * 512
        ends(lambda: (oona.close(timeout=1.0), bus.close()))
        valkey_server.kill()
        eventually(lambda: oona.stats().queued == 0, "messages stay queued for ever")
        stats = oona.stats()
        assert stats.sent == 1
        assert stats.failed + stats.dropped == 10_000

    def test_a_receiver_gives_up_in_time_and_reads_on_when_the_server_does(self, valkey_server: ValkeyProcess) -> None:
        bus = RedisBus(valkey_server.config(socket_timeout=1.0))
        live, member = bus.subscribe([SUBMITTED]), bus.subscribe([SUBMITTED], group="g")
        bus.send([message(0)])
        assert received(live, 1) == received(member, 1) == [0]
        assert live.receive(timeout=0.05) == member.receive(timeout=0.05) == ()
        valkey_server.freeze()
        assert live.receive(timeout=0.3) == member.receive(timeout=0.3) == ()
        valkey_server.thaw()
        bus.send([message(1)])
        assert received(live, 1) == received(member, 1) == [1]
        bus.close()

    @pytest.mark.parametrize("group", [None, "g"])
    def test_closing_does_not_wait_for_the_servers_answer(
        self, valkey_server: ValkeyProcess, group: str | None
    ) -> None:
        oona, got = OonaClient(RedisBus(valkey_server.config(socket_timeout=600))), queue.Queue[OonaMessage]()
        subscription = oona.subscribe(SUBMITTED, got.put, group=group)
        oona.publish(SUBMITTED, submitted(0))
        assert got.get(timeout=20)
        valkey_server.freeze()
        ends(lambda: (oona.close(), oona.bus.close()))
        assert subscription.closed

    def test_nothing_is_lost_or_doubled_when_the_server_hangs_for_longer_than_an_answer_may_take(
        self, valkey_server: ValkeyProcess
    ) -> None:
        bus = RedisBus(valkey_server.config(connect_timeout=0.3, socket_timeout=0.3))
        oona = OonaClient(bus)
        live: queue.Queue[OonaMessage] = queue.Queue()
        shared: queue.Queue[OonaMessage] = queue.Queue()
        oona.subscribe(SUBMITTED, live.put)
        oona.subscribe(SUBMITTED, shared.put, group="g")
        for number in range(600):
            oona.publish(SUBMITTED, submitted(number))
            if number == 300:
                valkey_server.freeze()
        time.sleep(2)
        valkey_server.thaw()
        expected = [str(number) for number in range(600)]
        assert sorted(str(live.get(timeout=20).payload["blueprint_id"]) for _ in expected) == sorted(expected)
        assert sorted(str(shared.get(timeout=20).payload["blueprint_id"]) for _ in expected) == sorted(expected)
        oona.close()
        bus.close()
        assert live.empty()
        assert shared.empty()


def test_a_slow_server_holds_up_nobody_who_publishes_and_loses_nothing(valkey_server: ValkeyProcess) -> None:
    delay, expected = 0.1, [str(number) for number in range(2000)]  # no more than may wait for being sent
    with BreakableLink(valkey_server.port, delay) as link:
        bus = RedisBus(valkey_server.config(url=f"redis://127.0.0.1:{link.port}/0"))
        oona = OonaClient(bus)
        got: queue.Queue[OonaMessage] = queue.Queue()
        oona.subscribe(SUBMITTED, got.put)
        for number in range(2000):
            oona.publish(SUBMITTED, submitted(number))
        assert oona.stats().sent < 2000, "publishing waits for the server"
        assert [str(got.get(timeout=20).payload["blueprint_id"]) for _ in expected] == expected
        assert oona.flush(10)
        stats = oona.stats()
        assert (stats.sent, stats.failed, stats.dropped) == (2000, 0, 0)
        oona.close()
        bus.close()


@pytest.mark.slow
def test_redis_is_not_imported_by_who_does_not_use_it() -> None:
    program = "import sys, esper, esper.platform; print('redis' in sys.modules)"
    assert Program(program).finish() == ["False"], sys.executable
