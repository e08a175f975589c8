"""The closed operator table: everything that a kernel may do, and nothing else.

A kernel works on values of shape ``[*, ...]`` whose leading dimensions are the caller's, so every attribute that
names a dimension counts from the end, and every operator with a shape acts on trailing dimensions only. Targets are
PyTorch built-ins, so that graphs of them trace, compile and travel without this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from esper.artifacts.document import REQUIRED, Json, JsonReader, near_misses
from esper.artifacts.errors import ArtifactGraphError
from esper.torch_internals import nn_functions as _nn

__all__ = ["MAX_RANK", "OPERATORS", "Attribute", "Call", "Operator", "find_operator"]

MAX_RANK = 8
MAX_SIZE = 2**26
_MAX_INPUTS = 64

Attributes = Mapping[str, Json]
Call = tuple[tuple[Any, ...], dict[str, Any]]
_Layout = Callable[[tuple[Any, ...], Mapping[str, Any]], Call]


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute of an operator: `read` takes it from a document, checked and normalised."""

    wanted: str
    read: Callable[[JsonReader, str], Json]
    names_dimension: bool = False


def _dimension(of_result: bool = False) -> Attribute:
    wanted = f"a dimension from -{MAX_RANK} to -1"
    return Attribute(wanted, lambda reader, key: reader.integer(key, -MAX_RANK, -1), names_dimension=not of_result)


def _read_dimensions(reader: JsonReader, key: str) -> Json:
    dims = reader.integers(key, -MAX_RANK, -1, MAX_RANK)
    if not dims or len(set(dims)) != len(dims):
        raise reader.refuse(key, "a list of at least one dimension, none twice", dims)
    return dims


def _read_order(reader: JsonReader, key: str) -> Json:
    dims = _read_dimensions(reader, key)
    assert isinstance(dims, tuple)
    if set(dims) != set(range(-len(dims), 0)):
        raise reader.refuse(key, f"an order of the last {len(dims)} dimensions", dims)
    return dims


def _read_sizes(reader: JsonReader, key: str) -> Json:
    sizes = reader.integers(key, 1, MAX_SIZE, MAX_RANK)
    if not sizes:
        raise reader.refuse(key, "a list of at least one size", sizes)
    return sizes


def _dimensions() -> Attribute:
    return Attribute("a list of trailing dimensions", _read_dimensions, names_dimension=True)


def _order() -> Attribute:
    return Attribute("an order of the trailing dimensions", _read_order, names_dimension=True)


def _sizes() -> Attribute:
    return Attribute("a list of sizes", _read_sizes)


def _number(default: float | None = None) -> Attribute:
    return Attribute("a number", lambda reader, key: reader.number(key, REQUIRED if default is None else default))


def _positive(default: float) -> Attribute:
    def read(reader: JsonReader, key: str) -> Json:
        value = reader.number(key, default)
        if value <= 0:
            raise reader.refuse(key, "a number above 0", value)
        return value

    return Attribute("a number above 0", read)


def _flag(default: bool) -> Attribute:
    return Attribute("true or false", lambda reader, key: reader.boolean(key, default))


def _integer(minimum: int, maximum: int = MAX_SIZE, default: int | None = None) -> Attribute:
    fallback = REQUIRED if default is None else default
    return Attribute("an integer", lambda reader, key: reader.integer(key, minimum, maximum, fallback))


def _choice(*options: str) -> Attribute:
    return Attribute(" or ".join(options), lambda reader, key: reader.choice(key, options, options[0]))


def _keywords(inputs: tuple[Any, ...], attributes: Mapping[str, Any]) -> Call:
    return inputs, dict(attributes)


@dataclass(frozen=True, slots=True)
class Operator:
    """One opcode: its PyTorch `target`, the number of `inputs` (min, max), its `attributes`, the `layout` of a call."""

    name: str
    target: Callable[..., Any]
    inputs: tuple[int, int]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    layout: _Layout = _keywords

    def depth(self, attributes: Attributes) -> int:
        """How many trailing dimensions the first input must have for the dimensions that `attributes` name."""
        deepest = 0
        for name, attribute in self.attributes.items():
            value: Any = attributes[name]
            if attribute.names_dimension:
                deepest = max(deepest, *(-dim for dim in (value if isinstance(value, tuple) else (value,))))
        return deepest

    def read_attributes(self, attributes: object, path: str) -> Mapping[str, Json]:
        """`attributes` checked, with defaults filled in; raises :class:`ArtifactGraphError` naming the path."""
        reader = JsonReader(attributes, path, ArtifactGraphError)
        result = {name: attribute.read(reader, name) for name, attribute in self.attributes.items()}
        reader.finish()
        return MappingProxyType(result)

    def call(self, inputs: tuple[Any, ...], attributes: Attributes) -> Call:
        """Positional and keyword arguments for `target`; `inputs` are tensors, fx nodes or anything else."""
        return self.layout(inputs, attributes)


