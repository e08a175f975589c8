"""`NumberSites`: the tags of sites and of models become numbers, and are inputs of the graph no longer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from esper_passes._subgraphs import bodies, copy_body, subgraphs
from esper_passes.base import PassResult
from esper_passes.site_op import number, tag_of

__all__ = ["NumberSites", "tag_inputs"]


def tag_inputs(graph_module: fx.GraphModule) -> tuple[int, ...]:
    """The positions of the graph's inputs that are tags, in order of first use: the numbers that tags get.

    Raises `ValueError` for a tag that is no input of the graph.
    """
    placeholders = _placeholders(graph_module)
    used = _tags_used(graph_module, {node: position for position, node in enumerate(placeholders)})
    return tuple(dict.fromkeys(used))


@dataclass(frozen=True)
class NumberSites:
    """Turn `esper::tagged_site` and `esper::tagged_enter` into `esper::site` and `esper::enter`, without their tags.

    The number of a tag is its place among :func:`tag_inputs`. Tags are taken out of the inputs of the graph, and out of
    the operands of the bodies nested in it; a body that is called with different tags gets a copy for each. Raises
    `ValueError` for a tag that is no input of the graph, or that something else reads.
    """

    name: ClassVar[str] = "number_sites"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        placeholders = _placeholders(graph_module)
        tags = {placeholders[position]: index for index, position in enumerate(tag_inputs(graph_module))}
        if tags:
            _Numbering(graph_module).apply(tags)
        return PassResult(graph_module, bool(tags))


@dataclass
class _Numbering:
    """The numbering of one graph, in place."""

    module: fx.GraphModule
    _bodies: dict[str, fx.GraphModule] = field(init=False)
    _numbered: dict[tuple[str, tuple[int | None, ...]], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._bodies = bodies(self.module)

    def apply(self, tags: Mapping[fx.Node, int]) -> None:
        """`tags` are the placeholders that are tags, and their numbers."""
        for node in list(self.module.graph.nodes):
            tag = tag_of(node)
            if tag is not None:
                number(node, tags[tag])
            elif any(operand in tags for operand in node.all_input_nodes) and any(subgraphs(node)):
                self._number_bodies(node, tags)
        for tag in tags:
            if tag.users:
                raise ValueError(f"the tag {tag.name!r} is read by {next(iter(tag.users)).format_node()}")
            self.module.graph.erase_node(tag)
        self.module.recompile()

    def _number_bodies(self, call: fx.Node, tags: Mapping[fx.Node, int]) -> None:
        replaced: dict[fx.Node, fx.Node] = {}
        for reference, _ in list(subgraphs(call)):
            name = str(reference.target)
            given = [tags.get(operand) if isinstance(operand, fx.Node) else None for operand in _operands(call)]
            numbered = self._body(name, tuple(given))
            if numbered != name:
                with call.graph.inserting_before(call):
                    replaced[reference] = call.graph.get_attr(numbered)
                if call.target is torch.ops.higher_order.invoke_subgraph:  # whose second argument says which body it is
                    call.args = (call.args[0], numbered, *call.args[2:])
        call.args = _without(call.args, tags)
        for reference, other in replaced.items():
            call.replace_input_with(reference, other)
            if not reference.users:
                call.graph.erase_node(reference)

    def _body(self, name: str, given: tuple[int | None, ...]) -> str:
        """The name of a copy of the body `name` for operands that are the tags of these numbers."""
        known = self._numbered.get((name, given))
        if known is not None:
            return known
        first = all(other != name for other, _ in self._numbered)
        chosen = name if first else f"{name}_{len(self._numbered)}"
        while not first and hasattr(self.module, chosen):
            chosen += "_"
        copied = copy_body(self._bodies[name])
        inside = zip(_placeholders(copied), given, strict=True)
        _Numbering(copied).apply({placeholder: each for placeholder, each in inside if each is not None})
        self.module.add_submodule(chosen, copied)
        self._numbered[name, given] = chosen
        return chosen


def _tags_used(module: fx.GraphModule, origins: Mapping[fx.Node, int]) -> Iterator[int]:
    """The origin of the tag of each marker, in order, bodies included."""
    for node in module.graph.nodes:
        tag = tag_of(node)
        if tag is not None:
            if tag not in origins:
                raise ValueError(f"the tag {tag.name!r} of {node.name!r} is no input of the graph")
            yield origins[tag]
        for _, body in subgraphs(node):
            if _holds_tags(body):
                given = zip(_placeholders(body), _operands(node), strict=True)
                pairs = ((each, operand) for each, operand in given if isinstance(operand, fx.Node))
                yield from _tags_used(body, {each: origins[operand] for each, operand in pairs if operand in origins})


def _holds_tags(module: fx.GraphModule) -> bool:
    graphs = [each.graph for each in module.modules() if isinstance(each, fx.GraphModule)]
    return any(tag_of(node) is not None for graph in graphs for node in graph.nodes)


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _operands(call: fx.Node) -> list[Any]:
    """What becomes the placeholders of the bodies of `call`, in order: what comes after them, and after a name."""
    flat = list(_flat(call.args))
    named = {reference for reference, _ in subgraphs(call)}
    last = max((index for index, each in enumerate(flat) if isinstance(each, fx.Node) and each in named), default=-1)
    return [each for each in flat[last + 1 :] if not isinstance(each, str)]


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def _without(value: Any, nodes: Mapping[fx.Node, int]) -> Any:
    """A nested argument without `nodes`."""
    if not isinstance(value, list | tuple):
        return value
    kept = [_without(each, nodes) for each in value if not (isinstance(each, fx.Node) and each in nodes)]
    return type(value)(kept)
