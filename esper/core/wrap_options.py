"""How a model was wrapped: what `esper.wrap` was given besides the model and the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from esper.core.listening import default_platform
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
        """What was asked for; for what is None, the word of `config`, or else of the platform's settings."""
        if platform is None and config is not None:
            platform = cast("Platform", default_platform(config))
        if cache_size_mb is None or telemetry_enabled is None:
            settings = config or getattr(platform, "config", None) or _settings()
            cache_size_mb = settings.execution.cache_size_mb if cache_size_mb is None else cache_size_mb
            telemetry_enabled = settings.telemetry.enabled if telemetry_enabled is None else telemetry_enabled
        return cls(seeds_per_layer, cache_size_mb, telemetry_enabled, mode, commit, platform)


def _settings() -> EsperConfig:
    from esper.configs import load_config  # with pydantic's settings, which `import esper` does without

    return load_config()
