"""The selection of the layers and modules of a model that become sites."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from esper.core.errors import TargetError
from esper.core.replica.replace_modules import opaque_reason
from esper.core.sites.features import Features, told_features
from esper.core.sites.module_site import taken_name, unfit_call
from esper.errors import shown
from esper.user_warnings import warn_user

__all__ = ["Selection", "Target", "select_targets", "unfit_reason"]

_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip

Target = str | type[nn.Module]
"""A module type, a dotted name, or a glob pattern over dotted names."""


@dataclass(frozen=True)
class Selection:
    """The outcome of a selection, by dotted name; every `nn.Linear` of the model is in one of the first two mappings.

    - `targets`: what is to become a site, in the order of `model.named_modules()`.
    - `refused`: the other linear layers, and why.
    - `features`: those of the targets that are sites as modules, not as linear layers, with the sizes of their input
      and output where these are known.
    """

    targets: Mapping[str, nn.Module] = field(default_factory=lambda: MappingProxyType({}))
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    features: Mapping[str, Features | None] = field(default_factory=lambda: MappingProxyType({}))


def select_targets(
    model: nn.Module, target_layers: Target | Iterable[Target] | Mapping[Target, Features | None] | None = None
) -> Selection:
    """Select the layers of `model` that `target_layers` names.

    None selects every `nn.Linear`. Otherwise one or several of: a module type, an exact dotted name, or a glob pattern,
    whose `*` matches dots too. What stands for linear layers that can be sites selects these, and those in other
    modules that it stands for. What stands for other modules alone selects these, as they are; of a list of modules,
    and of the model itself, the linear layers inside. What cannot be a site is passed over, unless nothing else is
    selected. A mapping gives the sizes of the last dimension of input and output, for modules that do not tell them.

    Raises :class:`TargetError` for a type, name or pattern that selects nothing, and for sizes that are none. Warns if
    `model` has no layer that could be a site.
    """
    linears, reasons, inside = _survey(model)
    possible = {name: linear for name, linear in linears.items() if name not in reasons}
    chosen: dict[str, Features | None]
    if target_layers is None:
        chosen = dict.fromkeys(possible)
        if not possible:
            warn_user(f"no layer can carry seeds: {_candidates(linears, reasons)}")
    else:
        matching = _Matching(model, possible, reasons, inside)
        chosen = {
            name: given for target, given in _wanted(target_layers).items() for name in matching.of(target, given)
        }
    modules = {name: module for name, module in model.named_modules() if name in chosen}
    refused = {name: reasons.get(name, "not selected") for name in linears if name not in chosen}
    for alias, name in _aliases(model).items():
        if name in linears:
            refused[alias] = f"the same module as {name!r}"
    features = {name: chosen[name] or told_features(each) for name, each in modules.items() if name not in possible}
    return Selection(MappingProxyType(modules), MappingProxyType(refused), MappingProxyType(features))


def _wanted(target_layers: Any) -> dict[Target, Features | None]:
    """What is asked for, and the sizes that are given."""
    if isinstance(target_layers, Mapping):
        wanted = dict(target_layers)
    else:
        several = isinstance(target_layers, Iterable) and not isinstance(target_layers, (str, type, nn.Module))
        wanted = dict.fromkeys(target_layers if several else [target_layers])
    if not wanted:
        raise TargetError("target_layers is empty: name a type, a dotted name or a pattern, or pass None for all")
    for target, sizes in wanted.items():
        pair = list(sizes) if isinstance(sizes, (tuple, list)) else []
        counted = [each for each in pair if isinstance(each, int) and not isinstance(each, bool) and each > 0]
        if sizes is not None and (len(pair), len(counted)) != (2, 2):
            raise TargetError(
                f"target_layers gives {target!r} the features {shown(sizes)}, which are no two whole numbers above 0: "
                "the sizes of the last dimension of its input and output, or None"
            )
    return {target: None if sizes is None else (sizes[0], sizes[1]) for target, sizes in wanted.items()}


def _survey(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, str], dict[str, str]]:
    """Every `nn.Linear` by its first name; of those that cannot be sites, and of what keeps its layers, the reason."""
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
    return linears, reasons, inside


def _keeps_layers(name: str, module: nn.Module) -> str | None:
    if isinstance(module, nn.MultiheadAttention):
        return f"nn.MultiheadAttention {name!r} reads its weight without calling it"
    reason = opaque_reason(module)
    return None if reason is None else f"inside {name!r}: {reason}"


def _uncallable_reason(module: nn.Module) -> str | None:
    """Why what stands in a module's place would not be called as it is, or None."""
    opaque = opaque_reason(module)
    if opaque is not None:
        return opaque
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "not initialised yet: run the model once before it is wrapped"
    if type(module).__call__ is not nn.Module.__call__:
        return f"{type(module).__name__} has a __call__ of its own"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its weight is read without calling it (NonDynamicallyQuantizableLinear)"
    return None


