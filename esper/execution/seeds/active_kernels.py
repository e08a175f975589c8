"""The module that holds a model's active kernels, so that `parameters()`, `to()` and `state_dict()` see them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from esper.artifacts.graph import DTYPES
from esper.execution.kernels.loaded_kernel import KernelTemplate, LoadedKernel
from esper.execution.kernels.local_parts import local
from esper.execution.kernels.model_optimizers import ModelOptimizers
from esper.execution.kernels.optimizer_steps import OptimizerSteps
from esper.execution.kernels.optimizers import KernelParameter, count_steps, kernels_changed
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.plans.alpha import SavedRamp
from esper.execution.plans.plan import DORMANT, Plan, SeedPlan
from esper.execution.plans.runtime import Runtime
from esper.execution.seeds.checkpoint import (
    ARTIFACT,
    INDEX,
    CheckpointError,
    SavedKernel,
    SavedSeed,
    decode,
    encode,
    seed_key,
)
from esper.execution.seeds.control import SeedControl
from esper.execution.seeds.restoring import RestoredSeed
from esper.execution.seeds.seed import Seed, SeedLayer

__all__ = ["BANK_NAME", "ActiveKernels"]

_LOG = logging.getLogger("esper.execution")
_DORMANT = "esper_dormant"  # beside "version" in a state dict's metadata

BANK_NAME = "_esper"
"""The name under which a bank is registered: every state-dict key of Esper's starts with it."""


class GradientAveraging(Protocol):
    """What averages gradients over ranks; `esper.distributed` has it."""

    def follow(self, parameters: Sequence[nn.Parameter]) -> None: ...

    def close(self) -> None: ...