def _positional(*names: str) -> _Layout:
    return lambda inputs, attributes: ((*inputs, *(attributes[name] for name in names)), {})


def _concat(inputs: tuple[Any, ...], attributes: Mapping[str, Any]) -> Call:
    return (list(inputs), attributes["dim"]), {}


def _permute(inputs: tuple[Any, ...], attributes: Mapping[str, Any]) -> Call:
    order = attributes["order"]
    return (*inputs, order, tuple(range(-len(order), 0))), {}


def _norm(inputs: tuple[Any, ...], attributes: Mapping[str, Any]) -> Call:
    weights = (*inputs[1:], None, None)[:2]
    return (inputs[0], attributes["shape"], *weights, attributes["eps"]), {}


def _rms_norm(inputs: tuple[Any, ...], attributes: Mapping[str, Any]) -> Call:
    return (inputs[0], attributes["shape"], (*inputs[1:], None)[0], attributes["eps"]), {}


def _clamp(inputs: tuple[Any, ...], attributes: Mapping[str, Any]) -> Call:
    return (*inputs, attributes["min"], attributes["max"]), {}


def _var(inputs: tuple[Any, ...], attributes: Mapping[str, Any]) -> Call:
    return (*inputs, attributes["dims"]), {"correction": attributes["correction"], "keepdim": attributes["keepdim"]}


_REDUCTION = {"dims": _dimensions(), "keepdim": _flag(False)}


def _reduction(name: str, target: Callable[..., Any]) -> Operator:
    return Operator(name, target, (1, 1), _REDUCTION, _positional("dims", "keepdim"))


def _unary(name: str, target: Callable[..., Any]) -> Operator:
    return Operator(name, target, (1, 1))


def _binary(name: str, target: Callable[..., Any]) -> Operator:
    return Operator(name, target, (2, 2))


def _scalar(name: str, target: Callable[..., Any]) -> Operator:
    return Operator(name, target, (1, 1), {"value": _number()}, _positional("value"))


