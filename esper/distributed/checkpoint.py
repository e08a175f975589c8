"""Checkpoints of a model that several ranks train, by `torch.distributed.checkpoint`: each writes its part.

Host, kernels, their shares and what moves these, and the optimizer; read again by as many ranks as one likes.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from esper.errors import EsperError
from esper.execution.seeds.active_kernels import BANK_NAME, ActiveKernels

__all__ = ["ShardedCheckpointError", "load_checkpoint", "save_checkpoint"]

_MODEL, _OPTIMIZER = "model", "optimizer"
_KERNELS = f"{BANK_NAME}."


class ShardedCheckpointError(EsperError, ValueError):
    """What is no checkpoint of a wrapped model, or not of this one."""


def save_checkpoint(path: str | PathLike[str], model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Write `model`, which `esper.wrap` returned, and its optimizer into the folder `path`; called on all ranks."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    bank = _bank(model)
    state: dict[str, Any] = {_MODEL: bank.marked(get_model_state_dict(model))}
    if optimizer is not None:
        state[_OPTIMIZER] = get_optimizer_state_dict(model, optimizer, options=_flat())
    save(state, checkpoint_id=path)


def load_checkpoint(path: str | PathLike[str], model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Make `model` what the one was that :func:`save_checkpoint` wrote, with its kernels in force; on all ranks.

    The parameters of kernels enter `optimizer`, as a group of its default options, if they are not in it; then all get
    the states and the options that they had. Raises :class:`ShardedCheckpointError` before it changes anything,
    `CheckpointError` for kernels that
    do not fit, and what `torch.distributed.checkpoint` raises for a host of other parameters.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load

    _bank(model)
    try:
        saved = FileSystemReader(path).read_metadata().state_dict_metadata
    except OSError as cause:
        raise ShardedCheckpointError(
            f"{path} is no folder with a checkpoint ({cause}): it is what esper.distributed.save_checkpoint wrote"
        ) from cause
    own = f"{_MODEL}.{_KERNELS}"
    if not any(key.startswith(own) for key in saved):
        raise ShardedCheckpointError(f"{path} is no checkpoint that esper.distributed.save_checkpoint wrote")
    if optimizer is not None and not any(key.startswith(f"{_OPTIMIZER}.") for key in saved):
        raise ShardedCheckpointError(f"{path} has no state of an optimizer: load it without one")
    host = {key: each for key, each in get_model_state_dict(model).items() if not key.startswith(_KERNELS)}
    state = {_MODEL: {**host, **_room({key: each for key, each in saved.items() if key.startswith(own)})}}
    load(state, checkpoint_id=path)
    set_model_state_dict(model, state[_MODEL])
    if optimizer is None:
        return
    _add_kernels(optimizer, model)
    wanted = get_optimizer_state_dict(model, optimizer, options=_flat())
    room = {key: each for key, each in wanted.items() if f"{_OPTIMIZER}.{key}" in saved}
    load({_OPTIMIZER: room}, checkpoint_id=path)
    set_optimizer_state_dict(model, optimizer, {**wanted, **room}, options=_flat())


def _bank(model: nn.Module) -> ActiveKernels:
    bank = getattr(model, BANK_NAME, None)
    if not isinstance(bank, ActiveKernels):
        raise ShardedCheckpointError(
            f"the model has to be what esper.wrap returned, not {type(model).__name__}; of a model in "
            "DistributedDataParallel it is the `module`"
        )
    return bank


def _flat() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=True)  # whatever groups the parameters are in


def _room(saved: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Memory for the kernels, which every rank reads whole."""
    skipped = len(_MODEL) + 1
    return {key[skipped:]: torch.empty(each.size, dtype=each.properties.dtype) for key, each in saved.items()}


def _add_kernels(optimizer: Optimizer, model: nn.Module) -> None:
    known = {id(each) for group in optimizer.param_groups for each in group["params"]}
    new = [each for each in _bank(model).trainable() if id(each) not in known]
    if new:
        optimizer.add_param_group({"params": new})
