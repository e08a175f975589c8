"""The selection of the linear layers of a model that become sites."""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import nn

from esper.core.errors import TargetError
from esper.core.replica.replace_modules import opaque_reason

__all__ = ["Selection", "Target", "select_targets", "unfit_reason"]

Target = str | type[nn.Module]
"""A module type, a dotted name, or a glob pattern over dotted names."""


@dataclass(frozen=True)
class Selection:
    """The outcome of a selection, by dotted name; every `nn.Linear` of the model is in one of the two mappings.

    - `targets`: the layers to become sites, in the order of `model.named_modules()`.
    - `refused`: the others, and why.
    """

    targets: Mapping[str, nn.Linear] = field(default_factory=lambda: MappingProxyType({}))
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def select_targets(model: nn.Module, target_layers: Target | Iterable[Target] | None = None) -> Selection:
    """Select the linear layers of `model` that `target_layers` names.

    None selects every `nn.Linear`. Otherwise one or several of: a module type, an exact dotted name, or a glob pattern,
    whose `*` matches dots too; what stands for a container selects the layers inside. A layer that cannot be a site
    (see `Selection.refused`) is passed over, unless it is named exactly.

    Raises :class:`TargetError` for a type, name or pattern that selects nothing. Warns if `model` has no layer that
    could be a site.
    """
    linears, reasons = _survey(model)
    possible = {name: linear for name, linear in linears.items() if name not in reasons}
    if target_layers is None:
        chosen = set(possible)
        if not possible:
            warnings.warn(f"no layer can carry seeds: {_candidates(linears, reasons)}", UserWarning, stacklevel=3)
    else:
        several = isinstance(target_layers, Iterable) and not isinstance(target_layers, (str, type, nn.Module))
        wanted: list[Target] = list(target_layers) if several else [target_layers]  # type: ignore[arg-type,list-item]  # mypy does not follow `several`
        if not wanted:
            raise TargetError("target_layers is empty: name a type, a dotted name or a pattern, or pass None for all")
        aliases = _aliases(model)
        chosen = set().union(*(_matches(model, target, possible, reasons, aliases) for target in wanted))
    refused = {name: reasons.get(name, "not selected") for name in linears if name not in chosen}
    for alias, name in _aliases(model).items():
        if name in linears:
            refused[alias] = f"the same module as {name!r}"
    return Selection(
        MappingProxyType({name: linear for name, linear in possible.items() if name in chosen}),
        MappingProxyType(refused),
    )


def _survey(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Every `nn.Linear` by its first name, and for those that cannot be sites the reason."""
    modules = dict(model.named_modules())
    inside: dict[str, str] = {}  # for names below a module that keeps its linear layers to itself
    linears: dict[str, nn.Linear] = {}
    reasons: dict[str, str] = {}
    for name, module in modules.items():
        above = inside.get(name.rpartition(".")[0]) if name else None
        here = above or _keeps_layers(name, module)
        if here is not None:
            inside[name] = here
        if isinstance(module, nn.Linear):
            linears[name] = module
            reason = above or unfit_reason(module)
            if reason is not None:
                reasons[name] = reason
    return linears, reasons


def _keeps_layers(name: str, module: nn.Module) -> str | None:
    if isinstance(module, nn.MultiheadAttention):
        return f"nn.MultiheadAttention {name!r} reads its weight without calling it"
    reason = opaque_reason(module)
    return None if reason is None else f"inside {name!r}: {reason}"


def unfit_reason(linear: nn.Linear) -> str | None:
    """Why a linear layer cannot be a site by itself, or None."""
    opaque = opaque_reason(linear)
    if opaque is not None:
        return opaque
    if isinstance(linear, nn.modules.lazy.LazyModuleMixin):
        return "not initialised yet: run the model once before it is wrapped"
    if type(linear).forward is not nn.Linear.forward:
        return f"{type(linear).__name__} has a forward of its own"
    if type(linear).__call__ is not nn.Module.__call__:
        return f"{type(linear).__name__} has a __call__ of its own"
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its weight is read without calling it (NonDynamicallyQuantizableLinear)"
    weight = linear._parameters.get("weight")
    if not isinstance(weight, torch.Tensor) or "bias" not in linear._parameters:
        return "its weight or bias is computed at each call (parametrization, weight or spectral norm)"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    return None


def _aliases(model: nn.Module) -> dict[str, str]:
    """Further names of modules that have several, each with the first name."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if first.setdefault(id(module), name) != name:
            aliases[name] = first[id(module)]
    return aliases


def _matches(
    model: nn.Module,
    target: Target,
    possible: Mapping[str, nn.Linear],
    reasons: Mapping[str, str],
    aliases: Mapping[str, str],
) -> set[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(target, type):
        roots = [name for name, module in modules.items() if isinstance(module, target)]
    elif isinstance(target, str):
        if aliases.get(target, target) in reasons:
            raise TargetError(f"layer {target!r} cannot carry seeds: {reasons[aliases.get(target, target)]}")
        roots = [name for name in modules if name == target or fnmatch.fnmatchcase(name, target)]
    else:
        hint = "; pass it as platform=..." if hasattr(target, "kernel_source") else ""
        raise TargetError(f"target_layers takes module types, names and patterns, not {target!r:.80}{hint}")
    inside = {name for root in roots for name in modules if name == root or not root or name.startswith(f"{root}.")}
    found = {aliases.get(name, name) for name in inside}
    if not found & possible.keys():
        raise TargetError(_nothing_found(target, roots, found, modules, possible, reasons))
    return found & possible.keys()


def _nothing_found(
    target: Target,
    roots: list[str],
    found: set[str],
    modules: Mapping[str, nn.Module],
    possible: Mapping[str, nn.Linear],
    reasons: Mapping[str, str],
) -> str:
    what = f"type {target.__name__}" if isinstance(target, type) else repr(target)
    refused = [f"{name!r}: {reason}" for name, reason in reasons.items() if name in found]
    if refused:
        return f"target_layers: no layer that {what} selects can carry seeds: {'; '.join(refused[:3])}"
    if roots:
        return f"target_layers: {what} has no nn.Linear in it; {_candidates(possible, {})}"
    wish = target.__name__ if isinstance(target, type) else target
    near = difflib.get_close_matches(wish, [name for name in modules if name], n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else _candidates(possible, {})
    return f"target_layers: {what} matches nothing in the model; {hint}"


def _candidates(linears: Mapping[str, nn.Linear], reasons: Mapping[str, str]) -> str:
    if not linears:
        return "the model has no nn.Linear"
    shown = [f"{name!r}" + (f" ({reasons[name]})" if name in reasons else "") for name in list(linears)[:8]]
    more = f" and {len(linears) - 8} more" if len(linears) > 8 else ""
    return f"the model has {', '.join(shown)}{more}"
