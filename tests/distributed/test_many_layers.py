"""Calls for many layers where ranks agree, on one rank; on several: `test_agreed_commits`."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import distributed as dist

import esper
from esper import Blueprint
from esper.errors import EsperError
from tests.compiler.agreement import put
from tests.kernel_shelf import KernelShelf
from tests.models import mlp


@pytest.fixture
def model(shelf: KernelShelf) -> Iterator[esper.MorphableModel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform, process_group=dist.group.WORLD)
        yield model
        assert model.ranks is not None
        model.ranks.close()
    finally:
        dist.destroy_process_group()


def test_calls_for_all_layers_are_agreed_on(model: esper.MorphableModel, shelf: KernelShelf) -> None:
    kernels = {"0": put(shelf), "2": put(shelf, 6, 4)}
    layers = list(model.kasmina_layers.values())

    def train() -> None:
        model(torch.randn(3, 8)).sum().backward()

    assert model.request_kernels(None, kernels, alpha=0.5).result(60)
    train()
    assert [layer.kernel_in_force(0) for layer in layers] == list(kernels.values())
    model.set_alphas(None, 0.25)
    assert model.unload_kernels("2") == ["2"]
    end = time.monotonic() + 60
    while layers[1].kernel_in_force(0) is not None:
        assert time.monotonic() < end
        train()
    assert layers[0].state.alpha(0) == 0.25


def test_others_are_not_led_to_blueprints(model: esper.MorphableModel) -> None:
    assert model.ranks is not None
    with model.ranks.leading(), pytest.raises(EsperError, match="compile the blueprints first"):
        model.request_kernels("0", Blueprint.low_rank(8, 6, rank=2))
    assert model.kasmina_layers["0"].state.lifecycle(0).name == "DORMANT"


def test_one_layer_is_agreed_on(model: esper.MorphableModel, shelf: KernelShelf) -> None:
    assert model.request_kernels("0", put(shelf), alpha=0.5).result(60)
    model(torch.randn(3, 8)).sum().backward()
    assert model.kasmina_layers["0"].state.active_seeds() == (0,)
