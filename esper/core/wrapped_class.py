"""The classes of wrapped models: one for each class of hosts, a subclass of it and of :class:`MorphableModel`.

Its `forward` has the signature of the host's, and code of its own: Dynamo keeps what it compiled with the code that it
traced, compiles one code eight times at most, and remembers which sizes it has seen vary in it. Plain models share
these with others of their class; wrapped models would with all others.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling  # by itself: each dot is an instruction and a guard

from esper.core.errors import WrapError
from esper.core.morphable_model import MorphableModel
from esper.core.replica.subclassing import subclass_in_disguise
from esper.core.replica.transformer_fast_path import adapted_class
from esper.execution import site_marker
from esper.execution.site_marker import (
    commit_while_tracing,
    enter_uncompiled,
    entered_by_esper,
)
from esper_passes import TAGGED_ENTER

__all__ = ["check_names", "hosts_forward", "wrapped_class"]

_Forward = Callable[..., Any]
_classes: WeakValueDictionary[tuple[type, bool], type] = WeakValueDictionary()
_ATTRIBUTES = ("runtime", "kasmina_layers", "layer_mappings")


def wrapped_class(host: nn.Module, root_is_site: bool) -> type[MorphableModel]:
    """The class for the wrapped model of `host`; `root_is_site` if the host itself is a layer that carries seeds."""
    key = type(host), root_is_site
    known = _classes.get(key)
    if known is None:
        forward = _entry(_forward_at_site if root_is_site else key[0].forward, key[0])
        namespace: dict[str, Any] = {"forward": forward, "__deepcopy__": _OfTheClass()}
        save = getattr(key[0], "save_pretrained", None)
        if isinstance(save, types.FunctionType) and "state_dict" in inspect.signature(save).parameters:
            namespace["save_pretrained"] = _saving(save)
        known = _classes[key] = subclass_in_disguise(adapted_class(key[0]), namespace, MorphableModel)
    return cast("type[MorphableModel]", known)


def hosts_forward(model: MorphableModel) -> _Forward:
    """The forward of the host's class, on a wrapped model that it does not keep alive."""
    hosts, this = type(model).forward._hosts_forward, weakref.ref(model)  # type: ignore[attr-defined]  # of `_entry`

    def forward(*args: Any, **kwargs: Any) -> Any:
        return hosts(this(), *args, **kwargs)

    forward.__signature__ = inspect.signature(types.MethodType(hosts, model))  # type: ignore[attr-defined]  # for traces
    return forward


def check_names(host: nn.Module) -> None:
    """Raise :class:`WrapError` if `host` has attributes of the names under which a wrapped model is controlled."""
    bases = MorphableModel.__mro__[: MorphableModel.__mro__.index(nn.Module)]
    every = {name for kind in bases for name in vars(kind)}
    ours = {name for name in every if not name.startswith("_") and not hasattr(nn.Module, name)}
    nothing = object()
    own = {*host._modules, *host._parameters, *host._buffers}
    taken = [
        name
        for name in sorted({*ours, *_ATTRIBUTES})
        if name in own or inspect.getattr_static(host, name, nothing) is not nothing
    ]
    if taken:
        raise WrapError(
            f"the model has {', '.join(map(repr, taken))}, of the same name as what controls a wrapped model: rename "
            "it, or wrap the module inside that holds the layers"
        )


def _forward_at_site(self: Any, input: torch.Tensor) -> Any:
    return self._root_site(input)


def _entry(hosts: _Forward, kind: type) -> _Forward:
    """The forward of the wrapped models whose host's forward is `hosts`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            if entered_by_esper():
                TAGGED_ENTER(self._runtime_tag)
            else:
                commit_while_tracing(self._runtime_id)  # before Dynamo reads, and guards on, the next two
                if self.runtime.scheduled or self.runtime.pending:  # the second only inside a backward
                    site_marker.call_uncompiled(enter_uncompiled, self._runtime_id)
            return hosts(self, *args, **kwargs)
        return self._run(*args, **kwargs)

    code = forward.__code__.replace(co_name=f"forward of {kind.__module__}.{kind.__qualname__}")
    own = types.FunctionType(code, forward.__globals__, "forward", None, forward.__closure__)
    functools.update_wrapper(own, kind.forward)  # type: ignore[attr-defined]  # a class of modules
    own._hosts_forward = hosts  # type: ignore[attr-defined]  # for uncompiled forwards
    return own


def _saving(hosts: _Forward) -> _Forward:
    """The `save_pretrained` of a host's class, which keeps tensors only: one says that no kernel was in force."""
    signature = inspect.signature(hosts)

    @functools.wraps(hosts)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        state = given.arguments.get("state_dict")
        given.arguments["state_dict"] = self._esper.marked(self.state_dict() if state is None else state)
        return hosts(*given.args, **given.kwargs)

    return save_pretrained


class _OfTheClass:
    """A `__deepcopy__` that classes have and objects do not, which copies a wrapped model as `__reduce_ex__` says.

    It stands before those of the host's class and of `parametrize`, which know nothing of kernels. An object with one
    would be copied where somebody copies what passes on its attributes, as `torch.compile` makes around a model.
    """

    def __get__(self, model: object | None, kind: type) -> _OfTheClass:
        if model is None:
            return self
        raise AttributeError(f"{kind.__name__!r} object has no attribute '__deepcopy__'")
