"""Modules other than `nn.Linear` that carry seeds: feed-forward blocks, residual branches, subclasses of `nn.Linear`.

The host's own forward runs, and kernels are blended with what it returns. Such a layer has the class of its module, as
a wrapped model has that of its host, and the module's children: names, attributes and methods are the host's.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling  # by itself: each dot is an instruction and a guard

from esper.core.errors import SiteCallError
from esper.core.replica.subclassing import subclass_in_disguise, undisguised
from esper.core.replica.transformer_fast_path import adapted_class
from esper.core.sites.features import Features
from esper.errors import kind_of
from esper.execution import site_marker
from esper.execution.assembly import LayerParts
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.plain_linear import OWN_ATTRIBUTES
from esper.execution.seeds.active_kernels import BANK_NAME
from esper.execution.site_forward import kernels_have_hooks
from esper.execution.site_marker import marked_by_esper
from esper.execution.site_paths import SitePath, alive
from esper.user_warnings import warn_user
from esper_passes import TAGGED_MODULE_SITE

__all__ = ["ModuleSite", "taken_name", "unfit_call"]

_classes: WeakValueDictionary[type, type] = WeakValueDictionary()


class ModuleSite(KasminaLayer):
    """A module that carries seeds, `[*, input_dim] -> [*, output_dim]`; of the module's own class too.

    It takes one tensor and returns one, of the same leading dimensions. What these dimensions are is seen at the first
    forward; `told` is what is known before it.
    """

    _esper_hosts: _Hosts
    _told_features: Features | None
    _is_seen: bool
    """Whether a call has run uncompiled, and was as it must be."""

    @classmethod
    def at_site(cls, module: nn.Module, parts: LayerParts, told: Features | None) -> ModuleSite:
        """The layer that takes `module`'s place. All but its parameters and buffers is still to be given to it."""
        layer = cls._sharing(module, told)
        layer._join(parts)
        return layer

    @classmethod
    def alone(cls, host: nn.Module, **options: Any) -> ModuleSite:
        """As :meth:`LinearSite.alone`; among `options` are the `features`, as far as they are known."""
        layer = cls._sharing(host, options.pop("features"))
        own = layer.__dict__
        own.update({name: value for name, value in host.__dict__.items() if name != "_modules"})
        own["_modules"] = dict(host._modules)
        layer._stand_alone(**options)
        return layer

    @classmethod
    def _sharing(cls, module: nn.Module, told: Features | None) -> ModuleSite:
        layer: ModuleSite = object.__new__(_class_for(type(module)))
        nn.Module.__init__(layer)
        layer.__dict__.update(_parameters=module._parameters, _buffers=module._buffers, training=module.training)
        layer.__dict__.update(_told_features=told, _is_seen=False)
        return layer

    # -- what it computes ------------------------------------------------------------------------------------------

    def _host_path(self) -> SitePath:
        this, hosts = weakref.ref(self), self._esper_hosts.forward

        def dormant(x: Tensor) -> Tensor:
            there = alive(this)
            y: Tensor = hosts(there, x)
            if not there._is_seen:
                there._see(x, y)
            return y

        return dormant

    def _see(self, x: Tensor, y: Any) -> None:
        """The first call: learn the features. Raises :class:`SiteCallError` for what no kernel could follow."""
        self._check(x, y)
        if x.shape[:-1] != y.shape[:-1] or not x.dim():
            raise SiteCallError(
                f"{self.layer_name!r} has made {list(y.shape)} of {list(x.shape)}, and a site keeps all dimensions but "
                "the last: leave it out of target_layers"
            )
        features = x.shape[-1], y.shape[-1]
        known = self.features
        if self._seeds and known is not None and known != features:
            raise SiteCallError(
                f"{self.layer_name!r} maps {features[0]} to {features[1]} features, and not {known[0]} to {known[1]} "
                "as its kernels do: unload them, and leave its features out of target_layers"
            )
        if known is not None and known != features:
            warn_user(
                f"{self.layer_name!r} maps {features[0]} to {features[1]} features, and not {known[0]} to {known[1]} "
                "as was told: it is taken for what it does",
            )
        self.runtime.features_seen[self.site] = features
        self._is_seen = True

    def _check(self, x: Any, y: Any) -> None:
        if not isinstance(x, Tensor):
            raise SiteCallError(
                f"{self.layer_name!r} was called with {kind_of(x)}, and a site takes one tensor: leave it out "
                "of target_layers, and name a module inside of it"
            )
        if not isinstance(y, Tensor):
            raise SiteCallError(
                f"{self.layer_name!r} returns {kind_of(y)}, and a site returns one tensor: leave it out of "
                "target_layers, and name a module inside of it"
            )

    def _input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The one input of a call that was not made with a single positional argument."""
        if not args and kwargs.keys() == {self._esper_hosts.input_name}:
            return kwargs[self._esper_hosts.input_name]
        given = [*("an argument" for _ in args), *kwargs]
        raise SiteCallError(
            f"{self.layer_name!r} was called with {', '.join(given) or 'nothing'}, and a site takes one tensor: leave "
            "it out of target_layers, and name a module inside of it"
        )

    def _finished(self, x: Tensor, y: Any) -> Any:
        """For Dynamo: what kernels make of `y`, which the host has made of `x`."""
        self._check(x, y)
        if not is_dynamo_compiling():  # the host's forward broke the graph, and what follows it runs uncompiled
            return self._blended_outside_graphs(x, y)
        if marked_by_esper():
            if kernels_have_hooks():
                return site_marker.call_uncompiled(self._blended_outside_graphs, x, y)
            return TAGGED_MODULE_SITE(x, y, self._site_tag)
        return self._blended(x, y)

    def _blended_outside_graphs(self, x: Tensor, y: Tensor) -> Tensor:
        """As :meth:`_blended`, between two graphs: by the plan that the forward began with, whatever came meanwhile."""
        self.runtime.divide()
        return self._blended(x, y, self.runtime.begun_with.sites.get(self.site, ()))

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def features(self) -> Features | None:
        return self.runtime.features_seen.get(self.site, self._told_features)

    @property
    def told_features(self) -> Features | None:
        return self._told_features

    @property
    def placement(self) -> tuple[torch.device, torch.dtype]:
        """Those of its first matrix, or else of whatever it has."""
        tensors = [each for each in itertools.chain(self.parameters(), self.buffers()) if each.is_floating_point()]
        first = next((each for each in tensors if each.dim() > 1), next(iter(tensors), None))
        return (self.state.device, torch.get_default_dtype()) if first is None else (first.device, first.dtype)

    def as_host(self) -> nn.Module:
        host = self.bare_host()
        host.__dict__.update({name: value for name, value in self.__dict__.items() if name not in OWN_ATTRIBUTES})
        host.__dict__["_modules"] = {name: child for name, child in self._modules.items() if name != BANK_NAME}
        return host

    def bare_host(self) -> nn.Module:
        """A module of the host's class, without anything in it."""
        kind: Any = undisguised(type(self))
        host: nn.Module = object.__new__(kind)
        host.__dict__["_modules"] = {}
        return host

    def _packing(self) -> tuple[Callable[..., KasminaLayer], dict[str, Any]]:
        return ModuleSite.alone, {"features": self.features}


