"""From traced regions to what runs: one function for each, and views of the modules between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from inspect import Parameter
from typing import Any

from torch import fx, nn

from esper.core.call_guards import Guards
from esper.core.eager_code import generate
from esper.core.module_views import tree_view, unhooked_view, view_with_forward
from esper.core.tracing import Traced

__all__ = ["ITSELF", "Regions", "Transform", "build_forward", "graph_module_of", "may_fall_back"]

Transform = Callable[[fx.GraphModule], fx.GraphModule]
ITSELF = "site_itself"
"""The name of the module in the graph of a region that is a single site."""

_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Regions:
    """What of a model is traced.

    - `traced`: regions by their module, with optional arguments at their defaults.
    - `variants`: further traces of some of them, for optional arguments that calls have given.
    - `untraced`: other modules with sites in them, and why they are no regions.
    """

    traced: Mapping[nn.Module, Traced] = field(default_factory=dict)
    variants: Mapping[nn.Module, tuple[Traced, ...]] = field(default_factory=dict)
    untraced: Mapping[nn.Module, str] = field(default_factory=dict)

    @property
    def traces(self) -> tuple[Traced, ...]:
        """Every trace. What was built from equal traces is the same; a key for what is built."""
        return (*self.traced.values(), *(each for variants in self.variants.values() for each in variants))


def may_fall_back(traced: Traced) -> bool:
    """Whether calls are to be expected that the trace does not cover."""
    optional = any(
        parameter.kind in _VARIADIC or parameter.default is not Parameter.empty
        for parameter in traced.signature.parameters.values()
    )
    return optional or bool(traced.tensor_arguments or traced.given_arguments)


def build_forward(
    root: nn.Module,
    regions: Regions,
    with_sites: Set[nn.Module],
    names: Mapping[nn.Module, str],
    code_of: Callable[[Traced], fx.GraphModule],
    fell_back: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
    tick: Callable[[], object] | None,
) -> Callable[..., Any]:
    """The forward of `root` without its hooks: for a region its function, else the module with views below it.

    - `code_of` gives a region's final graph, in a graph module that is the caller's to keep.
    - `fell_back` is told of calls that no trace of a region covers.
    """
    return _Builder(regions, with_sites, names, code_of, fell_back).forward(root, tick)


class _Builder:
    def __init__(
        self,
        regions: Regions,
        with_sites: Set[nn.Module],
        names: Mapping[nn.Module, str],
        code_of: Callable[[Traced], fx.GraphModule],
        fell_back: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
    ) -> None:
        self._regions = regions
        self._with_sites = with_sites
        self._names = names
        self._code_of = code_of
        self._fell_back = fell_back
        self._views: dict[nn.Module, nn.Module] = {}

    def forward(self, root: nn.Module, tick: Callable[[], object] | None) -> Callable[..., Any]:
        if root in self._regions.traced:
            return self._region(root, tick)
        forward: Callable[..., Any] = self._view(root).forward
        if tick is None:
            return forward

        def ticking(*args: Any, **kwargs: Any) -> Any:
            tick()
            return forward(*args, **kwargs)

        return ticking

    def _view(self, module: nn.Module) -> nn.Module:
        if module not in self._with_sites:
            return module
        if module not in self._views:
            is_region = module in self._regions.traced
            self._views[module] = (
                view_with_forward(module, self._region(module, None)) if is_region else self._tree(module)
            )
        return self._views[module]

    def _tree(self, module: nn.Module) -> nn.Module:
        """`module` run as a module, on views of its children."""
        if not module._modules:
            return module
        children = {name: None if child is None else self._view(child) for name, child in module._modules.items()}
        return tree_view(module, children)

    def _region(self, module: nn.Module, tick: Callable[[], object] | None) -> Callable[..., Any]:
        """One function for each trace of a region; each calls the next for what it does not cover."""
        first = self._regions.traced[module]
        *others, last = (first, *self._regions.variants.get(module, ()))
        following = self._fallback(module) if may_fall_back(first) else module.forward
        for traced in others:
            following = self._function(traced, following, None)
        return self._function(last, following, tick)

    def _fallback(self, module: nn.Module) -> Callable[..., Any]:
        forward = self._tree(module).forward
        fell_back = self._fell_back

        def run_modules(*args: Any, **kwargs: Any) -> Any:
            fell_back(module, args, kwargs)
            return forward(*args, **kwargs)

        return run_modules

    def _function(
        self, traced: Traced, fallback: Callable[..., Any], tick: Callable[[], object] | None
    ) -> Callable[..., Any]:
        graph_module = self._code_of(traced)
        guards = Guards(
            fallback=fallback,
            given=traced.given,
            tensor_arguments=traced.tensor_arguments,
            given_arguments=traced.given_arguments,
            training=tuple((traced.modules[path], flag) for path, flag in traced.training.items()),
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


def graph_module_of(traced: Traced, graph: fx.Graph) -> fx.GraphModule:
    """A graph module that owns a copy of `graph` and has the region's own modules and parameters to refer to."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, mapping))
    for node in copy.find_nodes(op="call_module", target=""):
        node.target = ITSELF
    module = _GraphOwner(nn.Module(), fx.Graph())
    module._modules.update(dict(_children(traced)))
    module._parameters.update(traced.module._parameters)
    module._buffers.update(traced.module._buffers)
    module.graph = copy
    return module


def _children(traced: Traced) -> Iterator[tuple[str, nn.Module]]:
    yield from ((name, child) for name, child in traced.module._modules.items() if child is not None)
    if "" in traced.leaves:
        yield ITSELF, unhooked_view(traced.module)  # a region's own hooks run around it
