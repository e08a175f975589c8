"""The operations on a seed: `Load`, `Unload`, `Fossilize`, `Restore`, each from the request until it is in force.

Whatever fails leaves the model as it was: the seed goes to `ERROR_RECOVERY`, or stays active if its old kernel still
is, and keeps the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from esper.errors import EsperError
from esper.execution.background import rest
from esper.execution.kernels.loaded_kernel import KernelMismatchError, LoadedKernel
from esper.execution.kernels.service_locator import AttachKernel
from esper.execution.lifecycle import SeedLifecycleState, Transition
from esper.execution.plans.alpha import AlphaSchedule, described_alpha
from esper.execution.plans.alphas import load_reading
from esper.execution.plans.plan import Plan, SeedPlan
from esper.execution.plans.runtime import Runtime
from esper.execution.seeds.folding import CannotFoldError, Fold
from esper.execution.seeds.journal import SeedJournal
from esper.execution.seeds.progress import Course, KernelRequest, Stage
from esper.execution.seeds.seed import Operation, Seed, Ticket

__all__ = ["Fossilize", "Load", "LoadOptions", "Restore", "SetAlpha", "Unload"]

_LOG = logging.getLogger("esper.execution")
_State = SeedLifecycleState


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """A kernel, by `reference`, and how it is to be attached; `first_alpha` is `alpha`'s first value, checked."""

    reference: str
    alpha: float | AlphaSchedule
    first_alpha: float
    trainable: bool
    isolate: bool


