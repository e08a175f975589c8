"""Tracing a module with torch.fx, with the calls of its sites kept as calls.

Python values that the module reads are constants of the graph. What would make the graph something else than the
module in silence is refused: decisions on values, attributes that are set, random numbers of Python's, changes of
gradient mode or autocast inside, questions for the type of a computed value.
"""

from __future__ import annotations

import dataclasses
import operator
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import Signature
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.fx.graph import inplace_methods
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.overrides import TorchFunctionMode

from esper import torch_internals
from esper.eager.call_pattern import CallPattern
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.seeds.active_kernels import BANK_NAME, ActiveKernels
from esper.forking import ModuleLock
from esper_passes import hooks_of

__all__ = ["Trace", "is_of_torch_nn", "modules_of", "trace"]

_lock = ModuleLock()  # torch.fx patches nn.Module for the whole process
_FACTORIES = frozenset(
    (
        torch.arange, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.linspace, torch.logspace,
        torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.tensor, torch.tril_indices,
        torch.triu_indices,
    )
)  # fmt: skip
_OWN_DICTIONARIES = ("_parameters", "_buffers", "_modules")
_OURS = ("_run", BANK_NAME)  # attributes of the wrapped model that a commit on another thread may set
_ASKING_FOR_A_TYPE = frozenset(("isinstance", "__class__"))
_BY_TORCH_FX = ("torch.fx", "torch.utils._pytree", "esper.eager")


@dataclass(frozen=True, eq=False)
class Trace:
    """The graph of a module for one pattern of calls. Sites are `call_module` nodes like other leaves.

    - `members`: the modules below the traced one, by path; `inlined` are those that the graph has no call of.
    - `constants`: tensors that are no part of the model, by the names that `get_attr` nodes give them.
    """

    graph: fx.Graph
    signature: Signature
    pattern: CallPattern
    members: Mapping[str, nn.Module]
    inlined: tuple[nn.Module, ...]
    constants: Mapping[str, torch.Tensor]

    def calls(self) -> Iterator[nn.Module]:
        """The modules that the graph calls."""
        for path in dict.fromkeys(str(node.target) for node in self.graph.find_nodes(op="call_module")):
            yield self.members[path]

    def fits(self, module: nn.Module) -> bool:
        """Whether the modules below `module` are still those that were traced, and can still be traced through."""
        now = modules_of(module)
        same = now.keys() == self.members.keys() and all(each is now[path] for path, each in self.members.items())
        return same and not any(_is_called_as_it_is(each) for each in self.inlined)


def modules_of(module: nn.Module) -> dict[str, nn.Module]:
    """The modules below `module` by their first path, without kernels, which come and go."""
    found: dict[nn.Module, str] = {}
    stack = [("", module)]
    while stack:
        path, each = stack.pop()
        if each in found or isinstance(each, ActiveKernels):
            continue
        found[each] = path
        children = [(f"{path}.{name}".strip("."), child) for name, child in each._modules.items() if child is not None]
        stack.extend(reversed(children))
    return {path: each for each, path in found.items() if path}


def _is_leaf(module: nn.Module) -> bool:
    """Whether calls of `module` are kept as calls: sites, modules of torch.nn, and what is not plain.

    A container with hooks is not, since torch.fx would trace past them.
    """
    return isinstance(module, KasminaLayer) or _is_called_as_it_is(module) or is_of_torch_nn(module)


def is_of_torch_nn(module: nn.Module) -> bool:
    """Whether torch.fx calls `module` for being one of torch.nn's."""
    return type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(module, nn.Sequential)


def _is_called_as_it_is(module: nn.Module) -> bool:
    own = module.__dict__
    changed = "forward" in own or "parametrizations" in module._modules or module._compiled_call_impl is not None
    return changed or hooks_of(module) is not None


