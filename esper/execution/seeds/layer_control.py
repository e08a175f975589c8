"""What is asked of a layer with seeds: to load, unload, fossilize and weight kernels; and its statistics."""

from __future__ import annotations

import asyncio
from typing import Any

from torch import nn

from esper.execution.kernel_cache import KernelCache
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.plans.alpha import AlphaSchedule
from esper.execution.plans.plan import SeedPlan
from esper.execution.plans.runtime import Runtime
from esper.execution.seeds.control import SeedControl
from esper.execution.seeds.progress import KernelRequest
from esper.execution.seeds.seed import Seed
from esper.execution.state_layout import KasminaStateLayout, seed_number

__all__ = ["LayerControl"]


class LayerControl:
    """What :class:`~esper.KasminaLayer` can be asked for. Seeds are given by their numbers, from 0."""

    layer_id: int
    """Its number in the model, in the order of the sites."""
    layer_name: str
    """The host's dotted name for it; of a layer that stands alone what it was given, by default its number."""
    site: int
    runtime: Runtime
    control: SeedControl
    seeds: tuple[Seed, ...]
    kernel_cache: KernelCache
    state: KasminaStateLayout
    seed_errors: dict[int, str]
    """By seed, why the last load into it failed."""
    _seeds: tuple[SeedPlan, ...]

    def seed(self, seed_idx: int) -> Seed:
        """The seed of that number. Raises `TypeError` for what is none, and `IndexError` if there is no such seed."""
        number = seed_number(seed_idx)
        self.state.lifecycle(number)  # which raises
        return self.seeds[number]

    @property
    def num_seeds(self) -> int:
        return self.state.num_seeds

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
