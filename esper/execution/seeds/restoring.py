"""Seeds as they were elsewhere are put in force, all at once: from a checkpoint, or from the original of a copy."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esper.execution.background import FETCHING
from esper.execution.kernels.service_locator import AttachKernel, is_default
from esper.execution.kernels.sources import KernelSource
from esper.execution.lifecycle import SeedLifecycleState, Transition
from esper.execution.plans.alpha import SavedRamp
from esper.execution.plans.plan import Plan, SeedPlan
from esper.execution.plans.plan_edit import Change
from esper.execution.plans.runtime import Runtime
from esper.execution.seeds.journal import SeedRecords
from esper.execution.seeds.queue import StagingQueue
from esper.execution.seeds.requests import SeedRequests
from esper.execution.state_layout import FIELDS

if TYPE_CHECKING:
    from esper.execution.kasmina_layer import KasminaLayer

__all__ = ["SeedReplacement", "SeedReplacer"]

_LOG = logging.getLogger("esper.execution")


@dataclass(frozen=True, slots=True)
class SeedReplacement:
    """A seed as it was elsewhere: in a checkpoint, or in the model that this one is a copy of."""

    layer: KasminaLayer
    planned: SeedPlan
    state: Mapping[str, Tensor]
    """The fields of a `KasminaStateLayout` of one seed."""
    ramp: SavedRamp | None = None
    """What moves its alpha on from where it was."""
    lost_schedule: bool = False
    """Whether something else moved it."""


class SeedReplacer:
    """Replaces the seeds of one model. What has to be fetched is fetched afterwards, and then goes through `queue`."""

    def __init__(self, runtime: Runtime, requests: SeedRequests, records: SeedRecords, queue: StagingQueue) -> None:
        self._runtime = runtime
        self._requests = requests
        self._records = records
        self._queue = queue

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
                load, _ = self._requests.call_off(layer, seed)
                if load is not None:
                    called_off.append(load)
                    layer.state.cancel_load(seed)
                in_force = any(plan.seed(layer.site, seed) for plan in (self._runtime.plan, self._runtime.target))
                folded = layer.state.lifecycle(seed) is SeedLifecycleState.FOSSILIZED  # into a weight since replaced
                if (layer.site, seed) not in wanted and (in_force or folded):
                    changes.append(self._removal(layer, seed))
            self._runtime.publish(*changes)
        for load in called_off:
            load.answer(False)
        self._runtime.commit()
        for each in seeds:
            if each.ramp is not None:
                schedule, alpha = each.ramp.schedule(), float(each.state["alpha_blend"])
                self._runtime.start_alpha(each.planned.alpha_index, schedule.alpha, alpha, schedule.step)
            elif each.lost_schedule:
                _LOG.warning(
                    "seed %d of %s had an alpha schedule that is no ramp of Esper's, which is not saved: "
                    "its alpha stays at %g until set_alpha()",
                    each.planned.seed, each.layer.layer_name, float(each.state["alpha_blend"]),
                )  # fmt: skip

    def _replacement(self, new: SeedReplacement) -> Change:
        layer, seed, kernel = new.layer, new.planned.seed, new.planned.kernel
        cached = layer.kernel_cache.adopt(kernel)

        def applied() -> Transition:
            return self._records.overwrite(layer, seed, new.state, kernel.artifact_id, cached, "restored")

        return Change(lambda plan: plan.with_seed(layer.site, new.planned), applied)

    def _removal(self, layer: KasminaLayer, seed: int) -> Change:
        zero = ("lifecycle_states", "active_kernel_id")
        dormant = {name: torch.zeros(1, dtype=FIELDS[name], device="cpu") for name in zero}

        def applied() -> Transition:
            return self._records.overwrite(layer, seed, dormant, None, False, "dormant in what was restored")

        return Change(lambda plan: plan.without_seed(layer.site, seed), applied)

    def attach(self, seeds: Sequence[SeedReplacement], attach: AttachKernel, source: KernelSource) -> None:
        """Give kernels that came without their attachments these, soon, and stage that they are used."""
        if not is_default(source):  # which would be opened for this
            FETCHING.submit(lambda: self._attach(seeds, attach, source))

    def _attach(self, seeds: Sequence[SeedReplacement], attach: AttachKernel, source: KernelSource) -> None:
        attached: list[tuple[int, SeedPlan, SeedPlan]] = []  # the new values have code made for them anew
        for each in seeds:
            kernel, planned = each.planned.kernel, each.planned
            try:
                if not kernel.attached:
                    attach(source, kernel)
                    attached += [(each.layer.site, planned, replace(planned))] if kernel.attached else []
            except Exception as error:  # noqa: BLE001  # the kernel's graph runs, which is slower and as good
                _LOG.info("kernel %s runs without its attachment: %r", kernel.artifact_id[:12], error)

        def edit(plan: Plan) -> Plan:
            for site, old, new in attached:
                plan = plan.with_seed(site, new) if plan.seed(site, old.seed) == old else plan
            return plan

        def stage() -> None:
            self._runtime.prepare(edit(self._runtime.target))
            self._runtime.publish(Change(edit, lambda: None))

        if attached:
            self._queue.later(stage)
