"""torch.distributed.checkpoint and its helpers for state dicts, in one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

import esper
from tests.core.seeds import blueprint, load, states
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

OWN = "_esper."


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 8)


def fresh(shelf: KernelShelf) -> esper.MorphableModel:
    return esper.wrap(mlp(8, 6, 4), platform=shelf.platform)


def trained(shelf: KernelShelf) -> tuple[esper.MorphableModel, torch.optim.Optimizer]:
    model = fresh(shelf)
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
    load(model, "0", 1, shelf.put(blueprint(seed=2)).id, alpha=0.25)
    load(model, "2", 0, shelf.put(blueprint(6, 4)).id, alpha=0.5)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def with_room_for_kernels(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """As docs/checkpoints.md has it."""
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    host = {key: value for key, value in state.items() if not key.startswith(OWN)}
    kernels = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]  # all are tensors
        for key, entry in saved.items()
        if key.startswith(OWN)
    }
    return {**host, **kernels}


def test_the_helpers_return_what_the_models_state_dict_holds(shelf: KernelShelf) -> None:
    model, optimizer = trained(shelf)
    for part in (model, nn.ModuleDict({"net": model}), nn.Sequential(nn.Identity(), nn.Sequential(model))):
        got, expected = get_model_state_dict(part), part.state_dict()
        assert list(got) == list(expected)
        assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert set(get_state_dict(model, optimizer)[0]) == set(model.state_dict())
    names = set(get_optimizer_state_dict(model, optimizer)["state"])
    assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    host = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    assert set(host) == set(model.state_dict()) - {n for n, p in model.named_parameters() if not p.requires_grad}


def test_a_layer_that_stands_alone(shelf: KernelShelf, x: torch.Tensor) -> None:
    layer = esper.KasminaLayer(0, 2, 8, 6, layer_name="alone", source=shelf.platform.kernel_source)
    whole = nn.Sequential(layer)
    assert layer.request_kernel(0, shelf.put(blueprint()).id, alpha=0.5).result(30)
    want = whole(x)
    assert list(get_model_state_dict(whole)) == list(whole.state_dict())
    again = nn.Sequential(esper.KasminaLayer(0, 2, 8, 6, layer_name="alone"))
    set_model_state_dict(again, dict(whole.state_dict()))
    assert torch.equal(again(x), want)


@pytest.mark.parametrize("full", [False, True])
def test_a_state_dict_is_set(shelf: KernelShelf, x: torch.Tensor, full: bool) -> None:
    model, _ = trained(shelf)
    options = StateDictOptions(full_state_dict=full)
    for other in (fresh(shelf), trained(shelf)[0]):
        set_model_state_dict(other, get_model_state_dict(model), options=options)
        assert torch.equal(other(x), model(x))
        assert states(other) == states(model)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_model_and_its_optimizer_are_set(shelf: KernelShelf, x: torch.Tensor, nested: bool, full: bool) -> None:
    options = StateDictOptions(full_state_dict=full)
    (model, optimizer), (other, others) = trained(shelf), trained(shelf)
    whole, another = (
        (nn.Sequential(nn.Identity(), model), nn.Sequential(nn.Identity(), other)) if nested else (model, other)
    )
    state, moments = copy.deepcopy(get_state_dict(whole, optimizer, options=options))
    set_state_dict(another, others, model_state_dict=state, optim_state_dict=moments, options=options)
    for each, its in ((whole, optimizer), (another, others)):
        its.zero_grad()
        each(x).square().sum().backward()
        its.step()
    assert torch.equal(another(x), whole(x))
    assert list(another.named_children()) == [(name, child) for name, child in another._modules.items()]


@pytest.mark.parametrize("grown_first", [False, True])
def test_the_documented_pattern_brings_kernels_back(
    shelf: KernelShelf, x: torch.Tensor, tmp_path: Path, grown_first: bool
) -> None:
    model, _ = trained(shelf)
    model.set_alpha("0", 0, esper.LinearRamp(0.1, 0.9, 7))
    model(x)
    dcp.save(get_model_state_dict(model), checkpoint_id=tmp_path)
    again = trained(shelf)[0] if grown_first else fresh(shelf)
    state = with_room_for_kernels(get_model_state_dict(again), tmp_path)
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(again, state)
    assert states(again) == states(model)
    assert torch.equal(again(x), model(x))


def test_a_model_grown_alike_is_loaded_in_place(shelf: KernelShelf, x: torch.Tensor, tmp_path: Path) -> None:
    model, _ = trained(shelf)
    dcp.save({"model": model}, checkpoint_id=tmp_path / "whole")
    dcp.save(get_model_state_dict(model), checkpoint_id=tmp_path / "flat")
    for kind in ("whole", "flat"):
        again, _ = trained(shelf)
        again.set_alpha("0", 0, 0.123)  # of more digits than 0.5
        if kind == "whole":
            dcp.load({"model": again}, checkpoint_id=tmp_path / kind)
        else:
            state = get_model_state_dict(again)
            dcp.load(state, checkpoint_id=tmp_path / kind)
            set_model_state_dict(again, state)
        assert torch.equal(again(x), model(x))


def test_a_dormant_model_that_does_not_ask_for_kernels_is_told(
    shelf: KernelShelf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = trained(shelf)
    dcp.save(get_model_state_dict(model), checkpoint_id=tmp_path)
    again = fresh(shelf)
    state = get_model_state_dict(again)
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(again, state)
    assert "docs/checkpoints.md" in caplog.text


def test_other_kernels_than_the_checkpoints_are_an_error(shelf: KernelShelf, tmp_path: Path) -> None:
    model, _ = trained(shelf)
    dcp.save(get_model_state_dict(model), checkpoint_id=tmp_path)
    again = fresh(shelf)
    load(again, "0", 0, shelf.put(blueprint()).id)
    with pytest.raises(dcp.api.CheckpointException, match=r"_esper\.seeds"):
        dcp.load(get_model_state_dict(again), checkpoint_id=tmp_path)
