"""A grower inside Trainer and Lightning: it decides there what it decides in a loop of one's own, and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainingArguments

import esper
from esper.core.errors import WrapError
from esper.growth import GrowthError
from esper.integrations.lightning import EsperCallback
from esper.integrations.transformers import EsperTrainer
from tests.growth.growing import OPTIONS, X, Y, begin, decisions, fitted, loss_of, mean_loss
from tests.kernel_shelf import KernelShelf

pytestmark = pytest.mark.xdist_group("growth")  # where the kernels of two units are compiled already

STEPS = 60
"""A growth takes 40, and a second one is on trial then."""


def make_grower(model: Any, optimizer: torch.optim.Optimizer) -> esper.Grower:
    return esper.Grower(model, optimizer, loss_of, **OPTIONS)


def in_a_loop(shelf: KernelShelf, steps: int = STEPS) -> Any:
    """The same run without any trainer."""
    run = begin(shelf)
    run.steps(steps)
    return run


# -- Lightning ---------------------------------------------------------------------------------------------------------


class Regression(lightning.LightningModule):
    def __init__(self, shelf: KernelShelf, nets: int = 1) -> None:
        super().__init__()
        for number in range(nets):
            net: Any = esper.wrap(nn.Sequential(fitted()), platform=shelf.platform)
            setattr(self, f"net{number}", net)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return loss_of(self.net0, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


class ByHand(Regression):
    """With manual optimization; returns its loss, or keeps it to itself."""

    automatic_optimization = False
    tells = True

    def training_step(self, batch: Any, index: int) -> Any:
        optimizer: Any = self.optimizers()
        loss = loss_of(self.net0, batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss if self.tells else None


class TwoNets(ByHand):
    """With an optimizer each, as adversarial networks have."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(each.parameters(), lr=0.02) for each in (self.net0, self.net1)]


def fit(
    module: Regression,
    folder: Path,
    callback: EsperCallback,
    *,
    batch: int = 300,
    ckpt: Path | None = None,
    **options: Any,
) -> lightning.Trainer:
    given: dict[str, Any] = {"max_steps": STEPS, "accelerator": "cpu", "logger": False, **options}
    checkpoints = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=7)
    trainer = lightning.Trainer(
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback, checkpoints], **given
    )
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=batch), ckpt_path=ckpt)
    return trainer


@pytest.mark.parametrize("kind", [Regression, ByHand])
def test_lightning_grows_as_a_loop_does(kind: type[Regression], shelf: KernelShelf, tmp_path: Path) -> None:
    callback, module = EsperCallback(grower=make_grower), kind(shelf)
    assert callback.grower is None
    fit(module, tmp_path, callback)
    own = in_a_loop(shelf)
    assert callback.grower is not None
    assert decisions(callback.grower) == decisions(own.grower)
    assert callback.grower.history[2].event == "kept"
    assert mean_loss(module.net0) == mean_loss(own.model)


def test_a_compiled_module_grows(shelf: KernelShelf, tmp_path: Path) -> None:
    callback, module = EsperCallback(grower=make_grower), Regression(shelf)
    module.net0.compile(backend="esper", options={"inner": "aot_eager"})
    fit(module, tmp_path, callback, max_steps=40)
    assert callback.grower is not None
    assert [each.event for each in callback.grower.history][:3] == ["chosen", "in force", "kept"]
    assert any(len(graph.variants) > 1 for graph in module.net0.compile_report().graphs)


@pytest.mark.parametrize("at", [7, 21, 49])
def test_lightning_resumes_in_the_middle_of_a_growth(at: int, shelf: KernelShelf, tmp_path: Path) -> None:
    """While a kernel is staged, while it is tried, and in the second growth."""
    whole, again = EsperCallback(grower=make_grower), EsperCallback(grower=make_grower)
    module, resumed = Regression(shelf), Regression(shelf)
    fit(module, tmp_path / "whole", whole)
    fit(resumed, tmp_path / "again", again, ckpt=tmp_path / "whole" / f"step={at}.ckpt")
    assert whole.grower is not None
    assert again.grower is not None
    assert (again.grower.steps, again.grower.spent) == (STEPS, whole.grower.spent)
    assert decisions(again.grower) == decisions(whole.grower)
    assert mean_loss(resumed.net0) == mean_loss(module.net0)


def test_a_step_of_several_batches_is_one_step_for_the_grower(shelf: KernelShelf, tmp_path: Path) -> None:
    callback = EsperCallback(grower=make_grower, lr_factor=0.5)
    trainer = fit(Regression(shelf), tmp_path, callback, batch=150, accumulate_grad_batches=2, max_steps=20)
    own = in_a_loop(shelf, 20)
    assert callback.grower is not None
    assert callback.grower.steps == 20
    assert callback.grower.history[0].loss == pytest.approx(own.grower.history[0].loss)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.02, 0.01]


def test_a_second_fit_goes_on_growing(shelf: KernelShelf, tmp_path: Path) -> None:
    callback, module = EsperCallback(grower=make_grower), Regression(shelf)
    fit(module, tmp_path, callback, max_steps=20)
    first = callback.grower
    trainer = fit(module, tmp_path, callback, max_steps=20)
    assert callback.grower is first
    assert first is not None
    assert first.steps == 40
    assert first.history[2].event == "kept"
    held = {id(each) for group in trainer.optimizers[0].param_groups for each in group["params"]}
    assert held >= {id(each) for each in module.net0.seed_parameters()}  # though it is another optimizer
    fit(Regression(shelf), tmp_path, callback, max_steps=2)
    assert callback.grower is not first
    assert first.stopped == "closed"


