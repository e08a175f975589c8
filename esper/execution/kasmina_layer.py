"""`KasminaLayer`, the module that stands in for a linear layer and carries seeds."""

from __future__ import annotations

import asyncio
import copy
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from esper.errors import EsperError
from esper.execution import site_marker
from esper.execution.assembly import Assembly, LayerParts
from esper.execution.kernel_cache import KernelCache
from esper.execution.kernels import service_locator
from esper.execution.kernels.service_locator import TelemetrySink
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.plain_linear import parametrize_alike, plain_linear
from esper.execution.plans import registry
from esper.execution.plans.alpha import AlphaSchedule
from esper.execution.plans.executor import PlanOwner
from esper.execution.plans.handover import PlanHandover
from esper.execution.plans.model_link import ModelLink
from esper.execution.plans.plan import Plan, SeedPlan
from esper.execution.plans.runtime import CommitMode, Runtime
from esper.execution.seeds.active_kernels import BANK_NAME, ActiveKernels
from esper.execution.seeds.control import SeedControl
from esper.execution.seeds.copying import LayerSeeds, copy_schedules, restore_seeds
from esper.execution.seeds.progress import KernelRequest
from esper.execution.seeds.seed import Seed
from esper.execution.site_forward import kernels_have_hooks, site_forward
from esper.execution.site_marker import commit_while_tracing, enter_uncompiled, marked_by_esper
from esper.execution.site_paths import SitePath, active_path, blended, dormant_path, with_backward_hooks
from esper.execution.sources import KernelSource
from esper.execution.state_layout import KasminaStateLayout, seed_number
from esper.execution.telemetry import CallCounter, Telemetry
from esper_passes import TAGGED_ENTER, TAGGED_SITE

__all__ = ["KasminaLayer", "LinearSite", "UnknownFeaturesError"]


class UnknownFeaturesError(EsperError, RuntimeError):
    """It is not known yet how many features a module has."""


