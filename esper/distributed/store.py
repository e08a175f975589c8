"""A connection to the store of a process group: a copy of torch's own, which nobody else waits for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from torch import distributed as dist

from esper.distributed import agreement
from esper.errors import EsperError

__all__ = ["Connection", "StoreGoneError"]

_KEYS_AT_ONCE = 64
_LONGEST_WAIT = timedelta(days=1)  # torch's stores write a warning for every wait that runs out


class StoreGoneError(EsperError):
    """The store cannot be reached: the process that keeps it, which is the first rank's as a rule, has ended."""


class Connection:
    """Keys and texts in `store`. Belongs to one thread.

    Whoever waits, waits for the bell of its rank, which the first rank rings whenever it has written something for
    all; so a thread of its own process can wake it too.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self._store = store.clone()
        self._rank = rank
        self._rung = 0
        self.heard = 0
        """How often the bell of this rank was heard."""

    def ring(self, ranks: int) -> None:
        """Wake all ranks; for the one connection that does so."""
        bells = [_bell(rank, self._rung) for rank in range(ranks)]
        for part in _parted(bells):
            self._ask(partial(self._store.multi_set, part, ["1"] * len(part)))
        self._rung += 1

    def wake(self, waiting: Connection) -> None:
        """Wake `waiting`, which is another connection of the same rank, once and for all."""
        for number in range(waiting.heard, waiting.heard + 2):
            self.set(_bell(self._rank, number), "1")

    def perform(self, step: agreement.Step, given_up: Callable[[], bool]) -> Any:
        """What a step of `agreement` asks of the store."""
        match step:
            case agreement.Get(key):
                return self.get(key, given_up)
            case agreement.GetAll(keys):
                return self.get_all(keys)
            case agreement.There(keys):
                return self.has(keys)
            case agreement.Set(key, value):
                self.set(key, value)
            case agreement.Decide(key, value):
                return self.decide(key, value)
            case agreement.Delete(keys):
                self.delete(keys)
        return None

    def set(self, key: str, value: str) -> None:
        self._ask(lambda: self._store.set(key, value))

    def get(self, key: str, given_up: Callable[[], bool]) -> str:
        """The value of `key`, waiting until there is one; raises :class:`StoreGoneError` if `given_up` before."""
        while not self.has((key,)):
            if given_up():
                raise StoreGoneError("nobody waits any more")
            bell = _bell(self._rank, self.heard)
            with contextlib.suppress(dist.DistStoreError):  # nobody rang for long
                self._ask(partial(self._store.wait, [bell], _LONGEST_WAIT))
                self.heard += 1
                self.delete((bell,))
        return self.get_all((key,))[0]

    def get_all(self, keys: Sequence[str]) -> list[str]:
        """The values of `keys`, which are there."""
        parts = (self._ask(partial(self._store.multi_get, part)) for part in _parted(keys))
        return [value.decode() for part in parts for value in part]

    def has(self, keys: Sequence[str]) -> bool:
        """Whether all of `keys` have values."""
        return all(self._ask(partial(self._store.check, part)) for part in _parted(keys))

    def decide(self, key: str, value: str) -> str:
        """Write `value` unless there is one; returns what is there then."""
        found = self._ask(lambda: self._store.compare_set(key, "", value))
        return str(found.decode())

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._ask(partial(self._store.delete_key, key))

    def _ask(self, request: Callable[[], Any]) -> Any:
        try:
            return request()
        except dist.DistStoreError:
            raise
        except RuntimeError as error:  # torch has no narrower class for what a connection that ends raises
            raise StoreGoneError(_gone(error)) from error


def _parted(keys: Sequence[str]) -> Iterator[list[str]]:
    """`keys` in parts that torch's server reads at once: longer requests it begins anew with every piece of them."""
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        yield list(keys[start : start + _KEYS_AT_ONCE])


def _bell(rank: int, number: int) -> str:
    return f"bell/{rank}/{number}"


def _gone(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"the store of the process group cannot be reached, whose process may have ended ({first[:120]})"
