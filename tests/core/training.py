"""What tests of optimizers share: a small model, trainable kernels for it, one step, and what a file brings back."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import esper
from tests.core.seeds import blueprint, load
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

__all__ = [
    "SCHEDULERS",
    "Picky",
    "grow",
    "ids",
    "same",
    "step",
    "through_a_file",
    "values",
    "wrapped",
]

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda i: 0.9**i),
    "LambdaLR by group": lambda o: schedulers.LambdaLR(o, [lambda i: 0.9**i]),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda i: 0.9),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=3), schedulers.CosineAnnealingLR(o, 10)], [3]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 4), schedulers.ExponentialLR(o, 0.9)], o
    ),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5]),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 15),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "ReduceLROnPlateau by group": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, min_lr=[1e-9]),
}


class Picky(torch.optim.SGD):
    """Takes no groups once it is told so."""

    full = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.full:
            raise RuntimeError("no more groups")
        super().add_param_group(param_group)


def wrapped(shelf: KernelShelf, **options: Any) -> Any:
    """The same model each time."""
    torch.manual_seed(0)
    return esper.wrap(mlp(8, 6, 4), seeds_per_layer=3, platform=shelf.platform, **options)


def grow(shelf: KernelShelf, model: Any, layer: str = "0", seed: int = 0, **options: Any) -> list[nn.Parameter]:
    """Load a trainable kernel; its parameters."""
    shape = (8, 6) if layer == "0" else (6, 4)
    kernel = shelf.put(blueprint(*shape, seed=seed + 1)).id
    load(model, layer, seed, kernel, **{"alpha": 0.5, "trainable": True, **options})
    return list(model.kasmina_layers[layer].kernel_parameters(seed))


def step(model: Any, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    """One of training."""
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def ids(parameters: Any) -> list[int]:
    return [id(each) for each in parameters]


def values(parameters: Any) -> list[torch.Tensor]:
    return [each.detach().clone() for each in parameters]


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def through_a_file(state: Any) -> Any:
    """What a process finds that loads `state` from a file, as data only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