class ActiveKernels(nn.Module):
    """The modules of the kernels in force, and the seeds' state, which follows the model from device to device."""

    def __init__(self, runtime: Runtime, control: SeedControl, layers: Mapping[str, SeedLayer]) -> None:
        super().__init__()
        self._runtime = runtime
        self._control = control
        self._layers = dict(layers)
        self._names = {layer.site: name for name, layer in layers.items()}
        self._plan = DORMANT
        self._expected: tuple[SavedKernel, ...] = ()
        self._prefix = ""
        self.optimizers = ModelOptimizers(self._learning, self.model_parameters, lambda: runtime.version)
        """Those that follow the kernels in force."""
        self.gradients: GradientAveraging | None = None
        """What keeps the gradients of kernels the same on all ranks, where there are several."""
        self.register_load_state_dict_post_hook(_forgive_missing)  # type: ignore[no-untyped-call]  # torch leaves it so

    @property
    def is_empty(self) -> bool:
        """Whether no kernel is in force."""
        return not self._modules

    def sync(self, plan: Plan) -> None:
        """Hold the kernels of `plan` and no others."""
        wanted = {
            seed_key(self._names[site], seed.seed): seed.kernel.module
            for site, seeds in plan.sites.items()
            for seed in seeds
        }
        self.__dict__["_modules"] = wanted  # at once, whoever walks over them just now
        self._plan = plan
        self.optimizers.follow()
        kernels_changed(self)
        self.follow_gradients()

    def average_by(self, gradients: GradientAveraging) -> None:
        """Have gradients of kernels averaged by `gradients`, and by nobody else."""
        if self.gradients is not None:
            self.gradients.close()
        self.gradients = gradients
        self.follow_gradients()

    def follow_gradients(self) -> None:
        """Other kernels are in force, or other parameters learn: have the gradients of these averaged."""
        if self.gradients is not None:
            self.gradients.follow([each for seed in self._plan.seeds() for each in seed.kernel.parameters])

    def admit(self, seeds: Sequence[tuple[int, SeedPlan]]) -> None:
        """`seeds` are about to come into force at their sites: have their parameters in the optimizers they are for."""
        learning = [each for site, seed in seeds if seed.kernel.trainable for each in self._named(site, seed)]
        if learning:
            self.optimizers.admit(learning)

    def kernel_parameters_in_force(self) -> Iterator[KernelParameter]:
        """Their parameters, with their names."""
        for site, seeds in self._plan.sites.items():
            for each in seeds:
                yield from self._named(site, each)

    def _learning(self) -> Iterator[KernelParameter]:
        """Those of kernels that were loaded to learn."""
        for site, seeds in self._plan.sites.items():
            for each in seeds:
                yield from self._named(site, each) if each.kernel.trainable else ()

    def _named(self, site: int, seed: SeedPlan) -> Iterator[KernelParameter]:
        kernel, index, layer = seed.kernel, seed.seed, self._layers[self._names[site]]
        beside, full = layer._parameters.get("weight"), f"{BANK_NAME}.{seed_key(self._names[site], index)}"
        for name, parameter in zip(kernel.graph.parameter_names, kernel.parameters, strict=True):
            yield KernelParameter(
                parameter, layer.layer_name, index, name, kernel.artifact_id, beside, f"{full}.{name}"
            )

    def model_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the whole model."""
        return self._runtime.entries.parameters()

    @property
    def optimizer_steps(self) -> OptimizerSteps:
        """Where steps of the model's optimizers are counted."""
        return self._runtime.optimizer_steps

    def count_steps(self) -> None:
        """Have steps of the model's optimizers counted from now on: an alpha is to move."""
        count_steps(self)

    def trainable(self) -> Iterator[nn.Parameter]:
        """The parameters that learn."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move kernels, staged ones too, as any module's parameters; the state changes device but never dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        registered = {id(module) for module in self._modules.values()}
        for seed in self._runtime.target.seeds():
            if id(seed.kernel.module) not in registered:
                seed.kernel.module._apply(fn, recurse)  # type: ignore[no-untyped-call]  # as above
        state = self._runtime.state
        state.to(fn(torch.empty(0, dtype=torch.float32, device=state.device)).device)
        self._runtime.refresh()
        return self

    def forward(self, *_: Any) -> Any:
        raise TypeError("a ActiveKernels holds kernels and is not called")

    # -- saving ----------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        del keep_vars  # nothing here has a gradient
        for name, tensor in encode(self._saved()).items() if not self.is_empty else ():
            destination[prefix + name] = tensor
        self.mark(destination, prefix)

    def mark(self, state_dict: Any, prefix: str) -> None:
        """Say, beside the versions of the module at `prefix`, that no kernel was in force, if none is.

        The keys are those of the host then, and its class loads them as ever; `torch.save` keeps what is said.
        """
        said = getattr(state_dict, "_metadata", {}).get(prefix[:-1])
        if said is not None and self.is_empty:
            said[_DORMANT] = True

    def marked(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """`state_dict` with an entry that says so, if no kernel is in force: for files that keep tensors only."""
        named = any(key.startswith(f"{BANK_NAME}.") for key in state_dict)
        entries = encode(()) if self.is_empty and not named else {}
        return {**state_dict, **{f"{BANK_NAME}.{name}": tensor for name, tensor in entries.items()}}

    def __getattr__(self, name: str) -> Any:
        """What is saved is found by its name too: `torch.distributed.checkpoint` looks up every key of a state dict."""
        if name in (INDEX, ARTIFACT[:-1]) and not self.is_empty:
            artifacts = {seed.kernel.artifact_id: seed.kernel.template.data for seed in self._plan.seeds()}
            return tuple(self._saved()) if name == INDEX else SimpleNamespace(**artifacts)
        return super().__getattr__(name)

    def _saved(self) -> Iterator[tuple[SavedSeed, KernelTemplate]]:
        places = self._runtime.model.places(self._layers)
        for site, seeds in self._plan.sites.items():
            layer = self._layers[self._names[site]]
            for each in seeds:
                seed, state = each.seed, layer.state
                saved = SavedSeed(
                    layer=layer.layer_name,
                    place=None if (place := places.get(layer.layer_name)) == layer.layer_name else place,
                    seed=seed,
                    artifact=each.kernel.artifact_id,
                    trainable=each.kernel.trainable,
                    isolate=each.isolate,
                    fossilized=state.lifecycle(seed) is SeedLifecycleState.FOSSILIZED,
                    scheduled=(schedule := self._runtime.schedule(each.alpha_index)) is not None,
                    ramp=SavedRamp.of(schedule),
                    alpha=state.alpha(seed),
                    health=state.health(seed),
                    epoch=state.last_epoch(seed),
                    latency_μs=state.latency_μs(seed),
                    errors=state.errors(seed),
                )
                yield saved, each.kernel.template

    # -- loading ---------------------------------------------------------------------------------------------------

    def read(self, state_dict: Mapping[str, Any], prefix: str) -> tuple[SavedKernel, ...]:
        """The kernels in `state_dict` below `prefix`, verified; none if it has no entries of Esper's.

        Raises :class:`CheckpointError` for what is damaged or does not fit these layers, and `CommitError` inside a
        backward. Nothing is changed.
        """
        entries = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if not entries:
            return ()
        self._runtime.refuse_in_backward()
        kernels = decode(entries, self._known)
        standing = self._standing()
        for kernel in kernels:
            self._check_fits(kernel, standing)
        return kernels

    def _standing(self) -> Mapping[str, SeedLayer]:
        """The layers by where they stand."""
        return {place: self._layers[name] for name, place in self._runtime.model.places(self._layers).items()}

    def _known(self, artifact_id: str) -> KernelTemplate | None:
        cached = next(iter(self._layers.values())).kernel_cache.held(artifact_id) if self._layers else None
        return cached.template if cached is not None else None

    @staticmethod
    def _check_fits(kernel: SavedKernel, standing: Mapping[str, SeedLayer]) -> None:
        saved, graph = kernel.saved, kernel.template.graph
        layer = standing.get(saved.stands_at)
        if layer is None:
            near = difflib.get_close_matches(saved.stands_at, standing, n=3) or list(standing)[:8]
            known = f"; there are {', '.join(map(repr, near))}" if near else ""
            raise CheckpointError(
                f"the checkpoint has a kernel for layer {saved.stands_at!r}, which has no seeds{known}"
            )
        if saved.seed >= len(layer.seeds):
            raise CheckpointError(
                f"the checkpoint has a kernel for seed {saved.seed} of layer {saved.stands_at!r}, which has "
                f"{len(layer.seeds)} seeds; wrap the model with seeds_per_layer={saved.seed + 1} or more"
            )
        if layer.features not in (None, (graph.in_features, graph.out_features)):
            raise CheckpointError(
                f"the checkpoint's kernel for layer {saved.stands_at!r} maps {graph.in_features} to "
                f"{graph.out_features} features, but the layer maps {layer.input_dim} to {layer.output_dim}"
            )

    def said_dormant(self, said: Mapping[str, Any], state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Whether a checkpoint without kernels comes from a wrapped model: what :meth:`mark` or :meth:`marked` left.

        Raises `CommitError` inside a backward, where kernels could not leave.
        """
        dormant = bool(said.get(_DORMANT)) or prefix + INDEX in state_dict
        if dormant and not self._is_dormant:
            self._runtime.refuse_in_backward()
        return dormant

    @staticmethod
    def unmarked(said: Mapping[str, Any]) -> dict[str, Any]:
        """`said` for loading the host's part alone, which :meth:`is_unmarked` recognises."""
        return {**said, _DORMANT: None}

    @staticmethod
    def is_unmarked(said: Mapping[str, Any]) -> bool:
        """Whether somebody else sees to the kernels."""
        return said.get(_DORMANT, "") is None

    @property
    def _is_dormant(self) -> bool:
        """Whether no kernel is in force, staged, under way or folded into its layer's weight."""
        busy = (SeedLifecycleState.LOADING, SeedLifecycleState.FOSSILIZED)
        dormant = self._plan.is_dormant and self._runtime.target.is_dormant
        return dormant and all(seed.lifecycle not in busy for seed in self._seeds())

    def follow(self, kernels: tuple[SavedKernel, ...], dormant: bool, state_dict: Mapping[str, Any]) -> None:
        """Be as a checkpoint says whose host's part has been loaded: with `kernels`, or `dormant`, or as before."""
        if kernels or (dormant and not self._is_dormant):
            self.restore(kernels)
        elif not dormant and not self.is_empty and state_dict:
            _LOG.warning(
                "the checkpoint that was loaded is of the host alone, so the kernels in force stay; "
                "unload_kernel() takes them out"
            )

    def restore(self, kernels: tuple[SavedKernel, ...]) -> None:
        """Put exactly `kernels`, from :meth:`read`, in force: at once, and whatever is staged or under way."""
        self._runtime.model.find_peers()
        restored, standing = [], self._standing()
        for kernel in kernels:
            saved = kernel.saved
            layer = standing[saved.stands_at]
            seed, loaded = layer.seeds[saved.seed], self._with_values(kernel, layer)
            planned = SeedPlan(seed.index, loaded, saved.isolate, loaded.uses_host, seed.alpha_index)
            restored.append(RestoredSeed(seed, planned, saved.state(), saved.ramp, saved.scheduled))
        self._control.restore(self._seeds(), restored)

    def _seeds(self) -> list[Seed]:
        return [seed for layer in self._layers.values() for seed in layer.seeds]

    def _with_values(self, kernel: SavedKernel, layer: SeedLayer) -> LoadedKernel:
        """The kernel with the saved parameters: the one in force, so that optimizers keep theirs, if it is the same."""
        template, trainable = kernel.template, kernel.saved.trainable
        device, dtype = layer.placement
        current = self._plan.seed(layer.site, kernel.saved.seed)
        loaded = current.kernel if current is not None else None
        if loaded is None or (loaded.artifact_id, loaded.trainable) != (template.artifact_id, trainable):
            loaded = template.place(device, trainable=trainable)
            if DTYPES[template.graph.dtype] != dtype:  # the model was cast
                loaded.module.to(dtype)
        if self._runtime.share is not None:
            self._runtime.share(loaded)
        with torch.no_grad():
            for mine, theirs in zip(map(local, loaded.parameters), map(local, kernel.tensors), strict=True):
                if not _same(mine, theirs):
                    mine.copy_(theirs)
        return loaded

    def expect(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Before anything of the model is loaded from `state_dict`: read the kernels. Returns whether there are any."""
        self._expected = self.read(state_dict, prefix)
        return bool(self._expected)

    def follow_model(self) -> None:
        """Have the state where the model is, which `load_state_dict(assign=True)` may have moved."""
        for layer in self._layers.values():
            device, _ = layer.placement
            if device != self._runtime.state.device:
                self._runtime.state.to(device)
                self._runtime.refresh()
            return

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, said: Any, *_: Any) -> None:
        """The kernels come last, after the host's parameters."""
        kernels, self._expected = self._expected or self.read(state_dict, prefix), ()
        dormant = self.said_dormant(said, state_dict, prefix)
        self._prefix = prefix
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]  # torch made this dictionary for this module and those below it
        self.follow_model()
        self.follow(kernels, dormant, state_dict)


def _same(mine: Tensor, theirs: Tensor) -> bool:
    return mine.device.type != "meta" and torch.equal(mine.detach(), theirs.detach().to(mine))


def _forgive_missing(bank: ActiveKernels, incompatible: Any) -> None:
    """A checkpoint without kernels is complete: it leaves those in force as they are."""
    prefix = bank._prefix
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.startswith(prefix)]
