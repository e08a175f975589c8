"""A grower in a trainer's loop: made once the optimizer is there, told the loss of each step, saved and resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from esper.core.errors import WrapError, described
from esper.core.morphable_model import MorphableModel
from esper.errors import shown
from esper.growth import Grower, GrowthError
from esper.integrations import wrapped

__all__ = ["GrownLoop", "MakeGrower"]

MakeGrower = Callable[[MorphableModel, Optimizer], Grower]
"""The grower for a model and its optimizer: `lambda model, optimizer: esper.Grower(model, optimizer, ...)`."""


class GrownLoop:
    """The grower of one trainer, on the thread that trains."""

    def __init__(self, make: MakeGrower) -> None:
        if not callable(make):
            raise GrowthError(
                "grower must be a function of a model and its optimizer that returns an esper.Grower, not "
                f"{shown(make)}"
            )
        self._make = make
        self._model: MorphableModel | None = None
        self._saved: dict[str, Any] | None = None
        self._loss: Tensor | float | None = None
        self.grower: Grower | None = None

    def begin(self, module: nn.Module, optimizers: Iterable[Any]) -> None:
        """Training begins, with everything loaded that is resumed. A model that was grown before goes on growing.

        Raises :class:`WrapError` unless `module` holds one wrapped model, and what making the grower raises.
        """
        models = wrapped.wrapped_models(module)
        if len(models) > 1:
            raise WrapError(
                f"{described(module)} holds several wrapped models, {', '.join(map(repr, models))}, and a trainer's "
                "grower is for one: make an esper.Grower for each, and call their step() after each optimizer step"
            )
        (model,) = models.values()
        if self.grower is None or model is not self._model:
            grower = self._make(model, wrapped.optimizer_of(model, optimizers))
            if not isinstance(grower, Grower):
                raise GrowthError(f"grower must return an esper.Grower, not {shown(grower)}")
            if self.grower is not None:
                self.grower.close()
            self.grower, self._model = grower, model
        self._loss = None
        if self._saved is not None:
            self.grower.load_state_dict(self._saved)
            self._saved = None

    def add(self, loss: Tensor | float) -> None:
        """The part that a batch has in the loss of its step."""
        self._loss = loss if self._loss is None else self._loss + loss

    def step(self) -> None:
        """The optimizer has taken a step. One without a loss, in which nothing can have been learned, is none."""
        loss, self._loss = self._loss, None
        if self.grower is not None and loss is not None:
            self.grower.step(loss)

    def state_dict(self) -> dict[str, Any]:
        """The grower's, as data; empty if there is none yet."""
        return {} if self.grower is None else self.grower.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The grower goes on from there when training begins."""
        self._saved = state or None
