"""The models that the benchmarks of the backend train, each with a batch: small, and of every kind that matters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.dormant_overhead import Block

__all__ = ["WORKLOADS", "MlpBlock", "Workload", "training_step"]

_WIDTH, _VOCABULARY, _TOKENS = 128, 512, (4, 32)


@dataclass(frozen=True)
class Workload:
    """A model, a batch as keyword or positional arguments, and the linear layer that gets a kernel."""

    title: str
    build: Callable[[int], nn.Module]
    """Of a number of blocks."""
    blocks: int
    batch: Callable[[], tuple[tuple[Any, ...], Mapping[str, Any]]]
    loss: Callable[[Any], Tensor]
    site: Callable[[int], str]
    """The layer's name, of the number of blocks: the widening one of the block in the middle."""

    def model(self, device: str, blocks: int | None = None) -> nn.Module:
        """A model on `device`, always with the same weights."""
        torch.manual_seed(0)
        return self.build(blocks or self.blocks).to(device)

    def bound(self, model: Callable[..., Any], device: str) -> Callable[[], Tensor]:
        """The loss of `model` on the batch, as a function of nothing."""
        torch.manual_seed(1)
        args, kwargs = self.batch()
        args = tuple(value.to(device) for value in args)
        kwargs = {name: value.to(device) for name, value in kwargs.items()}
        loss = self.loss
        return lambda: loss(model(*args, **kwargs))


def training_step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Forward, backward and a step of the optimizer."""

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


class MlpBlock(nn.Module):
    """Pre-norm residual MLP, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.fc2(F.gelu(self.fc1(self.ln(x))))
        return y


class BrokenInTwo(nn.Module):
    """Two halves that Dynamo cannot compile into one graph."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        blocks = list(blocks)
        self.first = nn.Sequential(*blocks[: len(blocks) // 2])
        self.second = nn.Sequential(*blocks[len(blocks) // 2 :])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        y: Tensor = self.second(x)
        return y


def _mean_square(output: Tensor) -> Tensor:
    return output.square().mean()


def _vectors() -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    return (torch.randn(64, _WIDTH),), {}


def _sequences() -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    return (torch.randn(*_TOKENS, _WIDTH),), {}


def _next_tokens() -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    tokens = torch.randint(_VOCABULARY, _TOKENS)
    return (), {"input_ids": tokens, "labels": tokens}


def _classified_texts() -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    return (), {"input_ids": torch.randint(_VOCABULARY, _TOKENS), "labels": torch.randint(2, _TOKENS[:1])}


def _llama(blocks: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=_WIDTH, intermediate_size=3 * _WIDTH, num_hidden_layers=blocks, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=_VOCABULARY, max_position_embeddings=_WIDTH, use_cache=False,
        )
    )  # fmt: skip


def _bert(blocks: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            hidden_size=_WIDTH, intermediate_size=4 * _WIDTH, num_hidden_layers=blocks, num_attention_heads=4,
            vocab_size=_VOCABULARY, max_position_embeddings=_WIDTH,
        )
    )  # fmt: skip


def _half(blocks: int) -> int:
    return blocks - blocks // 2


WORKLOADS: dict[str, Workload] = {
    "mlp": Workload(
        "MLP", lambda blocks: nn.Sequential(*[MlpBlock(_WIDTH) for _ in range(blocks)]), 6, _vectors, _mean_square,
        lambda blocks: f"{blocks // 2}.fc1",
    ),
    "transformer": Workload(
        "transformer", lambda blocks: nn.Sequential(*[Block(_WIDTH, 4) for _ in range(blocks)]), 6, _sequences,
        _mean_square, lambda blocks: f"{blocks // 2}.fc1",
    ),
    "llama": Workload(
        "llama", _llama, 2, _next_tokens, lambda output: output.loss,
        lambda blocks: f"model.layers.{blocks // 2}.mlp.gate_proj",
    ),
    "bert": Workload(
        "bert", _bert, 2, _classified_texts, lambda output: output.loss,
        lambda blocks: f"bert.encoder.layer.{blocks // 2}.intermediate.dense",
    ),
    "graph-break": Workload(
        "MLP in two graphs", lambda blocks: BrokenInTwo(MlpBlock(_WIDTH) for _ in range(blocks)), 6, _vectors,
        _mean_square, lambda blocks: f"second.{_half(blocks) // 2}.fc1",
    ),
}  # fmt: skip
