"""Checkpoints of grown models as safetensors files, which refuse tensors that share memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import esper
from tests.core.seeds import blueprint, load, outputs
from tests.kernel_shelf import KernelShelf

PLACES = [[("0", 0)], [("0", 0), ("2", 0)], [("0", 0), ("0", 1)], [("0", 1), ("2", 0), ("2", 3)]]


def _fresh(shelf: KernelShelf) -> esper.MorphableModel:
    torch.manual_seed(0)
    return esper.wrap(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), platform=shelf.platform)


def _grown(shelf: KernelShelf, places: list[tuple[str, int]], trainable: bool) -> esper.MorphableModel:
    model = _fresh(shelf)
    for layer, seed in places:
        load(model, layer, seed, shelf.put(blueprint(6, 6)).id, alpha=0.5, trainable=trainable)
    return model


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("places", PLACES)
def test_one_kernel_in_several_seeds_is_saved_and_loaded(
    shelf: KernelShelf, tmp_path: Path, places: list[tuple[str, int]], trainable: bool
) -> None:
    model, x = _grown(shelf, places, trainable), torch.randn(5, 6)
    with torch.no_grad():
        for number, parameter in enumerate(model.get_submodule("_esper").parameters()):
            parameter.add_(0.1 * (number + 1))  # each its own
    save_file(model.state_dict(), tmp_path / "state")
    fresh = _fresh(shelf)
    fresh.load_state_dict(load_file(tmp_path / "state"))
    torch.testing.assert_close(outputs(fresh, x), outputs(model, x))
    save_model(model, str(tmp_path / "model"))
    again = _grown(shelf, places, trainable)
    load_model(again, str(tmp_path / "model"))
    torch.testing.assert_close(outputs(again, x), outputs(model, x))


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_no_two_parameters_or_entries_of_a_grown_model_share_memory(shelf: KernelShelf, trainable: bool) -> None:
    model = _grown(shelf, PLACES[-1], trainable)
    for tensors in (list(model.parameters()), list(model.state_dict().values())):
        owners = [tensor.untyped_storage().data_ptr() for tensor in tensors]
        assert len(set(owners)) == len(owners)
