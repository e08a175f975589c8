"""The translation of one exported graph: which values carry the batch, and what became of each ATen call.

An exported graph has one leading dimension, the batch. A rule turns one ATen call into nodes on trailing dimensions, or
raises :class:`Refusal`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from esper.artifacts.document import Json
from esper.artifacts.errors import ArtifactError, BlueprintError
from esper.artifacts.graph import DTYPES
from esper.artifacts.graph_builder import GraphBuilder
from esper.torch_internals import OpOverload

__all__ = ["Call", "Refusal", "Rule", "Rules", "Translation", "Value", "Values"]


@dataclass(slots=True, eq=False)
class Value:
    """A tensor of the exported graph: a name in the kernel's graph, or a constant that has none yet.

    `shape` includes the batch if `batched`; `hint` is what a constant should be called.
    """

    shape: tuple[int, ...]
    batched: bool
    name: str | None = None
    constant: Tensor | None = None
    hint: str = "constant"

    @property
    def trailing(self) -> tuple[int, ...]:
        """The shape without the batch."""
        return self.shape[1:] if self.batched else self.shape


Values: TypeAlias = "Value | tuple[Value, ...]"
Rule: TypeAlias = "Callable[[Call], Values]"
Rules: TypeAlias = "Mapping[OpOverload, Rule]"


class Refusal(ArtifactError):
    """Why a rule does not take a call; becomes a :class:`BlueprintError` that names the call."""


@dataclass
class Translation:
    """The state of one translation: the graph so far, and the value of every exported node. Belongs to one thread."""

    builder: GraphBuilder
    batch: int
    rules: Rules
    values: dict[fx.Node, Values] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)

    def name(self, value: Value) -> str:
        """The name of `value`; a constant becomes a tensor of the graph."""
        if value.name is None:
            assert value.constant is not None
            taken = self.builder.tensor_names
            name = value.hint if value.hint not in taken and value.hint != "constant" else f"{value.hint}_{len(taken)}"
            if value.constant.dtype != DTYPES[self.builder.dtype]:
                raise Refusal(f"the constant {name!r} is {value.constant.dtype}, the kernel {self.builder.dtype}")
            self.constants[name] = value.constant
            value.name = self.builder.tensor(name, tuple(value.constant.shape))
        return value.name

    def step(self, node: fx.Node) -> None:
        """Translates one call; raises :class:`BlueprintError` naming it."""
        if not node.users:  # assertions, and results that nothing reads
            return
        try:
            self.values[node] = self._apply(node)
        except ArtifactError as cause:
            stack = node.meta.get("nn_module_stack") or {}
            path = next((entry[0] for entry in reversed(stack.values())), "")
            where = f" in {path}" if path else ""
            raise BlueprintError(f"{node.target}{where} does not land in the operator table: {cause}") from cause

    def _apply(self, node: fx.Node) -> Values:
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(index, int)
            items = self.values[source]
            assert isinstance(items, tuple)
            if index >= len(items):
                raise Refusal("indices of a maximum or minimum are integers; a kernel has one floating dtype")
            return items[index]
        if not isinstance(node.target, OpOverload):
            raise Refusal("it is not an ATen operation; write the module with PyTorch operations only")
        inputs = [self.values[each] for each in node.all_input_nodes]
        if all(isinstance(value, Value) and value.constant is not None for value in inputs):
            return self._fold(node, node.target)
        rule = self.rules.get(node.target)
        if rule is None:
            raise Refusal("there is no rule for it; express it with operations of esper.artifacts.OPERATORS")
        call = Call(self, node)
        result = rule(call)
        if isinstance(result, Value) and isinstance(node.meta["val"], Tensor) and result.shape != call.shape:
            raise Refusal(f"it gives {list(call.shape)}, the table {list(result.shape)}")
        return result

    def _fold(self, node: fx.Node, target: OpOverload) -> Values:
        """Evaluates what depends on neither the input nor a parameter."""

        def concrete(each: fx.Node) -> Any:
            value = self.values[each]
            assert isinstance(value, Value)
            return value.constant

        if torch.Tag.nondeterministic_seeded in target.tags:
            raise Refusal("it draws random numbers; a kernel is deterministic, call .eval() or leave it out")
        result = target(*fx.map_arg(node.args, concrete), **fx.map_arg(node.kwargs, concrete))
        if isinstance(result, tuple | list):
            return tuple(Value(tuple(item.shape), False, constant=item) for item in result)
        if not isinstance(result, Tensor):
            raise Refusal("it does not give a tensor")
        return Value(tuple(result.shape), False, constant=result)


class Call:
    """One ATen call: its arguments by the names of its schema, with exported nodes replaced by their values."""

    def __init__(self, translation: Translation, node: fx.Node) -> None:
        assert isinstance(node.target, OpOverload)
        self.node = node
        self.batch = translation.batch
        self.dtype = translation.builder.dtype
        self._translation = translation
        self._arguments: dict[str, Any] = {}
        replace: Any = translation.values.__getitem__
        for index, argument in enumerate(node.target._schema.arguments):
            given = (
                node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
            )
            self._arguments[argument.name] = fx.map_arg(given, replace)

    def __getitem__(self, name: str) -> Any:
        return self._arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument, or `default` where the schema has none of that name."""
        return self._arguments.get(name, default)

    @property
    def all(self) -> list[Any]:
        """Every argument in the schema's order."""
        return list(self._arguments.values())

    @property
    def shape(self) -> tuple[int, ...]:
        """The exported shape of the result."""
        return tuple(int(size) for size in self.node.meta["val"].shape)

    def emit(self, shape: Sequence[int], op: str, /, *inputs: Value, **attributes: Json) -> Value:
        """Appends a node whose exported shape is `shape`."""
        names = (self._translation.name(value) for value in inputs)
        name = self._translation.builder.call(op, *names, **attributes)
        return Value(tuple(shape), any(value.batched for value in inputs), name=name)

    def axis(self, value: Value, dim: int) -> int:
        """Dimension `dim` of the exported `value`, counted from the end; refuses the batch."""
        rank = len(value.shape)
        position = dim % rank if rank else 0
        if rank == 0 or (value.batched and position == 0):
            raise Refusal("it works on the leading dimension; a kernel treats leading positions apart")
        return position - rank

    def axes(self, value: Value, dims: Sequence[int]) -> tuple[int, ...]:
        """:meth:`axis` of each."""
        return tuple(self.axis(value, dim) for dim in dims)

    def align(self, value: Value, other: Value) -> Value:
        """`value` ready to broadcast with `other`: what does not carry the batch must not reach into its dimension."""
        across = Refusal(f"it broadcasts {list(value.shape)} with {list(other.shape)} across the leading dimension")
        if value.batched and other.batched and len(value.shape) != len(other.shape):
            raise across
        if value.batched or not other.batched or len(value.shape) < len(other.shape):
            return value
        if len(value.shape) > len(other.shape):
            raise across
        if value.constant is not None and bool((value.constant == value.constant[:1]).all()):
            return Value(value.shape[1:], False, constant=value.constant[0], hint=value.hint)
        if value.shape[0] != 1:
            raise Refusal(f"a weight {list(value.shape)} has one row for each leading position")
        return self.emit(value.shape[1:], "select", value, dim=-len(value.shape), index=0)