def trace(module: nn.Module, forward: Callable[..., Any], signature: Signature, pattern: CallPattern) -> Trace | str:
    """Trace `forward`, which is that of `module`, for calls of `pattern`; the reason if that cannot be done.

    It leaves no mark on the module or on the generators of random numbers.
    """
    if isinstance(module, KasminaLayer):
        return "it is a layer with seeds"
    with _lock.held():
        members = modules_of(module)
        tracer = _Tracer(forward, signature, pattern)
        attributes = _Attributes([module, *members.values()])
        numbers = _PythonsRandomNumbers()
        reason = tracer.record(module)
        constants = {key: value for key, value in vars(module).items() if attributes.is_new_constant(key)}
        for key in constants:
            del module.__dict__[key]
        changed = attributes.restore()
        drawn = numbers.restore()
    if reason is None and changed is not None:
        reason = f"it sets the attribute {changed!r}"
    if reason is None and drawn:
        reason = "it draws random numbers"
    if reason is not None:
        return reason
    for node in tracer.graph.nodes:
        node.type = None
    inlined = tuple(each for each in tracer.inlined if each is not module)
    return Trace(tracer.graph, signature, pattern, members, inlined, constants)


class _Refusal(Exception):
    """Why a module is not traced."""


class _Value(fx.Proxy):
    """A traced value. What its type is, and what attributes it has, only arguments, parameters and buffers can say."""

    like: torch.Tensor | None

    @property  # type: ignore[misc]  # `isinstance` asks it, and nobody sets it
    def __class__(self) -> type:
        asking = sys._getframe(1)
        if str(asking.f_globals.get("__name__", "")).startswith(_BY_TORCH_FX):
            return type(self)
        if self.like is None:
            if not _ASKING_FOR_A_TYPE.intersection(asking.f_code.co_names):
                return type(self)  # a built-in function of torch asks, such as `torch.zeros`
            _tracer_of(self).refuse("it asks for the type of a value that it computes")
        return type(self.like)

    def __getattr__(self, name: str) -> Any:
        if hasattr(torch.Tensor, name):
            return super().__getattr__(name)
        if self.like is None:
            _tracer_of(self).refuse(f"it asks a value that it computes for its {name!r}, which a tensor has not")
        raise AttributeError(f"a tensor has no attribute {name!r}")

    keys = property(lambda self: self.__getattr__("keys"))  # torch.fx's has them, for `**value`


def _in_place(method: str) -> Callable[..., fx.Proxy]:
    """An augmented assignment, of which torch.fx would make one that is not in place."""
    target = getattr(operator, method)
    return lambda self, *args: self.tracer.create_proxy("call_function", target, (self, *args), {})


for _method in (*inplace_methods, "setitem"):
    setattr(_Value, f"__{_method}__", _in_place(_method))


def _tracer_of(value: fx.Proxy) -> _Tracer:
    tracer = value.tracer
    assert type(tracer) is _Tracer
    return tracer


class _Known(_Value):
    """A parameter or a buffer: its sizes are constants."""

    like: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.like.shape

    @property
    def ndim(self) -> int:
        return self.like.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.like.shape if dim is None else self.like.shape[dim]

    def dim(self) -> int:
        return self.like.ndim

    def numel(self) -> int:
        return self.like.numel()

    def __len__(self) -> int:
        return len(self.like)


_ANY_TENSOR = torch.empty(0)


