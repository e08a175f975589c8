"""A seed, one slot of a layer, and what is asked of it."""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from esper.execution.kernel_cache import KernelCache
from esper.execution.lifecycle import LifecycleError, SeedLifecycleState
from esper.execution.plans.plan_edit import PlanEdit
from esper.execution.seeds.progress import Stage
from esper.execution.state_layout import KasminaStateLayout
from esper.futures import InterruptSafeFuture

__all__ = ["Operation", "Seed", "SeedLayer", "Ticket", "described_together"]

_MOST_DESCRIBED = 16


class SeedLayer(Protocol):
    """What a seed's operations have to know of its layer, which is a `KasminaLayer`."""

    layer_id: int
    layer_name: str
    site: int
    first_seed: int
    kernel_cache: KernelCache
    state: KasminaStateLayout
    seeds: tuple[Seed, ...]
    seed_errors: dict[int, str]
    absence: str | None
    """Why nothing computes with the layer, if it was taken out of the model."""
    _parameters: dict[str, nn.Parameter | None]

    @property
    def features(self) -> tuple[int, int] | None: ...

    @property
    def input_dim(self) -> int: ...

    @property
    def output_dim(self) -> int: ...

    @property
    def placement(self) -> tuple[torch.device, torch.dtype]: ...

    @property
    def linear_map(self) -> tuple[Tensor, Tensor | None] | None: ...


class Ticket:
    """A request's place in the line of those for one seed: only the latest one is wanted."""

    __slots__ = ("superseded",)

    def __init__(self) -> None:
        self.superseded: Future[None] | None = None
        """Of whoever prepares for the request and wants to be told when something else is asked."""


class Seed:
    """One slot of a layer: its state, why its last load failed, the kernel that it pins, and what is asked of it.

    What is asked, and what is pinned, changes under the runtime's lock. A seed does not keep its layer alive.
    """

    def __init__(self, layer: SeedLayer, index: int) -> None:
        self._layer = weakref.ref(layer)
        self.index = index
        self.layer_id = layer.layer_id
        self.layer_name = layer.layer_name
        self.site = layer.site
        self.alpha_index = layer.first_seed + index
        """Its index in the model's state tensors."""
        self.state = layer.state
        """That of the layer's seeds, this one at `index`."""
        self.kernel_cache = layer.kernel_cache
        self._errors = layer.seed_errors
        self._pinned: tuple[str, weakref.ref[PlanEdit]] | None = None  # what is in the cache for it, and by which edit
        self.ticket = Ticket()
        """Of what was asked last."""
        self.loading: Operation | None = None
        """The load that is under way, not staged yet; who takes it out answers its future."""
        self.published: Operation | None = None
        """The load that is staged and not committed."""
        self.is_fossilizing = False
        """Whether its fossil is staged and not committed."""
        self.later_alpha: Any = None
        """The alpha that was set during a load, and its first value; instead of those that came with the request."""
        self.told_of_alpha = False
        """Whether it was said that an alpha was set for nothing."""

    def __str__(self) -> str:
        return f"seed {self.index} of layer {self.layer_name!r}"

    @property
    def layer(self) -> SeedLayer:
        """The layer that it belongs to, alive."""
        layer = self._layer()
        assert layer is not None
        return layer

    @property
    def lifecycle(self) -> SeedLifecycleState:
        return self.state.lifecycle(self.index)

    @property
    def in_force(self) -> bool:
        """Whether a kernel of it contributes to the layer's output."""
        return self.state.in_force(self.index)

    @property
    def alpha(self) -> float:
        return self.state.alpha(self.index)

    @property
    def error(self) -> str | None:
        """Why it is not what was asked last, if it is not."""
        return self._errors.get(self.index)

    @error.setter
    def error(self, reason: str | None) -> None:
        if reason is None:
            self._errors.pop(self.index, None)
        else:
            self._errors[self.index] = reason

    def become(self, new: SeedLifecycleState, kernel_id: str | None = None) -> None:
        """Change its lifecycle state, see `KasminaStateLayout.set_lifecycle`."""
        self.state.set_lifecycle(self.index, new, kernel_id)

    def refuse_fossil(self) -> None:
        """Raise `LifecycleError` if it is a fossil or becomes one."""
        if self.lifecycle is SeedLifecycleState.FOSSILIZED or self.is_fossilizing:
            raise LifecycleError(f"seed {self.index} of layer {self.layer_name!r} is FOSSILIZED, which is for good")

    def take_ticket(self) -> Ticket:
        """Something else is asked of it. Who prepares for what was asked before, learns of it."""
        before, self.ticket = self.ticket, Ticket()
        if before.superseded is not None and not before.superseded.done():
            before.superseded.set_result(None)
        return self.ticket

    def supersede(self) -> Operation | None:
        """End whatever was asked before. Returns the load that was under way: answer it once the lock is let go."""
        load, self.loading = self.loading, None
        self.take_ticket()
        return load

    def pin(self, kernel_id: str | None, edit: PlanEdit) -> None:
        """Keep its kernel in the cache, and let go of the one it replaces; once for each edit that is committed."""
        before = self._pinned
        if before is not None and before[1]() is edit:
            return  # an interrupt came after this
        self._pinned = None if kernel_id is None else (kernel_id, weakref.ref(edit))
        if before is not None:
            self.kernel_cache.unpin(before[0])

    def stats(self, kernel_id: str | None) -> dict[str, Any]:
        """`state` and `alpha` as they are in force: without a kernel it has a share of 0, whatever its next one gets.

        `kernel` is the id of the artifact that runs; None without one, and for a fossil that the layer's own weight
        has taken in. `error_count` counts the failures so far, and `reason` is why the last load failed, "" if it did
        not.
        """
        return {
            "state": self.lifecycle.name,
            "alpha": self.alpha if self.in_force else 0.0,
            "kernel": kernel_id,
            "error_count": self.state.errors(self.index),
            "reason": self.error or "",
        }