class Load(Operation):
    """A kernel is fetched, checked, and put into the seed."""

    def __init__(
        self, seed: Seed, options: LoadOptions, runtime: Runtime, journal: SeedJournal, attach: AttachKernel | None
    ) -> None:
        super().__init__(seed)
        self.course = Course()
        self.staged = self.request = KernelRequest([seed.layer_name], [self.course])
        self._options = options
        self._runtime = runtime
        self._journal = journal
        self._attach = attach
        self._kernel: LoadedKernel | None = None
        self._planned: SeedPlan

    @property
    def reference(self) -> str:
        """What the kernel is asked for by."""
        return self._options.reference

    def fetch(self) -> bool:
        """Fetch the kernel and check that it fits."""
        if not self.is_wanted:
            self._end(None)
            return False
        self.note(Stage.FETCHING)
        try:
            kernel = self._kernel = self._fitting()
        except BaseException as error:  # noqa: BLE001  # law 4: whatever fails before the commit is the seed's error
            self._end(error if isinstance(error, Exception) else EsperError(f"the kernel's source raised {error!r}"))
            return False
        seed, uses_host = self.seed, kernel.graph.uses_host
        self._planned = SeedPlan(seed.index, kernel, self._options.isolate, uses_host, seed.alpha_index)
        self.note(Stage.FETCHED)
        return True

    def _fitting(self) -> LoadedKernel:
        layer, cache = self.layer, self.layer.kernel_cache
        cached = cache.fetch(self._options.reference, pin=True, wanted=lambda: self.is_wanted)
        try:
            if layer.absence is not None:
                raise KernelMismatchError(layer.absence)
            device, dtype = layer.placement
            cached.check_fits(layer.input_dim, layer.output_dim, dtype, layer.layer_name)
            kernel = cached.place(device, trainable=self._options.trainable)
            load_reading(device)
            if self._runtime.share is not None:
                self._runtime.share(kernel)
            rest()
            source = cache.source
            if self._attach is not None and source is not None and self._runtime.model.runs_eagerly():
                self._attach(source, kernel)
        except BaseException:
            cache.unpin(cached.artifact_id)
            raise
        return kernel

    def edit(self, plan: Plan) -> Plan:
        return plan.with_seed(self.seed.site, self._planned)

    def describe(self) -> str:
        asked, alpha = self._options, described_alpha(self._options.alpha)
        kernel = asked.reference if self._kernel is None else self._kernel.artifact_id
        flags = f"alpha={alpha}, trainable={asked.trainable}, isolate={asked.isolate}"
        return f"load kernel {kernel} into {self.seed} with {flags}"

    def note(self, stage: Stage) -> None:
        self.course.enter(stage)

    def answer(self, staged: bool) -> None:
        if not staged:
            self.note(Stage.CALLED_OFF)
        super().answer(staged)

    def publish(self) -> None:
        if self.seed.loading is self:
            self.seed.loading = None
        self.seed.published = self
        if not self.is_held:
            self.note(Stage.STAGED)
        placement = self.layer.placement  # the model may have been moved or cast meanwhile
        if any((each.device, each.dtype) != placement for each in self._loaded.parameters):
            self._loaded.module.to(*placement)

    def speaks_for_its_change(self) -> bool:
        """Whether other ranks are to be told why it comes to nothing; asked once, when it does."""
        return True

    @property
    def _loaded(self) -> LoadedKernel:
        assert self._kernel is not None
        return self._kernel

    @property
    def at_site(self) -> tuple[int, SeedPlan]:
        """What comes into force, and where; once it is fetched."""
        return self.seed.site, self._planned

    def write_tensors(self) -> None:
        self._runtime.model.admit_kernels([self.at_site])

    def withdraw(self) -> None:
        self.note(Stage.CALLED_OFF)
        self.seed.published = None
        self.seed.kernel_cache.unpin(self._loaded.artifact_id)

    def apply(self) -> Transition:
        seed, asked = self.seed, (self._options.alpha, self._options.first_alpha)
        if seed.published is self:
            seed.published = None
        self._runtime.start_alpha(seed.alpha_index, *(seed.later_alpha or asked))
        seed.error = None
        self.note(Stage.IN_FORCE)
        return self._journal.enter(self, _State.ACTIVE, "committed", self._loaded.artifact_id)

    def fail(self, error: Exception | None) -> None:
        self.seed.kernel_cache.unpin(self._loaded.artifact_id)
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        seed, gate = self.seed, self._runtime.gate
        if gate is not None and self.change and self.speaks_for_its_change():
            gate.refuse(self.change, self.describe(), str(error) if error else "something else was asked since")
        with self._runtime.lock:
            is_under_way = self in (seed.loading, seed.published)  # else it was cancelled
            if seed.loading is self:
                seed.loading = None
            if seed.published is self:
                seed.published = None
            if is_under_way and error is not None:
                self._journal.keep_error(seed, error)
            if is_under_way and seed.loading is None:  # else the seed awaits another
                (seed.state.cancel_load if error is None else seed.state.fail_load)(seed.index)
        if is_under_way and error is not None:
            self.course.enter(Stage.FAILED, f"{type(error).__name__}: {error}")
            reason, kernel = seed.error, self._options.reference
            _LOG.warning("kernel %s was not loaded into seed %d of %r: %s", kernel, seed.index, seed.layer_name, reason)
            self._journal.report(seed, reason or "")
        self.answer(False)


class Unload(Operation):
    """The seed becomes dormant."""

    def __init__(self, seed: Seed, runtime: Runtime, journal: SeedJournal) -> None:
        super().__init__(seed)
        self._runtime = runtime
        self._journal = journal
        self._alpha: float | None = None  # what its alpha was, if it has none for the time being

    def edit(self, plan: Plan) -> Plan:
        return plan.without_seed(self.seed.site, self.seed.index)

    def describe(self) -> str:
        return f"unload {self.seed}"

    def wait(self) -> None:
        """Its effect goes at once, and its place when what has to be compiled first is there."""
        if self._runtime.commit_mode == "auto" and self._runtime.gate is None:
            self._alpha = self.seed.alpha
            self._runtime.start_alpha(self.seed.alpha_index, 0.0, 0.0)

    def apply(self) -> Transition:
        self._runtime.forget_schedules([self.seed.alpha_index])
        return self._journal.enter(self, _State.DORMANT, "unloaded", None)

    def fail(self, error: Exception | None) -> None:
        if error is not None:
            if self._alpha is not None:
                self._runtime.start_alpha(self.seed.alpha_index, self._alpha, self._alpha)
            self._journal.refuse(self.seed, error)


