"""The formula of a wrapped model, written down once more: in float64, with nothing of Esper's but parameter names.

y = host(x);   then for each seed in order:   y = alpha * K(x, y) + (1 - alpha) * y
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # torch's own abbreviation

__all__ = ["KINDS", "Host", "Kernel", "Reference", "kernel_values"]

WIDTHS = (6, 8, 8, 4)
KINDS = ("bottleneck", "gated_mlp", "low_rank", "affine")


class Host(nn.Module):
    """Three linear layers, dropout, and an attribute that its forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8, bias=False)
        self.third = nn.Linear(8, 4)
        self.drop = nn.Dropout(0.5)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = h + torch.tanh(self.second(self.drop(h))) * self.scale
        result: Tensor = self.third(h)
        return result


LAYERS = ("first", "second", "third")


@dataclass
class Kernel:
    """A kernel in force. `alpha` is its share at the next forward."""

    kind: str
    identity: bool
    trainable: bool
    isolate: bool
    alpha: float
    artifact: str = ""
    fossil: bool = False
    ramp: tuple[float, float, int, int] | None = None
    """From, to, over how many training forwards, and how many of these there were."""

    def function(self, x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        if self.isolate:
            x, y = x.detach(), y.detach()

        def linear(name: str, value: Tensor) -> Tensor:
            return F.linear(value, weights[f"{name}_weight"], weights.get(f"{name}_bias"))

        if self.kind == "bottleneck":
            f = linear("up", torch.tanh(linear("down", x)))
        elif self.kind == "gated_mlp":
            f = linear("down", F.silu(linear("gate", x)) * linear("up", x))
        elif self.kind == "low_rank":
            f = linear("up", linear("down", x))
        else:
            f = linear("linear", x)
        return y + f if self.identity else f

    def advance(self) -> None:
        """A training forward begins."""
        if self.ramp is not None:
            start, end, steps, step = self.ramp
            self.alpha = start + (end - start) * min(step / steps, 1.0)
            self.ramp = None if step >= steps else (start, end, steps, step + 1)


def kernel_values(model: nn.Module, layer: str, seed: int) -> dict[str, Tensor]:
    """The parameters of a seed's kernel, by their names in the kernel."""
    below = f"_esper.{layer}:{seed}."
    return {name[len(below) :]: value for name, value in model.named_parameters() if name.startswith(below)}


@dataclass
class Reference:
    """What a model has to compute. Parameters are read from the model; everything else is kept here."""

    scale: float = 1.0
    training: bool = True
    kernels: dict[tuple[str, int], Kernel] = field(default_factory=dict)
    folded: set[tuple[str, int]] = field(default_factory=set)
    """Seeds whose fossil became part of its layer's weight."""
    doubled: set[str] = field(default_factory=set)
    """Layers with a hook that doubles their output."""

    def is_fossil(self, layer: str, seed: int) -> bool:
        kernel = self.kernels.get((layer, seed))
        return (layer, seed) in self.folded or (kernel is not None and kernel.fossil)

    def leaves(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's parameters in float64, as leaves of a graph of their own."""
        return {
            name: value.detach().double().clone().requires_grad_(value.requires_grad)
            for name, value in model.named_parameters()
        }

    def __call__(self, x: Tensor, leaves: Mapping[str, Tensor], mask: Callable[[Tensor], Tensor]) -> Tensor:
        """`mask` stands for dropout."""
        h = torch.tanh(self._site("first", x, leaves))
        h = h + torch.tanh(self._site("second", mask(h), leaves)) * self.scale
        return self._site("third", h, leaves)

    def _site(self, layer: str, x: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
        y = F.linear(x, leaves[f"{layer}.weight"], leaves.get(f"{layer}.bias"))
        for seed in range(3):
            kernel = self.kernels.get((layer, seed))
            if kernel is not None:
                below = f"_esper.{layer}:{seed}."
                weights = {n[len(below) :]: value for n, value in leaves.items() if n.startswith(below)}
                alpha = float(torch.tensor(kernel.alpha, dtype=torch.float16))
                y = alpha * kernel.function(x, y, weights) + (1 - alpha) * y
        return y * 2 if layer in self.doubled else y

    def advance(self) -> None:
        """A training forward begins."""
        for kernel in self.kernels.values():
            kernel.advance()
