"""Hosts that torch.fx has something to say about, and a way to wrap them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import esper

__all__ = ["Attention", "Block", "Deciding", "Model", "fx_wrapped", "model", "source"]


class Model(nn.Module):
    """A layer, some attributes, and a forward that a test supplies."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.weight = nn.Parameter(torch.randn(4))
        self.absent: nn.Parameter | None
        self.register_parameter("absent", None)
        self.register_buffer("steps", torch.zeros(4))
        self.plain = torch.randn(4)
        self.factor = 0.5
        self.history: list[Any] = []


def model(forward: Callable[..., Any]) -> Any:
    """A model with that forward, taken from its class as usual."""
    return type("Case", (Model,), {"forward": forward})()


class Deciding(nn.Module):
    """A decision on a value, which torch.fx cannot trace, between two parts that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.second = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if x.sum() > 0:
            y = self.second(y)
        return self.last(y)


class Attention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.heads = heads

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * scale / (k.size(-1) ** 0.5)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, float("-inf"))
        weights = nn.functional.dropout(scores.softmax(-1), 0.25, self.training)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, width))
        self.scale = nn.Parameter(torch.randn(width))
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        y = self.mlp(x) * self.scale
        y += x
        return y + self.shift


def fx_wrapped(host: nn.Module, **options: Any) -> Any:
    """`host` in `mode="fx"`."""
    return esper.wrap(host, mode="fx", **options)


def source(model: Any) -> str:
    """The code that the next call of a model runs, once it has been called."""
    text: str = model._eager._traced.run.__esper_source__
    return text
