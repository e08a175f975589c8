"""Ctrl-C at any moment of a change leaves a whole model: the old plan or the new one, and everything agrees with it."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import nn

import esper
from esper.services.oona_client import OonaClient
from tests.core.seeds import blueprint, load, outputs
from tests.kernel_shelf import KernelShelf

_POINTS = int(os.environ.get("TEST_INTERRUPT_POINTS", "24"))
"""At so many lines of an action, spread over all of it, an interrupt comes; with 10000 at every line, in minutes."""


class _Interrupt:
    """A real Ctrl-C of this thread, which comes while Esper's n-th line runs.

    Nothing is raised by the trace function: Python itself raises `KeyboardInterrupt`, where it looks for signals next
    (after a call, where a function begins, where a loop goes on). An exception of the trace function would come at
    places where no signal can, such as between the end of a `with` block and its context manager; and where a loop of
    one line jumps back, Python 3.12 and 3.13 would take it past every `finally` and `with` of the function.
    """

    def __init__(self, at: int) -> None:
        self.at, self.lines = at, 0

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_globals.get("__name__", "").startswith("esper."):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                for _ in map(_thread.interrupt_main, (signal.SIGINT,)):  # after a call it would come in here
                    return None
        return self.trace

    def __call__(self, action: Callable[[], object]) -> bool:
        """Whether the interrupt came."""
        usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        sys.settrace(self.trace)
        try:
            action()
            sys.settrace(None)  # if not before, it comes after this call
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
            signal.signal(signal.SIGINT, usual)
        return False


class _Note(BaseModel):
    text: str = "a message"


class _Trial:
    """A model with a kernel in one seed, and another kernel staged for a second one."""

    def __init__(self, shelf: KernelShelf, mode: str, kernels: list[str]) -> None:
        torch.manual_seed(0)
        self.model = esper.wrap(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)),
            seeds_per_layer=2,
            platform=shelf.platform,
            mode=mode,
            telemetry_enabled=False,
        )  # type: ignore[arg-type]  # a text among the parameters
        self.kernels, self.x = kernels, torch.randn(5, 8)
        outputs(self.model, self.x)
        load(self.model, "0", 0, kernels[0], alpha=0.5)

    def stage(self) -> None:
        assert self.model.request_kernel("2", 1, self.kernels[1], alpha=0.25).result(30)
        self.model.set_alpha("2", 1, 0.75)

    def check(self) -> None:
        """That the model computes what its seeds' states say, and that device and mirror agree."""
        assert torch.is_grad_enabled()
        model, x = self.model, self.x
        before = outputs(model, x)
        expected = x
        for name, layer in model.kasmina_layers.items():
            y = nn.functional.linear(expected, layer.weight, layer.bias)
            for seed in range(2):
                assert layer.state.alpha_blend[seed].item() == layer.state.alpha(seed)
                assert layer.state.lifecycle_states[seed].item() == layer.state.lifecycle(seed)
                assert layer.state.active_kernel_id[seed].item() == layer.state.kernel_id(seed)
                if layer.state.in_force(seed):
                    kernel = model.runtime.plan.seed(layer.site, seed)
                    assert kernel is not None
                    y = torch.lerp(y, kernel.kernel.module(expected), torch.tensor(layer.state.alpha(seed)))
                else:
                    assert model.runtime.plan.seed(layer.site, seed) is None
            expected = y.tanh() if name == "0" else y
        torch.testing.assert_close(before, expected.detach())
        late = model.kasmina_layers["2"].state
        assert not late.in_force(1) or late.alpha(1) == 0.75  # what was set during the load
        done = threading.Event()  # nobody else waits for a lock for ever
        threading.Thread(
            target=lambda: (model.get_model_stats(), model.runtime.executors(), model.commit(), done.set())
        ).start()
        assert done.wait(20)
        load(model, "2", 0, self.kernels[2], alpha=1.0)
        assert model.unload_kernel("2", 0)
        load(model, "2", 1, self.kernels[1], alpha=1.0)
        assert model.unload_kernel("2", 1)
        torch.testing.assert_close(outputs(model, x), outputs(model, x))
        cache = model.kasmina_layers["0"].kernel_cache
        assert cache.get_cache_stats()["cache_entries"] >= 1


_ACTIONS: dict[str, Callable[[_Trial], object]] = {
    "forward": lambda trial: trial.model(trial.x),
    "commit": lambda trial: trial.model.commit(),
    "unload": lambda trial: trial.model.unload_kernel("0", 0),
    "alpha": lambda trial: trial.model.set_alpha("0", 0, 0.75),
    "schedule": lambda trial: trial.model.set_alpha("0", 0, esper.LinearRamp(0.0, 1.0, 10)),
    "load": lambda trial: trial.model.request_kernel("0", 1, trial.kernels[2], alpha=1.0),
    "fossilize": lambda trial: trial.model.fossilize("0", 0),
}


def _prepared(shelf: KernelShelf, mode: str, what: str, kernels: list[str]) -> _Trial:
    trial = _Trial(shelf, mode, kernels)
    if what in ("forward", "commit"):
        trial.stage()
    return trial


def _interrupts(shelf: KernelShelf, mode: str, what: str, points: Callable[[int], set[int]]) -> int:
    """How many interrupts came at those lines of an action that `points` chooses from their number."""
    kernels = [shelf.put(blueprint(8, 8, seed=seed)).id for seed in range(3)]
    for _ in range(2):  # the first time there is more to do than later
        trial, whole = _prepared(shelf, mode, what, kernels), _Interrupt(0)
        assert not whole(lambda trial=trial: _ACTIONS[what](trial))  # type: ignore[misc]  # bound here
    came = 0
    for line in sorted(points(whole.lines)):
        trial = _prepared(shelf, mode, what, kernels)
        came += _Interrupt(line)(lambda trial=trial: _ACTIONS[what](trial))  # type: ignore[misc]  # bound here
        try:
            trial.check()
        except BaseException:
            print(f"after an interrupt at line {line} of {what}")
            raise
    return came


@pytest.mark.parametrize("mode", ["module", "fx"])
@pytest.mark.parametrize("what", list(_ACTIONS))
def test_an_interrupt_at_any_line_leaves_a_whole_model(shelf: KernelShelf, mode: str, what: str) -> None:
    def spread(lines: int) -> set[int]:
        return {1 + lines * point // _POINTS for point in range(_POINTS)}

    assert _interrupts(shelf, mode, what, spread) > 3


def test_an_interrupt_where_a_commit_begins_leaves_no_lock_to_wait_for(shelf: KernelShelf) -> None:
    assert _interrupts(shelf, "module", "commit", lambda lines: set(range(1, 17))) == 16


def test_an_interrupt_of_the_first_message_does_not_keep_back_later_ones() -> None:
    note, whole = _Note(), _Interrupt(0)
    whole(lambda: OonaClient().publish("notes", note))
    for line in range(1, whole.lines + 1):
        client = OonaClient()
        _Interrupt(line)(lambda client=client: client.publish("notes", note))  # type: ignore[misc]  # bound here
        client.publish("notes", note)
        assert client.flush(20), f"after an interrupt at line {line}"
        client.close()
