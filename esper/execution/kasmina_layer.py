"""`KasminaLayer`, the module that stands in for a linear layer and carries seeds."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from esper.errors import EsperError
from esper.execution import site_marker
from esper.execution.assembly import Assembly, LayerParts
from esper.execution.kernels import service_locator
from esper.execution.kernels.service_locator import TelemetrySink
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.plain_linear import parametrize_alike, plain_linear
from esper.execution.plans import registry
from esper.execution.plans.handover import PlanHandover
from esper.execution.plans.model_link import ModelLink
from esper.execution.plans.plan import SeedPlan
from esper.execution.plans.runtime import CommitMode
from esper.execution.plans.site_executor import SiteExecutor
from esper.execution.seeds.active_kernels import BANK_NAME, ActiveKernels
from esper.execution.seeds.copying import PackedLayer, copy_schedules
from esper.execution.seeds.layer_control import LayerControl
from esper.execution.seeds.seed import Seed
from esper.execution.site_forward import kernels_have_hooks, site_forward
from esper.execution.site_marker import commit_while_tracing, enter_uncompiled, marked_by_esper
from esper.execution.site_paths import SitePath, active_path, blended, dormant_path, with_backward_hooks
from esper.execution.sources import KernelSource
from esper.execution.telemetry import CallCounter, Telemetry
from esper_passes import TAGGED_ENTER, TAGGED_SITE

__all__ = ["KasminaLayer", "LinearSite", "UnknownFeaturesError"]


class UnknownFeaturesError(EsperError, RuntimeError):
    """It is not known yet how many features a module has."""


class KasminaLayer(SiteExecutor, LayerControl, nn.Module):
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
    first_seed: int
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
        self._begin_without_seeds(meter)
        runtime.add_executor(self)
        if runtime.telemetry is not None:
            runtime.telemetry.add(self)
            if meter is not None:
                runtime.telemetry.watch(meter, [self.site])

    # -- what it computes ------------------------------------------------------------------------------------------

    def _path_with(self, seeds: Sequence[SeedPlan], alphas: Callable[[], torch.Tensor]) -> SitePath:
        return active_path(self, self._host_path(), self._callbacks(), self.layer_name, seeds, alphas)

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

    # -- copies and checkpoints ------------------------------------------------------------------------------------

    def as_host(self) -> nn.Module:
        """A module of the host's class with this one's parameters, hooks and training flag, and nothing of Esper."""
        raise NotImplementedError

    def _packing(self) -> tuple[Callable[..., KasminaLayer], dict[str, Any]]:
        """What makes a layer like this one, which stands alone, of its host, and options that it takes for that."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> KasminaLayer:
        """A copy that stands alone, with copies of the kernels in force."""
        packed = copy.deepcopy(PackedLayer.of(self), memo)
        twin: KasminaLayer = packed.unpack(source=self.kernel_cache.source, sink=self.control.sink)
        copy_schedules({self.layer_name: self}, {self.layer_name: twin})
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return PackedLayer.unpack, (PackedLayer.of(self),)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        bank = self._modules.get(BANK_NAME)
        if isinstance(bank, ActiveKernels):
            bank.expect(state_dict, f"{prefix}{BANK_NAME}.")  # raises before anything is loaded
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # -- control ---------------------------------------------------------------------------------------------------

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


def _checked_name(layer_id: object, layer_name: str) -> str:
    """The name of a layer that stands alone: its number, if it has no other."""
    if isinstance(layer_id, bool) or not isinstance(layer_id, int) or layer_id < 0:
        raise ValueError(
            f"layer_id must be a whole number, at least 0, not {layer_id!r}; a name is given as layer_name"
        )
    return layer_name or str(layer_id)
