"""Tracing parts of a shadow tree: what can be traced, as a graph; what cannot, with the reason.

A trace is refused unless the graph does exactly what the module does, given the checks that it names. It leaves no mark
on the model or the process. Tracing happens on the caller's thread, under one lock.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Mapping, Set
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

from torch import fx, nn

from esper.core.attribute_snapshot import AttributeSnapshot
from esper.core.code_audit import CodeAudit
from esper.core.code_facts import CodeFacts
from esper.core.shadow import opaque_reason
from esper.core.stand_ins import StandIns
from esper.core.trace_contexts import Factories, math_on_values
from esper.core.trace_effects import EffectWatch
from esper.core.traced_values import Refusal
from esper.core.tracer import RegionTracer
from esper.core.watched import HOOK_KINDS, global_module_hooks
from esper.forking import ModuleLock

__all__ = ["Traced", "Untraceable", "leaf_reason", "trace_region"]

_lock = ModuleLock()
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class Traced:
    """A region as a graph.

    - `module`: the shadow it was traced from; `modules`: it and those below it, by path.
    - `graph`: placeholders are the arguments without a default and those in `given`, in order; the others are at their
      default. Sites are `call_module` nodes like other leaves.
    - `signature`: the forward's, without `self`.
    - `inlined`: paths of the modules traced through; `leaves`: those called; `kept_apart`: the leaves that are leaves
      because they could not be traced through, with the reason.
    - `training`: by path, the training flags that the graph is specialised for.
    - `tensor_arguments`, `given_arguments`: arguments that must be tensors, and that must not be None.
    - `snapshot`: the attributes that the graph is specialised for.
    """

    module: nn.Module
    modules: Mapping[str, nn.Module]
    graph: fx.Graph
    signature: Signature
    given: frozenset[str]
    inlined: tuple[str, ...]
    leaves: tuple[str, ...]
    kept_apart: Mapping[str, str]
    training: Mapping[str, bool]
    tensor_arguments: tuple[str, ...]
    given_arguments: tuple[str, ...]
    snapshot: AttributeSnapshot


@dataclass(frozen=True)
class Untraceable:
    """A module that is no region, and why."""

    reason: str


def leaf_reason(module: nn.Module) -> str | None:
    """Why calls of `module` are kept as calls rather than traced through; None if they can be traced through."""
    hooked = next((name for name in HOOK_KINDS if getattr(module, name)), None)
    if hooked is not None:
        return f"it has {hooked.strip('_').replace('_', ' ')}"
    return _closed_reason(module)


def _closed_reason(module: nn.Module) -> str | None:
    """As :func:`leaf_reason`, but for the hooks, which run around a region that begins with the module itself."""
    opaque = opaque_reason(module)
    if opaque is not None:
        return opaque
    kind = type(module)
    if kind.__module__.startswith(("torch.nn.", "torch.ao.")) and not isinstance(module, _CONTAINERS):
        return f"{kind.__name__} is called as it is"
    if isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward:
        return f"{kind.__name__} is called as it is"
    if "parametrizations" in module._modules:
        return "it is parametrized"
    if module._compiled_call_impl is not None:
        return "it is compiled"
    return None


def trace_region(module: nn.Module, sites: Set[nn.Module], given: frozenset[str] = frozenset()) -> Traced | Untraceable:
    """Trace the forward of shadow `module`. Calls of `sites`, and of what cannot be traced through, become nodes.

    Arguments with a default are at it, but for those named in `given`.
    """
    closed = None if module in sites else _closed_reason(module)
    if closed is not None:
        return Untraceable(closed)
    signature, reason = _signature(module)
    if signature is None:
        return Untraceable(reason)
    modules = dict(module.named_modules())
    kept_apart: dict[str, str] = {}
    while True:
        attempt = _Attempt(module, modules, sites, kept_apart)
        with _lock.held():
            outcome = attempt.run(signature, given)
        if isinstance(outcome, Traced):
            return outcome
        path = attempt.failed
        if not path or path in kept_apart:
            return outcome
        kept_apart[path] = outcome.reason
        for other, each in modules.items():  # its likes fail likewise: do not find out one by one
            if type(each) is type(modules[path]) and other not in kept_apart and other and each not in sites:
                kept_apart[other] = outcome.reason


class _Attempt:
    """One attempt at a trace, with a given set of modules to be kept as calls."""

    def __init__(
        self,
        module: nn.Module,
        modules: Mapping[str, nn.Module],
        sites: Set[nn.Module],
        kept_apart: Mapping[str, str],
    ) -> None:
        self.failed: str | None = None
        self._module = module
        self._modules = modules
        self._sites = sites
        self._kept_apart = dict(kept_apart)

    def _is_leaf(self, path: str) -> bool:
        module = self._modules[path]
        if module in self._sites:
            return True
        return bool(path) and (path in self._kept_apart or leaf_reason(module) is not None)

    def run(self, signature: Signature, given: frozenset[str]) -> Traced | Untraceable:
        if any(global_module_hooks()):
            return Untraceable("hooks for all modules are registered")
        tracer = RegionTracer(self._modules, self._is_leaf)
        watch = EffectWatch(self._modules.values())
        reason = self._record(tracer, watch, *tracer.placeholders(signature, given))
        effect = watch.undo()
        if tracer.refusal is not None or reason is not None:
            self.failed = tracer.failed
            return Untraceable(tracer.refusal or reason or "")
        if effect is not None:
            return Untraceable(effect)
        if tracer.escaped():
            gc.collect()
            if tracer.escaped():
                return Untraceable("it keeps a value for later")
        return self._traced(tracer, watch, signature, given)

    def _record(self, tracer: RegionTracer, watch: EffectWatch, args: Any, kwargs: Any) -> str | None:
        """Run the forward on traced values; returns why that failed, or None."""

        def entered(frame: Any, facts: CodeFacts) -> None:
            watch.entered(frame)
            tracer.entered(frame, facts)

        try:
            stand_ins = StandIns(self._modules, tracer)
            with math_on_values(), Factories(tracer), CodeAudit(tracer.refuse, entered):
                result = stand_ins.root.forward(*args, **kwargs)
            tracer.create_node("output", "output", (tracer.create_arg(result),), {})
            altered = stand_ins.altered()
            if altered is not None:
                return f"it sets the attribute {altered!r}"
        except Refusal as refusal:
            return str(refusal)
        except Exception as error:  # noqa: BLE001  # whatever the model's own code raises on traced values
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None

    def _traced(self, tracer: RegionTracer, watch: EffectWatch, signature: Signature, given: frozenset[str]) -> Traced:
        leaves = dict.fromkeys(str(node.target) for node in tracer.graph.find_nodes(op="call_module"))
        plain = [path for path in leaves if type(self._modules[path]).__module__.startswith("torch.nn.modules")]
        constant = {path: self._modules[path] for path in (*tracer.inlined, *plain)}
        constant = {path: module for path, module in constant.items() if module not in self._sites}
        return Traced(
            module=self._module,
            modules=self._modules,
            graph=tracer.graph,
            signature=signature,
            given=given,
            inlined=tuple(tracer.inlined),
            leaves=tuple(leaves),
            kept_apart={path: reason for path, reason in self._kept_apart.items() if path in leaves},
            training=dict(tracer.training_tested),
            tensor_arguments=tuple(tracer.tensor_arguments),
            given_arguments=tuple(tracer.given_arguments),
            snapshot=AttributeSnapshot(constant, watch.variables),
        )


def _signature(module: nn.Module) -> tuple[Signature | None, str]:
    forward = type(module).forward
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return None, "a container, which is not called"
    if not inspect.isfunction(forward):
        return None, "its forward is no plain function"
    if hasattr(forward, "__wrapped__"):
        return None, "its forward is decorated"
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if any(parameter.kind is Parameter.VAR_POSITIONAL for parameter in parameters) and not any(
        _is_required(parameter) for parameter in parameters
    ):
        return None, "its forward takes *args alone"
    return Signature([parameter.replace(annotation=Parameter.empty) for parameter in parameters]), ""


def _is_required(parameter: Parameter) -> bool:
    return parameter.default is Parameter.empty and parameter.kind not in (
        Parameter.VAR_POSITIONAL,
        Parameter.VAR_KEYWORD,
    )
