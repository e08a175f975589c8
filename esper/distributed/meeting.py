"""What ranks tell each other when their models join a process group: whether these are of one shape."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch import distributed as dist

__all__ = ["Site", "difference", "meet"]

Site = tuple[str, int, int, int]
"""A layer with seeds: its name, how many it has, and its features in and out; 0 where only a forward can tell."""

_SHOWN = 4


def meet(store: Any, rank: int, size: int, sites: Sequence[Site], patience: timedelta) -> str:
    """Wait for all ranks, and say in which way the models of any two of them differ; "" if they do not.

    All ranks are told the same. Each sends a handful of requests to `store`, however many there are. Raises
    :class:`TimeoutError`, naming them, if some have not come after `patience`.
    """
    own = json.dumps(sites)
    digest = hashlib.sha256(own.encode()).hexdigest()
    if rank == 0:
        store.set("sites", own)
        store.set("digest", digest)
    store.set(f"here/{rank}", "1")
    _wait(store, "digest", size, patience)
    if store.get("digest").decode() != digest:
        first = [tuple(each) for each in json.loads(store.get("sites"))]
        store.compare_set("differs", "", difference(first, sites, rank))
    if store.add("compared", 1) == size:
        store.set("all", "1")
    _wait(store, "all", size, patience)
    return str(store.get("differs").decode()) if store.check(["differs"]) else ""


def _wait(store: Any, key: str, size: int, patience: timedelta) -> None:
    try:
        store.wait([key], patience)
    except dist.DistStoreError as error:
        missing = [str(rank) for rank in range(size) if not store.check([f"here/{rank}"])]
        raise TimeoutError(", ".join(missing[:8]) + (" and others" if len(missing) > 8 else "")) from error


def difference(first: Sequence[Site], other: Sequence[Site], rank: int) -> str:
    """In what `other`, the sites of `rank`, differ from the `first` rank's."""
    theirs, mine = {each[0]: each[1:] for each in first}, {each[0]: each[1:] for each in other}
    for here, there, has, lacks in ((theirs, mine, 0, rank), (mine, theirs, rank, 0)):
        only = [name for name in here if name not in there]
        if only:
            more = f" and {len(only) - _SHOWN} more" if len(only) > _SHOWN else ""
            names = ", ".join(map(repr, only[:_SHOWN])) + more
            return f"rank {has} has seeds at {names}, and rank {lacks} has none there"
    for name, (seeds, in_features, out_features) in theirs.items():
        if mine[name] != (seeds, in_features, out_features):
            return (
                f"layer {name!r} maps {in_features} to {out_features} features and has {seeds} seeds on rank 0, and on "
                f"rank {rank} it maps {mine[name][1]} to {mine[name][2]} and has {mine[name][0]}"
            )
    return f"the layers with seeds stand in another order on rank {rank} than on rank 0"
