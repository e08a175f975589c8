"""Wrapped models of `transformers`: saved, restored, trained by its Trainer, and generating, as the host is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import esper
from esper.artifacts import Blueprint
from esper.execution.lifecycle import SeedLifecycleState
from tests.kernel_shelf import KernelShelf

_VOCABULARY, _WIDTH = 24, 16


def _host(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCABULARY, hidden_size=_WIDTH, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
        )
    ).eval()  # fmt: skip


def _fresh(shelf: KernelShelf, **options: Any) -> Any:
    return esper.wrap(_host(**options), platform=shelf.platform)


def _kernel(shelf: KernelShelf, seed: int = 0) -> str:
    return shelf.put(Blueprint.low_rank(_WIDTH, _VOCABULARY, rank=2, start="kaiming", seed=seed)).id


def _grown(shelf: KernelShelf, trainable: bool = True, **options: Any) -> Any:
    model = _fresh(shelf, **options)
    assert model.request_kernel("lm_head", 0, _kernel(shelf), alpha=0.5, trainable=trainable).result()
    model.commit()
    return model


def _ids(rows: int = 2) -> Tensor:
    return torch.randint(3, _VOCABULARY, (rows, 5), generator=torch.Generator().manual_seed(1))


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(_ids()).logits
    return logits


class Sentences(Dataset[dict[str, Any]]):
    """Random tokens, with a column that the model does not take."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = _ids(8)[index]
        return {"input_ids": ids, "labels": ids, "note": "text"}


