"""Learning-rate schedulers of groups that come and go.

Most of torch's are made for the groups that an optimizer has, and keep a list with an entry for each: these lists are
rearranged here. `LRScheduler` and its lists are documented attributes, or as old as it is.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from esper.errors import shown
from esper.execution.kernels.param_groups import BESIDE, FACTOR, LABELS, Group, OptimizerError, scaled

__all__ = [
    "checked_schedulers",
    "kept_lists",
    "own_ones",
    "rearrange",
    "refuse_fixed_groups",
    "refuse_unable",
    "schedulers_of",
]

_RATES = frozenset({"base_lrs", "max_lrs"})
_ALIKE = frozenset({"lr_lambdas", "min_lrs", "base_momentums", "max_momentums"})


def checked_schedulers(given: Any, optimizer: Optimizer) -> list[LRScheduler]:
    """One scheduler or several, and those that they are made of.

    Raises `TypeError` for what is none, and :class:`OptimizerError` for one of another optimizer.
    """
    several: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    found: list[LRScheduler] = []
    for each in several:
        scheduler = each
        if not isinstance(scheduler, LRScheduler):
            scheduler = getattr(scheduler, "scheduler", None)  # Accelerate's
        if not isinstance(scheduler, LRScheduler):
            raise TypeError(
                f"scheduler must be one of torch.optim.lr_scheduler, or several of them, not {shown(each)}; others set "
                "the rates of all groups by themselves, and need not be named"
            )
        if not _is_for(scheduler, optimizer):
            raise OptimizerError(
                f"the {type(scheduler).__name__} is one of another optimizer; pass the one made for this "
                f"{type(optimizer).__name__}"
            )
        found += _with_parts(scheduler)
    return found


def schedulers_of(optimizer: Optimizer) -> list[LRScheduler]:
    """Those that there are: all objects are looked through, which takes some hundredths of a second."""
    alive = (each for each in gc.get_objects() if issubclass(type(each), LRScheduler))
    return [each for each in alive if _is_for(each, optimizer)]


def _is_for(scheduler: LRScheduler, optimizer: Optimizer) -> bool:
    """Also by way of Accelerate's optimizer, which has torch's as `optimizer`."""
    own = getattr(scheduler, "optimizer", None)
    return own is optimizer or getattr(own, "optimizer", None) is optimizer


def _with_parts(scheduler: LRScheduler) -> list[LRScheduler]:
    parts = getattr(scheduler, "_schedulers", ())  # of SequentialLR and ChainedScheduler
    return [scheduler, *(inner for part in parts for inner in _with_parts(part))]


def rearrange(schedulers: Iterable[LRScheduler], before: Sequence[Group], groups: Sequence[Group]) -> None:
    """Have `schedulers`, whose lists are for the groups `before`, go on with `groups`.

    The entries of the host's groups stay what they are, in their order. Those of kernels' groups are made from the ones
    beside them. A list of another length, as a checkpoint may have left it, has those of the host first.
    """
    places = [place for place, group in enumerate(before) if LABELS not in group]
    for scheduler in schedulers:
        for name in (_RATES | _ALIKE) & vars(scheduler).keys():
            values = getattr(scheduler, name)
            if not isinstance(values, (list, tuple)) or len(values) < len(places):
                continue
            hosts = [values[place] for place in places] if len(values) == len(before) else list(values[: len(places)])
            setattr(scheduler, name, _entries(hosts, groups, name in _RATES))
        if hasattr(scheduler, "_last_lr"):  # what get_last_lr() returns
            scheduler._last_lr = [group["lr"] for group in groups]


def own_ones(schedulers: Iterable[LRScheduler]) -> list[LRScheduler]:
    """Those that are none of torch's, and whose step can be tried; one that steps in its own way may follow there."""
    others = (each for each in schedulers if type(each).__module__ != LRScheduler.__module__)
    return [each for each in others if type(each).step is LRScheduler.step and _unable(each) is None]


def refuse_unable(schedulers: Iterable[LRScheduler]) -> None:
    """Raise :class:`OptimizerError` for one whose next step would raise, with the optimizer's groups as they are."""
    for scheduler in schedulers:
        _refuse(scheduler, _unable(scheduler))


def refuse_fixed_groups(schedulers: Iterable[LRScheduler]) -> None:
    """Raise :class:`OptimizerError` for one whose step would raise if the optimizer had one group more."""
    for scheduler in own_ones(each for one in schedulers for each in _with_parts(one)):
        groups: list[Group] = [{**group, "params": []} for group in scheduler.optimizer.param_groups]
        _refuse(scheduler, _unable(scheduler, groups, [*groups, {**groups[0], LABELS: [], BESIDE: 0, FACTOR: 1.0}]))


def _refuse(scheduler: LRScheduler, reason: str | None) -> None:
    if reason is not None:
        raise OptimizerError(
            f"the scheduler {type(scheduler).__name__} cannot take the kernels' group: {reason}; have its get_lr() "
            "return a rate for each of optimizer.param_groups (self.base_lrs is kept as long), or "
            "detach_optimizer(), and give the kernels an optimizer of their own"
        )


def _unable(scheduler: LRScheduler, before: Sequence[Group] = (), groups: Sequence[Group] = ()) -> str | None:
    """Why `scheduler` has no rate for each group, asked as its step does; None if it has.

    With `groups` instead of the optimizer's, which are `before`.
    """
    twin: Any = copy.copy(scheduler)
    vars(twin).update({name: copy.copy(value) for name, value in vars(twin).items() if isinstance(value, (list, dict))})
    twin.last_epoch += 1
    twin._get_lr_called_within_step = True
    if groups:
        twin.optimizer = SimpleNamespace(param_groups=[dict(group) for group in groups])
        rearrange([twin], before, groups)
    try:
        rates, count = len(twin.get_lr()), len(twin.optimizer.param_groups)
    except Exception as error:  # noqa: BLE001  # of code that is not ours: it is the answer
        return f"{type(error).__name__}: {error}"
    return None if rates == count else f"it has rates for {rates} groups, and there are {count}"


def kept_lists(schedulers: Iterable[LRScheduler]) -> Callable[[], None]:
    """A function that gives `schedulers` the lists that they have now."""
    names = _RATES | _ALIKE | {"_last_lr"}
    lists = [(each, {name: value for name, value in vars(each).items() if name in names}) for each in schedulers]

    def put_back() -> None:
        for scheduler, values in lists:
            vars(scheduler).update(values)

    return put_back


def _entries(hosts: Sequence[Any], groups: Sequence[Group], are_rates: bool) -> list[Any]:
    entries, own = [], iter(hosts)
    for group in groups:
        if LABELS not in group:
            entries.append(next(own))
        else:
            beside = hosts[min(group[BESIDE], len(hosts) - 1)]
            entries.append(scaled(beside, group[FACTOR]) if are_rates else beside)
    return entries
