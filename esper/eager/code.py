"""Traced graphs as plain Python functions.

A graph module reads parameters and finds modules through `nn.Module.__getattr__`. The functions made here have modules
and their dictionaries as globals. For `nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))` it is

    def forward(input):
        if hooks or hooks_1 or hooks_2 or hooks_3 or 'forward' in own or ...: return otherwise(input)
        if not isinstance(input, Tensor): return otherwise(input)
        try:
            weight = p['weight']
            ...
        except KeyError:
            return otherwise(input)
        linear = torch_linear(input, weight, bias); del input
        relu = torch_relu(linear); del linear
        ...
"""

from __future__ import annotations

import builtins
import itertools
import keyword
import linecache
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import magic_methods

from esper.eager.call_pattern import forwarded, parameter_list
from esper.eager.tracer import Trace

__all__ = ["generate", "global_module_hooks"]

_numbers = itertools.count()
_LITERALS = (int, bool, str, type(None), type(...))


def global_module_hooks() -> tuple[Mapping[int, Any], ...]:
    """The live dictionaries of the hooks that run at the call of every module in the process."""
    module = nn.modules.module
    return (
        module._global_forward_pre_hooks,
        module._global_forward_hooks,
        module._global_backward_pre_hooks,
        module._global_backward_hooks,
    )


def generate(
    graph: fx.Graph,
    trace: Trace,
    owner: Callable[[str], nn.Module],
    plain: Iterable[nn.Module],
    otherwise: Callable[..., Any],
    first: Callable[[], object] | None,
    name: str,
) -> FunctionType:
    """The function that computes `graph`, which passes have made of that of `trace`; its text is `__esper_source__`.

    - `owner` gives the module that a dotted path in the graph stands for.
    - `plain`: modules that the graph has no call of any more. The function does not stand for one that has been given
      another `forward` since, or has its parameters elsewhere: it returns what `otherwise` returns then, as it does for
      calls of another pattern, and while hooks for all modules are registered.
    - `first` is called at each call.
    """
    writer = _Writer(graph, trace, owner)
    return writer.function(list(plain), otherwise, first, name)


