"""Measurements in the middle of training that leave training as it was."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper import torch_internals
from esper.core.morphable_model import MorphableModel
from esper.errors import shown
from esper.execution.kasmina_layer import KasminaLayer
from esper.growth.errors import GrowthError
from esper.growth.probe import Probe
from esper.growth.statistics import SiteStatistics

__all__ = ["Judgement", "LossFunction", "Probed", "judged", "probed", "undisturbed"]

LossFunction = Callable[[Any, Any], Tensor]
"""The loss of a model for a batch: `(model, batch) -> scalar`."""


@contextlib.contextmanager
def undisturbed(model: MorphableModel) -> Iterator[None]:
    """Within, the model is in evaluation mode, uncompiled and without gradients.

    Afterwards modes, gradients and torch's random numbers are what they were, whatever happens.
    """
    modes = [(module, module.training) for module in model.modules()]
    gradients = {id(each): (each, each.grad) for each in model.parameters()}
    training = model.training
    devices = sorted({each.device.index or 0 for each in model.parameters() if each.device.type == "cuda"})
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(_restore, model, training, modes, gradients)
        for each, _ in gradients.values():
            each.grad = None
        model.eval()
        yield


def _restore(
    model: MorphableModel,
    training: bool,
    modes: list[tuple[nn.Module, bool]],
    gradients: dict[int, tuple[nn.Parameter, Tensor | None]],
) -> None:
    for each in model.parameters():
        each.grad = None  # also of kernels that came into force meanwhile
    for each, gradient in gradients.values():
        each.grad = gradient
    model.train(training)
    for module, mode in modes:
        module.training = mode


@dataclass(frozen=True)
class Probed:
    """What a probe saw, and what that took."""

    statistics: dict[str, SiteStatistics]
    """Of the layers that a gradient has reached."""
    flops: int
    batch_flops: int
    """Those of the first batch."""


def probed(
    model: MorphableModel, layers: list[str], loss_function: LossFunction, batches: Iterable[Any], rows: int, seed: int
) -> Probed:
    """The statistics of `layers` while `batches` go forward and backward. Raises :class:`GrowthError`."""
    probe, first = Probe(model, layers, rows=rows, seed=seed), None
    with undisturbed(model), torch.enable_grad(), contextlib.ExitStack() as stack:
        for name in layers:
            stack.callback(model.kasmina_layers[name].register_forward_hook(_reach).remove)
        stack.enter_context(probe)
        flops = stack.enter_context(torch_internals.counting_flops())
        for batch in batches:
            loss = _checked(loss_function(model, batch))
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            first = flops.total if first is None else first
    if first is None:
        raise GrowthError("probe_batches gave no batch: pass some, in what can be gone through again and again")
    if not probe.reached:
        raise GrowthError(f"no gradient has reached any of {', '.join(map(repr, layers))}: does loss_fn use the model?")
    return Probed({name: probe[name] for name in layers if name in probe.reached}, flops.total, first)


def _reach(layer: KasminaLayer, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Of a site at which nothing learns, and nothing before it, too, the gradient is asked for."""
    del layer, inputs
    if not output.requires_grad and output.is_floating_point() and torch.is_grad_enabled():
        return output.detach().requires_grad_()
    return None


@dataclass(frozen=True)
class Judgement:
    """A kernel's counterfactual: the mean loss with its alpha at 1, and at 0; and what that took."""

    loss_with: float
    loss_without: float
    flops: int


def judged(
    model: MorphableModel, layer: str, seed: int, loss_function: LossFunction, batches: Iterable[Any]
) -> Judgement:
    """Judge the kernel at a seed, whose alpha is on no schedule, by `batches`. Raises :class:`GrowthError`."""
    alpha = model.kasmina_layers[layer].state.alpha(seed)
    losses = []
    try:
        # With gradients on, though nobody wants them: else machine code of kernels may run, which rounds otherwise.
        with undisturbed(model), torch_internals.counting_flops() as flops, torch.enable_grad():
            for each in (1.0, 0.0):
                model.set_alpha(layer, seed, each)
                losses.append(_mean_loss(model, loss_function, batches))
    finally:
        model.set_alpha(layer, seed, alpha)
    return Judgement(losses[0], losses[1], flops.total)


def _mean_loss(model: MorphableModel, loss_function: LossFunction, batches: Iterable[Any]) -> float:
    losses = [_checked(loss_function(model, batch)).detach().cpu().double() for batch in batches]
    if not losses:
        raise GrowthError("judge_batches gave no batch: pass some, in what can be gone through again and again")
    return float(torch.stack(losses).mean())


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise GrowthError(f"loss_fn must return one number as a tensor for a model and a batch, not {_described(loss)}")
    return loss.reshape(())


def _described(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else shown(value)
