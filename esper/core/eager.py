"""The executor of a wrapped model that runs without a compiler.

In `mode="module"` the host's own Python runs, on a module tree with a :class:`KasminaLayer` at each site; in
`mode="fx"` it is code that is generated from traces of it (`esper.eager`). Either is one callable, `model._run`, and
every change of plan is a change of that attribute.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from torch import fx, nn

from esper.core.replica.mutation_watch import signal_of
from esper.core.replica.subclassing import subclass_in_disguise
from esper.core.reports.explain import Explanation, LinearRow
from esper.core.sites.targets import Selection
from esper.core.wrapping import Mode, WrappedModel
from esper.eager import NotTracedError, TracedForward
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.plans.executor import PlanOwner
from esper.execution.plans.plan import Plan
from esper.execution.plans.runtime import Runtime
from esper.execution.telemetry import CallCounter, Telemetry
from esper.weak_methods import weakly

__all__ = ["EagerExecutor"]

_Run = Callable[..., Any]


class EagerExecutor:
    """Owns `model._run`: an executor of the model's runtime.

    `forward` is the host's own Python, which runs on the modules below `root`.
    """

    def __init__(
        self,
        root: nn.Module,
        runtime: Runtime,
        layers: Mapping[str, KasminaLayer],
        selection: Selection,
        mode: Mode,
        forward: _Run,
    ) -> None:
        self.counter = CallCounter()
        self._forward = forward
        self._runtime = runtime
        self._layers = dict(layers)
        self._selection = selection
        self._model: weakref.ref[WrappedModel] | None = None
        self._has_entry_hook = False
        self._generated: _Run | None = None  # what runs in place of the tree
        self._traced: TracedForward | None = None
        if mode == "module":
            runtime.divide()
            return
        self._traced = TracedForward(
            root,
            runtime,
            forward,
            as_modules=weakly(self._tree),
            tick=self.counter.tick,
            switched=weakly(self._point_to),
            subclass=subclass_in_disguise,
        )
        signal = signal_of(root)
        if signal is not None:
            signal.listen(self._traced.changed)

    def attach_to(self, model: WrappedModel) -> None:
        """Begin to run `model`."""
        self._model = weakref.ref(model)
        self._set(self._current)
        self._runtime.add_executor(self)
        if self._runtime.telemetry is not None:
            self._runtime.divide()  # a sampled forward runs layer by layer, and a commit may come in between
            self._runtime.telemetry.watch(self, [layer.site for layer in self._layers.values()])

    def runs_eagerly(self) -> bool:
        """Whether the model was called outside of compiled graphs, or was not compiled."""
        others = (self, *self._layers.values())
        return bool(self.counter.value) or not any(each not in others for each in self._runtime.executors())

    @property
    def _current(self) -> _Run:
        return self._tree if self._generated is None else self._generated

    def _tree(self, *args: Any, **kwargs: Any) -> Any:
        self.counter.tick()
        self._runtime.note_forward()
        return self._forward(*args, **kwargs)

    def _set(self, run: _Run) -> None:
        model = self._model() if self._model is not None else None
        if model is not None:
            broken = self._runtime.has_graph_breaks and self._traced is not None and not self._has_entry_hook
            model.__dict__["_run"] = self._begin if broken and run == self._current else run

    def _point_to(self, run: _Run) -> None:
        with self._runtime.lock:  # whoever arms meanwhile has the last word
            self._generated = run
            if not self._has_entry_hook:
                self._set(run)

    def refresh(self) -> None:
        """The model's training state may have changed."""
        if self._traced is not None:
            self._traced.follow(self._runtime.following)

    # -- Executor --------------------------------------------------------------------------------------------------

    def ready(self, plan: Plan, runtime: PlanOwner) -> bool:
        """Always: what is not there is generated at the next call, in some milliseconds and without tracing."""
        del plan, runtime
        return True

    def prepare(self, plan: Plan, runtime: PlanOwner) -> None:
        """Generate the code for `plan`, unless the model only runs compiled."""
        del runtime
        if self._traced is not None and self.runs_eagerly():
            self._traced.prepare(plan)

    def follow(self, plan: Plan) -> None:
        """Switch to the code for `plan`; the site modules follow it by themselves."""
        if self._traced is not None:
            self._traced.follow(plan)

    def install_entry_hook(self) -> None:
        self._has_entry_hook = True
        self._set(self._enter)

    def remove_entry_hook(self) -> None:
        self._has_entry_hook = False
        self._set(self._current)

    def _begin(self, *args: Any, **kwargs: Any) -> Any:
        self._runtime.note_forward()
        return self._current(*args, **kwargs)

    def _enter(self, *args: Any, **kwargs: Any) -> Any:
        return self._runtime.enter_whole(lambda: self._current(*args, **kwargs))

    # -- Metered ---------------------------------------------------------------------------------------------------

    def sample(self, telemetry: Telemetry) -> None:
        """Run the next forward through the site modules, each of which times its calls."""

        def sampled(*args: Any, **kwargs: Any) -> Any:
            with self._runtime.lock:  # a commit may be prepared just now, which arms
                self._set(self._enter if self._has_entry_hook else self._current)
            if self._has_entry_hook:
                self._runtime.enter(whole=True)
            calls: list[int] = []
            for layer in self._layers.values():
                layer.sample(telemetry, calls)
            try:
                with nullcontext() if self._traced is None else self._traced.aside():
                    return self._tree(*args, **kwargs)
            finally:
                for layer in self._layers.values():
                    layer.end_sample()
                telemetry.watch(self, calls)

        with self._runtime.lock:
            if self.counter.value and not self._has_entry_hook:
                self._set(sampled)

    # -- what was traced -------------------------------------------------------------------------------------------

    @property
    def graph_module(self) -> fx.GraphModule:
        """See :attr:`WrappedModel.graph_module`."""
        if self._traced is None:
            raise NotTracedError('the model runs as its own Python: wrap it with mode="fx" to have it traced')
        return self._traced.graph_module

    def retrace(self) -> None:
        """See :meth:`WrappedModel.retrace`."""
        if self._traced is not None:
            self._traced.retrace()

    def explain(self) -> Explanation:
        """What was traced, what not, and why."""
        runs_in, untraced = self._traced.survey() if self._traced is not None else ({}, {})
        how = "runs as a module" + ("" if self._traced is not None else ', as mode="module" has it; mode="fx" traces')
        sites = [
            LinearRow(name, True, runs_in.get(layer), "" if layer in runs_in else how)
            for name, layer in self._layers.items()
        ]
        others = [LinearRow(name, False, None, reason) for name, reason in self._selection.refused.items()]
        return Explanation((*sites, *others), tuple(dict.fromkeys(runs_in.values())), untraced)
