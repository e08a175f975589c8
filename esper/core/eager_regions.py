"""A wrapped model as generated code, region by region.

The largest parts of the shadow tree that can be traced are its regions. For a plan, each becomes one function; where
the whole model is one region, that is the model's forward. What lies between regions runs as it is, as modules.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from esper.core.eager_code import Guards, generate
from esper.core.module_views import tree_view, unhooked_view, view_with_forward
from esper.core.tracing import Traced, Untraceable, leaf_reason, trace_region
from esper.core.watched import signal_of
from esper_passes import ExpandModules, LowerFunctional, Pipeline, RewriteSites

__all__ = ["EagerRegions", "Regions"]

Transform = Callable[[fx.GraphModule], fx.GraphModule]
_ITSELF = "site_itself"


@dataclass(frozen=True)
class Regions:
    """What of a model is traced: regions by their module, and for other modules with sites in them the reason."""

    traced: Mapping[nn.Module, Traced] = field(default_factory=dict)
    untraced: Mapping[nn.Module, str] = field(default_factory=dict)


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
        self._traces: dict[nn.Module, list[Traced]] = {}
        self._failures: dict[tuple[nn.Module, tuple[bool, ...]], Untraceable] = {}
        self._graphs: dict[int, tuple[Traced, fx.Graph]] = {}
        self._with_sites = _ancestry(root, self._sites)
        self._names = {module: name for name, module in reversed(list(root.named_modules()))}
        self._changed_at = 0
        self._traced_at = 0
        self._warned = False
        self._regions = self._find()
        signal = signal_of(root)
        if signal is not None:
            signal.listen(self._note_change)

    @property
    def regions(self) -> Regions:
        """The regions as they are now."""
        return self._regions

    def name_of(self, module: nn.Module) -> str:
        """The dotted name of a module of the tree; "" for the root."""
        return str(self._names.get(module, ""))

    # -- staleness -------------------------------------------------------------------------------------------------

    def _note_change(self) -> None:
        self._changed_at += 1
        if self.on_change is not None:
            self.on_change()

    def refresh(self) -> bool:
        """Trace again what no longer matches the model: its attributes, training flags, hooks or children.

        Returns whether anything is different, so that functions must be built anew. Warns once about attributes that
        changed, since what ran between the change and this call had the old values.
        """
        if self._changed_at != self._traced_at:
            self._forget()
        else:
            self._drop_stale()
        regions = self._find()
        same = len(regions.traced) == len(self._regions.traced) and all(
            self._regions.traced.get(module) is traced for module, traced in regions.traced.items()
        )
        self._regions = regions
        return not same

    def _forget(self) -> None:
        self._traced_at = self._changed_at
        self._traces.clear()
        self._failures.clear()
        with self._lock:
            self._graphs.clear()
        self._with_sites = _ancestry(self._root, self._sites)
        self._names = {module: name for name, module in reversed(list(self._root.named_modules()))}

    def _drop_stale(self) -> None:
        for module, traces in self._traces.items():
            for traced in list(traces):
                changed = traced.snapshot.changed()
                if changed:
                    traces.remove(traced)
                    self._failures.clear()
                    self._warn([f"{self.name_of(module)}.{name}".strip(".") for name in changed])

    def _warn(self, names: list[str]) -> None:
        if not self._warned:
            self._warned = True
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            warnings.warn(
                f"attributes that the traced model relies on have changed: {shown}. They take effect from here on; call"
                " train() or eval() after changing attributes. This is said once.",
                UserWarning,
                stacklevel=4,
            )

    # -- tracing ---------------------------------------------------------------------------------------------------

    def _find(self) -> Regions:
        traced: dict[nn.Module, Traced] = {}
        untraced: dict[nn.Module, str] = {}
        stack = [self._root]
        while stack:
            module = stack.pop()
            if module in traced or module in untraced or module not in self._with_sites:
                continue
            outcome = self._trace(module)
            if isinstance(outcome, Untraceable):
                untraced[module] = outcome.reason
                stack.extend(child for child in module.children() if child is not module)
            else:
                traced[module] = outcome
                for path in outcome.leaves:
                    leaf = outcome.modules[path]
                    if leaf in self._with_sites and leaf is not module and not self._is_plain_site(leaf):
                        stack.append(leaf)
        return Regions(traced, untraced)

    def _is_plain_site(self, module: nn.Module) -> bool:
        return module in self._sites and not _hooked(module)

    def _trace(self, module: nn.Module) -> Traced | Untraceable:
        for traced in self._traces.get(module, ()):
            if all(traced.modules[path].training == flag for path, flag in traced.training.items()):
                return traced
        flags = tuple(each.training for each in module.modules())
        if (module, flags) in self._failures:
            return self._failures[module, flags]
        outcome = trace_region(module, self._sites.keys())
        if isinstance(outcome, Traced):
            self._traces.setdefault(module, []).append(outcome)
        else:
            self._failures[module, flags] = outcome
        return outcome

    # -- code ------------------------------------------------------------------------------------------------------

    def build(self, transform: Transform, tick: Callable[[], object] | None = None) -> Callable[..., Any]:
        """The model's forward for one plan, without the root's own hooks. `tick` is called once in each call.

        `transform` turns a region's graph, in which sites are `esper::site` nodes, into one without them.
        """
        return _Build(self._root, self._regions, self._with_sites, self._names, self._graph_of, transform).run(tick)

    def _graph_of(self, traced: Traced) -> fx.Graph:
        """The region's graph with its sites marked and its modules expanded, to be copied."""
        with self._lock:
            known = self._graphs.get(id(traced))
            if known is None:
                module = _graph_module(traced, traced.graph)
                named = traced.modules.items()
                sites = {path: self._sites[each] for path, each in named if self._is_plain_site(each)}
                if "" in traced.leaves:
                    sites[_ITSELF] = self._sites[traced.module]
                passes = Pipeline((RewriteSites(sites), ExpandModules(), LowerFunctional()))
                known = self._graphs[id(traced)] = (traced, passes(module).graph_module.graph)
            return known[1]


