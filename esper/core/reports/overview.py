"""What the seeds of a wrapped model are doing: as numbers for loggers, and as a table for notebooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from esper.execution.lifecycle import SeedLifecycleState
from esper.notebook import html_table

if TYPE_CHECKING:
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.execution.seeds.seed import Seed

__all__ = ["html_overview", "seed_scalars"]

_SHOWN = 200
_COUNTED = {
    "active": SeedLifecycleState.ACTIVE,
    "loading": SeedLifecycleState.LOADING,
    "fossilized": SeedLifecycleState.FOSSILIZED,
    "in_error": SeedLifecycleState.ERROR_RECOVERY,
}


def seed_scalars(layers: Mapping[str, KasminaLayer], prefix: str) -> dict[str, float]:
    """See `MorphableModel.scalars`."""
    seeds = list(_in_use(layers))
    states = Counter(seed.lifecycle for _, layer, seed in seeds)
    scalars: dict[str, float] = {f"{prefix}seeds/{name}": states[state] for name, state in _COUNTED.items()}
    scalars[f"{prefix}seeds/errors"] = sum(seed.state.errors(seed.index) for _, layer, seed in seeds)
    scalars[f"{prefix}kernel_parameters"] = sum(
        parameter.numel() for _, layer, seed in seeds for parameter in layer.kernel_parameters(seed.index)
    )
    for name, layer, seed in seeds:
        at = f"{prefix}{name or 'model'}/{seed.index}"
        stats = seed.stats(layer.kernel_in_force(seed.index))
        scalars[f"{at}/state"] = int(seed.lifecycle)
        scalars[f"{at}/alpha"] = float(stats["alpha"])
        scalars[f"{at}/errors"] = int(stats["error_count"])
        scalars[f"{at}/latency_us"] = seed.state.latency_μs(seed.index)
    return scalars


def html_overview(kind: str, layers: Mapping[str, KasminaLayer]) -> str:
    """The seeds that are in use, as an HTML table for notebooks."""
    rows = []
    for name, layer, seed in _in_use(layers):
        stats = seed.stats(layer.kernel_in_force(seed.index))
        kernel = stats["kernel"] and stats["kernel"][:12]
        state, alpha = seed.lifecycle.name, f"{stats['alpha']:.3g}"
        rows.append((name or "the model", seed.index, state, alpha, kernel, stats["error_count"], stats["reason"]))
    count = sum(layer.num_seeds for layer in layers.values())
    title = f"{kind}: {count} seeds in {len(layers)} layers, {len(rows) or 'none'} in use"
    if len(rows) > _SHOWN:
        title += f", of which these are the first {_SHOWN}"
    return html_table(title, ("layer", "seed", "state", "alpha", "kernel", "errors", "reason"), rows[:_SHOWN])


def _in_use(layers: Mapping[str, KasminaLayer]) -> Iterator[tuple[str, KasminaLayer, Seed]]:
    """Seeds that are, or were, anything but dormant."""
    for name, layer in layers.items():
        for seed in layer.seeds:
            if seed.lifecycle is not SeedLifecycleState.DORMANT or seed.state.errors(seed.index):
                yield name, layer, seed
