"""Averages of a model that grows: `torch.optim.swa_utils.AveragedModel`, which is made once and pairs parameters by
position ever after.

The copy that an `AveragedModel` makes of a wrapped model follows its original: when somebody asks for its parameters,
as each update of the average does first, it has the kernels that the original has by then. A kernel that both have
keeps its averaged values, a new one begins with the original's, and shares and states of seeds are the original's.
Other copies are independent.
"""

from __future__ import annotations

import copy
import logging
import sys
import weakref
from dataclasses import replace
from types import FrameType

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel

from esper import torch_internals
from esper.core.wrapping import WrappedModel
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.kernels.fossils import fold, is_affine
from esper.execution.kernels.loaded_kernel import LoadedKernel
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.seeds.copying import LayerSeeds, restore_seeds

__all__ = ["Average", "made_for_an_average"]

_LOG = logging.getLogger("esper.core")


def made_for_an_average() -> bool:
    """Whether an `AveragedModel` is being made, by a caller of the caller."""
    code = AveragedModel.__init__.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


class Average:
    """What ties the copy in an `AveragedModel` to its original. For the thread that updates the average."""

    def __init__(self, original: WrappedModel, twin: WrappedModel) -> None:
        self._original = weakref.ref(original)
        self._twin = weakref.ref(twin)
        self._version = original.runtime.version
        self._sources = {key: weakref.ref(kernel) for key, kernel in _kernels(original).items()}

    def catch_up(self) -> None:
        """Give the copy the structure and the shares of its original, if it has others."""
        original, twin = self._original(), self._twin()
        if original is None or twin is None or torch_internals.inside_backward():
            return
        version = original.runtime.version
        if version != self._version:
            self._version = version  # first: what follows asks for parameters itself
            with torch.inference_mode(False), torch.no_grad():
                self._follow(original, twin)
        else:
            _follow_alphas(original, twin)

    def _follow(self, original: WrappedModel, twin: WrappedModel) -> None:
        theirs, mine = _kernels(original), _kernels(twin)
        seeds = {}
        for name, own in twin.kasmina_layers.items():
            layer = original.kasmina_layers[name]
            _follow_fossils(layer, own, name)
            given, kernels = LayerSeeds.of(layer), []
            for seed, kernel, isolate in given.kernels:
                kept = self._kept((name, seed), kernel, mine.get((name, seed)))
                kernels.append((seed, kept or _copied(kernel, own), isolate))
            seeds[name] = replace(given, kernels=tuple(kernels), ramps={})
        if mine and not theirs:
            layers = list(twin.kasmina_layers.values())
            layers[0].control.restore([seed for layer in layers for seed in layer.seeds], [])
        restore_seeds(twin.kasmina_layers, seeds, tell=False)
        self._sources = {key: weakref.ref(kernel) for key, kernel in theirs.items()}

    def _kept(self, key: tuple[str, int], kernel: LoadedKernel, own: LoadedKernel | None) -> LoadedKernel | None:
        """The copy's kernel of a seed if it is the average of `kernel`, or was loaded as one from a checkpoint."""
        if own is None or (own.artifact_id, own.trainable) != (kernel.artifact_id, kernel.trainable):
            return None
        source = self._sources.get(key)
        return own if source is None or source() is kernel else None


def _kernels(model: WrappedModel) -> dict[tuple[str, int], LoadedKernel]:
    return {
        (name, seed.seed): seed.kernel
        for name, layer in model.kasmina_layers.items()
        for seed in model.runtime.plan.sites.get(layer.site, ())
    }


def _copied(kernel: LoadedKernel, layer: KasminaLayer) -> LoadedKernel:
    kernel = copy.deepcopy(kernel)
    kernel.module.to(*layer.placement)
    return kernel


def _follow_fossils(layer: KasminaLayer, own: KasminaLayer, name: str) -> None:
    """Where a kernel of `layer` has become part of its weight, let the averaged one become part of the average."""
    in_force = {seed.seed for seed in layer.runtime.plan.sites.get(layer.site, ())}
    for seed in layer.state.seeds_in(SeedLifecycleState.FOSSILIZED):
        kernel = next((each.kernel for each in own._seeds if each.seed == seed), None)
        if seed in in_force or (kernel is None and own.state.lifecycle(seed) is SeedLifecycleState.FOSSILIZED):
            continue
        theirs, mine = layer.linear_map, own.linear_map
        if theirs is None or mine is None:  # no linear layer: fossils stay kernels
            continue
        if kernel is not None and is_affine(kernel.graph, constant=mine[1] is not None):
            with torch.no_grad():
                fold(*mine, kernel, layer.state.alpha(seed))
        else:
            with torch.no_grad():
                for average, value in zip(mine, theirs, strict=True):
                    if average is not None and value is not None:
                        average.copy_(value)
            _LOG.warning(
                "the average of layer %s begins anew with the model's own weights: a kernel became part of them that "
                "the average never had",
                name,
            )
            return


def _follow_alphas(original: WrappedModel, twin: WrappedModel) -> None:
    for name, own in twin.kasmina_layers.items():
        theirs = original.kasmina_layers[name].state
        for seed in np.flatnonzero(theirs.mirror("alpha_blend") != own.state.mirror("alpha_blend")).tolist():
            twin.runtime.start_alpha(own.first_seed + seed, theirs.alpha(seed), theirs.alpha(seed))
