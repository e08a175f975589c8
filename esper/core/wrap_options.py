"""How a model was wrapped: what `esper.wrap` was given besides the model and the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from esper.execution.runtime import CommitMode

if TYPE_CHECKING:
    from esper.configs import EsperConfig
    from esper.platform import Platform

__all__ = ["Mode", "WrapOptions"]

Mode = Literal["fx", "module"]


@dataclass(frozen=True, slots=True)
class WrapOptions:
    """The arguments of :func:`esper.wrap` of these names; they have been checked."""

    seeds_per_layer: int
    cache_size_mb: float
    telemetry_enabled: bool
    mode: Mode
    commit: CommitMode
    platform: Platform | None = None
    config: EsperConfig | None = None