class _Writer:
    def __init__(self, graph: fx.Graph, trace: Trace, owner: Callable[[str], nn.Module]) -> None:
        self._graph = graph
        self._trace = trace
        self._owner = owner
        self._globals: dict[str, Any] = {}
        self._bound: dict[int, str] = {}
        self._variables: dict[fx.Node, str] = {}
        self._taken = {*trace.signature.parameters, *keyword.kwlist, *vars(builtins)}
        self._lines: list[str] = []

    def function(
        self, plain: list[nn.Module], otherwise: Callable[..., Any], first: Callable[[], object] | None, name: str
    ) -> FunctionType:
        signature = self._trace.signature
        head = f"def forward({parameter_list(signature, self._constant)}):"
        away = f"return {self._global(otherwise, 'otherwise')}({forwarded(signature)})"
        tests = [self._global(hooks, "hooks") for hooks in global_module_hooks()]
        tests += [f"'forward' in {self._global(module.__dict__, 'own')}" for module in (*plain, *self._trace.inlined)]
        tests += self._trace.pattern.tests(signature, self._global)
        self._lines += [f"if {' or '.join(tests)}:", f"    {away}"]
        self._read_parameters(plain, away)
        if first is not None:
            self._lines.append(f"{self._global(first, 'first')}()")
        for node in self._graph.find_nodes(op="placeholder"):
            self._variables[node] = str(node.target)
        released = self._releases()
        for node in self._graph.nodes:
            if node.op != "placeholder":
                self._statement(node, released.get(node, []))
        return self._compiled("\n".join([head, *(f"    {line}" for line in self._lines)]) + "\n", name)

    def _read_parameters(self, plain: list[nn.Module], away: str) -> None:
        """Those of modules that are not called any more; none of them changes while the function runs."""
        reads: list[str] = []
        for node in self._graph.find_nodes(op="get_attr"):
            path, _, name = str(node.target).rpartition(".")
            module = self._owner(path)
            if node.users and name in module._parameters and any(module is each for each in plain):
                text = f"{self._global(module._parameters, 'p')}[{name!r}]"
                self._variables[node] = self._fresh(node.name)
                reads.append(f"    {self._variables[node]} = {text}")
        if reads:
            self._lines += ["try:", *reads, "except KeyError:", f"    {away}"]

    def _releases(self) -> dict[fx.Node, list[fx.Node]]:
        """By node, the values that it is the last to use."""
        last = {used: node for node in self._graph.nodes for used in node.all_input_nodes}
        released: dict[fx.Node, list[fx.Node]] = {}
        for used, node in last.items():
            released.setdefault(node, []).append(used)
        return released

    def _statement(self, node: fx.Node, released: list[fx.Node]) -> None:
        if node in self._variables or (node.op == "get_attr" and not node.users):
            return
        if node.op == "output":
            self._lines.append(f"return {self._value(node.args[0])}")
            return
        text = self._expression(node)
        if node.users:
            self._variables[node] = self._fresh(node.name)
            text = f"{self._variables[node]} = {text}"
        names = [self._variables[each] for each in released if each.op != "get_attr"]
        self._lines.append(text + (f"; del {', '.join(names)}" if names else ""))

    def _expression(self, node: fx.Node) -> str:
        target, values = node.target, [self._value(each) for each in node.args]
        keywords = [f"{name}={self._value(value)}" for name, value in node.kwargs.items()]
        if node.op == "get_attr":
            return self._attribute(str(target))
        if node.op == "call_module":
            return f"{self._global(self._owner(str(target)), 'module')}({', '.join([*values, *keywords])})"
        if node.op == "call_method":
            return f"{values[0]}.{target}({', '.join([*values[1:], *keywords])})"
        name = getattr(target, "__name__", "function")
        if target is getattr and len(values) == 2 and str(node.args[1]).isidentifier():
            return f"{values[0]}.{node.args[1]}"
        if getattr(target, "__module__", None) == "_operator" and name in magic_methods and not keywords:
            return f"({magic_methods[name].format(*values)})"
        return f"{self._global(target, name)}({', '.join([*values, *keywords])})"

    def _attribute(self, path: str) -> str:
        """A read of a parameter, buffer or attribute from where it lives now."""
        if path in self._trace.constants:
            return self._global(self._trace.constants[path], "constant")
        path, _, name = path.rpartition(".")
        module = self._owner(path)
        for where, wish in ((module._parameters, "p"), (module._buffers, "b")):
            if name in where:
                return f"{self._global(where, wish)}[{name!r}]"
        return f"{self._global(module, 'module')}.{name}"

    def _value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._variables[value]
        if isinstance(value, list):
            return f"[{', '.join(map(self._value, value))}]"
        if isinstance(value, dict):
            items = (f"{self._constant(key)}: {self._value(item)}" for key, item in value.items())
            return "{" + ", ".join(items) + "}"
        if isinstance(value, slice):
            bounds = ", ".join(self._value(bound) for bound in (value.start, value.stop, value.step))
            return f"{self._global(slice, 'slice')}({bounds})"
        if isinstance(value, tuple) and type(value) is not torch.Size:
            return f"({', '.join(map(self._value, value))}{',' if len(value) == 1 else ''})"
        return self._constant(value)

    def _constant(self, value: Any, wish: str = "constant") -> str:
        if type(value) in _LITERALS or (type(value) is float and value == value and abs(value) != float("inf")):
            text = "..." if value is ... else repr(value)
            return f"({text})" if text.startswith("-") else text
        return self._global(value, wish)

    def _fresh(self, wish: str) -> str:
        base = re.sub(r"\W", "_", wish).lstrip("_") or "value"
        base = base if base.isidentifier() else f"v_{base}"
        names = itertools.chain([base], (f"{base}_{number}" for number in itertools.count(1)))
        name = next(name for name in names if name not in self._taken)
        self._taken.add(name)
        return name

    def _global(self, value: Any, wish: str) -> str:
        if vars(builtins).get(wish) is value and wish not in self._trace.signature.parameters:
            return wish
        if id(value) not in self._bound:
            self._bound[id(value)] = self._fresh(wish)
            self._globals[self._bound[id(value)]] = value
        return self._bound[id(value)]

    def _compiled(self, source: str, name: str) -> FunctionType:
        filename = f"<esper {name} #{next(_numbers)}>"
        namespace = dict(self._globals)
        exec(compile(source, filename, "exec"), namespace)  # our own text; what comes from a model is bound by name
        function: FunctionType = namespace.pop("forward")
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        weakref.finalize(function, linecache.cache.pop, filename, None)
        function.__qualname__ = function.__name__ = name
        function.__esper_source__ = source  # type: ignore[attr-defined]  # functions take attributes
        return function
