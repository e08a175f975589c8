"""The executor of one site: which path runs where the layer is called, and whether it is counted or timed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from esper.execution.plans.executor import PlanOwner
from esper.execution.plans.handover import PlanHandover
from esper.execution.plans.plan import Plan, SeedPlan
from esper.execution.plans.runtime import Runtime
from esper.execution.state_layout import KasminaStateLayout
from esper.execution.telemetry import CallCounter, Telemetry

__all__ = ["Meter", "SiteExecutor"]

_Path = Callable[[torch.Tensor], torch.Tensor]


class Meter(Protocol):
    """Counts calls, and times one when it is asked to."""

    @property
    def counter(self) -> CallCounter: ...


class SiteExecutor:
    """Follows a runtime's plan at the site of a layer, whose `_run` is what a call of it runs."""

    site: int
    runtime: Runtime
    state: KasminaStateLayout

    def _begin_without_seeds(self, meter: Meter | None) -> None:
        """`meter` counts the calls of a layer that stands alone, and lives as long as that."""
        self._meter = meter
        self._has_entry_hook = False
        self._seeds: tuple[SeedPlan, ...] = ()
        self._alphas = self.state.alpha_blend
        self._current = self._host_path()
        self._run = self._untimed()

    def _host_path(self) -> _Path:
        """What the layer computes without seeds. For as long as the layer lives, which has it."""
        raise NotImplementedError

    def _path_with(self, seeds: Sequence[SeedPlan], alphas: Callable[[], torch.Tensor]) -> _Path:
        """What it computes with them, in the place of what it computes without."""
        raise NotImplementedError

    def ready(self, plan: Plan, runtime: PlanOwner) -> bool:
        """Always: the layer calls its kernels one by one."""
        del plan, runtime
        return True

    def prepare(self, plan: Plan, runtime: PlanOwner) -> None:
        """Nothing to prepare."""
        del plan, runtime

    def follow(self, plan: Plan) -> None:
        """Switch to `plan`. The seeds come last, so that what was interrupted is done when it is asked for again."""
        seeds, before = plan.sites.get(self.site, ()), self._current
        if not seeds and not self._seeds:
            return
        current = self._host_path()
        if seeds:
            current = self._path_with(seeds, self.runtime.alpha_reader(plan.restricted([self.site])))
        if self.runtime.has_graph_breaks:
            current = PlanHandover([self.runtime], before, current, self._finish)
        self._current = current
        self._alphas = self.state.alpha_blend
        self._run = self._untimed()
        self._seeds = seeds

    def _finish(self, handover: PlanHandover) -> None:
        with self.runtime.lock:  # another thread may be committing
            if self._current is handover:
                self._current = handover.new
                self._run = self._untimed()

    def install_entry_hook(self) -> None:
        self._has_entry_hook = True
        self._run = self._untimed()

    def remove_entry_hook(self) -> None:
        self._has_entry_hook = False
        self._run = self._untimed()

    def _untimed(self) -> _Path:
        """What `_run` is while nothing is timed."""
        if self._has_entry_hook:
            return self._enter
        if self.site not in self.runtime.called:
            return self._first
        return self._current if self._meter is None else self._counted

    def _first(self, x: torch.Tensor) -> torch.Tensor:
        with self.runtime.lock:
            self.runtime.called.add(self.site)
            self._run = self._untimed()
        return self._run(x)

    def _enter(self, x: torch.Tensor) -> torch.Tensor:
        self.runtime.called.add(self.site)
        self._begin()
        return self._counted(x)

    def _begin(self) -> None:
        if threading.get_ident() not in self.runtime.whole:
            self.runtime.enter()

    def _counted(self, x: torch.Tensor) -> torch.Tensor:
        if self._meter is not None:
            self._meter.counter.tick()
        return self._current(x)

    def sample(self, telemetry: Telemetry, calls: list[int]) -> None:
        """Time every call of this thread until :meth:`end_sample`, and note each in `calls` by this layer's site."""
        thread = threading.get_ident()

        def timed(x: torch.Tensor) -> torch.Tensor:
            if threading.get_ident() != thread:
                return self._current(x)
            calls.append(self.site)
            watch = telemetry.stopwatch()
            y = self._current(x)
            watch.stop()
            telemetry.record(self.site, watch)
            return y

        with self.runtime.lock:
            self._run = timed

    def end_sample(self) -> None:
        """Stop timing."""
        with self.runtime.lock:
            self._run = self._untimed()
        telemetry = self.runtime.telemetry
        if telemetry is not None:
            for seed in self._seeds:
                self.state.record_latency(seed.seed, telemetry.latency_μs(self.site))

    def sample_next(self, telemetry: Telemetry) -> None:
        """Time the next call of a layer that stands alone."""

        def timed(x: torch.Tensor) -> torch.Tensor:
            with self.runtime.lock:
                self._run = self._untimed()
            watch = telemetry.stopwatch()
            y = self._run(x)
            watch.stop()
            telemetry.record(self.site, watch)
            self.end_sample()
            return y

        with self.runtime.lock:
            if not self._has_entry_hook:
                self._run = timed
