"""The record of how a model was wrapped, which every wrapped model has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from torch import nn

from esper.core.errors import WrapError
from esper.core.remote_control import default_platform
from esper.core.reports.overview import html_overview, seed_scalars
from esper.core.sites.targets import Selection
from esper.errors import shown
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.plans.runtime import CommitMode, Runtime
from esper.execution.seeds.active_kernels import ActiveKernels

if TYPE_CHECKING:
    from esper.configs import EsperConfig
    from esper.platform import Platform

__all__ = ["Mode", "WrapOptions", "WrappedModel", "Wrapping"]

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

    @classmethod
    def read(
        cls,
        seeds_per_layer: int,
        cache_size_mb: float | None,
        telemetry_enabled: bool | None,
        mode: Mode,
        commit: CommitMode,
        platform: Platform | None,
        config: EsperConfig | None,
    ) -> WrapOptions:
        """What was asked for; for what is None, the word of `config`, or else of the platform's settings.

        Raises :class:`WrapError` for what is no platform, `TypeError` for what is no settings, and `ValueError`.
        """
        _check(telemetry_enabled, platform, config)
        if platform is None and config is not None:
            platform = cast("Platform", default_platform(config))
        if cache_size_mb is None or telemetry_enabled is None:
            settings = config or getattr(platform, "config", None) or _settings()
            cache_size_mb = settings.execution.cache_size_mb if cache_size_mb is None else cache_size_mb
            telemetry_enabled = settings.telemetry.enabled if telemetry_enabled is None else telemetry_enabled
        return cls(seeds_per_layer, cache_size_mb, telemetry_enabled, mode, commit, platform)


class _Average(Protocol):
    """What ties the copy in an `AveragedModel` to its original."""

    def catch_up(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Wrapping:
    """What a wrapped model has besides what its host has."""

    host: nn.Module
    bank: ActiveKernels
    selection: Selection
    options: WrapOptions
    again: Callable[..., Any]
    """Wraps a host as this one was: `assemble`, which copies and pickles need."""
    average: _Average | None = None


class WrappedModel(nn.Module):
    """What there is to know of a wrapped model. What can be done with it, `MorphableModel` says."""

    _wrapping: Wrapping
    _root_site: KasminaLayer | None
    """The layer with seeds that the model is itself, if it is one."""
    runtime: Runtime
    kasmina_layers: Mapping[str, KasminaLayer]

    def scalars(self, prefix: str = "esper/") -> dict[str, float]:
        """Numbers for a logger: how many seeds are active, loading, fossilized and in error, and of each seed in use
        its state (the number of its :class:`SeedLifecycleState`), alpha, errors and latency in microseconds, under
        names such as `esper/<layer>/<seed>/alpha`. No device is read.
        """
        return seed_scalars(self.kasmina_layers, prefix)

    def _repr_html_(self) -> str:
        """The seeds in use, as notebooks show the model."""
        return html_overview(type(self).__name__, self.kasmina_layers)

    def retrace(self) -> None:
        """Trace the model anew where its next calls need it."""
        raise NotImplementedError


def _check(telemetry_enabled: object, platform: object, config: object) -> None:
    if telemetry_enabled is not None and not isinstance(telemetry_enabled, bool):
        raise ValueError(f"telemetry_enabled must be True, False or None, not {shown(telemetry_enabled)}")
    if config is not None:
        from esper.configs import checked_settings  # as below

        checked_settings(config)
    needed = ("kernel_source",) if telemetry_enabled is False else ("kernel_source", "oona")
    missing = [name for name in needed if not hasattr(platform, name)]
    if platform is not None and missing:
        raise WrapError(
            "platform must be what esper.Platform.embedded() or esper.Platform.connect() returns, not "
            f"{shown(platform)}, which has no `{missing[0]}`; settings are passed as config=..."
        )


def _settings() -> EsperConfig:
    from esper.configs import load_config  # with pydantic's settings, which `import esper` does without

    return load_config()
