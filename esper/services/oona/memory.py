"""A bus within one process."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence

from esper.contracts.messages import OonaMessage
from esper.forking import reset_after_fork
from esper.services.oona.recent_ids import RecentIds

__all__ = ["InMemoryBus"]

_Key = tuple[tuple[str, ...], str | None, int]


class InMemoryBus:
    """Keeps, for every subscriber or group, what it has not received yet: at most `mailbox_size`, the oldest go first.

    Safe for threads. A forked child has an empty bus of its own; subscriptions from before the fork are closed there.
    """

    def __init__(self, mailbox_size: int = 10_000) -> None:
        if mailbox_size < 1:
            raise ValueError(f"mailbox_size is {mailbox_size}; it must be at least 1")
        self._mailbox_size = mailbox_size
        self._lock = threading.Lock()
        self._mailboxes: dict[_Key, _Mailbox] = {}
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Begin afresh; see `esper.forking`."""
        self._lock = threading.Lock()
        for mailbox in self._mailboxes.values():
            mailbox.after_fork(self._lock)
        self._mailboxes = {}

    def send(self, messages: Sequence[OonaMessage]) -> None:
        """Deliver to whoever subscribes to the messages' topics now."""
        with self._lock:
            for message in messages:
                for mailbox in self._mailboxes.values():
                    if message.topic in mailbox.topics:
                        mailbox.put(message)

    def subscribe(self, topics: Iterable[str], *, group: str | None = None) -> MemorySubscription:
        """See :class:`~esper.services.oona.Bus`."""
        wanted = tuple(sorted({str(topic) for topic in topics}))
        subscription = MemorySubscription(self)
        key = (wanted, group, 0 if group is not None else id(subscription))
        with self._lock:
            mailbox = self._mailboxes.setdefault(key, _Mailbox(wanted, self._lock, self._mailbox_size))
            mailbox.members.append(subscription)
            subscription.mailbox = mailbox
        return subscription

    def close(self) -> None:
        """Close all subscriptions; the bus may be used again."""
        with self._lock:
            members = [member for mailbox in self._mailboxes.values() for member in mailbox.members]
        for member in members:
            member.close()

    def remove(self, subscription: MemorySubscription) -> None:
        """Forget a subscription, and its mailbox with the last member. For :meth:`MemorySubscription.close`."""
        with self._lock:
            for key, mailbox in list(self._mailboxes.items()):
                if subscription in mailbox.members:
                    mailbox.members.remove(subscription)
                    mailbox.arrived.notify_all()
                    if not mailbox.members:
                        del self._mailboxes[key]


class _Mailbox:
    """What one subscriber or one group has not received. All of it under the bus's lock."""

    def __init__(self, topics: tuple[str, ...], lock: threading.Lock, size: int) -> None:
        self.topics = frozenset(topics)
        self.arrived = threading.Condition(lock)
        self.messages: deque[OonaMessage] = deque()
        self.members: list[MemorySubscription] = []
        self.dropped = 0
        self._size = size
        self._recent = RecentIds()

    def put(self, message: OonaMessage) -> None:
        if not self._recent.add(message.event_id):
            return
        if len(self.messages) >= self._size:
            self.messages.popleft()
            self.dropped += 1
        self.messages.append(message)
        self.arrived.notify()

    def after_fork(self, lock: threading.Lock) -> None:
        self.arrived = threading.Condition(lock)
        self.messages.clear()
        self.members.clear()


class MemorySubscription:
    """A :class:`~esper.services.oona.BusSubscription` on an :class:`InMemoryBus`."""

    mailbox: _Mailbox

    def __init__(self, bus: InMemoryBus) -> None:
        self._bus = bus

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self not in self.mailbox.members

    @property
    def dropped(self) -> int:
        """Messages that were pushed out of the mailbox."""
        return self.mailbox.dropped

    def receive(self, timeout: float | None = None, limit: int = 512) -> Sequence[OonaMessage]:
        """See :class:`~esper.services.oona.BusSubscription`."""
        mailbox = self.mailbox
        with mailbox.arrived:
            mailbox.arrived.wait_for(lambda: self.closed or mailbox.messages, timeout)
            if self.closed:
                return ()
            count = min(limit, len(mailbox.messages))
            return tuple(mailbox.messages.popleft() for _ in range(count))

    def close(self) -> None:
        """See :class:`~esper.services.oona.BusSubscription`."""
        self._bus.remove(self)
