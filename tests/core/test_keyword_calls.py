"""Models and layers that are called by keyword, as Hugging Face's are: dormant, grown, and shrunk again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from tests.core.seeds import blueprint, load
from tests.kernel_shelf import KernelShelf


class Inner(nn.Module):
    """A part of a model, which its own host calls by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 6)

    def forward(self, given: Tensor, scale: float = 1.0) -> Tensor:
        return self.first(input=given).tanh() * scale


class Called(nn.Module):
    """A model that is traced whole, or with `branches` in parts, since it asks what its input holds."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.inner, self.second, self.branches = Inner(), nn.Linear(6, 4), branches

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.branches and inputs.sum() > 1e6:
            return inputs
        output: Tensor = self.second(self.inner(given=inputs, scale=0.5))
        return output if labels is None else (output - labels).square().mean()


@pytest.mark.parametrize("mode", ["module", "fx", "compiled"])
@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("commit", ["auto", "manual"])
def test_calls_by_keyword_before_and_after_commits(
    shelf: KernelShelf, mode: Any, branches: bool, commit: Any, fresh_dynamo: None
) -> None:
    host = Called(branches)
    model = esper.wrap(host, mode="fx" if mode == "fx" else "module", platform=shelf.platform, commit=commit)
    run = torch.compile(model, backend="esper", options={"inner": "eager"}) if mode == "compiled" else model
    x, labels = torch.randn(3, 8), torch.randn(3, 4)
    plain = esper.bake(model)

    def agrees(expected: nn.Module) -> Tensor:
        output = run(inputs=x)
        torch.testing.assert_close(output, expected(x))
        torch.testing.assert_close(run(x, labels=labels), expected(x, labels))
        torch.testing.assert_close(run(labels=labels, inputs=x), expected(x, labels))
        return output

    dormant = agrees(plain)
    for layer, (wide, narrow) in {"inner.first": (8, 6), "second": (6, 4)}.items():
        load(model, layer, 0, shelf.put(blueprint(wide, narrow)).id, alpha=0.5)
        model.commit()
    grown = agrees(esper.bake(model))
    assert not torch.allclose(grown, dormant)
    for layer in ("inner.first", "second"):
        assert model.unload_kernel(layer, 0)
        model.commit()
    torch.testing.assert_close(agrees(plain), dormant)


@pytest.mark.parametrize("mode", ["module", "fx"])
def test_a_model_that_is_first_called_by_keyword_once_it_has_grown(shelf: KernelShelf, mode: Any) -> None:
    model = esper.wrap(Called(branches=False), mode=mode, platform=shelf.platform)
    assert model.request_kernel("second", 0, shelf.put(blueprint(6, 4)).id, alpha=0.5).result(30)
    x = torch.randn(3, 8)
    output = model(inputs=x)
    assert model.kasmina_layers["second"].state.in_force(0)
    torch.testing.assert_close(output, esper.bake(model)(x))


def test_a_model_that_is_a_linear_layer_itself(shelf: KernelShelf) -> None:
    model = esper.wrap(nn.Linear(8, 6), platform=shelf.platform)
    x = torch.randn(3, 8)
    for _ in range(2):
        torch.testing.assert_close(model(input=x), esper.bake(model)(x))
        load(model, next(iter(model.kasmina_layers)), 0, shelf.put(blueprint()).id, alpha=0.5)
