"""A llama small enough to be trained in a test, kernels for its head, and sentences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

import esper
from esper import Blueprint
from tests.kernel_shelf import KernelShelf

__all__ = ["VOCABULARY", "WIDTH", "Sentences", "head_kernel", "host", "ids", "logits", "wrapped"]

VOCABULARY, WIDTH = 24, 16


def host(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def wrapped(shelf: KernelShelf, **options: Any) -> Any:
    return esper.wrap(host(**options), platform=shelf.platform)


def head_kernel(shelf: KernelShelf, seed: int = 0) -> str:
    return shelf.put(Blueprint.low_rank(WIDTH, VOCABULARY, rank=2, start="kaiming", seed=seed)).id


def ids(rows: int = 2) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, 5), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(ids()).logits
    return found


class Sentences(Dataset[dict[str, Any]]):
    """Random tokens, with a column that the model does not take."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = ids(8)[index]
        return {"input_ids": row, "labels": row, "note": "text"}
