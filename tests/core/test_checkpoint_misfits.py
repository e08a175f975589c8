"""Checkpoints that do not fit, or were damaged, raise and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import esper
from esper.errors import EsperError
from esper.execution.plans.runtime import CommitError
from esper.execution.seeds.checkpoint import CheckpointError
from tests.core.grown import apart, grown, saved
from tests.core.seeds import outputs, states
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

OWN = "_esper."


def _flip_byte(tensor: torch.Tensor, at: int) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[at] ^= 1
    return tensor


def _edit_index(state: dict[str, Any], old: bytes, new: bytes) -> dict[str, Any]:
    text = state[f"{OWN}seeds"].numpy().tobytes()
    assert old in text
    return {**state, f"{OWN}seeds": torch.frombuffer(bytearray(text.replace(old, new, 1)), dtype=torch.uint8)}


def _artifact(state: dict[str, Any]) -> str:
    return next(key for key in state if key.startswith(f"{OWN}artifact."))


def _parameter(state: dict[str, Any]) -> str:
    return next(key for key in state if key.startswith(f"{OWN}0:0."))


def _without(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != key}


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "corrupt artifact": (lambda s: {**s, _artifact(s): _flip_byte(s[_artifact(s)], -3)}, "hash to"),
    "no artifact": (lambda s: _without(s, _artifact(s)), "lacks artifact"),
    "artifact of another dtype": (lambda s: {**s, _artifact(s): s[_artifact(s)].float()}, "not bytes"),
    "no index": (lambda s: _without(s, f"{OWN}seeds"), "not the one that explains"),
    "index that is no JSON": (lambda s: {**s, f"{OWN}seeds": torch.zeros(9, dtype=torch.uint8)}, "damaged"),
    "index that is no tensor": (lambda s: {**s, f"{OWN}seeds": "text"}, "not bytes"),
    "other format": (lambda s: _edit_index(s, b'"format":1', b'"format":2'), "another version"),
    "unknown field": (lambda s: _edit_index(s, b'"trainable"', b'"executable"'), "damaged"),
    "alpha out of range": (lambda s: _edit_index(s, b'"alpha":0.', b'"alpha":7.'), "damaged"),
    "seed twice": (lambda s: _edit_index(s, b'"seed":2', b'"seed":0'), "twice"),
    "unknown layer": (lambda s: _edit_index(s, b'"layer":"2"', b'"layer":"1"'), r"does not fit|layer '1'"),
    "no parameter": (lambda s: _without(s, _parameter(s)), "is missing"),
    "parameter of another shape": (lambda s: {**s, _parameter(s): torch.ones(7)}, r"float32 \[7\]"),
    "parameter of whole numbers": (lambda s: {**s, _parameter(s): s[_parameter(s)].int()}, "floating-point"),
    "unknown entry": (lambda s: {**s, f"{OWN}surprise": torch.ones(1)}, "belong to no seed"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("dormant", [True, False])
def test_a_damaged_checkpoint_changes_nothing(shelf: KernelShelf, x: torch.Tensor, damage: str, dormant: bool) -> None:
    edit, message = DAMAGE[damage]
    state = edit(saved(grown(shelf)))
    target = apart() if dormant else grown(shelf)
    _assert_refused(target, state, message, x)


OTHERS: dict[str, tuple[Callable[[], esper.MorphableModel], str]] = {
    "other layers": (lambda: esper.wrap(mlp(8, 6, 4), "0", 3), r"layer '2', which has no seeds; there are '0'"),
    "fewer seeds": (lambda: esper.wrap(mlp(8, 6, 4), None, 2), r"seed 2 of layer '0', which has 2 seeds.*=3"),
    "other features": (lambda: esper.wrap(mlp(8, 5, 4), None, 3), r"maps 8 to 6 features, but the layer maps 8 to 5"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_model_changes_nothing(shelf: KernelShelf, x: torch.Tensor, other: str) -> None:
    make, message = OTHERS[other]
    _assert_refused(make(), saved(grown(shelf)), message, x)


def _assert_refused(model: esper.MorphableModel, state: dict[str, Any], message: str, x: torch.Tensor) -> None:
    before, plan, names = outputs(model, x), model.runtime.plan, list(model.state_dict())
    lifecycles, stats = states(model), model.get_model_stats()
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=message) as caught:
            model.load_state_dict(state, strict=strict)
        assert isinstance(caught.value, EsperError)
    assert torch.equal(outputs(model, x), before)
    assert model.runtime.plan is plan
    assert states(model) == lifecycles
    assert list(model.state_dict()) == names
    for name, layer in stats["layers"].items():
        after = model.kasmina_layers[name].get_layer_stats()
        assert after["active_seeds"] == layer["active_seeds"]
        assert after["cache_entries"] == layer["cache_entries"]


def test_a_host_part_that_does_not_fit_leaves_the_kernels(shelf: KernelShelf) -> None:
    fresh = apart()
    state = saved(grown(shelf))
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict({**state, "0.weight": torch.ones(2, 2)})
    assert fresh.runtime.plan.is_dormant
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict(_without(state, "0.weight"))
    assert fresh.runtime.plan.is_dormant


def test_kernels_are_not_loaded_during_a_backward(shelf: KernelShelf, x: torch.Tensor) -> None:
    state, fresh = saved(grown(shelf)), apart()
    raised = []

    def in_backward(gradient: torch.Tensor) -> None:
        with pytest.raises(CommitError):
            fresh.load_state_dict(state)
        raised.append(True)

    before = outputs(fresh, x)
    output = fresh(x)
    output.register_hook(in_backward)
    output.sum().backward()
    assert raised == [True]
    assert torch.equal(outputs(fresh, x), before)