class _Hosts(NamedTuple):
    """What a host's class has: its forward, and how that calls its first argument."""

    forward: Callable[..., Any]
    input_name: str


def _class_for(kind: type) -> type[ModuleSite]:
    """The class for sites at modules of class `kind`: a subclass of it, whose forward has a code of its own."""
    known = _classes.get(kind)
    if known is None:
        base: Any = adapted_class(kind)
        names = [name for name, _ in _parameters(base.forward)]
        hosts = _Hosts(base.forward, names[1] if len(names) > 1 else "")
        namespace = {"forward": _entry(base.forward, kind), "_esper_hosts": hosts}
        known = _classes[kind] = subclass_in_disguise(base, namespace, ModuleSite)
    return known


def _entry(hosts: Callable[..., Any], kind: type) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else self._input_of(args, kwargs)
        if is_dynamo_compiling():
            if self._stands_alone:
                self._begin_traced(marked_by_esper())
            return self._finished(x, hosts(self, x))
        return self._run(x)

    # Dynamo keeps what it compiled with the code, eight times at most: each class has a code of its own
    code = forward.__code__.replace(co_name=f"forward of {kind.__module__}.{kind.__qualname__}")
    own = types.FunctionType(code, forward.__globals__, "forward", None, forward.__closure__)
    return functools.update_wrapper(own, hosts)


def _parameters(forward: Callable[..., Any]) -> Iterator[tuple[str, inspect.Parameter]]:
    try:
        yield from inspect.signature(forward).parameters.items()
    except (TypeError, ValueError):
        return


def unfit_call(module: nn.Module) -> str | None:
    """Why a module can never be called with one tensor, as far as its signature tells; or None."""
    given = [each for _, each in _parameters(type(module).forward)][1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [each.name for each in given if each.default is inspect.Parameter.empty and each.kind in positional]
    if len(needed) > 1:
        return f"its forward takes {', '.join(needed)}, and a site takes one tensor"
    if not any(each.kind in (*positional, inspect.Parameter.VAR_POSITIONAL) for each in given):
        return "its forward takes no tensor"
    return None


def taken_name(module: nn.Module) -> str | None:
    """An attribute of `module` that a layer with seeds has too, if there is one."""
    classes = ModuleSite.__mro__[: ModuleSite.__mro__.index(nn.Module)]
    ours = {name for kind in classes for name in vars(kind) if not hasattr(nn.Module, name) and not _is_magic(name)}
    nothing = object()
    own = {*module._modules, *module._parameters, *module._buffers}
    names = sorted({*ours, *OWN_ATTRIBUTES, BANK_NAME})
    return next(
        (each for each in names if each in own or inspect.getattr_static(module, each, nothing) is not nothing), None
    )


def _is_magic(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")
