"""Traced parts of a model, which run as generated code: for each pattern of calls a trace, for each plan the code."""

from __future__ import annotations

import inspect
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Set
from inspect import Parameter, Signature
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import fx, nn

from esper.eager.call_pattern import CallPattern, pattern_of, pattern_of_a_plain_call
from esper.eager.code import generate, global_module_hooks
from esper.eager.tracer import Trace, modules_of, trace
from esper.execution.kasmina_layer import KasminaLayer, LinearSite
from esper.execution.plans.handover import PlanHandover
from esper.execution.plans.plan import Plan
from esper.execution.plans.runtime import Runtime
from esper_passes import (
    CallKernels,
    ElideDormant,
    ExpandModules,
    LowerFunctional,
    Pipeline,
    RewriteSites,
    SeedCall,
    hooks_of,
)

__all__ = ["Part", "entrance", "part_of"]

Run = Callable[..., Any]
_MOST_TRACES = 16
_KEPT_FUNCTIONS = 8
_parts: WeakKeyDictionary[nn.Module, weakref.ref[Part]] = WeakKeyDictionary()
_entrances: WeakValueDictionary[type, type] = WeakValueDictionary()

_Key = tuple[tuple[bool, ...], CallPattern]


class Part:
    """A module that is traced where it is called, and runs as its own Python where that cannot be.

    `run` is what a call runs; it changes with the plan, which `follow` tells. `forward` is the module's own Python, and
    `as_modules` what runs where there is no trace. Traces are made by the thread that calls; the code of those that
    there are may be made by any.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Run,
        runtime: Runtime,
        name: str,
        aside: Set[int],
        *,
        as_modules: Run | None = None,
        first: Callable[[], object] | None = None,
        switched: Callable[[Run], None] | None = None,
    ) -> None:
        self.name = name
        self.forward = forward
        self.as_modules = as_modules or forward
        self._module = weakref.ref(module)
        self._runtime = runtime
        self._first = first
        self._switched = switched
        self._aside = aside
        self._signature = _plain_signature(forward)
        self._traces: dict[_Key, Trace | str] = {}
        self._functions: OrderedDict[tuple[Hashable, ...], tuple[Plan, Trace, _Function]] = OrderedDict()
        self._changed = False
        self._follow(runtime.plan)
        _parts[module] = weakref.ref(self)

    @property
    def module(self) -> nn.Module:
        """The module, which whoever calls this part keeps alive."""
        module = self._module()
        if module is None:
            raise RuntimeError(f"the module {self.name!r} is gone, but a part of it is called")
        return module

    # -- what a call runs ------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """The part is called as a module: a forward may begin with it."""
        if self._runtime.has_entry_hooks and threading.get_ident() not in self._runtime.whole:
            self._runtime.enter()

    def _follow(self, plan: Plan) -> None:
        self._planned = _Planned(self, plan)
        self._switch(self._planned)

    def _switch(self, run: Run) -> None:
        self.run = run
        if self._switched is not None:
            self._switched(run)

    def follow(self, plan: Plan) -> None:
        """Switch to `plan` or, if it is that already, look again at what has changed; a pointer change."""
        with self._runtime.lock:
            before, same = self.run, self._planned.plan is plan
            self._follow(plan)
            if self._runtime.has_graph_breaks and not same:
                self._switch(PlanHandover([self._runtime], before, self._planned, self._finish))

    def _finish(self, handover: PlanHandover) -> None:
        with self._runtime.lock:
            if self.run is handover:
                self._switch(handover.new)

    def settle_on(self, planned: _Planned, function: Run) -> None:
        """Let calls run `function`, if they are to follow the plan of `planned` still."""
        with self._runtime.lock:
            if planned.plan is not self._planned.plan and planned.plan != self._planned.plan:
                return
            if isinstance(self.run, PlanHandover):
                self.run.new = function
            else:
                self._switch(function)

    def changed(self) -> None:
        """Hooks, or modules below, have changed: look which traces still fit at the next call."""
        self._changed = True
        self.follow(self._planned.plan)

    def retrace(self) -> None:
        """Forget every trace."""
        self._traces = {}
        self._functions.clear()
        self.follow(self._planned.plan)

    # -- traces ----------------------------------------------------------------------------------------------------

    def trace_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace | None:
        """The trace for such a call, made now if it is the first one of its kind; None if there is none."""
        if self._signature is None or self._aside or any(global_module_hooks()) or _is_traced():
            return None
        pattern = pattern_of(self._signature, args, kwargs)
        outcome = None if pattern is None else self._trace(self._signature, pattern)
        return outcome if isinstance(outcome, Trace) else None

    def _trace(self, signature: Signature, pattern: CallPattern) -> Trace | str:
        module = self.module
        known = [each for each in self._traces.values() if isinstance(each, Trace)]
        if self._changed or any("forward" in each.__dict__ for trace in known for each in trace.inlined):
            self._changed = False
            traces = {key: each for key, each in self._traces.items() if isinstance(each, Trace) and each.fits(module)}
            self._traces = {**traces}
        key = (self._flags(), pattern)
        if key not in self._traces:
            if len(self._traces) >= _MOST_TRACES:
                return f"it has been called in {_MOST_TRACES} different ways"
            self._traces[key] = trace(module, self.forward, signature, pattern)
        return self._traces[key]

    def _flags(self) -> tuple[bool, ...]:
        module = self.module
        return (module.training, *(each.training for each in modules_of(module).values()))

    def present(self) -> Trace | str:
        """The latest trace for the present training flags, or why there is none; of a plain call if none was seen."""
        flags = self._flags()
        known = [each for key, each in self._traces.items() if key[0] == flags]
        if not self._changed and known:
            return next((each for each in reversed(known) if isinstance(each, Trace)), known[-1])
        if self._signature is None:
            return "its forward has no signature that can be read"
        pattern = pattern_of_a_plain_call(self._signature)
        return "a call of it passes no tensor" if pattern is None else self._trace(self._signature, pattern)

    # -- code ------------------------------------------------------------------------------------------------------

    def prepare(self, plan: Plan) -> None:
        """Generate the code for `plan` of the traces that there are; any thread."""
        for each in list(self._traces.values()):
            if isinstance(each, Trace):
                self.function(each, _Planned(self, plan))

    def function(self, traced: Trace, planned: _Planned) -> Run:
        """The code of a trace for a plan."""
        plan = planned.plan
        key = (id(traced), *(id(seed) for seed in plan.seeds()))
        known = self._functions.get(key)
        if known is not None and known[:2] == (plan, traced) and known[2].is_current(self._is_plain):
            return known[2].function
        made = self._generate(traced, plan, planned)
        self._functions[key] = (plan, traced, made)
        while len(self._functions) > _KEPT_FUNCTIONS:
            self._functions.popitem(last=False)
        return made.function

    def graph_module(self, traced: Trace, plan: Plan | None = None) -> fx.GraphModule:
        """The graph of a trace as a graph module on the modules themselves; with `plan`, as passes make it for that."""
        owner = fx.GraphModule(nn.Module(), fx.Graph()) if plan is None else _QuietGraphModule(nn.Module(), fx.Graph())
        module = self.module
        for name in ("_parameters", "_buffers"):
            owner.__dict__[name] = module.__dict__[name]
        owner.__dict__["_modules"] = dict(module._modules)
        owner.__dict__.update(traced.constants)
        copy = fx.Graph()
        copy.output(copy.graph_copy(traced.graph, {}))
        owner.graph = copy
        owner.training = module.training
        if plan is None:
            return owner
        plan = plan.restricted(each.site for each in traced.calls() if isinstance(each, KasminaLayer))
        odd = {node.target for node in copy.find_nodes(op="call_module") if node.kwargs or not _takes_a_value(node)}
        sites = {
            path: each.site
            for path, each in traced.members.items()
            if isinstance(each, KasminaLayer) and self._is_plain(each) and path not in odd
        }
        passes: list[Any] = [RewriteSites(sites), ExpandModules(), LowerFunctional()]
        calls = {
            site: tuple(SeedCall(seed.kernel.executor, seed.uses_host, seed.isolate) for seed in seeds)
            for site, seeds in plan.sites.items()
        }
        if calls:
            passes.append(CallKernels(calls, self._runtime.alpha_reader(plan)))
        passed: fx.GraphModule = Pipeline((*passes, ElideDormant(frozenset(calls))))(owner).graph_module
        return passed

    def _is_plain(self, layer: KasminaLayer) -> bool:
        """Whether a call of `layer` is that of a linear layer with parameters, and of kernels of this model."""
        if not isinstance(layer, LinearSite) or layer.runtime is not self._runtime or hooks_of(layer) is not None:
            return False
        return {"weight", "bias"} <= layer._parameters.keys() and "forward" not in layer.__dict__

    def _generate(self, traced: Trace, plan: Plan, planned: _Planned) -> _Function:
        owner = self.graph_module(traced, plan)
        module, left = self.module, {str(node.target) for node in owner.graph.find_nodes(op="call_module")}
        gone = {str(node.target) for node in traced.graph.find_nodes(op="call_module")} - left
        plain = [traced.members[path] for path in gone]
        if any(isinstance(below, KasminaLayer) for path in left for below in traced.members[path].modules()):
            self._runtime.divide()  # a commit may come between this code and what it calls
        self._runtime.called.update(each.site for each in plain if isinstance(each, KasminaLayer))
        function = generate(
            owner.graph,
            traced,
            lambda path: traced.members[path] if path else module,
            plain,
            planned,
            self._first,
            self.name or "forward",
        )
        left_sites = [each for path in left if isinstance(each := traced.members[path], KasminaLayer)]
        return _Function(function, plain, [each for each in left_sites if not self._is_plain(each)])


def _is_traced() -> bool:
    """Whether somebody else traces the model just now."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]  # torch leaves it untyped


