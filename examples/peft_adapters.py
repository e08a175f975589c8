"""LoRA adapters of PEFT in a wrapped llama, swapped while it runs, and saved again: python examples/peft_adapters.py"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import esper
from esper.integrations import peft

TOKENS = torch.arange(12)[None]


def host() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


def train_elsewhere(folder: Path, seed: int) -> Tensor:
    """Stand in for somebody's training of an adapter; what PEFT computes with it."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(host(), config)
    adapted.save_pretrained(str(folder))
    return logits(adapted.eval())


def main() -> None:
    with esper.Platform.embedded() as platform, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = {each: train_elsewhere(folder / each, seed) for seed, each in enumerate(("formal", "casual"), 1)}
        model = esper.wrap(host(), platform=platform)
        for each in expected:
            adapter = peft.load(model, folder / each)
            loading = model.request_kernels(list(adapter), adapter)  # the model may run and train meanwhile
            assert loading.result(), loading.errors
            agrees = torch.allclose(logits(model), expected[each], atol=1e-5)
            print(f"{each}: {'as PEFT computes it' if agrees else 'other than PEFT computes it'}")
        peft.save(model, folder / "saved")
        again = PeftModel.from_pretrained(host(), str(folder / "saved"))
        agrees = torch.allclose(logits(again.eval()), expected["casual"], atol=1e-5)
        print(f"saved: {'as PEFT computes it' if agrees else 'other than PEFT computes it'}")


if __name__ == "__main__":
    main()
