"""What the tests of `esper.Grower` share: a layer that has learnt all it can, and a target that needs a unit more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import esper
from esper.growth import GrowthRecord
from tests.kernel_shelf import KernelShelf

__all__ = ["BATCHES", "Run", "X", "Y", "begin", "decisions", "fitted", "loss_of", "mean_loss"]

_generator = torch.Generator().manual_seed(0)
X = torch.randn(300, 6, generator=_generator)
_UNIT = torch.tensor([2.0, -1.0, 0.5, 0.0, 0.0, 1.5])
Y = X @ torch.linspace(-1, 1, 18).reshape(6, 3) + torch.outer((X @ _UNIT).relu(), torch.tensor([1.0, -2.0, 0.5]))
BATCHES = [(X[:150], Y[:150]), (X[150:], Y[150:])]

OPTIONS: dict[str, Any] = {
    "budget": 200, "first": 5, "cooldown": 5, "ramp": 5, "trial": 20, "lead": 3, "widths": (2,),
    "probe_batches": BATCHES,
}  # fmt: skip
"""A growth takes 40 steps; kernels of two units have 23 parameters, and are compiled once in a session."""


def loss_of(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def mean_loss(model: Any) -> float:
    with torch.no_grad():
        return float(loss_of(model, (X, Y)))


_SOLUTION = torch.linalg.lstsq(torch.cat([X, torch.ones(len(X), 1)], 1), Y).solution  # rounds otherwise each time


def fitted() -> nn.Linear:
    """The linear layer that is best for the target."""
    layer, solution = nn.Linear(6, 3), _SOLUTION
    with torch.no_grad():
        layer.weight.copy_(solution[:6].T)
        layer.bias.copy_(solution[6])
    return layer


@dataclass
class Run:
    """A training run with a grower."""

    model: Any
    optimizer: torch.optim.Optimizer
    grower: esper.Grower
    forward: Any = None

    def step(self) -> Tensor:
        """One step, on all data."""
        self.optimizer.zero_grad()
        loss = loss_of(self.forward or self.model, (X, Y))
        loss.backward()
        self.optimizer.step()
        self.grower.step(loss)
        return loss.detach()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def until(self, *events: str, most: int = 400) -> GrowthRecord:
        """Train until one of these events is recorded, and return it."""
        known = len(self.grower.history)
        for _ in range(most):
            self.step()
            for record in self.grower.history[known:]:
                if record.event in events:
                    return record
            known = len(self.grower.history)
        raise AssertionError(f"none of {events} in {most} steps:\n{self.grower}")


def begin(
    shelf: KernelShelf,
    host: nn.Module | None = None,
    *,
    rate: float = 0.02,
    mode: Any = "module",
    seeds: int = 4,
    **options: Any,
) -> Run:
    """A run whose model has a fitted layer `"0"`, by default and no more."""
    model = esper.wrap(host or nn.Sequential(fitted()), platform=shelf.platform, mode=mode, seeds_per_layer=seeds)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    return Run(model, optimizer, esper.Grower(model, optimizer, loss_of, **{**OPTIONS, **options}))


def decisions(grower: esper.Grower) -> list[GrowthRecord]:
    """The history but for what the clock said."""
    return [replace(each, seconds=0.0) for each in grower.history]
