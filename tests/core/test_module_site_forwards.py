"""Law 3 at blocks with seeds: a commit from another thread, in the middle of a block whose graph is broken."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper
from esper import Blueprint
from tests.core.seeds import load, outputs
from tests.kernel_shelf import KernelShelf

W = 8
Run = Callable[[Tensor], Tensor]
TARGETS: dict[str, Any] = {
    "the block alone": {"1": (W, W)},
    "layers around it": {"0": None, "1": (W, W), "2": None},
    "layers inside": {"1": (W, W), "1.*": None},
}
each_target = pytest.mark.parametrize("target", TARGETS)
each_mode = pytest.mark.parametrize("mode", ["module", "fx"])


class Halting(nn.Module):
    """A block, and in its middle a stop that compilers cannot look into."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)
        self.arrived, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.transposed = False

    @torch._dynamo.disable
    def halt(self, x: Tensor) -> Tensor:
        self.arrived.set()
        assert self.go_on.wait(30)
        return x.t().contiguous().t() if self.transposed else x

    def forward(self, x: Tensor) -> Tensor:
        return self.halt(self.second(self.halt(self.first(x).tanh())))


class Overtaken:
    """A model with a block that halts, and a kernel for all of its sites that a commit can bring in the middle."""

    def __init__(self, shelf: KernelShelf, target: str, mode: Any) -> None:
        torch.manual_seed(0)
        self.model: Any = esper.wrap(
            nn.Sequential(nn.Linear(W, W), Halting(), nn.Linear(W, W)),
            TARGETS[target],
            platform=shelf.platform,
            mode=mode,
        )
        first, self.kernel = (shelf.put(Blueprint.deepen(W, W, 5, seed=seed, start="kaiming")).id for seed in (1, 2))
        self.x = torch.randn(5, W)
        outputs(self.model, self.x)
        load(self.model, "1", 0, first, alpha=0.5)
        self.before = outputs(self.model, self.x)

    @contextmanager
    def halted(self, call: Callable[[], Any]) -> Iterator[list[Any]]:
        """Within, another thread is in the middle of the block; it has run `call` then, with the returned result."""
        block, results, errors = self.model[1], [], []

        def run() -> None:
            try:
                results.append(call())
            except BaseException as error:  # shown by the test
                errors.append(error)
                block.arrived.set()
                raise

        block.arrived.clear()
        block.go_on.clear()
        thread = threading.Thread(target=run)
        thread.start()
        assert block.arrived.wait(60)
        try:
            yield results
        finally:
            block.go_on.set()
            thread.join()
        assert errors == []

    def commit(self) -> None:
        for name in self.model.kasmina_layers:
            assert self.model.request_kernel(name, 1, self.kernel, alpha=0.5).result(30)
        self.model.commit()


def _eager(model: Run) -> Run:
    return model


def _compiled(model: Run) -> Run:
    return torch.compile(model, backend="esper", options={"inner": "eager"})


@each_mode
@each_target
@pytest.mark.parametrize("run", [_eager, _compiled])
@pytest.mark.parametrize("rest", ["as it is", "a kernel with hooks", "uncompiled"])
def test_a_block_in_whose_middle_another_thread_commits_ends_as_it_began(
    shelf: KernelShelf, target: str, mode: Any, run: Callable[[Run], Run], rest: str, fresh_dynamo: None
) -> None:
    """What follows a graph break in the block may be a graph, or no graph for two reasons, or there was none at all."""
    overtaken = Overtaken(shelf, target, mode)
    model, x = overtaken.model, overtaken.x
    call, within = run(model), nullcontext
    if rest == "a kernel with hooks":
        (kernel,) = (each for name, each in model.named_modules() if name.startswith("_esper."))
        kernel.register_forward_hook(lambda *_: None)
    for _ in range(2):
        assert torch.equal(outputs(call, x), overtaken.before)
    if rest == "uncompiled":
        model[1].transposed = True  # what was compiled of the block's end does not fit
        within = _without_compiling

    def infer() -> Tensor:
        with within():
            return outputs(call, x)

    with overtaken.halted(infer) as results:
        overtaken.commit()
    torch.testing.assert_close(results[0], overtaken.before)
    after = outputs(model, x)
    assert not torch.allclose(after, overtaken.before)
    torch.testing.assert_close(outputs(call, x), after)


def _without_compiling() -> AbstractContextManager[None]:
    return torch.compiler.set_stance("eager_on_recompile")  # type: ignore[no-any-return]  # torch leaves it so


@each_mode
@pytest.mark.parametrize("run", [_eager, _compiled])
def test_a_block_is_computed_anew_as_it_was_though_another_thread_has_committed_since(
    shelf: KernelShelf, mode: Any, run: Callable[[Run], Run], fresh_dynamo: None
) -> None:
    """Between a forward and its backward, in which checkpointed activations are computed anew."""
    overtaken = Overtaken(shelf, "layers inside", mode)
    model, x = overtaken.model, overtaken.x
    call = run(model)
    parameters = [each for each in model.parameters() if each.requires_grad]
    want = torch.autograd.grad(call(x).square().sum(), parameters)
    ready, go_on, results = threading.Event(), threading.Event(), list[Any]()

    def train() -> None:
        loss = checkpoint(call, x, use_reentrant=False).square().sum()
        ready.set()
        assert go_on.wait(30)
        results.extend(torch.autograd.grad(loss, parameters))

    thread = threading.Thread(target=train)
    thread.start()
    assert ready.wait(60)
    overtaken.commit()
    go_on.set()
    thread.join()
    torch.testing.assert_close(results, [*want])
