"""The network of `growth_skill`, alone or with what kernels are made by hand, and what a step of it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.growth_skill_data import BATCH

__all__ = ["CLASSES", "RANK", "SITES", "Shape", "network"]

CLASSES = 10
RANK = 16
HIDDEN: Mapping[str, int] = {"digits": 32, "mnist_5k": 64}
SITES = ("0", "2", "4")
"""The names of the linear layers."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a network: its layers, and the number of kernels at each of them."""

    layers: tuple[tuple[int, int], ...]
    kernels: tuple[int, ...] = (0, 0, 0)

    @classmethod
    def of(cls, name: str, features: int) -> Shape:
        """The host for a set of digits."""
        hidden = HIDDEN[name]
        return cls(((features, hidden), (hidden, hidden), (hidden, CLASSES)))

    def grown(self, at: int) -> Shape:
        """With one kernel more."""
        return Shape(self.layers, tuple(count + (each == at) for each, count in enumerate(self.kernels)))

    def step_flops(self, *, frozen: bool) -> float:
        """Of one step: forward, and backward to all that learns, which is all or the kernels."""
        total, reached = 0.0, False
        for at, ((inputs, outputs), count) in enumerate(zip(self.layers, self.kernels, strict=True)):
            into = reached or (not frozen and at > 0)  # whether something before it learns
            total += inputs * outputs * (1 + (not frozen) + into)
            total += count * RANK * (2 * (inputs + outputs) + outputs + (inputs if into else 0))
            reached = reached or count > 0
        return 2.0 * BATCH * total


class Beside(nn.Module):
    """A linear layer with bottlenecks beside it: what a layer with kernels is, made by hand."""

    def __init__(self, inputs: int, outputs: int, count: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.kernels = nn.ModuleList()
        for _ in range(count):
            last = nn.Linear(RANK, outputs)
            nn.init.zeros_(last.weight)
            self.kernels.append(nn.Sequential(nn.Linear(inputs, RANK), nn.ReLU(), last))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        for kernel in self.kernels:
            y = y + kernel(x)
        return y


def network(shape: Shape, seed: int) -> nn.Sequential:
    """The host, or one of its final size from the beginning."""
    torch.manual_seed(seed)
    first, middle, last = (
        Beside(*sizes, count) if count else nn.Linear(*sizes)
        for sizes, count in zip(shape.layers, shape.kernels, strict=True)
    )
    return nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last)
