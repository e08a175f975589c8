"""Loading a kernel into a seed: everything between the request and the moment at which it is staged.

Requests are checked on the caller's thread (which layer, which seed, which alpha), carried out on one background
thread, and end in a change published to the runtime. Requests that wait at the same time are prepared together, so that
what is compiled for them is compiled once. Whatever fails leaves the model as it was: the seed goes to
`ERROR_RECOVERY`, or stays active if its old kernel still is, and keeps the reason.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from esper.contracts.messages import SeedReport, TopicNames
from esper.errors import EsperError
from esper.execution.alpha import AlphaSchedule
from esper.execution.background import BackgroundThread
from esper.execution.defaults import AttachKernel, TelemetrySink, is_default
from esper.execution.fossils import folded, is_affine
from esper.execution.kernel_cache import KernelCache
from esper.execution.lifecycle import LifecycleError, SeedLifecycleState, Transition
from esper.execution.loaded_kernel import LoadedKernel
from esper.execution.plan import Plan, SeedPlan
from esper.execution.runtime import CalledOffError, Change, Runtime, ShutDownError, now
from esper.execution.state_layout import FIELDS, checked_alpha

if TYPE_CHECKING:
    from esper.execution.kasmina_layer import KasminaLayer

__all__ = ["SeedReplacement", "Stager"]

_LOG = logging.getLogger("esper.execution")
_State = SeedLifecycleState


@dataclass(frozen=True, slots=True)
class _Request:
    """What is asked of one seed. `ticket` tells whether it is still the latest request for it."""

    layer: KasminaLayer
    seed: int
    ticket: int
    staged: Future[bool]

    @property
    def key(self) -> tuple[int, int]:
        return self.layer.site, self.seed


@dataclass(frozen=True, slots=True)
class _Load(_Request):
    reference: str
    alpha: float | AlphaSchedule
    first_alpha: float
    trainable: bool
    isolate: bool


@dataclass(frozen=True, slots=True)
class _Edit:
    """A request whose change is known: `change` to be published, unless `failed` has to be told why not."""

    request: _Request
    change: Change
    failed: Callable[[Exception | None], None]
    before_publishing: Callable[[], None] = lambda: None


def _after_a_step(weight: Tensor) -> Callable[[], bool]:
    """To be asked where a forward begins: whether `weight` was written to since it was asked before.

    Then an optimizer has taken a step, and no backward is to come that needs the weight as an earlier forward saw it.
    """
    seen: int | None = None

    def stepped() -> bool:
        nonlocal seen
        before, seen = seen, weight._version
        return before is not None and before != seen

    return stepped


@dataclass(frozen=True, slots=True)
class SeedReplacement:
    """A seed as it was elsewhere: in a checkpoint, or in the model that this one is a copy of."""

    layer: KasminaLayer
    planned: SeedPlan
    state: Mapping[str, Tensor]
    """The fields of a `KasminaStateLayout` of one seed."""
    was_scheduled: bool = False


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
        self._thread = BackgroundThread("esper-staging")
        self._queue: deque[Callable[[], _Edit | None]] = deque()
        self._waiting: tuple[frozenset[tuple[int, int]], Future[None]] | None = None  # seeds being prepared for
        self._tickets: dict[tuple[int, int], int] = {}  # the number of each seed's latest request
        self._under_way: dict[tuple[int, int], _Load] = {}  # loads without an end; who takes one out answers its future
        self._fossilizing: set[tuple[int, int]] = set()  # staged, not yet committed

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
        first = checked_alpha(alpha(0) if callable(alpha) else alpha)
        with self._runtime.lock:
            self._refuse_fossil(layer, seed)
            if layer.state.lifecycle(seed) is not _State.LOADING:
                layer.state.set_lifecycle(seed, _State.LOADING)
            replaced, ticket = self._call_off(layer, seed)
            request = _Load(layer, seed, ticket, Future(), reference, alpha, first, trainable, isolate)
            request.staged.set_running_or_notify_cancel()  # not to be cancelled from outside: unload() calls a load off
            self._under_way[request.key] = request
        if replaced is not None:
            replaced.staged.set_result(False)
        self._enqueue(lambda: self._fetched(request))
        return request.staged

    def unload(self, layer: KasminaLayer, seed: int) -> bool:
        """Stage the return of `seed` to dormancy; a load under way is called off. False if there is nothing to unload.

        Raises `IndexError` for a seed that does not exist and `LifecycleError` for a fossilized seed.
        """
        with self._runtime.lock:
            self._refuse_fossil(layer, seed)
            load, _ = self._call_off(layer, seed)
            unloads = self._unload(layer, seed, called_off=load is not None)
        if load is not None:
            load.staged.set_result(False)
        return unloads

    def _unload(self, layer: KasminaLayer, seed: int, called_off: bool) -> bool:
        state = layer.state.lifecycle(seed)
        if self._runtime.target.seed(layer.site, seed) is None:
            if called_off:
                layer.state.cancel_load(seed)
                self._report(layer, seed, "load called off")
            elif state is _State.ERROR_RECOVERY:
                layer.state.set_lifecycle(seed, _State.DORMANT)
                layer.seed_errors.pop(seed, None)
            return called_off or state is _State.ERROR_RECOVERY
        if called_off and layer.state.in_force(seed):
            layer.state.cancel_load(seed)

        def applied() -> Transition:
            self._runtime.forget_schedules([layer.first_seed + seed])
            return self._enter(layer, seed, _State.DORMANT, "unloaded", None)

        def refused(error: Exception) -> None:
            self._refuse_change(layer, seed, error)

        change = Change(lambda plan: plan.without_seed(layer.site, seed), applied, refused=refused)
        return self._publish_when_ready(layer, seed, change)

    def fossilize(self, layer: KasminaLayer, seed: int) -> bool:
        """Stage making `seed`'s kernel permanent, at the alpha it has now. False unless it is active.

        Where it can be, it becomes part of the host's weight and bias, see :meth:`_foldable`; else it stays a kernel,
        of a share that is a constant.
        """
        key = layer.site, seed
        with self._runtime.lock:
            active = layer.state.lifecycle(seed) is _State.ACTIVE
            planned = self._runtime.target.seed(*key)
            if not active or planned is None or key in self._fossilizing:
                return False
            self._fossilizing.add(key)
            self._take_ticket(layer, seed)
            self._runtime.forget_schedules([layer.first_seed + seed])
            alpha, kernel = layer.state.alpha(seed), planned.kernel
            fossil = replace(planned, constant_alpha=alpha)
            fold = self._foldable(layer, planned)

            def applied() -> Transition:
                self._fossilizing.discard(key)
                transition = self._enter(layer, seed, _State.FOSSILIZED, "fossilized", kernel.artifact_id)
                if fold:
                    layer.pin(seed, None)
                return transition

            def first() -> None:
                layer.absorb(*folded(layer.weight, layer.bias, kernel, alpha))

            def refused(error: Exception) -> None:
                self._fossilizing.discard(key)
                self._refuse_change(layer, seed, error)

            if fold:
                safe = _after_a_step(layer.weight)
                change = Change(lambda plan: plan.without_seed(*key), applied, first, safe, refused)
            else:
                change = Change(lambda plan: plan.with_seed(layer.site, fossil), applied, refused=refused)
            return self._publish_when_ready(layer, seed, change)

    def _foldable(self, layer: KasminaLayer, planned: SeedPlan) -> bool:
        """Whether the host's own weight and bias can take in a fossil without changing what anything else computes.

        Its kernel is affine and gets the layer's input undetached; the weights stand nowhere else; no seed before it is
        blended in, and none beside it reads the layer's own output.
        """
        others = [each for each in self._runtime.target.sites[layer.site] if each.seed != planned.seed]
        own = [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
        return (
            is_affine(planned.kernel.graph, constant=layer.bias is not None)
            and not planned.isolate
            and not any(each.seed < planned.seed or each.uses_host for each in others)
            and all(type(each) is nn.Parameter and self._runtime.uses_of(each) == 1 for each in own)
        )

    def set_alpha(self, layer: KasminaLayer, seed: int, alpha: float | AlphaSchedule) -> None:
        """Set or schedule the alpha of `seed`. Raises `IndexError`, `AlphaError`, `LifecycleError` when fossilized."""
        first = checked_alpha(alpha(0) if callable(alpha) else alpha)
        with self._runtime.lock:
            self._refuse_fossil(layer, seed)
            self._runtime.start_alpha(layer.first_seed + seed, alpha, first)

    def replace_all(self, layers: Sequence[KasminaLayer], seeds: Sequence[SeedReplacement]) -> None:
        """Put exactly `seeds` in force at `layers`, all at once, before this returns; also with `commit="manual"`.

        Whatever is staged or under way at these layers is called off. For the thread that runs the model, between two
        forwards. Raises `CommitError` inside a backward, and what an executor raises that cannot follow the new plan.
        """
        self._runtime.refuse_in_backward()
        every = [(layer, seed) for layer in layers for seed in range(layer.num_seeds)]
        plan = self._runtime.target
        for layer, seed in every:
            plan = plan.without_seed(layer.site, seed)
        for each in seeds:
            plan = plan.with_seed(each.layer.site, each.planned)
        self._runtime.prepare(plan)
        changes = [self._replacement(each) for each in seeds]
        wanted = {(each.layer.site, each.planned.seed) for each in seeds}
        called_off = []
        with self._runtime.lock:
            for layer, seed in every:
                load, _ = self._call_off(layer, seed)
                if load is not None:
                    called_off.append(load)
                    layer.state.cancel_load(seed)
                if (layer.site, seed) not in wanted and self._runtime.target.seed(layer.site, seed) is not None:
                    changes.append(self._removal(layer, seed))
            self._runtime.publish(*changes)
        for load in called_off:
            load.staged.set_result(False)
        self._runtime.commit()
        for each in seeds:
            if each.was_scheduled:
                _LOG.warning(
                    "seed %d of %s had an alpha schedule, which is not saved: its alpha stays at %g until set_alpha()",
                    each.planned.seed, each.layer.layer_id, float(each.state["alpha_blend"]),
                )  # fmt: skip
        source = self._cache.source
        if self._attach is not None and source is not None and not is_default(source):  # which would be opened for this
            self._thread.submit(lambda: self._attach_restored(seeds))

    def _replacement(self, new: SeedReplacement) -> Change:
        layer, seed, kernel = new.layer, new.planned.seed, new.planned.kernel
        cached = layer.kernel_cache.adopt(kernel)

        def applied() -> Transition:
            return self._overwrite(layer, seed, new.state, kernel.artifact_id, cached, "restored")

        return Change(lambda plan: plan.with_seed(layer.site, new.planned), applied)

    def _removal(self, layer: KasminaLayer, seed: int) -> Change:
        zero = ("lifecycle_states", "active_kernel_id")
        dormant = {name: torch.zeros(1, dtype=FIELDS[name], device="cpu") for name in zero}

        def applied() -> Transition:
            return self._overwrite(layer, seed, dormant, None, False, "dormant in what was restored")

        return Change(lambda plan: plan.without_seed(layer.site, seed), applied)

    # -- on the background thread ----------------------------------------------------------------------------------

    def _attach_restored(self, seeds: Sequence[SeedReplacement]) -> None:
        """Give kernels that came without their attachments these, and stage that they are used."""
        attached: list[tuple[int, SeedPlan, SeedPlan]] = []  # the new values have code made for them anew
        for each in seeds:
            kernel, planned = each.planned.kernel, each.planned
            try:
                if self._attach is not None and self._cache.source is not None and not kernel.attached:
                    self._attach(self._cache.source, kernel)
                    attached += [(each.layer.site, planned, replace(planned))] if kernel.attached else []
            except Exception as error:  # noqa: BLE001  # the kernel's graph runs, which is slower and as good
                _LOG.info("kernel %s runs without its attachment: %r", kernel.artifact_id[:12], error)

        def edit(plan: Plan) -> Plan:
            for site, old, new in attached:
                plan = plan.with_seed(site, new) if plan.seed(site, old.seed) == old else plan
            return plan

        if attached:
            self._runtime.prepare(edit(self._runtime.target))
            self._runtime.publish(Change(edit, lambda: None))

    def _enqueue(self, make: Callable[[], _Edit | None]) -> None:
        self._queue.append(make)
        self._thread.submit(self._work)

    def _work(self) -> None:
        """Take what waits in the queue, and what comes meanwhile, and stage it together."""
        edits: list[_Edit] = []
        while self._queue:
            edit = self._queue.popleft()()
            if edit is not None:
                edits.append(edit)
        self._stage(edits)

    def _stage(self, edits: Sequence[_Edit]) -> None:
        while edits := self._still_wanted(edits):
            base, executors, plan = self._runtime.target, self._runtime.executors_added, self._runtime.target
            for edit in edits:
                plan = edit.change.edit(plan)
            try:
                with self._called_off(edits) as called_off:
                    self._runtime.prepare(plan, called_off)
            except CalledOffError:
                continue
            except ShutDownError as error:
                _LOG.info("not staged: %s", error)
                for edit in edits:
                    edit.failed(None)
                return
            except Exception as error:  # noqa: BLE001  # law 4: whatever fails before the commit is kept as the seed's error
                if len(edits) > 1:  # it need not be the fault of all
                    for edit in edits:
                        self._stage([edit])
                else:
                    edits[0].failed(error)
                return

            if self._publish_prepared(edits, base, executors):
                return

    def _publish_prepared(self, edits: Sequence[_Edit], base: Plan, executors: int) -> bool:
        """Stage what was prepared on top of `base`, unless that is not what would come into force any more."""

        def valid() -> bool:
            if base is not self._runtime.target or executors != self._runtime.executors_added:
                return False
            if not all(self._wanted(edit.request) for edit in edits):
                return False
            for edit in edits:
                self._under_way.pop(edit.request.key, None)
                edit.before_publishing()
            return True

        published = self._runtime.publish(*(edit.change for edit in edits), valid=valid)
        if published:
            for edit in edits:
                edit.request.staged.set_result(True)
        return published

    def _still_wanted(self, edits: Sequence[_Edit]) -> list[_Edit]:
        wanted = [edit for edit in edits if self._wanted(edit.request)]
        for edit in edits:
            if edit not in wanted:
                edit.failed(None)
        return wanted

    @contextlib.contextmanager
    def _called_off(self, edits: Sequence[_Edit]) -> Iterator[Future[None]]:
        """A future that is done as soon as a later request is made for one of the seeds of `edits`."""
        future: Future[None] = Future()
        with self._runtime.lock:
            self._waiting = frozenset(edit.request.key for edit in edits), future
            if not all(self._wanted(edit.request) for edit in edits):
                future.set_result(None)
        try:
            yield future
        finally:
            with self._runtime.lock:
                self._waiting = None

    def _publish_when_ready(self, layer: KasminaLayer, seed: int, change: Change) -> bool:
        """Stage a change at once if every executor could follow it, else on the background thread. Lock held."""
        if self._runtime.ready(change.edit(self._runtime.target)):
            return self._runtime.publish(change)
        request = _Request(layer, seed, self._tickets[layer.site, seed], Future())

        def failed(error: Exception | None) -> None:
            if error is not None:
                change.refused(error)

        self._enqueue(lambda: _Edit(request, change, failed))
        return True

    def _refuse_change(self, layer: KasminaLayer, seed: int, error: Exception) -> None:
        """A change of a seed in force came to nothing: keep the seed as it is, and the reason."""
        self._keep_error(layer, seed, error)
        layer.state.record_error(seed)
        _LOG.warning("seed %d of %s stays as it is: %s", seed, layer.layer_id, layer.seed_errors[seed])
        self._report(layer, seed, layer.seed_errors[seed])

    def _fetched(self, request: _Load) -> _Edit | None:
        """Fetch the kernel of a load and check that it fits."""
        layer, seed = request.layer, request.seed
        if not self._wanted(request):
            return None
        try:
            kernel = self._kernel(request)
        except Exception as error:  # noqa: BLE001  # law 4, as above
            self._failed(request, error)
            return None
        index = layer.first_seed + seed
        planned = SeedPlan(seed, kernel, request.isolate, kernel.graph.uses_host, index)

        def applied() -> Transition:
            self._runtime.start_alpha(index, request.alpha, request.first_alpha)
            layer.seed_errors.pop(seed, None)
            return self._enter(layer, seed, _State.ACTIVE, "committed", kernel.artifact_id)

        def failed(error: Exception | None) -> None:
            layer.kernel_cache.unpin(kernel.artifact_id)
            self._failed(request, error)

        def before_publishing() -> None:  # the model may have been moved or cast meanwhile
            kernel.module.to(layer.weight.device, layer.weight.dtype)

        change = Change(lambda plan: plan.with_seed(layer.site, planned), applied)
        return _Edit(request, change, failed, before_publishing)

    def _kernel(self, request: _Load) -> LoadedKernel:
        layer = request.layer
        cached = layer.kernel_cache.fetch(request.reference, pin=True)
        try:
            weight = layer.weight
            cached.check_fits(layer.input_dim, layer.output_dim, weight.dtype, layer.layer_id)
            kernel = cached.place(weight.device, trainable=request.trainable)
            source = layer.kernel_cache.source
            if self._attach is not None and source is not None and self._runtime.runs_eagerly():
                self._attach(source, kernel)
        except BaseException:
            layer.kernel_cache.unpin(cached.artifact_id)
            raise
        return kernel

    def _failed(self, request: _Load, error: Exception | None) -> None:
        """A load has ended without success; without an error, because it was called off or the process ends."""
        layer, seed = request.layer, request.seed
        with self._runtime.lock:
            if self._under_way.get(request.key) is not request:
                return  # it was called off, and is answered
            del self._under_way[request.key]
            if error is not None:
                self._keep_error(layer, seed, error)
                layer.state.fail_load(seed)
        if error is not None:
            reason = layer.seed_errors[seed]
            _LOG.warning(
                "kernel %s was not loaded into seed %d of %s: %s", request.reference, seed, layer.layer_id, reason
            )
            self._report(layer, seed, reason)
        request.staged.set_result(False)

    def _keep_error(self, layer: KasminaLayer, seed: int, error: Exception) -> None:
        if not isinstance(error, EsperError):
            _LOG.error("staging failed with an error that is not Esper's own", exc_info=error)
        layer.seed_errors[seed] = f"{type(error).__name__}: {error}"

    # -- bookkeeping -----------------------------------------------------------------------------------------------

    def _refuse_fossil(self, layer: KasminaLayer, seed: int) -> None:
        if layer.state.lifecycle(seed) is _State.FOSSILIZED or (layer.site, seed) in self._fossilizing:
            raise LifecycleError(f"seed {seed} of layer {layer.layer_id!r} is FOSSILIZED, which is for good")

    def _take_ticket(self, layer: KasminaLayer, seed: int) -> int:
        key = (layer.site, seed)
        self._tickets[key] = self._tickets.get(key, 0) + 1
        if self._waiting is not None and key in self._waiting[0] and not self._waiting[1].done():
            self._waiting[1].set_result(None)
        return self._tickets[key]

    def _wanted(self, request: _Request) -> bool:
        return self._tickets[request.key] == request.ticket

    def _call_off(self, layer: KasminaLayer, seed: int) -> tuple[_Load | None, int]:
        """End whatever was asked of a seed before: the load that was under way, and a ticket for what comes instead.

        Under the lock; once that is let go, the load's future has to be answered.
        """
        return self._under_way.pop((layer.site, seed), None), self._take_ticket(layer, seed)

    def _overwrite(
        self,
        layer: KasminaLayer,
        seed: int,
        fields: Mapping[str, Tensor],
        kernel_id: str | None,
        cached: bool,
        why: str,
    ) -> Transition:
        """As :meth:`_enter`, without asking the table of transitions; a kernel that is not cached has no pin."""
        state, old = layer.state.view(seed, seed + 1), layer.state.lifecycle(seed)
        state.load_state_dict({**state.state_dict(), **fields})
        self._runtime.forget_schedules([layer.first_seed + seed])
        self._fossilizing.discard((layer.site, seed))
        layer.seed_errors.pop(seed, None)
        layer.pin(seed, kernel_id if cached else None)
        self._report(layer, seed, why)
        return Transition(layer.layer_id, seed, old, state.lifecycle(0), now(), why, kernel_id)

    def _enter(
        self, layer: KasminaLayer, seed: int, new: SeedLifecycleState, reason: str, kernel_id: str | None
    ) -> Transition:
        old = layer.state.lifecycle(seed)
        if new is _State.ACTIVE and old is not _State.LOADING:
            layer.state.set_lifecycle(seed, _State.LOADING)  # an earlier change to the same seed was committed first
        layer.state.set_lifecycle(seed, new, kernel_id if new is _State.ACTIVE else None)
        if (layer.site, seed) in self._under_way:
            layer.state.set_lifecycle(seed, _State.LOADING)
        layer.state.touch_epoch(seed, self._runtime.version)
        if new is not _State.FOSSILIZED:
            layer.pin(seed, kernel_id)
        self._report(layer, seed, reason)
        return Transition(layer.layer_id, seed, old, new, now(), reason, kernel_id)

    def _report(self, layer: KasminaLayer, seed: int, reason: str) -> None:
        if self.sink is not None:
            report = SeedReport(
                layer_id=layer.layer_id,
                seed_idx=seed,
                state=layer.state.lifecycle(seed).name,
                error_count=layer.state.errors(seed),
                reason=reason,
            )
            self.sink.publish(TopicNames.INNOVATION_FIELD_REPORTS, report)
