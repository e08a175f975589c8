"""Backward hooks on layers with kernels: what is computed with them of linear layers is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from tests.core.seeds import blueprint, load
from tests.kernel_shelf import KernelShelf
from tests.models import mlp


class PerSampleGradients:
    """Gradients of the linear layers' weights for each row, as privacy engines take them: by hooks on leaf modules."""

    def __init__(self, model: nn.Module) -> None:
        self.of: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._input_of(name))
                module.register_full_backward_hook(self._gradient_of(name))

    def _input_of(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._inputs[name] = inputs[0].detach()

        return hook

    def _gradient_of(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, to_input: Any, to_output: tuple[Tensor, ...]) -> None:
            self.of[name] = torch.einsum("no,ni->noi", to_output[0], self._inputs[name])

        return hook


def loss(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return model(x).square().sum()


@pytest.mark.parametrize("mode", ["module", "fx", "compiled"])
@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("start", ["kaiming", "identity"])
def test_per_sample_gradients_by_hooks(
    shelf: KernelShelf, start: str, isolate: bool, mode: Any, fresh_dynamo: None
) -> None:
    x = torch.randn(5, 8)
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform, mode="module" if mode == "compiled" else mode)
    gradients = PerSampleGradients(model)
    run = torch.compile(model, backend="esper", options={"inner": "eager"}) if mode == "compiled" else model
    for grown in (False, True, False):
        if grown:
            load(model, "0", 0, shelf.put(blueprint(8, 6, start=start)).id, alpha=0.5, trainable=True, isolate=isolate)  # type: ignore[arg-type]  # one of the two
            load(model, "2", 1, shelf.put(blueprint(6, 4, start=start)).id, alpha=0.3)  # type: ignore[arg-type]  # as above
        loss(run, x).backward()
        assert sorted(gradients.of) == ["0", "2"]
        for row in range(5):
            model.zero_grad()
            kept = {name: each[row] for name, each in gradients.of.items()}
            loss(run, x[row : row + 1]).backward()
            for name, each in kept.items():
                torch.testing.assert_close(each, model.get_submodule(name).weight.grad)  # type: ignore[union-attr]  # a parameter
            loss(run, x).backward()  # the rows' gradients again
        if grown:
            assert model.unload_kernel("0", 0)
            assert model.unload_kernel("2", 1)
        model.zero_grad()


@pytest.mark.parametrize("mode", ["module", "fx"])
def test_each_hook_is_called_once_with_the_layer(shelf: KernelShelf, mode: Any) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform, mode=mode)
    load(model, "0", 0, shelf.put(blueprint(8, 6, start="kaiming")).id, alpha=0.5)
    layer, seen = model.kasmina_layers["0"], []
    layer.register_full_backward_pre_hook(lambda module, _: seen.append(("before", module)))
    handle = layer.register_full_backward_hook(lambda module, *_: seen.append(("after", module)))
    everywhere = nn.modules.module.register_module_full_backward_hook(lambda module, *_: seen.append(("any", module)))
    try:
        loss(model, torch.randn(5, 8, requires_grad=True)).backward()
    finally:
        everywhere.remove()
    of_layer = [kind for kind, module in seen if module is layer]
    assert sorted(of_layer) == ["after", "any", "before"]
    handle.remove()
    seen.clear()
    loss(model, torch.randn(5, 8)).backward()
    assert seen == [("before", layer)]
