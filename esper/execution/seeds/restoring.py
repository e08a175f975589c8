"""Restoring seeds as they were elsewhere, all at once: from a checkpoint, or from the original of a copy."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from esper.execution.background import FETCHING
from esper.execution.kernels.service_locator import AttachKernel, is_default
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.plans.alpha import SavedRamp
from esper.execution.plans.plan import Plan, SeedPlan
from esper.execution.plans.plan_edit import PlanEdit
from esper.execution.plans.runtime import Runtime
from esper.execution.seeds.journal import SeedJournal
from esper.execution.seeds.operations import Restore
from esper.execution.seeds.queue import StagingQueue
from esper.execution.seeds.seed import Seed
from esper.execution.sources import KernelSource
from esper.execution.state_layout import FIELDS

__all__ = ["RestoredSeed", "attach_later", "restore"]

_LOG = logging.getLogger("esper.execution")


@dataclass(frozen=True, slots=True)
class RestoredSeed:
    """A seed as it was elsewhere: in a checkpoint, or in the model that this one is a copy of."""

    seed: Seed
    planned: SeedPlan
    state: Mapping[str, Tensor]
    """The fields of a `KasminaStateLayout` of one seed."""
    ramp: SavedRamp | None = None
    """What moves its alpha on from where it was."""
    lost_schedule: bool = False
    """Whether something else moved it."""

    def resume_alpha(self, runtime: Runtime) -> None:
        """Go on moving its alpha, or say that nothing does."""
        alpha = float(self.state["alpha_blend"])
        if self.ramp is not None:
            schedule = self.ramp.schedule()
            runtime.start_alpha(self.planned.alpha_index, schedule.alpha, alpha, schedule.step)
        elif self.lost_schedule:
            _LOG.warning(
                "seed %d of %s had an alpha schedule that is no ramp of Esper's, which is not saved: "
                "its alpha stays at %g until set_alpha()", self.seed.index, self.seed.layer_name, alpha
            )  # fmt: skip


def restore(
    seeds: Sequence[Seed],
    restored: Sequence[RestoredSeed],
    runtime: Runtime,
    journal: SeedJournal,
) -> None:
    """Of `seeds`, put exactly those that are `restored` in force, before this returns; also with `commit="manual"`.

    Whatever is staged or under way for them is cancelled. For the thread that runs the model, between two forwards.
    Raises `CommitError` inside a backward, and what an executor raises that cannot follow the new plan.
    """
    runtime.refuse_in_backward()
    plan = runtime.target
    for seed in seeds:
        plan = plan.without_seed(seed.site, seed.index)
    for each in restored:
        plan = plan.with_seed(each.seed.site, each.planned)
    runtime.prepare(plan)
    edits = [Restore(each.seed, each.planned, each.state, "restored", journal) for each in restored]
    kept = {each.seed for each in restored}
    dormant = {
        name: torch.zeros(1, dtype=FIELDS[name], device="cpu") for name in ("lifecycle_states", "active_kernel_id")
    }
    cancelled = []
    with runtime.lock:
        for seed in seeds:
            load = seed.supersede()
            if load is not None:
                cancelled.append(load)
                seed.state.cancel_load(seed.index)
            in_force = any(plan.seed(seed.site, seed.index) for plan in (runtime.plan, runtime.target))
            folded = seed.lifecycle is SeedLifecycleState.FOSSILIZED  # into a weight since replaced
            if seed not in kept and (in_force or folded):
                edits.append(Restore(seed, None, dormant, "dormant in what was restored", journal))
        runtime.publish(*edits)
    for load in cancelled:
        load.answer(False)
    runtime.commit(alone=True)
    if runtime.gate is not None:
        runtime.gate.restart()
    for each in restored:
        each.resume_alpha(runtime)


def attach_later(
    restored: Sequence[RestoredSeed], runtime: Runtime, queue: StagingQueue, attach: AttachKernel, source: KernelSource
) -> None:
    """Give kernels that came without their attachments these, on a background thread, and stage that they are used."""

    def fetch() -> None:
        attached = _Attach()
        for each in restored:
            kernel = each.planned.kernel
            try:
                if not kernel.attached:
                    attach(source, kernel)
                    attached.note(each)
            except Exception as error:  # noqa: BLE001  # the kernel's graph runs, which is slower and as good
                _LOG.info("kernel %s runs without its attachment: %r", kernel.artifact_id[:12], error)
        if attached.seeds:
            queue.later(lambda: stage(attached))

    def stage(attached: _Attach) -> None:
        runtime.prepare(attached.edit(runtime.target))
        runtime.publish(attached)

    if not is_default(source):  # which would be opened for this
        FETCHING.submit(fetch)


class _Attach(PlanEdit):
    """Kernels that have attachments now: plans with other values have code made for them anew."""

    def __init__(self) -> None:
        self.seeds: list[tuple[int, SeedPlan, SeedPlan]] = []

    def note(self, restored: RestoredSeed) -> None:
        if restored.planned.kernel.attached:
            self.seeds.append((restored.seed.site, restored.planned, replace(restored.planned)))

    def edit(self, plan: Plan) -> Plan:
        for site, old, new in self.seeds:
            plan = plan.with_seed(site, new) if plan.seed(site, old.seed) == old else plan
        return plan
