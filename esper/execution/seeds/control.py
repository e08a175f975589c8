"""The control of one model's seeds: requests are checked on the caller's thread, and become operations.

These are made ready on background threads and end in edits of the plan that are published to the runtime.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from esper.execution.kernels.service_locator import AttachKernel, TelemetrySink
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.plans.alpha import AlphaSchedule
from esper.execution.plans.runtime import Runtime
from esper.execution.seeds.folding import Fold
from esper.execution.seeds.journal import SeedJournal
from esper.execution.seeds.operations import Fossilize, Load, LoadOptions, SetAlpha, Unload
from esper.execution.seeds.queue import StagingQueue
from esper.execution.seeds.restoring import RestoredSeed, attach_later, restore
from esper.execution.seeds.seed import Seed
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
    ) -> Future[bool]:
        """Stage kernel `reference` for `seed`; the future tells whether it is staged.

        A request for a seed that is already loading replaces the earlier one, whose future becomes False. Raises
        `AlphaError`, and `LifecycleError` for a fossilized seed.
        """
        if not isinstance(reference, str):
            hint = "; pass its id" if hasattr(reference, "id") else ""
            raise TypeError(f"a kernel is asked for by its id or name, a string, not by {reference!r:.60}{hint}")
        for name, flag in (("trainable", trainable), ("isolate", isolate)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, not {flag!r:.60}")
        first = checked_alpha(alpha(0) if callable(alpha) else alpha)
        options = LoadOptions(reference, alpha, first, trainable, isolate)
        if callable(alpha):
            self._runtime.model.count_steps()
        self._runtime.note_settings()
        self._runtime.model.find_peers()
        with self._runtime.lock:
            seed.refuse_fossil()
            self._lead(seed, "load", kernel=reference, alpha=alpha, trainable=trainable, isolate=isolate)
            if seed.lifecycle is not _State.LOADING:
                seed.become(_State.LOADING)
            replaced = seed.supersede()
            load = seed.loading = Load(seed, options, self._runtime, self._journal, self._attach)
            load.change = self._number(seed)
            seed.later_alpha = None
        if replaced is not None:
            replaced.answer(False)
        self._queue.fetch(load)
        return load.staged

    def unload(self, seed: Seed) -> bool:
        """Stage the return of `seed` to dormancy; a load under way is cancelled. False if there is nothing to unload.

        Raises `LifecycleError` for a fossilized seed.
        """
        self._runtime.model.find_peers()
        with self._runtime.lock:
            seed.refuse_fossil()
            self._lead(seed, "unload")
            load = seed.supersede()
            unloads = self._unload(seed, cancelled=load is not None)
        if load is not None:
            load.answer(False)
        return unloads

    def _number(self, seed: Seed) -> str:
        """The name of what is asked of `seed` among the ranks that have to agree. Lock held."""
        gate = self._runtime.gate
        return "" if gate is None else gate.number(f"{seed.layer_name}:{seed.index}")

    def _lead(self, seed: Seed, action: str, **options: object) -> None:
        """Something is asked of this process, and can be: have it asked of those too that follow it. Lock held."""
        if self._runtime.gate is not None:
            self._runtime.gate.lead(lambda: {"action": action, "layer": seed.layer_name, "seed": seed.index, **options})

    def _unload(self, seed: Seed, cancelled: bool) -> bool:
        change, gate = self._number(seed), self._runtime.gate
        if self._runtime.target.seed(seed.site, seed.index) is None:
            if gate is not None:  # other ranks may have come further, and have it to unload
                gate.offer(change, f"unload {seed}")
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
        unload = Unload(seed, self._runtime, self._journal)
        unload.change = change
        return self._queue.stage(unload)

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
                self._unload(seed, cancelled=False)
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
        self._runtime.model.find_peers()
        with self._runtime.lock:
            self._lead(seed, "fossilize")
            change, gate = self._number(seed), self._runtime.gate
            planned = self._runtime.target.seed(seed.site, seed.index)
            if seed.lifecycle is not _State.ACTIVE or planned is None or seed.is_fossilizing:
                if gate is not None:
                    gate.refuse(change, f"fossilize {seed}", f"{seed} is {seed.lifecycle.name}")
                return False
            seed.is_fossilizing = True
            seed.take_ticket()
            self._runtime.forget_schedules([seed.alpha_index])
            fossil = replace(planned, constant_alpha=seed.alpha)
            fold = Fold(seed.layer, planned, seed.alpha, self._runtime)
            # To fold may have to wait for a backward, on one rank longer than on others.
            exact = fold if gate is None and fold.is_exact(self._runtime.target) else None
            fossilize = Fossilize(seed, fossil, exact, self._runtime, self._journal, restage=self._queue.stage)
            fossilize.change = change
            return self._queue.stage(fossilize)

    def set_alpha(self, seed: Seed, alpha: float | AlphaSchedule) -> None:
        """Set or schedule the alpha of `seed`, and of the kernel that it is loading, if it is.

        Warns once if it has no kernel and is loading none. Raises `AlphaError`, and `LifecycleError` when fossilized.
        """
        first = checked_alpha(alpha(0) if callable(alpha) else alpha)
        self._runtime.model.find_peers()
        with self._runtime.lock:
            seed.refuse_fossil()
            self._lead(seed, "set_alpha", alpha=alpha)
            if self._runtime.gate is not None:
                sets = SetAlpha(seed, alpha, first, self._runtime)
                sets.change = self._number(seed)
                self._queue.stage(sets)
                return
            loading = seed.lifecycle is _State.LOADING
            if loading:
                seed.later_alpha = alpha, first
            self._runtime.start_alpha(seed.alpha_index, alpha, first)
            untold = not (loading or seed.in_force or seed.told_of_alpha)
            seed.told_of_alpha |= untold
        if untold:
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
