"""A model that torch.fx cannot trace whole runs by its largest traceable parts."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from tests.core.planting import agrees
from tests.core.seeds import blueprint, load, outputs
from tests.eager.hosts import Deciding, fx_wrapped, model
from tests.kernel_shelf import KernelShelf


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(3, 4)


def test_the_largest_parts_are_traced_and_explained(x: torch.Tensor) -> None:
    host = nn.Sequential(Deciding(), nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())))
    wrapped = fx_wrapped(host)
    for called in (False, True):
        explanation = wrapped.explain()
        assert explanation.regions == ("0.first", "0.second", "1")
        assert explanation.untraced.keys() == {"", "0"}
        assert "decides on a value" in explanation.untraced["0"]
        rows = {row.name: (row.region, row.note) for row in explanation.rows}
        assert rows["1.1.0"] == ("1", "")
        assert rows["0.last"] == (None, "runs as a module")
        assert "not traced whole:" in str(explanation)
        if not called:
            agrees(host, wrapped, x)
            agrees(host, wrapped, -x)


def test_parts_follow_the_plan(shelf: KernelShelf, x: torch.Tensor) -> None:
    host = Deciding()
    wrapped = fx_wrapped(host, platform=shelf.platform)
    dormant = outputs(wrapped, x)
    for name in ("first.0", "second.0", "last"):
        load(wrapped, name, 0, shelf.put(blueprint(4, 4)).id, alpha=0.5)
        assert not torch.allclose(outputs(wrapped, x), dormant)
        assert wrapped.unload_kernel(name, 0)
        assert torch.equal(outputs(wrapped, x), dormant)
    load(wrapped, "first.2", 0, shelf.put(blueprint(4, 4)).id, alpha=0.5, trainable=True)
    wrapped(x).sum().backward()
    assert all(parameter.grad is not None for parameter in wrapped.seed_parameters())
    grown = outputs(wrapped, x)
    wrapped.set_alpha("first.2", 0, 0.25)
    assert not torch.allclose(outputs(wrapped, x), grown)


def test_a_part_is_entered_through_its_own_call(x: torch.Tensor) -> None:
    host, calls = Deciding(), []
    host.first.register_forward_hook(lambda module, args, output: calls.append("first"))
    wrapped = fx_wrapped(host)
    wrapped.second.register_forward_pre_hook(lambda module, args: calls.append("second"))
    for _ in range(2):
        wrapped(x)
    assert calls == ["first", "second"] * 2
    assert wrapped.explain().regions == ("first", "second")
    assert torch.equal(wrapped.second.forward(x), host.second(x))
    wrapped.second.forward = lambda x: x * 0
    assert torch.equal(wrapped(x), host.last(torch.zeros(3, 4)))


def test_parts_follow_train_and_eval_and_changed_children(x: torch.Tensor) -> None:
    class Host(Deciding):
        def __init__(self) -> None:
            super().__init__()
            self.first.append(model(lambda self, x: self.layer(x) if self.training else self.inner(x)))

    host = Host()
    wrapped = fx_wrapped(host)
    for flag in (True, False, True):
        host.train(flag)
        wrapped.train(flag)
        agrees(host, wrapped, x)
    wrapped.first[1] = nn.Identity()
    host.first[1] = nn.Identity()
    agrees(host, wrapped, x)


def test_a_model_sees_one_plan_while_another_thread_commits(shelf: KernelShelf, x: torch.Tensor) -> None:
    inside, go_on = threading.Event(), threading.Event()
    go_on.set()

    class Halting(Deciding):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            inside.set()
            assert go_on.wait(30)
            return self.second(y) if x.isfinite().all() else y

    wrapped = fx_wrapped(Halting(), platform=shelf.platform)
    kernel, results = shelf.put(blueprint(4, 4)).id, list[Any]()
    dormant = outputs(wrapped, x)
    inside.clear()
    go_on.clear()
    thread = threading.Thread(target=lambda: results.append(outputs(wrapped, x)))
    thread.start()
    assert inside.wait(30)
    for name in ("first.0", "second.0"):
        assert wrapped.request_kernel(name, 0, kernel, alpha=0.5).result(30)
    wrapped.commit()
    go_on.set()
    thread.join()
    assert torch.equal(results[0], dormant)
    assert not torch.allclose(outputs(wrapped, x), dormant)


def test_other_threads_run_their_models_while_one_traces(x: torch.Tensor) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def forward(self: Any, x: torch.Tensor) -> Any:
        inside.set()
        assert go_on.wait(30)
        return self.layer(x)

    wrapped = fx_wrapped(model(forward))
    thread = threading.Thread(target=wrapped, args=(x,))
    thread.start()
    assert inside.wait(30)
    other = Deciding()
    compiled = torch.compile(nn.Linear(4, 4), backend="eager")
    assert other(x).shape == (3, 4)
    assert compiled(x).shape == (3, 4)
    go_on.set()
    thread.join()
    assert torch.equal(wrapped(x), wrapped.layer(x))
