"""The constants of a `Grower`, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from esper.artifacts import Blueprint
from esper.errors import shown
from esper.execution.kasmina_layer import KasminaLayer
from esper.growth.errors import GrowthError

__all__ = ["Candidate", "GrowthPolicy", "Keep", "Place", "StartOf"]

Candidate = Callable[[KasminaLayer, int], Blueprint]
"""The blueprint of so many hidden units for a layer."""
Keep = Literal["fossilized", "active"]
Place = Literal["best", "random"]
StartOf = Literal["selected", "random"]

_LEAST = {"budget": 1, "first": 0, "cooldown": 0, "ramp": 1, "trial": 0, "patience": 1, "proposals": 1, "rows": 1}
_LEAST_OR_NONE = {"lead": 0, "until": 0}
_FRACTIONS = ("threshold", "chance", "marginal", "margin", "timeout")
_CHOICES = {"place": get_args(Place), "start": get_args(StartOf), "keep": get_args(Keep)}


@dataclass(frozen=True)
class GrowthPolicy:
    """The constants by which a `Grower` decides; they mean what its arguments of these names do."""

    budget: int
    first: int = 100
    cooldown: int = 100
    ramp: int = 50
    trial: int = 100
    lead: int | None = None
    until: int | None = None
    patience: int = 3
    threshold: float = 0.05
    chance: float = 1.0
    marginal: float = 0.25
    margin: float = 0.0
    compute_share: float | None = None
    widths: Sequence[int] = (2, 4, 8, 16, 32)
    family: str | Candidate = "bottleneck"
    proposals: int = 128
    rows: int = 4096
    place: Place = "best"
    start: StartOf = "selected"
    keep: Keep = "fossilized"
    seed: int = 0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            _check_whole(name, getattr(self, name), least)
        for name, least in _LEAST_OR_NONE.items():
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), least)
        share = self.compute_share
        if share is not None and (isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1):
            raise GrowthError(f"compute_share must be a number between 0 and 1, such as 0.03, not {shown(share)}")
        if self.until is not None and self.until < self.first:
            raise GrowthError(
                f"until is {self.until} and first is {self.first}: nothing would grow, as no growth begins after until "
                "or before first; let until be at least first"
            )
        _check_whole("seed", self.seed, 0)
        if self.timeout == 0:
            raise GrowthError("timeout must be more than 0 seconds")
        for name in _FRACTIONS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise GrowthError(f"{name} must be a number, at least 0, not {shown(value)}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                allowed = " or ".join(map(repr, choices))
                raise GrowthError(f"{name} must be {allowed}, not {shown(getattr(self, name))}")
        if isinstance(self.widths, str) or not isinstance(self.widths, Sequence) or not self.widths:
            raise GrowthError(f"widths must be numbers of hidden units, such as (4, 16), not {shown(self.widths)}")
        for width in self.widths:
            _check_whole("each of widths", width, 1)
        object.__setattr__(self, "widths", tuple(sorted(set(self.widths))))
        if not callable(self.family) and self.family not in ("bottleneck", "gated_mlp"):
            raise GrowthError(
                f"family must be 'bottleneck', 'gated_mlp', or a function of a layer and a width that returns a "
                f"blueprint, not {shown(self.family)}"
            )

    def draw(self, number: int) -> int:
        """The seed of the probe of that number."""
        return (self.seed * 1_000_003 + number) % 2**62

    @classmethod
    def names(cls) -> frozenset[str]:
        """Those of all constants."""
        return frozenset(each.name for each in fields(cls))


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise GrowthError(f"{name} must be a whole number, at least {least}, not {shown(value)}")
