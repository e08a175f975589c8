"""Traced graphs as plain Python functions.

A graph module's own `forward` reads every parameter through `nn.Module.__getattr__` and gives every intermediate value
a name. The functions made here read parameters from the modules' own dictionaries, nest calls as one would write them,
and let go of values where the host does. The order of evaluation is that of the graph.

The function of `nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))` is

    def forward(input):
        if hooks_0 or hooks_1 or hooks_2 or hooks_3:
            return fallback(input)
        return linear(relu(linear(input, p_0['weight'], p_0['bias'])), p_2['weight'], p_2['bias'])
"""

from __future__ import annotations

import builtins
import itertools
import keyword
import linecache
import operator
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import Signature
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from esper.core.call_guards import Guards, forwarded, guard_tests, parameter_list
from esper.core.traced_values import unpack

__all__ = ["generate"]

_numbers = itertools.count()
_DEEPEST = 24
_LITERALS = (int, bool, str, type(None), type(...))
_BINARY = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.mod: "%", operator.pow: "**", operator.matmul: "@", operator.and_: "&", operator.or_: "|",
    operator.xor: "^", operator.lshift: "<<", operator.rshift: ">>", operator.lt: "<", operator.le: "<=",
    operator.gt: ">", operator.ge: ">=", operator.eq: "==", operator.ne: "!=",
}  # fmt: skip
_UNARY: dict[Any, str] = {operator.neg: "-", operator.pos: "+", operator.invert: "~"}


def generate(
    graph: fx.Graph,
    owner: Callable[[str], nn.Module],
    signature: Signature,
    guards: Guards,
    *,
    callee: Callable[[str], Callable[..., Any]] | None = None,
    name: str = "forward",
    tick: Callable[[], object] | None = None,
) -> FunctionType:
    """The function that computes `graph`.

    - `owner` gives the module that a dotted path in the graph stands for, `callee` what to call for it (the module).
    - `signature`: the function's parameters; the graph's placeholders are among them.
    - `tick` is called once at each call.

    The source is in `__esper_source__`, and in tracebacks.
    """
    return _Writer(graph, owner, callee or owner, guards).function(signature, name, tick)


@dataclass
class _Pending:
    """An expression that has its place in the order of evaluation and is not evaluated yet."""

    node: fx.Node
    text: str
    depth: int


@dataclass
class _Body:
    lines: list[str] = field(default_factory=list)
    pending: list[_Pending] = field(default_factory=list)


