"""Lightning trains, saves and resumes models that grow while they train."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper import Blueprint
from esper.core.errors import WrapError
from esper.execution.lifecycle import SeedLifecycleState
from esper.integrations.lightning import EsperCallback
from tests.kernel_shelf import KernelShelf


class Regression(lightning.LightningModule):
    """Loads a kernel before its second epoch."""

    def __init__(self, shelf: KernelShelf, compiled: bool = False, wrap: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        host = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))
        self.net: Any = esper.wrap(host, platform=shelf.platform) if wrap else host
        self.kernel = shelf.put(Blueprint.low_rank(8, 6, rank=2, start="kaiming")).id
        if compiled:
            self.net.compile(backend="esper", options={"inner": "aot_eager"})
        self.losses: list[Tensor] = []

    def on_train_epoch_start(self) -> None:
        if self.current_epoch >= 1 and not list(self.net.seed_parameters()):
            assert self.net.request_kernel("0", 0, self.kernel, alpha=0.5, trainable=True).result()
            self.net.commit()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)]


def _data() -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


def _fit(module: Regression, folder: Path, epochs: int, ckpt: Path | None = None, **options: Any) -> Any:
    checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=CSVLogger(str(folder)), log_every_n_steps=2,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[checkpoints, EsperCallback(lr_factor=0.5)],
        **options,
    )  # fmt: skip
    trainer.fit(module, _data(), ckpt_path=None if ckpt is None else str(ckpt))
    return trainer


def test_a_run_that_has_grown_resumes_to_the_same_parameters(shelf: KernelShelf, tmp_path: Path) -> None:
    whole = Regression(shelf)
    trainer = _fit(whole, tmp_path / "whole", 4)
    again = Regression(shelf)
    resumed = _fit(again, tmp_path / "again", 4, tmp_path / "whole" / "epoch=2.ckpt")
    assert again.net.kasmina_layers["0"].state.lifecycle(0) is SeedLifecycleState.ACTIVE
    assert torch.equal(torch.stack(again.losses), torch.stack(whole.losses)[12:])
    for expected, actual in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(actual, expected)
    groups = [len(each.optimizers[0].param_groups) for each in (trainer, resumed)]
    assert groups == [2, 2]


def test_scalars_of_seeds_are_in_the_loggers_of_the_trainer(shelf: KernelShelf, tmp_path: Path) -> None:
    trainer = _fit(Regression(shelf), tmp_path, 2)
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["esper/seeds/active"], row["esper/0/0/alpha"]) for row in rows] == [
        ("2", "0", ""), ("4", "0", ""), ("6", "1", "0.5"), ("8", "1", "0.5"),
    ]  # fmt: skip


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_compiled_model_trains_its_kernel(shelf: KernelShelf, tmp_path: Path, precision: Any) -> None:
    module = Regression(shelf, compiled=True)
    _fit(module, tmp_path, 3, precision=precision)
    (graph,) = module.net.compile_report().graphs
    assert len(graph.variants) == 2
    assert all(parameter.grad is not None for parameter in module.net.seed_parameters())
    assert module.losses[-1] < module.losses[0]


def test_a_module_without_a_wrapped_model_is_refused(shelf: KernelShelf, tmp_path: Path) -> None:
    with pytest.raises(WrapError, match=r"Regression.* holds no wrapped model"):
        _fit(Regression(shelf, wrap=False), tmp_path, 1)
