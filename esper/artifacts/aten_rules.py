"""Translation rules from ATen operations to the operator table."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch

from esper.artifacts.aten_shape_rules import SHAPE_RULES, same
from esper.artifacts.document import Json
from esper.artifacts.graph import DTYPES
from esper.artifacts.translation import Call, Refusal, Rule, Rules, Value, Values

__all__ = ["RULES"]

aten: Any = torch.ops.aten

_UNARY = {
    aten.neg.default: "neg",
    aten.abs.default: "abs",
    aten.exp.default: "exp",
    aten.expm1.default: "expm1",
    aten.log.default: "log",
    aten.log1p.default: "log1p",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.reciprocal.default: "reciprocal",
    aten.square.default: "square",
    aten.sin.default: "sin",
    aten.cos.default: "cos",
    aten.erf.default: "erf",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.silu.default: "silu",
    aten.mish.default: "mish",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.log_sigmoid.default: "log_sigmoid",
    aten.selu.default: "selu",
}
_WITH_SCALARS = {
    aten.gelu.default: ("gelu", {"approximate": "approximate"}),
    aten.leaky_relu.default: ("leaky_relu", {"negative_slope": "negative_slope"}),
    aten.celu.default: ("celu", {"alpha": "alpha"}),
    aten.softplus.default: ("softplus", {"beta": "beta", "threshold": "threshold"}),
    aten.hardtanh.default: ("hardtanh", {"min_val": "min_val", "max_val": "max_val"}),
}


def _unary(op: str) -> Rule:
    return lambda call: call.emit(call.all[0].shape, op, call.all[0])


def _with_scalars(op: str, names: dict[str, str]) -> Rule:
    def rule(call: Call) -> Values:
        attributes: dict[str, Json] = {name: call[source] for name, source in names.items()}
        return call.emit(call["self"].shape, op, call["self"], **attributes)

    return rule


def _scalar(value: Any) -> float | None:
    """The number that `value` stands for: a Python number or a constant of one element; else None."""
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, Value) and value.constant is not None and value.constant.numel() == 1:
        return float(value.constant.item()) if not value.constant.is_complex() else None
    return None


def _emit_binary(call: Call, shape: tuple[int, ...], op: str, left: Value, right: Value) -> Value:
    left, right = call.align(left, right), call.align(right, left)
    return call.emit(shape, op, left, right)


def _with_number(call: Call, op: str, left: Value, number: float) -> Value:
    if op == "sub":
        op, number = "add", -number
    if op in ("maximum", "minimum"):
        return call.emit(left.shape, "clamp_min" if op == "maximum" else "clamp_max", left, value=number)
    return call.emit(left.shape, f"{op}_scalar", left, value=number)


def _number_with(call: Call, op: str, number: float, right: Value) -> Value:
    """``op(number, right)``."""
    if op == "sub":
        return call.emit(right.shape, "rsub_scalar", right, value=number)
    if op == "div":
        inverse = call.emit(right.shape, "reciprocal", right)
        return _with_number(call, "mul", inverse, number)
    return _with_number(call, op, right, number)


def _binary(op: str, swapped: bool = False) -> Rule:
    def rule(call: Call) -> Values:
        left, right = call.all[:2]
        if call.get("rounding_mode") is not None:
            raise Refusal("it rounds; a kernel is differentiable")
        left, right = (right, left) if swapped else (left, right)
        alpha = float(call.get("alpha", 1))
        if alpha != 1.0:
            number = _scalar(right)
            right = number * alpha if number is not None else _with_number(call, "mul", right, alpha)
        shape = call.shape
        number = _scalar(right)
        if number is not None and isinstance(left, Value) and left.shape == shape:
            return _with_number(call, op, left, number)
        number = _scalar(left)
        if number is not None and isinstance(right, Value) and right.shape == shape:
            return _number_with(call, op, number, right)
        return _emit_binary(call, shape, op, left, right)

    return rule


def _pow(call: Call) -> Values:
    exponent = _scalar(call["exponent"])
    if exponent is None:
        raise Refusal("its exponent is a tensor; use a number")
    return call.emit(call["self"].shape, "pow_scalar", call["self"], value=exponent)


def _clamp(call: Call) -> Values:
    low, high = call.get("min"), call.get("max")
    value: Value = call["self"]
    if low is not None:
        value = call.emit(value.shape, "clamp_min", value, value=float(low))
    if high is not None:
        value = call.emit(value.shape, "clamp_max", value, value=float(high))
    return value


def _elu(call: Call) -> Values:
    if call["scale"] != 1 or call["input_scale"] != 1:
        raise Refusal("it scales input or output")
    return call.emit(call["self"].shape, "elu", call["self"], alpha=call["alpha"])


def _relu6(call: Call) -> Values:
    return call.emit(call["self"].shape, "hardtanh", call["self"], min_val=0.0, max_val=6.0)


def _prelu(call: Call) -> Values:
    """relu(x) - weight * relu(-x); torch's weight lies along dimension 1."""
    value, weight = call["self"], call["weight"]
    if len(value.shape) > 2 and weight.shape != (1,):
        raise Refusal("its weight lies along a dimension that is not the last; use one slope")
    negative = call.emit(value.shape, "relu", call.emit(value.shape, "neg", value))
    scaled = call.emit(value.shape, "mul", negative, weight)
    return call.emit(value.shape, "sub", call.emit(value.shape, "relu", value), scaled)


