"""LoRA adapters of PEFT as kernels, and kernels as adapters: each computes what the other does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import esper
from esper import Blueprint
from esper.integrations import peft
from tests.kernel_shelf import KernelShelf

_QUERY = "model.layers.0.self_attn.q_proj"
_TARGETS = ["q_proj", "down_proj", "lm_head"]


def _host(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def _ids() -> Tensor:
    return torch.randint(0, 24, (2, 5), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    logits: Tensor = model(_ids()).logits
    return logits


def _adapter(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Path, Tensor]:
    """An adapter as somebody trained it, and what PEFT computes with it."""
    given = {"r": 4, "lora_alpha": 6, "target_modules": _TARGETS, "lora_dropout": 0.1, **options}
    model = get_peft_model(_host(dtype), LoraConfig(**given))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return folder, _logits(model.eval())


def _wrapped(shelf: KernelShelf, dtype: torch.dtype = torch.float32) -> Any:
    return esper.wrap(_host(dtype), platform=shelf.platform)


def _put_in_force(shelf: KernelShelf, model: Any, kernels: dict[str, Blueprint], seed: int = 0, **options: Any) -> None:
    ids = {name: shelf.put(each).id for name, each in kernels.items()}
    assert model.request_kernels(list(ids), ids, seed_idx=seed, **options).result()
    model.commit()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 3}, "alpha_pattern": {"lm_head": 16}},
        {"lora_bias": True, "target_modules": ["q_proj"]},
    ],
    ids=["plain", "rsLoRA", "patterns", "bias of B"],
)
def test_an_adapter_as_kernels_computes_what_peft_computes_and_comes_back(
    shelf: KernelShelf, tmp_path: Path, options: dict[str, Any]
) -> None:
    folder, expected = _adapter(tmp_path / "in", **options)
    model = _wrapped(shelf)
    assert not torch.allclose(_logits(model), expected, atol=1e-3)
    _put_in_force(shelf, model, peft.load(model, folder))
    torch.testing.assert_close(_logits(model), expected)

    peft.save(model, tmp_path / "out")
    torch.testing.assert_close(_logits(PeftModel.from_pretrained(_host(), tmp_path / "out").eval()), expected)
    assert {name: each.id for name, each in peft.load(model, tmp_path / "out").items()} == {
        name: each.id for name, each in peft.load(model, folder).items()
    }


def test_kernels_of_an_adapter_are_of_the_dtype_of_their_layer(shelf: KernelShelf, tmp_path: Path) -> None:
    folder, expected = _adapter(tmp_path, torch.bfloat16)
    model = _wrapped(shelf, torch.bfloat16)
    kernels = peft.load(model, folder)
    assert {each.dtype for each in kernels.values()} == {"bfloat16"}
    _put_in_force(shelf, model, kernels)
    torch.testing.assert_close(_logits(model), expected, atol=0.05, rtol=0.05)


def test_adapters_of_one_shape_are_kernels_of_one_structure(shelf: KernelShelf, tmp_path: Path) -> None:
    folder, _ = _adapter(tmp_path, target_modules=["q_proj"], lora_alpha=3)
    kernels = list(peft.load(_wrapped(shelf), folder).values())
    digests = {each.graph.digest for each in kernels}
    assert digests == {Blueprint.low_rank(16, 16, 4).graph.digest}
    assert len({each.id for each in kernels}) == len(kernels) == 2


def test_seeds_of_one_layer_are_saved_as_one_adapter_at_their_alphas(shelf: KernelShelf, tmp_path: Path) -> None:
    model = _wrapped(shelf)
    for seed, (rank, alpha) in enumerate(((2, 0.5), (3, 0.25))):
        made = Blueprint.low_rank(16, 16, rank, bias=seed == 1)
        weights = {spec.name: torch.randn(spec.shape) * 0.3 for spec in made.graph.tensors}
        _put_in_force(shelf, model, {_QUERY: Blueprint.from_graph(made.graph, weights)}, seed, alpha=alpha)
    peft.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 5
    saved = PeftModel.from_pretrained(_host(), tmp_path).eval()
    torch.testing.assert_close(_logits(saved), _logits(model))


def test_what_no_adapter_holds_is_not_saved(shelf: KernelShelf, tmp_path: Path) -> None:
    model = _wrapped(shelf)
    with pytest.raises(peft.AdapterError, match="no kernel in force"):
        peft.save(model, tmp_path / "none")
    _put_in_force(shelf, model, {_QUERY: Blueprint.bottleneck(16, 16, 2, start="kaiming")})
    with pytest.raises(peft.AdapterError, match=f"layer '{_QUERY}' has kernel .* not low-rank"):
        peft.save(model, tmp_path / "other")
    model.unload_kernel(_QUERY, 0)
    _put_in_force(shelf, model, {_QUERY: Blueprint.low_rank(16, 16, 2)}, seed=1)
    assert model.fossilize(_QUERY, 1)
    model.commit()
    with pytest.raises(peft.AdapterError, match=r"seed 1 .* is a fossil"):
        peft.save(model, tmp_path / "fossil")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(peft.AdapterError, match=r"what esper.wrap returned, not"):
        peft.save(nn.Linear(2, 2), tmp_path)  # type: ignore[arg-type]  # what is refused


def _edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"use_dora": True}, "use_dora=True, which kernels cannot do"),
        ({"bias": "lora_only"}, "trains the host's biases"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save=\['embed_tokens'\]"),
        ({"init_lora_weights": "pissa"}, "changes the host's own weights"),
        ({"something_new": {"a": 1}}, "something_new"),
        ({"r": 0}, "r=0"),
        ({"r": 5}, "the rank 5 that adapter_config.json says"),
        ({"lora_alpha": "much"}, "lora_alpha='much'"),
        ({"rank_pattern": {"(": 2}}, "is no pattern"),
    ],
)  # fmt: skip
def test_what_cannot_be_kernels_is_refused_by_name(
    shelf: KernelShelf, tmp_path: Path, fields: dict[str, Any], match: str
) -> None:
    folder, _ = _adapter(tmp_path)
    _edit(folder, **fields)
    with pytest.raises(peft.AdapterError, match=match):
        peft.load(_wrapped(shelf), folder)


def _change(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


_A = f"base_model.model.{_QUERY}.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors[_A].fill_(float("nan")), f"layer '{_QUERY}' cannot be a kernel: .*finite"),
        (lambda tensors: tensors.update({_A: torch.ones(4, 9)}), rf"layer '{_QUERY}' are of shapes \(4, 9\)"),
        (lambda tensors: tensors.pop(_A), "has no lora_A.weight for layer"),
        (lambda tensors: tensors.update({_A.replace("q_proj", "q_prog"): torch.ones(4, 16)}), "has no lora_B.weight"),
        (lambda tensors: tensors.update({"base_model.model.x.lora_magnitude_vector": torch.ones(4)}), "x.lora_magn"),
        (lambda tensors: tensors["base_model.model.lm_head.base_layer.weight"].add_(1), "of its own for 'lm_head'"),
        (lambda tensors: tensors.clear(), "has no tensors"),
    ],
    ids=["NaN", "shape", "no A", "no B", "of another kind", "another host", "empty"],
)
def test_damaged_weights_are_refused(shelf: KernelShelf, tmp_path: Path, change: Any, match: str) -> None:
    folder, _ = _adapter(tmp_path)
    _change(folder, change)
    with pytest.raises(peft.AdapterError, match=match):
        peft.load(_wrapped(shelf), folder)


def test_an_adapter_of_layers_that_are_not_there_is_refused(shelf: KernelShelf, tmp_path: Path) -> None:
    folder, _ = _adapter(tmp_path, target_modules=["q_proj"])
    model = esper.wrap(_host(), target_layers=["lm_head"], platform=shelf.platform)
    with pytest.raises(peft.AdapterError, match=r"1 other layers.* carries no seeds"):
        peft.load(model, folder)
    other = esper.wrap(nn.Sequential(nn.Linear(16, 16)), platform=shelf.platform)
    with pytest.raises(peft.AdapterError, match="which is not there"):
        peft.load(other, folder)


def test_a_folder_without_an_adapter_is_refused(shelf: KernelShelf, tmp_path: Path) -> None:
    model = _wrapped(shelf)
    with pytest.raises(peft.AdapterError, match=r"adapter_config.json cannot be read"):
        peft.load(model, tmp_path)
    folder, _ = _adapter(tmp_path / "in")
    (folder / "adapter_model.safetensors").write_bytes(b"12345678 no tensors")
    with pytest.raises(peft.AdapterError, match=r"adapter_model.safetensors cannot be read"):
        peft.load(model, folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(peft.AdapterError, match=r"adapter_model.bin, a pickle"):
        peft.load(model, folder)
