"""Which linear layers of a model become sites."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from esper.core.errors import TargetError

__all__ = ["Selection", "Target", "select_targets"]

Target = str | type[nn.Module]
"""A module type, a dotted name, or a glob pattern over dotted names."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The layers that become sites, by dotted name, and for every other linear layer the reason why not."""

    targets: Mapping[str, nn.Linear]
    skipped: Mapping[str, str]


def select_targets(model: nn.Module, target_layers: Target | Iterable[Target] | None) -> Selection:
    """The linear layers of `model` that `target_layers` names; None names all.

    A name or pattern that stands for a container selects the linear layers inside. Raises :class:`TargetError` for what
    matches nothing, with near misses.
    """
    modules = dict(model.named_modules())
    wanted = None if target_layers is None else _matches(modules, _as_list(target_layers))
    aliases = _aliases(model)
    targets: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            continue
        reason = _unfit(module)
        if reason is None and wanted is not None and not any(alias in wanted for alias in aliases[id(module)]):
            reason = "not selected by target_layers"
        if reason is None:
            targets[name] = module
        else:
            skipped[name] = reason
    return Selection(targets, skipped)


def _as_list(target_layers: Target | Iterable[Target]) -> list[Target]:
    targets = [target_layers] if isinstance(target_layers, (str, type)) else list(target_layers)
    for target in targets:
        if not isinstance(target, str) and not (isinstance(target, type) and issubclass(target, nn.Module)):
            raise TargetError(f"target_layers takes module types, names and glob patterns, not {target!r}")
    return targets


def _aliases(model: nn.Module) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(name)
    return found


def _matches(modules: Mapping[str, nn.Module], targets: Iterable[Target]) -> set[str]:
    """Names of modules that are selected, or lie inside of one that is."""
    wanted: set[str] = set()
    for target in targets:
        if isinstance(target, type):
            roots = [name for name, module in modules.items() if isinstance(module, target)]
        else:
            roots = [name for name in modules if name == target or fnmatch.fnmatchcase(name, target)]
        inside = {name for root in roots for name in modules if name == root or name.startswith(f"{root}.") or not root}
        if not any(isinstance(modules[name], nn.Linear) for name in inside):
            raise TargetError(_nothing_found(modules, target, bool(roots)))
        wanted |= inside
    return wanted


def _nothing_found(modules: Mapping[str, nn.Module], target: Target, exists: bool) -> str:
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    what = f"type {target.__name__}" if isinstance(target, type) else repr(target)
    if exists:
        return f"target_layers: {what} has no nn.Linear in it"
    near = difflib.get_close_matches(
        target if isinstance(target, str) else target.__name__, list(modules), n=5, cutoff=0.5
    )
    hint = (
        f"near misses: {', '.join(map(repr, near))}" if near else f"linear layers: {', '.join(map(repr, linear[:8]))}"
    )
    return f"target_layers: {what} matches nothing in the model; {hint}"


def _unfit(linear: nn.Linear) -> str | None:
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    if isinstance(linear, nn.LazyLinear):
        return "a LazyLinear that has not seen data: run the model once before wrapping"
    if type(linear).forward is not nn.Linear.forward:
        return f"{type(linear).__name__} has a forward of its own"
    if "forward" in linear.__dict__:
        return "its forward was replaced on the instance"
    return None
