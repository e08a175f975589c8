"""Small hosts for tests."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Branching", "TransformerBlock", "Twice", "mlp", "small_transformer"]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for first, second in pairwise(widths):
        layers += [nn.Linear(first, second), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP, `[batch, length, width] -> [batch, length, width]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(-3, -2).flatten(-2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def small_transformer(width: int = 16, heads: int = 2, blocks: int = 2) -> nn.Sequential:
    """Transformer blocks and a head of 4 outputs."""
    return nn.Sequential(*[TransformerBlock(width, heads) for _ in range(blocks)], nn.Linear(width, 4))


class Twice(nn.Module):
    """One layer that runs twice in a forward, so that a change of plan in between would show."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = self.layer(x).tanh()
        return x


class Branching(nn.Module):
    """Two graphs per forward under Dynamo: a graph break stands between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x)
