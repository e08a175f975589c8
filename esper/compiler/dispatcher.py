"""The dispatcher of a compiled graph for the sites of one model: it forwards to the variant for the plan in force.

A call costs one counter and one attribute read more than the variant itself. `prepare` is for background threads;
everything else is for the thread that runs the model, at a commit or between two calls.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esper.compiler.graph_plan import GraphPlan
from esper.compiler.graph_variants import GraphVariants, VariantPreparation
from esper.compiler.report import CompileReport, GraphReport, VariantReport
from esper.compiler.variant_cache import Boxed, Variant
from esper.compiler.variant_store import default_store
from esper.compiler.workers import workers_so_far
from esper.execution.plans.executor import PlanOwner
from esper.execution.plans.handover import PlanHandover
from esper.execution.plans.plan import Plan
from esper.execution.plans.runtime import Runtime
from esper.execution.telemetry import CallCounter, Telemetry
from esper.forking import reset_after_fork
from esper.logs import SayOnce

__all__ = ["Dispatcher", "SiteNumber", "report_on"]

_say_once = SayOnce(logging.getLogger("esper.compiler"))
_HOOKS = (
    "hooks on the module of kernel %s do not run in what was compiled without them: register them on the layer, or "
    "compile anew after torch.compiler.reset()"
)


class SiteNumber(NamedTuple):
    """A site, and the runtime to which it belongs."""

    number: int
    runtime: Runtime


class Dispatcher:
    """Forwards to `variant`, which is specialised for the plan in force.

    `tags` are those with which the graph is called for it. `sites` says which site stands at each number of the graph;
    `calls` are the numbers of the sites that it calls, in order. `roots` are the runtimes whose forward begins in this
    graph (only there may a commit happen), `runtimes` all that have a part in it.
    """

    __slots__ = (
        "__weakref__",
        "_current",
        "_device",
        "_has_entry_hook",
        "_lock",
        "_plan",
        "_roots",
        "_runtimes",
        "_sites",
        "_unresolved",
        "counter",
        "site_calls",
        "tags",
        "tick",
        "variant",
        "variants",
    )  # fmt: skip

    def __init__(
        self,
        variants: GraphVariants,
        tags: tuple[Tensor, ...],
        sites: Mapping[int, SiteNumber],
        calls: Iterable[int],
        runtimes: Sequence[Runtime],
        roots: Sequence[Runtime],
    ) -> None:
        self.variants = variants
        self.tags = tags
        self._lock = threading.RLock()  # for pointer changes only
        self.counter = CallCounter()
        self.tick = self.counter.tick
        self.site_calls = tuple(sites[number].number for number in calls)
        self._has_entry_hook = False
        self._device = runtimes[0].state.device
        self._sites = {index: (sites[index].number, weakref.ref(sites[index].runtime)) for index in sorted(sites)}
        self._runtimes = [weakref.ref(runtime) for runtime in runtimes]
        self._roots = [weakref.ref(runtime) for runtime in roots]
        self._plan = self._planned()
        self._unresolved: Boxed | None = None
        self._current: Boxed = self._at(self._plan)
        if not all(runtime.starts.settled(runtime.upcoming) for runtime in runtimes if runtime not in roots):
            self._current = PlanHandover(runtimes, self._as_begun, self._current, self._finish)
        self.variant: Boxed = self._current
        """What a call runs."""
        for runtime in runtimes:
            if roots:
                runtime.may_divide()
            else:  # a graph after a graph break, or of a part of the model that was compiled alone
                runtime.divide()
        self.remove_entry_hook()
        for runtime in runtimes:
            runtime.add_executor(self)
            runtime.called.update(self.site_calls)
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

    # -- Executor, as the runtime sees it --------------------------------------------------------------------------

    def ready(self, plan: Plan, runtime: PlanOwner) -> bool:
        """Whether `plan` can come into force for `runtime` without a compilation that workers could do."""
        return self.variants.ready(self._planned(plan, runtime))

    def prepare(self, plan: Plan, runtime: PlanOwner) -> VariantPreparation | None:
        """Begin to make the variant that `plan` needs, unless it is there or has to be compiled at its first call."""
        return self.variants.begin(self._planned(plan, runtime), runtime.settings)

    def follow(self, plan: Plan) -> None:
        """Switch to `plan`, that of one of the runtimes; the others keep theirs."""
        del plan  # several runtimes may share this graph: ask each
        with self._lock:
            self._plan = self._planned()
            self._unresolved = None
            before, new = self._current, self._at(self._plan)
            at_once = self.roots and not any(runtime.has_graph_breaks for runtime in self.runtimes)
            self._point_to(new if at_once else PlanHandover(self.runtimes, before, new, self._finish))

    def _finish(self, handover: PlanHandover) -> None:
        with self._lock:
            if self._current is handover:
                self._point_to(handover.new)

    def install_entry_hook(self) -> None:
        """Have the next call that begins a forward go through the runtimes' boundary."""
        with self._lock:
            self._has_entry_hook = True
            self.variant = self._enter

    def remove_entry_hook(self) -> None:
        """Back to the direct path."""
        with self._lock:
            self._has_entry_hook = False
            self.variant = self._untimed()

    def _untimed(self) -> Boxed:
        return self._begin if any(runtime.has_graph_breaks for runtime in self.roots) else self._current

    def _begin(self, inputs: list[Any]) -> Any:
        for root in self._roots:  # at every call, so without `roots`: each Python call costs two here, as Dynamo looks
            runtime = root()
            if runtime is not None:
                runtime.note_forward()
        return self._current(inputs)

    def sample(self, telemetry: Telemetry) -> None:
        """Time the next call. A graph is timed as a whole, so its sites all get the time of the graph."""
        current = self._untimed()
        sites = [site for site in set(self.site_calls) if telemetry.knows(site)]

        def timed(inputs: list[Any]) -> Any:
            with self._lock:
                if self.variant is timed:
                    self.variant = self._enter if self._has_entry_hook else self._untimed()
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
    def plan(self) -> GraphPlan:
        """The part of the plans in force that concerns this graph."""
        return self._plan

    def renew(self, plan: GraphPlan) -> None:
        """There is a better variant for `plan`: if such a plan is in force, the next forward runs it. On any thread."""
        runtimes = self.runtimes
        if runtimes and self._plan.specialization_key == plan.specialization_key and self._unresolved is None:
            runtimes[0].renew(self)

    def _planned(self, plan: Plan | None = None, runtime: PlanOwner | None = None) -> GraphPlan:
        """The plans in force for this graph's sites, by their numbers in it; that of `runtime` would be `plan`."""
        return self._joined(lambda each: each.following if plan is None or each is not runtime else plan)

    def _joined(self, plan_of: Callable[[Runtime], Plan]) -> GraphPlan:
        seeds = {}
        for index, (site, owner) in self._sites.items():
            runtime = owner()
            if runtime is not None:
                seeds[index] = plan_of(runtime).sites.get(site, ())
        return GraphPlan({index: each for index, each in seeds.items() if each}, self._device)

    def _as_begun(self, inputs: list[Any]) -> Any:
        """Run the plan that this thread's forward began with, which a commit overtook before the graph was compiled."""
        plan = self._joined(lambda runtime: runtime.begun_with)
        return self._bound(self.variants.here(plan), plan)(inputs)

    def _point_to(self, variant: Boxed) -> None:
        self._current = variant
        if not self._has_entry_hook:
            self.variant = self._untimed()

    def _enter(self, inputs: list[Any]) -> Any:
        roots = self.roots
        for runtime in self.runtimes:
            runtime.enter(whole=runtime in roots)
        return self._current(inputs)

    def _at(self, plan: GraphPlan) -> Boxed:
        """What runs `plan`: its variant, or a function that finds or makes it at the first call."""
        variant = self.variants.cache.get(plan.specialization_key)
        if variant is not None:
            return self._bound(variant, plan)

        def resolve(inputs: list[Any]) -> Any:
            bound = self._bound(self.variants.here(plan), plan)
            with self._lock:
                if self._unresolved is resolve:
                    self._unresolved = None
                    if isinstance(self._current, PlanHandover):
                        self._current.new = bound
                    else:
                        self._point_to(bound)
            return bound(inputs)

        self._unresolved = resolve
        return resolve

    def _bound(self, variant: Variant, plan: GraphPlan) -> Boxed:
        """The variant with the tensors of `plan` as its last inputs."""
        call = variant.call
        if plan.is_dormant:
            return call
        owners = [seed.kernel.module._parameters for seed in plan.seeds()]  # read at each call: `functional_call`
        learning = [parameter.requires_grad for parameter in _tensors(owners)]
        is_shared = any(seed.kernel.module.is_shared for seed in plan.seeds())
        read = self._alpha_reader(plan)
        for seed in plan.seeds():
            if seed.kernel.module.has_hooks:
                _say_once(logging.WARNING, _HOOKS % seed.kernel.artifact_id[:12])

        def bound(inputs: list[Any]) -> Any:
            parameters = _tensors(owners)
            if [parameter.requires_grad for parameter in parameters] != learning:  # frozen or thawed one by one
                self.follow(self._plan)
                return self._current(inputs)
            inputs += self.variants.compiler.parameters_of(plan) if is_shared else parameters
            inputs.append(read())
            return call(inputs)

        return bound

    def _alpha_reader(self, plan: GraphPlan) -> Callable[[], Tensor]:
        """A function that reads the alphas of `plan`'s seeds, in its order."""
        sites = [(*self._sites[index], seeds) for index, seeds in plan.sites.items()]
        readers = []
        for runtime, own in itertools.groupby(sites, key=lambda each: each[1]()):
            if runtime is not None:
                readers.append(runtime.alpha_reader(Plan({site: seeds for site, _, seeds in own})))
        return readers[0] if len(readers) == 1 else lambda: torch.cat([reader() for reader in readers])

    # -- what is known of it ---------------------------------------------------------------------------------------

    def report(self, names: Mapping[int, str]) -> GraphReport:
        """Its variants; `names` are those of the sites."""
        in_force = self._plan.specialization_key
        numbered = {index: names.get(site, f"site {site}") for index, (site, _) in self._sites.items()}
        variants = [
            VariantReport(
                plan=_plan_text(key, numbered),
                origin=variant.origin,
                seconds=variant.seconds,
                size_bytes=variant.size_bytes,
                reason=variant.reason,
                in_force=key == in_force,
            )
            for key, variant in self.variants.cache.items()
        ]
        sites = tuple(names.get(site, f"site {site}") for site in dict.fromkeys(self.site_calls))
        compiler = self.variants.compiler
        return GraphReport(compiler.name, sites, compiler.options.inner_name, tuple(variants), self.variants.waiting)


def _tensors(owners: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    return [parameter for owner in owners for parameter in owner.values()]


def report_on(executors: Iterable[object], names: Mapping[int, str]) -> CompileReport:
    """What is known of the dispatchers among `executors`, and of workers and store; `names` are those of sites."""
    dispatchers = [executor for executor in executors if isinstance(executor, Dispatcher)]
    places = {name: place for place, name in enumerate(names.values())}

    def order(graph: GraphReport) -> tuple[int, int]:
        return int(graph.name.split()[-1]), min((places[site] for site in graph.sites), default=-1)

    graphs = sorted((each.report(names) for each in dispatchers), key=order)
    store = default_store() if graphs else None
    return CompileReport(tuple(graphs), workers_so_far(), None if store is None else store.statistics)


def _plan_text(key: Any, names: Mapping[int, str]) -> str:
    """The structure of a plan as text; `names` are those of the graph's sites by number."""
    by_site, *_ = key or ((),)
    parts = [f"{names[site]}[{', '.join(str(seed[0])[:12] for seed in seeds)}]" for site, seeds in by_site]
    return "; ".join(parts) or "dormant"
