"""Loading a kernel into a seed, unloading it, making it permanent: from the request until the change is staged.

Requests are checked on the caller's thread (which layer, which seed, which alpha), carried out on one background
thread, and end in a change published to the runtime. Whatever fails leaves the model as it was: the seed goes to
`ERROR_RECOVERY`, or stays active if its old kernel still is, and keeps the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

from esper.execution.background import rest
from esper.execution.kernel_cache import KernelCache
from esper.execution.kernels.loaded_kernel import KernelMismatchError, LoadedKernel
from esper.execution.kernels.service_locator import AttachKernel, TelemetrySink
from esper.execution.lifecycle import SeedLifecycleState, Transition
from esper.execution.plans.alpha import AlphaSchedule
from esper.execution.plans.plan import SeedPlan
from esper.execution.plans.plan_edit import Change
from esper.execution.plans.runtime import Runtime
from esper.execution.seeds.folding import CannotFoldError, Fold
from esper.execution.seeds.journal import SeedRecords
from esper.execution.seeds.queue import Edit, StagingQueue
from esper.execution.seeds.requests import LoadRequest, SeedRequest, SeedRequests
from esper.execution.seeds.restoring import SeedReplacement, SeedReplacer
from esper.execution.state_layout import checked_alpha

if TYPE_CHECKING:
    from esper.execution.kasmina_layer import KasminaLayer

__all__ = ["Stager"]

_LOG = logging.getLogger("esper.execution")
_State = SeedLifecycleState


class Stager:
    """Carries out the requests of one model's seeds. Requests may come from any thread.

    What is known about requests changes under the runtime's lock. A seed is `LOADING` while a load is under way or
    staged, whatever else is committed meanwhile.
    """

    def __init__(
        self,
        runtime: Runtime,
        cache: KernelCache,
        attach: AttachKernel | None = None,
        sink: TelemetrySink | None = None,
    ) -> None:
        self._runtime = runtime
        self._cache = cache
        self._attach = attach
        self.sink = sink
        self._requests = SeedRequests(runtime)
        self._records = SeedRecords(runtime, self._requests, sink)
        self._queue = StagingQueue(runtime, self._requests)
        self._replacer = SeedReplacer(runtime, self._requests, self._records, self._queue)
        self._published: dict[tuple[int, int], tuple[LoadRequest, Change, LoadedKernel]] = {}  # and not yet committed
        self._later_alphas: dict[tuple[int, int], tuple[float | AlphaSchedule, float]] = {}  # set during a load
        self._told_of_alpha: set[tuple[int, int]] = set()  # seeds whose alpha was set for nothing, and that was said

    def load(
        self,
        layer: KasminaLayer,
        seed: int,
        reference: str,
        *,
        alpha: float | AlphaSchedule,
        trainable: bool,
        isolate: bool,
    ) -> Future[bool]:
        """Stage kernel `reference` for `seed`; the future tells whether it is staged.

        A request for a seed that is already loading replaces the earlier one, whose future becomes False. Raises
        `IndexError` for a seed that does not exist, `AlphaError`, and `LifecycleError` for a fossilized seed.
        """
        if not isinstance(reference, str):
            hint = "; pass its id" if hasattr(reference, "id") else ""
            raise TypeError(f"a kernel is asked for by its id or name, a string, not by {reference!r:.60}{hint}")
        for name, flag in (("trainable", trainable), ("isolate", isolate)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, not {flag!r:.60}")
        first = checked_alpha(alpha(0) if callable(alpha) else alpha)
        if callable(alpha):
            self._runtime.on_schedule()
        self._runtime.note_settings()
        with self._runtime.lock:
            self._requests.refuse_fossil(layer, seed)
            if layer.state.lifecycle(seed) is not _State.LOADING:
                layer.state.set_lifecycle(seed, _State.LOADING)
            replaced, ticket = self._requests.call_off(layer, seed)
            request = LoadRequest(layer, seed, ticket, Future(), reference, alpha, first, trainable, isolate)
            request.staged.set_running_or_notify_cancel()  # not to be cancelled from outside: unload() calls a load off
            self._requests.begin(request)
            self._later_alphas.pop(request.key, None)
        if replaced is not None:
            replaced.answer(False)
        self._queue.fetch(request, lambda: self._fetched(request))
        return request.staged

    def unload(self, layer: KasminaLayer, seed: int) -> bool:
        """Stage the return of `seed` to dormancy; a load under way is called off. False if there is nothing to unload.

        Raises `IndexError` for a seed that does not exist and `LifecycleError` for a fossilized seed.
        """
        with self._runtime.lock:
            self._requests.refuse_fossil(layer, seed)
            load, _ = self._requests.call_off(layer, seed)
            unloads = self._unload(layer, seed, called_off=load is not None)
        if load is not None:
            load.answer(False)
        return unloads

    def call_off(self, layer: KasminaLayer, seed: int, staged: Future[bool]) -> None:
        """Have the load whose future is `staged` never come into force, unless it has already."""
        with self._runtime.lock:
            load = self._requests.under_way(layer, seed)
            published = self._published.get((layer.site, seed))
            if load is not None and load.staged is staged:
                self._requests.call_off(layer, seed)
            elif published is not None and published[0].staged is staged:
                load, change, kernel = published
                if not self._runtime.withdraw(change):
                    self._unload(layer, seed, called_off=False)
                    return
                del self._published[load.key]
                layer.kernel_cache.unpin(kernel.artifact_id)
            else:
                return
            if not self._requests.is_loading(layer, seed):
                layer.state.cancel_load(seed)
            self._records.report(layer, seed, "load called off")
        load.answer(False)

    def _unload(self, layer: KasminaLayer, seed: int, called_off: bool) -> bool:
        state = layer.state.lifecycle(seed)
        if self._runtime.target.seed(layer.site, seed) is None:
            if called_off:
                layer.state.cancel_load(seed)
                self._records.report(layer, seed, "load called off")
            elif state is _State.ERROR_RECOVERY:
                layer.state.set_lifecycle(seed, _State.DORMANT)
                layer.seed_errors.pop(seed, None)
            return called_off or state is _State.ERROR_RECOVERY
        if called_off and layer.state.in_force(seed):
            layer.state.cancel_load(seed)

        def applied() -> Transition:
            self._runtime.forget_schedules([layer.first_seed + seed])
            return self._records.enter(layer, seed, _State.DORMANT, "unloaded", None)

        def refused(error: Exception) -> None:
            if silenced:
                self._runtime.start_alpha(index, *alpha)
            self._records.refuse(layer, seed, error)

        change = Change(lambda plan: plan.without_seed(layer.site, seed), applied, refused=refused)
        index = layer.first_seed + seed
        alpha = layer.state.alpha(seed), layer.state.alpha(seed)
        silenced = self._runtime.commit_mode == "auto" and not self._runtime.ready(change.edit(self._runtime.target))
        if silenced:  # its effect goes at once, and its place when what has to be compiled first is there
            self._runtime.start_alpha(index, 0.0, 0.0)
        return self._queue.publish_when_ready(self._requests.latest(layer, seed), change)

    def fossilize(self, layer: KasminaLayer, seed: int) -> bool:
        """Stage making `seed`'s kernel permanent, at the alpha it has now. False unless it is active.

        Where that is the same, it becomes part of the host's weight and bias, see :class:`Fold`; else it stays a
        kernel, of a share that is a constant.
        """
        key = layer.site, seed
        with self._runtime.lock:
            active = layer.state.lifecycle(seed) is _State.ACTIVE
            planned = self._runtime.target.seed(*key)
            if not active or planned is None or key in self._requests.fossilizing:
                return False
            self._requests.fossilizing.add(key)
            self._requests.take_ticket(layer, seed)
            self._runtime.forget_schedules([layer.first_seed + seed])
            request = self._requests.latest(layer, seed)
            fold = Fold(layer, planned, layer.state.alpha(seed), lambda: self._requests.wanted(request))
            change = self._folded(fold, request) if fold.is_exact(self._runtime.target) else self._kept(fold)
            return self._queue.publish_when_ready(request, change)

    def _folded(self, fold: Fold, request: SeedRequest) -> Change:
        """The fossil becomes part of the host's weights, or a kernel for good where it turns out that it cannot."""
        layer, seed = fold.layer, fold.seed.seed

        def applied() -> Transition:
            transition = self._fossilized(fold)
            layer.pin(seed, None)
            return transition

        def refused(error: Exception) -> None:
            if isinstance(error, CannotFoldError):
                level = logging.WARNING if self._runtime.is_passed_over(layer.site) else logging.INFO
                _LOG.log(level, "the fossil in seed %d of %r stays a kernel: %s", seed, layer.layer_name, error)
                with self._runtime.lock:
                    self._queue.publish_when_ready(request, self._kept(fold))
            else:
                self._fossil_refused(fold, error)

        return Change(lambda plan: plan.without_seed(layer.site, seed), applied, fold, fold.is_safe, refused)

    def _kept(self, fold: Fold) -> Change:
        """The fossil stays a kernel, of a constant share."""
        fossil = replace(fold.seed, constant_alpha=fold.alpha)

        def refused(error: Exception) -> None:
            self._fossil_refused(fold, error)

        return Change(
            lambda plan: plan.with_seed(fold.layer.site, fossil), lambda: self._fossilized(fold), refused=refused
        )

    def _fossilized(self, fold: Fold) -> Transition:
        seed, kernel = fold.seed.seed, fold.seed.kernel.artifact_id
        self._requests.fossilizing.discard((fold.layer.site, seed))
        return self._records.enter(fold.layer, seed, _State.FOSSILIZED, "fossilized", kernel)

    def _fossil_refused(self, fold: Fold, error: Exception) -> None:
        self._requests.fossilizing.discard((fold.layer.site, fold.seed.seed))
        self._records.refuse(fold.layer, fold.seed.seed, error)

    def set_alpha(self, layer: KasminaLayer, seed: int, alpha: float | AlphaSchedule) -> None:
        """Set or schedule the alpha of `seed`, and of the kernel that it is loading, if it is.

        Warns once if it has no kernel and is loading none. Raises `IndexError`, `AlphaError`, `LifecycleError` when
        fossilized.
        """
        first = checked_alpha(alpha(0) if callable(alpha) else alpha)
        with self._runtime.lock:
            self._requests.refuse_fossil(layer, seed)
            if layer.state.lifecycle(seed) is _State.LOADING:
                self._later_alphas[layer.site, seed] = alpha, first
            self._runtime.start_alpha(layer.first_seed + seed, alpha, first)
            key = layer.site, seed
            idle = layer.state.lifecycle(seed) is not _State.LOADING and not layer.state.in_force(seed)
            untold = idle and key not in self._told_of_alpha
            if untold:
                self._told_of_alpha.add(key)
        if untold:
            _LOG.warning(
                "the alpha set for seed %d of %s has no effect: it has no kernel and is loading none, and the next one "
                "starts with the alpha of its own load; pass alpha=... to load_kernel or request_kernel, or set it "
                "after that", seed, layer.layer_name
            )  # fmt: skip

    def replace_all(self, layers: Sequence[KasminaLayer], seeds: Sequence[SeedReplacement]) -> None:
        """Put exactly `seeds` in force at `layers`, see :meth:`SeedReplacer.replace_all`."""
        self._replacer.replace_all(layers, seeds)
        if self._attach is not None and self._cache.source is not None:
            self._replacer.attach(seeds, self._attach, self._cache.source)

    # -- on background threads -----------------------------------------------------------------------------------

    def _fetched(self, request: LoadRequest) -> Edit | None:
        """Fetch the kernel of a load and check that it fits."""
        layer, seed = request.layer, request.seed
        if not self._requests.wanted(request):
            return None
        try:
            kernel = self._kernel(request)
        except Exception as error:  # noqa: BLE001  # law 4: whatever fails before the commit is kept as the seed's error
            self._failed(request, error)
            return None
        index = layer.first_seed + seed
        planned = SeedPlan(seed, kernel, request.isolate, kernel.graph.uses_host, index)

        def applied() -> Transition:
            self._published.pop(request.key, None)
            asked = request.alpha, request.first_alpha
            self._runtime.start_alpha(index, *self._later_alphas.pop(request.key, asked))
            layer.seed_errors.pop(seed, None)
            return self._records.enter(layer, seed, _State.ACTIVE, "committed", kernel.artifact_id)

        def failed(error: Exception | None) -> None:
            layer.kernel_cache.unpin(kernel.artifact_id)
            self._failed(request, error)

        def before_publishing() -> None:  # the model may have been moved or cast meanwhile
            weight = layer.weight
            if any((each.device, each.dtype) != (weight.device, weight.dtype) for each in kernel.parameters):
                kernel.module.to(weight.device, weight.dtype)
            self._published[request.key] = request, change, kernel

        change = Change(lambda plan: plan.with_seed(layer.site, planned), applied)
        return Edit(request, change, failed, before_publishing)

    def _kernel(self, request: LoadRequest) -> LoadedKernel:
        layer = request.layer
        cached = layer.kernel_cache.fetch(request.reference, pin=True, wanted=lambda: self._requests.wanted(request))
        try:
            weight = layer.weight
            if layer.absence is not None:
                raise KernelMismatchError(layer.absence)
            cached.check_fits(layer.input_dim, layer.output_dim, weight.dtype, layer.layer_name)
            kernel = cached.place(weight.device, trainable=request.trainable)
            source = layer.kernel_cache.source
            rest()
            if self._attach is not None and source is not None and self._runtime.runs_eagerly():
                self._attach(source, kernel)
        except BaseException:
            layer.kernel_cache.unpin(cached.artifact_id)
            raise
        return kernel

    def _failed(self, request: LoadRequest, error: Exception | None) -> None:
        """A load has ended without success; without an error, because it was called off or the process ends."""
        layer, seed = request.layer, request.seed
        with self._runtime.lock:
            if not self._requests.end(request):
                request.answer(False)  # if it is not answered: it was called off
                return
            if error is not None:
                self._records.keep_error(layer, seed, error)
                layer.state.fail_load(seed)
        if error is not None:
            reason = layer.seed_errors[seed]
            _LOG.warning(
                "kernel %s was not loaded into seed %d of %r: %s", request.reference, seed, layer.layer_name, reason
            )
            self._records.report(layer, seed, reason)
        request.answer(False)
