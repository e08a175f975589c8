"""What Dynamo checks at every call of a compiled wrapped model: hardly more than of a plain one, and enough."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import esper
from esper import Blueprint
from tests.kernel_shelf import KernelShelf

pytestmark = pytest.mark.usefixtures("counted_dynamo")


class Stack(nn.Sequential):
    """Layers in a row, of a class that is not torch's own."""


def guards(layers: int, *, wrapped: bool) -> int:
    """How many guards there are on a model of that many layers."""
    torch._dynamo.reset()
    counted: list[int] = []

    def count(entries: list[object]) -> list[bool]:
        counted.append(len(entries))
        return [True] * len(entries)

    model: nn.Module = Stack(*(nn.Linear(8, 8) for _ in range(layers)))
    if wrapped:
        run = torch.compile(esper.wrap(model), backend="esper", options={"inner": "eager", "guard_filter_fn": count})
    else:
        run = torch.compile(model, backend="eager", options={"guard_filter_fn": count})
    run(torch.randn(3, 8))
    (number,) = counted
    return number


def test_a_site_is_guarded_by_its_tag_and_nothing_else() -> None:
    of_a_layer = guards(4, wrapped=False) - guards(3, wrapped=False)
    of_a_site = guards(4, wrapped=True) - guards(3, wrapped=True)
    assert of_a_site == of_a_layer + 1


def test_a_layer_that_stands_alone_is_not_taken_for_a_site(shelf: KernelShelf) -> None:
    def call(layer: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        return y

    run = torch.compile(call, backend="esper", options={"inner": "eager"})
    x = torch.randn(3, 8)
    model = esper.wrap(nn.Sequential(nn.Linear(8, 6)), platform=shelf.platform)
    alone = esper.KasminaLayer(0, 4, 8, 6, source=shelf.platform.kernel_source)
    for layer in (model.kasmina_layers["0"], alone):
        torch.testing.assert_close(run(layer, x), layer(x))
    assert counters["stats"]["unique_graphs"] == 2
    kernel = shelf.put(Blueprint.bottleneck(8, 6, rank=2, start="kaiming", seed=1)).id
    before = run(alone, x)
    assert alone.request_kernel(0, kernel).result(100)
    after = run(alone, x)  # where a forward of the layer begins, and the kernel comes into force
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, alone(x))
