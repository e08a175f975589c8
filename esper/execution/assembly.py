"""The assembly of what the layers of one model share: of a wrapped model, or of one layer that stands alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from esper.execution.kernel_cache import KernelCache
from esper.execution.kernels.service_locator import AttachKernel, TelemetrySink
from esper.execution.plans import registry
from esper.execution.plans.model_link import ModelLink
from esper.execution.plans.runtime import CommitMode, Runtime
from esper.execution.seeds.active_kernels import ActiveKernels
from esper.execution.seeds.control import SeedControl
from esper.execution.seeds.seed import SeedLayer
from esper.execution.sources import KernelSource
from esper.execution.state_layout import KasminaStateLayout
from esper.execution.telemetry import Telemetry

__all__ = ["Assembly", "LayerParts"]

_KEPT_FOR_A_SEED = 16
"""How many kernels the cache has room for, so that those which take turns are kept: their bytes are the budget."""


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What one layer is given: its names and numbers, and what it shares with the others of its model."""

    layer_id: int
    layer_name: str
    site: int
    first_seed: int
    state: KasminaStateLayout
    kernel_cache: KernelCache
    runtime: Runtime
    runtime_tag: torch.Tensor
    control: SeedControl


@dataclass(frozen=True, slots=True)
class Assembly:
    """The runtime, cache and control of a model's layers."""

    runtime: Runtime
    tag: torch.Tensor
    """The runtime's, see `registry`."""
    cache: KernelCache
    control: SeedControl
    seeds_per_layer: int
    first_site: int

    @classmethod
    def of(
        cls,
        model: ModelLink[Any],
        *,
        layers: int,
        seeds_per_layer: int,
        device: torch.device,
        cache_size_mb: float,
        commit: CommitMode,
        telemetry_enabled: bool,
        source: KernelSource,
        sink: TelemetrySink | None,
        attach: AttachKernel | None,
    ) -> Assembly:
        """For so many layers. `cache_size_mb` is the budget for each of them, and pooled."""
        seeds, sink = layers * seeds_per_layer, sink if telemetry_enabled else None
        state = KasminaStateLayout(seeds, device)
        telemetry = Telemetry(state, sink) if telemetry_enabled else None
        number, sites = registry.new_numbers(layers)
        runtime = Runtime(number, sites, state, model, telemetry, commit)
        registry.register(runtime)
        cache = KernelCache(cache_size_mb * max(layers, 1), max(128, _KEPT_FOR_A_SEED * seeds), source=source)
        control = SeedControl(runtime, source, attach, sink)
        return cls(runtime, registry.make_tag(number), cache, control, seeds_per_layer, sites.start)

    def parts(self, index: int, name: str, layer_id: int) -> LayerParts:
        """Those of the layer that is number `index` among the model's."""
        first = index * self.seeds_per_layer
        return LayerParts(
            layer_id=layer_id,
            layer_name=name,
            site=self.first_site + index,
            first_seed=first,
            state=self.runtime.state.view(first, first + self.seeds_per_layer, label=f"layer {name!r}"),
            kernel_cache=self.cache.view(name),
            runtime=self.runtime,
            runtime_tag=self.tag,
            control=self.control,
        )

    def complete(self, layers: Mapping[str, SeedLayer]) -> ActiveKernels:
        """The layers are there: begin to report on them; returns where their kernels are registered."""
        if self.runtime.telemetry is not None:
            self.runtime.telemetry.start()
        return ActiveKernels(self.runtime, self.control, layers)