def _takes_a_value(node: fx.Node) -> bool:
    return len(node.args) == 1 and isinstance(node.args[0], fx.Node)


class _QuietGraphModule(fx.GraphModule):
    """What passes need of a graph module. It is never called, and does not write its forward at every change."""

    def recompile(self) -> Any:
        return None


class _Function:
    """Generated code, the modules whose calls it does without, and the sites whose calls it cannot do without."""

    def __init__(self, function: Run, plain: list[nn.Module], called: list[KasminaLayer]) -> None:
        self.function = function
        self._called = called
        self._plain = [(each, type(each), set(each._parameters)) for each in plain]

    def is_current(self, is_plain: Callable[[KasminaLayer], bool]) -> bool:
        """Whether this is still so."""
        return not any(map(is_plain, self._called)) and not any(
            "forward" in module.__dict__ or type(module) is not kind or module._parameters.keys() != names
            or hooks_of(module) is not None
            for module, kind, names in self._plain
        )  # fmt: skip


class _Planned:
    """A call of a part under one plan: finds, or makes, the code for calls of this kind, and runs it."""

    def __init__(self, part: Part, plan: Plan) -> None:
        self._part = weakref.ref(part)
        self.plan = plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        part = self._part()
        if part is None:
            raise RuntimeError("the model is gone, but a part of it is called")
        traced = part.trace_for(args, kwargs)
        if traced is None:
            return part.as_modules(*args, **kwargs)
        function = part.function(traced, self)
        part.settle_on(self, function)
        return function(*args, **kwargs)


