"""A LightningModule whose net grows, with its checkpoint resumed: python examples/lightning_module.py"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.integrations.lightning import EsperCallback


class Growing(lightning.LightningModule):
    """Loads a kernel at its second epoch."""

    def __init__(self, platform: esper.Platform, kernel: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = esper.wrap(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)), platform=platform)
        self.kernel = kernel

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net.request_kernel("0", 0, self.kernel, trainable=True).result()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]


def main() -> None:
    x = torch.randn(64, 8)
    batches = DataLoader(TensorDataset(x, x.prod(1, keepdim=True)), batch_size=8)
    with esper.Platform.embedded() as platform, tempfile.TemporaryDirectory() as folder:
        kernel = platform.compile_sync(esper.Blueprint.bottleneck(8, 16, rank=8)).id

        def fit(epochs: int, checkpoint: Path | None = None) -> lightning.Trainer:
            trainer = lightning.Trainer(
                max_epochs=epochs, accelerator="cpu", logger=CSVLogger(folder), log_every_n_steps=4,
                callbacks=[EsperCallback(lr_factor=2.0)], enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(Growing(platform, kernel), batches, ckpt_path=checkpoint)
            return trainer

        grown = Path(folder) / "grown.ckpt"
        fit(3).save_checkpoint(grown)
        resumed = fit(5, grown)
        print("groups of the optimizer:", [group["lr"] for group in resumed.optimizers[0].param_groups])


if __name__ == "__main__":
    main()
