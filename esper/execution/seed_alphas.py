"""The alphas of a model's seeds: what moves them from forward to forward, and how forwards read them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch

from esper.execution.alpha import AlphaSchedule, Schedule
from esper.execution.state_layout import KasminaStateLayout
from esper.torch_internals import transforms_active

__all__ = ["SeedAlphas"]

_LOG = logging.getLogger("esper.execution")


class SeedAlphas:
    """The alphas in `state`, which holds all of a model's seeds, and their schedules.

    They are changed under the runtime's lock; :meth:`advance` is for the thread that runs the model, readers for any.
    """

    def __init__(self, state: KasminaStateLayout) -> None:
        self._state = state
        self._schedules: dict[int, Schedule] = {}

    @property
    def moving(self) -> bool:
        """Whether there are schedules."""
        return bool(self._schedules)

    def start(self, index: int, alpha: float | AlphaSchedule, first: float, step: int) -> None:
        """Set an alpha to `first`. A schedule in `alpha` moves it from then on, and is called next with `step`."""
        self._state.set_alpha(index, first)
        self._schedules.pop(index, None)
        if callable(alpha):
            self._schedules[index] = Schedule(alpha, step)

    def schedule(self, index: int) -> Schedule | None:
        """What moves this alpha, if anything does."""
        return self._schedules.get(index)

    def forget(self, indices: Iterable[int]) -> None:
        """Stop moving these alphas."""
        for index in indices:
            self._schedules.pop(index, None)

    def advance(self) -> dict[int, Schedule]:
        """Take every schedule a step further, without the lock: it is the user's code. Returns those at their end."""
        ended = {}
        for index, schedule in list(self._schedules.items()):
            try:
                self._state.set_alpha(index, schedule.alpha(schedule.step))
            except Exception as error:  # noqa: BLE001  # a user's schedule must not end a user's training
                _LOG.error(
                    "the alpha schedule of seed %d raised at step %d; alpha stays: %r", index, schedule.step, error
                )
                self._state.record_error(index)
                ended[index] = schedule
                continue
            last = getattr(schedule.alpha, "steps", None)
            if last is not None and schedule.step >= last:
                ended[index] = schedule
            schedule.step += 1
        return ended

    def reader(self, indices: Sequence[int]) -> Callable[[], torch.Tensor]:
        """A function that reads the alphas at `indices`, in their order.

        It returns a float32 tensor `[len(indices)]` on the model's device, which is never written to: after a change of
        an alpha it returns another, so that the change does not reach into a backward that still needs the old value.
        """
        state = self._state
        start = torch.tensor(indices, dtype=torch.int64, device=state.device)
        latest: tuple[torch.Tensor | None, int, torch.Tensor, torch.Tensor] = (None, -1, start, torch.empty(0))

        def read() -> torch.Tensor:
            nonlocal latest
            alphas = state.alpha_blend
            version = alphas._version  # before the values: what is written meanwhile is read by whoever comes next
            read_from, known, index, values = latest  # whole, whichever thread replaces it
            if alphas is not read_from or version != known:
                index = index.to(alphas.device)  # the model may have moved since
                with torch.inference_mode(False):  # a later forward may be one that trains
                    values = alphas.index_select(0, index).float()
                if not transforms_active():  # what a tracer makes of it is not for others
                    latest = alphas, version, index, values
            return values

        return read
