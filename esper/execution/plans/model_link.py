"""The link from a runtime to its model, which it does not keep alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from esper.execution.plans.plan import Plan, SeedPlan

__all__ = ["KernelHolder", "ModelLink", "ModelWithKernels"]


class KernelHolder(Protocol):
    """Where the kernels in force are registered."""

    def sync(self, plan: Plan) -> None: ...

    def admit(self, seeds: Sequence[tuple[int, SeedPlan]]) -> None: ...

    def count_steps(self) -> None: ...


class ModelWithKernels(Protocol):
    """A wrapped model, or a layer that stands alone."""

    training: bool

    @property
    def _esper(self) -> KernelHolder: ...


_Model = TypeVar("_Model", bound=ModelWithKernels)


class ModelLink(Generic[_Model]):
    """What a runtime asks of its model: here one layer, which stands alone. What is gone has no modules."""

    def __init__(self, model: _Model) -> None:
        self._reference = weakref.ref(model)

    @property
    def model(self) -> _Model | None:
        """The model, if it lives."""
        return self._reference()

    def is_training(self) -> bool:
        model = self.model
        return model is None or model.training

    def modules(self) -> Iterable[nn.Module]:
        """The modules of the model, asked for whenever there is something to commit."""
        return (model,) if isinstance(model := self.model, nn.Module) else ()

    def uses_of(self, parameter: torch.Tensor) -> int:
        """In how many places of the model `parameter` stands."""
        return sum(each is parameter for module in self.modules() for each in module._parameters.values())

    def places(self, names: Iterable[str]) -> Mapping[str, str]:
        """Where the layers of `names` stand now; without those that are gone."""
        return {name: name for name in names}

    def follow_layers(self) -> None:
        """Look where the layers with seeds are, after some were exchanged."""

    def find_peers(self) -> None:
        """A first forward begins, or something is asked: look whether the model was shared among ranks meanwhile."""

    def runs_eagerly(self) -> bool:
        """Whether forwards run outside of compiled graphs, where a kernel's attachment is of use."""
        return True

    def hold_kernels(self, plan: Plan) -> None:
        """`plan` comes into force: register its kernels, and no others, with the model."""
        model = self.model
        if model is not None:
            model._esper.sync(plan)

    def admit_kernels(self, seeds: Sequence[tuple[int, SeedPlan]]) -> None:
        """`seeds` are about to come into force at their sites: what has to hold their parameters does so, or raises."""
        model = self.model
        if model is not None:
            model._esper.admit(seeds)

    def count_steps(self) -> None:
        """An alpha that moves is asked for: have the steps of the model's optimizers counted."""
        model = self.model
        if model is not None:
            model._esper.count_steps()
