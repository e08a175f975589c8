"""What the tests of ordinary use share: a compiled model is compared with the same wrapped model in eager mode."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import esper
from esper.artifacts import Blueprint
from tests.kernel_shelf import KernelShelf

__all__ = [
    "Block",
    "Counting",
    "agrees",
    "agrees_through_a_swap",
    "compiled",
    "each_inner",
    "in_the_middle",
    "load",
    "middle",
    "outcome",
    "put",
    "unload",
]

Run = Callable[..., Tensor]
Context = Callable[[], AbstractContextManager[Any]]

each_inner = pytest.mark.parametrize("inner", ["eager", "aot_eager"])

in_the_middle: list[Callable[[], object]] = []


@torch.compiler.disable
def middle() -> None:
    """What breaks a host's graph, and does what a test has put into `in_the_middle`."""
    if in_the_middle:
        assert in_the_middle.pop()()


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x).relu()


class Counting:
    """An inner compiler that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: fx.GraphModule, inputs: object) -> Callable[..., Any]:
        self.graphs += 1
        forward: Callable[..., Any] = module.forward
        return forward


def put(
    shelf: KernelShelf, in_features: int = 8, out_features: int = 6, *, rank: int = 3, seed: int = 1, **options: Any
) -> str:
    """A kernel on the shelf that changes the output, unless `start` says otherwise."""
    options = {"start": "kaiming", **options}
    return shelf.put(Blueprint.bottleneck(in_features, out_features, rank=rank, seed=seed, **options)).id


def compiled(run: Any, inner: Any = "aot_eager", **options: Any) -> Any:
    """`run` under `backend="esper"`, by default without Inductor."""
    return torch.compile(run, backend="esper", options={"inner": inner}, **options)


def load(model: esper.MorphableModel, layer: str, seed: int, kernel: str, **options: Any) -> None:
    """Load a kernel that learns, and see that it is in force."""
    options = {"alpha": 0.5, "trainable": True, **options}
    assert asyncio.run(model.load_kernel(layer, seed, kernel, **options)), model.kasmina_layers[layer].seed_errors
    assert model.kasmina_layers[layer].state.lifecycle(seed).name == "ACTIVE"


def unload(model: esper.MorphableModel, layer: str, seed: int) -> None:
    """Unload a kernel and see that it is gone, which may take a compilation in the background."""
    assert model.unload_kernel(layer, seed)
    state, deadline = model.kasmina_layers[layer].state, time.monotonic() + 200
    while state.lifecycle(seed).name != "DORMANT":
        assert time.monotonic() < deadline, "the kernel stayed"
        time.sleep(0.01)
        model.commit()


def outcome(run: Run, model: nn.Module, *inputs: Any, within: Context = nullcontext) -> list[Tensor | None]:
    """The output, the gradients of the inputs and of all parameters of `model`, and its buffers afterwards.

    Leaves the parameters without gradients and the buffers as they were.
    """
    torch.manual_seed(0)
    before = [buffer.clone() for buffer in model.buffers()]
    given = [
        each.detach().clone().requires_grad_(each.is_floating_point()) if isinstance(each, Tensor) else each
        for each in inputs
    ]
    model.zero_grad(set_to_none=True)
    with within():
        output = run(*given)
    if output.requires_grad:
        output.float().square().sum().backward()
    gradients = [each.grad for each in (*given, *model.parameters()) if isinstance(each, Tensor)]
    after = [buffer.clone() for buffer in model.buffers()]
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
    return [output.detach(), *gradients, *after]


def agrees(
    run: Run,
    model: nn.Module,
    *inputs: Any,
    eager: Run | None = None,
    within: Context = nullcontext,
    **tolerance: Any,
) -> Tensor:
    """Assert that `run` has the outcome that `eager`, by default the model itself, has in eager mode; the output."""
    ours = outcome(run, model, *inputs, within=within)
    with torch.compiler.set_stance("force_eager"):
        expected = outcome(model if eager is None else eager, model, *inputs, within=within)
    assert [each is None for each in ours] == [each is None for each in expected]
    for actual, wanted in zip(ours, expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(actual, wanted, **tolerance)
    output = ours[0]
    assert output is not None
    return output


def agrees_through_a_swap(
    run: Run, model: esper.MorphableModel, kernels: Mapping[str, str], *inputs: Any, **options: Any
) -> None:
    """Assert agreement while dormant, with `kernels` (by layer) in force, and after they are unloaded again.

    Each kernel has an alpha of its own. `options` are those of :func:`agrees`.
    """
    dormant = agrees(run, model, *inputs, **options)
    for index, (layer, kernel) in enumerate(kernels.items()):
        load(model, layer, 0, kernel, alpha=0.75 / (index + 1))
    active = agrees(run, model, *inputs, **options)
    assert not torch.allclose(active, dormant, rtol=0.05, atol=0.05)
    for layer in kernels:
        unload(model, layer, 0)
    assert torch.equal(agrees(run, model, *inputs, **options), dormant)
