"""Joining a process group: a model finds its peers on the other ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from esper.distributed.meeting import Site, meet
from esper.distributed.ranks import Ranks, RanksError
from esper.errors import shown
from esper.execution.plans.runtime import Runtime

__all__ = ["checked_group", "join"]

_joined: Counter[str] = Counter()  # models so far, by group: models of one number are peers


def checked_group(group: Any) -> Any:
    """The process group that is meant by `group`, which may be one, or a device mesh of one dimension.

    Raises :class:`RanksError` for anything else, and for a group that this process is not in.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RanksError("process_group needs torch.distributed.init_process_group() to be called first")
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise RanksError(
                f"process_group is a mesh of {group.ndim} dimensions: pass the group of those ranks that have the "
                "same model, which all of them have; as a rule that is torch.distributed.group.WORLD"
            )
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise RanksError("process_group is one that this process is not in")
    if not isinstance(group, dist.ProcessGroup):
        raise RanksError(f"process_group must be a torch.distributed.ProcessGroup, not {shown(group)}")
    return group


def join(runtime: Runtime, group: Any, sites: Sequence[Site], carry_out: Callable[[dict[str, Any]], object]) -> Ranks:
    """Have `runtime` change its plan together with its peers: the models that join `group` as the same one in order.

    To be called on all ranks before the same forward; waits for the others. `sites` are the model's, and `carry_out`
    asks here what the first rank asks of all. Raises :class:`RanksError` on all ranks if the models have different
    sites, or if some rank does not come.
    """
    group = checked_group(group)
    name = group.group_name
    _joined[name] += 1
    whole = group.get_group_store()
    store = PrefixStore(f"esper/{_joined[name]}", whole)
    if group.size() > 1:
        _compare(PrefixStore("meeting", store), group, sites, whole.timeout)
    ranks = Ranks(runtime, store, group.rank(), group.size(), carry_out)
    runtime.change_behind(ranks)
    return ranks


def _compare(store: Any, group: Any, sites: Sequence[Site], patience: timedelta) -> None:
    try:
        found = meet(store, group.rank(), group.size(), sites, patience)
    except TimeoutError as error:
        raise RanksError(
            f"a model that changes together with other ranks is joined by all of them, and for "
            f"{patience.total_seconds():.0f} s these have not come: {error}. Wrap the model, put it into DDP or shard "
            "it on every rank of the process group, models in the same order"
        ) from error
    if found:
        raise RanksError(
            f"ranks that change together need models with the same seeds, and {found}: build and wrap the model alike "
            "on all ranks (target_layers, seeds_per_layer), or give a process_group of those that have the same"
        )
