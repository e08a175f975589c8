"""How a model that grows learns: the optimizers that hold its kernels."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from esper.core.wrapping import WrappedModel

__all__ = ["LearningModel"]


class LearningModel(WrappedModel):
    """A wrapped model with optimizers attached to it."""

    def attach_optimizer(
        self,
        optimizer: Optimizer,
        scheduler: Any = None,
        *,
        lr_factor: float = 1.0,
        warmup: int = 0,
        warmup_start: float = 1.0,
        peak: float = 1.3,
        **group_options: Any,
    ) -> None:
        """Have kernels that learn in `optimizer`, and in what schedules its rates, from the commit on until they leave.

        At the commit the parameters of kernels loaded with `trainable=True` enter as a group of their own, without a
        state. It has the options of the group that holds their layer's weight, at `lr_factor` times its learning rate,
        and `group_options` such as `weight_decay` or `lr` in their place. With `warmup`, the rate of new parameters
        alone goes from `warmup_start` to `peak` times that over so many steps, and stays at `peak` times the
        schedule's. At an unload, and where a fossil becomes part of its layer's weight, parameters and states leave.
        Kernels in force enter at once, with the states that they have.

        `scheduler` is one of `torch.optim.lr_scheduler`, or several; those made before are found if it is left out. To
        resume, attach before a state is loaded into `optimizer`; that and the model's may be loaded in either order.
        Several may be attached: a kernel learns in the one that holds its layer's weight, or in the first.

        Raises `TypeError` for what is no optimizer, scheduler or option; :class:`OptimizerError` for an optimizer that
        holds none of the model's parameters, cannot take groups or is attached already, a scheduler of another one, and
        values out of range. Nothing is changed then.
        """
        self.runtime.look_for_layers()
        self._wrapping.bank.optimizers.attach(
            optimizer, scheduler, lr_factor=lr_factor, warmup=warmup, warmup_start=warmup_start, peak=peak,
            **group_options,
        )  # fmt: skip
        self.runtime.optimizer_steps.know(optimizer, holds=True)

    def has_optimizer(self, optimizer: Optimizer) -> bool:
        """Whether `optimizer` is attached."""
        return self._wrapping.bank.optimizers.has(optimizer)

    def detach_optimizer(self, optimizer: Optimizer) -> None:
        """Have `optimizer` follow the model no more; the groups that it has stay, as any others.

        Raises :class:`OptimizerError` if it is not attached.
        """
        self._wrapping.bank.optimizers.detach(optimizer)
