"""Where active kernels are registered, so that `parameters()`, `to()` and `state_dict()` see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import nn

from esper.execution.plan import Plan
from esper.execution.state_layout import KasminaStateLayout

__all__ = ["BANK_NAME", "KernelBank", "bank_key"]

BANK_NAME = "_esper"
"""The name under which a bank is registered: every state-dict key of Esper's starts with it."""


def bank_key(layer_id: str, seed: int) -> str:
    """The name of a seed's kernel in a bank; module names hold no dots, so those of the layer become slashes."""
    return f"{layer_id.replace('.', '/')}:{seed}"


class KernelBank(nn.Module):
    """The modules of the kernels in force, and the seeds' state tensors, which follow the model from device to device."""

    def __init__(self, state: KasminaStateLayout, layer_ids: Mapping[int, str], moved: Callable[[], None]) -> None:
        super().__init__()
        self._state = state
        self._layer_ids = layer_ids
        self._moved = moved

    def sync(self, plan: Plan) -> None:
        """Hold the kernels of `plan` and no others."""
        wanted = {
            bank_key(self._layer_ids[site], seed.seed): seed.kernel.module
            for site, seeds in plan.sites.items()
            for seed in seeds
        }
        self._modules.clear()
        self._modules.update(wanted)

    def trainable(self) -> Iterator[nn.Parameter]:
        """The parameters that learn."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move kernels as any module's parameters; the state's tensors change device but never dtype."""
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=torch.float32, device=self._state.device))
        self._state.to(probe.device)
        self._moved()
        return self

    def forward(self, *inputs: Any) -> Any:
        raise TypeError("a KernelBank holds kernels and is not called")