def _linear(call: Call) -> Values:
    value, weight, bias = call["input"], call["weight"], call["bias"]
    if weight.batched or (bias is not None and bias.batched):
        raise Refusal("its weight depends on the input; use matmul")
    return call.emit(call.shape, "linear", value, weight, *([] if bias is None else [bias]))


def _contract(call: Call, left: Value, right: Value, shape: tuple[int, ...]) -> Value:
    for value, other in ((left, right), (right, left)):
        # the batch must be a batch dimension of both, or the rows of the left operand
        rows = value is left and not other.batched and len(value.shape) == 2 and len(other.shape) <= 2
        if (
            value.batched
            and not rows
            and (len(value.shape) < 3 or (other.batched and len(other.shape) != len(value.shape)))
        ):
            raise Refusal("it contracts the leading dimension; a kernel treats leading positions apart")
    if left.batched != right.batched and max(len(left.shape), len(right.shape)) > 2:
        left, right = _drop_batch(call, left, right), _drop_batch(call, right, left)
    return call.emit(shape, "matmul", left, right)


def _drop_batch(call: Call, value: Value, other: Value) -> Value:
    return call.align(value, other) if not value.batched and len(value.shape) > 2 else value


def _matmul(call: Call) -> Values:
    left, right = call.all[:2]
    return _contract(call, left, right, call.shape)


def _addmm(call: Call) -> Values:
    if call["beta"] != 1 or call["alpha"] != 1:
        raise Refusal("it scales its operands; write the product and the sum apart")
    shape = call.shape
    left, right = call.get("mat1", call.get("batch1")), call.get("mat2", call.get("batch2"))
    product = _contract(call, left, right, shape)
    return _emit_binary(call, shape, "add", product, call["self"])


def _norm_inputs(call: Call) -> list[Value]:
    value: Value = call["input"]
    if len(call["normalized_shape"]) >= len(value.shape):
        raise Refusal("it normalises over the leading dimension")
    weight, bias = call["weight"], call.get("bias")
    if weight is None and bias is not None:
        raise Refusal("it has a bias and no weight; add the bias apart")
    return [value, *(each for each in (weight, bias) if each is not None)]


def _layer_norm(call: Call) -> Values:
    inputs = _norm_inputs(call)
    shape = tuple(call["normalized_shape"])
    return call.emit(inputs[0].shape, "layer_norm", *inputs, shape=shape, eps=call["eps"])


def _rms_norm(call: Call) -> Values:
    inputs = _norm_inputs(call)
    eps = call["eps"]
    if eps is None:
        eps = torch.finfo(DTYPES[call.dtype]).eps
    shape = tuple(call["normalized_shape"])
    return call.emit(inputs[0].shape, "rms_norm", *inputs, shape=shape, eps=eps)


