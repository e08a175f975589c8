"""What a layer tells about itself and its seeds: host memory is read, never a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.execution.kasmina_layer import KasminaLayer

__all__ = ["layer_stats", "seed_stats"]


def layer_stats(layer: KasminaLayer) -> dict[str, Any]:
    """See `KasminaLayer.get_layer_stats`."""
    telemetry = layer.runtime.telemetry
    return {
        "layer_id": layer.layer_id,
        "layer_name": layer.layer_name,
        "num_seeds": layer.num_seeds,
        "active_seeds": len(layer.state.active_seeds()),
        "error_seeds": len(layer.state.error_seeds()),
        "execution_count": telemetry.executions(layer.site) if telemetry else 0,
        "avg_latency_μs": telemetry.latency_μs(layer.site) if telemetry else 0.0,
        **layer.kernel_cache.get_cache_stats(),
        "seeds": [seed_stats(layer, seed) for seed in range(layer.num_seeds)],
    }


def seed_stats(layer: KasminaLayer, seed: int) -> dict[str, Any]:
    """`state` and `alpha` as they are in force: a seed without a kernel has a share of 0, whatever its next one gets.

    `kernel` is the id of the artifact that runs; None without one, and for a fossil that the layer's own weight
    has taken in. `error_count` counts the failures so far, and `reason` is why the last load failed, "" if it did not.
    """
    state, in_force = layer.state, layer.state.in_force(seed)
    return {
        "state": state.lifecycle(seed).name,
        "alpha": state.alpha(seed) if in_force else 0.0,
        "kernel": layer.kernel_in_force(seed),
        "error_count": state.errors(seed),
        "reason": layer.seed_errors.get(seed, ""),
    }
