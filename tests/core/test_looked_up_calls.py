"""Law 3 where a thread's stack is looked up while that thread goes on."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import esper
from tests.core.seeds import blueprint, outputs
from tests.kernel_shelf import KernelShelf


class Stop:
    """A place where a thread waits, once it is closed."""

    def __init__(self) -> None:
        self.arrived, self._open = threading.Event(), threading.Event()
        self._open.set()

    def close(self) -> None:
        self.arrived.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def __call__(self) -> bool:
        self.arrived.set()
        assert self._open.wait(30)
        return True


class Twice(nn.Module):
    """One layer that runs twice in a forward, with a stop inside of a generator in between, and one after that."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.inside, self.behind = Stop(), Stop()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x).tanh()
        assert all(stop() for stop in (self.inside,))
        self.behind()
        return self.layer(x).tanh()


@contextmanager
def _once_stacks_are_taken(act: Callable[[], None]) -> Iterator[None]:
    """Have `act` called when this thread has asked for the stacks of all threads, before it looks at them."""
    done = []

    def profile(frame: Any, event: str, argument: Any) -> None:
        del frame
        if event == "c_return" and argument is sys._current_frames and not done:
            done.append(True)
            act()

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)
    assert done


def test_a_forward_that_leaves_a_generator_while_its_stack_is_looked_up_ends_as_it_began(shelf: KernelShelf) -> None:
    host = Twice()
    model = esper.wrap(host, platform=shelf.platform)
    kernel, x = shelf.put(blueprint(8, 8)).id, torch.randn(5, 8)
    before = outputs(model, x)
    assert model.request_kernel("layer", 0, kernel, alpha=0.5).result(30)
    results: list[torch.Tensor] = []
    ready, go = threading.Event(), threading.Event()

    def serve() -> None:
        results.append(outputs(model, x))  # the thread that runs the model, as far as is known
        ready.set()
        assert go.wait(30)
        results.append(outputs(model, x))
        results.append(outputs(model, x))

    def go_on() -> None:
        host.inside.open()
        assert host.behind.arrived.wait(30)

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(30)
    for stop in (host.inside, host.behind):
        stop.close()
    go.set()
    assert host.inside.arrived.wait(30)
    with _once_stacks_are_taken(go_on):
        assert model.unload_kernel("layer", 0)
    host.behind.open()
    thread.join()
    assert not torch.allclose(results[0], before)
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], before)
