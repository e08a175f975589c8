"""The compiler of one graph's variants: by a compile worker, from the store of earlier runs, or in this process."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextvars import Context
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import fx

from esper import torch_internals
from esper.compiler.errors import CompileWorkerError, WorkerJobError, WorkersClosedError
from esper.compiler.graph_plan import GraphPlan
from esper.compiler.inner import Inductor
from esper.compiler.options import BackendOptions
from esper.compiler.variant_cache import Boxed, Variant
from esper.compiler.variant_job import InputSpec, SeedSpec, VariantJob, specialise
from esper.compiler.variant_store import VariantKey, default_store
from esper.compiler.workers import default_workers
from esper.errors import EsperError
from esper.execution.background import rest
from esper.execution.kernels.local_parts import differentiable
from esper.execution.plans.plan import SeedPlan
from esper_passes import is_enter, is_module_site, is_site, site_call, site_id
from esper_passes.inline_kernels import closed_sites

__all__ = ["Compilation", "VariantCompilationError", "VariantCompiler"]

_LOG = logging.getLogger("esper.compiler")
_FORMAT = "4"  # of what a stored variant holds; another one, too, where the arithmetic of a blend is another
_PAUSE_SECONDS = 0.001  # between two pieces of loading, in which the training thread has the interpreter's lock


class VariantCompilationError(EsperError, RuntimeError):
    """The inner compiler refused a graph with seeds, or cannot run here."""

    @classmethod
    def of(cls, graph: str, error: WorkerJobError) -> VariantCompilationError:
        """What a compile worker reported, with a remedy."""
        what = f"{error.type_name}: {error.message}".removeprefix(_AROUND_ALL)
        return cls.without_compiler(graph, what) or cls(f"the inner compiler failed on {graph}: {what}; {_REMEDY}")

    @classmethod
    def without_compiler(cls, graph: str, what: str) -> VariantCompilationError | None:
        """For Inductor's message `what`, if it says that there is no C++ compiler."""
        if _NO_COMPILER not in what:
            return None
        return cls(f"{graph} needs a C++ compiler: install g++, or name one in CXX; {_REMEDY} ({what})")


_AROUND_ALL = "InductorError: "  # which Inductor puts around whatever was raised in it
_NO_COMPILER = "InvalidCxxCompiler: "
_REMEDY = 'options={"fallback": "eager"} runs such graphs uncompiled'


class Compilation:
    """A variant under way. `future`, if there is one, is done when :meth:`finish` need not wait."""

    def __init__(
        self,
        compiler: VariantCompiler,
        plan: GraphPlan,
        ambient: torch_internals.Ambient,
        key: VariantKey | None,
        future: Future[bytes],
    ) -> None:
        self._compiler, self._plan, self._ambient, self._key = compiler, plan, ambient, key
        self._started = time.perf_counter()
        self.future = future

    def finish(self) -> Variant | None:
        """Load what the worker compiled; None if it turns out that this process has to compile it.

        Raises :class:`VariantCompilationError` and what the pool raises.
        """
        return self._compiler._finish(self._plan, self._ambient, self._key, self.future, self._started)

    def abandon(self) -> None:
        """Instead of :meth:`finish`: what no worker has begun is called off, the rest is kept in the store."""
        if not self.future.cancel():
            self.future.add_done_callback(self._keep)

    def _keep(self, future: Future[bytes]) -> None:
        if future.exception() is None:
            self._compiler._keep(self._key, future.result())


