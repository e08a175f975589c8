"""Recording one region's forward as a `torch.fx.Graph`."""

from __future__ import annotations

import dataclasses
import enum
import operator
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Set
from inspect import Parameter, Signature
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import fx, nn

from esper.core.code_facts import CodeFacts, facts_of
from esper.core.traced_values import Refusal, TracedFlag, TracedValue, unpack
from esper.core.watched import HOOK_KINDS

__all__ = ["RegionTracer"]

_CONSTANTS: tuple[type, ...] = (
    type(None), type(...), bool, int, float, complex, str, bytes,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip
_FACTORIES = frozenset(
    (
        torch.arange, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.linspace, torch.logspace,
        torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.tensor, torch.tril_indices,
        torch.triu_indices,
    )
)  # fmt: skip
_TENSOR_MODULES = tuple(
    f"torch.nn.modules.{name}" for name in ("linear", "conv", "batchnorm", "normalization", "dropout", "sparse")
)
_TENSOR_METHODS = frozenset(
    {
        "abs",
        "add",
        "bfloat16",
        "bmm",
        "clone",
        "contiguous",
        "cos",
        "detach",
        "div",
        "exp",
        "expand",
        "expand_as",
        "flatten",
        "float",
        "gelu",
        "half",
        "log",
        "masked_fill",
        "matmul",
        "mean",
        "mul",
        "neg",
        "permute",
        "pow",
        "relu",
        "repeat",
        "reshape",
        "rsqrt",
        "sigmoid",
        "sin",
        "softmax",
        "sqrt",
        "squeeze",
        "sub",
        "sum",
        "tanh",
        "to",
        "transpose",
        "type_as",
        "unsqueeze",
        "view",
        "view_as",
    }
)
_ARITHMETIC = frozenset(
    (operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul, operator.neg, operator.pow)
)
_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
_ACCESS = (operator.getitem, getattr)
_MAYBE_NONE_ATTRIBUTES = frozenset({"grad", "grad_fn", "_base", "names"})


class RegionTracer(fx.Tracer):
    """Traces one forward, once. Every method runs on the thread that traces.

    - `modules`: the modules of the region by path; the region itself is "".
    - `is_leaf`: whether the module at a path is called in the graph rather than traced through.

    After the trace: `graph`; `inlined`, the paths that were traced through; `training_tested`, the training flags that
    the trace is specialised for; `tensor_arguments` and `given_arguments`, those that must be tensors and those that
    must not be None; `failed`, the path of the module in whose code the trace was refused.
    """

    def __init__(self, modules: Mapping[str, nn.Module], is_leaf: Callable[[str], bool]) -> None:
        super().__init__()
        self.root = modules[""]
        self.graph = fx.Graph(tracer_cls=type(self))
        self.inlined: dict[str, None] = {"": None}
        self.training_tested: dict[str, bool] = {}
        self.tensor_arguments: dict[str, None] = {}
        self.given_arguments: dict[str, None] = {}
        self.refusal: str | None = None
        self.failed: str | None = None
        self._modules = modules
        self._is_leaf = is_leaf
        self._values: list[weakref.ref[TracedValue]] = []
        self._ambient = _ambient()
        torch.overrides.is_tensor_method_or_property(torch.relu)  # fills its cache, which is slow under the audit
        self._names = _tensor_names(modules)

    # -- ends ------------------------------------------------------------------------------------------------------

    def refuse(self, reason: str) -> NoReturn:
        """End the trace. The refusal stands even if the traced code catches the exception."""
        if self.refusal is None:
            self.refusal = reason
        raise Refusal(self.refusal)

    def escaped(self) -> bool:
        """Whether some traced value is still referred to, that is, whether the forward kept one."""
        return any(reference() is not None for reference in self._values)

    def placeholders(self, signature: Signature, given: Set[str]) -> tuple[list[TracedValue], dict[str, TracedValue]]:
        """Traced values for the arguments without a default and those `given`: positional ones and those by keyword."""
        args, kwargs = [], {}
        for parameter in signature.parameters.values():
            required = parameter.default is Parameter.empty and parameter.kind not in _VARIADIC
            if required or parameter.name in given:
                value = self.proxy(self.create_node("placeholder", parameter.name, (), {}))
                if required and parameter.kind is not Parameter.KEYWORD_ONLY:
                    args.append(value)
                else:
                    kwargs[parameter.name] = value
        return args, kwargs

    # -- modules ---------------------------------------------------------------------------------------------------

    def call(self, path: str, inline: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call of the module at `path`: a node for a leaf, else `inline`, which comes to :meth:`forward`."""
        if inline is None or self._is_leaf(path):
            return self._call_node(path, args, kwargs)
        return inline(*args, **kwargs)

    def forward(self, path: str, inline: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of the module at `path`: a node for a leaf, else `inline`, traced through."""
        if self._is_leaf(path):
            if path and any(getattr(self._modules[path], kind) for kind in HOOK_KINDS):
                self.refuse(f"it calls the forward of {path!r}, past its hooks")
            return self._call_node(path, args, kwargs)
        self.inlined[path] = None
        key = f"{path}@{len(self.module_stack)}"
        self.module_stack[key] = (path, type(self._modules[path]))
        try:
            return inline(*args, **kwargs)
        except Exception:
            if self.failed is None:
                self.failed = path
            raise
        finally:
            self.module_stack.pop(key, None)

    def _call_node(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not type(self._modules[path]).__module__.startswith("torch.nn.") and _holds_mutable((args, kwargs)):
            self.refuse(f"it passes a list or dictionary to {path!r}, which may change it")
        return self.create_proxy("call_module", path, args, kwargs)

    def read(self, path: str, name: str) -> TracedValue:
        """A parameter, buffer, plain tensor or training flag of the module at `path`, read anew each time."""
        node = self.create_node("get_attr", f"{path}.{name}" if path else name, (), {})
        if name == "training":
            return self._kept(TracedFlag(node, self, path, self._modules[path].training))
        return self.proxy(node)

    # -- nodes -----------------------------------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> TracedValue:
        return self._kept(TracedValue(node, self))

    def _kept(self, value: TracedValue) -> TracedValue:
        self._values.append(weakref.ref(value))
        return value

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _ambient() != self._ambient:
            self.refuse("it runs under an autograd, autocast or dtype setting of its own")
        return super().create_node(*args, **kwargs)

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        value = super().create_proxy(*args, **kwargs)
        node = value.node
        is_access = node.op == "call_module" or node.target in _ACCESS
        if is_access and _tests_variables(sys._getframe(1)) and self._may_be_none(node):
            self.refuse("it tests whether a value is None")
        return value

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if issubclass(kind, TracedValue):
            return a.node
        if kind in _CONSTANTS or issubclass(kind, (enum.Enum, np.generic)):
            return a
        if kind is tuple:
            return tuple(self.create_arg(item) for item in a)
        if kind is list:
            return [self.create_arg(item) for item in a]
        if kind is dict:
            return self._dictionary(a)
        if kind is slice:
            return slice(self.create_arg(a.start), self.create_arg(a.stop), self.create_arg(a.step))
        if issubclass(kind, torch.Tensor):
            return self._tensor(a)
        return self._built(a, kind)

    def _dictionary(self, value: dict[Any, Any]) -> dict[Any, Any]:
        for key in value:
            if type(key) not in _CONSTANTS:
                self.refuse(f"it builds a dictionary with a {type(key).__name__} as key")
        return {key: self.create_arg(item) for key, item in value.items()}

    def _tensor(self, value: torch.Tensor) -> fx.Node:
        name = self._names.get(id(value))
        if name is None:
            self.refuse("it uses a tensor that is no parameter, buffer or attribute of a module")
        path, _, attribute = name.rpartition(".")
        return self.read(path, attribute).node

    def _built(self, value: Any, kind: type) -> Any:
        """A structure that the graph builds by calling its class."""
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            return self.create_node("call_function", kind, tuple(self.create_arg(item) for item in value), {})
        if kind is OrderedDict:
            items = [(self.create_arg(key), self.create_arg(item)) for key, item in value.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        if dataclasses.is_dataclass(kind) and kind.__bases__ == (object,) and not hasattr(kind, "__post_init__"):
            fields = dataclasses.fields(kind)
            if all(field.init for field in fields) and "__init__" in kind.__dict__:
                values = {field.name: self.create_arg(getattr(value, field.name)) for field in fields}
                return self.create_node("call_function", kind, (), values)
        self.refuse(f"it passes on a {kind.__name__}, which a graph cannot hold")

    def record_torch_call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A torch function or tensor method that was given a traced value."""
        if isinstance(function, (torch._ops.HigherOrderOperator, torch._C.ScriptMethod)):
            self.refuse(f"it calls {function}")
        name = getattr(function, "__name__", "")
        if torch.overrides.is_tensor_method_or_property(function):
            if name in ("__get__", "__set__", "__delete__"):
                self.refuse("it reads a property of a tensor")
            return self.create_proxy("call_method", name, args, kwargs)
        return self.create_proxy("call_function", function, args, kwargs)

    def record_other_call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A torch function that was given no traced value: run at every forward if it makes a tensor from constants."""
        name = getattr(function, "__name__", repr(function))
        if function in _FACTORIES:
            return self.create_proxy("call_function", function, args, kwargs)
        if _holds_tensor((args, kwargs)):
            self.refuse(f"it computes {name}() of a tensor that does not come from its arguments")
        result = function(*args, **kwargs)
        if _holds_tensor(result):
            self.refuse(f"it makes a tensor with {name}()")
        return result

    # -- questions about values ------------------------------------------------------------------------------------

    def class_of(self, node: fx.Node) -> type:
        """What `isinstance` may be told about the value of `node`."""
        if node.op == "placeholder":
            self.tensor_arguments[str(node.target)] = None
            return torch.Tensor
        if self._is_tensor(node):
            return torch.Tensor
        self.refuse("it asks for the type of a value")

    def _is_tensor(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return node.target in self.tensor_arguments
        if node.op == "get_attr":
            return not str(node.target).endswith("training")
        first = node.args[0] if node.args else None
        if node.op == "call_module":
            return type(self._modules[str(node.target)]).__module__ in _TENSOR_MODULES or self._is_linear(node)
        on_tensor = isinstance(first, fx.Node) and self._is_tensor(first)
        if node.op == "call_method":
            return on_tensor and node.target in _TENSOR_METHODS
        return on_tensor and node.target in _ARITHMETIC

    def _is_linear(self, node: fx.Node) -> bool:
        return isinstance(self._modules[str(node.target)], nn.Linear)

    def entered(self, frame: FrameType, facts: CodeFacts) -> None:
        """A function of the model begins: what does it compare with None?"""
        for name in facts.tested:
            value: Any = frame.f_locals.get(name)
            if not issubclass(type(value), TracedValue):
                continue
            if value.node.op == "placeholder":
                self.given_arguments[str(value.node.target)] = None
            elif self._may_be_none(value.node):
                self.refuse(f"it tests whether {name!r} is None")
        if facts.tests_rebound:
            self.given_arguments.update({str(node.target): None for node in self.graph.find_nodes(op="placeholder")})

    def _may_be_none(self, node: fx.Node) -> bool:
        """Whether the value may turn out to be None, which no traced value is. Placeholders are checked at run time."""
        if node.op == "call_module":
            return not self._is_tensor(node)
        if node.op != "call_function" or node.target not in _ACCESS:
            return False
        of, key = node.args
        if not isinstance(of, fx.Node):
            return True
        if of.op != "placeholder" and not self._may_be_none(of) and of.target is not unpack:
            return node.target is getattr and key in _MAYBE_NONE_ATTRIBUTES
        if node.target is operator.getitem:
            if of.op == "placeholder" and isinstance(key, (int, slice, tuple)):
                self.tensor_arguments[str(of.target)] = None
                return False
            return True
        if of.op == "placeholder" and hasattr(torch.Tensor, str(key)) and key not in _MAYBE_NONE_ATTRIBUTES:
            self.tensor_arguments[str(of.target)] = None
            return False
        return True


def _tests_variables(frame: FrameType | None) -> bool:
    """Whether a function of the model that is running compares with None a variable that it sets."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name == __name__.rpartition(".")[0] + ".tracing":
            return False
        if name.partition(".")[0] not in ("torch", "esper") and facts_of(frame.f_code).tests_rebound:
            return True
        frame = frame.f_back
    return False


def _ambient() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
        torch.get_autocast_dtype("cuda"),
        torch.get_default_dtype(),
    )


def _tensor_names(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """Paths of the region's parameters and buffers, by identity."""
    names: dict[int, str] = {}
    for path, module in modules.items():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                names.setdefault(id(tensor), f"{path}.{name}" if path else name)
    return names


def _holds_tensor(structure: Any) -> bool:
    if isinstance(structure, torch.Tensor):
        return True
    items = structure.values() if isinstance(structure, dict) else structure
    return isinstance(structure, (tuple, list, dict)) and any(_holds_tensor(item) for item in items)


def _holds_mutable(structure: Any) -> bool:
    args, kwargs = structure
    return any(type(item) in (list, dict, set) for item in (*args, *kwargs.values()))
