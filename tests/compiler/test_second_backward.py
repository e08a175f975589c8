"""Under `backend="esper"` a kernel allows what plain `torch.compile` allows, under the settings of the moment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.artifacts import Blueprint
from tests.compiler.agreement import agrees, load
from tests.compiler.variants import in_force, jobs
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

pytestmark = [pytest.mark.xdist_group("compile workers"), pytest.mark.slow]

GATED = Blueprint.gated_mlp(4, 6, hidden=5, start="kaiming")
BOTTLENECK = Blueprint.bottleneck(4, 6, rank=3, start="kaiming", activation="tanh")


def gradients_of_two_losses(run: nn.Module, model: nn.Module, x: Tensor) -> list[Tensor]:
    """By two backwards of one forward."""
    model.zero_grad()
    y = run(x.detach().requires_grad_())  # as in `agrees`, or Dynamo captures another graph
    y.square().sum().backward(retain_graph=True)
    y.sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def gradients_of_their_sum(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = model(x.detach().requires_grad_())
    (y.square().sum() + y.sum()).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("blueprint", [BOTTLENECK, GATED], ids=["bottleneck", "gated"])
def test_the_first_backward_with_a_kernel_may_keep_its_graph(
    shelf: KernelShelf, empty_store: Path, blueprint: Blueprint
) -> None:
    model = esper.wrap(mlp(4, 6, 2), platform=shelf.platform)
    run, x = torch.compile(model, backend="esper"), torch.randn(64, 4)
    agrees(run, model, x)
    load(model, "0", 0, shelf.put(blueprint).id, alpha=0.5, trainable=True)
    for donated in (True, False, True):
        with torch._functorch.config.patch(donated_buffer=donated):
            torch.testing.assert_close(gradients_of_two_losses(run, model, x), gradients_of_their_sum(model, x))
            agrees(run, model, x)
    assert in_force(model) == ["worker"]


def test_a_setting_that_is_changed_after_the_first_compile_counts_for_the_next_kernel(
    shelf: KernelShelf, empty_store: Path
) -> None:
    model = esper.wrap(mlp(4, 6, 2), platform=shelf.platform)
    run, x = torch.compile(model, backend="esper"), torch.randn(3, 4)
    kernel, done = shelf.put(BOTTLENECK).id, jobs()
    agrees(run, model, x)

    def again() -> int:
        """Load the kernel anew; how many compilations that took."""
        nonlocal done
        load(model, "0", 0, kernel, alpha=0.5)
        agrees(run, model, x)
        assert model.unload_kernel("0", 0)
        agrees(run, model, x)
        before, done = done, jobs()
        return done - before

    assert [again(), again()] == [1, 0]
    with torch._inductor.config.patch(epilogue_fusion=False):  # on this thread alone, as torch keeps it
        assert [again(), again()] == [1, 0]
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark  # which decides what convolutions become
    try:
        assert again() == 1
    finally:
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    assert again() == 0  # from the store
    assert in_force(model) == ["host compile"]
