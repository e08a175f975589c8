"""What becomes of a seed is written down: in its state, its errors, the log, and a report for whoever listens."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from esper.contracts.messages import SeedReport, TopicNames
from esper.errors import EsperError
from esper.execution.kernels.service_locator import TelemetrySink
from esper.execution.lifecycle import SeedLifecycleState, Transition
from esper.execution.plans.runtime import Runtime
from esper.execution.seeds.requests import SeedRequests

if TYPE_CHECKING:
    from esper.execution.kasmina_layer import KasminaLayer

__all__ = ["SeedRecords"]

_LOG = logging.getLogger("esper.execution")
_State = SeedLifecycleState


class SeedRecords:
    """Those of one model. :meth:`enter` and :meth:`overwrite` belong to a commit, the rest to any thread."""

    def __init__(self, runtime: Runtime, requests: SeedRequests, sink: TelemetrySink | None) -> None:
        self._runtime = runtime
        self._requests = requests
        self._sink = sink

    def enter(
        self, layer: KasminaLayer, seed: int, new: SeedLifecycleState, reason: str, kernel_id: str | None
    ) -> Transition:
        """A change comes into force. A seed for which a load is under way is `LOADING` all the same.

        Harmless where an interrupt cut it short the first time.
        """
        old = layer.state.lifecycle(seed)
        if new is _State.ACTIVE and old is not _State.LOADING:
            layer.state.set_lifecycle(seed, _State.LOADING)  # an earlier change to the same seed was committed first
        if new is _State.ACTIVE or old is not new:
            layer.state.set_lifecycle(seed, new, kernel_id if new is _State.ACTIVE else None)
        if self._requests.is_loading(layer, seed):
            layer.state.set_lifecycle(seed, _State.LOADING)
        layer.state.touch_epoch(seed, self._runtime.upcoming)
        if new is not _State.FOSSILIZED:
            layer.pin(seed, kernel_id)
        self.report(layer, seed, reason)
        return Transition(layer.layer_name, seed, old, new, time.time(), reason, kernel_id, layer_id=layer.layer_id)

    def overwrite(
        self,
        layer: KasminaLayer,
        seed: int,
        fields: Mapping[str, Tensor],
        kernel_id: str | None,
        cached: bool,
        why: str,
    ) -> Transition:
        """As :meth:`enter`, without asking the table of transitions; a kernel that is not cached has no pin."""
        state, old = layer.state.view(seed, seed + 1), layer.state.lifecycle(seed)
        state.load_state_dict({**state.state_dict(), **fields})
        self._runtime.forget_schedules([layer.first_seed + seed])
        self._requests.fossilizing.discard((layer.site, seed))
        layer.seed_errors.pop(seed, None)
        layer.pin(seed, kernel_id if cached else None)
        self.report(layer, seed, why)
        return Transition(
            layer.layer_name, seed, old, state.lifecycle(0), time.time(), why, kernel_id, layer_id=layer.layer_id
        )

    def refuse(self, layer: KasminaLayer, seed: int, error: Exception) -> None:
        """A change of a seed in force came to nothing: keep the seed as it is, and the reason."""
        self.keep_error(layer, seed, error)
        layer.state.record_error(seed)
        _LOG.warning("seed %d of %s stays as it is: %s", seed, layer.layer_name, layer.seed_errors[seed])
        self.report(layer, seed, layer.seed_errors[seed])

    def keep_error(self, layer: KasminaLayer, seed: int, error: Exception) -> None:
        """Keep `error` as the reason why a seed is not what was asked; all of it goes to the log if it is not ours."""
        if not isinstance(error, EsperError):
            _LOG.error("staging failed with an error that is not Esper's own", exc_info=error)
        layer.seed_errors[seed] = f"{type(error).__name__}: {error}"

    def report(self, layer: KasminaLayer, seed: int, reason: str) -> None:
        """Tell whoever listens what a seed is."""
        if self._sink is not None:
            report = SeedReport(
                layer_id=layer.layer_id,
                layer_name=layer.layer_name,
                seed_idx=seed,
                state=layer.state.lifecycle(seed).name,
                error_count=layer.state.errors(seed),
                reason=reason,
            )
            self._sink.publish(TopicNames.INNOVATION_FIELD_REPORTS, report)