class VariantCompiler:
    """For one graph. `remote` says whether workers compile its variants; `reason` why they cannot, if they should.

    :meth:`start` and what it returns belong to background threads, the rest to the thread that runs the model.
    """

    def __init__(self, marked: fx.GraphModule, name: str, options: BackendOptions) -> None:
        self.name = name
        self.options = options
        self.inputs: Sequence[Any] = torch_internals.fake_inputs(marked.graph)
        self.reason = ""
        self._closed = closed_sites(marked.graph)
        self._marked = marked
        self._known_guards = torch_internals.guard_count(self.inputs)
        self._job: VariantJob | None = None
        self._factors: dict[str, str | bytes] = {}
        self._weights = dict(_weights(marked))

    # -- for workers -----------------------------------------------------------------------------------------------

    @property
    def remote(self) -> bool:
        """Whether new variants come from workers."""
        return self._job is not None and not self.reason

    def make_sendable(self) -> None:
        """Pack the graph for workers, under the settings that are in force; while the backend is being called."""
        if not isinstance(self.options.inner, Inductor):
            return
        types = sorted({value.device.type for value in self.inputs if isinstance(value, torch.Tensor)})
        try:
            self._job = VariantJob(
                self.name,
                torch_internals.pack_graph(self._marked),
                {},
                torch.device("cpu"),
                torch_internals.shared_inputs(self.inputs),
                torch_internals.static_inputs(self._marked.graph),
                torch_internals.ambient_state(types or ["cpu"], self.options.inner.config_patches),
                self.options.batch_seeds,
            )
        except torch_internals.NotSendableError as error:
            self._keep_here(str(error))
        else:
            self._factors = {"format": _FORMAT, **_system(), "graph": self._describe()}
            try:
                default_workers()
            except EsperError as error:  # the settings cannot be used, which must not end the user's forward
                self._keep_here(str(error))

    def warm_workers(self) -> None:
        """Have workers started, since something will have to be compiled: they take some seconds."""
        if self.remote:
            default_workers().warm()

    def _keep_here(self, reason: str) -> None:
        if self.reason:
            return
        self.reason = reason
        _LOG.warning(
            "%s cannot be given to a compile worker: %s. A kernel of a new structure in it is compiled on the training "
            "thread, at the first forward that runs it", self.name, reason,
        )  # fmt: skip

    def _describe(self) -> str:
        """The graph as text."""

        def rename(node: fx.Node) -> fx.Node | str:
            if is_enter(node):
                return "enter"
            if is_site(node):
                return f"site {site_id(node)} {node.name} {node.args[:3]}"
            return node

        return torch_internals.describe_graph(self._marked, rename)

    def _spec(self, site: int, seed: SeedPlan) -> SeedSpec:
        """What `seed` is like whenever this graph runs: its kernel has device and dtype of the site's weight.

        At this moment they may differ. The model may be moved or cast while this is compiled, or have been, and back.
        """
        parameters = [InputSpec.of(differentiable(parameter)) for parameter in seed.kernel.parameters]
        weight = self._weights.get(site)
        if weight is not None:
            parameters = [replace(each, dtype=weight.dtype, device=weight.device) for each in parameters]
        return SeedSpec(seed.kernel.graph, tuple(parameters), seed.isolate, seed.constant_alpha)

    def parameters_of(self, plan: GraphPlan) -> list[torch.Tensor]:
        """The parameters of `plan`'s kernels as the graph takes them: of those that ranks share, this rank's part.

        These are in the dtype in which the site's weight is there, as what shards a model may compute in another one.
        """
        found: list[torch.Tensor] = []
        for site, seeds in plan.sites.items():
            weight = self._weights.get(site)
            for kernel in (seed.kernel for seed in seeds):
                if kernel.module.is_shared:
                    parts = map(differentiable, kernel.parameters)
                    found += parts if weight is None else [part.to(weight.dtype) for part in parts]
                else:
                    found += kernel.parameters
        return found

    def _ambient(self, context: Context | None) -> torch_internals.Ambient:
        """The settings for a compilation: those of the capture, renewed by what `context` sees."""
        assert self._job is not None
        assert isinstance(self.options.inner, Inductor)
        ambient, patches = self._job.ambient, self.options.inner.config_patches
        return ambient if context is None else context.copy().run(ambient.renewed, patches)

    def is_current(self, variant: Variant, context: Context) -> bool:
        """Whether `variant` would be compiled as it was, under the settings that `context` sees."""
        if not self.remote or not variant.settings:
            return True
        try:
            return variant.settings == repr(self._ambient(context))
        except torch_internals.NotSendableError:
            return False

    def start(self, plan: GraphPlan, context: Context | None = None) -> Compilation | Variant | None:
        """Have a variant for `plan` compiled, under the settings that `context` sees; a stored one is loaded at once.

        Only if `remote`. None if it turns out that this process has to compile it.
        """
        assert self._job is not None
        try:
            ambient = self._ambient(context)
        except torch_internals.NotSendableError as error:
            self._keep_here(str(error))
            return None
        rest()
        seeds = {site: tuple(self._spec(site, seed) for seed in each) for site, each in plan.sites.items()}
        key, store = None, default_store()
        if store is not None:
            by_site = [(site, [_key_of(spec) for spec in each]) for site, each in seeds.items()]
            of_variant = {
                "plan": repr((by_site, plan.device)),
                "batched": str(self.options.batch_seeds),
                "settings": repr(ambient),
            }
            key = VariantKey.of({**self._factors, **of_variant})
            rest()
            stored = store.get(key)
            rest()
            if stored is not None:
                started = time.perf_counter()
                try:
                    return self._load(stored, plan, ambient, "store", started)
                except Exception as error:  # noqa: BLE001  # whatever keeps it from being loaded, it is a miss
                    _LOG.info("a stored variant of %s is not used: %s: %s", self.name, type(error).__name__, error)
        job = replace(self._job, seeds=seeds, device=plan.device, ambient=ambient)
        return Compilation(self, plan, ambient, key, default_workers().submit(job.pack()))

    def _finish(
        self,
        plan: GraphPlan,
        ambient: torch_internals.Ambient,
        key: VariantKey | None,
        future: Future[bytes],
        started: float,
    ) -> Variant | None:
        try:
            payload = future.result()
        except WorkersClosedError:
            raise
        except CompileWorkerError as error:
            if isinstance(error, WorkerJobError) and error.type_name == torch_internals.NotSendableError.__name__:
                self._keep_here(error.message)
                return None
            if self.options.fallback == "eager":
                _LOG.warning("%s runs uncompiled: %s", self.name, error)
                return self.uncompiled(plan, str(error))
            if isinstance(error, WorkerJobError):
                raise VariantCompilationError.of(self.name, error) from error
            raise
        try:
            variant = self._load(payload, plan, ambient, "worker", started)
        except torch_internals.StaleVariantError as error:
            raise VariantCompilationError(
                f"what a worker compiled for {self.name} cannot be loaded: {error}"
            ) from error
        self._keep(key, payload)
        return variant

    def _keep(self, key: VariantKey | None, payload: bytes) -> None:
        store = default_store()
        if store is not None and key is not None:
            store.put(key, payload)

    def _load(
        self, payload: bytes, plan: GraphPlan, ambient: torch_internals.Ambient, origin: Any, started: float
    ) -> Variant:
        call, assumption = torch_internals.load_graph(payload, ambient.inductor, _pause)
        if assumption is not None:
            call = self._guarded(call, assumption, plan)
        _pause()
        seconds = time.perf_counter() - started
        _LOG.info("a variant of %s with %d active seeds is ready after %.2f s", self.name, _count(plan), seconds)
        return Variant(call, origin, seconds, len(payload), settings=repr(ambient))

    def check(self, plan: GraphPlan) -> None:
        """Raise :class:`VariantCompilationError` for kernels that no variant of this graph can have."""
        closed = [site for site in plan.sites if site in self._closed]
        if closed:
            raise VariantCompilationError(
                f"{self.name} calls this layer inside of an operator such as torch.cond, whose body takes no kernel"
            )

    # -- in this process -------------------------------------------------------------------------------------------

    def uncompiled(self, plan: GraphPlan, reason: str = "") -> Variant:
        """The graph for `plan` as it is."""
        forward = self._specialised(plan).forward
        return Variant(lambda inputs: forward(*inputs), "uncompiled", reason=reason)

    def compile_here(self, plan: GraphPlan, while_captured: bool = False) -> Variant:
        """A variant for `plan`, compiled on this thread: it traces, so it must be the thread that runs the model.

        What it assumes about sizes it checks at each call, unless that is `while_captured`: then Dynamo's guards do.
        """
        module = self._specialised(plan)
        inputs = torch_internals.fake_inputs(module.graph)
        started = time.perf_counter()
        try:
            with torch_internals.recompile_context(inputs, module):
                compiled = self.options.inner(module, inputs)
        except Exception as error:  # noqa: BLE001  # whatever the inner compiler raises, the forward has to go on
            _LOG.warning("the inner compiler failed on a graph with seeds; it runs uncompiled", exc_info=error)
            return self.uncompiled(plan, f"{type(error).__name__}: {error}")
        call = torch_internals.boxed(compiled)
        if while_captured:
            self.note_guards()
        assumption = torch_internals.assumption_since(inputs, self._known_guards)
        if assumption is not None:
            call = self._guarded(call, assumption, plan)
        seconds = time.perf_counter() - started
        _LOG.info("compiled a variant of %s with %d active seeds in %.2f s", self.name, _count(plan), seconds)
        return Variant(call, "in process", seconds, reason=self.reason)

    def note_guards(self) -> None:
        """Dynamo's own guards, which it has yet to make, will have everything that was assumed so far."""
        self._known_guards = torch_internals.guard_count(self.inputs)

    def _specialised(self, plan: GraphPlan) -> fx.GraphModule:
        module = torch_internals.copy_for_recompile(self._marked)
        kernels = {site: [seed.kernel.seed_graph(seed.isolate) for seed in each] for site, each in plan.sites.items()}
        seeds = list(plan.seeds())
        constants = {i: seed.constant_alpha for i, seed in enumerate(seeds) if seed.constant_alpha is not None}
        batched = self.options.batch_seeds and isinstance(self.options.inner, Inductor)
        added: list[torch.Tensor] = []
        if seeds:
            alphas = torch.zeros(len(seeds), dtype=torch.float32, device=plan.device)
            added = torch_internals.fake_like([*self.parameters_of(plan), alphas], among=self.inputs)
        return specialise(module, kernels, constants, added, batched, self.name)

    def _guarded(self, call: Boxed, assumption: torch_internals.Assumption, plan: GraphPlan) -> Boxed:
        """`call` where the sizes are as it assumed, and the graph as it is elsewhere."""
        holds = assumption.check()
        uncompiled: Boxed | None = None

        def guarded(inputs: list[Any]) -> Any:
            nonlocal uncompiled
            if holds(inputs):
                return call(inputs)
            if uncompiled is None:
                _LOG.warning("%s runs uncompiled for sizes that its compiled code does not cover", self.name)
                uncompiled = self.uncompiled(plan).call
            return uncompiled(inputs)

        return guarded


def _pause() -> None:
    time.sleep(_PAUSE_SECONDS)
    rest()


def _weights(module: fx.GraphModule) -> Iterator[tuple[int, torch.Tensor]]:
    """Sites of linear layers and the fake values of their weights, where these are inputs of the graph."""
    graphs = [each.graph for each in module.modules() if isinstance(each, fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.nodes if is_site(node) and not is_module_site(node)):
        call = site_call(node)
        if call.weight.op == "placeholder" and "example_value" in call.weight.meta:
            yield call.site, call.weight.meta["example_value"]


def _key_of(spec: SeedSpec) -> tuple[Any, ...]:
    return spec.graph.digest, spec.parameters, spec.isolate, spec.constant_alpha


def _count(plan: GraphPlan) -> int:
    return len(list(plan.seeds()))


@cache
def _system() -> Mapping[str, str]:
    return torch_internals.system_factors()
