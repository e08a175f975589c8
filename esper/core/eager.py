"""Running a wrapped model without a compiler.

In `mode="fx"` the model runs as code generated for the plan in force (`esper.core.eager_regions`); in `mode="module"`,
and where nothing can be traced, it runs as the host's module tree with a :class:`KasminaLayer` at each site. Either is
one callable, `model._run`, and every change of plan is a change of that attribute.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from esper.core.explain import Explanation, LinearRow
from esper.core.targets import Selection
from esper.execution.call_counter import CallCounter
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.plan import Plan
from esper.execution.runtime import Runtime
from esper.execution.telemetry import Telemetry

if TYPE_CHECKING:
    from esper.core.morphable_model import MorphableModel

__all__ = ["EagerExecutor"]

_Run = Callable[..., Any]


class EagerExecutor:
    """Owns `model._run`: an executor of the model's runtime."""

    def __init__(
        self, root: nn.Module, runtime: Runtime, layers: Mapping[str, KasminaLayer], selection: Selection
    ) -> None:
        self.counter = CallCounter()
        self._root = root
        self._runtime = runtime
        self._layers = dict(layers)
        self._selection = selection
        self._model: weakref.ref[MorphableModel] | None = None
        self._armed = False
        self._current: _Run = self._tree

    def attach_to(self, model: MorphableModel) -> None:
        """Begin to run `model`."""
        self._model = weakref.ref(model)
        self._point_to(self._current)
        self._runtime.add_executor(self)
        if self._runtime.telemetry is not None:
            self._runtime.telemetry.watch(self, [layer.site for layer in self._layers.values()])

    def _tree(self, *args: Any, **kwargs: Any) -> Any:
        self.counter.tick()
        return self._root.forward(*args, **kwargs)

    def _set(self, run: _Run) -> None:
        model = self._model() if self._model is not None else None
        if model is not None:
            model.__dict__["_run"] = run

    def _point_to(self, run: _Run) -> None:
        self._current = run
        if not self._armed:
            self._set(run)

    # -- Executor --------------------------------------------------------------------------------------------------

    def prepare(self, plan: Plan) -> None:
        """Generate the code for `plan`."""

    def follow(self, plan: Plan) -> None:
        """Switch to the code for `plan`; the site modules follow it by themselves."""

    def arm(self) -> None:
        self._armed = True
        self._set(self._enter)

    def disarm(self) -> None:
        self._armed = False
        self._set(self._current)

    def _enter(self, *args: Any, **kwargs: Any) -> Any:
        self._runtime.boundary()
        return self._current(*args, **kwargs)

    def refresh(self) -> None:
        """The model's training state or attributes may have changed."""

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
        sites = [LinearRow(name, True, "module tree", "") for name in self._selection.targets]
        others = [LinearRow(name, False, "", reason) for name, reason in self._selection.skipped.items()]
        return Explanation((*sites, *others), (), {})
