"""The life of a seed: its states, the changes between them that exist, and the record of one such change.

A seed that is `ACTIVE` and gets a replacement goes through `LOADING` while its old kernel stays in force, so
"does this seed contribute to the output" is not asked of the lifecycle state but of the kernel id in
`KasminaStateLayout`: a seed is in force exactly while it has one.
`after_failed_load` and `after_cancelled_load` say where such a seed goes back to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType

from esper.errors import EsperError

__all__ = [
    "TRANSITIONS",
    "LifecycleError",
    "SeedLifecycleState",
    "Transition",
    "after_cancelled_load",
    "after_failed_load",
    "check_transition",
]


class SeedLifecycleState(IntEnum):
    """What a seed is doing; the numbers are what `lifecycle_states` (uint8) holds."""

    DORMANT = 0
    """No kernel. The site computes the host's linear layer and nothing else."""
    LOADING = 1
    """A kernel is being made ready. A kernel that was in force before still is."""
    ACTIVE = 2
    """A kernel is blended into the site's output."""
    ERROR_RECOVERY = 3
    """The last load failed and nothing is in force; the reason is kept beside the error count."""
    FOSSILIZED = 4
    """The kernel is part of the host for good."""


_S = SeedLifecycleState

TRANSITIONS: Mapping[SeedLifecycleState, frozenset[SeedLifecycleState]] = MappingProxyType(
    {
        _S.DORMANT: frozenset({_S.LOADING}),
        _S.LOADING: frozenset({_S.ACTIVE, _S.DORMANT, _S.ERROR_RECOVERY}),
        _S.ACTIVE: frozenset({_S.DORMANT, _S.LOADING, _S.FOSSILIZED, _S.ERROR_RECOVERY}),
        _S.ERROR_RECOVERY: frozenset({_S.LOADING, _S.DORMANT}),
        _S.FOSSILIZED: frozenset(),
    }
)
"""For each state, the states that may follow it. A state never follows itself."""


class LifecycleError(EsperError, RuntimeError):
    """A seed was asked to go where its state does not lead."""


def check_transition(old: SeedLifecycleState, new: SeedLifecycleState, seed: int | str = "") -> None:
    """Raise `LifecycleError` unless `old -> new` is in `TRANSITIONS`.

    `seed` is only for the message: an index, or a phrase such as `"seed 2 of layer 'fc1'"`.
    """
    allowed = TRANSITIONS[old]
    if new in allowed:
        return
    who = f"seed {seed}" if isinstance(seed, int) else seed or "the seed"
    choices = ", ".join(state.name for state in sorted(allowed)) or "nothing: this state is final"
    raise LifecycleError(f"{who} cannot go from {old.name} to {new.name}; from {old.name} it may go to {choices}.")


def after_failed_load(in_force: bool) -> SeedLifecycleState:
    """Where a `LOADING` seed goes when its load fails: back to `ACTIVE` if an old kernel is still in force."""
    return _S.ACTIVE if in_force else _S.ERROR_RECOVERY


def after_cancelled_load(in_force: bool) -> SeedLifecycleState:
    """Where a `LOADING` seed goes when its load is cancelled: to what it was doing before."""
    return _S.ACTIVE if in_force else _S.DORMANT


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of one seed, as `MorphableModel.commit()` reports it."""

    layer: str
    """The site's dotted name in the host."""
    seed: int
    """The seed's index at that site."""
    old: SeedLifecycleState
    new: SeedLifecycleState
    time: float
    """Seconds since the epoch (`time.time()`)."""
    reason: str = ""
    """Why, in a sentence: "committed", "cancelled", or the failure's message."""
    kernel_id: str | None = None
    """The artifact that came into force, failed or was taken out; None where there is none."""
    layer_id: int = field(kw_only=True)
    """The site's number in the model."""

    def __str__(self) -> str:
        kernel = f" ({self.kernel_id[:12]})" if self.kernel_id else ""
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.layer}[{self.seed}] {self.old.name} -> {self.new.name}{kernel}{reason}"
