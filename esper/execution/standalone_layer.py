"""A `KasminaLayer` that is no part of a wrapped model: it counts and times its own calls, and can be copied."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from esper.execution.call_counter import CallCounter
from esper.execution.kernel_cache import KernelCache
from esper.execution.kernels import service_locator
from esper.execution.kernels.service_locator import TelemetrySink
from esper.execution.kernels.sources import KernelSource
from esper.execution.plans.runtime import CommitMode, Runtime
from esper.execution.seeds.active_kernels import BANK_NAME, KernelBank
from esper.execution.seeds.control import SeedControl
from esper.execution.seeds.copying import LayerSeeds, copy_schedules, restore_seeds
from esper.execution.state_layout import KasminaStateLayout
from esper.execution.telemetry import Telemetry

if TYPE_CHECKING:
    from esper.execution.kasmina_layer import KasminaLayer

__all__ = [
    "LayerMeter",
    "PackedLayer",
    "copy_layer",
    "equip",
    "pack_layer",
]


class LayerMeter:
    """Counts the calls of a layer that stands alone."""

    def __init__(self, layer: KasminaLayer) -> None:
        self.counter = CallCounter()
        self._layer = weakref.ref(layer)

    def sample(self, telemetry: Telemetry) -> None:
        """Time the layer's next call."""
        layer = self._layer()
        if layer is not None:
            layer.sample_next(telemetry)


def equip(
    layer: KasminaLayer,
    layer_id: int,
    num_seeds: int,
    cache_size_mb: float,
    telemetry_enabled: bool,
    commit: CommitMode,
    source: KernelSource | None = None,
    sink: TelemetrySink | None = None,
    layer_name: str = "",
) -> None:
    """Make a linear layer one that stands alone, with state, cache, plan, bank and telemetry of its own."""
    name = _checked_name(layer_id, layer_name)
    runtime = Runtime(KasminaStateLayout(num_seeds, layer.weight.device), commit)
    cache = KernelCache(cache_size_mb, max(128, num_seeds), source=source or service_locator.kernel_source())
    reports = (sink or service_locator.telemetry_sink()) if telemetry_enabled else None
    control = SeedControl(runtime, cache.source, service_locator.attach_kernel(), reports)
    site = runtime.reserve_sites(1)[0]
    meter = LayerMeter(layer) if telemetry_enabled else None
    layer._join(
        layer_id=layer_id,
        layer_name=name,
        site=site,
        first_seed=0,
        runtime=runtime,
        control=control,
        cache=cache.view(name),
        state=runtime.state,
        meter=meter,
        stands_alone=True,
    )
    this = weakref.ref(layer)
    runtime.is_training = lambda: (layer := this()) is None or layer.training
    runtime.entries.of_modules(lambda: (layer,) if (layer := this()) is not None else ())
    bank = KernelBank(runtime, control, {name: layer})
    runtime.on_commit = bank.sync
    runtime.on_schedule = bank.count_steps
    layer.add_module(BANK_NAME, bank)
    if meter is not None:
        runtime.telemetry = Telemetry({site: layer}, runtime.state, reports)
        runtime.telemetry.watch(meter, [site])
        runtime.telemetry.start()


def _checked_name(layer_id: object, layer_name: str) -> str:
    """The name of a layer that stands alone: its number, if it has no other."""
    if isinstance(layer_id, bool) or not isinstance(layer_id, int) or layer_id < 0:
        raise ValueError(
            f"layer_id must be a whole number, at least 0, not {layer_id!r}; a name is given as layer_name"
        )
    return layer_name or str(layer_id)


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A layer as it is copied and pickled: as one that stands alone, without its kernel source and telemetry sink."""

    linear: nn.Linear
    options: dict[str, Any]
    seeds: LayerSeeds

    def unpack(self, **outside: Any) -> KasminaLayer:
        """A layer with these seeds; `outside` are its source and sink, the defaults if left out."""
        from esper.execution.kasmina_layer import KasminaLayer

        layer = KasminaLayer.alone(self.linear, **self.options, **outside)
        restore_seeds({layer.layer_name: layer}, {layer.layer_name: self.seeds}, tell=not outside)
        return layer


def pack_layer(layer: KasminaLayer) -> PackedLayer:
    """`layer`, with its parameters and kernels, not copies of them."""
    options = {
        "layer_id": layer.layer_id,
        "layer_name": layer.layer_name,
        "num_seeds": layer.num_seeds,
        "cache_size_mb": layer.kernel_cache.max_cache_size_mb,
        "telemetry_enabled": layer.runtime.telemetry is not None,
        "commit": layer.runtime.commit_mode,
    }
    return PackedLayer(layer.as_linear(), options, LayerSeeds.of(layer))


def copy_layer(layer: KasminaLayer, memo: dict[int, Any]) -> KasminaLayer:
    """A deep copy that stands alone, with the source and the sink of `layer`."""
    packed = copy.deepcopy(pack_layer(layer), memo)
    twin = packed.unpack(source=layer.kernel_cache.source, sink=layer.control.sink)
    copy_schedules({layer.layer_name: layer}, {layer.layer_name: twin})
    return twin
