"""The watch over layers that are exchanged after wrapping: a site follows its layer's replacement, or gives up.

A new head for fine-tuning, `resize_token_embeddings`, `model.fc = nn.Linear(...)` put another module where a layer with
seeds stood. Where it is a linear layer that can carry seeds, the site takes it in with its parameters: of the same
features with its kernels, of others with its seeds dormant. Anything else leaves the site without a layer: its kernels
go, with a warning, and none can be loaded, until the layer is put back.

That happens where a forward begins, or a change is asked for: until then layers may be moved and put back. A method of
the model that calls the new layer first of all begins a forward there.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from esper.core.sites.targets import unfit_reason
from esper.core.wrapping import WrappedModel
from esper.execution import site_marker
from esper.execution.kasmina_layer import KasminaLayer, LinearSite
from esper.user_warnings import warn_user

__all__ = ["SiteWatch"]

_LOG = logging.getLogger("esper.core")
_watched: WeakKeyDictionary[nn.Module, weakref.ref[SiteWatch]] = WeakKeyDictionary()
_awaited: WeakKeyDictionary[nn.Module, tuple[weakref.ref[LinearSite], RemovableHandle]] = WeakKeyDictionary()
"""Layers that stand where one with seeds stood, and which; since the last look."""


@functools.cache
def _watch_registrations() -> None:
    """Hear of every submodule that is set anywhere in the process; once."""

    def registered(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        if torch.compiler.is_dynamo_compiling():  # to which all models in the table would become a guard
            _exchanged_while_traced(module._modules.get(name), submodule)
            return
        reference = _watched.get(module)
        watch = None if reference is None else reference()
        if watch is not None:
            watch.note(module._modules.get(name), submodule)

    register_module_module_registration_hook(registered)


def _exchanged_while_traced(old: nn.Module | None, new: nn.Module | None) -> None:
    """Tell the models of the layers in `old` and `new`; a forward that makes lists of its layers exchanges nothing."""
    for module in (old, new) if old is not None else ():
        for each in module.modules() if module is not None else ():
            if isinstance(each, KasminaLayer):
                each.runtime.note_layers_changed()


def _called_before_it_is_known(new: nn.Module, args: Any, kwargs: Any, _: Any) -> Any:
    """A hook of layers that were put where one with seeds stood: what that site computes, if they still are there."""
    if torch.compiler.is_dynamo_compiling():
        site_marker.traced_by_esper()  # whoever asks may call what follows between two graphs
        return site_marker.call_uncompiled(_of_the_site, new, args, kwargs)
    return _of_the_site(new, args, kwargs)


def _of_the_site(new: nn.Module, args: Any, kwargs: Any) -> Any:
    layer = _known(new)
    if layer is not None:
        layer.runtime.look_for_layers()
        if layer.weight is new.weight:
            return layer(*args, **kwargs)
    return None


def _known(new: nn.Module) -> LinearSite | None:
    """The layer that `new` was put in the place of, if nobody has asked yet."""
    reference, hook = _awaited.pop(new, (None, None))
    if hook is not None:
        hook.remove()
    return None if reference is None else reference()


class SiteWatch:
    """Keeps the sites of one model where its layers are. For the thread that changes and runs the model."""

    def __init__(self, model: WrappedModel, sites_changed: Callable[[], None]) -> None:
        self._model = weakref.ref(model)
        self._layers: Mapping[str, KasminaLayer] = model.kasmina_layers
        self._changed = sites_changed
        self._moved: WeakSet[KasminaLayer] = WeakSet()  # those that stand in the place of others
        _watch_registrations()
        for module in model.modules():
            _watched[module] = weakref.ref(self)

    def note(self, old: nn.Module | None, new: nn.Module | None) -> None:
        """A module is registered somewhere in the model, where `old` stood."""
        self._changed()
        if not isinstance(old, LinearSite):
            return
        if new is old and old in self._moved:
            warn_user(
                f"layer {old.layer_name!r} has the weights of the layer that replaced it: setting it again does not "
                "bring back those that it had before. Keep them in a state dict, or a copy, before it is replaced",
            )
        elif isinstance(new, nn.Linear) and not isinstance(new, KasminaLayer):
            _awaited[new] = weakref.ref(old), new.register_forward_hook(_called_before_it_is_known, with_kwargs=True)

    def follow(self) -> None:
        """Look where the layers are; before a forward, a load, or whatever else has to know."""
        model = self._model()
        if model is None:
            return
        there = {id(module): module for module in model.modules()}
        for name, layer in self._layers.items():
            if id(layer) in there or (name == "" and layer is model._root_site):
                layer.absence = None
            elif layer.absence is None:
                self._replaced(model, name, layer)

    def _replaced(self, model: WrappedModel, name: str, layer: KasminaLayer) -> None:
        new = dict(model.named_modules(remove_duplicate=False)).get(name)
        if new is not None:
            _known(new)
        fits = isinstance(new, nn.Linear) and not isinstance(new, KasminaLayer) and unfit_reason(new) is None
        if isinstance(layer, LinearSite) and isinstance(new, nn.Linear) and fits:
            same = (new.in_features, new.out_features) == (layer.in_features, layer.out_features)
            if not same:
                self._give_up(layer, name, f"it was replaced by a layer of {new.in_features} to {new.out_features}")
            self._adopt(model, layer, new)
            _LOG.info("layer %r was replaced: its seeds stand at the new one", name)
            return
        what = "removed" if new is None else f"replaced by {type(new).__name__}"
        layer.absence = f"layer {name!r} was {what} after wrapping: nothing computes with its seeds"
        self._give_up(layer, name, f"it was {what}")

    def _adopt(self, model: WrappedModel, layer: LinearSite, new: nn.Linear) -> None:
        for module in list(model.modules()):
            for key, child in module._modules.items():
                if child is new:
                    module._modules[key] = layer
        layer.take_in(new)
        self._moved.add(layer)
        model.retrace()  # traces have the parameters' dictionary

    def _give_up(self, layer: KasminaLayer, name: str, why: str) -> None:
        lost = layer.drop_kernels()
        if lost:
            seeds = ", ".join(map(str, lost))
            warn_user(
                f"the kernels in seeds {seeds} of layer {name!r} are unloaded, since {why}: they computed nothing any "
                "more"
            )
