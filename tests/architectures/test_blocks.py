"""Deep models compiled block by block: what Hugging Face's do with their blocks, and no end at Dynamo's limit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import esper
from tests.compiler.agreement import load, put
from tests.kernel_shelf import KernelShelf

pytestmark = [pytest.mark.usefixtures("counted_dynamo"), pytest.mark.timeout(600)]

_DEPTH = 10  # more than Dynamo compiles one function


def _llama(**options: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=_DEPTH, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, max_position_embeddings=32, pad_token_id=0, **options,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def _tokens() -> Tensor:
    return torch.randint(1, 32, (2, 6))


def _training(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """The loss of a step, and all gradients."""
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(each.grad for each in model.parameters() if each.grad is not None)]


def _same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_a_llama_trains_and_grows_with_one_trace_of_its_blocks(checkpointing: bool, shelf: KernelShelf) -> None:
    model, tokens = esper.wrap(_llama(), platform=shelf.platform).train(), _tokens()
    names = esper.compile_blocks(model, options={"inner": "aot_eager"})
    assert names == [f"model.layers.{i}" for i in range(_DEPTH)]
    plain = copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    _same(_training(model, tokens), _training(plain, tokens))
    traced = counters["stats"]["unique_graphs"]
    for each in (model, plain):
        load(each, "model.layers.3.mlp.gate_proj", 0, put(shelf, 16, 24))
        load(each, "model.layers.9.self_attn.q_proj", 1, put(shelf, 16, 16, seed=2))
    _same(_training(model, tokens), _training(plain, tokens))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = _training(model, tokens)[0], _training(plain, tokens)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    assert traced == 1
    assert counters["stats"]["unique_graphs"] == 2, "one more for autocast"


@pytest.mark.slow
def test_a_llama_generates_with_a_static_cache_before_and_after_a_swap(shelf: KernelShelf) -> None:
    model, tokens = esper.wrap(_llama(), platform=shelf.platform).eval(), _tokens()
    esper.compile_blocks(model, options={"inner": "eager"})
    plain = copy.deepcopy(model)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    for grown in (False, True):
        if grown:
            for each in (model, plain):
                load(each, "model.layers.3.mlp.gate_proj", 0, put(shelf, 16, 24), alpha=1.0)
        ours = model.generate(tokens, cache_implementation="static", **options)
        assert torch.equal(ours, plain.generate(tokens, **options))
