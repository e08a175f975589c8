"""The callable that a compiled graph holds: it forwards to the variant for the plan in force.

Dynamo gets one dispatcher for each graph that contains sites. A call costs one attribute read more than the variant
itself. All methods but `__call__` are for the thread that runs the model, at a commit or between two calls.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import fx

from esper import torch_internals
from esper.compiler.inner import InnerCompiler
from esper.execution.call_counter import CallCounter
from esper.execution.plan import Plan
from esper.execution.runtime import Runtime
from esper.execution.telemetry import Telemetry
from esper_passes import ElideDormant, InlineKernels, Pipeline, site_calls_in

__all__ = ["Dispatcher"]

_LOG = logging.getLogger("esper.compiler")
_KEPT_VARIANTS = 8  # besides the dormant one


class Dispatcher:
    """Forwards to `variant`, which is specialised for the plan in force.

    `marked` is the graph with its site markers, `inputs` its fake inputs, `roots` the runtimes whose forward begins in
    this graph (only there may a commit happen), `runtimes` all whose sites it holds.
    """

    __slots__ = (
        "__weakref__", "_armed", "_compiled", "_current", "_inner", "_inputs", "_known_guards", "_marked", "_plan",
        "_tick", "counter", "roots", "runtimes", "site_calls", "variant",
    )  # fmt: skip

    def __init__(
        self,
        marked: fx.GraphModule,
        inputs: Sequence[Any],
        inner: InnerCompiler,
        runtimes: Sequence[Runtime],
        roots: Sequence[Runtime],
    ) -> None:
        self._marked = marked
        self._inputs = list(inputs)
        self._known_guards = torch_internals.guard_count(self._inputs)
        self._inner = inner
        self._compiled: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()
        self._armed = False
        self.counter = CallCounter()
        self._tick = self.counter.tick
        self.runtimes = tuple(runtimes)
        self.roots = tuple(roots)
        self.site_calls = site_calls_in(marked.graph)
        self._plan = self._plan_in_force()
        self._current: Callable[..., Any] = self._resolve
        self.variant: Callable[..., Any] = self._resolve
        for runtime in self.runtimes:
            runtime.add_executor(self)
            if runtime.telemetry is not None:
                runtime.telemetry.watch(self, self.site_calls)

    def __call__(self, *inputs: Any) -> Any:
        self._tick()
        return self.variant(*inputs)

    # -- Executor, as the runtime sees it --------------------------------------------------------------------------

    def prepare(self, plan: Plan) -> None:
        """Nothing to prepare away from the training thread: a new variant is compiled at its first call."""

    def follow(self, plan: Plan) -> None:
        """Switch to `plan`, that of one of the runtimes; the others keep theirs."""
        del plan  # several runtimes may share this graph: ask each
        self._plan = self._plan_in_force()
        self._point_to(self._resolve)

    def arm(self) -> None:
        """Have the next call that begins a forward go through the runtimes' boundary."""
        if self.roots:
            self._armed = True
            self.variant = self._enter

    def disarm(self) -> None:
        """Back to the direct path."""
        self._armed = False
        self.variant = self._current

    def sample(self, telemetry: Telemetry) -> None:
        """Time the next call. A graph is timed as a whole, so its sites all get the time of the graph."""
        current = self._current
        sites = [site for site in set(self.site_calls) if telemetry.knows(site)]

        def timed(*inputs: Any) -> Any:
            if self.variant is timed:
                self.variant = self._enter if self._armed else current
            watch = telemetry.stopwatch()
            outputs = current(*inputs)
            watch.stop()
            for site in sites:
                telemetry.record(site, watch)
            return outputs

        if self.variant is current and current != self._resolve:
            self.variant = timed

    # -- variants --------------------------------------------------------------------------------------------------

    def adopt(self, compiled: Callable[..., Any]) -> None:
        """Take `compiled` as the dormant variant: what the backend compiled while Dynamo was calling it."""
        self._compiled[Plan().structure] = compiled
        self._known_guards = torch_internals.guard_count(self._inputs)  # Dynamo has yet to make its guards of these
        if self._plan.is_dormant:
            self._point_to(compiled)

    def _plan_in_force(self) -> Plan:
        sites: dict[int, Any] = {}
        for runtime in self.runtimes:
            sites.update(runtime.plan.restricted(self.site_calls).sites)
        return Plan(dict(sorted(sites.items())))

    def _point_to(self, variant: Callable[..., Any]) -> None:
        self._current = variant
        if not self._armed:
            self.variant = variant

    def _enter(self, *inputs: Any) -> Any:
        for runtime in self.roots:
            runtime.boundary()
        return self._current(*inputs)

    def _resolve(self, *inputs: Any) -> Any:
        variant = self._variant(self._plan)
        self._point_to(variant)
        return variant(*inputs)

    def _variant(self, plan: Plan) -> Callable[..., Any]:
        structure = plan.structure
        compiled = self._compiled.get(structure)
        if compiled is None:
            compiled = self._compile(plan)
            self._compiled[structure] = compiled
            self._evict()
        self._compiled.move_to_end(structure)
        if plan.is_dormant:
            return compiled
        parameters = tuple(parameter for seed in plan.seeds() for parameter in seed.kernel.parameters)
        readers = [runtime.alpha_reader(plan) for runtime in self.runtimes]
        if len(readers) == 1:
            read = readers[0]
            return lambda *inputs: compiled(*inputs, *parameters, read())
        return lambda *inputs: compiled(*inputs, *parameters, torch.cat([read() for read in readers]))

    def _evict(self) -> None:
        active = [structure for structure in self._compiled if structure != Plan().structure]
        for structure in active[: max(len(active) - _KEPT_VARIANTS, 0)]:
            del self._compiled[structure]

    def _compile(self, plan: Plan) -> Callable[..., Any]:
        module = torch_internals.copy_for_recompile(self._marked)
        kernels = {
            site: tuple(seed.kernel.seed_graph(seed.isolate) for seed in seeds) for site, seeds in plan.sites.items()
        }
        elide = ElideDormant(frozenset(kernels))
        module = Pipeline((InlineKernels(kernels), elide) if kernels else (elide,))(module).graph_module
        seeds = list(plan.seeds())
        inputs = self._inputs
        if seeds:
            alphas = torch.zeros(len(seeds), dtype=torch.float32, device=self.runtimes[0].state.device)
            extra = [*(parameter for seed in seeds for parameter in seed.kernel.parameters), alphas]
            fakes = torch_internals.fake_like(extra, among=inputs)
            new = [node for node in module.graph.nodes if node.op == "placeholder"][len(inputs) :]
            for node, fake in zip(new, fakes, strict=True):
                node.meta["example_value"] = fake
            inputs = [*inputs, *fakes]
        started = time.perf_counter()
        try:
            with torch_internals.recompile_context(inputs, module):
                compiled = self._inner(module, inputs)
        except Exception as error:  # noqa: BLE001  # whatever the inner compiler raises, the forward has to go on
            _LOG.warning("the inner compiler failed on a graph with seeds; it runs uncompiled", exc_info=error)
            return cast(Callable[..., Any], module.forward)
        holds = torch_internals.assumptions_since(inputs, self._known_guards)
        _LOG.info("compiled a variant with %d active seeds in %.2f s", len(seeds), time.perf_counter() - started)
        if holds is None:
            return compiled
        uncompiled = module.forward
        return lambda *inputs: compiled(*inputs) if holds(*inputs) else uncompiled(*inputs)