class KasminaLayer(nn.Module):
    """A layer with `num_seeds` seeds, `[*, input_dim] -> [*, output_dim]`.

    In a wrapped model it stands where the host's `nn.Linear`, or another module, stood and shares that module's
    parameters. It also stands alone: constructed directly, it has a linear layer, a state, a cache and a plan of its
    own.

    `layer_id` is a number from 0 and `layer_name` a name, by default the number: stats, signals and logs have both, and
    checkpoints go by name. In a wrapped model they are the site's number and the host's dotted name.

    With seeds `s` active in index order the output is `y = host(x)`, then for each
    `y = alpha_s * K_s(x, y) + (1 - alpha_s) * y`: a kernel that reads the output is given what those before it made.

    In the place of a linear layer it is an `nn.Linear` itself; in the place of another module it is an instance of that
    module's class.
    """

    in_features: int
    out_features: int
    weight: torch.Tensor
    """Of a linear layer, as those two; in the place of another module only if that has it."""
    layer_id: int
    """Its number in the model, in the order of the sites."""
    layer_name: str
    """The host's dotted name for it; of a layer that stands alone what it was given, by default its number."""
    site: int
    first_seed: int
    runtime: Runtime
    control: SeedControl
    seeds: tuple[Seed, ...]
    kernel_cache: KernelCache
    state: KasminaStateLayout
    seed_errors: dict[int, str]
    _esper: ActiveKernels
    """The kernels in force, of a layer that stands alone."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Constructed directly it is a linear layer."""
        kind: Any = LinearSite if cls is KasminaLayer else cls
        layer: Self = object.__new__(kind)
        return layer

    def __init__(
        self,
        layer_id: int,
        num_seeds: int,
        input_dim: int,
        output_dim: int,
        cache_size_mb: float = 128,
        telemetry_enabled: bool = True,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        commit: CommitMode = "auto",
        source: KernelSource | None = None,
        sink: TelemetrySink | None = None,
        layer_name: str = "",
    ) -> None:
        super().__init__(input_dim, output_dim, bias=bias, device=device, dtype=dtype)
        self._stand_alone(layer_id, num_seeds, cache_size_mb, telemetry_enabled, commit, source, sink, layer_name)

    def _stand_alone(
        self,
        layer_id: int,
        num_seeds: int,
        cache_size_mb: float,
        telemetry_enabled: bool,
        commit: CommitMode,
        source: KernelSource | None = None,
        sink: TelemetrySink | None = None,
        layer_name: str = "",
    ) -> None:
        """Be a model of one layer, with state, cache, plan, kernels and telemetry of its own."""
        name = _checked_name(layer_id, layer_name)
        assembly = Assembly.of(
            ModelLink(self),
            layers=1,
            seeds_per_layer=num_seeds,
            device=self.placement[0],
            cache_size_mb=cache_size_mb,
            commit=commit,
            telemetry_enabled=telemetry_enabled,
            source=source or service_locator.kernel_source(),
            sink=sink or service_locator.telemetry_sink(),
            attach=service_locator.attach_kernel(),
        )
        self._join(assembly.parts(0, name, layer_id), _LayerMeter(self) if telemetry_enabled else None, alone=True)
        self.add_module(BANK_NAME, assembly.complete({name: self}))

    def _join(self, parts: LayerParts, meter: _LayerMeter | None = None, *, alone: bool = False) -> None:
        """Be one of the layers of a model."""
        runtime, state = parts.runtime, parts.state
        self.layer_id = parts.layer_id
        self.layer_name = parts.layer_name
        self.site = parts.site
        self.first_seed = parts.first_seed
        self.runtime = runtime
        self.control = parts.control
        self.kernel_cache = parts.kernel_cache
        self.state = state
        self.seed_errors = {}
        self.absence: str | None = None
        self.seeds = tuple(Seed(self, index) for index in range(state.num_seeds))
        self._runtime_id = runtime.id
        self._runtime_tag = parts.runtime_tag
        self._site_tag = registry.make_tag(parts.site, alone=alone)
        self._stands_alone = alone
        self._meter = meter
        self._has_entry_hook = False
        self._seeds: tuple[SeedPlan, ...] = ()
        self._alphas = state.alpha_blend
        self._current = self._host_path()
        self._run = self._untimed()
        runtime.add_executor(self)
        if runtime.telemetry is not None:
            runtime.telemetry.add(self)
            if meter is not None:
                runtime.telemetry.watch(meter, [self.site])

    # -- what it computes ------------------------------------------------------------------------------------------

    def _host_path(self) -> SitePath:
        """What it computes without seeds. For as long as the layer lives, which has it."""
        raise NotImplementedError

    def _callbacks(self) -> tuple[Mapping[int, Any], ...]:
        """Hooks that are to see the gradients of what the host computes, and not of what kernels make of it."""
        return ()

    def _begin_traced(self, marks: bool) -> None:
        """For Dynamo, where a layer that stands alone is entered; `marks` says whether markers stand for sites."""
        if marks:
            TAGGED_ENTER(self._runtime_tag)
            return
        commit_while_tracing(self._runtime_id)  # before Dynamo reads, and guards on, the next two
        if self.runtime.scheduled or self.runtime.pending:  # the second only inside a backward
            site_marker.call_uncompiled(enter_uncompiled, self._runtime_id)

    def _blended(self, x: torch.Tensor, y: torch.Tensor, seeds: tuple[SeedPlan, ...] | None = None) -> torch.Tensor:
        """`y` with the kernels of `seeds`, by default of those in force.

        For Dynamo under any other backend, which guards on the seeds and traces again when they change.
        """
        for seed in self._seeds if seeds is None else seeds:
            y = blended(y, seed, seed.kernel.module, self._alphas[seed.seed].clone(), x)
        return y

    # -- Executor --------------------------------------------------------------------------------------------------

    def ready(self, plan: Plan, runtime: PlanOwner) -> bool:
        """Always: the layer calls its kernels one by one."""
        del plan, runtime
        return True

    def prepare(self, plan: Plan, runtime: PlanOwner) -> None:
        """Nothing to prepare."""
        del plan, runtime

    def follow(self, plan: Plan) -> None:
        """Switch to `plan`. The seeds come last, so that what was interrupted is done when it is asked for again."""
        seeds, before = plan.sites.get(self.site, ()), self._current
        if not seeds and not self._seeds:
            return
        current = self._host_path()
        if seeds:
            alphas = self.runtime.alpha_reader(plan.restricted([self.site]))
            current = active_path(self, current, self._callbacks(), self.layer_name, seeds, alphas)
        if self.runtime.has_graph_breaks:
            current = PlanHandover([self.runtime], before, current, self._finish)
        self._current = current
        self._alphas = self.state.alpha_blend
        self._run = self._untimed()
        self._seeds = seeds

    def _finish(self, handover: PlanHandover) -> None:
        with self.runtime.lock:  # another thread may be committing
            if self._current is handover:
                self._current = handover.new
                self._run = self._untimed()

    def install_entry_hook(self) -> None:
        self._has_entry_hook = True
        self._run = self._untimed()

    def remove_entry_hook(self) -> None:
        self._has_entry_hook = False
        self._run = self._untimed()

    def _untimed(self) -> SitePath:
        """What `_run` is while nothing is timed."""
        if self._has_entry_hook:
            return self._enter
        if self.site not in self.runtime.called:
            return self._first
        return self._current if self._meter is None else self._counted

    def _first(self, x: torch.Tensor) -> torch.Tensor:
        with self.runtime.lock:
            self.runtime.called.add(self.site)
            self._run = self._untimed()
        return self._run(x)

    def _enter(self, x: torch.Tensor) -> torch.Tensor:
        self.runtime.called.add(self.site)
        self._begin()
        return self._counted(x)

    def _begin(self) -> None:
        if threading.get_ident() not in self.runtime.whole:
            self.runtime.enter()

    def _counted(self, x: torch.Tensor) -> torch.Tensor:
        if self._meter is not None:
            self._meter.counter.tick()
        return self._current(x)

    def sample(self, telemetry: Telemetry, calls: list[int]) -> None:
        """Time every call of this thread until :meth:`end_sample`, and note each in `calls` by this layer's site."""
        thread = threading.get_ident()

        def timed(x: torch.Tensor) -> torch.Tensor:
            if threading.get_ident() != thread:
                return self._current(x)
            calls.append(self.site)
            watch = telemetry.stopwatch()
            y = self._current(x)
            watch.stop()
            telemetry.record(self.site, watch)
            return y

        with self.runtime.lock:
            self._run = timed

    def end_sample(self) -> None:
        """Stop timing."""
        with self.runtime.lock:
            self._run = self._untimed()
        telemetry = self.runtime.telemetry
        if telemetry is not None:
            for seed in self._seeds:
                self.state.record_latency(seed.seed, telemetry.latency_μs(self.site))

    def sample_next(self, telemetry: Telemetry) -> None:
        """Time the next call of a layer that stands alone."""

        def timed(x: torch.Tensor) -> torch.Tensor:
            with self.runtime.lock:
                self._run = self._untimed()
            watch = telemetry.stopwatch()
            y = self._run(x)
            watch.stop()
            telemetry.record(self.site, watch)
            self.end_sample()
            return y

        with self.runtime.lock:
            if not self._has_entry_hook:
                self._run = timed

    # -- copies and checkpoints ------------------------------------------------------------------------------------

    def as_host(self) -> nn.Module:
        """A module of the host's class with this one's parameters, hooks and training flag, and nothing of Esper."""
        raise NotImplementedError

    def _packing(self) -> tuple[Callable[..., KasminaLayer], dict[str, Any]]:
        """What makes a layer like this one, which stands alone, of its host, and options that it takes for that."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> KasminaLayer:
        """A copy that stands alone, with copies of the kernels in force."""
        packed = copy.deepcopy(_PackedLayer.of(self), memo)
        twin = packed.unpack(source=self.kernel_cache.source, sink=self.control.sink)
        copy_schedules({self.layer_name: self}, {self.layer_name: twin})
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _PackedLayer.unpack, (_PackedLayer.of(self),)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        bank = self._modules.get(BANK_NAME)
        if isinstance(bank, ActiveKernels):
            bank.expect(state_dict, f"{prefix}{BANK_NAME}.")  # raises before anything is loaded
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # -- control ---------------------------------------------------------------------------------------------------

    def seed(self, seed_idx: int) -> Seed:
        """The seed of that number. Raises `TypeError` for what is none, and `IndexError` if there is no such seed."""
        number = seed_number(seed_idx)
        self.state.lifecycle(number)  # which raises
        return self.seeds[number]

    @property
    def num_seeds(self) -> int:
        return self.state.num_seeds

    @property
    def features(self) -> tuple[int, int] | None:
        """Sizes of the last dimensions of input and output; None while they are not known."""
        raise NotImplementedError

    @property
    def told_features(self) -> tuple[int, int] | None:
        """What is known of them without a forward, which is the same on all ranks."""
        return self.features

    @property
    def placement(self) -> tuple[torch.device, torch.dtype]:
        """The device and dtype of the host's parameters, which its kernels have too."""
        raise NotImplementedError

    @property
    def linear_map(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weight and bias, into which affine fossils are folded; None in the place of what is no linear layer."""
        return None

    @property
    def input_dim(self) -> int:
        """Size of the last dimension of the input."""
        return self._known_features()[0]

    @property
    def output_dim(self) -> int:
        """Size of the last dimension of the output."""
        return self._known_features()[1]

    def _known_features(self) -> tuple[int, int]:
        features = self.features
        if features is None:
            raise UnknownFeaturesError(
                f"how many features go into {self.layer_name!r} and out of it is not known before its first forward: "
                f"call the model once, or give both numbers: target_layers={{{self.layer_name!r}: (in_features, "
                "out_features)}"
            )
        return features

    @property
    def default_transform(self) -> nn.Module:
        """The host's path: a module of its class, without hooks, that shares this one's parameters."""
        host, bare = self.as_host(), nn.Module()
        host.__dict__.update({name: value for name, value in bare.__dict__.items() if name.endswith("_hooks")})
        return host

    def request_kernel(
        self,
        seed_idx: int,
        kernel_artifact_id: str,
        *,
        alpha: float | AlphaSchedule = 1.0,
        trainable: bool = False,
        isolate: bool = False,
    ) -> KernelRequest:
        """Ask for a kernel and go on; the `concurrent.futures.Future[bool]` tells whether it is staged, and how far it
        is.

        A staged kernel comes into force with the next forward (`commit="auto"`) or at `commit()`. Parameters and
        errors as for :meth:`load_kernel`.
        """
        seed = self.seed(seed_idx)
        return self.control.load(seed, kernel_artifact_id, alpha=alpha, trainable=trainable, isolate=isolate)

    async def load_kernel(
        self,
        seed_idx: int,
        kernel_artifact_id: str,
        *,
        alpha: float | AlphaSchedule = 1.0,
        trainable: bool = False,
        isolate: bool = False,
    ) -> bool:
        """Load a kernel into seed `seed_idx`.

        `kernel_artifact_id` is a full id, a unique prefix of at least 12 hex digits, or a registered name. `alpha` is
        the kernel's share in the output, a number from 0 to 1 or a schedule. With `trainable` the kernel's parameters
        learn; with `isolate` its input is detached, so that the host gets no gradient through it.

        Returns whether the kernel is staged; awaited on the thread that runs the model, between its forwards (and with
        `commit="auto"`), it is in force then. False leaves the layer as it was, with the reason in `seed_errors`.
        Raises `IndexError` for a seed that does not exist, `AlphaError`, and `LifecycleError` for a fossilized seed. A
        task that is cancelled here cancels the load.
        """
        future = self.request_kernel(seed_idx, kernel_artifact_id, alpha=alpha, trainable=trainable, isolate=isolate)
        try:
            staged: bool = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self.control.cancel(self.seed(seed_idx), future)
            raise
        if staged:
            self.runtime.commit_if_idle()
        return staged

    def unload_kernel(self, seed_idx: int) -> bool:
        """Make seed `seed_idx` dormant again, or cancel its load; False if there is nothing to unload.

        True means staged, as for :meth:`fossilize`. Where the seed keeps its place until a variant is compiled, its
        alpha is 0 meanwhile (`commit="auto"`). Raises `LifecycleError` for a fossilized seed.
        """
        staged = self.control.unload(self.seed(seed_idx))
        self.runtime.commit_if_idle()
        return staged

    def fossilize(self, seed_idx: int) -> bool:
        """Make the kernel of seed `seed_idx` permanent at its present alpha; False unless it is active.

        At a linear layer an affine kernel becomes part of its weight and bias, where that is exact. All others stay
        kernels, of a constant share: also hidden neurons beside a block, which only :func:`esper.bake` can make part of
        its layers, as these get other shapes.

        True means staged: alpha is fixed from now on, and the seed can no more be unloaded, replaced or weighted.
        Called on the thread that runs the model, between its forwards, it is in force at the return and the seed
        `FOSSILIZED`; with `commit="manual"` at `commit()`. In a model compiled with `backend="esper"` that takes until
        the variant is compiled: the seed is `ACTIVE` meanwhile, and computes the same. Should that fail it stays so,
        with the reason in `seed_errors`.
        """
        staged = self.control.fossilize(self.seed(seed_idx))
        self.runtime.commit_if_idle()
        return staged

    def set_alpha(self, seed_idx: int, value: float | AlphaSchedule) -> None:
        """Set the share of seed `seed_idx` in the output, or a schedule that moves it with the optimizer's steps.

        Takes effect at the next forward and never recompiles. During a load it is for the kernel that is loaded. A seed
        without either has no use for one, since each load brings its own `alpha`: that is logged as a warning, once
        for each seed. Raises `IndexError`, `AlphaError`, and `LifecycleError` for a fossilized seed.
        """
        self.control.set_alpha(self.seed(seed_idx), value)

    def drop_kernels(self) -> list[int]:
        """Make every seed dormant at once, fossils too; the seeds that held or awaited a kernel."""
        held = [seed.index for seed in self.seeds if seed.lifecycle is not SeedLifecycleState.DORMANT]
        if held:
            self.control.restore(self.seeds, [])
        return held

    def kernel_parameters(self, seed_idx: int) -> tuple[nn.Parameter, ...]:
        """The parameters of the kernel in force at a seed, in the order of its graph's tensors; empty if dormant."""
        seed = next((each for each in self._seeds if each.seed == seed_idx), None)
        return seed.kernel.parameters if seed is not None else ()

    def kernel_in_force(self, seed_idx: int) -> str | None:
        """The id of the artifact that runs at a seed; None for a fossil that the layer's own weight has taken in."""
        return next((each.kernel.artifact_id for each in self._seeds if each.seed == seed_idx), None)

    def memory_bytes(self) -> int:
        """Bytes of this layer's seed state and of the kernels in its seeds; not of the host's parameters."""
        kernels = sum(p.numel() * p.element_size() for seed in self._seeds for p in seed.kernel.parameters)
        return self.state.nbytes + kernels

    def get_layer_stats(self) -> dict[str, Any]:
        """Counts and averages of this layer.

        `execution_count` and `avg_latency_μs` (microseconds, mean over the last sampled executions) are measured with
        telemetry on and 0 without; cache sizes are those of the whole model's cache, hits and misses this layer's.
        `seeds` has for each seed its `state`, `alpha` (its share in the output as it is in force: 0.0 without a
        kernel), `kernel` (the id of the artifact that runs, or None),
        `error_count`, and the `reason` why its last load failed.
        """
        telemetry = self.runtime.telemetry
        return {
            "layer_id": self.layer_id,
            "layer_name": self.layer_name,
            "num_seeds": self.num_seeds,
            "active_seeds": len(self.state.active_seeds()),
            "error_seeds": len(self.state.error_seeds()),
            "execution_count": telemetry.executions(self.site) if telemetry else 0,
            "avg_latency_μs": telemetry.latency_μs(self.site) if telemetry else 0.0,
            **self.kernel_cache.get_cache_stats(),
            "seeds": [seed.stats(self.kernel_in_force(seed.index)) for seed in self.seeds],
        }

    def extra_repr(self) -> str:
        active, fossils = len(self.state.active_seeds()), len(self.state.seeds_in(SeedLifecycleState.FOSSILIZED))
        counts = f"num_seeds={self.num_seeds}, active_seeds={active}"
        return ", ".join(filter(None, (super().extra_repr(), counts, f"fossilized_seeds={fossils}" if fossils else "")))


class LinearSite(KasminaLayer, nn.Linear):
    """A linear layer that carries seeds. Its name is that of all layers with seeds."""

    @classmethod
    def at_site(cls, linear: nn.Linear, parts: LayerParts) -> LinearSite:
        """The layer that takes `linear`'s place, sharing its parameters."""
        layer = cls._sharing(linear)
        layer._modules.clear()  # it gets a replica of what these are
        layer._join(parts)
        return layer

    @classmethod
    def alone(cls, host: nn.Linear, **options: Any) -> LinearSite:
        """A layer that stands alone and shares the parameters of `host`; `options` are those of the constructor."""
        layer = cls._sharing(host)
        layer._stand_alone(**options)
        return layer

    @classmethod
    def _sharing(cls, linear: nn.Linear) -> LinearSite:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.__dict__.update(
            {name: value for name, value in linear.__dict__.items() if name not in ("_modules", "forward")}
        )
        layer.__dict__["_modules"] = {}
        parametrize_alike(linear, layer)
        return layer

    def _get_name(self) -> str:
        return KasminaLayer.__name__

    # -- what it computes ------------------------------------------------------------------------------------------

    forward = site_forward

    def _host_path(self) -> SitePath:
        return dormant_path(self)

    def _forward_traced(self, input: torch.Tensor) -> torch.Tensor:
        """For Dynamo, where the layer is more than one marker, or none."""
        marks = marked_by_esper()
        if self._backward_hooks or self._backward_pre_hooks or (marks and kernels_have_hooks()):
            uncompiled: torch.Tensor = site_marker.call_uncompiled(self._outside_graphs, input)
            return uncompiled
        if self._stands_alone:
            self._begin_traced(marks)
        if marks:
            marked: torch.Tensor = TAGGED_SITE(input, self.weight, self.bias, self._site_tag)
            return marked
        return self._blended(input, torch.nn.functional.linear(input, self.weight, self.bias))

    def _callbacks(self) -> tuple[Mapping[int, Any], ...]:
        return self._backward_hooks, self._backward_pre_hooks

    def _get_backward_hooks(self) -> tuple[list[Any], list[Any]]:
        """What torch calls around the layer: with kernels in force, not the layer's own, which see its linear layer.

        So per-sample gradients and Kronecker factors, which hooks on linear layers compute of inputs and of gradients
        of outputs, are those of the weight. Forward hooks see what the layer returns.
        """
        full, others = super()._get_backward_hooks()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        own = len(self._backward_hooks) if self._is_full_backward_hook else 0
        return full[: len(full) - own] if self._sees_to_hooks() else full, others

    def _get_backward_pre_hooks(self) -> list[Any]:
        """As :meth:`_get_backward_hooks`."""
        every: list[Any] = super()._get_backward_pre_hooks()  # type: ignore[no-untyped-call]  # as above
        return every[: len(every) - len(self._backward_pre_hooks)] if self._sees_to_hooks() else every

    def _sees_to_hooks(self) -> bool:
        return torch.compiler.is_dynamo_compiling() or self._runs_kernels()

    def _runs_kernels(self) -> bool:
        """Whether it does so in the forward that is under way on this thread."""
        overtaken = isinstance(self._current, PlanHandover)
        return bool(self.runtime.begun_with.sites.get(self.site) if overtaken else self._seeds)

    def _outside_graphs(self, x: torch.Tensor) -> torch.Tensor:
        """The layer outside of graphs: compiled code cannot call its hooks, or a kernel's, within a site."""
        if self._has_entry_hook:
            self._begin()
        self.runtime.divide()
        return self._run(x) if self._runs_kernels() else with_backward_hooks(self, self._run, x)

    # -- what it is ------------------------------------------------------------------------------------------------

    def as_host(self) -> nn.Linear:
        return plain_linear(self)

    def _packing(self) -> tuple[Callable[..., KasminaLayer], dict[str, Any]]:
        return LinearSite.alone, {}

    @property
    def features(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    @property
    def placement(self) -> tuple[torch.device, torch.dtype]:
        return self.weight.device, self.weight.dtype

    @property
    def linear_map(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.weight, self.bias

    def take_in(self, linear: nn.Linear) -> None:
        """Stand in the place of `linear` from now on, with its parameters, features, hooks and training flag."""
        kept = ("_modules", "forward")
        self.__dict__.update({name: value for name, value in linear.__dict__.items() if name not in kept})
        self.absence = None
        for seed in self._seeds:
            seed.kernel.module.to(linear.weight.device, linear.weight.dtype)
        self._current = self._host_path()  # which reads the parameters from where they are now
        self.follow(self.runtime.following)
        self._run = self._untimed()


class _LayerMeter:
    """Counts the calls of a layer that stands alone."""

    def __init__(self, layer: KasminaLayer) -> None:
        self.counter = CallCounter()
        self._layer = weakref.ref(layer)

    def sample(self, telemetry: Telemetry) -> None:
        """Time the layer's next call."""
        layer = self._layer()
        if layer is not None:
            layer.sample_next(telemetry)


@dataclass(frozen=True, slots=True)
class _PackedLayer:
    """A layer as it is copied and pickled: as one that stands alone, without its kernel source and telemetry sink."""

    alone: Callable[..., KasminaLayer]
    """Makes the layer again, of its host."""
    host: nn.Module
    options: dict[str, Any]
    seeds: LayerSeeds

    @classmethod
    def of(cls, layer: KasminaLayer) -> _PackedLayer:
        """`layer`, with its parameters and kernels, not copies of them."""
        options = {
            "layer_id": layer.layer_id,
            "layer_name": layer.layer_name,
            "num_seeds": layer.num_seeds,
            "cache_size_mb": layer.kernel_cache.max_cache_size_mb,
            "telemetry_enabled": layer.runtime.telemetry is not None,
            "commit": layer.runtime.commit_mode,
        }
        alone, more = layer._packing()
        return cls(alone, layer.as_host(), {**options, **more}, LayerSeeds.of(layer))

    def unpack(self, **outside: Any) -> KasminaLayer:
        """A layer with these seeds; `outside` are its source and sink, the defaults if left out."""
        layer = self.alone(self.host, **self.options, **outside)
        restore_seeds({layer.layer_name: layer}, {layer.layer_name: self.seeds}, tell=not outside)
        return layer


def _checked_name(layer_id: object, layer_name: str) -> str:
    """The name of a layer that stands alone: its number, if it has no other."""
    if isinstance(layer_id, bool) or not isinstance(layer_id, int) or layer_id < 0:
        raise ValueError(
            f"layer_id must be a whole number, at least 0, not {layer_id!r}; a name is given as layer_name"
        )
    return layer_name or str(layer_id)