def described_together(each: Sequence[str]) -> str:
    """What is asked of several seeds, for people: equal where all of it is equal."""
    if len(each) <= _MOST_DESCRIBED:
        return "; ".join(each)
    digest = hashlib.sha256("\n".join(each).encode()).hexdigest()[:8]
    return f"{'; '.join(each[:_MOST_DESCRIBED])}; and {len(each) - _MOST_DESCRIBED} more of them ({digest})"


class Operation(PlanEdit):
    """Something asked of one seed. The methods stand in the order in which they are called, before those of an edit."""

    def __init__(self, seed: Seed, ticket: Ticket | None = None) -> None:
        self.seed = seed
        self.layer = seed.layer
        self.ticket = ticket or seed.ticket
        self.staged: Future[bool] = InterruptSafeFuture()
        self.change = ""
        """Its name among ranks, if it has to be agreed by them."""

    @property
    def is_wanted(self) -> bool:
        """Whether nothing else has been asked of the seed since. Needs no lock."""
        return self.seed.ticket is self.ticket

    def note(self, stage: Stage) -> None:
        """It has come to `stage`, for whoever asks how far it is."""

    def fetch(self) -> bool:
        """Get what it needs, on a background thread; it may be slow or hang. Whether the operation goes on."""
        return True

    def wait(self) -> None:
        """It cannot be staged at once: something has to be compiled first. Lock held."""

    def publish(self) -> None:
        """It is staged just now. Lock held."""

    def answer(self, staged: bool) -> None:
        """Say whether it is staged, unless that was said before."""
        with contextlib.suppress(InvalidStateError):
            self.staged.set_result(staged)

    def withdraw(self) -> None:
        """It was staged, and does not come into force after all. Lock held."""

    def describe(self) -> str:
        """What is done, so that other ranks can tell whether they are asked for the same."""
        raise NotImplementedError