def _plain_signature(forward: Run) -> Signature | None:
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return None
    return Signature([parameter.replace(annotation=Parameter.empty) for parameter in parameters])


def part_of(module: nn.Module) -> Part | None:
    """The part that `module` is entered as."""
    reference = _parts.get(module)
    return None if reference is None else reference()


def entrance(kind: type, subclass: Callable[[type, Mapping[str, Any]], type]) -> type:
    """The class for parts of class `kind`, whose forward runs the part. Dynamo sees the forward of `kind` through it.

    `subclass` makes subclasses that pass for the class itself.
    """
    known = _entrances.get(kind)
    if known is not None:
        return known

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return kind.forward(self, *args, **kwargs)  # type: ignore[attr-defined]  # a class of modules
        part = part_of(self)
        if part is not None:
            part.enter()
        return kind.forward(self, *args, **kwargs) if part is None else part.run(*args, **kwargs)  # type: ignore[attr-defined]  # as above

    # Dynamo keeps what it compiled with the code, eight times at most: each class has a code of its own
    code = forward.__code__.replace(co_name=f"forward of {kind.__module__}.{kind.__qualname__}")
    own = types.FunctionType(code, forward.__globals__, "forward", None, forward.__closure__)
    own.__wrapped__ = kind.forward  # type: ignore[attr-defined]  # for its signature
    _entrances[kind] = made = subclass(kind, {"forward": own})
    return made