def test_a_checkpoint_from_before_there_was_a_grower(shelf: KernelShelf, tmp_path: Path) -> None:
    fit(Regression(shelf), tmp_path, EsperCallback(), max_steps=7)
    callback = EsperCallback(grower=make_grower)
    fit(Regression(shelf), tmp_path, callback, ckpt=tmp_path / "step=7.ckpt", max_steps=20)
    assert callback.grower is not None
    assert callback.grower.steps == 13
    fit(Regression(shelf), tmp_path, EsperCallback(), ckpt=tmp_path / "step=14.ckpt", max_steps=20)  # nor is it wanted


def test_what_cannot_be_a_grower_is_refused(shelf: KernelShelf, tmp_path: Path) -> None:
    with pytest.raises(GrowthError, match=r"must be a function of a model and its optimizer .* not 3"):
        EsperCallback(grower=3)  # type: ignore[arg-type]
    nothing: Any = EsperCallback(grower=lambda model, optimizer: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(GrowthError, match=r"grower must return an esper.Grower, not None"):
        fit(Regression(shelf), tmp_path, nothing)
    with pytest.raises(WrapError, match=r"TwoNets.* holds several wrapped models, 'net0', 'net1'"):
        fit(TwoNets(shelf, nets=2), tmp_path, EsperCallback(grower=make_grower))
    silent = ByHand(shelf)
    silent.tells = False
    with pytest.raises(GrowthError, match="training_step of ByHand has returned no loss"):
        fit(silent, tmp_path, EsperCallback(grower=make_grower))


class Elsewhere(Regression):
    def configure_optimizers(self) -> Any:
        self.other = nn.Parameter(torch.zeros(3))
        return torch.optim.Adam([self.other], lr=0.02)


def test_an_optimizer_of_other_parameters_is_refused(shelf: KernelShelf, tmp_path: Path) -> None:
    with pytest.raises(WrapError, match=r"no optimizer of the trainer holds parameters of .*: give it model"):
        fit(Elsewhere(shelf), tmp_path, EsperCallback(grower=make_grower))


# -- Trainer -----------------------------------------------------------------------------------------------------------


class Host(nn.Sequential):
    """Tells its loss as models of transformers do."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = super().forward(x)
        return y if labels is None else {"loss": (y - labels).square().mean(), "logits": y}


ROWS = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]


def trainer_of(shelf: KernelShelf, folder: Path, **options: Any) -> Any:
    model = esper.wrap(Host(fitted()), platform=shelf.platform)
    more = {name: options.pop(name) for name in ("esper_options", "grower") if name in options}
    given: dict[str, Any] = {
        "per_device_train_batch_size": 150, "gradient_accumulation_steps": 2, "max_steps": STEPS, "use_cpu": True,
        "report_to": [], "save_steps": 7, "disable_tqdm": True, "learning_rate": 0.02, "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **{**given, **options})
    return EsperTrainer(model=model, args=arguments, train_dataset=ROWS, **{"grower": make_grower, **more})


def test_trainer_grows_as_a_loop_does(shelf: KernelShelf, tmp_path: Path) -> None:
    trainer = trainer_of(shelf, tmp_path, save_strategy="no")
    assert trainer.grower is None
    trainer.train()
    own = in_a_loop(shelf)
    found, wanted = trainer.grower.history, own.grower.history
    assert [(each.step, each.event, each.layer, each.parameters) for each in found] == [
        (each.step, each.event, each.layer, each.parameters) for each in wanted
    ]
    assert [each.loss for each in found] == pytest.approx([each.loss for each in wanted], rel=0.1)  # rows are shuffled
    assert mean_loss(trainer.model) == pytest.approx(mean_loss(own.model), rel=0.1)


@pytest.mark.parametrize("at", [7, 21, 49])
def test_trainer_resumes_in_the_middle_of_a_growth(at: int, shelf: KernelShelf, tmp_path: Path) -> None:
    whole, resumed = (trainer_of(shelf, tmp_path) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert (resumed.grower.steps, resumed.grower.spent) == (STEPS, whole.grower.spent)
    assert decisions(resumed.grower) == decisions(whole.grower)
    assert mean_loss(resumed.model) == mean_loss(whole.model)


def test_trainer_trains_on_with_its_grower(shelf: KernelShelf, tmp_path: Path) -> None:
    trainer = trainer_of(shelf, tmp_path, max_steps=14, esper_options={"lr_factor": 0.5})
    trainer.train()
    first = trainer.grower
    trainer.train()
    assert trainer.grower is first
    assert first.steps == 28
    assert sorted(group["lr"] for group in trainer.optimizer.param_groups)[0] == 0.01
    without = trainer_of(shelf, tmp_path, max_steps=14, grower=None)
    without.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert without.grower is None
    with pytest.raises(GrowthError, match="grower must be a function"):
        trainer_of(shelf, tmp_path, grower="bottleneck")
