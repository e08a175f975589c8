"""Folders that hold no checkpoint, or not all that is asked of them; nothing is changed then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

import esper
from esper.distributed import ShardedCheckpointError, load_checkpoint, save_checkpoint
from tests.compiler.agreement import load, put
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_what_is_not_there_is_named_and_nothing_is_changed(tmp_path: Path, shelf: KernelShelf) -> None:
    grown = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    load(grown, "0", 0, put(shelf))
    save_checkpoint(tmp_path / "ours", grown)
    save({"model": mlp(8, 6, 4).state_dict()}, checkpoint_id=tmp_path / "plain")
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for folder, told in (
        ("nowhere", r"is no folder with a checkpoint .*: it is what"),
        ("plain", r"is no checkpoint that esper\.distributed\.save_checkpoint wrote"),
        ("ours", "has no state of an optimizer: load it without one"),
    ):
        with pytest.raises(ShardedCheckpointError, match=told):
            load_checkpoint(tmp_path / folder, model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(optimizer.param_groups) == 1
    load_checkpoint(tmp_path / "ours", model)
    x = torch.randn(3, 8)
    assert torch.equal(model(x), grown(x))
