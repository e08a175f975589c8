"""Execution counts and latencies, without a counter or a timer at any site.

What runs a model counts its own calls (one C call each, whatever the number of sites), and knows how often each site
runs in one of them. A thread looks at these counts a few times a second. Whenever a layer has run another 100 times it
sends a health signal and asks for one *sampled* forward, in which every site is timed; on CUDA by events that are read
later, so that nothing waits for the device.
"""

from __future__ import annotations

import atexit
import collections
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from esper.contracts.messages import HealthSignal, TopicNames
from esper.execution.kernel_cache import KernelCache
from esper.execution.kernels.service_locator import TelemetrySink
from esper.execution.state_layout import KasminaStateLayout
from esper.forking import ModuleLock, reset_after_fork

__all__ = ["SIGNAL_EVERY", "CallCounter", "Metered", "Stopwatch", "Telemetry"]

_LOG = logging.getLogger("esper.execution")

SIGNAL_EVERY = 100
"""Executions of a layer between two health signals."""

_LOOK_EVERY = 0.1  # seconds
_KEPT_SAMPLES = 32  # the reported average is over the last so many sampled executions


class CallCounter:
    """A counter of calls of `tick`; `value` may be read from any thread.

    An increment is one C call, so that it is safe on any thread and costs about 25 ns.
    """

    __slots__ = ("_count", "tick")

    def __init__(self) -> None:
        self._count = itertools.count()
        self.tick: Callable[[], object] = self._count.__next__

    @property
    def value(self) -> int:
        """How often `tick` was called."""
        return int(repr(self._count)[len("count(") : -1])  # the one way to read a count without taking from it


class ReportedLayer(Protocol):
    """What health signals tell of a layer."""

    layer_id: int
    layer_name: str
    site: int
    state: KasminaStateLayout
    kernel_cache: KernelCache

    def memory_bytes(self) -> int: ...


class Metered(Protocol):
    """Something that runs sites, counts its calls and can time one."""

    counter: CallCounter

    def sample(self, telemetry: Telemetry) -> None:
        """Time one of the next calls and :meth:`Telemetry.record` what was found. On any thread; must not block."""


class Stopwatch:
    """Times the work that is given to a device between construction and `stop()`, without waiting for the device."""

    __slots__ = ("_end", "_start")

    def __init__(self, device: torch.device) -> None:
        self._end: float | torch.cuda.Event | None = None
        if device.type == "cuda":
            self._start: float | torch.cuda.Event = _event()
            self._start.record()
        else:
            self._start = time.perf_counter()

    def stop(self) -> None:
        if isinstance(self._start, float):
            self._end = time.perf_counter()
        else:
            self._end = _event()
            self._end.record()

    def microseconds(self) -> float | None:
        """The time between, or None if the device has not come so far."""
        if isinstance(self._start, float):
            return (self._end - self._start) * 1e6 if isinstance(self._end, float) else None
        if not isinstance(self._end, torch.cuda.Event) or not self._end.query():  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return None
        elapsed: float = self._start.elapsed_time(self._end)
        return elapsed * 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped


class Telemetry:
    """The meters of one model's layers.

    `record` and `look` may be called from any thread; the questions are answered without waiting.
    """

    def __init__(self, state: KasminaStateLayout, sink: TelemetrySink | None) -> None:
        self._layers: weakref.WeakValueDictionary[int, ReportedLayer] = weakref.WeakValueDictionary()
        self._state = state
        self._sink = sink
        self._counts: list[tuple[CallCounter, collections.Counter[int]]] = []
        self._metered: weakref.WeakSet[Metered] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._running: collections.deque[tuple[int, Stopwatch]] = collections.deque(maxlen=4096)
        self._samples: dict[int, collections.deque[float]] = {}
        self._signalled: dict[int, int] = {}
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Nobody in this child holds the lock, whoever held it in the parent; see `esper.forking`."""
        self._lock = threading.Lock()

    def add(self, layer: ReportedLayer) -> None:
        """Tell of `layer` too; before :meth:`start`."""
        self._layers[layer.site] = layer

    # -- counting --------------------------------------------------------------------------------------------------

    def watch(self, metered: Metered, site_calls: Iterable[int]) -> None:
        """Count what `metered` runs: one call of it runs `site_calls`, each site as often as it occurs there.

        Given again, `site_calls` replaces what was known, for the calls counted before as well.
        """
        with self._lock:
            known = [entry for entry in self._counts if entry[0] is not metered.counter]
            self._counts = [*known, (metered.counter, collections.Counter(site_calls))]
            self._metered.add(metered)

    def executions(self, site: int) -> int:
        """How often `site` has run."""
        with self._lock:
            return sum(counts[site] * counter.value for counter, counts in self._counts if site in counts)

    def knows(self, site: int) -> bool:
        """Whether `site` is one of this model's."""
        return site in self._layers

    # -- timing ----------------------------------------------------------------------------------------------------

    def stopwatch(self) -> Stopwatch:
        """A stopwatch for the device that the model is on now, running."""
        return Stopwatch(self._state.device)

    def record(self, site: int, watch: Stopwatch) -> None:
        """`watch` has stopped and timed one execution of `site`."""
        self._running.append((site, watch))

    def latency_μs(self, site: int) -> float:
        """Mean time of the last sampled executions of `site`, in microseconds; 0.0 before the first."""
        self._collect()
        samples = self._samples.get(site)
        return sum(samples) / len(samples) if samples else 0.0

    def _collect(self) -> None:
        with self._lock:
            for _ in range(len(self._running)):
                site, watch = self._running.popleft()
                elapsed = watch.microseconds()
                if elapsed is None:
                    self._running.append((site, watch))
                else:
                    self._samples.setdefault(site, collections.deque(maxlen=_KEPT_SAMPLES)).append(elapsed)

    # -- reporting -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to look, on a daemon thread that all models share, until :meth:`stop` or this object's end."""
        _looks.begin(self)

    def stop(self) -> None:
        """Stop looking."""
        _looks.end(self)

    def look(self) -> None:
        """Send the health signals that are due and ask for a sample from whatever ran."""
        due = []
        for site, layer in list(self._layers.items()):
            count = self.executions(site)
            if count // SIGNAL_EVERY > self._signalled.get(site, 0) // SIGNAL_EVERY:
                self._signalled[site] = count
                due.append((site, layer))
        if not due:
            return
        with self._lock:
            metered = list(self._metered)
        for each in metered:
            each.sample(self)
        if self._sink is not None:
            for site, layer in due:
                self._sink.publish(TopicNames.TELEMETRY_SEED_HEALTH, self._signal(site, layer))

    def _signal(self, site: int, layer: ReportedLayer) -> HealthSignal:
        cache = layer.kernel_cache.get_cache_stats()
        state = layer.state
        return HealthSignal.model_validate(
            {
                "layer_id": layer.layer_id,
                "layer_name": layer.layer_name,
                "seed_count": state.num_seeds,
                "active_seed_count": len(state.active_seeds()),
                "avg_execution_latency_μs": self.latency_μs(site),
                "cache_hit_rate": cache["cache_hit_rate"],
                "error_count": int(state.mirror("error_count").sum()),
                "memory_usage_mb": layer.memory_bytes() / 2**20,
            }
        )


class _Looks:
    """The thread that looks at all models' counts a few times a second; there while there is a model to look at."""

    def __init__(self) -> None:
        self._lock = ModuleLock()
        self._telemetries: weakref.WeakSet[Telemetry] = weakref.WeakSet()
        self._failed: weakref.WeakSet[Telemetry] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        atexit.register(self._end)

    def begin(self, telemetry: Telemetry) -> None:
        with self._lock.held():
            self._telemetries.add(telemetry)
            if self._thread is None or not self._thread.is_alive():  # a fork leaves it to the parent
                self._thread = threading.Thread(target=self._run, name="esper-telemetry", daemon=True)
                self._thread.start()

    def end(self, telemetry: Telemetry) -> None:
        with self._lock.held():
            self._telemetries.discard(telemetry)

    def _run(self) -> None:
        while True:
            time.sleep(_LOOK_EVERY)
            with self._lock.held():
                telemetries = list(self._telemetries)
                if not telemetries:
                    self._thread = None
                    return
            for each in telemetries:
                with _looking.held():
                    self._look(each)
            del telemetries, each

    def _look(self, telemetry: Telemetry) -> None:
        try:
            telemetry.look()
        except Exception:  # noqa: BLE001  # one model's trouble is not another's
            if telemetry not in self._failed:
                self._failed.add(telemetry)
                _LOG.exception("a look at a model's telemetry failed; the next ones go on, and do not say so again")

    def _end(self) -> None:
        """No look goes on while the interpreter ends, see `esper.execution.background`: the lock is never let go."""
        _looking.held().__enter__()


_looking = ModuleLock()
_looks = _Looks()