class Fossilize(Operation):
    """The seed's kernel becomes permanent: part of the host's weights by `fold`, or without one a kernel for good.

    Where it turns out at the commit that it cannot be folded, `restage` gets another operation, for a kernel for good.
    """

    def __init__(
        self,
        seed: Seed,
        fossil: SeedPlan,
        fold: Fold | None,
        runtime: Runtime,
        journal: SeedJournal,
        restage: Callable[[Operation], object],
        ticket: Ticket | None = None,
    ) -> None:
        super().__init__(seed, ticket)
        self._fossil = fossil
        self._fold = fold
        self._runtime = runtime
        self._journal = journal
        self._restage = restage
        self.writes_tensors = fold is not None

    def edit(self, plan: Plan) -> Plan:
        if self._fold is not None:
            return plan.without_seed(self.seed.site, self.seed.index)
        return plan.with_seed(self.seed.site, self._fossil)

    def describe(self) -> str:
        return f"fossilize {self.seed} at alpha={self._fossil.constant_alpha}"

    def is_safe(self) -> bool:
        return self._fold is None or self._fold.is_safe()

    def write_tensors(self) -> None:
        if self._fold is not None and self.is_wanted:
            self._fold()

    def apply(self) -> Transition:
        self.seed.is_fossilizing = False
        kernel_id = self._fossil.kernel.artifact_id
        transition = self._journal.enter(self, _State.FOSSILIZED, "fossilized", kernel_id)
        if self._fold is not None:
            self.seed.pin(None, self)
        return transition

    def fail(self, error: Exception | None) -> None:
        if isinstance(error, CannotFoldError):
            seed, runtime = self.seed, self._runtime
            level = logging.WARNING if runtime.is_passed_over(seed.site) else logging.INFO
            _LOG.log(level, "the fossil in seed %d of %r stays a kernel: %s", seed.index, seed.layer_name, error)
            kept = Fossilize(seed, self._fossil, None, runtime, self._journal, self._restage, self.ticket)
            with runtime.lock:
                self._restage(kept)
        elif error is not None:
            self.seed.is_fossilizing = False
            self._journal.refuse(self.seed, error)


class SetAlpha(Operation):
    """The share of the seed's kernel, or what moves it, changes at a commit: where ranks do that together."""

    def __init__(self, seed: Seed, alpha: float | AlphaSchedule, first: float, runtime: Runtime) -> None:
        super().__init__(seed)
        self._asked = alpha, first
        self._runtime = runtime

    @property
    def is_wanted(self) -> bool:
        return True

    def describe(self) -> str:
        return f"set alpha={described_alpha(self._asked[0])} for {self.seed}"

    def edit(self, plan: Plan) -> Plan:
        return plan

    def apply(self) -> None:
        if self.seed.lifecycle is _State.LOADING:
            self.seed.later_alpha = self._asked
        self._runtime.start_alpha(self.seed.alpha_index, *self._asked)

    def fail(self, error: Exception | None) -> None:
        if error is not None:
            _LOG.warning("the alpha of %s stays as it is: %s", self.seed, error)


class Restore(Operation):
    """The seed becomes what it was elsewhere: `planned` with the `fields` of its state, dormant if that is None."""

    def __init__(
        self, seed: Seed, planned: SeedPlan | None, fields: Mapping[str, Tensor], reason: str, journal: SeedJournal
    ) -> None:
        super().__init__(seed)
        self._planned = planned
        self._fields = fields
        self._reason = reason
        self._journal = journal
        self._is_cached = planned is not None and seed.kernel_cache.adopt(planned.kernel)

    def edit(self, plan: Plan) -> Plan:
        if self._planned is None:
            return plan.without_seed(self.seed.site, self.seed.index)
        return plan.with_seed(self.seed.site, self._planned)

    def apply(self) -> Transition:
        kernel_id = None if self._planned is None else self._planned.kernel.artifact_id
        return self._journal.overwrite(self, self._fields, kernel_id, self._is_cached, self._reason)