def _check_dtype(call: Call, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype != DTYPES[call.dtype]:
        raise Refusal(f"it casts to {dtype}; a kernel computes in one dtype, here {call.dtype}")


def _along(op: str) -> Rule:
    """softmax and its like: a dimension, and perhaps a dtype."""

    def rule(call: Call) -> Values:
        _check_dtype(call, call.get("dtype"))
        if call.get("half_to_float"):
            raise Refusal("it casts to float32; a kernel computes in one dtype")
        value: Value = call["self"]
        return call.emit(value.shape, op, value, dim=call.axis(value, call["dim"]))

    return rule


def _dims(call: Call) -> tuple[Value, tuple[int, ...]]:
    value, dims = call["self"], call["dim"]
    if dims is None or dims == []:
        raise Refusal("it reduces every dimension, the leading one too; name the trailing dimensions")
    return value, call.axes(value, [dims] if isinstance(dims, int) else dims)


def _reduction(op: str) -> Rule:
    def rule(call: Call) -> Values:
        _check_dtype(call, call.get("dtype"))
        value, dims = _dims(call)
        return call.emit(call.shape, op, value, dims=dims, keepdim=call["keepdim"])

    return rule


def _extreme(op: str) -> Rule:
    """max.dim and min.dim: the values; indices are not in the table."""

    def rule(call: Call) -> Values:
        value, dims = _dims(call)
        shape = tuple(call.node.meta["val"][0].shape)
        return (call.emit(shape, op, value, dims=dims, keepdim=call["keepdim"]),)

    return rule


def _variance(root: bool) -> Rule:
    def rule(call: Call) -> Values:
        value, dims = _dims(call)
        correction = call.get("correction", int(call.get("unbiased", True)))
        correction = 1 if correction is None else correction
        if correction not in (0, 1):
            raise Refusal(f"its correction is {correction}; use 0 or 1")
        shape, keepdim = call.shape, call["keepdim"]
        result = call.emit(shape, "var", value, dims=dims, correction=int(correction), keepdim=keepdim)
        return call.emit(shape, "sqrt", result) if root else result

    return rule


def _vector_norm(call: Call) -> Values:
    _check_dtype(call, call["dtype"])
    value, dims = _dims(call)
    return call.emit(call.shape, "vector_norm", value, ord=float(call["ord"]), dims=dims, keepdim=call["keepdim"])


def _glu(call: Call) -> Values:
    value, shape = call["self"], call.shape
    dim = call.axis(value, call["dim"])
    half = shape[dim]
    first = call.emit(shape, "slice", value, dim=dim, start=0, length=half)
    second = call.emit(shape, "slice", value, dim=dim, start=half, length=half)
    return call.emit(shape, "mul", first, call.emit(shape, "sigmoid", second))


def _dropout(call: Call) -> Values:
    if call["train"] and call["p"] > 0:
        raise Refusal("it is at random; a kernel is deterministic, call .eval() or leave it out")
    return same(call)


def _cast(call: Call) -> Values:
    _check_dtype(call, call.node.meta["val"].dtype)
    return same(call)


_Table = dict[Any, Callable[[Call], Values]]


def _table() -> _Table:
    table: _Table = {target: _unary(op) for target, op in _UNARY.items()}
    table |= {target: _with_scalars(op, names) for target, (op, names) in _WITH_SCALARS.items()}
    for op in ("add", "sub", "mul", "div"):
        for overload in ("Tensor", "Scalar", "Tensor_mode", "Scalar_mode"):
            packet = getattr(aten, op)
            if overload in packet.overloads():
                table[getattr(packet, overload)] = _binary(op)
    table |= dict.fromkeys((aten.rsub.Scalar, aten.rsub.Tensor), _binary("sub", swapped=True))
    table |= {aten.maximum.default: _binary("maximum"), aten.minimum.default: _binary("minimum")}
    table |= dict.fromkeys((aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor), _pow)
    table |= dict.fromkeys((aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default), _clamp)
    table |= dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), _matmul)
    table |= dict.fromkeys((aten.addmm.default, aten.baddbmm.default), _addmm)
    table |= {aten.elu.default: _elu, aten.relu6.default: _relu6, aten.glu.default: _glu, aten.prelu.default: _prelu}
    table |= {aten.linear.default: _linear, aten.layer_norm.default: _layer_norm, aten.rms_norm.default: _rms_norm}
    table |= dict.fromkeys((aten.softmax.int, aten._softmax.default), _along("softmax"))
    table |= dict.fromkeys((aten.log_softmax.int, aten._log_softmax.default), _along("log_softmax"))
    table |= {aten.cumsum.default: _along("cumsum"), aten.linalg_vector_norm.default: _vector_norm}
    table |= {aten.sum.dim_IntList: _reduction("sum"), aten.mean.dim: _reduction("mean")}
    table |= {aten.amax.default: _reduction("amax"), aten.amin.default: _reduction("amin")}
    table |= {aten.max.dim: _extreme("amax"), aten.min.dim: _extreme("amin")}
    table |= {aten.logsumexp.default: _reduction("logsumexp")}
    table |= dict.fromkeys((aten.var.dim, aten.var.correction), _variance(root=False))
    table |= dict.fromkeys((aten.std.dim, aten.std.correction), _variance(root=True))
    table |= dict.fromkeys((aten.dropout.default, aten.native_dropout.default), _dropout)
    casts = (
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.to.other,
        aten._to_copy.default,
        aten.type_as.default,
    )
    return table | dict.fromkeys(casts, _cast)


RULES: Rules = MappingProxyType({**_table(), **SHAPE_RULES})
