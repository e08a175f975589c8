"""What `get_model_stats()` tells of layers and seeds, and the number and the name by which every report has a layer."""

from __future__ import annotations

import asyncio
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper import Blueprint, LinearRamp
from tests.core.grown import grown, saved
from tests.core.seeds import GatedPlatform, blueprint, load
from tests.kernel_shelf import KernelShelf
from tests.models import mlp


def seeds(model: esper.MorphableModel, layer: str = "0") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = model.get_model_stats()["layers"][layer]["seeds"]
    return found


def numbers(model: esper.MorphableModel) -> list[tuple[int, str]]:
    return [(layer.layer_id, layer.layer_name) for layer in model.kasmina_layers.values()]


def test_each_seed_has_its_state_its_kernel_and_its_share_in_the_output(shelf: KernelShelf) -> None:
    platform = GatedPlatform(shelf)
    model = esper.wrap(mlp(8, 6, 4), seeds_per_layer=5, platform=platform)  # type: ignore[arg-type]  # as much of one as it needs
    dormant = {"state": "DORMANT", "alpha": 0.0, "kernel": None, "error_count": 0, "reason": ""}
    assert seeds(model) == [dormant] * 5
    assert float(model.kasmina_layers["0"].state.alpha_blend[0]) == 1.0, "what a kernel that comes would get"

    first, last, held = (shelf.put(blueprint(seed=number)).id for number in (1, 2, 3))
    load(model, "0", 0, first, alpha=0.25)
    load(model, "0", 1, last, alpha=0.5)
    model.fossilize("0", 1)
    assert asyncio.run(model.load_kernel("0", 2, "ab" * 32)) is False
    gate = platform.hold(held)
    future = model.request_kernel("0", 3, held, alpha=0.75)
    platform.wait_until_held()
    active, fossil, failed, loading, untouched = seeds(model)
    gate.set()
    assert active == {"state": "ACTIVE", "alpha": 0.25, "kernel": first, "error_count": 0, "reason": ""}
    assert fossil == {"state": "FOSSILIZED", "alpha": 0.5, "kernel": last, "error_count": 0, "reason": ""}
    assert (failed["state"], failed["alpha"], failed["kernel"]) == ("ERROR_RECOVERY", 0.0, None)
    assert failed["error_count"] == 1
    assert "ab" * 6 in failed["reason"]
    assert loading == {**dormant, "state": "LOADING"}
    assert untouched == dormant

    assert future.result(30)
    model(torch.randn(2, 8))
    assert (seeds(model)[3]["state"], seeds(model)[3]["alpha"]) == ("ACTIVE", 0.75)
    model.unload_kernel("0", 0)
    assert seeds(model)[0] == dormant


def test_a_kernel_in_force_has_its_share_while_its_replacement_loads(shelf: KernelShelf) -> None:
    platform = GatedPlatform(shelf)
    model = esper.wrap(mlp(8, 6, 4), seeds_per_layer=1, platform=platform)  # type: ignore[arg-type]  # as above
    one, two = (shelf.put(blueprint(seed=number)).id for number in (1, 2))
    load(model, "0", 0, one, alpha=0.5)
    gate = platform.hold(two)
    future = model.request_kernel("0", 0, two)
    platform.wait_until_held()
    during = seeds(model)[0]
    gate.set()
    assert (during["state"], during["alpha"], during["kernel"]) == ("LOADING", 0.5, one)
    assert future.result(30)


def test_a_folded_fossil_and_a_moving_alpha(shelf: KernelShelf) -> None:
    model = esper.wrap(mlp(8, 6, 4), seeds_per_layer=2, platform=shelf.platform)
    affine = shelf.put(esper.Blueprint.low_rank(8, 6, rank=2, start="kaiming", seed=1)).id
    load(model, "0", 0, affine, alpha=0.5)
    model.fossilize("0", 0)
    model(torch.randn(2, 8))
    folded = seeds(model)[0]
    assert (folded["state"], folded["alpha"], folded["kernel"]) == ("FOSSILIZED", 0.5, None)
    load(model, "0", 1, shelf.put(blueprint()).id, alpha=LinearRamp(0.0, 1.0, steps=4), trainable=True)
    shares = []
    for _ in range(4):
        shares.append(seeds(model)[1]["alpha"])
        model(torch.randn(2, 8))
    assert shares == [0.0, 0.0, 0.25, 0.5], "the first forward runs at the schedule's start"


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out, self.body = nn.Linear(6, 3), nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out(self.body(x))
        return y


@pytest.mark.parametrize("mode", ["fx", "module"])
def test_layers_are_numbered_from_0_in_the_order_of_the_sites(shelf: KernelShelf, mode: Any) -> None:
    model = esper.wrap(Named(), platform=shelf.platform, mode=mode)
    assert numbers(model) == [(0, "out"), (1, "body.0"), (2, "body.2")]
    layers = model.get_model_stats()["layers"]
    assert [(stats["layer_id"], stats["layer_name"]) for stats in layers.values()] == numbers(model)
    few = esper.wrap(Named(), "body.*", platform=shelf.platform, mode=mode)
    assert numbers(few) == [(0, "body.0"), (1, "body.2")]
    for twin in (copy.deepcopy(few), pickle.loads(pickle.dumps(few))):
        assert numbers(twin) == numbers(few)
    alone = copy.deepcopy(few.kasmina_layers["body.2"])
    assert (alone.layer_id, alone.layer_name) == (1, "body.2")


def test_a_checkpoint_and_a_transition_go_by_name(shelf: KernelShelf) -> None:
    state = saved(grown(shelf))
    assert any(key.startswith("_esper.0:0.") for key in state), "as in every checkpoint so far"
    model = esper.wrap(mlp(8, 6, 4), seeds_per_layer=3, platform=shelf.platform, commit="manual")
    model.load_state_dict(state)
    model.unload_kernel("0", 2)
    model.request_kernel("2", 0, shelf.put(blueprint(6, 4)).id).result(30)
    assert sorted((each.layer_id, each.layer) for each in model.commit()) == [(0, "0"), (1, "2")]


def test_the_layer_shows_its_kernels_and_its_fossils(shelf: KernelShelf) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    assert "(0): KasminaLayer(in_features=8, out_features=6, bias=True, num_seeds=4, active_seeds=0)" in repr(model)
    affine, other = shelf.put(Blueprint.affine(8, 6)).id, shelf.put(blueprint()).id
    load(model, "0", 0, affine)
    load(model, "0", 1, other)
    assert "num_seeds=4, active_seeds=2)" in repr(model)
    assert model.fossilize("0", 0)  # which the weight takes in
    assert "num_seeds=4, active_seeds=1, fossilized_seeds=1)" in repr(model)
    assert model.fossilize("0", 1)  # which stays a kernel
    assert "num_seeds=4, active_seeds=0, fossilized_seeds=2)" in repr(model)
    assert model.get_model_stats()["layers"]["0"]["active_seeds"] == 0
