"""Copies and pickles of wrapped models.

A wrapped model is taken apart into its host, as a plain module tree again, and the seeds of its layers; the copy is
wrapped anew. So it has a runtime, sites, a cache and telemetry of its own, and nothing of the original's machinery is
copied. Checkpoints are the business of `esper.execution.seeds.checkpoint`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize

from esper.core.copies.averaging import Average, made_for_an_average
from esper.core.replica.replace_modules import replace_modules
from esper.core.replica.subclassing import undisguised
from esper.core.sites.features import Features
from esper.core.sites.module_site import ModuleSite
from esper.core.sites.targets import Selection
from esper.core.wrapping import WrapOptions, WrappedModel
from esper.execution.kasmina_layer import KasminaLayer, LinearSite
from esper.execution.plain_linear import OWN_ATTRIBUTES, plain_linear
from esper.execution.seeds.copying import LayerSeeds, copy_schedules, restore_seeds

__all__ = ["ModelParts", "as_host", "give_back", "layer_places", "unpacked"]

_OURS = frozenset(
    {
        "_wrapping",
        "_eager",
        "_runtime_id",
        "_runtime_tag",
        "_run",
        "_root_site",
        "_site_watch",
        "runtime",
        "kasmina_layers",
        "layer_mappings",
    }
)
"""What a wrapped model has besides what its host has."""


def layer_places(model: WrappedModel) -> dict[str, str]:
    """The dotted name at which each layer with seeds stands now, by its own name; without those that are gone.

    They differ where layers were moved after wrapping: exchanged, put into another module, counted anew by an `insert`.
    """
    places = {id(module): place for place, module in model.named_modules()}
    if model._root_site is not None:
        places[id(model._root_site)] = ""
    return {name: places[id(layer)] for name, layer in model.kasmina_layers.items() if id(layer) in places}


def as_host(model: WrappedModel) -> nn.Module:
    """The host as it is now: a plain module tree, with the attributes, hooks and modes of the wrapped model's modules.

    It shares parameters and buffers with the wrapped model; kernels are not part of it.
    """
    hosts = model._wrapping.selection.targets
    layers = model.kasmina_layers
    names = {id(layer): name for name, layer in layers.items()}

    def plain(_: str, layer: KasminaLayer) -> nn.Module:
        if isinstance(layer, ModuleSite):
            return layer.bare_host()
        host = hosts[names[id(layer)]]
        kind: Any = parametrize.type_before_parametrizations(host)
        linear = plain_linear(cast("LinearSite", layer), kind)
        linear.__dict__.update({key: value for key, value in host.__dict__.items() if key in OWN_ATTRIBUTES})
        linear._modules.clear()  # it has a replica of what these are
        return linear

    return replace_modules(model, layers, plain, undisguised, without=_OURS, watched=False)


def give_back(model: WrappedModel) -> nn.Module:
    """The very module that was wrapped, made what :func:`as_host` says: with layers, hooks and attributes set since.

    So are the modules below it, but for those that others have replaced.
    """
    host = model._wrapping.host
    originals = {id(module._parameters): module for module in host.modules()}  # which copies of a module share
    plain = as_host(model)

    def original(module: nn.Module) -> nn.Module | None:
        return host if module is plain else originals.get(id(module._parameters))

    return replace_modules(plain, {}, lambda _, linear: linear, lambda kind: kind, watched=False, stand_in=original)


@dataclass(frozen=True, slots=True)
class PackedModel:
    """A wrapped model taken apart: what a pickle of it holds."""

    host: nn.Module
    targets: dict[str, str]
    """The layers with seeds: where each stands now, by the name that it was given when the model was wrapped."""
    refused: dict[str, str]
    features: dict[str, Features | None]
    """Of those that are no linear layers, as far as they are known."""
    options: WrapOptions
    """Without the platform, which belongs to a process."""
    seeds: dict[str, LayerSeeds]
    again: Callable[..., Any]
    """What wraps the host."""

    def __reduce__(self) -> Any:
        parts = self.host, self.targets, self.refused, self.features, self.options, self.seeds, self.again
        return PackedModel, parts

    @classmethod
    def of(cls, model: WrappedModel) -> PackedModel:
        """The parts of `model`; parameters and kernels are the model's own, not copies."""
        model.runtime.look_for_layers()
        targets = layer_places(model)
        return cls(
            as_host(model),
            targets,
            dict(model._wrapping.selection.refused),
            {name: model.kasmina_layers[name].features for name in model._wrapping.selection.features},
            replace(model._wrapping.options, platform=None),
            {name: LayerSeeds.of(model.kasmina_layers[name]) for name in targets},
            model._wrapping.again,
        )

    def unpack(self, options: WrapOptions | None = None, into: WrappedModel | None = None) -> WrappedModel:
        """The wrapped model of these parts: `into`, which has not been initialised, or a new one."""
        modules = dict(self.host.named_modules())
        targets: Mapping[str, Any] = {name: modules[place] for name, place in self.targets.items()}
        parts: tuple[dict[str, Any], ...] = (dict(targets), self.refused, self.features)
        selection = Selection(*map(MappingProxyType, parts))
        model: WrappedModel = self.again(self.host, selection, options or self.options, into)
        restore_seeds(model.kasmina_layers, self.seeds, tell=options is None)
        return model


class ModelParts:
    """A wrapped model on its way through `copy`, with its deep copy once that is made, or through `pickle`."""

    def __init__(self, model: WrappedModel, made: WrappedModel | None = None) -> None:
        self.model = model
        self.made = made

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelParts:
        return ModelParts(self.model, _copied(self.model, memo))

    def __reduce__(self) -> Any:
        return PackedModel.of(self.model).__reduce__()


def unpacked(parts: ModelParts | PackedModel) -> WrappedModel:
    """The wrapped model that has arrived; a shallow copy is one that shares parameters and kernels."""
    if isinstance(parts, PackedModel):
        return parts.unpack()
    return parts.made or PackedModel.of(parts.model).unpack()


def _copied(model: WrappedModel, memo: dict[int, Any]) -> WrappedModel:
    """A deep copy of `model`, with its platform and the schedules of its alphas, which an average leaves to `model`."""
    twin = memo[id(model)] = object.__new__(type(model))  # before the rest: something in the model may refer to it
    copy.deepcopy(PackedModel.of(model), memo).unpack(model._wrapping.options, into=twin)
    if made_for_an_average():
        twin.__dict__["_wrapping"] = replace(twin._wrapping, average=Average(model, twin))
    else:
        copy_schedules(model.kasmina_layers, twin.kasmina_layers)
    copies = dict(twin.named_modules())
    memo.update({id(module): copies[name] for name, module in model.named_modules() if name in copies})
    return twin
