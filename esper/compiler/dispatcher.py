"""What a compiled graph holds: it forwards to the variant for the plan in force.

Dynamo gets the `entry` of one dispatcher for each graph that contains sites. A call costs one counter and one attribute
read more than the variant itself. `prepare` is for background threads; everything else is for the thread that runs the
model, at a commit or between two calls.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from esper.compiler.errors import WorkersClosedError
from esper.compiler.report import CompileReport, GraphReport, VariantReport
from esper.compiler.variant_cache import Boxed, Variant, VariantCache
from esper.compiler.variant_compiler import Compilation, VariantCompiler
from esper.compiler.variant_store import default_store
from esper.compiler.workers import workers_so_far
from esper.execution.call_counter import CallCounter
from esper.execution.executor import ShutDownError
from esper.execution.plan import Plan
from esper.execution.runtime import Runtime
from esper.execution.telemetry import Telemetry
from esper.execution.transition import Transition
from esper.forking import reset_after_fork

__all__ = ["Dispatcher", "report_on"]


class Dispatcher:
    """Forwards to `variant`, which is specialised for the plan in force.

    `roots` are the runtimes whose forward begins in this graph (only there may a commit happen), `runtimes` all whose
    sites it holds, `site_calls` the sites that it calls, in order.
    """

    __slots__ = (
        "__weakref__",
        "_armed",
        "_compiler",
        "_current",
        "_lock",
        "_plan",
        "_roots",
        "_runtimes",
        "_under_way",
        "_unresolved",
        "_variants",
        "counter",
        "entry",
        "site_calls",
        "variant",
    )  # fmt: skip

    def __init__(
        self,
        compiler: VariantCompiler,
        site_calls: Sequence[int],
        runtimes: Sequence[Runtime],
        roots: Sequence[Runtime],
    ) -> None:
        self._compiler = compiler
        self._variants = VariantCache(compiler.options.variant_cache_mb * 2**20)
        self._under_way = 0
        self._armed = False
        self._lock = threading.RLock()  # for pointer changes only
        self.counter = CallCounter()
        self._runtimes = [weakref.ref(runtime) for runtime in runtimes]
        self._roots = [weakref.ref(runtime) for runtime in roots]
        self.site_calls = tuple(site_calls)
        self._plan = self._restricted({runtime: runtime.following for runtime in self.runtimes})
        self._unresolved: Boxed | None = None
        self._current: Boxed = self._at(self._plan)
        self.variant: Boxed = self._current
        self.entry = self._make_entry()
        if not self.roots:  # a graph after a graph break, or of a part of the model that was compiled alone
            for runtime in self.runtimes:
                runtime.divide()
        for runtime in self.runtimes:
            runtime.add_executor(self)
            if runtime.telemetry is not None:
                runtime.telemetry.watch(self, self.site_calls)
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Nobody in this child holds the lock, whoever held it in the parent; see `esper.forking`."""
        self._lock = threading.RLock()

    @property
    def runtimes(self) -> tuple[Runtime, ...]:
        return tuple(runtime for each in self._runtimes if (runtime := each()) is not None)

    @property
    def roots(self) -> tuple[Runtime, ...]:
        return tuple(runtime for each in self._roots if (runtime := each()) is not None)

    def _make_entry(self) -> Callable[..., Any]:
        tick = self.counter.tick

        def entry(*inputs: Any) -> Any:
            tick()
            return self.variant(list(inputs))

        return entry

    # -- Executor, as the runtime sees it --------------------------------------------------------------------------

    def ready(self, plan: Plan, runtime: Runtime) -> bool:
        """Whether `plan` can come into force for `runtime` without a compilation that workers could do."""
        wanted = self._restricted({each: plan if each is runtime else each.plan for each in self.runtimes})
        return not self._compiler.remote or self._variants.get(wanted.structure) is not None

    def prepare(self, plan: Plan, runtime: Runtime) -> Preparation | None:
        """Begin to make the variant that `plan` needs, unless it is there or has to be compiled at its first call."""
        wanted = self._restricted({each: plan if each is runtime else each.plan for each in self.runtimes})
        if self._variants.get(wanted.structure) is not None:
            return None
        self._compiler.check(wanted)
        if not self._compiler.remote:
            if self._compiler.options.inner_name == "eager":
                self._variants.put(wanted.structure, self._compiler.uncompiled(wanted))
            return None
        started = self._compiler.start(wanted)
        if isinstance(started, Variant):
            self._variants.put(wanted.structure, started)
            return None
        self._under_way += 1
        return Preparation(self, wanted, started)

    def finished(self, plan: Plan, variant: Variant | None) -> None:
        """A preparation has ended; without a variant, if it failed or was called off."""
        self._under_way -= 1
        if variant is not None:
            self._variants.put(plan.structure, variant)

    def follow(self, plan: Plan) -> None:
        """Switch to `plan`, that of one of the runtimes; the others keep theirs."""
        del plan  # several runtimes may share this graph: ask each
        with self._lock:
            self._plan = self._restricted({runtime: runtime.following for runtime in self.runtimes})
            self._variants.in_force, self._unresolved = self._plan.structure, None
            before, new = self._current, self._at(self._plan)
            at_once = self.roots and not any(runtime.in_parts for runtime in self.runtimes)
            self._point_to(new if at_once else Transition(self.runtimes, before, new, self._settle))

    def _settle(self, transition: Transition) -> None:
        with self._lock:
            if self._current is transition:
                self._point_to(transition.new)

    def arm(self) -> None:
        """Have the next call that begins a forward go through the runtimes' boundary."""
        if self.roots:
            with self._lock:
                self._armed = True
                self.variant = self._enter

    def disarm(self) -> None:
        """Back to the direct path."""
        with self._lock:
            self._armed = False
            self.variant = self._at_rest()

    def _at_rest(self) -> Boxed:
        return self._begin if any(runtime.in_parts for runtime in self.roots) else self._current

    def _begin(self, inputs: list[Any]) -> Any:
        for runtime in self.roots:
            runtime.begin()
        return self._current(inputs)

    def sample(self, telemetry: Telemetry) -> None:
        """Time the next call. A graph is timed as a whole, so its sites all get the time of the graph."""
        current = self._at_rest()
        sites = [site for site in set(self.site_calls) if telemetry.knows(site)]

        def timed(inputs: list[Any]) -> Any:
            with self._lock:
                if self.variant is timed:
                    self.variant = self._enter if self._armed else self._at_rest()
            watch = telemetry.stopwatch()
            outputs = current(inputs)
            watch.stop()
            for site in sites:
                telemetry.record(site, watch)
            return outputs

        with self._lock:
            if self.variant == current and self._unresolved is None:
                self.variant = timed

    # -- variants --------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The part of the plan in force that concerns this graph."""
        return self._plan

    def provide(self, plan: Plan, variant: Variant | None) -> None:
        """Take `variant` for plans like `plan`; None has it compiled at the next call. On any thread.

        If such a plan is in force, the next forward runs it.
        """
        self._variants.put(plan.structure, variant)
        if self._plan.structure == plan.structure and self._unresolved is None:
            self.runtimes[0].renew(self)

    def _restricted(self, plans: Mapping[Runtime, Plan]) -> Plan:
        sites: dict[int, Any] = {}
        for plan in plans.values():
            sites.update(plan.restricted(self.site_calls).sites)
        return Plan(dict(sorted(sites.items())))

    def _point_to(self, variant: Boxed) -> None:
        self._current = variant
        if not self._armed:
            self.variant = self._at_rest()

    def _enter(self, inputs: list[Any]) -> Any:
        for runtime in self.roots:
            runtime.boundary()
        return self._current(inputs)

    def _at(self, plan: Plan) -> Boxed:
        """What runs `plan`: its variant, or a function that finds or makes it at the first call."""
        variant = self._variants.get(plan.structure)
        if variant is not None:
            return self._bound(variant, plan)

        def resolve(inputs: list[Any]) -> Any:
            variant = self._variants.get(plan.structure)
            if variant is None:
                variant = self._compiler.compile_here(plan)
                self._variants.put(plan.structure, variant)
            bound = self._bound(variant, plan)
            with self._lock:
                if self._unresolved is resolve:
                    self._unresolved = None
                    if isinstance(self._current, Transition):
                        self._current.new = bound
                    else:
                        self._point_to(bound)
            return bound(inputs)

        self._unresolved = resolve
        return resolve

    def _bound(self, variant: Variant, plan: Plan) -> Boxed:
        """The variant with the tensors of `plan` as its last inputs."""
        call = variant.call
        if plan.is_dormant:
            return call
        owners = [seed.kernel.module._parameters for seed in plan.seeds()]  # read at each call: `functional_call`
        learning = [parameter.requires_grad for parameter in _tensors(owners)]
        readers = [runtime.alpha_reader(plan) for runtime in self.runtimes]
        read = readers[0] if len(readers) == 1 else lambda: torch.cat([reader() for reader in readers])

        def bound(inputs: list[Any]) -> Any:
            parameters = _tensors(owners)
            if [parameter.requires_grad for parameter in parameters] != learning:  # frozen or thawed one by one
                self.follow(self._plan)
                return self._current(inputs)
            inputs += parameters
            inputs.append(read())
            return call(inputs)

        return bound

    # -- what is known of it ---------------------------------------------------------------------------------------

    def report(self, names: Mapping[int, str]) -> GraphReport:
        """Its variants; `names` are those of the sites."""
        in_force = self._plan.structure
        variants = [
            VariantReport(
                plan=_plan_text(structure, names),
                origin=variant.origin,
                seconds=variant.seconds,
                size_bytes=variant.size_bytes,
                reason=variant.reason,
                in_force=structure == in_force,
            )
            for structure, variant in self._variants.items()
        ]
        sites = tuple(names.get(site, f"site {site}") for site in dict.fromkeys(self.site_calls))
        inner = self._compiler.options.inner_name
        return GraphReport(self._compiler.name, sites, inner, tuple(variants), max(self._under_way, 0))


