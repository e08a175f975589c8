"""The wrapped models among the modules that a trainer is given."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer

from esper.core.errors import WrapError, described
from esper.core.morphable_model import MorphableModel

__all__ = ["attach", "scalars", "wrapped_models"]

_attached: WeakSet[Optimizer] = WeakSet()


def wrapped_models(module: nn.Module) -> dict[str, MorphableModel]:
    """By their names in `module`, which may be a wrapped model, or hold some, compiled or in DDP.

    Raises :class:`WrapError` if there is none.
    """
    found = {name: each for name, each in module.named_modules() if isinstance(each, MorphableModel)}
    if not found:
        raise WrapError(f"{described(module)} holds no wrapped model: give the trainer what esper.wrap() returned")
    return found


def attach(module: nn.Module, optimizer: Any, options: dict[str, Any]) -> None:
    """Attach `optimizer`, once, to the wrapped models in `module` that it holds parameters of."""
    wrapped = getattr(optimizer, "optimizer", None)  # Accelerate's and Lightning's
    optimizer = wrapped if isinstance(wrapped, Optimizer) else optimizer
    if optimizer in _attached:
        return
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    for model in wrapped_models(module).values():
        if any(id(each) in held for each in model.parameters()):
            model.attach_optimizer(optimizer, **options)
            _attached.add(optimizer)


def scalars(module: nn.Module, prefix: str) -> dict[str, float]:
    """`MorphableModel.scalars` of the wrapped model in `module`; if there are several, with their names before."""
    models = wrapped_models(module)
    if len(models) == 1:
        return next(iter(models.values())).scalars(prefix)
    return {key: each for name, model in models.items() for key, each in model.scalars(f"{prefix}{name}/").items()}
