"""What both transports do alike: in memory, and through Redis with a connection for each who takes part."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import pytest

from esper.contracts.messages import BlueprintSubmitted, OonaMessage, TopicNames
from esper.services.oona import Bus, BusSubscription, InMemoryBus
from esper.services.oona.redis_bus import RedisBus
from esper.services.oona_client import OonaClient
from tests.services.valkey_server import ValkeyProcess

SUBMITTED = TopicNames.COMPILATION_BLUEPRINT_SUBMITTED
READY = TopicNames.COMPILATION_KERNEL_READY

MakeBus = Callable[[], Bus]


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyProcess]:
    with ValkeyProcess() as server:
        yield server


@pytest.fixture(params=["memory", "redis"])
def make_bus(request: pytest.FixtureRequest) -> Iterator[MakeBus]:
    """Makes a way to the one bus of a test; closed at its end."""
    made: list[Bus] = []
    if request.param == "memory":
        made.append(InMemoryBus())
        yield lambda: made[0]
    else:
        server: ValkeyProcess = request.getfixturevalue("server")
        with server.client() as client:
            client.flushall()

        def make() -> Bus:
            made.append(RedisBus(server.config()))
            return made[-1]

        yield make
    for bus in made:
        bus.close()


@pytest.fixture
def bus(make_bus: MakeBus) -> Bus:
    return make_bus()


def message(number: int, topic: str = SUBMITTED) -> OonaMessage:
    return OonaMessage(sender_id="a test", topic=topic, payload={"n": number})


def numbers(messages: Iterable[OonaMessage]) -> list[object]:
    return [each.payload["n"] for each in messages]


def received(subscription: BusSubscription, count: int, limit: int = 512) -> list[OonaMessage]:
    """The next `count` messages, and no more than have come with them."""
    messages: list[OonaMessage] = []
    deadline = time.monotonic() + 20
    while len(messages) < count and time.monotonic() < deadline:
        messages += subscription.receive(timeout=1, limit=limit)
    return messages


class TestReceiving:
    def test_a_message_arrives_as_it_was_sent(self, make_bus: MakeBus) -> None:
        subscription = make_bus().subscribe([SUBMITTED])
        sent = OonaMessage(
            sender_id="größer@host:1", topic=SUBMITTED, trace_id="cause", payload={"μ": [1.5, None, {"a": "b\n"}]}
        )
        make_bus().send([sent])
        assert received(subscription, 1) == [sent]

    def test_only_what_is_sent_after_subscribing_arrives_and_only_of_the_topics_asked_for(
        self, make_bus: MakeBus
    ) -> None:
        sender = make_bus()
        sender.send([message(0)])
        subscription = make_bus().subscribe([SUBMITTED, "other"])
        sender.send([message(1), message(2, READY), message(3, "other")])
        sender.send([message(4)])
        assert numbers(received(subscription, 3)) == [1, 3, 4]
        assert subscription.receive(timeout=0.05) == ()

    def test_order_is_kept_and_nothing_is_missing_among_thousands(self, make_bus: MakeBus) -> None:
        sender, subscription = make_bus(), make_bus().subscribe([SUBMITTED])
        for start in range(0, 5000, 500):
            sender.send([message(n) for n in range(start, start + 500)])
        assert numbers(received(subscription, 5000)) == list(range(5000))
        assert subscription.dropped == 0

    def test_no_more_than_the_limit_comes_at_once(self, bus: Bus) -> None:
        subscription = bus.subscribe([SUBMITTED, READY])
        bus.send([message(n, (SUBMITTED, READY)[n % 2]) for n in range(10)])
        batches = [numbers(subscription.receive(timeout=5, limit=4)) for _ in range(3)]
        assert all(len(batch) <= 4 for batch in batches)
        rest = numbers(received(subscription, 10 - sum(map(len, batches)))) if sum(map(len, batches)) < 10 else []
        assert sorted([*chain(*batches), *rest], key=str) == list(range(10))

    def test_a_message_that_was_sent_twice_arrives_once(self, bus: Bus) -> None:
        subscription, member = bus.subscribe([SUBMITTED]), bus.subscribe([SUBMITTED], group="g")
        first, last = message(0), message(1)
        bus.send([first, first])
        bus.send([first])
        bus.send([last])
        assert received(subscription, 2) == [first, last]
        assert received(member, 2) == [first, last]

    def test_receiving_waits_for_as_long_as_it_is_told(self, bus: Bus) -> None:
        subscription = bus.subscribe([SUBMITTED])
        assert subscription.receive(timeout=0.3) == ()
        assert subscription.receive(timeout=0) == ()
        bus.send([message(0)])
        assert numbers(received(subscription, 1)) == [0]

    def test_a_waiting_receiver_gets_what_comes(self, make_bus: MakeBus) -> None:
        subscription, got = make_bus().subscribe([SUBMITTED]), queue.Queue[object]()
        thread = threading.Thread(target=lambda: got.put(numbers(subscription.receive())))
        thread.start()
        time.sleep(0.1)
        make_bus().send([message(7)])
        assert got.get(timeout=10) == [7]
        thread.join(10)


class TestGroups:
    def test_members_share_messages_out_and_others_get_all(self, make_bus: MakeBus) -> None:
        alone = make_bus().subscribe([SUBMITTED])
        members = [make_bus().subscribe([SUBMITTED], group="pair") for _ in range(2)]
        make_bus().send([message(n) for n in range(6)])
        shares = [numbers(members[n % 2].receive(timeout=5, limit=1)) for n in range(6)]
        assert [len(share) for share in shares] == [1] * 6
        assert sorted(chain(*shares), key=str) == list(range(6))
        assert [members[n].receive(timeout=0.05) for n in range(2)] == [(), ()]
        assert numbers(received(alone, 6)) == list(range(6))

    def test_groups_of_other_names_get_all_as_well(self, make_bus: MakeBus) -> None:
        one, other = (make_bus().subscribe([SUBMITTED], group=name) for name in ("one", "other"))
        make_bus().send([message(0)])
        assert numbers(received(one, 1)) == numbers(received(other, 1)) == [0]

    def test_what_a_member_leaves_the_others_get(self, make_bus: MakeBus) -> None:
        leaving, staying = (make_bus().subscribe([SUBMITTED], group="pair") for _ in range(2))
        make_bus().send([message(n) for n in range(4)])
        first = numbers(leaving.receive(timeout=5, limit=1))
        leaving.close()
        rest = numbers(received(staying, 3))
        assert sorted([*first, *rest], key=str) == list(range(4))

    def test_ten_thousand_messages_are_shared_out_with_none_lost_and_none_twice(self, make_bus: MakeBus) -> None:
        members = [make_bus().subscribe([SUBMITTED], group="many") for _ in range(3)]
        shares: list[list[object]] = [[] for _ in members]

        def work(member: BusSubscription, share: list[object]) -> None:
            end = time.monotonic() + 60
            while sum(map(len, shares)) < 10_000 and time.monotonic() < end:
                share += numbers(member.receive(timeout=0.1))

        threads = [threading.Thread(target=work, args=each, daemon=True) for each in zip(members, shares, strict=True)]
        for thread in threads:
            thread.start()
        sender = make_bus()
        for start in range(0, 10_000, 500):
            sender.send([message(n) for n in range(start, start + 500)])
        for thread in threads:
            thread.join(60)
        assert sorted(chain(*shares), key=lambda n: (isinstance(n, int), n)) == list(range(10_000))


class TestClosing:
    @pytest.mark.parametrize("group", [None, "g"])
    def test_closing_wakes_who_waits_without_an_end(self, bus: Bus, group: str | None) -> None:
        subscription, got = bus.subscribe([SUBMITTED], group=group), queue.Queue[object]()
        thread = threading.Thread(target=lambda: got.put(subscription.receive()))
        thread.start()
        time.sleep(0.2)
        assert not subscription.closed
        subscription.close()
        assert got.get(timeout=10) == ()
        assert subscription.closed
        thread.join(10)

    def test_a_closed_subscription_receives_nothing_and_may_be_closed_again(self, bus: Bus) -> None:
        subscription = bus.subscribe([SUBMITTED])
        bus.send([message(0)])
        subscription.close()
        subscription.close()
        assert subscription.receive(timeout=5) == ()

    def test_closing_the_bus_closes_its_subscriptions_and_it_may_be_used_again(self, bus: Bus) -> None:
        before = [bus.subscribe([SUBMITTED]), bus.subscribe([SUBMITTED], group="g")]
        bus.close()
        assert [each.closed for each in before] == [True, True]
        after = bus.subscribe([SUBMITTED])
        bus.send([message(1)])
        assert numbers(received(after, 1)) == [1]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_child_uses_the_bus_and_leaves_the_parents_subscriptions_alone(self, bus: Bus) -> None:
        subscription = bus.subscribe([SUBMITTED])
        bus.send([message(0)])
        assert numbers(received(subscription, 1)) == [0]
        child = os.fork()
        if child == 0:
            status = 1
            try:
                own = bus.subscribe([SUBMITTED])
                bus.send([message(1)])
                status = 0 if subscription.closed and numbers(received(own, 1)) == [1] else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        bus.send([message(2)])
        assert 2 in numbers(received(subscription, 2 if isinstance(bus, RedisBus) else 1))


class TestClients:
    """`OonaClient` over either transport."""

    @pytest.fixture
    def client(self, make_bus: MakeBus) -> Iterator[OonaClient]:
        client = OonaClient(make_bus())
        yield client
        client.close()

    def test_publish_and_subscribe(self, client: OonaClient) -> None:
        got: queue.Queue[OonaMessage] = queue.Queue()
        client.subscribe([SUBMITTED], got.put)
        for number in range(1200):
            client.publish(SUBMITTED, BlueprintSubmitted(blueprint_id=str(number)))
        assert [got.get(timeout=20).payload["blueprint_id"] for _ in range(1200)] == [str(n) for n in range(1200)]
        assert client.flush(10)
        stats = client.stats()
        assert (stats.published, stats.sent, stats.failed, stats.dropped, stats.queued) == (1200, 1200, 0, 0, 0)

    def test_a_slow_member_of_a_group_does_not_keep_messages_from_another(
        self, client: OonaClient, make_bus: MakeBus
    ) -> None:
        other, held = OonaClient(make_bus()), threading.Event()
        slow: queue.Queue[OonaMessage] = queue.Queue()
        quick: queue.Queue[OonaMessage] = queue.Queue()

        def hold(each: OonaMessage) -> None:
            slow.put(each)
            assert held.wait(30)

        group = make_bus().subscribe([SUBMITTED], group="workers")  # all of it is there before anybody takes any
        make_bus().send([message(n) for n in range(21)])
        client.subscribe(SUBMITTED, hold, group="workers")
        assert slow.get(timeout=10).payload["n"] == 0
        other.subscribe(SUBMITTED, quick.put, group="workers")
        assert [quick.get(timeout=10).payload["n"] for _ in range(20)] == list(range(1, 21))
        held.set()
        other.close()
        group.close()

    def test_a_subscription_ends_with_its_owner_and_does_not_keep_it(self, client: OonaClient) -> None:
        class Owner:
            pass

        owner: Owner | None = Owner()
        subscription = client.subscribe(SUBMITTED, lambda _: None, owner=owner)
        time.sleep(0.7)
        assert not subscription.closed
        owner = None
        deadline = time.monotonic() + 10
        while not subscription.closed:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def test_no_thread_is_left_after_closing(self, client: OonaClient) -> None:
        before = set(threading.enumerate())  # some may belong to other tests
        subscriptions = [client.subscribe(SUBMITTED, lambda _: None, group=group) for group in (None, "g")]
        client.publish(SUBMITTED, BlueprintSubmitted(blueprint_id="b"))
        client.close()
        assert [each.closed for each in subscriptions] == [True, True]
        assert not [each for each in set(threading.enumerate()) - before if each.name.startswith("esper-oona")]
