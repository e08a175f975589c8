"""Replicas of module trees: the host's modules once more, with other modules at the sites.

A replica has its module's class, attributes, parameters and buffers: the same dictionaries, so whatever moves, casts,
loads or replaces a tensor through one is seen through the other. It has its own children, hooks and training flag. The
host stays as it was.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from esper import torch_internals
from esper.core.replica.mutation_watch import HOOK_KINDS, ChangeSignal, WatchedDict, WatchedHooks
from esper.core.replica.references import References
from esper.core.replica.subclassing import own_slots
from esper.core.replica.transformer_fast_path import adapted_class
from esper.execution.plain_linear import OWN_ATTRIBUTES

__all__ = ["opaque_reason", "replace_modules"]

_SHARED = frozenset({"_parameters", "_buffers", "_non_persistent_buffers_set"})
_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
_CALLED_HOOKS = frozenset(HOOK_KINDS)


def opaque_reason(module: nn.Module) -> str | None:
    """Why nothing below `module` can be replaced, or None.

    Such a module stands in the replica itself, as the host's own object.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return "a ScriptModule, whose code is fixed"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, and the replacement calls the original module"
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return f"{type(module).__name__} runs the original module: wrap the module inside it"
    return None


def replace_modules(
    model: nn.Module,
    targets: Mapping[str, Any],
    replace: Callable[[str, Any], nn.Module],
    class_of: Callable[[type], type] = adapted_class,
    root: nn.Module | None = None,
    without: frozenset[str] = frozenset(),
    watched: bool = True,
    stand_in: Callable[[nn.Module], nn.Module | None] = lambda _: None,
) -> nn.Module:
    """The replica of `model` in which `replace(name, module)` stands in the place of each of `targets`.

    `replace` is called once for each of them, in order; what it returns must share the module's `_parameters`. It is
    given children, hooks and a training flag like any replica, and attributes that it has not if it is of the module's
    class. A module used under several names has one replica. `class_of` says of which class the replica of a module is,
    by the module's class; `root`, a bare instance with an empty `__dict__`, is to be the replica of `model` itself,
    also where that is selected. Attributes of `model` that are named in `without` are left out. Unless `watched`, the
    replicas' dictionaries are plain ones. `stand_in` may give a module that is to become the replica of another,
    whatever it was; all of them do so at the end.
    """
    return _Replication(targets, replace, class_of, watched, stand_in).carry_out(model, root, without)


class _Replication:
    def __init__(
        self,
        targets: Mapping[str, Any],
        replace: Callable[[str, Any], nn.Module],
        class_of: Callable[[type], type],
        watched: bool,
        stand_in: Callable[[nn.Module], nn.Module | None],
    ) -> None:
        self._class_of = class_of
        self._stand_in = stand_in
        self._watched = watched
        self._targets = {id(module): (name, module) for name, module in targets.items()}
        self._replace = replace
        self._signal = ChangeSignal()
        self._replicas: dict[int, nn.Module] = {}
        self._references = References(self._replicas)

    def carry_out(self, model: nn.Module, root: nn.Module | None, without: frozenset[str]) -> nn.Module:
        modules = list(_replicated(model, without))
        for name, target in self._targets.values():
            self._replicas[id(target)] = replica = self._replace(name, target)
            _copy_slots(target, replica)
        if root is not None:
            _copy_slots(model, root)
            self._replicas[id(model)] = root
        for module in modules:
            if id(module) not in self._replicas:
                there = self._stand_in(module)
                self._replicas[id(module)] = _bare_copy(module, self._class_of) if there is None else there
        made: list[tuple[nn.Module, nn.Module, dict[str, Any]]] = []
        for module in modules:
            replica = self._replicas[id(module)]
            is_site = id(module) in self._targets and replica is not root
            content = self._content(module, replica, is_site, without if module is model else frozenset())
            made.append((module, replica, {**replica.__dict__, **content} if is_site else content))
        for module, replica, content in made:
            if self._stand_in(module) is replica:
                _keep_hook_dictionaries(replica, content)
            object.__setattr__(replica, "__dict__", content)
            if self._stand_in(module) is replica:
                object.__setattr__(replica, "__class__", self._class_of(type(module)))
        for module, replica, _ in made:
            alike = id(module) not in self._targets or _takes_after(replica, module)
            if parametrize.is_parametrized(module) and alike and not _computes_parametrizations(replica):
                torch_internals.inject_parametrizations(replica)
        return self._replicas.get(id(model), model)

    def _content(self, module: nn.Module, replica: nn.Module, is_site: bool, without: frozenset[str]) -> dict[str, Any]:
        own: dict[str, Any] = {}
        takes_after = _takes_after(replica, module)
        for name, value in module.__dict__.items():
            if name in without:
                continue
            if name == "_modules":
                kept = {key: child for key, child in value.items() if key not in without}
                children = {key: self._replicas.get(id(child), child) for key, child in kept.items()}
                children.update(replica._modules if is_site else {})
                own[name] = WatchedDict(children, self._signal) if self._watched else children
            elif name in _SHARED:
                own[name] = value
            elif name.endswith(_HOOKS) and isinstance(value, dict):
                copy = OrderedDict((key, self._references.redirected_hook(hook)) for key, hook in value.items())
                own[name] = WatchedHooks(copy, self._signal) if self._watched and name in _CALLED_HOOKS else copy
            elif not is_site or (takes_after and name not in replica.__dict__ and name not in OWN_ATTRIBUTES):
                own[name] = self._references.redirected(value)
        own["training"] = module.training
        return own


def _takes_after(replica: nn.Module, module: nn.Module) -> bool:
    """Whether one is of the other's class: a site of its host's, or a host of the site's that it takes the place of."""
    return isinstance(replica, type(module)) or isinstance(module, type(replica))


def _keep_hook_dictionaries(module: nn.Module, content: dict[str, Any]) -> None:
    """Put hooks in the dictionaries that `module` has: handles that were given out remove them from there."""
    for name, hooks in content.items():
        before = module.__dict__.get(name)
        if name.endswith(_HOOKS) and isinstance(before, dict) and isinstance(hooks, dict):
            before.clear()
            before.update(hooks)
            content[name] = before


def _replicated(model: nn.Module, without: frozenset[str]) -> Iterator[nn.Module]:
    """The modules that get a replica, each once: `model`, and all but opaque ones and what stands below these alone."""
    seen = {id(model)}
    yield model
    children = [child for name, child in model._modules.items() if name not in without]
    stack = children[::-1] if opaque_reason(model) is None else []
    while stack:
        module = stack.pop()
        if module is None or id(module) in seen or opaque_reason(module) is not None:
            continue
        seen.add(id(module))
        yield module
        stack.extend(reversed(module._modules.values()))


def _bare_copy(module: nn.Module, class_of: Callable[[type], type]) -> nn.Module:
    replica: nn.Module = object.__new__(class_of(type(module)))
    _copy_slots(module, replica)
    return replica


def _computes_parametrizations(module: nn.Module) -> bool:
    names: Any = module._modules["parametrizations"]
    return all(isinstance(getattr(type(module), name, None), property) for name in names)


def _copy_slots(module: nn.Module, replica: nn.Module) -> None:
    for name in own_slots(type(module)):
        if hasattr(module, name):
            object.__setattr__(replica, name, getattr(module, name))
