"""A wrapped model with kernels, its checkpoint, and a fresh model to load it into."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import esper
from tests.core.seeds import RecordingSink, blueprint, load
from tests.core.training import through_a_file
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

__all__ = ["apart", "grown", "saved"]


def grown(shelf: KernelShelf, **options: Any) -> esper.MorphableModel:
    """A model with a trained kernel, a frozen isolated one and a fossil."""
    model = esper.wrap(mlp(8, 6, 4), seeds_per_layer=3, platform=shelf.platform, **options)
    load(model, "0", 0, shelf.put(blueprint(8, 6)).id, alpha=0.3, trainable=True)
    load(model, "0", 2, shelf.put(blueprint(8, 6, start="identity", seed=4)).id, alpha=0.6, isolate=True)
    load(model, "2", 1, shelf.put(blueprint(6, 4)).id, alpha=0.9, trainable=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
    assert model.fossilize("2", 1)
    model.commit()
    return model


def saved(model: nn.Module) -> dict[str, Any]:
    """The state dict after a round through a file, read as data only."""
    state: dict[str, Any] = through_a_file(model.state_dict())
    return state


def apart(**options: Any) -> esper.MorphableModel:
    """A fresh wrapped model that cannot reach any kernel."""

    class Nowhere:
        kernel_source = None
        oona = RecordingSink()

    return esper.wrap(mlp(8, 6, 4), platform=Nowhere(), **{"seeds_per_layer": 3, **options})  # type: ignore[arg-type]  # as much of a platform as is needed