def _trainer(model: Any, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    given: dict[str, Any] = {
        "per_device_train_batch_size": 2, "num_train_epochs": 2, "use_cpu": True, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "learning_rate": 0.05, "lr_scheduler_type": "constant",
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **{**given, **options})
    return Trainer(
        model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences(), callbacks=list(callbacks)
    )


class Growing(TrainerCallback):
    """Loads a kernel after the first epoch and gives its parameters to the optimizer."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.first: list[Tensor] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """As Trainer calls it."""
        model = given["model"]
        if state.epoch >= 1 and not self.first:
            assert model.request_kernel("lm_head", 0, self.kernel, alpha=0.5, trainable=True).result()
            model.commit()
            self.first = [parameter.detach().clone() for parameter in model.seed_parameters()]
            given["optimizer"].param_groups[0]["params"].extend(model.seed_parameters())


def test_trainer_trains_a_kernel_that_comes_while_it_trains(shelf: KernelShelf, tmp_path: Path) -> None:
    model, growing = _fresh(shelf), Growing(_kernel(shelf))
    result = _trainer(model, tmp_path, growing).train()
    assert result.training_loss == result.training_loss
    assert growing.first
    changes = [not torch.equal(a, b) for a, b in zip(growing.first, model.seed_parameters(), strict=True)]
    assert all(changes)


def test_trainer_resumes_a_run_that_has_grown(shelf: KernelShelf, tmp_path: Path) -> None:
    class ByGroup(Growing):
        """As docs/optimizers.md has it."""

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            model = given["model"]
            if state.epoch >= 1 and not list(model.seed_parameters()):
                assert model.request_kernel("lm_head", 0, self.kernel, alpha=0.5, trainable=True).result()
                model.commit()
                given["optimizer"].add_param_group({"params": list(model.seed_parameters())})

    options = {"save_strategy": "epoch", "weight_decay": 0.1}
    whole, kernel = _fresh(shelf), _kernel(shelf)
    _trainer(whole, tmp_path / "whole", ByGroup(kernel), num_train_epochs=3, **options).train()
    _trainer(_fresh(shelf), tmp_path / "parts", ByGroup(kernel), num_train_epochs=2, **options).train()
    again = _fresh(shelf)
    resumed = _trainer(again, tmp_path / "parts", ByGroup(kernel), num_train_epochs=3, **options)
    resumed.train(resume_from_checkpoint=True)
    assert again.kasmina_layers["lm_head"].state.lifecycle(0) is SeedLifecycleState.ACTIVE
    held = {id(each) for group in resumed.optimizer.param_groups for each in group["params"]}
    assert held >= {id(each) for each in again.seed_parameters()}


def test_trainer_trains_a_dormant_model_as_its_host(shelf: KernelShelf, tmp_path: Path) -> None:
    losses = [_trainer(each, tmp_path, seed=3).train().training_loss for each in (_host(), _fresh(shelf))]
    assert losses[0] == losses[1]


def test_load_best_model_at_end_takes_growth_back(shelf: KernelShelf, tmp_path: Path) -> None:
    model, growing = _fresh(shelf), Growing(_kernel(shelf))
    trainer = _trainer(
        model, tmp_path, growing, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True
    )
    evaluate, calls = trainer.evaluate, iter((1.0, 2.0))
    trainer.evaluate = lambda *args, **kwargs: {**evaluate(*args, **kwargs), "eval_loss": next(calls)}  # type: ignore[method-assign]  # the second epoch is to be the worse
    trainer.train()
    assert growing.first
    best = LlamaForCausalLM.from_pretrained(trainer.state.best_model_checkpoint).eval()
    assert model.kasmina_layers["lm_head"].state.lifecycle(0) is SeedLifecycleState.DORMANT
    torch.testing.assert_close(_logits(model.eval()), _logits(best))


def test_save_pretrained_of_a_dormant_model_takes_kernels_out_where_it_is_loaded(
    shelf: KernelShelf, tmp_path: Path
) -> None:
    model = _fresh(shelf)
    expected = _logits(model)
    model.save_pretrained(tmp_path)
    grown = _grown(shelf)
    assert grown.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False).unexpected_keys == []
    torch.testing.assert_close(_logits(grown), expected)
    assert list(grown.seed_parameters()) == []
    torch.testing.assert_close(_logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), expected)


def test_what_the_host_saved_leaves_kernels_and_says_so(
    shelf: KernelShelf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _host().save_pretrained(tmp_path)
    grown = _grown(shelf)
    expected = _logits(grown)
    with caplog.at_level(logging.WARNING, "esper"):
        grown.load_state_dict(load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(_logits(grown), expected)
    assert "the kernels in force stay" in caplog.text


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("fossil", [False, True], ids=["active", "fossil"])
def test_a_grown_model_saved_comes_back(shelf: KernelShelf, tmp_path: Path, fossil: bool, tied: bool) -> None:
    model = _grown(shelf, tie_word_embeddings=tied)
    if fossil:
        assert model.fossilize("lm_head", 0)
        model.commit()
    model.save_pretrained(tmp_path)
    again = esper.wrap(LlamaForCausalLM.from_pretrained(tmp_path).eval(), platform=shelf.platform)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=not tied)  # the tied name is not saved
    torch.testing.assert_close(_logits(again), _logits(model))


@pytest.mark.parametrize("fossilized", [False, True])
def test_a_baked_model_saved_and_loaded_computes_the_same(shelf: KernelShelf, tmp_path: Path, fossilized: bool) -> None:
    model = _grown(shelf)
    if fossilized:
        assert model.fossilize("lm_head", 0)
        model.commit()
    esper.bake(model).save_pretrained(tmp_path)
    torch.testing.assert_close(_logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), _logits(model))


def test_a_baked_model_that_its_class_cannot_load_says_so(shelf: KernelShelf) -> None:
    model = _grown(shelf)
    kernel = shelf.put(Blueprint.bottleneck(_WIDTH, _VOCABULARY, 2, start="kaiming")).id
    assert model.request_kernel("lm_head", 1, kernel, alpha=0.5).result()
    model.commit()
    with pytest.warns(UserWarning, match="kernels of 'lm_head' .* loaded without them"):
        baked = esper.bake(model)
    torch.testing.assert_close(_logits(baked), _logits(model))


def test_num_parameters_counts_kernels(shelf: KernelShelf) -> None:
    model = _grown(shelf)
    kernels = sum(parameter.numel() for parameter in model.seed_parameters())
    assert kernels > 0
    assert model.num_parameters() == _host().num_parameters() + kernels


def test_generate_puts_a_staged_kernel_in_force(shelf: KernelShelf) -> None:
    model = _fresh(shelf)
    before = model.generate(_ids(), max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert model.request_kernel("lm_head", 0, _kernel(shelf), alpha=0.5).result()
    after = model.generate(_ids(), max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert model.kasmina_layers["lm_head"].state.lifecycle(0) is SeedLifecycleState.ACTIVE
    assert not torch.allclose(before.logits[0], after.logits[0])


def test_resized_embeddings_take_the_kernels_of_the_head_out_and_say_so(shelf: KernelShelf) -> None:
    model = _grown(shelf)
    model.resize_token_embeddings(_VOCABULARY + 4, mean_resizing=False)
    with pytest.warns(UserWarning, match="lm_head"):
        logits = _logits(model)
    assert logits.shape[-1] == _VOCABULARY + 4
    assert list(model.seed_parameters()) == []
    kernel = shelf.put(Blueprint.low_rank(_WIDTH, _VOCABULARY + 4, rank=2, start="kaiming")).id
    assert model.request_kernel("lm_head", 0, kernel, alpha=0.5).result()
    assert not torch.allclose(_logits(model), logits)


def test_gradient_checkpointing_changes_no_gradient(shelf: KernelShelf) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = _grown(shelf).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(_ids(), labels=_ids(), use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_two_seeds_of_one_frozen_artifact_are_saved_by_safetensors(shelf: KernelShelf, tmp_path: Path) -> None:
    model = _grown(shelf, trainable=False)
    assert model.request_kernel("lm_head", 1, _kernel(shelf), alpha=0.25).result()
    expected = _logits(model)
    save_model(model, str(tmp_path / "file"))
    again = _fresh(shelf)
    again.load_state_dict(load_file(tmp_path / "file"))
    torch.testing.assert_close(_logits(again), expected)
