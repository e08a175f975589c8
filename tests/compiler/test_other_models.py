"""Compiled models beside other wrapped models: what happens to one is no business of another."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from tests.compiler.agreement import load, put
from tests.kernel_shelf import KernelShelf

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Sliced(nn.Module):
    """A model that takes a slice of its list of layers in each forward, as those of `transformers` do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = layer(x).tanh()
        return x


class Exchanging(nn.Module):
    """A model that exchanges a layer of its own in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        self.first = self.spare
        return y


class Loss(nn.Module):
    """A model with a second way to enter it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))

    def loss(self, x: Tensor) -> Tensor:
        return self(x).square().mean()  # type: ignore[no-any-return]  # torch leaves calls untyped


def _options(backend: str) -> dict[str, Any]:
    return {"backend": backend, "options": {"inner": "eager"}} if backend == "esper" else {"backend": backend}


@pytest.mark.parametrize("backend", ["esper", "eager"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_no_recompile_where_another_model_is_wrapped_or_goes(shelf: KernelShelf, wrapped: bool, backend: str) -> None:
    esper.wrap(Sliced(), platform=shelf.platform)
    model = esper.wrap(Sliced(), platform=shelf.platform) if wrapped else Sliced()
    run, x = torch.compile(model, **_options(backend)), torch.randn(2, 4)
    y = run(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = esper.wrap(Sliced(), platform=shelf.platform)
        torch.testing.assert_close(run(x), y)
        del other
        gc.collect()
        torch.testing.assert_close(run(x), y)


def test_a_layer_exchanged_by_a_compiled_forward(shelf: KernelShelf) -> None:
    model = esper.wrap(Exchanging(), target_layers=["first"], platform=shelf.platform)
    spare, x = model.spare, torch.randn(2, 4)
    run = torch.compile(model, backend="esper", options={"inner": "eager"})
    run(x)
    torch.testing.assert_close(run(x), torch.nn.functional.linear(x, spare.weight, spare.bias))
    assert model.kasmina_layers["first"].weight is spare.weight


@pytest.mark.parametrize("method", ["forward", "loss"])
def test_a_layer_exchanged_before_a_compiled_forward_has_its_kernels_in_that_forward(
    shelf: KernelShelf, method: str
) -> None:
    model: Any = esper.wrap(Loss(), platform=shelf.platform)
    load(model, "layer", 0, put(shelf, 4, 4))
    run = torch.compile(model if method == "forward" else model.loss, backend="esper", options={"inner": "eager"})
    x = torch.randn(2, 4)
    run(x)
    for _ in range(2):
        model.layer = nn.Linear(4, 4)
        first, second = run(x), run(x)
        torch.testing.assert_close(first, second)
        torch.testing.assert_close(first, getattr(model, method)(x))
    assert model.layer is model.kasmina_layers["layer"]
