"""The steps that the optimizers of one model take, by which scheduled alphas count."""

from __future__ import annotations

import logging
import weakref

from torch.optim import Optimizer

__all__ = ["OptimizerSteps"]

_LOG = logging.getLogger("esper.execution")
_PATIENCE = 1000
"""For how many training forwards in a row an optimizer may gather gradients before its steps are not waited for."""


class OptimizerSteps:
    """Counts the steps of the optimizers of `torch.optim` that hold parameters of one model.

    Where several step in turn, a step of each is one step of the model: the next begins when one of them steps again.
    So the optimizer that steps most often counts. Steps are noted on the thread that takes them.
    """

    def __init__(self) -> None:
        self.taken = 0
        """The model's steps so far."""
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._round: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._forwards = 0  # since the latest step

    @property
    def awaited(self) -> bool:
        """Whether an optimizer that holds parameters of the model is known, and can be expected to take a step."""
        return self._forwards < _PATIENCE and len(self._optimizers) > 0

    def know(self, optimizer: Optimizer, *, holds: bool) -> None:
        """Whether `optimizer` holds parameters of the model."""
        (self._optimizers.add if holds else self._optimizers.discard)(optimizer)

    def note_step(self, optimizer: Optimizer) -> None:
        """`optimizer` has taken a step."""
        self._forwards = 0
        if optimizer in self._round or not len(self._round):
            self._round.clear()
            self.taken += 1
        self._round.add(optimizer)

    def note_forward(self) -> None:
        """A training forward begins, in which scheduled alphas may move."""
        if self.awaited:
            self._forwards += 1
            if not self.awaited:
                _LOG.warning(
                    "no optimizer that holds the model's parameters has taken a step for %d training forwards: alphas "
                    "on schedules move with forwards until one does",
                    _PATIENCE,
                )
