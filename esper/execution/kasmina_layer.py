"""The module that stands at a site."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch import nn

from esper.execution import defaults
from esper.execution.alpha import AlphaSchedule
from esper.execution.defaults import TelemetrySink
from esper.execution.kernel_bank import BANK_NAME, KernelBank
from esper.execution.kernel_cache import KernelCache
from esper.execution.plan import Plan, SeedPlan
from esper.execution.runtime import CommitMode, Runtime
from esper.execution.site_marker import (
    commit_while_tracing,
    enter_uncompiled,
    postponed_while_tracing,
    traced_by_esper,
)
from esper.execution.sources import KernelSource
from esper.execution.staging import Stager
from esper.execution.state_layout import KasminaStateLayout
from esper.execution.telemetry import Telemetry
from esper_passes import ENTER, SITE

__all__ = ["KasminaLayer"]


class KasminaLayer(nn.Linear):
    """A linear layer with `num_seeds` seeds, `[*, input_dim] -> [*, output_dim]`.

    In a wrapped model it stands where the host's `nn.Linear` stood and shares that module's parameters. It also stands
    alone: constructed directly, it has a linear layer, a state, a cache and a plan of its own.

    With seeds `s` active in index order the output is `y = host(x)`, then for each
    `y = alpha_s * K_s(x) + (1 - alpha_s) * y`.
    """

    site: int
    first_seed: int
    runtime: Runtime
    stager: Stager
    kernel_cache: KernelCache
    state: KasminaStateLayout
    seed_errors: dict[int, str]

    def __init__(
        self,
        layer_id: str,
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
    ) -> None:
        super().__init__(input_dim, output_dim, bias=bias, device=device, dtype=dtype)
        runtime = Runtime(KasminaStateLayout(num_seeds, self.weight.device), commit)
        cache = KernelCache(cache_size_mb, source=source or defaults.kernel_source())
        attach = defaults.attach_kernel()
        self._join(
            layer_id=layer_id,
            site=runtime.reserve_sites(1)[0],
            first_seed=0,
            runtime=runtime,
            stager=Stager(runtime, cache, attach, sink if telemetry_enabled else None),
            cache=cache.view(layer_id),
            state=runtime.state,
        )
        self._stands_alone = True
        runtime.is_training = lambda: self.training
        bank = KernelBank(runtime.state, {self.site: layer_id}, runtime.refresh)
        runtime.on_commit = bank.sync
        self.add_module(BANK_NAME, bank)

    @classmethod
    def at_site(cls, linear: nn.Linear, **parts: Any) -> KasminaLayer:
        """The layer that takes `linear`'s place, sharing its parameters; `parts` are those of :meth:`_join`."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.__dict__.update(
            {name: value for name, value in linear.__dict__.items() if name not in ("_modules", "forward")}
        )
        layer.__dict__["_modules"] = {}
        layer._join(**parts)
        return layer

    def _join(
        self,
        *,
        layer_id: str,
        site: int,
        first_seed: int,
        runtime: Runtime,
        stager: Stager,
        cache: KernelCache,
        state: KasminaStateLayout,
    ) -> None:
        self.layer_id = layer_id
        self.site = site
        self.first_seed = first_seed
        self.runtime = runtime
        self.stager = stager
        self.kernel_cache = cache
        self.state = state
        self.seed_errors = {}
        self._runtime_id = runtime.id
        self._stands_alone = False
        self._armed = False
        self._pinned: dict[int, str] = {}
        self._seeds: tuple[SeedPlan, ...] = ()
        self._alphas = state.alpha_blend
        self._current: Callable[[torch.Tensor], torch.Tensor] = self._dormant()
        self._run = self._current
        runtime.add_executor(self)

    # -- what it computes ------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_dynamo_compiling():
            if traced_by_esper():
                if self._stands_alone:
                    ENTER(self._runtime_id)
                marked: torch.Tensor = SITE(x, self.weight, self.bias, self.site)
                return marked
            if self._stands_alone and self.runtime.scheduled:
                enter_uncompiled(self._runtime_id)
            elif self._stands_alone:
                commit_while_tracing(self._runtime_id)
                if self.runtime.pending:  # the guard that brings Dynamo here again when something is staged
                    postponed_while_tracing(self._runtime_id)
            return self._traced(x)
        return self._run(x)

    def _dormant(self) -> Callable[[torch.Tensor], torch.Tensor]:
        parameters, linear = self._parameters, torch.nn.functional.linear

        def dormant(x: torch.Tensor) -> torch.Tensor:
            try:
                return linear(x, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]
            except KeyError:  # the parameters are computed: parametrizations, or old-style weight norm
                return linear(x, self.weight, self.bias)

        return dormant

    def _active(self, seeds: tuple[SeedPlan, ...], plan: Plan) -> Callable[[torch.Tensor], torch.Tensor]:
        read = self.runtime.alpha_reader(plan)
        host_path = self._dormant()
        executors = [(seed, seed.kernel.executor) for seed in seeds]

        def active(x: torch.Tensor) -> torch.Tensor:
            y = host = host_path(x)
            for (seed, kernel), alpha in zip(executors, read().unbind(), strict=True):
                y = _blend(y, _kernel_output(seed, kernel, x, host), alpha)
            return y

        return active

    def _traced(self, x: torch.Tensor) -> torch.Tensor:
        """For Dynamo under any other backend, which guards on the seeds and traces again when they change."""
        y = host = torch.nn.functional.linear(x, self.weight, self.bias)
        for seed in self._seeds:
            kernel = _kernel_output(seed, seed.kernel.module, x, host)
            y = _blend(y, kernel, self._alphas[seed.seed].clone())
        return y

    # -- Executor --------------------------------------------------------------------------------------------------

    def prepare(self, plan: Plan) -> None:
        """Nothing to prepare: the layer calls its kernels one by one."""

    def follow(self, plan: Plan) -> None:
        """Switch to `plan`."""
        seeds = plan.sites.get(self.site, ())
        if seeds:
            self._current = self._active(seeds, plan.restricted([self.site]))
        elif self._seeds:
            self._current = self._dormant()
        self._alphas = self.state.alpha_blend
        self._seeds = seeds
        if not self._armed:
            self._run = self._current

    def arm(self) -> None:
        """A layer inside a model leaves the boundary to the model."""
        if self._stands_alone:
            self._armed = True
            self._run = self._enter

    def disarm(self) -> None:
        self._armed = False
        self._run = self._current

    def _enter(self, x: torch.Tensor) -> torch.Tensor:
        self.runtime.boundary()
        return self._current(x)

    def sample(self, telemetry: Telemetry, calls: list[int]) -> None:
        """Time every call until :meth:`end_sample`, and note each in `calls` by this layer's site."""
        current = self._current

        def timed(x: torch.Tensor) -> torch.Tensor:
            calls.append(self.site)
            watch = telemetry.stopwatch()
            y = current(x)
            watch.stop()
            telemetry.record(self.site, watch)
            return y

        self._run = timed

    def end_sample(self) -> None:
        """Stop timing."""
        self._run = self._enter if self._armed else self._current
        telemetry = self.runtime.telemetry
        if telemetry is not None:
            for seed in self._seeds:
                self.state.record_latency(seed.seed, telemetry.latency_μs(self.site))

    # -- control ---------------------------------------------------------------------------------------------------

    @property
    def num_seeds(self) -> int:
        return self.state.num_seeds

    @property
    def input_dim(self) -> int:
        """Size of the last dimension of the input."""
        return self.in_features

    @property
    def output_dim(self) -> int:
        """Size of the last dimension of the output."""
        return self.out_features

    @property
    def default_transform(self) -> nn.Linear:
        """The host's path: a linear layer that shares this one's parameters."""
        linear = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(linear)
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.__dict__["_parameters"] = self._parameters
        return linear.train(self.training)

    def request_kernel(
        self,
        seed_idx: int,
        kernel_artifact_id: str,
        *,
        alpha: float | AlphaSchedule = 1.0,
        trainable: bool = False,
        isolate: bool = False,
    ) -> Future[bool]:
        """Ask for a kernel and go on; the `concurrent.futures.Future[bool]` tells whether it is staged.

        A staged kernel comes into force with the next forward (`commit="auto"`) or at `commit()`. Parameters and
        errors as for :meth:`load_kernel`.
        """
        return self.stager.load(self, seed_idx, kernel_artifact_id, alpha=alpha, trainable=trainable, isolate=isolate)

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

        Returns whether the kernel is staged; awaited on the thread that runs the model (and with `commit="auto"`) it
        is in force then. False leaves the layer as it was, with the reason in `seed_errors`. Raises `IndexError` for
        a seed that does not exist, `AlphaError`, and `LifecycleError` for a fossilized seed.
        """
        future = self.request_kernel(seed_idx, kernel_artifact_id, alpha=alpha, trainable=trainable, isolate=isolate)
        staged: bool = await asyncio.wrap_future(future)
        if staged:
            self.runtime.commit_if_idle()
        return staged

    def unload_kernel(self, seed_idx: int) -> bool:
        """Make seed `seed_idx` dormant again, or call off its load; False if there is nothing to unload."""
        staged = self.stager.unload(self, seed_idx)
        self.runtime.commit_if_idle()
        return staged

    def fossilize(self, seed_idx: int) -> bool:
        """Make the kernel of seed `seed_idx` permanent at its present alpha; False unless it is active."""
        staged = self.stager.fossilize(self, seed_idx)
        self.runtime.commit_if_idle()
        return staged

    def set_alpha(self, seed_idx: int, value: float | AlphaSchedule) -> None:
        """Set the share of seed `seed_idx` in the output, or a schedule that moves it with every training forward.

        Takes effect at the next forward and never recompiles. Raises `IndexError` and `AlphaError`.
        """
        self.stager.set_alpha(self, seed_idx, value)

    def pin(self, seed_idx: int, kernel_artifact_id: str | None) -> None:
        """Keep the kernel of a seed in the cache, and let go of the one it replaces."""
        before = self._pinned.pop(seed_idx, None)
        if kernel_artifact_id is not None:
            self._pinned[seed_idx] = kernel_artifact_id
        if before is not None:
            self.kernel_cache.unpin(before)

    def kernel_parameters(self, seed_idx: int) -> tuple[nn.Parameter, ...]:
        """The parameters of the kernel in force at a seed, in the order of its graph's tensors; empty if dormant."""
        seed = next((each for each in self._seeds if each.seed == seed_idx), None)
        return seed.kernel.parameters if seed is not None else ()

    def memory_bytes(self) -> int:
        """Bytes of this layer's seed state and of the kernels in its seeds; not of the host's parameters."""
        kernels = sum(p.numel() * p.element_size() for seed in self._seeds for p in seed.kernel.parameters)
        return self.state.nbytes + kernels

    def get_layer_stats(self) -> dict[str, Any]:
        """Counts and averages of this layer.

        `execution_count` and `avg_latency_μs` (microseconds, mean over the last sampled executions) are measured with
        telemetry on and 0 without; cache sizes are those of the whole model's cache, hits and misses this layer's.
        """
        telemetry = self.runtime.telemetry
        return {
            "layer_id": self.layer_id,
            "num_seeds": self.num_seeds,
            "active_seeds": len(self.state.active_seeds()),
            "error_seeds": len(self.state.error_seeds()),
            "execution_count": telemetry.executions(self.site) if telemetry else 0,
            "avg_latency_μs": telemetry.latency_μs(self.site) if telemetry else 0.0,
            **self.kernel_cache.get_cache_stats(),
        }

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_seeds={self.num_seeds}, active_seeds={len(self._seeds)}"


def _kernel_output(
    seed: SeedPlan, kernel: Callable[..., torch.Tensor], x: torch.Tensor, host: torch.Tensor
) -> torch.Tensor:
    if seed.isolate:
        x, host = x.detach(), host.detach()
    return kernel(x, host) if seed.uses_host else kernel(x)


def _blend(y: torch.Tensor, kernel: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    return torch.lerp(y, kernel.type_as(y), alpha.type_as(y))
