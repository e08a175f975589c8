"""Architectures that people train: no change of plan makes Dynamo trace again under `backend="esper"`.

Small configurations with random weights. Each model goes through the same life while compiled, dormant, with kernels
at several layers, at other alphas, and dormant again, with gradients and without; every output and gradient is compared
with the wrapped model's in eager mode.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.artifacts import Blueprint
from tests.architectures.models import ARCHITECTURES, Architecture
from tests.kernel_shelf import KernelShelf

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.timeout(600)]

_TRAINING, _EVALUATION, _INFERENCE = (True, True), (False, True), (False, False)
Run = Callable[..., Tensor]


def _outcome(run: Run, model: nn.Module, inputs: dict[str, Tensor], grad: bool) -> list[Tensor | None]:
    """The output, and the gradients of all parameters."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad):
        output = run(**inputs)
    if not grad:
        return [output]
    output.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    return [output.detach(), *gradients]


def _agrees(run: Run, model: nn.Module, architecture: Architecture, phases: tuple[tuple[bool, bool], ...]) -> Tensor:
    """Assert that compiled and eager agree in each phase, (training, with gradients); the last output."""
    outputs = []
    for training, grad in phases:
        model.train(training)
        ours = _outcome(run, model, architecture.inputs, grad)
        with torch.compiler.set_stance("force_eager"):
            expected = _outcome(lambda **given: architecture.output(model, **given), model, architecture.inputs, grad)
        assert [each is None for each in ours] == [each is None for each in expected]
        for actual, wanted in zip(ours, expected, strict=True):
            if wanted is not None:
                torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)
        outputs.append(ours[0])
    assert outputs[-1] is not None
    return outputs[-1]


def _chosen(model: esper.MorphableModel) -> list[str]:
    """Some layers of the model: the first, one in the middle and the last."""
    names = list(model.kasmina_layers)
    return list(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))


def _live(name: str, mode: Any, inner: str, shelf: KernelShelf, phases: tuple[tuple[bool, bool], ...]) -> None:
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]()
    model = esper.wrap(architecture.host, platform=shelf.platform, mode=mode)
    run = torch.compile(
        lambda **inputs: architecture.output(model, **inputs), backend="esper", options={"inner": inner}
    )
    dormant = _agrees(run, model, architecture, phases)
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = esper.wrap(ARCHITECTURES["LSTM"]().host, platform=shelf.platform)
        for index, layer in enumerate(_chosen(model)):
            site = model.kasmina_layers[layer]
            blueprint = Blueprint.bottleneck(site.input_dim, site.output_dim, rank=3, seed=index, start="kaiming")
            kernel = shelf.put(blueprint).id
            assert asyncio.run(model.load_kernel(layer, index, kernel, alpha=0.5, trainable=True)), site.seed_errors
        del other
        grown = _agrees(run, model, architecture, phases)
        assert not torch.allclose(grown, dormant, rtol=1e-3, atol=1e-3)
        for index, layer in enumerate(_chosen(model)):
            model.set_alpha(layer, index, 0.25)
        assert not torch.allclose(_agrees(run, model, architecture, phases), grown, rtol=1e-4, atol=1e-5)
        for index, layer in enumerate(_chosen(model)):
            assert model.unload_kernel(layer, index)
        torch.testing.assert_close(_agrees(run, model, architecture, phases), dormant)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_swap_makes_dynamo_trace_again(name: str, shelf: KernelShelf) -> None:
    _live(name, "module", "eager", shelf, (_TRAINING, _INFERENCE))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "nn.TransformerEncoder", "LSTM", "convolutions"])
def test_no_swap_in_a_traced_model_makes_dynamo_trace_again(name: str, shelf: KernelShelf) -> None:
    _live(name, "fx", "aot_eager", shelf, (_TRAINING, _EVALUATION, _INFERENCE))


@pytest.mark.slow
def test_no_swap_under_inductor_makes_dynamo_trace_again(shelf: KernelShelf) -> None:
    """Of one architecture: what Dynamo guards on does not depend on the inner compiler."""
    _live("LSTM", "module", "inductor", shelf, (_TRAINING, _INFERENCE))
