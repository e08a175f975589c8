"""Lightning with wrapped models: the LightningModule is one, or holds some."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from esper.growth import Grower, GrowthError
from esper.integrations import wrapped
from esper.integrations.growing import GrownLoop, MakeGrower

__all__ = ["EsperCallback"]


class EsperCallback(Callback):
    """Has kernels learn, also after a resume, and logs what seeds do; with a `grower`, the model grows by itself.

    The optimizers of `configure_optimizers` are attached to the wrapped models whose parameters they hold, before a
    checkpoint is loaded into them: kernels loaded with `trainable=True` learn from their commit on. The models' scalars
    go to the trainer's loggers, every `log_every_n_steps`. `fit` raises :class:`WrapError` if the module holds no
    wrapped model.

    `grower` is called when training begins, with the wrapped model, of which there must be one, and its optimizer, and
    returns the :class:`~esper.growth.Grower`. That is told the loss of each optimizer step and is part of checkpoints.
    """

    def __init__(self, *, grower: MakeGrower | None = None, **options: Any) -> None:
        """`options` are those of `MorphableModel.attach_optimizer`, such as `lr_factor`."""
        self._options = options
        self._loop = None if grower is None else GrownLoop(grower)
        self._steps_before = 0

    @property
    def grower(self) -> Grower | None:
        """The grower, once training has begun."""
        return None if self._loop is None else self._loop.grower

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As Lightning calls it."""
        wrapped.wrapped_models(pl_module)
        for optimizer in trainer.optimizers:
            wrapped.attach(pl_module, optimizer, self._options)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As Lightning calls it."""
        self._steps_before = trainer.global_step
        if self._loop is not None:
            self._loop.begin(pl_module, trainer.optimizers)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """As Lightning calls it."""
        if self._loop is not None:
            self._grow(self._loop, trainer, pl_module, outputs)
        every = getattr(trainer, "log_every_n_steps", 0)
        if every and trainer.global_step % every == 0:
            for logger in trainer.loggers:
                logger.log_metrics(wrapped.scalars(pl_module, "esper/"), step=trainer.global_step)

    def _grow(self, loop: GrownLoop, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        loss = None if outputs is None else outputs.get("loss")  # divided by the batches of a step, if those are many
        if loss is not None:
            loop.add(loss)
        if trainer.global_step == self._steps_before:
            return
        self._steps_before = trainer.global_step
        if loss is None and not pl_module.automatic_optimization:
            raise GrowthError(
                f"training_step of {type(pl_module).__name__} has returned no loss, and a grower has to be told it: "
                "return it, also with manual optimization"
            )
        loop.step()

    def state_dict(self) -> dict[str, Any]:
        """The grower's, for a checkpoint."""
        return {} if self._loop is None else self._loop.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The grower goes on from there when training begins."""
        if self._loop is not None:
            self._loop.load_state_dict(state_dict)
