"""Law 3, on one thread: what is asked of a model in the middle of its own forward comes into force with the next."""

from __future__ import annotations

import asyncio
import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.execution.plans.runtime import CommitError
from tests.core.seeds import blueprint, load, outputs, states
from tests.kernel_shelf import KernelShelf

W = 8


class Asking(nn.Module):
    """Two layers, and between them whatever `ask` does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)
        self.ask: Callable[[], Any] | None = None

    @torch._dynamo.disable
    def between(self, x: Tensor) -> Tensor:
        if self.ask is not None:
            self.ask()
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x).tanh()))

    def fit(self, x: Tensor, ask: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        """As a method that trains: two forwards, and `ask` between them."""
        before = self(x)
        ask()
        return before, self(x)


def grown(shelf: KernelShelf, mode: Any, target: Any = None) -> tuple[esper.MorphableModel, str]:
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(Asking()), target, platform=shelf.platform, mode=mode)
    kernel = shelf.put(blueprint(W, W)).id
    outputs(model, torch.randn(2, W))
    for name in model.kasmina_layers:
        load(model, name, 0, kernel, alpha=0.5)
    return model, kernel


def _forward(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.second(self.between(self.first(x).tanh()))
    return y


class Decorated(nn.Module):
    """The same with a forward behind decorators that take anything."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)
        self.ask: Callable[[], Any] | None = None

    between = Asking.between
    forward = torch.no_grad()(torch.inference_mode(False)(_forward))


CHANGES: dict[str, Callable[[Any, str, str], object]] = {
    "unload_kernel": lambda model, name, _: model.unload_kernel(name, 0),
    "load_kernel": lambda model, name, kernel: asyncio.run(model.load_kernel(name, 1, kernel, alpha=0.5)),
    "unload_kernels": lambda model, name, _: model.unload_kernels([name]),
}


@pytest.mark.parametrize(("mode", "compiled"), [("module", False), ("module", True), ("fx", True)])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("target", [None, {"0": (W, W), "0.second": None}])
def test_a_change_that_is_asked_for_in_a_forward_comes_with_the_next(
    shelf: KernelShelf, mode: Any, compiled: bool, change: str, target: Any, fresh_dynamo: None
) -> None:
    model, kernel = grown(shelf, mode, target)
    run = torch.compile(model, backend="esper", options={"inner": "eager"}) if compiled else model
    x = torch.randn(4, W)
    before = outputs(run, x)

    def ask() -> None:
        asking.ask = None
        assert all(CHANGES[change](model, name, kernel) for name in model.kasmina_layers)

    asking: Any = model.get_submodule("0")
    asking.ask = ask
    torch.testing.assert_close(outputs(run, x), before)
    assert asking.ask is None
    after = outputs(run, x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, outputs(model, x))


def test_a_commit_in_the_middle_of_a_forward_is_refused(shelf: KernelShelf) -> None:
    model, _ = grown(shelf, "module")
    x = torch.randn(4, W)
    before = outputs(model, x)
    model.get_submodule("0").ask = model.commit  # type: ignore[assignment]  # an attribute of the host
    with pytest.raises(CommitError, match=r"in the middle of a forward, of which this is a part: what is staged comes"):
        model(x)
    model.get_submodule("0").ask = None  # type: ignore[assignment]  # as above
    assert torch.equal(outputs(model, x), before)


def test_between_the_forwards_of_a_method_a_change_comes_at_once(shelf: KernelShelf) -> None:
    model, _ = grown(shelf, "module")
    x, asking = torch.randn(4, W), model.get_submodule("0")
    first, second = asking.fit(x, lambda: model.unload_kernel("0.first", 0))  # type: ignore[operator]  # the host's own
    assert states(model)["0.first"][0] == "DORMANT"
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, model(x))


def test_a_hook_before_the_first_layer_may_commit(shelf: KernelShelf) -> None:
    model, _ = grown(shelf, "module")
    x = torch.randn(4, W)
    before = outputs(model, x)
    assert asyncio.run(asyncio.to_thread(model.unload_kernel, "0.second", 0))
    model.register_forward_pre_hook(lambda *_: (model.commit(), None)[1])
    assert not torch.allclose(outputs(model, x), before)


def test_who_asks_for_a_change_may_delete_the_model_at_once(shelf: KernelShelf) -> None:
    """The calls under way are looked through for forwards, and keep none of their variables for that."""
    model, _ = grown(shelf, "module")
    assert model.unload_kernel("0.first", 0)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("how", ["decorated", "of the instance"])
def test_a_forward_behind_a_decorator_or_of_the_instance_is_one(shelf: KernelShelf, how: str) -> None:
    """Entered at the module itself, where only its own forward is on the stack."""
    torch.manual_seed(0)
    inner = Decorated() if how == "decorated" else Asking()
    model = esper.wrap(nn.Sequential(inner), platform=shelf.platform)
    kernel, x = shelf.put(blueprint(W, W)).id, torch.randn(4, W)
    outputs(model, x)
    for name in model.kasmina_layers:
        load(model, name, 0, kernel, alpha=0.5)
    entered: Any = model[0]  # type: ignore[operator, index]  # a Sequential
    if how != "decorated":
        entered.forward = types.MethodType(_forward, entered)
    with torch.no_grad():
        before = entered(x)
        entered.ask = lambda: model.unload_kernels("*")
        assert torch.equal(entered(x), before), "all of the old plan"
        entered.ask = None
    outputs(model, x)
    assert {each[0] for each in states(model).values()} == {"DORMANT"}
