"""A wrapped model as generated code, region by region.

The largest parts of the shadow tree that can be traced are its regions. For a plan, each becomes one function; where
the whole model is one region, that is the model's forward. What lies between regions runs as it is, as modules.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any

from torch import fx, nn

from esper.core.call_guards import is_default
from esper.core.region_building import (
    ITSELF,
    Regions,
    Transform,
    build_forward,
    graph_module_of,
    may_fall_back,
)
from esper.core.tracing import Traced, Untraceable, trace_region
from esper.core.watched import HOOK_KINDS, signal_of
from esper.forking import reset_after_fork
from esper_passes import ExpandModules, LowerFunctional, Pipeline, RewriteSites

__all__ = ["EagerRegions", "Regions"]

_MOST_VARIANTS = 4
_COMPILED = "_compiled_call_impl"
"""Where `nn.Module.compile` keeps what it made. It computes what the module does, so nothing was stale without it."""

_Key = tuple[nn.Module, frozenset[str]]


class EagerRegions:
    """Traces a shadow tree and generates its code.

    `sites` maps the site modules of the tree to their ids. Tracing happens in the constructor and in :meth:`refresh`,
    which belong to the thread that trains; :meth:`build` may run on any thread.

    When a hook is registered or a child replaced anywhere in the tree, `on_change` is called at once, on the thread
    that did it. From then on functions built earlier must not be used, until `refresh` and `build` were called again.
    """

    def __init__(self, root: nn.Module, sites: Mapping[nn.Module, int]) -> None:
        self.on_change: Callable[[], None] | None = None
        self._root = root
        self._sites = dict(sites)
        self._lock = threading.Lock()
        self._traces: dict[_Key, list[Traced]] = {}
        self._failures: dict[tuple[_Key, tuple[bool, ...]], Untraceable] = {}
        self._graphs: dict[int, tuple[Traced, fx.Graph]] = {}
        self._calls: dict[nn.Module, list[frozenset[str]]] = {}  # arguments to trace with, beside the defaults
        self._unseen: dict[nn.Module, dict[frozenset[str], None]] = {}  # arguments of calls that were not covered
        self._changed_at = self._traced_at = 0
        self._warned = self._quiet = False
        self._survey()
        self._regions = self._find()
        signal = signal_of(root)
        if signal is not None:
            signal.listen(self._note_change)
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Nobody in this child builds a function, which is when the lock is held; see `esper.forking`."""
        self._lock = threading.Lock()

    @property
    def regions(self) -> Regions:
        """The regions as they are now."""
        return self._regions

    def name_of(self, module: nn.Module) -> str:
        """The dotted name of a module of the tree; "" for the root."""
        return self._names.get(module, "")

    def _survey(self) -> None:
        self._with_sites = _ancestry(self._root, self._sites)
        self._names: dict[nn.Module, str] = {module: name for name, module in self._root.named_modules()}

    # -- staleness -------------------------------------------------------------------------------------------------

    def _note_change(self) -> None:
        self._changed_at += 1
        if self.on_change is not None:
            self.on_change()

    def refresh(self, quietly: bool = False) -> bool:
        """Trace again what no longer matches the model: its attributes, training flags, hooks or children.

        Also traces for combinations of optional arguments that calls since the last time have had. Returns whether
        anything is different, so that functions must be built anew. Warns once about attributes that changed, since
        what ran between the change and this call may have had the old values; `quietly` if nothing has run yet.
        """
        self._quiet = quietly
        if self._changed_at != self._traced_at:
            self._forget()
        else:
            self._drop_stale()
        self._learn()
        regions = self._find()
        if regions.traces == self._regions.traces and regions.untraced == self._regions.untraced:
            return False
        self._regions = regions
        return True

    def _forget(self) -> None:
        self._traced_at = self._changed_at
        self._traces.clear()
        self._failures.clear()
        self._calls.clear()
        self._unseen.clear()
        with self._lock:
            self._graphs.clear()
        self._survey()

    def _drop_stale(self) -> None:
        for (module, _), traces in self._traces.items():
            for traced in list(traces):
                changed = traced.snapshot.changed()
                if changed:
                    traces.remove(traced)
                    with self._lock:
                        self._graphs.pop(id(traced), None)
                    self._failures.clear()
                    names = [name for name in changed if name.rpartition(".")[2] != _COMPILED]
                    self._warn([f"{self.name_of(module)}.{name}".strip(".") for name in names])

    def _warn(self, names: list[str]) -> None:
        if names and not self._warned and not self._quiet:
            self._warned = True
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            warnings.warn(
                f"attributes that the traced model relies on have changed: {shown}. They take effect from here on; call"
                " train() or eval() after changing attributes. This is said once.",
                UserWarning,
                stacklevel=4,
            )

    # -- optional arguments ----------------------------------------------------------------------------------------

    def _note_fallback(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A region was called in a way that none of its traces covers."""
        unseen = self._unseen.setdefault(module, {})
        known = self._calls.get(module, ())
        if len(known) + len(unseen) >= _MOST_VARIANTS:
            return
        parameters = self._regions.traced[module].signature.parameters
        positional = [name for name, each in parameters.items() if each.kind is Parameter.POSITIONAL_OR_KEYWORD]
        values = {**dict(zip(positional, args, strict=False)), **kwargs}
        given = frozenset(
            name
            for name, value in values.items()
            if name in parameters
            and parameters[name].default is not Parameter.empty
            and not is_default(value, parameters[name].default)
        )
        if given and given not in known:
            unseen[given] = None

    def _learn(self) -> None:
        """Take up the calls noted, of outermost regions first: a region inside one may not be needed any more."""
        names = {self.name_of(module): module for module, unseen in self._unseen.items() if unseen}
        for name, module in names.items():
            if not any(other != name and (not other or name.startswith(f"{other}.")) for other in names):
                self._calls.setdefault(module, []).extend(self._unseen[module])
        self._unseen.clear()

    # -- tracing ---------------------------------------------------------------------------------------------------

    def _find(self) -> Regions:
        traced: dict[nn.Module, Traced] = {}
        variants: dict[nn.Module, tuple[Traced, ...]] = {}
        untraced: dict[nn.Module, str] = {}
        stack = [self._root]
        while stack:
            module = stack.pop()
            if module in traced or module in untraced or module not in self._with_sites:
                continue
            outcome = self._trace(module, frozenset())
            if isinstance(outcome, Untraceable):
                untraced[module] = outcome.reason
                stack.extend(module.children())
                continue
            traced[module] = outcome
            others = [self._trace(module, given) for given in self._calls.get(module, ())]
            variants[module] = tuple(other for other in others if isinstance(other, Traced))
            for each in (outcome, *variants[module]):
                leaves = [each.modules[path] for path in each.leaves if path]
                stack.extend(leaf for leaf in leaves if not self._is_plain_site(leaf))
            if may_fall_back(outcome):
                stack.extend(module.children())
        return Regions(traced, variants, untraced)

    def _is_plain_site(self, module: nn.Module) -> bool:
        return module in self._sites and not any(getattr(module, kind) for kind in HOOK_KINDS)

    def _trace(self, module: nn.Module, given: frozenset[str]) -> Traced | Untraceable:
        key = (module, given)
        for traced in self._traces.get(key, ()):
            if all(traced.modules[path].training == flag for path, flag in traced.training.items()):
                return traced
        flags = tuple(each.training for each in module.modules())
        if (key, flags) in self._failures:
            return self._failures[key, flags]
        outcome = trace_region(module, self._sites.keys(), given)
        if isinstance(outcome, Traced):
            self._traces.setdefault(key, []).append(outcome)
        else:
            self._failures[key, flags] = outcome
        return outcome

    # -- code ------------------------------------------------------------------------------------------------------

    def build(self, transform: Transform, tick: Callable[[], object] | None = None) -> Callable[..., Any]:
        """The model's forward for one plan, without the root's own hooks. `tick` is called once in each call.

        `transform` turns a region's graph, in which sites are `esper::site` nodes, into one without them. It is given a
        graph module that is its own, and called once for each trace of a region.
        """

        def code_of(traced: Traced) -> fx.GraphModule:
            return transform(graph_module_of(traced, self._graph_of(traced)))

        return build_forward(
            self._root, self._regions, self._with_sites, self._names, code_of, self._note_fallback, tick
        )

    def _graph_of(self, traced: Traced) -> fx.Graph:
        """The region's graph with its sites marked and its modules expanded, to be copied."""
        with self._lock:
            known = self._graphs.get(id(traced))
            if known is None:
                module = graph_module_of(traced, traced.graph)
                sites = {path: self._sites[each] for path, each in traced.modules.items() if self._is_plain_site(each)}
                if "" in traced.leaves:
                    sites[ITSELF] = self._sites[traced.module]
                passes = Pipeline((RewriteSites(sites), ExpandModules(), LowerFunctional()))
                known = self._graphs[id(traced)] = (traced, passes(module).graph_module.graph)
            return known[1]


def _ancestry(root: nn.Module, sites: Mapping[nn.Module, int]) -> set[nn.Module]:
    """The modules of the tree that are sites or have some below them."""
    found: set[nn.Module] = set()
    for module in reversed(list(root.modules())):  # children come after their parents
        if module in sites or any(child in found for child in module.children()):
            found.add(module)
    return found
