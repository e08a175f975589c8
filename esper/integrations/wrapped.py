"""The wrapped models among the modules that a trainer is given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer

from esper.core.errors import WrapError, described
from esper.core.morphable_model import MorphableModel

__all__ = ["attach", "optimizer_of", "scalars", "wrapped_models"]

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
    optimizer = _plain(optimizer)
    if optimizer in _attached:
        return
    for model in wrapped_models(module).values():
        if _holds(optimizer, model):
            model.attach_optimizer(optimizer, **options)
            _attached.add(optimizer)


def optimizer_of(model: MorphableModel, optimizers: Iterable[Any]) -> Optimizer:
    """The one among `optimizers` that holds parameters of `model`. Raises :class:`WrapError` if none does."""
    found: Optimizer | None = next((each for each in map(_plain, optimizers) if _holds(each, model)), None)
    if found is None:
        raise WrapError(
            f"no optimizer of the trainer holds parameters of {described(model)}: give it model.parameters()"
        )
    return found


def _plain(optimizer: Any) -> Any:
    """Without what Accelerate or Lightning have put around it."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, Optimizer) else optimizer


def _holds(optimizer: Any, model: MorphableModel) -> bool:
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    return any(id(each) in held for each in model.parameters())


def scalars(module: nn.Module, prefix: str) -> dict[str, float]:
    """`MorphableModel.scalars` of the wrapped model in `module`; if there are several, with their names before."""
    models = wrapped_models(module)
    if len(models) == 1:
        return next(iter(models.values())).scalars(prefix)
    return {key: each for name, model in models.items() for key, each in model.scalars(f"{prefix}{name}/").items()}
