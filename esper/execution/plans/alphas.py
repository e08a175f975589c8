"""The alphas of a model's seeds: what moves them while the model trains, and how forwards read them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from esper.execution.kernels.optimizer_steps import OptimizerSteps
from esper.execution.plans.alpha import AlphaSchedule, Schedule
from esper.execution.state_layout import KasminaStateLayout
from esper.torch_internals import transforms_active

__all__ = ["SeedAlphas", "load_reading"]

_LOG = logging.getLogger("esper.execution")


@dataclass(slots=True)
class _Moving:
    """A schedule at work."""

    alpha: AlphaSchedule
    step: int
    """That of the latest training forward; before the first one, that which it will have."""
    origin: int | None = None
    """How many steps the model's optimizers had taken at step 0, by those that they had at the first forward."""

    def due(self, steps: OptimizerSteps) -> int:
        """The step of the next training forward.

        Forwards before an optimizer was known may have been more than its steps: then the steps catch up.
        """
        if self.origin is None:
            return self.step
        due = max(self.step if steps.awaited else self.step + 1, steps.taken - self.origin)
        return due if self.last is None else min(due, self.last)

    @property
    def last(self) -> int | None:
        """The step at which it ends."""
        last = getattr(self.alpha, "steps", None)
        return last if isinstance(last, int) else None


class SeedAlphas:
    """The alphas in `state`, which holds all of a model's seeds, and their schedules, which go by the optimizers'
    `steps`.

    They are changed under the runtime's lock; :meth:`advance` is for the thread that runs the model, readers for any.
    """

    def __init__(self, state: KasminaStateLayout, steps: OptimizerSteps) -> None:
        self._state = state
        self._steps = steps
        self._moving: dict[int, _Moving] = {}

    @property
    def moving(self) -> bool:
        """Whether there are schedules."""
        return bool(self._moving)

    def start(self, index: int, alpha: float | AlphaSchedule, first: float, step: int) -> None:
        """Set an alpha to `first`. A schedule in `alpha` moves it from then on, and is called next with `step`."""
        self._state.set_alpha(index, first)
        self._moving.pop(index, None)
        if callable(alpha):
            self._moving[index] = _Moving(alpha, step)

    def schedule(self, index: int) -> Schedule | None:
        """What moves this alpha, if anything does."""
        moving = self._moving.get(index)
        return None if moving is None else Schedule(moving.alpha, moving.due(self._steps))

    def forget(self, indices: Iterable[int]) -> None:
        """Stop moving these alphas."""
        for index in indices:
            self._moving.pop(index, None)

    def end(self, ended: Mapping[int, object]) -> None:
        """Forget the schedules that :meth:`advance` returned, but for those that others have replaced meanwhile."""
        self.forget([index for index, moving in ended.items() if self._moving.get(index) is moving])

    def advance(self) -> Mapping[int, object]:
        """A training forward begins: take every schedule to the step that is due. Returns those at their end.

        Without the lock: it is the user's code.
        """
        ended = {}
        for index, moving in list(self._moving.items()):
            step = moving.due(self._steps)
            if moving.origin is not None and step == moving.step:
                continue
            try:
                self._state.set_alpha(index, moving.alpha(step))
            except Exception as error:  # noqa: BLE001  # a user's schedule must not end a user's training
                _LOG.error("the alpha schedule of seed %d raised at step %d; alpha stays: %r", index, step, error)
                self._state.record_error(index)
                ended[index] = moving
                continue
            if moving.last is not None and step >= moving.last:
                ended[index] = moving
            if moving.origin is None:
                moving.origin = self._steps.taken - step
            moving.step = step
        self._steps.note_forward()
        return ended

    def reader(self, indices: Sequence[int]) -> Callable[[], torch.Tensor]:
        """A function that reads the alphas at `indices`, in their order.

        It returns a float32 tensor `[len(indices)]` on the model's device, which is never written to: after a change of
        an alpha it returns another, so that the change does not reach into a backward that still needs the old value.
        """
        state = self._state
        # Copied to a device without waiting for it, and always from here: the way back would have to be waited for.
        start = torch.tensor(indices, dtype=torch.int64, device="cpu")
        latest: tuple[torch.Tensor | None, int, torch.Tensor, torch.Tensor] = (None, -1, start, torch.empty(0))

        def read() -> torch.Tensor:
            nonlocal latest
            alphas = state.alpha_blend
            version = alphas._version  # before the values: what is written meanwhile is read by whoever comes next
            read_from, known, index, values = latest  # whole, whichever thread replaces it
            if alphas is not read_from or version != known:
                if index.device != alphas.device:  # at first, and where the model has moved since
                    index = start.to(alphas.device, non_blocking=True)
                values = _read(alphas, index)
                if not transforms_active():  # what a tracer makes of it is not for others
                    latest = alphas, version, index, values
            return values

        return read


def _read(alphas: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False):  # a later forward may be one that trains
        return alphas.index_select(0, index).float()


@cache
def load_reading(device: torch.device) -> None:
    """Have `device` load the code that readers run.

    CUDA does so at its first call, which takes 70-130 ms in which no thread can launch anything: to be called when a
    model is compiled, or at the latest when a kernel is staged.
    """
    if device.type != "cpu":
        alphas = torch.ones(1, dtype=torch.float16, device=device)
        _read(alphas, torch.zeros(1, dtype=torch.int64, device=device))
