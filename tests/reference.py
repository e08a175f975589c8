"""What a site computes, in float64 and in plain PyTorch: the formula of the design, written once more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from esper.artifacts import Artifact

__all__ = ["ReferenceSeed", "reference_site"]


@dataclass(frozen=True)
class ReferenceSeed:
    """A kernel's artifact, its alpha, and whether its input is detached."""

    artifact: Artifact
    alpha: float
    isolate: bool = False

    def module(self) -> nn.Module:
        """The kernel in float64."""
        return self.artifact.graph.to_module(self.artifact.tensors).double()


def reference_site(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seeds: Sequence[tuple[nn.Module, ReferenceSeed]]
) -> torch.Tensor:
    """`y = x W^T + b`, then for each seed `y = alpha K(x, y) + (1 - alpha) y`; alpha as float16 holds it."""
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    for kernel, seed in seeds:
        alpha = float(np.float16(seed.alpha))
        inputs = (x, y) if seed.artifact.graph.uses_host else (x,)
        if seed.isolate:
            inputs = tuple(each.detach() for each in inputs)
        y = alpha * kernel(*inputs) + (1 - alpha) * y
    return y
