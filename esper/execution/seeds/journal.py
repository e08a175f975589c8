"""The journal of a model's seeds: what becomes of one is written to its state, its errors, the log, and the bus."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from torch import Tensor

from esper.contracts.messages import SeedReport, TopicNames
from esper.errors import EsperError
from esper.execution.kernels.service_locator import TelemetrySink
from esper.execution.lifecycle import SeedLifecycleState, Transition
from esper.execution.plans.runtime import Runtime
from esper.execution.seeds.seed import Operation, Seed

__all__ = ["SeedJournal"]

_LOG = logging.getLogger("esper.execution")
_State = SeedLifecycleState


class SeedJournal:
    """That of one model. :meth:`enter` and :meth:`overwrite` belong to a commit, the rest to any thread."""

    def __init__(self, runtime: Runtime, sink: TelemetrySink | None) -> None:
        self._runtime = runtime
        self.sink = sink

    def enter(self, operation: Operation, new: SeedLifecycleState, reason: str, kernel_id: str | None) -> Transition:
        """An operation comes into force. A seed for which a load is under way is `LOADING` all the same.

        Harmless where an interrupt cut it short the first time.
        """
        seed = operation.seed
        old = seed.lifecycle
        if new is _State.ACTIVE and old is not _State.LOADING:
            seed.become(_State.LOADING)  # an earlier operation on the same seed was committed first
        if new is _State.ACTIVE or old is not new:
            seed.become(new, kernel_id if new is _State.ACTIVE else None)
        if seed.loading is not None:
            seed.become(_State.LOADING)
        seed.state.touch_epoch(seed.index, self._runtime.upcoming)
        if new is not _State.FOSSILIZED:
            seed.pin(kernel_id, operation)
        return self._told(seed, old, new, reason, kernel_id)

    def overwrite(
        self, operation: Operation, fields: Mapping[str, Tensor], kernel_id: str | None, cached: bool, reason: str
    ) -> Transition:
        """As :meth:`enter`, without asking the table of transitions; a kernel that is not cached has no pin."""
        seed = operation.seed
        state, old = seed.state.view(seed.index, seed.index + 1), seed.lifecycle
        state.load_state_dict({**state.state_dict(), **fields})
        self._runtime.forget_schedules([seed.alpha_index])
        seed.is_fossilizing = False
        seed.error = None
        seed.pin(kernel_id if cached else None, operation)
        return self._told(seed, old, seed.lifecycle, reason, kernel_id)

    def _told(
        self, seed: Seed, old: SeedLifecycleState, new: SeedLifecycleState, reason: str, kernel_id: str | None
    ) -> Transition:
        self.report(seed, reason)
        return Transition(seed.layer_name, seed.index, old, new, time.time(), reason, kernel_id, layer_id=seed.layer_id)

    def refuse(self, seed: Seed, error: Exception) -> None:
        """An operation on a seed in force came to nothing: keep the seed as it is, and the reason."""
        self.keep_error(seed, error)
        seed.state.record_error(seed.index)
        _LOG.warning("seed %d of %s stays as it is: %s", seed.index, seed.layer_name, seed.error)
        self.report(seed, seed.error or "")

    def keep_error(self, seed: Seed, error: Exception) -> None:
        """Keep `error` as the reason why a seed is not what was asked; all of it goes to the log if it is not ours."""
        if not isinstance(error, EsperError):
            _LOG.error("staging failed with an error that is not Esper's own", exc_info=error)
        seed.error = f"{type(error).__name__}: {error}"

    def report(self, seed: Seed, reason: str) -> None:
        """Tell whoever listens what a seed is."""
        if self.sink is not None:
            report = SeedReport(
                layer_id=seed.layer_id,
                layer_name=seed.layer_name,
                seed_idx=seed.index,
                state=seed.lifecycle.name,
                error_count=seed.state.errors(seed.index),
                reason=reason,
            )
            self.sink.publish(TopicNames.INNOVATION_FIELD_REPORTS, report)