class Preparation:
    """A variant that a dispatcher waits for. For the background thread that began it."""

    def __init__(self, dispatcher: Dispatcher, plan: Plan, compilation: Compilation) -> None:
        self._dispatcher, self._plan, self._compilation = dispatcher, plan, compilation
        self.future: Future[Tensor] | Future[bytes] = compilation.future

    def finish(self) -> None:
        """Load the variant once `future` is done; raises what kept it from being compiled."""
        variant = None
        try:
            variant = self._compilation.finish()
        except WorkersClosedError as error:
            raise ShutDownError(str(error)) from error
        finally:
            self._dispatcher.finished(self._plan, variant)

    def abandon(self) -> None:
        """Nobody waits any more. What a worker has begun goes on, for the store."""
        self._compilation.abandon()
        self._dispatcher.finished(self._plan, None)


def _tensors(owners: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    return [parameter for owner in owners for parameter in owner.values()]


def report_on(executors: Iterable[object], names: Mapping[int, str]) -> CompileReport:
    """What is known of the dispatchers among `executors`, and of workers and store; `names` are those of sites."""
    dispatchers = [executor for executor in executors if isinstance(executor, Dispatcher)]
    graphs = sorted((each.report(names) for each in dispatchers), key=lambda graph: int(graph.name.split()[-1]))
    store = default_store() if graphs else None
    return CompileReport(tuple(graphs), workers_so_far(), None if store is None else store.statistics)


def _plan_text(structure: Any, names: Mapping[int, str]) -> str:
    parts = [
        f"{names.get(site, f'site {site}')}[{', '.join(str(seed[0])[:12] for seed in seeds)}]"
        for site, seeds in structure
    ]
    return "; ".join(parts) or "dormant"
