"""The optimizers attached to one model, and which of them a kernel's parameters stand in."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from esper.execution.kernels.attached_optimizer import AttachedOptimizer, refuse_optimizer
from esper.execution.kernels.optimizer_state import KernelParameter
from esper.execution.kernels.param_groups import GroupOptions, OptimizerError
from esper.execution.kernels.rate_schedulers import checked_schedulers, schedulers_of

__all__ = ["ModelOptimizers"]

_LOG = logging.getLogger("esper.execution")
_attached: weakref.WeakKeyDictionary[Optimizer, weakref.ref[AttachedOptimizer]] = weakref.WeakKeyDictionary()


class ModelOptimizers:
    """Those of one model, which it does not keep alive, nor do they the model.

    `learning` are the kernels in force that learn, `parameters` all of the model's, `version` the number of its plan.
    """

    def __init__(
        self,
        learning: Callable[[], Iterable[KernelParameter]],
        parameters: Callable[[], Iterable[Tensor]],
        version: Callable[[], int],
    ) -> None:
        self._learning, self._parameters, self._version = learning, parameters, version
        self._references: list[weakref.ref[AttachedOptimizer]] = []

    def _alive(self) -> list[AttachedOptimizer]:
        return [each for reference in self._references if (each := reference()) is not None]

    @property
    def plan_version(self) -> int:
        """The number of changes so far."""
        return self._version()

    def model_parameters(self) -> Iterable[Tensor]:
        """Those of the whole model."""
        return self._parameters()

    def learning_in(self, optimizer: AttachedOptimizer) -> Sequence[KernelParameter]:
        """The parameters of kernels in force that are to stand in `optimizer`."""
        return self._of(optimizer, self._learning())

    def _of(self, optimizer: AttachedOptimizer, kernels: Iterable[KernelParameter]) -> list[KernelParameter]:
        """Of `kernels` those that `optimizer` is for: it has their layer's weight, or is the first and none has it."""
        alive = self._alive()
        if len(alive) == 1:
            return list(kernels)
        hosts = [(each, each.hosts_ids()) for each in alive]
        found = []
        for kernel in kernels:
            owner = next((each for each, ids in hosts if id(kernel.beside) in ids), alive[0] if alive else None)
            found += [kernel] if owner is optimizer else []
        return found

    def attach(
        self,
        optimizer: Any,
        scheduler: Any,
        *,
        lr_factor: Any,
        warmup: Any,
        warmup_start: Any,
        peak: Any,
        **others: Any,
    ) -> None:
        """See `MorphableModel.attach_optimizer`."""
        wrapped = getattr(optimizer, "optimizer", None)  # Accelerate's and Lightning's
        inner = wrapped if isinstance(wrapped, Optimizer) else optimizer
        if not isinstance(inner, Optimizer):
            several = "; attach each by itself" if isinstance(optimizer, (list, tuple)) else ""
            raise TypeError(f"optimizer must be one of torch.optim, not a {type(optimizer).__name__}{several}")
        kind, before = type(inner).__name__, known() if (known := _attached.get(inner)) is not None else None
        if before is not None and before.model is not None:
            whose = "the model" if before.model is self else "another model, and its kernels are known by their layers"
            raise OptimizerError(f"this {kind} is attached to {whose} already; detach_optimizer() it first")
        refuse_optimizer(inner)
        held = {id(each) for group in inner.param_groups for each in group["params"]}
        if held and not any(id(each) in held for each in self._parameters()):
            raise OptimizerError(
                f"this {kind} holds none of the model's parameters: make it with those of what esper.wrap() returned"
            )
        options = GroupOptions.checked(
            inner.defaults, warmup, others, lr_factor=lr_factor, start=warmup_start, peak=peak
        )
        schedulers = schedulers_of(inner) if scheduler is None else checked_schedulers(scheduler, inner)
        attached = AttachedOptimizer(inner, schedulers, options, self)
        self._references = [weakref.ref(each) for each in [*self._alive(), attached]]
        try:
            attached.take_over()
        except BaseException:
            self._forget(attached)
            raise
        _attached[inner] = weakref.ref(attached)  # which the optimizer's hooks keep

    def has(self, optimizer: Any) -> bool:
        """See `MorphableModel.has_optimizer`."""
        return bool(self._found(optimizer))

    def _found(self, optimizer: Any) -> list[AttachedOptimizer]:
        wrapped = getattr(optimizer, "optimizer", None)
        return [each for each in self._alive() if each.optimizer is optimizer or each.optimizer is wrapped]

    def detach(self, optimizer: Any) -> None:
        """See `MorphableModel.detach_optimizer`."""
        found = self._found(optimizer)
        if not found:
            raise OptimizerError(f"this {type(optimizer).__name__} is not attached to the model")
        self._forget(found[0])
        _attached.pop(found[0].optimizer, None)

    def _forget(self, attached: AttachedOptimizer) -> None:
        attached.release()
        self._references = [weakref.ref(each) for each in self._alive() if each is not attached]

    def admit(self, kernels: Sequence[KernelParameter]) -> None:
        """`kernels` are about to come into force: hold them. Raises what an optimizer does that cannot."""
        with torch.inference_mode(False):
            for each in self._alive():
                each.admit(self._of(each, kernels))

    def follow(self) -> None:
        """Other kernels are in force: hold these and no others. Does not raise."""
        for each in self._alive():
            try:
                with torch.inference_mode(False):
                    each.follow()
            except Exception:  # noqa: BLE001  # a commit does not fail: those for which this could be did so before it
                _LOG.exception("an optimizer could not take the kernels in force, which do not learn in it")
