"""Publishing without waiting, and receiving."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from pydantic import BaseModel, ConfigDict, field_serializer

from esper.contracts.messages import BlueprintSubmitted, HealthSignal, OonaMessage, TopicNames
from esper.services.oona import InMemoryBus
from esper.services.oona_client import OonaClient

SUBMITTED = TopicNames.COMPILATION_BLUEPRINT_SUBMITTED
READY = TopicNames.COMPILATION_KERNEL_READY


def numbered(number: int) -> BlueprintSubmitted:
    return BlueprintSubmitted(blueprint_id=str(number))


def number_of(message: OonaMessage) -> int:
    return int(str(message.payload["blueprint_id"]))


class GatedBus(InMemoryBus):
    """A transport that is stuck until `gate` is opened, as one whose server does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.stuck = threading.Event()
        self.batches: list[int] = []

    def send(self, messages: Sequence[OonaMessage]) -> None:
        self.batches.append(len(messages))
        self.stuck.set()
        assert self.gate.wait(30)
        super().send(messages)


@pytest.fixture
def client() -> Iterator[OonaClient]:
    client = OonaClient(name="tests")
    yield client
    client.close()


class TestPublishing:
    def test_a_message_arrives_in_its_envelope(self, client: OonaClient) -> None:
        received: queue.Queue[OonaMessage] = queue.Queue()
        client.subscribe(TopicNames.TELEMETRY_SEED_HEALTH, received.put)
        signal = HealthSignal.model_validate(
            {
                "layer_id": 0,
                "layer_name": "fc1",
                "seed_count": 4,
                "active_seed_count": 1,
                "avg_execution_latency_μs": 12.5,
                "cache_hit_rate": 0.5,
                "error_count": 0,
                "memory_usage_mb": 0.25,
            }
        )
        client.publish(TopicNames.TELEMETRY_SEED_HEALTH, signal, trace_id="cause")
        message = received.get(timeout=10)
        assert HealthSignal.model_validate(message.payload) == signal
        assert (message.topic, message.trace_id) == ("telemetry.seed.health", "cause")
        assert message.sender_id == client.sender_id
        assert message.sender_id.startswith("tests@")
        assert message.timestamp.tzinfo is not None
        assert OonaMessage.model_validate_json(message.model_dump_json()) == message

    def test_order_is_kept_and_ids_differ(self, client: OonaClient) -> None:
        received: queue.Queue[OonaMessage] = queue.Queue()
        client.subscribe(SUBMITTED, received.put)
        for number in range(1500):
            client.publish(SUBMITTED, numbered(number))
        messages = [received.get(timeout=10) for _ in range(1500)]
        assert [number_of(message) for message in messages] == list(range(1500))
        assert len({message.event_id for message in messages}) == 1500

    def test_it_goes_out_in_batches_of_512(self) -> None:
        bus = GatedBus()
        client = OonaClient(bus)
        client.publish(SUBMITTED, numbered(0))
        assert bus.stuck.wait(10)
        for number in range(1, 1200):
            client.publish(SUBMITTED, numbered(number))
        bus.gate.set()
        assert client.flush(10)
        assert bus.batches == [1, 512, 512, 175]
        client.close()

    def test_when_the_queue_is_full_the_oldest_are_dropped_counted_and_reported(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        bus = GatedBus()
        client = OonaClient(bus, queue_size=100)
        received: queue.Queue[OonaMessage] = queue.Queue()
        client.subscribe(SUBMITTED, received.put)
        client.publish(SUBMITTED, numbered(-1))
        assert bus.stuck.wait(10)
        with caplog.at_level(logging.WARNING):
            for number in range(1000):
                client.publish(SUBMITTED, numbered(number))
            stats = client.stats()
            assert (stats.published, stats.queued, stats.dropped) == (1001, 1 + 100, 900)  # one is being sent
            bus.gate.set()
            assert client.flush(10)
            client.close()
        assert [number_of(received.get(timeout=10)) for _ in range(101)] == [-1, *range(900, 1000)]
        stats = client.stats()
        assert (stats.published, stats.sent, stats.dropped, stats.queued) == (1001, 101, 900, 0)
        assert "900 messages were dropped" in caplog.text

    def test_a_stuck_transport_does_not_hold_up_who_publishes(self) -> None:
        bus = GatedBus()
        client = OonaClient(bus, queue_size=10)
        threads = [
            threading.Thread(target=lambda: [client.publish(SUBMITTED, numbered(n)) for n in range(500)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive(), "a publisher waits for the transport"
        stats = client.stats()
        assert stats.published == 2000
        assert stats.dropped >= 2000 - 10 - 10  # in the queue, and in the batch that is stuck
        bus.gate.set()
        client.close()
        stats = client.stats()
        assert stats.sent + stats.dropped == 2000

    def test_a_bus_that_fails_loses_only_that_batch_and_it_is_counted(self, caplog: pytest.LogCaptureFixture) -> None:
        class Failing(InMemoryBus):
            healthy = False

            def send(self, messages: Sequence[OonaMessage]) -> None:
                if not self.healthy:
                    raise ConnectionError("no server")
                super().send(messages)

        bus = Failing()
        client = OonaClient(bus)
        client.publish(SUBMITTED, numbered(0))
        assert client.flush(10)
        bus.healthy = True
        client.publish(SUBMITTED, numbered(1))
        assert client.flush(10)
        assert (client.stats().failed, client.stats().sent) == (1, 1)
        assert "no server" in caplog.text
        client.close()

    def test_a_payload_that_cannot_be_written_does_not_raise_into_the_caller(
        self, client: OonaClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Broken(BaseModel):
            model_config = ConfigDict(frozen=True)
            value: int = 0

            @field_serializer("value")
            def _fail(self, _: int) -> int:
                raise RuntimeError("cannot be written")

        client.publish("a.topic", Broken())
        client.publish("", numbered(0))  # no topic
        client.publish(SUBMITTED, numbered(1))
        assert client.flush(10)
        assert (client.stats().failed, client.stats().sent) == (2, 1)
        assert "cannot be written" in caplog.text

    def test_after_closing_publishing_only_counts(self) -> None:
        client = OonaClient()
        client.publish(SUBMITTED, numbered(0))
        client.close()
        client.publish(SUBMITTED, numbered(1))
        client.close()
        assert (client.stats().sent, client.stats().dropped) == (1, 1)

    def test_no_thread_before_the_first_message_and_none_after_closing(self) -> None:
        def senders() -> list[str]:
            return [thread.name for thread in threading.enumerate() if thread.name.startswith("esper-oona")]

        before = senders()
        client = OonaClient()
        assert senders() == before
        client.publish(SUBMITTED, numbered(0))
        client.subscribe(SUBMITTED, lambda _: None)
        assert len(senders()) == len(before) + 2
        client.close()
        assert senders() == before

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_child_publishes_with_a_thread_of_its_own(self, client: OonaClient) -> None:
        client.publish(SUBMITTED, numbered(0))
        assert client.flush(10)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                received: queue.Queue[OonaMessage] = queue.Queue()
                client.subscribe(SUBMITTED, received.put)
                client.publish(SUBMITTED, numbered(1))
                status = 0 if number_of(received.get(timeout=10)) == 1 and client.stats().sent == 1 else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert client.stats().published == 1

    @pytest.mark.parametrize("sizes", [{"queue_size": 0}, {"batch_size": 0}])
    def test_sizes_below_one_are_refused(self, sizes: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            OonaClient(**sizes)  # type: ignore[arg-type]  # keywords from a dict


class TestSubscribing:
    def test_only_the_topics_asked_for_arrive(self, client: OonaClient) -> None:
        received: queue.Queue[OonaMessage] = queue.Queue()
        client.subscribe([SUBMITTED, "other"], received.put)
        for topic in (READY, SUBMITTED, "other"):
            client.publish(topic, numbered(1))
        assert [received.get(timeout=10).topic for _ in range(2)] == [SUBMITTED, "other"]
        assert client.flush(10)
        assert received.empty()

    def test_every_subscriber_gets_everything_and_a_group_shares_it(self, client: OonaClient) -> None:
        alone: list[int] = []
        shared: list[list[int]] = [[], []]
        everything = threading.Barrier(3)

        def take(index: int) -> Callable[[OonaMessage], object]:
            def callback(message: OonaMessage) -> None:
                shared[index].append(number_of(message))
                everything.wait(10)  # so that one member cannot take both

            return callback

        client.subscribe(SUBMITTED, lambda message: alone.append(number_of(message)))
        for index in range(2):
            client.subscribe(SUBMITTED, take(index), group="pair")
        client.publish(SUBMITTED, numbered(0))
        assert client.flush(10)
        while everything.n_waiting == 0:  # or the same member might take both at once
            time.sleep(0.01)
        client.publish(SUBMITTED, numbered(1))
        assert client.flush(10)
        everything.wait(10)  # each member has taken one
        client.close()
        assert alone == [0, 1]
        assert sorted(shared) == [[0], [1]]

    def test_a_callback_that_raises_is_counted_and_goes_on(
        self, client: OonaClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        done = threading.Event()

        def callback(message: OonaMessage) -> None:
            if number_of(message) == 0:
                raise RuntimeError("I do not like zero")
            done.set()

        subscription = client.subscribe(SUBMITTED, callback)
        for number in range(2):
            client.publish(SUBMITTED, numbered(number))
        assert done.wait(10)
        assert subscription.errors == 1
        assert "I do not like zero" in caplog.text

    def test_a_closed_subscription_is_called_no_more(self, client: OonaClient) -> None:
        received: list[int] = []
        with client.subscribe(SUBMITTED, lambda message: received.append(number_of(message))) as subscription:
            pass
        assert subscription.closed
        client.publish(SUBMITTED, numbered(0))
        assert client.flush(10)
        assert received == []

    def test_a_callback_may_close_its_own_subscription(self, client: OonaClient) -> None:
        received: queue.Queue[int] = queue.Queue()

        def callback(message: OonaMessage) -> None:
            subscription.close()
            received.put(number_of(message))

        subscription = client.subscribe(SUBMITTED, callback)
        client.publish(SUBMITTED, numbered(0))
        assert received.get(timeout=10) == 0
        client.publish(SUBMITTED, numbered(1))
        assert client.flush(10)
        assert received.empty()

    def test_a_subscriber_that_falls_behind_loses_the_oldest_and_they_are_counted(self) -> None:
        bus = InMemoryBus(mailbox_size=3)
        subscription = bus.subscribe(["t"])
        bus.send([OonaMessage(sender_id="s", topic="t", payload={"n": n}) for n in range(10)])
        assert [message.payload["n"] for message in subscription.receive(timeout=1)] == [7, 8, 9]
        assert subscription.dropped == 7
        assert subscription.receive(timeout=0.01) == ()

    def test_the_async_iterator_yields_what_comes_and_ends_when_closed(self, client: OonaClient) -> None:
        async def scenario() -> list[int]:
            received = []
            async with client.messages(SUBMITTED) as stream:
                for number in range(3):
                    client.publish(SUBMITTED, numbered(number))
                async for message in stream:
                    received.append(number_of(message))
                    if len(received) == 3:
                        stream.close()
            return received

        assert asyncio.run(asyncio.wait_for(scenario(), 20)) == [0, 1, 2]

    def test_a_stream_whose_reader_lags_drops_the_oldest(self, client: OonaClient) -> None:
        async def scenario() -> tuple[list[int], int]:
            async with client.messages(SUBMITTED, size=2) as stream:
                for number in range(5):
                    client.publish(SUBMITTED, numbered(number))
                while stream.dropped < 3:
                    await asyncio.sleep(0.01)
                return [number_of(await anext(stream)) for _ in range(2)], stream.dropped

        assert asyncio.run(asyncio.wait_for(scenario(), 20)) == ([3, 4], 3)

    def test_an_abandoned_loop_does_not_disturb_the_bus(self, client: OonaClient) -> None:
        async def scenario() -> None:
            client.messages(SUBMITTED)

        asyncio.run(scenario())
        client.publish(SUBMITTED, numbered(0))
        assert client.flush(10)
        deadline = time.monotonic() + 10
        while any(thread.name == f"esper-oona-{SUBMITTED}" for thread in threading.enumerate()):
            assert time.monotonic() < deadline, "the stream's thread goes on for a loop that is closed"
            time.sleep(0.01)