class _Build:
    """One build: the functions and views for one plan."""

    def __init__(
        self,
        root: nn.Module,
        regions: Regions,
        with_sites: set[nn.Module],
        names: Mapping[nn.Module, str],
        graph_of: Callable[[Traced], fx.Graph],
        transform: Transform,
    ) -> None:
        self._root = root
        self._regions = regions
        self._with_sites = with_sites
        self._names = names
        self._graph_of = graph_of
        self._transform = transform
        self._views: dict[nn.Module, nn.Module] = {}

    def run(self, tick: Callable[[], object] | None) -> Callable[..., Any]:
        traced = self._regions.traced.get(self._root)
        if traced is not None:
            return self._function(traced, tick)
        forward: Callable[..., Any] = self._view(self._root).forward
        if tick is None:
            return forward

        def run(*args: Any, **kwargs: Any) -> Any:
            tick()
            return forward(*args, **kwargs)

        return run

    def _view(self, module: nn.Module) -> nn.Module:
        if module not in self._with_sites:
            return module
        if module not in self._views:
            traced = self._regions.traced.get(module)
            if traced is not None:
                self._views[module] = view_with_forward(module, self._function(traced, None))
            elif not module._modules:
                self._views[module] = module
            else:
                children = {name: child and self._view(child) for name, child in module._modules.items()}
                self._views[module] = tree_view(module, children)
        return self._views[module]

    def _function(self, traced: Traced, tick: Callable[[], object] | None) -> Callable[..., Any]:
        graph_module = self._transform(_graph_module(traced, self._graph_of(traced)))
        guards = Guards(
            fallback=traced.module.forward,
            tensor_arguments=traced.tensor_arguments,
            given_arguments=traced.given_arguments,
            training=tuple((traced.modules[path], flag) for path, flag in traced.training.items()),
            hooks=len(traced.inlined) + len(traced.leaves) > 0,
        )

        def owner(path: str) -> nn.Module:
            return graph_module.get_submodule(path) if path else traced.module

        return generate(
            graph_module.graph,
            owner,
            traced.signature,
            guards,
            callee=lambda path: self._view(owner(path)),
            name=self._names.get(traced.module) or "forward",
            tick=tick,
        )


class _GraphOwner(fx.GraphModule):
    """What passes need of a graph module. It is never called, and does not write its forward at every change."""

    def recompile(self) -> Any:
        return None


def _graph_module(traced: Traced, graph: fx.Graph) -> fx.GraphModule:
    """A graph module that owns a copy of `graph` and has the region's own modules and parameters to refer to."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, mapping))
    for node in copy.find_nodes(op="call_module", target=""):
        node.target = _ITSELF
    module = _GraphOwner(nn.Module(), fx.Graph())
    module._modules.update(dict(_children(traced)))
    module._parameters.update(traced.module._parameters)
    module._buffers.update(traced.module._buffers)
    module.graph = copy
    return module


def _children(traced: Traced) -> Iterator[tuple[str, nn.Module]]:
    yield from ((name, child) for name, child in traced.module._modules.items() if child is not None)
    if "" in traced.leaves:
        yield _ITSELF, unhooked_view(traced.module)  # a region's own hooks run around it


def _hooked(site: nn.Module) -> bool:
    reason = leaf_reason(site)
    return reason is not None and reason.startswith("it has ")


def _ancestry(root: nn.Module, sites: Mapping[nn.Module, int]) -> set[nn.Module]:
    """The modules of the tree that are sites or have some below them."""
    found: set[nn.Module] = set()
    for module in reversed(list(root.modules())):  # children come after their parents
        if module in sites or any(child in found for child in module.children()):
            found.add(module)
    return found
