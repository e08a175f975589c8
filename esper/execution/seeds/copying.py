"""The seeds of a layer as they travel, for copies and pickles of layers and of whole models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from esper.execution.kernels.loaded_kernel import LoadedKernel
from esper.execution.lifecycle import SeedLifecycleState, after_cancelled_load
from esper.execution.plans.alpha import SavedRamp
from esper.execution.plans.plan import SeedPlan
from esper.execution.plans.runtime import Runtime
from esper.execution.seeds.control import SeedControl
from esper.execution.seeds.restoring import RestoredSeed
from esper.execution.seeds.seed import SeedLayer

__all__ = ["ControlledLayer", "LayerSeeds", "PackedLayer", "copy_schedules", "restore_seeds"]


class ControlledLayer(SeedLayer, Protocol):
    """A layer with what its seeds are controlled by, which is a `KasminaLayer`."""

    runtime: Runtime
    control: SeedControl


@dataclass(frozen=True, slots=True)
class LayerSeeds:
    """The seeds of one layer: the kernels in force as (seed, kernel, isolate), and what is known of every seed."""

    kernels: tuple[tuple[int, LoadedKernel, bool], ...]
    state: dict[str, Tensor]
    errors: dict[int, str]
    ramps: dict[int, SavedRamp | None]
    """What moved a seed's alpha, as far as that is data."""

    def __reduce__(self) -> Any:
        """With the state as numbers: memory that a spawned process shares must outlive the pickle; copies do not."""
        numbers = {field: (values.tolist(), values.dtype) for field, values in self.state.items()}
        return LayerSeeds.of_numbers, (self.kernels, numbers, self.errors, self.ramps)

    @classmethod
    def of_numbers(cls, kernels: Any, numbers: Mapping[str, tuple[Any, torch.dtype]], errors: Any, ramps: Any) -> Self:
        """What :meth:`__reduce__` has taken apart."""
        state = {field: torch.tensor(values, dtype=dtype) for field, (values, dtype) in numbers.items()}
        return cls(kernels, state, errors, ramps)

    @classmethod
    def of(cls, layer: ControlledLayer) -> LayerSeeds:
        """Those of `layer`; what is staged or under way is left out."""
        state = layer.state.state_dict()
        loading = state["lifecycle_states"] == SeedLifecycleState.LOADING
        for seed in torch.nonzero(loading).flatten().tolist():
            state["lifecycle_states"][seed] = int(after_cancelled_load(layer.state.in_force(seed)))
        seeds = layer.runtime.plan.sites.get(layer.site, ())
        return cls(
            tuple((each.seed, each.kernel, each.isolate) for each in seeds),
            state,
            dict(layer.seed_errors),
            {
                each.seed: SavedRamp.of(schedule)
                for each in seeds
                if (schedule := layer.runtime.schedule(each.alpha_index)) is not None
            },
        )


def restore_seeds(layers: Mapping[str, ControlledLayer], seeds: Mapping[str, LayerSeeds], *, tell: bool) -> None:
    """Let new `layers` of one model have `seeds`, by name; `tell` logs the schedules that did not come along."""
    restored = []
    for name, given in seeds.items():
        layer = layers[name]
        for index, kernel, isolate in given.kernels:
            if kernel.device != layer.placement[0]:
                kernel.module.to(layer.placement[0])
            planned = SeedPlan(index, kernel, isolate, kernel.uses_host, layer.seeds[index].alpha_index)
            state = {field: values[index : index + 1] for field, values in given.state.items()}
            lost = tell and index in given.ramps
            restored.append(RestoredSeed(layer.seeds[index], planned, state, given.ramps.get(index), lost))
    if restored:
        every = [seed for layer in layers.values() for seed in layer.seeds]
        next(iter(layers.values())).control.restore(every, restored)
    for name, given in seeds.items():
        layers[name].state.load_state_dict(given.state)
        layers[name].seed_errors.update(given.errors)


def copy_schedules(old: Mapping[str, ControlledLayer], new: Mapping[str, ControlledLayer]) -> None:
    """Let the alphas of copies go on moving on the schedules of their originals, from the steps at which these are."""
    for name, layer in new.items():
        for each in layer.runtime.plan.sites.get(layer.site, ()):
            schedule = old[name].runtime.schedule(old[name].seeds[each.seed].alpha_index)
            if schedule is not None:
                alpha = layer.state.alpha(each.seed)
                layer.runtime.start_alpha(each.alpha_index, schedule.alpha, alpha, schedule.step)


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A layer as it is copied and pickled: as one that stands alone, without its kernel source and telemetry sink."""

    alone: Callable[..., Any]
    """Makes the layer again, of its host."""
    host: nn.Module
    options: dict[str, Any]
    seeds: LayerSeeds

    @classmethod
    def of(cls, layer: Any) -> PackedLayer:
        """`layer`, with its parameters and kernels, not copies of them."""
        options = {
            "layer_id": layer.layer_id,
            "layer_name": layer.layer_name,
            "num_seeds": layer.num_seeds,
            "cache_size_mb": layer.kernel_cache.max_cache_size_mb,
            "telemetry_enabled": layer.runtime.telemetry is not None,
            "commit": layer.runtime.commit_mode,
        }
        alone, more = layer._packing()
        return cls(alone, layer.as_host(), {**options, **more}, LayerSeeds.of(layer))

    def unpack(self, **outside: Any) -> Any:
        """A layer with these seeds; `outside` are its source and sink, the defaults if left out."""
        layer = self.alone(self.host, **self.options, **outside)
        restore_seeds({layer.layer_name: layer}, {layer.layer_name: self.seeds}, tell=not outside)
        return layer
