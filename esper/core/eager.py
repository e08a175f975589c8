"""Running a wrapped model without a compiler.

In `mode="fx"` the model runs as code generated for the plan in force (`esper.core.eager_regions`); in `mode="module"`
it runs as the host's module tree with a :class:`KasminaLayer` at each site. Either is one callable, `model._run`, and
every change of plan is a change of that attribute.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from esper.core.eager_regions import EagerRegions
from esper.core.explain import Explanation, LinearRow
from esper.core.targets import Selection
from esper.execution.call_counter import CallCounter
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.plan import Plan
from esper.execution.runtime import Runtime
from esper.execution.telemetry import Telemetry
from esper_passes import CallKernels, ElideDormant, SeedCall

if TYPE_CHECKING:
    from esper.core.morphable_model import MorphableModel

__all__ = ["EagerExecutor"]

_Run = Callable[..., Any]
_KEPT_FUNCTIONS = 8


class EagerExecutor:
    """Owns `model._run`: an executor of the model's runtime.

    `regions` is None in `mode="module"`. Functions are built by :meth:`prepare`, on a background thread, or at the
    first call that needs one; they are kept for a few plans and training states.
    """

    def __init__(
        self,
        root: nn.Module,
        runtime: Runtime,
        layers: Mapping[str, KasminaLayer],
        selection: Selection,
        regions: EagerRegions | None,
    ) -> None:
        self.counter = CallCounter()
        self._root = root
        self._runtime = runtime
        self._layers = dict(layers)
        self._selection = selection
        self._regions = regions
        self._functions: OrderedDict[tuple[Hashable, ...], tuple[Plan, _Run]] = OrderedDict()
        self._model: weakref.ref[MorphableModel] | None = None
        self._armed = False
        self._current: _Run = self._tree if regions is None else self._very_first_call
        if regions is None:
            runtime.divide()
        else:
            regions.on_change = self._renew_at_next_call

    def attach_to(self, model: MorphableModel) -> None:
        """Begin to run `model`."""
        self._model = weakref.ref(model)
        self._point_to(self._current)
        self._runtime.add_executor(self)
        self._runtime.runs_eagerly = self._runs_eagerly
        if self._runtime.telemetry is not None:
            self._runtime.telemetry.watch(self, [layer.site for layer in self._layers.values()])

    def _runs_eagerly(self) -> bool:
        others = (self, *self._layers.values())
        return bool(self.counter.value) or not any(each not in others for each in self._runtime.executors())

    def _tree(self, *args: Any, **kwargs: Any) -> Any:
        self.counter.tick()
        self._runtime.begin()
        return self._root.forward(*args, **kwargs)

    def _set(self, run: _Run) -> None:
        model = self._model() if self._model is not None else None
        if model is not None:
            in_parts = self._runtime.in_parts and self._regions is not None and not self._armed
            model.__dict__["_run"] = self._begin if in_parts and run is self._current else run

    def _point_to(self, run: _Run) -> None:
        self._current = run
        if not self._armed:
            self._set(run)

    # -- generated code --------------------------------------------------------------------------------------------

    def _function(self, regions: EagerRegions, plan: Plan) -> _Run:
        """The function for `plan` and the regions as they are now; any thread."""
        traces = regions.regions.traced.values()
        key = (tuple(id(traced) for traced in traces), *(id(seed) for seed in plan.seeds()))
        known = self._functions.get(key)
        if known is not None and known[0] == plan:
            return known[1]
        function = regions.build(self._transform(plan), self.counter.tick)
        self._functions[key] = (plan, function)
        while len(self._functions) > _KEPT_FUNCTIONS:
            self._functions.popitem(last=False)
        return function

    def _transform(self, plan: Plan) -> Callable[[fx.GraphModule], fx.GraphModule]:
        if plan.is_dormant:
            return lambda module: ElideDormant()(module).graph_module
        calls = {
            site: tuple(SeedCall(seed.kernel.executor, seed.uses_host, seed.isolate) for seed in seeds)
            for site, seeds in plan.sites.items()
        }
        blend, elide = CallKernels(calls, self._runtime.alpha_reader(plan)), ElideDormant(frozenset(calls))
        return lambda module: elide(blend(module).graph_module).graph_module

    def _very_first_call(self, *args: Any, **kwargs: Any) -> Any:
        if self._regions is not None:  # whose parts may have been compiled in place since it was wrapped
            self._regions.refresh(quietly=True)
        return self._first_call(*args, **kwargs)

    def _first_call(self, *args: Any, **kwargs: Any) -> Any:
        if self._regions is not None:
            plan = self._runtime.following
            function = self._function(self._regions, plan)
            with self._runtime.lock:
                if self._runtime.following is plan:  # which another thread may have changed meanwhile
                    self._point_to(function)
            return function(*args, **kwargs)
        return self._current(*args, **kwargs)

    def _renewed_call(self, *args: Any, **kwargs: Any) -> Any:
        if self._regions is not None:
            self._regions.refresh()
        return self._first_call(*args, **kwargs)

    def _renew_at_next_call(self) -> None:
        self._functions.clear()
        self._point_to(self._renewed_call)

    def refresh(self) -> None:
        """The model's training state or attributes may have changed: trace anew what depends on them."""
        if self._regions is not None and self._regions.refresh():
            self._point_to(self._first_call)

    # -- Executor --------------------------------------------------------------------------------------------------

    def ready(self, plan: Plan, runtime: Runtime) -> bool:
        """Always: what is not there is generated at the next call, in some milliseconds and without tracing."""
        del plan, runtime
        return True

    def prepare(self, plan: Plan, runtime: Runtime) -> None:
        """Generate the code for `plan`, unless the model only runs compiled."""
        del runtime
        if self._regions is not None and self._runs_eagerly():
            self._function(self._regions, plan)

    def follow(self, plan: Plan) -> None:
        """Switch to the code for `plan`; the site modules follow it by themselves."""
        del plan  # in force by now; looked up at the next call, which is a dictionary look-up if it was prepared
        if self._regions is not None and self._current != self._renewed_call:
            self._regions.refresh()
            self._point_to(self._first_call)

    def arm(self) -> None:
        self._armed = True
        self._set(self._enter)

    def disarm(self) -> None:
        self._armed = False
        self._set(self._current)

    def _begin(self, *args: Any, **kwargs: Any) -> Any:
        self._runtime.begin()
        return self._current(*args, **kwargs)

    def _enter(self, *args: Any, **kwargs: Any) -> Any:
        self._runtime.boundary()
        return self._current(*args, **kwargs)

    # -- Metered ---------------------------------------------------------------------------------------------------

    def sample(self, telemetry: Telemetry) -> None:
        """Run the next forward through the site modules, each of which times its calls."""

        def sampled(*args: Any, **kwargs: Any) -> Any:
            self._set(self._enter if self._armed else self._current)
            if self._armed:
                self._runtime.boundary()
            calls: list[int] = []
            for layer in self._layers.values():
                layer.sample(telemetry, calls)
            try:
                return self._tree(*args, **kwargs)
            finally:
                for layer in self._layers.values():
                    layer.end_sample()
                telemetry.watch(self, calls)

        if self.counter.value and not self._armed:
            self._set(sampled)

    def explain(self) -> Explanation:
        """What was traced, what not, and why."""
        regions = self._regions
        runs_in: dict[nn.Module, str] = {}
        untraced: dict[str, str] = {}
        if regions is not None:
            for module, traced in regions.regions.traced.items():
                for inside in traced.modules.values():
                    runs_in[inside] = regions.name_of(module)
            untraced = {regions.name_of(module): reason for module, reason in regions.regions.untraced.items()}
        sites = [
            LinearRow(name, True, runs_in.get(layer), "" if layer in runs_in else "runs as a module")
            for name, layer in self._layers.items()
        ]
        others = [LinearRow(name, False, None, reason) for name, reason in self._selection.refused.items()]
        return Explanation((*sites, *others), tuple(dict.fromkeys(runs_in.values())), untraced)
