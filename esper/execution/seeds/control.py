"""The control of one model's seeds: requests are checked on the caller's thread, and become operations.

These are made ready on background threads and end in edits of the plan that are published to the runtime.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from esper.artifacts import Blueprint
from esper.errors import shown
from esper.execution.kernels.service_locator import AttachKernel, TelemetrySink
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.plans.alpha import AlphaSchedule
from esper.execution.plans.runtime import Runtime
from esper.execution.seeds.folding import Fold
from esper.execution.seeds.journal import SeedJournal
from esper.execution.seeds.load_groups import GroupedLoad, LoadGroup
from esper.execution.seeds.operations import Fossilize, Load, LoadOptions, SetAlpha, Unload
from esper.execution.seeds.progress import KernelRequest
from esper.execution.seeds.queue import StagingQueue
from esper.execution.seeds.restoring import RestoredSeed, attach_later, restore
from esper.execution.seeds.seed import Operation, Seed, described_together
from esper.execution.sources import KernelSource
from esper.execution.state_layout import checked_alpha

__all__ = ["SeedControl"]

_LOG = logging.getLogger("esper.execution")
_State = SeedLifecycleState


class SeedControl:
    """Takes the requests for one model's seeds, from any thread.

    What is known about requests changes under the runtime's lock. A seed is `LOADING` while a load is under way or
    staged, whatever else is committed meanwhile.
    """

    def __init__(
        self,
        runtime: Runtime,
        source: KernelSource | None,
        attach: AttachKernel | None = None,
        sink: TelemetrySink | None = None,
    ) -> None:
        self._runtime = runtime
        self._source = source
        self._attach = attach
        self.sink = sink
        self._journal = SeedJournal(runtime, sink)
        self._queue = StagingQueue(runtime)

    def load(
        self,
        seed: Seed,
        reference: str,
        *,
        alpha: float | AlphaSchedule = 1.0,
        trainable: bool = False,
        isolate: bool = False,
    ) -> KernelRequest:
        """Stage kernel `reference` for `seed`; the future tells whether it is staged.

        A request for a seed that is already loading replaces the earlier one, whose future becomes False. Raises
        `AlphaError`, and `LifecycleError` for a fossilized seed.
        """
        options = self._options(reference, alpha, trainable, isolate)
        self._runtime.model.find_peers()
        with self._runtime.lock:
            seed.refuse_fossil()
            self._lead([seed], "load", kernels=[reference], alpha=alpha, trainable=trainable, isolate=isolate)
            replaced = self._make_way(seed)
            load = seed.loading = Load(seed, options, self._runtime, self._journal, self._attach)
            load.change = self._number([seed])
        if replaced is not None:
            replaced.answer(False)
        self._queue.fetch(load)
        return load.request

    def _options(self, reference: object, alpha: Any, trainable: object, isolate: object) -> LoadOptions:
        if not isinstance(reference, str):
            if isinstance(reference, Blueprint):
                hint = "; compile it first, and pass the kernel's id, or use request_kernels(), which takes blueprints"
            else:
                hint = "; pass its id" if hasattr(reference, "id") else ""
            raise TypeError(f"a kernel is asked for by its id or name, a string, not by {shown(reference)}{hint}")
        if not isinstance(trainable, bool) or not isinstance(isolate, bool):
            name, flag = ("isolate", isolate) if isinstance(trainable, bool) else ("trainable", trainable)
            raise TypeError(f"{name} must be True or False, not {shown(flag)}")
        first = checked_alpha(alpha(0) if callable(alpha) else alpha)
        if callable(alpha):
            self._runtime.model.count_steps()
        self._runtime.note_settings()
        return LoadOptions(reference, alpha, first, trainable, isolate)

    @staticmethod
    def _make_way(seed: Seed) -> Operation | None:
        """End what was asked of `seed`, which is to be loaded; returns the load that was under way. Lock held."""
        if seed.lifecycle is not _State.LOADING:
            seed.become(_State.LOADING)
        seed.later_alpha = None
        return seed.supersede()

    def load_together(
        self, wanted: Mapping[Seed, str], *, alpha: float | AlphaSchedule, trainable: bool, isolate: bool
    ) -> LoadGroup:
        """As :meth:`load`, of kernels by seed that come into force together or not at all; to be fetched yet."""
        each = {seed: self._options(reference, alpha, trainable, isolate) for seed, reference in wanted.items()}
        self._runtime.model.find_peers()
        with self._runtime.lock:
            for seed in wanted:
                seed.refuse_fossil()
            self._lead(
                list(wanted), "load", kernels=list(wanted.values()), alpha=alpha, trainable=trainable, isolate=isolate
            )
            replaced = [self._make_way(seed) for seed in wanted]
            loads = [GroupedLoad(seed, each[seed], self._runtime, self._journal, self._attach) for seed in wanted]
            group = LoadGroup(loads, self._queue.stage_fetched)
            change = self._number(list(wanted))
            for load in loads:
                load.seed.loading = load
                load.change = change
        for before in replaced:
            if before is not None:
                before.answer(False)
        return group

    def fetch_together(self, group: LoadGroup) -> None:
        """Go on with what :meth:`load_together` has begun."""
        for load in group.loads:
            self._queue.fetch(load)

    def unload(self, seed: Seed) -> bool:
        """Stage the return of `seed` to dormancy; a load under way is cancelled. False if there is nothing to unload.

        Raises `LifecycleError` for a fossilized seed.
        """
        return bool(self.unload_together([seed]))

    def unload_together(self, seeds: Sequence[Seed]) -> list[Seed]:
        """As :meth:`unload`, of several; returns those with something to unload. Nothing is done where it raises."""
        self._runtime.model.find_peers()
        with self._runtime.lock:
            for seed in seeds:
                seed.refuse_fossil()
            self._lead(seeds, "unload")
            cancelled = [load for seed in seeds if (load := seed.supersede()) is not None]
            busy = {load.seed for load in cancelled}
            unloaded = [seed for seed in seeds if self._leave(seed, cancelled=seed in busy)]
            self._stage_unloads(seeds)
        for load in cancelled:
            load.answer(False)
        return unloaded

    def _number(self, seeds: Sequence[Seed]) -> str:
        """The name of what is asked of `seeds` together among the ranks that have to agree. Lock held."""
        gate = self._runtime.gate
        return "" if gate is None else gate.number([f"{seed.layer_name}:{seed.index}" for seed in seeds])

    def _lead(self, seeds: Sequence[Seed], action: str, **options: object) -> None:
        """Something is asked of this process, and can be: have it asked of those too that follow it. Lock held."""
        if self._runtime.gate is not None:
            names = [(seed.layer_name, seed.index) for seed in seeds]
            self._runtime.gate.lead(lambda: {"action": action, "seeds": names, **options})

    def _leave(self, seed: Seed, cancelled: bool) -> bool:
        """End what the seed was about, but for a kernel in force or staged. Whether there is anything to unload."""
        if self._runtime.target.seed(seed.site, seed.index) is None:
            failed = seed.lifecycle is _State.ERROR_RECOVERY
            if cancelled:
                seed.state.cancel_load(seed.index)
                self._journal.report(seed, "load called off")
            elif failed:
                seed.become(_State.DORMANT)
                seed.error = None
            return cancelled or failed
        if cancelled and seed.in_force:
            seed.state.cancel_load(seed.index)
        return True

    def _stage_unloads(self, seeds: Sequence[Seed]) -> None:
        held = [seed for seed in seeds if self._runtime.target.seed(seed.site, seed.index) is not None]
        unloads = [Unload(seed, self._runtime, self._journal) for seed in held]
        if (gate := self._runtime.gate) is not None:  # other ranks may have come further, and have more to unload
            change = self._number(seeds)
            for unload in unloads:
                unload.change = change
            gate.offer(change, described_together([f"unload {seed}" for seed in seeds]), *unloads)
        elif unloads:
            self._queue.stage(*unloads)

    def cancel(self, seed: Seed, staged: Future[bool]) -> None:
        """Have the load whose future is `staged` never come into force, unless it has already."""
        with self._runtime.lock:
            load = next((each for each in (seed.loading, seed.published) if each and each.staged is staged), None)
            if load is None:
                return
            if load is seed.loading:
                seed.supersede()
            elif not load.is_held and self._runtime.withdraw(load):
                load.withdraw()
            else:
                self._stage_unloads([seed])
                return
            if seed.loading is None:
                seed.state.cancel_load(seed.index)
            self._journal.report(seed, "load called off")
        load.answer(False)

    def fossilize(self, seed: Seed) -> bool:
        """Stage making `seed`'s kernel permanent, at the alpha it has now. False unless it is active.

        Where that is the same, it becomes part of the host's weight and bias, see :class:`Fold`; else it stays a
        kernel, of a share that is a constant.
        """
        return bool(self.fossilize_together([seed]))

    def fossilize_together(self, seeds: Sequence[Seed]) -> list[Seed]:
        """As :meth:`fossilize`, of several; returns those that are active."""
        self._runtime.model.find_peers()
        with self._runtime.lock:
            self._lead(seeds, "fossilize")
            change, gate = self._number(seeds), self._runtime.gate
            staged = [each for each in map(self._fossil, seeds) if each is not None]
            for each in staged:
                each.change = change
            if staged:
                self._queue.stage(*staged)
            elif gate is not None:
                what = described_together([f"fossilize {seed}" for seed in seeds])
                gate.refuse(change, what, "; ".join(f"{seed} is {seed.lifecycle.name}" for seed in seeds))
            return [each.seed for each in staged]

    def _fossil(self, seed: Seed) -> Fossilize | None:
        planned = self._runtime.target.seed(seed.site, seed.index)
        if seed.lifecycle is not _State.ACTIVE or planned is None or seed.is_fossilizing:
            return None
        seed.is_fossilizing = True
        seed.take_ticket()
        self._runtime.forget_schedules([seed.alpha_index])
        fossil = replace(planned, constant_alpha=seed.alpha)
        fold = Fold(seed.layer, planned, seed.alpha, self._runtime)
        # To fold may have to wait for a backward, on one rank longer than on others.
        exact = fold if self._runtime.gate is None and fold.is_exact(self._runtime.target) else None
        return Fossilize(seed, fossil, exact, self._runtime, self._journal, restage=self._queue.stage)

    def set_alpha(self, seed: Seed, alpha: float | AlphaSchedule) -> None:
        """Set or schedule the alpha of `seed`, and of the kernel that it is loading, if it is.

        Warns once if it has no kernel and is loading none. Raises `AlphaError`, and `LifecycleError` when fossilized.
        """
        self.set_alphas([seed], alpha)

    def set_alphas(self, seeds: Sequence[Seed], alpha: float | AlphaSchedule) -> None:
        """As :meth:`set_alpha`, of several. Nothing is done where it raises."""
        first = checked_alpha(alpha(0) if callable(alpha) else alpha)
        self._runtime.model.find_peers()
        untold = []
        with self._runtime.lock:
            for seed in seeds:
                seed.refuse_fossil()
            self._lead(seeds, "set_alpha", alpha=alpha)
            if self._runtime.gate is not None:
                sets, change = [SetAlpha(seed, alpha, first, self._runtime) for seed in seeds], self._number(seeds)
                for each in sets:
                    each.change = change
                self._queue.stage(*sets)
                return
            for seed in seeds:
                loading = seed.lifecycle is _State.LOADING
                if loading:
                    seed.later_alpha = alpha, first
                self._runtime.start_alpha(seed.alpha_index, alpha, first)
                untold += [] if loading or seed.in_force or seed.told_of_alpha else [seed]
                seed.told_of_alpha |= seed in untold
        for seed in untold:
            _LOG.warning(
                "the alpha set for seed %d of %s has no effect: it has no kernel and is loading none, and the next one "
                "starts with the alpha of its own load; pass alpha=... to load_kernel or request_kernel, or set it "
                "after that", seed.index, seed.layer_name
            )  # fmt: skip

    def restore(self, seeds: Sequence[Seed], restored: Sequence[RestoredSeed]) -> None:
        """Of `seeds`, put exactly those that are `restored` in force, see :func:`restore`."""
        restore(seeds, restored, self._runtime, self._journal)
        if self._attach is not None and self._source is not None:
            attach_later(restored, self._runtime, self._queue, self._attach, self._source)
