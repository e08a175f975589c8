"""Seeds at `Conv1D` and at blocks of models of `transformers`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP
from transformers.pytorch_utils import Conv1D

import esper
from esper.artifacts import Blueprint
from esper.core.errors import SiteCallError
from esper.integrations import peft
from tests.core.seeds import load
from tests.kernel_shelf import KernelShelf

W, VOCABULARY = 16, 24


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=W, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=W, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, call: Any = None) -> Tensor:
    result: Tensor = (model if call is None else call)(ids()).logits
    return result


def test_gpt_2_grows_at_its_conv1d(shelf: KernelShelf, fresh_dynamo: None) -> None:
    plain = gpt2()
    model = esper.wrap(plain, [nn.Linear, Conv1D], platform=shelf.platform)
    features = {name: layer.features for name, layer in model.kasmina_layers.items()}
    assert features["transformer.h.0.attn.c_attn"] == (W, 3 * W)
    assert features["transformer.h.1.mlp.c_proj"] == (4 * W, W)
    assert isinstance(model.transformer.h[0].mlp.c_fc, Conv1D)
    before = logits(plain)
    assert torch.equal(logits(model), before)
    compiled = torch.compile(model, backend="esper", options={"inner": "eager"})
    torch.testing.assert_close(logits(model, compiled), before)
    kernel = shelf.put(Blueprint.low_rank(W, 4 * W, 2, start="kaiming"))
    added = shelf.put(Blueprint.low_rank(W, 4 * W, 2))
    load(model, "transformer.h.0.mlp.c_fc", 0, added.id, trainable=True)
    assert torch.equal(logits(model), before)
    load(model, "transformer.h.0.mlp.c_fc", 1, kernel.id, alpha=0.5)
    maps = kernel.graph.to_module(dict(kernel.tensors))
    plain.transformer.h[0].mlp.c_fc.register_forward_hook(lambda _, given, y: 0.5 * maps(given[0]) + 0.5 * y)
    torch.testing.assert_close(logits(model), logits(plain))
    torch.testing.assert_close(logits(model, compiled), logits(plain))
    assert model.generate(ids(), max_new_tokens=3, do_sample=False).tolist() == plain.generate(
        ids(), max_new_tokens=3, do_sample=False
    ).tolist()  # fmt: skip


def test_a_llama_grows_behind_its_feed_forward_blocks(shelf: KernelShelf, fresh_dynamo: None) -> None:
    plain = llama()
    model = esper.wrap(plain, [nn.Linear, LlamaMLP], platform=shelf.platform)
    before = logits(model)
    assert torch.equal(before, logits(plain))
    assert model.kasmina_layers["model.layers.1.mlp"].features == (W, W)
    compiled = torch.compile(model, backend="esper", options={"inner": "eager"})
    kernel = shelf.put(Blueprint.deepen(W, W, 8, norm="rms_norm", activation="silu", bias=False))
    load(model, "model.layers.1.mlp", 0, kernel.id, trainable=True)
    torch.testing.assert_close(logits(model), before)
    torch.testing.assert_close(logits(model, compiled), before)
    compiled(ids(), labels=ids()).loss.backward()
    gradients = [each.grad for each in model.kasmina_layers["model.layers.1.mlp"].kernel_parameters(0)]
    assert any(each is not None and each.any() for each in gradients)
    with pytest.raises(
        peft.AdapterError, match=r"'model.layers.1.mlp' is a LlamaMLP, and adapters are for linear layers"
    ):
        peft.save(model, "never")


def test_a_block_that_takes_masks_is_refused_at_its_call(shelf: KernelShelf) -> None:
    model = esper.wrap(llama(), LlamaDecoderLayer, platform=shelf.platform)
    with pytest.raises(
        SiteCallError, match=r"'model.layers.0' was called with an argument, attention_mask.*one tensor"
    ):
        logits(model)
