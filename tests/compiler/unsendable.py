"""Hosts whose graphs only the process that made them can compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

__all__ = ["Checkpointed", "OwnOperator"]


@torch.library.custom_op("esper_tests::twice", mutates_args=())
def _twice(x: Tensor) -> Tensor:
    return x + x


@_twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


_twice.register_autograd(lambda _, gradient: gradient + gradient)


class OwnOperator(nn.Module):
    """Calls an operator that this module registers, and that no compile worker knows. `[*, 4] -> [*, 2]`"""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = torch.ops.esper_tests.twice(self.linear(x))
        return doubled


def policy_of(kept: set[Any]) -> Callable[..., CheckpointPolicy]:
    """Keep the results of the operators `kept`, and compute all others again."""

    def policy(_: object, operator: object, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


class Checkpointed(nn.Module):
    """Selective activation checkpointing, with a policy that is a closure. `[*, 4] -> [*, 2]`"""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
        self._contexts = partial(create_selective_checkpoint_contexts, policy_of({torch.ops.aten.sigmoid.default}))

    def _inside(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).sigmoid()).sin()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self._inside, x, use_reentrant=False, context_fn=self._contexts)
        return y
