"""Calls for many layers, where ranks agree on one seed at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import distributed as dist

import esper
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


def test_several_layers_in_one_call_are_refused_and_nothing_is_changed(
    model: esper.MorphableModel, shelf: KernelShelf
) -> None:
    kernels = {"0": put(shelf), "2": put(shelf, 6, 4)}
    for call in (
        lambda: model.request_kernels(None, kernels),
        lambda: model.unload_kernels(),
        lambda: model.fossilize_kernels(),
        lambda: model.set_alphas(None, 0.5),
    ):
        with pytest.raises(EsperError, match="ranks agree on one seed at a time, and this is asked of 2"):
            call()
    assert not model.kasmina_layers["0"].state.active_seeds()
    assert model.kasmina_layers["0"].state.lifecycle(0).name == "DORMANT"


def test_one_layer_is_agreed_on(model: esper.MorphableModel, shelf: KernelShelf) -> None:
    assert model.request_kernels("0", put(shelf), alpha=0.5).result(60)
    model(torch.randn(3, 8)).sum().backward()
    assert model.kasmina_layers["0"].state.active_seeds() == (0,)
