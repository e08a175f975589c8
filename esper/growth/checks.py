"""What a `Grower` refuses before it begins."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

from torch.optim import Optimizer

from esper.core.morphable_model import MorphableModel
from esper.errors import shown
from esper.execution.kernels.rate_schedulers import checked_schedulers, refuse_fixed_groups, schedulers_of
from esper.growth.errors import GrowthError
from esper.growth.measuring import CALLED
from esper.growth.probe import MOST_FEATURES

__all__ = ["attach", "checked_batches", "checked_loss_function", "checked_model", "refuse_ranks", "unfit_layers"]


def checked_model(model: Any) -> MorphableModel:
    """`model`, if a grower can grow it. Raises :class:`GrowthError`."""
    if not isinstance(model, MorphableModel):
        raise GrowthError(f"a grower is for what esper.wrap() returned, not for a {type(model).__name__}")
    platform = model._wrapping.options.platform
    if platform is not None and not hasattr(platform, "request"):
        raise GrowthError(f"kernels are compiled by what esper.Platform makes, not by {shown(platform)}")
    refuse_ranks(model)
    return model


def checked_loss_function(loss_function: Any) -> None:
    """Raise :class:`GrowthError` for what cannot be called with a model and a batch, as far as one can tell."""
    if not callable(loss_function):
        raise GrowthError(f"{CALLED}; {shown(loss_function)} is no function")
    if type(loss_function).__module__ == "torch.nn.modules.loss":
        name = type(loss_function).__name__
        raise GrowthError(
            f"{CALLED}; nn.{name} takes an output and a target: "
            "pass lambda model, batch: loss(model(batch[0]), batch[1])"
        )
    try:
        signature = inspect.signature(loss_function)
    except (TypeError, ValueError):  # of a function in C
        return
    try:
        signature.bind(None, None)
    except TypeError as cause:
        raise GrowthError(f"{CALLED}; this one takes {signature}: {cause}") from cause


def refuse_ranks(model: MorphableModel) -> None:
    """Raise :class:`GrowthError` for a model that changes together with those of other ranks."""
    if model.ranks is not None:
        raise GrowthError(
            "the model changes together with those of other ranks, whose growers would see other batches and decide "
            "otherwise: grow where one process trains, or ask for kernels by request_kernels() on all ranks alike"
        )


def checked_batches(name: str, batches: Any) -> Iterable[Any]:
    """`batches`, if they can be gone through again and again. Raises :class:`GrowthError`."""
    if not isinstance(batches, Iterable) or isinstance(batches, (str, Mapping)):
        raise GrowthError(f"{name} must be batches, such as a list of (input, target), not {shown(batches)}")
    if isinstance(batches, Iterator):
        raise GrowthError(f"{name} is an iterator, which is empty after the first probe: pass list(...) of it")
    if isinstance(batches, Sized) and not len(batches):
        raise GrowthError(f"{name} is empty: pass at least one batch")
    return batches


def unfit_layers(model: MorphableModel, names: Sequence[str]) -> dict[str, str]:
    """The layers among `names` that cannot be scored, and why.

    Those that share parameters with others that are not inside of them: what one of them does with its parameters,
    another undoes, so that what their own parameters promise is not known. And those that are too wide for a probe.
    """
    owners: dict[int, list[str]] = {}
    for name in names:
        for each in model.kasmina_layers[name].parameters():
            owners.setdefault(id(each), []).append(name)
    found = {}
    for those in owners.values():
        for name in those:
            others = [each for each in those if not _is_nested(each, name)]
            if others:
                found[name] = f"layer {name!r} shares parameters with {', '.join(map(repr, others))}"
    for name in names:
        layer = model.kasmina_layers[name]
        if max(layer.input_dim, layer.output_dim) > MOST_FEATURES:
            sizes = f"{layer.input_dim} inputs and {layer.output_dim} outputs"
            found[name] = f"layer {name!r} has {sizes}, and at most {MOST_FEATURES} can be probed"
    return found


def _is_nested(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.") or not one or not other


def attach(
    model: MorphableModel, optimizer: Optimizer, scheduler: Any, lr_factor: float, warmup: int, peak: float | None
) -> None:
    """Attach `optimizer`, unless it is. Raises what that raises, and :class:`GrowthError`."""
    if isinstance(optimizer, Optimizer):  # else what follows says what it is
        refuse_fixed_groups(checked_schedulers(scheduler, optimizer) if scheduler else schedulers_of(optimizer))
    if not model.has_optimizer(optimizer):
        options = {} if peak is None else {"peak": peak}
        model.attach_optimizer(optimizer, scheduler, lr_factor=lr_factor, warmup=warmup, **options)
    elif (scheduler, lr_factor, warmup, peak) != (None, 1.0, 0, None):
        raise GrowthError(
            "the optimizer is attached to the model already: pass scheduler, lr_factor, warmup and peak there, and not "
            "to the grower"
        )
