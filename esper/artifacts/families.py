"""Named families of kernels: from sizes and options to a graph and the way each weight starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from esper.artifacts.document import Json, JsonReader
from esper.artifacts.graph import DTYPES, HOST, INPUT, KernelGraph
from esper.artifacts.graph_builder import GraphBuilder
from esper.artifacts.initialisation import Init
from esper.artifacts.limits import Limits

__all__ = ["ACTIVATIONS", "FAMILIES", "STARTS", "Family", "Norm", "Start"]

Start = Literal["identity", "zero", "kaiming", "orthogonal"]
Norm = Literal["layer_norm", "rms_norm", "none"]
STARTS: tuple[Start, ...] = get_args(Start)
NORMS: tuple[Norm, ...] = get_args(Norm)

ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, Json]]] = MappingProxyType(
    {
        "relu": ("relu", {}),
        "gelu": ("gelu", {}),
        "gelu_tanh": ("gelu", {"approximate": "tanh"}),
        "silu": ("silu", {}),
        "sigmoid": ("sigmoid", {}),
        "tanh": ("tanh", {}),
        "leaky_relu": ("leaky_relu", {}),
        "elu": ("elu", {}),
        "selu": ("selu", {}),
        "softplus": ("softplus", {}),
        "hardtanh": ("hardtanh", {}),
        "hardswish": ("hardswish", {}),
        "mish": ("mish", {}),
    }
)
MAX_DEPTH = 64
MAX_SEED = 2**63 - 1

Options = Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Family:
    """A named family: `read` takes its options from a document, `build` appends its nodes and returns the output."""

    name: str
    read: Callable[[JsonReader, Limits], dict[str, Json]]
    build: Callable[[GraphBuilder, Options, Init, Init], str]

    def read_options(self, reader: JsonReader, limits: Limits) -> dict[str, Json]:
        """Every option of a blueprint of this family, with defaults filled in."""
        common: dict[str, Json] = {
            "in_features": reader.integer("in_features", 1, limits.max_dimension),
            "out_features": reader.integer("out_features", 1, limits.max_dimension),
            "start": reader.choice("start", STARTS, "identity"),
            "seed": reader.integer("seed", 0, MAX_SEED, 0),
            "dtype": reader.choice("dtype", DTYPES, "float32"),
        }
        return common | self.read(reader, limits)

    def graph(self, options: Options) -> tuple[KernelGraph, dict[str, Init]]:
        """The graph and the initialisation of each tensor; allocates no tensor.

        "zero" and "identity" start the last linear map at zero, so that the other weights wait for its first step, and
        it learns from that step on; "identity" adds the result to what the site has computed so far.
        """
        builder = GraphBuilder(_size(options, "in_features"), _size(options, "out_features"), str(options["dtype"]))
        inner: Init = "orthogonal" if options["start"] == "orthogonal" else "kaiming"
        last: Init = "zeros" if options["start"] in ("zero", "identity") else inner
        output = self.build(builder, options, inner, last)
        if options["start"] == "identity":
            output = builder.call("add", HOST, output)
        graph = builder.finish(output)
        return graph, builder.initialisations


def _size(options: Options, key: str) -> int:
    value = options[key]
    assert isinstance(value, int)
    return value


def _activate(builder: GraphBuilder, value: str, options: Options) -> str:
    op, attributes = ACTIVATIONS[str(options["activation"])]
    return builder.call(op, value, **attributes)


def _read_low_rank(reader: JsonReader, limits: Limits) -> dict[str, Json]:
    return {"rank": reader.integer("rank", 1, limits.max_dimension), "bias": reader.boolean("bias", False)}


def _low_rank(builder: GraphBuilder, options: Options, inner: Init, last: Init) -> str:
    rank = _size(options, "rank")
    down = builder.linear(INPUT, "down", builder.in_features, rank, inner, bias=False)
    return builder.linear(down, "up", rank, builder.out_features, last, bias=bool(options["bias"]))


def _read_bottleneck(reader: JsonReader, limits: Limits) -> dict[str, Json]:
    return {
        "rank": reader.integer("rank", 1, limits.max_dimension),
        "activation": reader.choice("activation", ACTIVATIONS, "gelu"),
        "bias": reader.boolean("bias", True),
    }


def _bottleneck(builder: GraphBuilder, options: Options, inner: Init, last: Init) -> str:
    rank, bias = _size(options, "rank"), bool(options["bias"])
    down = builder.linear(INPUT, "down", builder.in_features, rank, inner, bias=bias)
    return builder.linear(_activate(builder, down, options), "up", rank, builder.out_features, last, bias=bias)


def _read_gated_mlp(reader: JsonReader, limits: Limits) -> dict[str, Json]:
    return {
        "hidden": reader.integer("hidden", 1, limits.max_dimension),
        "activation": reader.choice("activation", ACTIVATIONS, "silu"),
        "bias": reader.boolean("bias", False),
    }


def _gated_mlp(builder: GraphBuilder, options: Options, inner: Init, last: Init) -> str:
    """down(activation(gate(x)) * up(x)): GLU variants (Shazeer 2020, arXiv:2002.05202)."""
    hidden, bias = _size(options, "hidden"), bool(options["bias"])
    gate = builder.linear(INPUT, "gate", builder.in_features, hidden, inner, bias=bias)
    up = builder.linear(INPUT, "up", builder.in_features, hidden, inner, bias=bias)
    gated = builder.call("mul", _activate(builder, gate, options), up)
    return builder.linear(gated, "down", hidden, builder.out_features, last, bias=bias)


def _read_residual_mlp(reader: JsonReader, limits: Limits) -> dict[str, Json]:
    return {
        "hidden": reader.integer("hidden", 1, limits.max_dimension),
        "depth": reader.integer("depth", 1, MAX_DEPTH, 1),
        "norm": reader.choice("norm", NORMS, "layer_norm"),
        "activation": reader.choice("activation", ACTIVATIONS, "gelu"),
        "bias": reader.boolean("bias", True),
    }


def _residual_mlp(builder: GraphBuilder, options: Options, inner: Init, last: Init) -> str:
    """tail(block(...block(head(x)))) with block(h) = h + down(activation(up(norm(h)))) of width `hidden` throughout."""
    hidden, bias, depth = _size(options, "hidden"), bool(options["bias"]), _size(options, "depth")
    value = builder.linear(INPUT, "head", builder.in_features, hidden, inner, bias=bias)
    for index in range(depth):
        branch = _normalise(builder, value, f"blocks.{index}.norm", hidden, str(options["norm"]))
        branch = builder.linear(branch, f"blocks.{index}.up", hidden, hidden, inner, bias=bias)
        branch = _activate(builder, branch, options)
        branch = builder.linear(branch, f"blocks.{index}.down", hidden, hidden, inner, bias=bias)
        value = builder.call("add", value, branch)
    return builder.linear(value, "tail", hidden, builder.out_features, last, bias=bias)


def _normalise(builder: GraphBuilder, value: str, name: str, size: int, norm: str) -> str:
    if norm == "none":
        return value
    inputs = [value, builder.tensor(f"{name}.weight", (size,), "ones")]
    if norm == "layer_norm":
        inputs.append(builder.tensor(f"{name}.bias", (size,)))
    return builder.call(norm, *inputs, shape=(size,))


def _read_affine(reader: JsonReader, limits: Limits) -> dict[str, Json]:
    del limits
    return {"bias": reader.boolean("bias", True)}


def _affine(builder: GraphBuilder, options: Options, inner: Init, last: Init) -> str:
    del inner
    bias = bool(options["bias"])
    return builder.linear(INPUT, "linear", builder.in_features, builder.out_features, last, bias=bias)


def _read_deepen(reader: JsonReader, limits: Limits) -> dict[str, Json]:
    norm = reader.choice("norm", NORMS, "layer_norm")
    if norm != "none" and reader.integer("out_features", 1, limits.max_dimension) == 1:
        raise reader.refuse("norm", "'none' where out_features is 1, since a norm of one feature is a constant", norm)
    return {
        "hidden": reader.integer("hidden", 1, limits.max_dimension),
        "norm": norm,
        "activation": reader.choice("activation", ACTIVATIONS, "gelu"),
        "bias": reader.boolean("bias", True),
    }


def _deepen(builder: GraphBuilder, options: Options, inner: Init, last: Init) -> str:
    """down(activation(up(norm(y)))) of what the site has computed so far: a layer behind it, not beside it."""
    hidden, bias, features = _size(options, "hidden"), bool(options["bias"]), builder.out_features
    value = _normalise(builder, HOST, "norm", features, str(options["norm"]))
    up = builder.linear(value, "up", features, hidden, inner, bias=bias)
    return builder.linear(_activate(builder, up, options), "down", hidden, features, last, bias=bias)


def _read_widen(reader: JsonReader, limits: Limits) -> dict[str, Json]:
    return {
        "hidden": reader.integer("hidden", 1, limits.max_dimension),
        "activation": reader.choice("activation", ACTIVATIONS, "gelu"),
        "bias": reader.boolean("bias", True),
    }


def _widen(builder: GraphBuilder, options: Options, inner: Init, last: Init) -> str:
    """fan_out(activation(fan_in(x))): what more hidden features of a feed-forward block add to its output."""
    hidden, bias = _size(options, "hidden"), bool(options["bias"])
    fan_in = builder.linear(INPUT, "fan_in", builder.in_features, hidden, inner, bias=bias)
    activated = _activate(builder, fan_in, options)
    return builder.linear(activated, "fan_out", hidden, builder.out_features, last, bias=False)


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            Family("low_rank", _read_low_rank, _low_rank),
            Family("bottleneck", _read_bottleneck, _bottleneck),
            Family("gated_mlp", _read_gated_mlp, _gated_mlp),
            Family("residual_mlp", _read_residual_mlp, _residual_mlp),
            Family("affine", _read_affine, _affine),
            Family("deepen", _read_deepen, _deepen),
            Family("widen", _read_widen, _widen),
        )
    }
)
