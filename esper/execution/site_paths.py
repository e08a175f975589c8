"""What a site computes, as Python: the host's path, and the host's path with kernels blended in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esper.execution.plan import SeedPlan

if TYPE_CHECKING:
    from esper.execution.kasmina_layer import KasminaLayer

__all__ = ["SitePath", "active_path", "blended", "dormant_path"]

SitePath = Callable[[Tensor], Tensor]


def dormant_path(layer: KasminaLayer) -> SitePath:
    """The host's linear layer, reading the parameters at each call."""
    parameters, linear = layer._parameters, torch.nn.functional.linear

    def dormant(x: Tensor) -> Tensor:
        try:
            return linear(x, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]  # a missing bias is None
        except KeyError:  # the parameters are computed: parametrizations, or old-style weight norm
            return linear(x, layer.weight, layer.bias)

    return dormant


def active_path(layer: KasminaLayer, seeds: Iterable[SeedPlan], alphas: Callable[[], Tensor]) -> SitePath:
    """The host's layer and the kernels of `seeds`; `alphas()` returns their shares, `[len(seeds)]`, at each call."""
    host_path = dormant_path(layer)
    executors = [(seed, seed.kernel.executor) for seed in seeds]

    def active(x: Tensor) -> Tensor:
        y = host_path(x)
        for (seed, kernel), alpha in zip(executors, alphas().unbind(), strict=True):
            y = blended(y, seed, kernel, alpha, x)
        return y

    return active


def blended(y: Tensor, seed: SeedPlan, kernel: Callable[..., Tensor], alpha: Tensor, x: Tensor) -> Tensor:
    """`alpha * kernel(x[, y]) + (1 - alpha) * y` in the dtype of `y`, what the seeds before this one have made."""
    given = (x.detach(), y.detach()) if seed.isolate else (x, y)
    output = kernel(*given) if seed.uses_host else kernel(given[0])
    return torch.lerp(y, output.type_as(y), alpha.type_as(y))
