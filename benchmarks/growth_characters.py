"""The character model of `growth_relora` and `growth_depth`, its text, and what a step of it computes."""

from __future__ import annotations

import inspect
import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CharacterModel", "Text", "linear_layers", "low_rank_parameters", "step_flops"]

BATCH, CONTEXT, EMBEDDING, WIDTH, INNER, BLOCKS = 128, 16, 16, 96, 192, 2
VALIDATED = 4096


@dataclass(frozen=True)
class Text:
    """Python's own help as numbers of characters: nine tenths to learn from, the end to validate on."""

    characters: int
    train: Tensor
    validation: Tensor

    @classmethod
    @cache
    def load(cls) -> Text:
        """The source of the standard library's `pydoc_data.topics`."""
        text = inspect.getsource(pydoc_data.topics)
        numbers = {character: number for number, character in enumerate(sorted(set(text)))}
        encoded = torch.tensor([numbers[character] for character in text])
        split = len(encoded) * 9 // 10
        return cls(len(numbers), encoded[:split], encoded[split:])

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random contexts with the character that follows, without end; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield _contexts(self.train, torch.randint(len(self.train) - CONTEXT, (BATCH,), generator=generator))

    def loss(self, model: nn.Module) -> float:
        """Nats a character, on contexts of the end that are always the same."""
        places = torch.linspace(0, len(self.validation) - CONTEXT - 1, VALIDATED).long()
        contexts, following = _contexts(self.validation, places)
        with torch.no_grad():
            return float(F.cross_entropy(model(contexts), following))


def _contexts(text: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    windows = text[places[:, None] + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, -1]


class Block(nn.Module):
    """Pre-norm residual MLP."""

    def __init__(self, width: int = WIDTH, inner: int = INNER) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return x + y


class CharacterModel(nn.Module):
    """Embeddings at random that never learn, a projection of a context's, blocks, and a head."""

    def __init__(self, characters: int, seed: int, blocks: int = BLOCKS) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(characters, EMBEDDING).requires_grad_(False)
        self.project = nn.Linear(CONTEXT * EMBEDDING, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, contexts: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.blocks(self.project(self.embedding(contexts).flatten(1)))))
        return y


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Sizes of the linear layers, in the order of the forward."""
    return {
        name: (layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }


def step_flops(layers: dict[str, tuple[int, int]], ranks: dict[str, int] | None = None) -> float:
    """Of one step with kernels of `ranks` at some layers and all else frozen; without `ranks`, all layers learn."""
    total, reached = 0, ranks is None
    for at, (name, (inputs, outputs)) in enumerate(layers.items()):
        rank = 0 if ranks is None else ranks.get(name, 0)
        into = reached and at > 0  # whether something before it learns
        total += inputs * outputs * (1 + (ranks is None) + into)
        total += rank * (2 * (inputs + outputs) + outputs + (inputs if into else 0))
        reached = reached or rank > 0
    return 2.0 * BATCH * total


def low_rank_parameters(layers: dict[str, tuple[int, int]], ranks: dict[str, int]) -> int:
    """How many numbers learn at a time."""
    return sum(rank * sum(layers[name]) for name, rank in ranks.items())
