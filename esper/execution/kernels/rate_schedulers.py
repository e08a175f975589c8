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

from esper.execution.kernels.param_groups import BESIDE, FACTOR, LABELS, Group, OptimizerError, scaled

__all__ = ["checked_schedulers", "kept_lists", "rearrange", "refuse_fixed_groups", "schedulers_of"]

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
                f"scheduler must be one of torch.optim.lr_scheduler, or several of them, not {each!r:.80}; others set "
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


def refuse_fixed_groups(schedulers: Iterable[LRScheduler]) -> None:
    """Raise :class:`OptimizerError` for a scheduler of somebody's own whose rates are none for one more group.

    That is tried with a copy of it, beside copies of the groups.
    """
    for scheduler in (each for one in schedulers for each in _with_parts(one)):
        if type(scheduler).__module__ == LRScheduler.__module__ or type(scheduler).get_lr is LRScheduler.get_lr:
            continue
        groups: list[Group] = [{**group, "params": []} for group in scheduler.optimizer.param_groups]
        more = [*groups, {**groups[0], LABELS: [], BESIDE: 0, FACTOR: 1.0}]
        try:
            as_it_is = len(_rates(scheduler, groups, groups))
        except Exception:  # noqa: BLE001  # it cannot be asked in this way
            continue
        reason = ""
        try:
            count = len(_rates(scheduler, groups, more))
        except Exception as error:  # noqa: BLE001  # whatever it raises is the reason
            count, reason = -1, f": {type(error).__name__}: {error}"
        if as_it_is == len(groups) and count != len(more):
            raise OptimizerError(
                f"the {type(scheduler).__name__} cannot take another group{reason}. Have it go by the groups' own "
                "options, or keep its lists under torch's names, such as base_lrs, which follow"
            )


def _rates(scheduler: LRScheduler, before: Sequence[Group], groups: Sequence[Group]) -> Sequence[Any]:
    """What a copy of `scheduler` would make of `groups`."""
    twin: Any = copy.copy(scheduler)
    twin.optimizer = SimpleNamespace(param_groups=[dict(group) for group in groups])
    rearrange([twin], before, groups)
    twin._get_lr_called_within_step = True  # as torch has it around this call
    rates: Sequence[Any] = twin.get_lr()
    return rates


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