_TABLE = (
    # Contractions. matmul broadcasts like torch.matmul.
    Operator("linear", _nn.linear, (2, 3)),
    _binary("matmul", torch.matmul),
    # Arithmetic, broadcasting; *_scalar take a constant, rsub_scalar is value - x.
    _binary("add", torch.add),
    _binary("sub", torch.sub),
    _binary("mul", torch.mul),
    _binary("div", torch.div),
    _binary("maximum", torch.maximum),
    _binary("minimum", torch.minimum),
    _scalar("add_scalar", torch.add),
    _scalar("mul_scalar", torch.mul),
    _scalar("div_scalar", torch.div),
    _scalar("rsub_scalar", torch.rsub),
    _scalar("pow_scalar", torch.pow),
    _unary("neg", torch.neg),
    _unary("abs", torch.abs),
    _unary("exp", torch.exp),
    _unary("expm1", torch.expm1),
    _unary("log", torch.log),
    _unary("log1p", torch.log1p),
    _unary("sqrt", torch.sqrt),
    _unary("rsqrt", torch.rsqrt),
    _unary("reciprocal", torch.reciprocal),
    _unary("square", torch.square),
    _unary("sin", torch.sin),
    _unary("cos", torch.cos),
    _unary("erf", torch.erf),
    Operator("clamp", torch.clamp, (1, 1), {"min": _number(), "max": _number()}, _clamp),
    _scalar("clamp_min", torch.clamp_min),
    _scalar("clamp_max", torch.clamp_max),
    # Activations.
    _unary("relu", torch.relu),
    _unary("sigmoid", torch.sigmoid),
    _unary("tanh", torch.tanh),
    _unary("silu", _nn.silu),
    _unary("mish", _nn.mish),
    _unary("hardswish", _nn.hardswish),
    _unary("hardsigmoid", _nn.hardsigmoid),
    _unary("log_sigmoid", _nn.log_sigmoid),
    _unary("selu", torch.selu),
    Operator("gelu", _nn.gelu, (1, 1), {"approximate": _choice("none", "tanh")}),
    Operator("leaky_relu", _nn.leaky_relu, (1, 1), {"negative_slope": _number(0.01)}, _positional("negative_slope")),
    Operator("elu", _nn.elu, (1, 1), {"alpha": _positive(1.0)}, _positional("alpha")),
    Operator("celu", torch.celu, (1, 1), {"alpha": _positive(1.0)}, _positional("alpha")),
    Operator(
        "softplus",
        _nn.softplus,
        (1, 1),
        {"beta": _positive(1.0), "threshold": _number(20.0)},
        _positional("beta", "threshold"),
    ),
    Operator(
        "hardtanh",
        _nn.hardtanh,
        (1, 1),
        {"min_val": _number(-1.0), "max_val": _number(1.0)},
        _positional("min_val", "max_val"),
    ),
    # Normalisation: inputs are x[, weight[, bias]] and x[, weight]; `shape` is the trailing shape.
    Operator("layer_norm", torch.layer_norm, (1, 3), {"shape": _sizes(), "eps": _positive(1e-5)}, _norm),
    Operator("rms_norm", torch.rms_norm, (1, 2), {"shape": _sizes(), "eps": _positive(1e-6)}, _rms_norm),
    Operator("softmax", torch.softmax, (1, 1), {"dim": _dimension()}, _positional("dim")),
    Operator("log_softmax", torch.log_softmax, (1, 1), {"dim": _dimension()}, _positional("dim")),
    # Reductions over trailing dimensions.
    _reduction("sum", torch.sum),
    _reduction("mean", torch.mean),
    _reduction("amax", torch.amax),
    _reduction("amin", torch.amin),
    _reduction("logsumexp", torch.logsumexp),
    Operator("var", torch.var, (1, 1), {**_REDUCTION, "correction": _integer(0, 1, 1)}, _var),
    Operator(
        "vector_norm",
        torch.linalg.vector_norm,
        (1, 1),
        {"ord": _positive(2.0), **_REDUCTION},
        _positional("ord", "dims", "keepdim"),
    ),
    Operator("cumsum", torch.cumsum, (1, 1), {"dim": _dimension()}, _positional("dim")),
    # Shapes. unflatten splits one dimension into `sizes`; flatten joins `start`..-1; repeat_interleave repeats each
    # entry of a dimension (of size 1: an expand); slice keeps `length` entries from `start`; permute orders the last
    # dimensions.
    Operator(
        "unflatten", torch.unflatten, (1, 1), {"dim": _dimension(), "sizes": _sizes()}, _positional("dim", "sizes")
    ),
    Operator(
        "flatten", torch.flatten, (1, 1), {"start": _dimension(), "end": _dimension()}, _positional("start", "end")
    ),
    Operator("permute", torch.movedim, (1, 1), {"order": _order()}, _permute),
    Operator(
        "transpose", torch.transpose, (1, 1), {"dim0": _dimension(), "dim1": _dimension()}, _positional("dim0", "dim1")
    ),
    Operator("unsqueeze", torch.unsqueeze, (1, 1), {"dim": _dimension(of_result=True)}, _positional("dim")),
    Operator("squeeze", torch.squeeze, (1, 1), {"dim": _dimension()}, _positional("dim")),
    Operator(
        "repeat_interleave",
        torch.repeat_interleave,
        (1, 1),
        {"repeats": _integer(1), "dim": _dimension()},
        _positional("repeats", "dim"),
    ),
    Operator(
        "slice",
        torch.narrow,
        (1, 1),
        {"dim": _dimension(), "start": _integer(0), "length": _integer(1)},
        _positional("dim", "start", "length"),
    ),
    Operator("select", torch.select, (1, 1), {"dim": _dimension(), "index": _integer(0)}, _positional("dim", "index")),
    Operator("flip", torch.flip, (1, 1), {"dims": _dimensions()}, _positional("dims")),
    Operator("concat", torch.cat, (1, _MAX_INPUTS), {"dim": _dimension()}, _concat),
)

OPERATORS: Mapping[str, Operator] = MappingProxyType({operator.name: operator for operator in _TABLE})


def find_operator(name: str, path: str) -> Operator:
    """The operator called `name`; raises :class:`ArtifactGraphError` with near misses."""
    operator = OPERATORS.get(name)
    if operator is None:
        raise ArtifactGraphError(
            f"{path}: the operator table has no {name[:80]!r}; {near_misses(name, OPERATORS.keys())}"
        )
    return operator