class _Tracer(fx.Tracer):
    def __init__(self, forward: Callable[..., Any], signature: Signature, pattern: CallPattern) -> None:
        super().__init__()
        self._forward = forward
        self._signature = signature
        self._pattern = pattern
        self._thread = threading.get_ident()
        self._ambient = _ambient()
        self._refusal: str | None = None
        self._names: dict[int, str] = {}
        self.inlined: list[nn.Module] = []

    def record(self, module: nn.Module) -> str | None:
        """Trace; the reason if that failed."""
        try:
            with _Factories(self):
                self.trace(module)
        except Exception as error:  # noqa: BLE001  # whatever the model's own code raises on traced values
            said = str(error) if isinstance(error, _Refusal) else f"{type(error).__name__}: {error}"
            return self._refusal or said.splitlines()[0]
        return self._refusal

    def refuse(self, reason: str) -> NoReturn:
        """End the trace, also if the model catches what is raised here."""
        self._refusal = self._refusal or reason
        raise _Refusal(reason)

    # -- what torch.fx asks ----------------------------------------------------------------------------------------

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        del root_fn, is_module, concrete_args  # the forward that was given, and the pattern, are in their place
        tensors = (*self.root.named_parameters(), *self.root.named_buffers())
        self._names = {id(tensor): name for name, tensor in reversed(tensors)}
        args, kwargs = self._pattern.arguments(self._signature, self._placeholder)
        torch_internals.confine_fx_tracing()
        return (lambda: self._forward(*args, **kwargs)), []

    def _placeholder(self, name: str) -> fx.Proxy:
        return self._value(_Value, self.create_node("placeholder", name, (), {}), _ANY_TENSOR)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return self._value(_Value, node, None)

    def _value(self, kind: type[_Value], node: fx.Node, like: torch.Tensor | None) -> _Value:
        value = kind(node, self)
        value.like = like
        return value

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers are traced values, read where the module reads them."""
        del attr, parameter_proxy_cache
        name = self._names.get(id(attr_val)) if threading.get_ident() == self._thread else None
        return attr_val if name is None else self._value(_Known, self.create_node("get_attr", name, (), {}), attr_val)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del module_qualified_name
        if _is_leaf(m):
            return True
        self.inlined.append(m)
        return False

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:  # to which the patches of torch.fx apply as well
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _ambient() != self._ambient:
            self.refuse("it changes gradient mode, autocast or the hooks for saved tensors")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if issubclass(kind, fx.Proxy):
            return a.node
        if issubclass(kind, (dict, list)) and kind not in (dict, list, immutable_dict, immutable_list):
            self.refuse(f"it makes a {kind.__name__}")
        if issubclass(kind, tuple) and kind not in (tuple, torch.Size) and not hasattr(kind, "_fields"):
            self.refuse(f"it makes a {kind.__name__}")
        if dataclasses.is_dataclass(kind) and (
            hasattr(kind, "__post_init__") or not all(each.init for each in dataclasses.fields(kind))
        ):
            self.refuse(f"it makes a {kind.__name__}")
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        del obj
        self.refuse("it decides on a value that is known at run time only")


class _Factories(TorchFunctionMode):
    """Puts the calls that make tensors out of nothing into the graph, which torch.fx would have as constants."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            return self._tracer.create_proxy("call_function", func, args, kwargs)
        result = func(*args, **kwargs)
        if issubclass(type(result), torch.Tensor):
            self._tracer.refuse(f"it computes {getattr(func, '__name__', func)}() of no argument of its own")
        return result


def _ambient() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
        torch.get_autocast_dtype("cuda"),
        torch.get_default_dtype(),
        torch_internals.saved_tensor_hooks(),
    )


class _Attributes:
    """The attributes of modules, by identity, to be put back."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = [module for module in modules if not isinstance(module, KasminaLayer)]
        self._before = [[dict(each) for each in self._dictionaries(module)] for module in self._modules]

    def _dictionaries(self, module: nn.Module) -> list[dict[str, Any]]:
        return [module.__dict__, *(module.__dict__[name] for name in _OWN_DICTIONARIES)]

    def is_new_constant(self, name: str) -> bool:
        """Whether torch.fx has stored a tensor under `name` in the module that is traced, the first."""
        return name.startswith("_tensor_constant") and name not in self._before[0][0]

    def restore(self) -> str | None:
        """Undo what has been set; the name of one such attribute."""
        changed = None
        for module, before in zip(self._modules, self._before, strict=True):
            for now, then in zip(self._dictionaries(module), before, strict=True):
                for name in {**now, **then}:
                    if name in _OURS or now.get(name, now) is then.get(name, now):
                        continue
                    changed = name
                    if name in then:
                        now[name] = then[name]
                    else:
                        del now[name]
        return changed


class _PythonsRandomNumbers:
    """The state of Python's and NumPy's generators."""

    def __init__(self) -> None:
        numpy = sys.modules.get("numpy")
        self._numpy = numpy.random if numpy is not None else None
        self._python = random.getstate()
        self._before = self._numpy.get_state() if self._numpy is not None else None

    def restore(self) -> bool:
        """Put the generators back; whether that was needed."""
        drawn = random.getstate() != self._python
        random.setstate(self._python)
        if self._numpy is not None:
            drawn = drawn or _comparable(self._numpy.get_state()) != _comparable(self._before)
            self._numpy.set_state(self._before)
        return drawn


def _comparable(state: Any) -> Any:
    """A state of NumPy's generator, whose second entry is an array."""
    return state[0], state[1].tobytes(), *state[2:]