def unfit_reason(linear: nn.Linear) -> str | None:
    """Why a linear layer cannot be a site by itself, or None."""
    reason = _uncallable_reason(linear)
    if reason is not None:
        return reason
    if type(linear).forward is not nn.Linear.forward:
        return f"{type(linear).__name__} has a forward of its own"
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


class _Matching:
    """What targets stand for in one model."""

    def __init__(
        self,
        model: nn.Module,
        possible: Mapping[str, nn.Linear],
        reasons: Mapping[str, str],
        inside: Mapping[str, str],
    ) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._aliases = _aliases(model)
        self._possible = possible
        self._reasons = reasons
        self._inside = inside

    def of(self, target: Target, sizes: Features | None) -> set[str]:
        """The names of the layers and modules that `target` selects."""
        roots = [self._aliases.get(root, root) for root in self._roots(target)]
        if sizes is not None and any(root in self._possible for root in roots):
            raise TargetError(f"{target!r} stands for linear layers, which have their sizes: give None, not {sizes}")
        found = set() if any(root in self._possible for root in roots) else {
            root for root in roots if not _only_holds_others(root, self._modules[root]) and self._unfit(root) is None
        }  # fmt: skip
        found = found or self._linears_in(roots)
        if not found:
            raise TargetError(self._nothing_found(target, roots))
        return found

    def _roots(self, target: Target) -> list[str]:
        if isinstance(target, type):
            return [name for name, module in self._modules.items() if isinstance(module, target)]
        if isinstance(target, str):
            return [name for name in self._modules if name == target or fnmatch.fnmatchcase(name, target)]
        hint = "; pass it as platform=..." if hasattr(target, "kernel_source") else ""
        raise TargetError(f"target_layers takes module types, names and patterns, not {shown(target)}{hint}")

    def _linears_in(self, roots: Iterable[str]) -> set[str]:
        """Of linear layers and of what only holds others, those that can be sites."""
        held = {
            name for root in roots for name in self._modules
            if name == root or not root or name.startswith(f"{root}.")
        }  # fmt: skip
        return {self._aliases.get(name, name) for name in held} & self._possible.keys()

    def _unfit(self, name: str) -> str | None:
        """Why a module cannot be a site as it is, or None."""
        above = self._inside.get(name.rpartition(".")[0])
        return above or unfit_module_reason(self._modules[name])

    def _nothing_found(self, target: Target, roots: list[str]) -> str:
        what = f"type {target.__name__}" if isinstance(target, type) else repr(target)
        refused = [f"{root!r}: {reason}" for root in roots if (reason := self._unfit(root)) is not None]
        if refused:
            return f"target_layers: nothing that {what} selects can carry seeds: {'; '.join(refused[:3])}"
        if roots:
            return f"target_layers: {what} has no nn.Linear in it; {_candidates(self._possible, {})}"
        wish = target.__name__ if isinstance(target, type) else target
        near = difflib.get_close_matches(wish, [name for name in self._modules if name], n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else _candidates(self._possible, {})
        return f"target_layers: {what} matches nothing in the model; {hint}"


def _only_holds_others(name: str, module: nn.Module) -> bool:
    """Whether nobody calls it: the model itself, whose own call is no site, and lists of modules."""
    return not name or type(module).forward is nn.Module.forward


def unfit_module_reason(module: nn.Module) -> str | None:
    """Why a module cannot be a site as it is, whatever it computes, or None."""
    reason = _uncallable_reason(module)
    if reason is not None:
        return reason
    if isinstance(module, _CONVOLUTIONS):
        return "its features are not the last dimension of its input and output, which is what kernels read"
    name = taken_name(module)
    if name is not None:
        return (
            f"it has an attribute {name!r}, as layers with seeds have: rename it, or name a module inside or around it"
        )
    return unfit_call(module)


def _candidates(linears: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    if not linears:
        return "the model has no nn.Linear"
    shown = [f"{name!r}" + (f" ({reasons[name]})" if name in reasons else "") for name in list(linears)[:8]]
    more = f" and {len(linears) - 8} more" if len(linears) > 8 else ""
    return f"the model has {', '.join(shown)}{more}"
