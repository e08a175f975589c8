"""Hugging Face's Trainer with wrapped models.

A wrapped `PreTrainedModel` is one of its class, and Trainer takes it as it is. What is here has its kernels learn, also
after a resume, logs what its seeds do, has a grower grow it, and lets `torch_compile_backend="esper"` through.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from esper.growth import Grower
from esper.integrations import wrapped
from esper.integrations.growing import GrownLoop, MakeGrower

__all__ = ["EsperCallback", "EsperTrainer", "EsperTrainerMixin", "allow_backend"]

_BACKEND, _GROWER = "ESPER", "grower.pt"


class EsperTrainerMixin:
    """What makes any subclass of Trainer one for models that grow: `class MyTrainer(EsperTrainerMixin, SFTTrainer)`.

    The optimizer that Trainer makes is attached to the model before a checkpoint is loaded into it: kernels loaded with
    `trainable=True` learn from their commit on, and a run with kernels in force resumes. What is logged has the
    model's scalars too. `esper_options` are those of `MorphableModel.attach_optimizer`, such as `lr_factor`.
    Making one raises :class:`WrapError` if the model is not wrapped.

    `grower` is called when training begins, with the wrapped model and its optimizer, and returns the
    :class:`~esper.growth.Grower`. That is told the loss of each optimizer step and is part of checkpoints.
    """

    model: Any
    optimizer: Any
    add_callback: Any

    def __init__(
        self,
        *args: Any,
        esper_options: dict[str, Any] | None = None,
        grower: MakeGrower | None = None,
        **kwargs: Any,
    ) -> None:
        self._esper_options = dict(esper_options or {})
        self._loop = None if grower is None else GrownLoop(grower)
        super().__init__(*args, **kwargs)
        wrapped.wrapped_models(self.model)
        if self._loop is not None:
            self.add_callback(_Growing(self._loop))

    @property
    def grower(self) -> Grower | None:
        """The grower, once training has begun."""
        return None if self._loop is None else self._loop.grower

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """As Trainer has it."""
        optimizer: Optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]  # Trainer comes after it
        wrapped.attach(self.model, optimizer, self._esper_options)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer has it."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]  # as above
        if self._loop is not None:
            self._loop.add(loss)
        return loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]  # as above
        if self._loop is not None:
            torch.save(self._loop.state_dict(), Path(output_dir) / _GROWER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]  # as above
        if self._loop is not None and checkpoint is not None and (Path(checkpoint) / _GROWER).exists():
            self._loop.load_state_dict(torch.load(Path(checkpoint) / _GROWER, weights_only=True))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer has it."""
        scalars = wrapped.scalars(self.model, "esper/")
        logged = {**logs, **scalars}
        super().log(logged, *args, **kwargs)  # type: ignore[misc]  # as above
        logs.update({name: value for name, value in logged.items() if name not in scalars})  # what Trainer added


class _Growing(TrainerCallback):
    """Where in Trainer's loop a grower has its turn."""

    def __init__(self, loop: GrownLoop) -> None:
        self._loop = loop

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        del args, state, control
        self._loop.begin(given["model"], [given["optimizer"]])

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        del args, state, control, given
        self._loop.step()


class EsperTrainer(EsperTrainerMixin, Trainer):
    """Trainer for a model that `esper.wrap` returned; see :class:`EsperTrainerMixin`."""


class EsperCallback(TrainerCallback):
    """The same for a Trainer of any class, as far as a callback can: `Trainer(..., callbacks=[EsperCallback()])`.

    It attaches the optimizer when training begins, which is too late to resume a run with kernels in force: that needs
    :class:`EsperTrainer`. The scalars are in `trainer.state.log_history` and what is printed; loggers that Trainer
    makes for `report_to` have had their turn by then, those that come after it in `callbacks` have not.
    """

    def __init__(self, **options: Any) -> None:
        """`options` are those of `MorphableModel.attach_optimizer`, such as `lr_factor`. Raises `TypeError`."""
        if "grower" in options:
            raise TypeError("Trainer tells callbacks no loss of a step: EsperTrainer(grower=...) has a grower")
        self._options = options

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """As Trainer calls it. Raises :class:`WrapError` if the model is not wrapped."""
        del args, state, control
        wrapped.attach(given["model"], given["optimizer"], self._options)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """As Trainer calls it."""
        del args, control
        scalars = wrapped.scalars(given["model"], "esper/")
        given["logs"].update(scalars)
        state.log_history[-1].update(scalars)


def allow_backend() -> None:
    """Have `torch_compile_backend="esper"` of `TrainingArguments`, and Accelerate's `dynamo_backend`, be taken.

    Accelerate has a list of backends, an enumeration, which this adds one to, for the whole process.
    Importing this module does it.
    """
    if _BACKEND not in DynamoBackend.__members__:
        member = str.__new__(DynamoBackend, _BACKEND)
        member._name_, member._value_ = _BACKEND, _BACKEND
        DynamoBackend._member_names_.append(_BACKEND)
        DynamoBackend._member_map_[_BACKEND] = member
        DynamoBackend._value2member_map_[_BACKEND] = member


allow_backend()
