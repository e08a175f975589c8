"""The computation of a site, as Python: the host's path, and the host's path with kernels blended in."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import BackwardHook

from esper.execution.plans.plan import SeedPlan

__all__ = ["SitePath", "active_path", "alive", "blended", "dormant_path", "with_backward_hooks"]

SitePath = Callable[[Tensor], Tensor]


_Layer = TypeVar("_Layer", bound=nn.Module)


def alive(reference: weakref.ref[_Layer]) -> _Layer:
    """The layer, whose path this is."""
    layer = reference()
    assert layer is not None
    return layer


def dormant_path(layer: nn.Linear) -> SitePath:
    """The host's linear layer, reading the parameters at each call. For as long as `layer` lives, which has it."""
    parameters, linear, this = layer._parameters, torch.nn.functional.linear, weakref.ref(layer)

    def dormant(x: Tensor) -> Tensor:
        try:
            return linear(x, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]  # a missing bias is None
        except KeyError:  # the parameters are computed: parametrizations, or old-style weight norm
            there = alive(this)
            return linear(x, there.weight, there.bias)

    return dormant


def active_path(
    layer: nn.Module,
    host_path: SitePath,
    callbacks: Sequence[Mapping[int, Any]],
    layer_name: str,
    seeds: Iterable[SeedPlan],
    alphas: Callable[[], Tensor],
) -> SitePath:
    """`host_path` and the kernels of `seeds`; `alphas()` returns their shares, `[len(seeds)]`, at each call.

    `callbacks` are the layer's dictionaries of backward hooks that see `host_path` alone.
    """
    this = weakref.ref(layer)
    executors = [(seed, seed.kernel.executor) for seed in seeds]

    def active(x: Tensor) -> Tensor:
        y = with_backward_hooks(alive(this), host_path, x) if any(callbacks) else host_path(x)
        try:
            for (seed, kernel), alpha in zip(executors, alphas().unbind(), strict=True):
                y = blended(y, seed, kernel, alpha, x)
        except NotImplementedError as error:
            if alphas().device.type != "meta" or x.device.type == "meta":
                raise
            raise RuntimeError(
                f"layer {layer_name!r} was moved to the meta device with its kernels, whose values are gone. If "
                "that was done to call it with other parameters, as Opacus does, use the model that esper.bake() makes"
            ) from error
        return y

    return active


def with_backward_hooks(layer: nn.Module, host_path: SitePath, x: Tensor) -> Tensor:
    """`host_path(x)`, whose gradients the layer's own backward hooks see: `KasminaLayer._get_backward_hooks`."""
    full = layer._backward_hooks.values() if layer._is_full_backward_hook else ()
    hook = BackwardHook(layer, list(full), list(layer._backward_pre_hooks.values()))
    (given,) = hook.setup_input_hook((x,))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    y: Tensor = hook.setup_output_hook(host_path(given))  # type: ignore[no-untyped-call]  # as above
    return y


def blended(y: Tensor, seed: SeedPlan, kernel: Callable[..., Tensor], alpha: Tensor, x: Tensor) -> Tensor:
    """`alpha * kernel(x[, y]) + (1 - alpha) * y` in the dtype of `y`, what the seeds before this one have made."""
    given = (x.detach(), y.detach()) if seed.isolate else (x, y)
    output = kernel(*given) if seed.uses_host else kernel(given[0])
    return torch.lerp(y, output.type_as(y), alpha.type_as(y))
