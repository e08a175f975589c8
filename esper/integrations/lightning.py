"""Lightning with wrapped models: the LightningModule is one, or holds some."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from esper.integrations import wrapped

__all__ = ["EsperCallback"]


class EsperCallback(Callback):
    """Has kernels learn, also after a resume, and logs what seeds do.

    The optimizers of `configure_optimizers` are attached to the wrapped models whose parameters they hold, before a
    checkpoint is loaded into them: kernels loaded with `trainable=True` learn from their commit on. `options` are those
    of `MorphableModel.attach_optimizer`, such as `lr_factor`. The models' scalars go to the trainer's loggers, every
    `log_every_n_steps`. `fit` raises :class:`WrapError` if the module holds no wrapped model.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As Lightning calls it."""
        wrapped.wrapped_models(pl_module)
        for optimizer in trainer.optimizers:
            wrapped.attach(pl_module, optimizer, self._options)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """As Lightning calls it."""
        every = getattr(trainer, "log_every_n_steps", 0)
        if every and trainer.global_step % every == 0:
            for logger in trainer.loggers:
                logger.log_metrics(wrapped.scalars(pl_module, "esper/"), step=trainer.global_step)
