"""The specialisations (variants) of one graph: those that are there, those under way, and what has them made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from contextvars import Context

from esper.compiler.errors import WorkersClosedError
from esper.compiler.graph_plan import GraphPlan
from esper.compiler.variant_cache import Variant, VariantCache
from esper.compiler.variant_compiler import Compilation, VariantCompiler
from esper.execution.plans.executor import ShutDownError
from esper.forking import reset_after_fork

__all__ = ["GraphVariants", "VariantPreparation"]


class GraphVariants:
    """The variants of one graph, by the structure of plans for its numbered sites.

    From any thread, but for :meth:`here`. The lock is held for look-ups only.
    """

    def __init__(self, compiler: VariantCompiler, in_force: Callable[[], Iterable[Hashable]]) -> None:
        self.compiler = compiler
        self.cache = VariantCache(compiler.options.variant_cache_mb * 2**20, in_force)
        self._lock = threading.Lock()
        self._under_way: dict[Hashable, _Shared] = {}
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Nobody in this child holds the lock, and nobody compiles for it; see `esper.forking`."""
        self._lock = threading.Lock()
        self._under_way = {}

    @property
    def waiting(self) -> int:
        """How many are under way."""
        return len(self._under_way)

    def ready(self, plan: GraphPlan) -> bool:
        """Whether `plan` can come into force without a compilation that workers could do."""
        return not self.compiler.remote or self.cache.get(plan.specialization_key) is not None

    def begin(self, plan: GraphPlan, context: Context | None = None) -> VariantPreparation | None:
        """Begin to make the variant for `plan`, unless it is there or has to be compiled at its first call.

        One that was made under other settings than `context` sees is made anew. For a background thread. What is under
        way already is waited for, and not made twice.
        """
        key = plan.specialization_key
        known = self.cache.get(key)
        if known is not None and (plan.is_dormant or context is None or self.compiler.is_current(known, context)):
            return None
        self.compiler.check(plan)
        if not self.compiler.remote:
            if self.compiler.options.inner_name == "eager":
                self.cache.put(key, self.compiler.uncompiled(plan))
            return None
        with self._lock:
            shared = self._under_way.get(key)
            if shared is not None:
                shared.users += 1
                return VariantPreparation(self, key, shared)
        started = self.compiler.start(plan, context)
        if not isinstance(started, Compilation):
            self.cache.put(key, started)
            return None
        with self._lock:
            shared = self._under_way[key] = _Shared(started)
        return VariantPreparation(self, key, shared)

    def here(self, plan: GraphPlan, *, while_captured: bool = False) -> Variant:
        """The variant for `plan`, compiled at once if it is not there. On the thread that runs the model.

        `while_captured` says that Dynamo is calling the backend.
        """
        variant = self.cache.get(plan.specialization_key)
        if variant is None:
            variant = self.compiler.compile_here(plan, while_captured)
            self.cache.put(plan.specialization_key, variant)
        return variant

    def _finish(self, key: Hashable, shared: _Shared) -> None:
        with shared.lock:  # whoever is second finds it done
            if not shared.done:
                shared.done = True
                try:
                    variant = shared.compilation.finish()
                    if variant is not None:
                        self.cache.put(key, variant)
                except WorkersClosedError as error:
                    shared.error = ShutDownError(str(error))
                except Exception as error:  # noqa: BLE001  # raised below, by each that waits
                    shared.error = error
                self._forget(key, shared)
        if shared.error is not None:
            raise shared.error

    def _abandon(self, key: Hashable, shared: _Shared) -> None:
        with self._lock:
            shared.users -= 1
            unwanted = shared.users == 0 and not shared.done
        if unwanted:
            self._forget(key, shared)
            shared.compilation.abandon()

    def _forget(self, key: Hashable, shared: _Shared) -> None:
        with self._lock:
            if self._under_way.get(key) is shared:
                del self._under_way[key]


class _Shared:
    """A compilation for which several may wait."""

    def __init__(self, compilation: Compilation) -> None:
        self.compilation = compilation
        self.lock = threading.Lock()
        self.users = 1
        self.done = False
        self.error: Exception | None = None


class VariantPreparation:
    """A variant that somebody waits for. For the background thread that began it."""

    def __init__(self, variants: GraphVariants, key: Hashable, shared: _Shared) -> None:
        self._variants, self._key, self._shared = variants, key, shared
        self.future: Future[bytes] = shared.compilation.future

    def finish(self) -> None:
        """Load the variant once `future` is done; raises what kept it from being compiled."""
        self._variants._finish(self._key, self._shared)

    def abandon(self) -> None:
        """Nobody waits here any more. What a worker has begun goes on, for the store."""
        self._variants._abandon(self._key, self._shared)