class _Writer:
    def __init__(
        self,
        graph: fx.Graph,
        owner: Callable[[str], nn.Module],
        callee: Callable[[str], Callable[..., Any]],
        guards: Guards,
    ) -> None:
        self._graph = graph
        self._owner = owner
        self._callee = callee
        self._guards = guards
        self._globals: dict[str, Any] = {}
        self._bound: dict[int, str] = {}
        self._variables: dict[fx.Node, str] = {}
        self._taken: set[str] = set()
        self._body = _Body()
        self._last_use: dict[fx.Node, list[fx.Node]] = {}

    # -- the function ----------------------------------------------------------------------------------------------

    def function(self, signature: Signature, name: str, tick: Callable[[], object] | None) -> FunctionType:
        self._taken.update(signature.parameters)
        self._taken.update(keyword.kwlist, vars(builtins))
        for node in self._graph.find_nodes(op="placeholder"):
            self._variables[node] = str(node.target)
        head = f"def forward({parameter_list(signature, self._constant)}):"
        if tick is not None:
            self._line(f"{self._global(tick, 'tick')}()")
        tests = guard_tests(self._guards, signature, self._global)
        if tests:
            self._line(f"if {' or '.join(tests)}:")
            self._line(f"    return {self._global(self._guards.fallback, 'fallback')}({forwarded(signature)})")
        self._plan_releases()
        for node in self._graph.nodes:
            self._node(node)
        source = "\n".join([head, *(f"    {line}" for line in self._body.lines)]) + "\n"
        return self._compiled(source, name)

    def _compiled(self, source: str, name: str) -> FunctionType:
        filename = f"<esper {name} #{next(_numbers)}>"
        code = compile(source, filename, "exec")
        namespace = dict(self._globals)
        exec(code, namespace)  # our own text; everything that comes from a model is bound by name, never spelt out
        function: FunctionType = namespace.pop("forward")
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        weakref.finalize(function, linecache.cache.pop, filename, None)
        function.__qualname__ = function.__name__ = name
        function.__esper_source__ = source  # type: ignore[attr-defined]  # functions take attributes
        return function

    # -- statements ------------------------------------------------------------------------------------------------

    def _line(self, text: str) -> None:
        self._body.lines.append(text)

    def _plan_releases(self) -> None:
        """Where each value is used last."""
        last: dict[fx.Node, fx.Node] = {}
        for node in self._graph.nodes:
            for used in node.all_input_nodes:
                last[used] = node
        for used, node in last.items():
            self._last_use.setdefault(node, []).append(used)

    def _release(self, nodes: list[fx.Node]) -> None:
        names = [self._variables[node] for node in nodes if node in self._variables]
        if names:
            self._line(f"del {', '.join(names)}")

    def _node(self, node: fx.Node) -> None:
        if node.op == "placeholder" or (node.op == "get_attr" and not node.users):
            return
        if node.op == "output":
            text, _ = self._with_arguments(node, lambda argument: argument(node.args[0]))
            self._flush()
            self._line(f"return {text}")
            return
        if node in self._variables:
            return  # a name that an unpacking has assigned
        if node.target is unpack and self._unpacks(node):
            text, _ = self._with_arguments(node, lambda argument: argument(node.args[0]))
            self._flush()
            self._unpack(node, text)
            return
        text, depth = self._with_arguments(node, lambda argument: self._expression(node, argument))
        self._body.pending.append(_Pending(node, text, depth))
        if len(node.users) != 1 or depth >= _DEEPEST:
            self._flush()

    def _with_arguments(self, node: fx.Node, write: Callable[[Callable[[Any], str]], str]) -> tuple[str, int]:
        """The text of `node`, taking over the pending expressions it uses if that keeps the order of evaluation."""
        wanted = [used for used in _in_order(node) if used not in self._variables]
        pending = self._body.pending
        start = len(pending) - len(wanted)
        if start < 0 or [each.node for each in pending[start:]] != wanted:
            self._flush()
            taken: list[_Pending] = []
        else:
            taken = pending[start:]
            del pending[start:]
        texts = {each.node: each.text for each in taken}
        depth = 1 + max((each.depth for each in taken), default=0)
        return write(lambda value: self._value(value, texts)), depth

    def _flush(self) -> None:
        """Evaluate what is pending."""
        pending, self._body.pending = self._body.pending, []
        for each in pending:
            if each.node.users:
                self._variables[each.node] = self._fresh(each.node.name)
                self._line(f"{self._variables[each.node]} = {each.text}")
            else:
                self._line(each.text)
        if pending:
            self._release_after([each.node for each in pending])

    def _release_after(self, evaluated: list[fx.Node]) -> None:
        """Let go of what the nodes evaluated just now, and those nested in them, used last."""
        gone: list[fx.Node] = []
        stack = list(evaluated)
        while stack:
            node = stack.pop()
            for used in self._last_use.pop(node, ()):
                if used in self._variables:
                    gone.append(used)
                stack.append(used) if used not in self._variables else None
        self._release(sorted(gone, key=lambda node: self._variables[node]))

    def _unpacks(self, node: fx.Node) -> bool:
        positions = [user.args[1] for user in node.users if user.target is operator.getitem]
        return len(positions) == len(node.users)

    def _unpack(self, node: fx.Node, text: str) -> None:
        """`a, b, c = value`: exactly what stood in the traced code, errors included."""
        count = node.args[1]
        assert isinstance(count, int)
        names = ["_"] * count
        for user in node.users:
            position = user.args[1]
            assert isinstance(position, int)
            if names[position] == "_":
                names[position] = self._fresh(user.name)
            self._variables[user] = names[position]
        self._line(f"{', '.join(names)}{',' if count == 1 else ''} = {text}")
        self._release_after([node])
        if "_" in names:
            self._line("del _")

    # -- expressions -----------------------------------------------------------------------------------------------

    def _expression(self, node: fx.Node, argument: Callable[[Any], str]) -> str:
        args, kwargs, target = node.args, node.kwargs, node.target
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "call_module":
            return self._call(self._global(self._callee(str(target)), "module"), args, kwargs, argument)
        if node.op == "call_method":
            return self._call(f"{argument(args[0])}.{target}", args[1:], kwargs, argument)
        if not kwargs and len(args) == 2:
            if target in _BINARY:
                return f"({argument(args[0])} {_BINARY[target]} {argument(args[1])})"
            if target is operator.getitem:
                return f"{argument(args[0])}[{self._subscript(args[1], argument)}]"
            if target is getattr and isinstance(args[1], str) and args[1].isidentifier():
                return f"{argument(args[0])}.{args[1]}"
        if target in _UNARY:
            return f"({_UNARY[target]}{argument(args[0])})"
        return self._call(self._global(target, getattr(target, "__name__", "function")), args, kwargs, argument)

    def _call(self, function: str, args: Any, kwargs: Mapping[str, Any], argument: Callable[[Any], str]) -> str:
        parts = [argument(value) for value in args]
        parts += [f"{name}={argument(value)}" for name, value in kwargs.items()]
        return f"{function}({', '.join(parts)})"

    def _subscript(self, key: Any, argument: Callable[[Any], str]) -> str:
        if isinstance(key, slice):
            bounds = ["" if bound is None else argument(bound) for bound in (key.start, key.stop)]
            return ":".join([*bounds, argument(key.step)] if key.step is not None else bounds)
        if isinstance(key, tuple) and key and not hasattr(key, "_fields") and type(key) is not torch.Size:
            text = ", ".join(self._subscript(item, argument) for item in key)
            return f"{text}," if len(key) == 1 else text
        return argument(key)

    def _value(self, value: Any, texts: Mapping[fx.Node, str]) -> str:
        if isinstance(value, fx.Node):
            return texts[value] if value in texts else self._variables[value]

        def argument(item: Any) -> str:
            return self._value(item, texts)

        if isinstance(value, list):
            return f"[{', '.join(map(argument, value))}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self._constant(key)}: {argument(item)}" for key, item in value.items()) + "}"
        if isinstance(value, slice):
            bounds = ", ".join(argument(bound) for bound in (value.start, value.stop, value.step))
            return f"{self._global(slice, 'slice')}({bounds})"
        if isinstance(value, tuple) and type(value) is not torch.Size:
            return f"({', '.join(map(argument, value))}{',' if len(value) == 1 else ''})"
        return self._constant(value)

    def _constant(self, value: Any, hint: str = "constant") -> str:
        if type(value) in _LITERALS or (type(value) is float and value == value and abs(value) != float("inf")):
            return "..." if value is ... else repr(value)
        return self._global(value, hint)

    def _attribute(self, node: fx.Node) -> str:
        """A read of a parameter, buffer or attribute from where it lives now."""
        path, _, name = str(node.target).rpartition(".")
        module = self._owner(path)
        if name in module._parameters:
            return f"{self._global(module._parameters, 'p')}[{name!r}]"
        if name in module._buffers:
            return f"{self._global(module._buffers, 'b')}[{name!r}]"
        return f"{self._global(module, 'module')}.{name}"

    # -- names -----------------------------------------------------------------------------------------------------

    def _fresh(self, wish: str) -> str:
        name = base = re.sub(r"\W", "_", wish).lstrip("_") or "value"
        if not name.isidentifier():
            name = base = f"v_{base}"
        for number in itertools.count(1):
            if name not in self._taken:
                break
            name = f"{base}_{number}"
        self._taken.add(name)
        return name

    def _global(self, value: Any, wish: str) -> str:
        if id(value) not in self._bound:
            name = self._fresh(wish)
            self._bound[id(value)] = name
            self._globals[name] = value
        return self._bound[id(value)]


def _in_order(node: fx.Node) -> list[fx.Node]:
    """The nodes that `node` uses, in the order in which its arguments are evaluated, once for each use."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda used: found.append(used))
    return found
