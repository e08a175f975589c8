"""EsperTrainer and EsperCallback: kernels that come while a Trainer trains learn, resume, and are logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import TorchDynamoPlugin
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import esper
from esper.core.errors import WrapError
from esper.execution.lifecycle import SeedLifecycleState
from esper.integrations.transformers import EsperCallback, EsperTrainer
from tests.integrations.tiny_llama import Sentences, head_kernel, host, logits, wrapped
from tests.kernel_shelf import KernelShelf


class Growing(TrainerCallback):
    """Loads a kernel into the head before the second epoch."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model = given["model"]
        if state.epoch >= 1 and not list(model.seed_parameters()):
            assert model.request_kernel("lm_head", 0, self.kernel, alpha=0.5, trainable=True).result()
            model.commit()


def _trainer(
    model: Any, folder: Path, *callbacks: TrainerCallback, kind: type[Trainer] = EsperTrainer, **options: Any
) -> Any:
    given: dict[str, Any] = {
        "per_device_train_batch_size": 2, "num_train_epochs": 2, "use_cpu": True, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "learning_rate": 0.05, "logging_steps": 2,
    }  # fmt: skip
    extra = {"esper_options": options.pop("esper_options")} if "esper_options" in options else {}
    arguments = TrainingArguments(output_dir=str(folder), **{**given, **options})
    return kind(
        model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences(), callbacks=list(callbacks),
        **extra,
    )  # fmt: skip


def _losses(trainer: Trainer) -> list[float]:
    return [each["loss"] for each in trainer.state.log_history if "loss" in each]


def _learning_rates(trainer: Any) -> list[float]:
    return [group["lr"] for group in trainer.optimizer.param_groups]


def _held(trainer: Any) -> set[int]:
    return {id(each) for group in trainer.optimizer.param_groups for each in group["params"]}


def test_a_run_that_has_grown_resumes_to_the_same_loss(shelf: KernelShelf, tmp_path: Path) -> None:
    kernel = head_kernel(shelf)
    options = {"num_train_epochs": 4, "save_strategy": "steps", "save_steps": 4, "weight_decay": 0.1}
    whole = wrapped(shelf)
    first = _trainer(whole, tmp_path, Growing(kernel), **options)
    first.train()
    again = wrapped(shelf)
    resumed = _trainer(again, tmp_path, Growing(kernel), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert again.kasmina_layers["lm_head"].state.lifecycle(0) is SeedLifecycleState.ACTIVE
    assert _held(resumed) >= {id(each) for each in again.seed_parameters()}
    assert len(resumed.optimizer.param_groups) == len(first.optimizer.param_groups)
    assert _losses(resumed) == _losses(first)
    for (name, expected), actual in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(actual, expected), name


def test_a_kernel_learns_at_the_rate_that_was_asked_for(shelf: KernelShelf, tmp_path: Path) -> None:
    model, seen = wrapped(shelf), list[Tensor]()

    class Watching(Growing):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            seen.append(
                torch.cat([each.detach().flatten() for each in given["model"].seed_parameters()] or [torch.zeros(1)])
            )

    trainer = _trainer(
        model, tmp_path, Watching(head_kernel(shelf)), esper_options={"lr_factor": 0.5}, lr_scheduler_type="constant",
        gradient_accumulation_steps=2, gradient_checkpointing=True,
    )  # fmt: skip
    trainer.train()
    assert sorted(_learning_rates(trainer)) == [0.025, 0.05, 0.05]
    assert not torch.equal(seen[-1], seen[-2])
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.train()  # once more, with the optimizer that it has
    assert _held(trainer) >= {id(each) for each in model.seed_parameters()}


def test_what_seeds_do_is_logged_where_trainer_logs(
    shelf: KernelShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = _trainer(wrapped(shelf), tmp_path, Growing(head_kernel(shelf)), report_to=["tensorboard"])
    metrics = trainer.train().metrics
    assert not any(name.startswith("esper") for name in metrics)
    assert "epoch" in metrics
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    alphas = [each.value for each in board.Scalars("train/esper/lm_head/0/alpha")]
    assert alphas
    assert set(alphas) == {0.5}
    assert [each.value for each in board.Scalars("train/esper/seeds/active")][:: len(alphas)][:2] == [0, 1]


def test_a_callback_says_who_has_a_grower() -> None:
    with pytest.raises(TypeError, match=r"EsperTrainer\(grower=\.\.\.\) has a grower"):
        EsperCallback(grower=lambda model, optimizer: None)


def test_a_callback_does_it_for_any_trainer(shelf: KernelShelf, tmp_path: Path) -> None:
    model = wrapped(shelf)
    trainer = _trainer(model, tmp_path, EsperCallback(weight_decay=0.0), Growing(head_kernel(shelf)), kind=Trainer)
    trainer.train()
    assert _held(trainer) >= {id(each) for each in model.seed_parameters()}
    assert trainer.state.log_history[-1]["esper/seeds/active"] == 1
    trainer.train()


def test_a_model_that_is_not_wrapped_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrapError, match=r"LlamaForCausalLM.* holds no wrapped model: .* esper.wrap"):
        _trainer(host(), tmp_path)
    with pytest.raises(WrapError, match="holds no wrapped model"):
        _trainer(host(), tmp_path, EsperCallback(), kind=Trainer).train()


@pytest.mark.slow
def test_torch_compile_backend_is_esper(shelf: KernelShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(self: Any) -> dict[str, Any]:
        return {**to_kwargs(self), "options": {"inner": "aot_eager"}}

    to_kwargs = TorchDynamoPlugin.to_kwargs
    monkeypatch.setattr(TorchDynamoPlugin, "to_kwargs", quick)  # Trainer has no argument for options
    losses = []
    for backend in ("esper", None):
        model = wrapped(shelf)
        options = {"torch_compile": True, "torch_compile_backend": backend} if backend else {}
        trainer = _trainer(model, tmp_path, Growing(head_kernel(shelf)), **options, save_strategy="epoch")
        trainer.train()
        losses.append(torch.tensor(_losses(trainer)))
        if backend:
            report = model.compile_report()
            assert any(len(graph.variants) > 1 for graph in report.graphs)
            assert trainer.evaluate()["eval_loss"] > 0
    torch.testing.assert_close(*losses, atol=1e-3, rtol=1e-3)
    saved = sorted(each.name for each in (tmp_path / "checkpoint-8").iterdir())
    assert {"config.json", "model.safetensors", "optimizer.pt"} <= set(saved)
    again = esper.wrap(LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-8"), platform=shelf.platform)
    resumed = _trainer(again, tmp_path, Growing(head_kernel(shelf)), num_train_epochs=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    torch.testing.assert_close(logits(again.eval()), logits(model.eval()))
