"""Esper: PyTorch models that grow while they train.

`wrap` plants dormant seeds at a model's linear layers, `torch.compile(model, backend="esper")` compiles them away, and
kernels, compiled from blueprints by a :class:`Platform`, are loaded into the running, training model.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from esper.artifacts import Blueprint
from esper.compiler.attachment import attach_from
from esper.core.baking import bake
from esper.core.model_wrapper import MorphableModel, unwrap, wrap
from esper.core.regions import compile_blocks
from esper.core.remote_control import ListeningPlatform, set_default_platform
from esper.errors import EsperError
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.kernel_cache import KernelCache
from esper.execution.kernels.service_locator import TelemetrySink, set_defaults
from esper.execution.lifecycle import SeedLifecycleState, Transition
from esper.execution.plans.alpha import CosineRamp, LinearRamp
from esper.execution.sources import KernelSource
from esper.execution.state_layout import KasminaStateLayout
from esper.logs import configure_logs
from esper.version import __version__ as __version__

if TYPE_CHECKING:
    from esper.configs import EsperConfig, load_config
    from esper.growth.grower import Grower
    from esper.platform import Platform

__all__ = [
    "Blueprint",
    "CosineRamp",
    "EsperConfig",
    "EsperError",
    "Grower",
    "KasminaLayer",
    "KasminaStateLayout",
    "KernelCache",
    "LinearRamp",
    "MorphableModel",
    "Platform",
    "SeedLifecycleState",
    "Transition",
    "bake",
    "compile_blocks",
    "load_config",
    "unwrap",
    "wrap",
]

_LATER = {
    "EsperConfig": "esper.configs",
    "Grower": "esper.growth.grower",
    "Platform": "esper.platform",
    "load_config": "esper.configs",
}


def __getattr__(name: str) -> Any:
    """The platform brings a database along, which a process that only compiles does not need, nor what decides."""
    if name in _LATER:
        import importlib

        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'esper' has no attribute {name!r}")


def _default_source() -> KernelSource:
    from esper.platform import default_platform

    return default_platform().kernel_source


def _default_sink() -> TelemetrySink | None:
    made = sys.modules.get("esper.platform")  # if nobody imported it, nobody made a platform
    opened = getattr(made, "opened_default_platform", None)  # nor has who is importing it just now
    platform = None if opened is None else opened()
    return None if platform is None else platform.oona


def _default_platform(config: EsperConfig | None = None) -> ListeningPlatform:
    from esper.platform import default_platform

    return default_platform(config)


configure_logs()
set_default_platform(_default_platform)
set_defaults(_default_source, _default_sink, attach_from)
