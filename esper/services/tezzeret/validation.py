"""Checks that a kernel must pass before anyone may load it.

Runs in the child process; `check_eager` also on a thread of a process that trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn

from esper.artifacts import KernelGraph
from esper.contracts.validation import ValidationCheck

__all__ = [
    "CompiledKernel",
    "KernelRun",
    "check_agreement",
    "check_eager",
]

CompiledKernel = Callable[..., Tensor]
"""`(x [n, in][, host [n, out]], *parameters) -> [n, out]`, n at least 2; see `esper.compiler.attachment`."""

_LARGE = {"float16": 16.0, "bfloat16": 1e4, "float32": 1e4, "float64": 1e4}  # a product of two must fit in float16
_ERROR_RATIO = 3.0
_SEED = 0
_MAX_ELEMENTS = 2**24  # of an input or output; larger kernels are compared on fewer rows


@dataclass(frozen=True)
class KernelRun:
    """The result of one forward and backward: the output, and gradients by the name of what they are for."""

    output: Tensor
    gradients: Mapping[str, Tensor | None]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that can be compared."""
        yield "output", self.output
        for name, gradient in self.gradients.items():
            if gradient is not None:
                yield f"gradient of {name}", gradient


def _trained_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` as some training would have left them. Zero-initialised kernels would hide most mistakes."""
    generator = _generator()
    scale = {name: 1.0 / math.sqrt(max(1, tensor.shape[-1] if tensor.dim() else 1)) for name, tensor in tensors.items()}
    return {
        name: tensor + (torch.randn(tensor.shape, generator=generator) * 0.5 * scale[name]).to(tensor.dtype)
        for name, tensor in tensors.items()
    }


def check_eager(
    graph: KernelGraph, tensors: Mapping[str, Tensor], leading: Sequence[tuple[int, ...]]
) -> list[ValidationCheck]:
    """Shapes, gradients, large inputs and repeatability of the graph as PyTorch runs it, operator by operator."""
    weights = (("initial weights", tensors), ("trained weights", _trained_weights(tensors)))
    runs = [(lead, name, _run_eager(graph, values, lead)) for lead in leading for name, values in weights]
    return [
        _shapes(graph, runs),
        _finite_outputs("finite outputs", runs),
        _gradients(runs),
        _large_inputs(graph, tensors, leading),
        _repeatable(graph, tensors, leading[-1]),
    ]


def check_agreement(
    graph: KernelGraph, tensors: Mapping[str, Tensor], compiled: CompiledKernel, rows: Sequence[int]
) -> ValidationCheck:
    """Whether compiled code and graph agree, outputs and all gradients, for several numbers of rows.

    Values agree if they are within the tolerance of `torch.testing.assert_close` for the dtype; or if, measured against
    the same graph in float64, the compiled ones are at most three times as far off (root mean square) as the graph's
    own, which is how PyTorch tests its compilers (`torch._dynamo.utils.same`).
    """
    worst, compared = 0.0, 0
    most = max(2, _MAX_ELEMENTS // max(graph.in_features, graph.out_features))
    rows = tuple(dict.fromkeys(min(each, most) for each in rows))
    for count in rows:
        for values in (tensors, _trained_weights(tensors)):
            inputs = _inputs(graph, (count,))
            eager = _differentiate(_interpreted(graph), graph, values, inputs)
            attached = _differentiate(compiled, graph, values, inputs)
            precise = {name: tensor.double() for name, tensor in values.items()}
            reference = _differentiate(_interpreted(graph), graph, precise, [each.double() for each in inputs])
            exact = dict(reference.named())
            ours = dict(attached.named())
            for name, value in eager.named():
                if name not in ours:
                    return ValidationCheck(name="agreement", passed=False, detail=f"the attachment has no {name}")
                worst = max(worst, _distance(ours[name], value))
                compared += 1
                if not _agree(ours[name], value, exact[name]):
                    detail = f"{name} at {count} rows differs by up to {_distance(ours[name], value):.3g}"
                    return ValidationCheck(name="agreement", passed=False, detail=detail)
    detail = f"{compared} tensors compared for {', '.join(map(str, rows))} rows; largest difference {worst:.3g}"
    return ValidationCheck(name="agreement", passed=True, detail=detail)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)


def _inputs(graph: KernelGraph, lead: tuple[int, ...], scale: float = 1.0) -> list[Tensor]:
    """`x`, and the host's output if the kernel reads it."""
    generator, dtype = _generator(), getattr(torch, graph.dtype)
    widths = (graph.in_features, graph.out_features) if graph.uses_host else (graph.in_features,)
    return [(torch.randn(*lead, width, generator=generator) * scale).to(dtype) for width in widths]


def _interpreted(graph: KernelGraph) -> CompiledKernel:
    """The graph, run operator by operator, with the calling convention of compiled code.

    A function, since what another thread traces, it takes every call of a module for its own.
    """
    return partial(type(fx.GraphModule(nn.Module(), graph.to_fx())).forward, None)


def _differentiate(
    kernel: CompiledKernel, graph: KernelGraph, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor]
) -> KernelRun:
    names = [*(("x", "host") if graph.uses_host else ("x",)), *graph.tensor_names]
    arguments = [
        each.detach().clone().requires_grad_() for each in (*inputs, *(tensors[n] for n in graph.tensor_names))
    ]
    output = kernel(*arguments)
    if not output.requires_grad:
        return KernelRun(output.detach(), dict.fromkeys(names))
    direction = torch.randn(output.shape, generator=_generator()).to(output.dtype)
    gradients = torch.autograd.grad(output, arguments, direction, allow_unused=True)
    return KernelRun(output.detach(), dict(zip(names, gradients, strict=True)))


def _run_eager(graph: KernelGraph, tensors: Mapping[str, Tensor], lead: tuple[int, ...]) -> KernelRun:
    return _differentiate(_interpreted(graph), graph, tensors, _inputs(graph, lead))


_Runs = Sequence[tuple[tuple[int, ...], str, KernelRun]]


def _shapes(graph: KernelGraph, runs: _Runs) -> ValidationCheck:
    for lead, _, run in runs:
        wanted, dtype = (*lead, graph.out_features), getattr(torch, graph.dtype)
        if tuple(run.output.shape) != wanted or run.output.dtype != dtype:
            got = f"{run.output.dtype} {tuple(run.output.shape)}"
            return ValidationCheck(name="shapes", passed=False, detail=f"got {got}, wanted {dtype} {wanted}")
    tried = ", ".join(str(lead) for lead in dict.fromkeys(lead for lead, _, _ in runs))
    return ValidationCheck(name="shapes", passed=True, detail=f"leading dimensions {tried}")


def _finite_outputs(name: str, runs: _Runs) -> ValidationCheck:
    for lead, weights, run in runs:
        if not bool(run.output.isfinite().all()):
            detail = f"the output is not finite for leading dimensions {lead}, {weights}"
            return ValidationCheck(name=name, passed=False, detail=detail)
    return ValidationCheck(name=name, passed=True)


def _gradients(runs: _Runs) -> ValidationCheck:
    for lead, weights, run in runs:
        missing = [name for name, gradient in run.gradients.items() if gradient is None and name not in ("x", "host")]
        if missing:
            return ValidationCheck(name="gradients", passed=False, detail=f"{', '.join(missing)} gets no gradient")
        if all(run.gradients.get(name) is None for name in ("x", "host")):
            return ValidationCheck(name="gradients", passed=False, detail="the output does not depend on any input")
        for name, gradient in run.gradients.items():
            if gradient is not None and not bool(gradient.isfinite().all()):
                detail = f"the gradient of {name} is not finite for leading dimensions {lead}, {weights}"
                return ValidationCheck(name="gradients", passed=False, detail=detail)
    return ValidationCheck(name="gradients", passed=True)


def _large_inputs(
    graph: KernelGraph, tensors: Mapping[str, Tensor], leading: Sequence[tuple[int, ...]]
) -> ValidationCheck:
    scale = _LARGE[graph.dtype]
    module = _interpreted(graph)
    parameters = [tensors[name] for name in graph.tensor_names]
    with torch.no_grad():
        for lead in leading:
            output = module(*_inputs(graph, lead, scale), *parameters)
            if not bool(output.isfinite().all()):
                detail = f"the output is not finite for inputs of size {scale:g}"
                return ValidationCheck(name="large inputs", passed=False, detail=detail)
    return ValidationCheck(name="large inputs", passed=True, detail=f"standard normal times {scale:g}")


def _repeatable(graph: KernelGraph, tensors: Mapping[str, Tensor], lead: tuple[int, ...]) -> ValidationCheck:
    first, second = (_run_eager(graph, tensors, lead) for _ in range(2))
    same = all(
        torch.equal(a, b) for (_, a), (_, b) in zip(first.named(), second.named(), strict=True) if not a.isnan().any()
    )
    return ValidationCheck(name="repeatable", passed=same, detail="" if same else "two runs on one input differ")


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0


def _agree(compiled: Tensor, eager: Tensor, exact: Tensor) -> bool:
    if compiled.shape != eager.shape or compiled.dtype != eager.dtype:
        return False
    try:
        torch.testing.assert_close(compiled, eager, equal_nan=True)
    except AssertionError:
        allowed = _ERROR_RATIO * _off_by(eager, exact) + torch.finfo(eager.dtype).eps * _size(exact)
        return _off_by(compiled, exact) <= allowed
    return True


def _off_by(value: Tensor, exact: Tensor) -> float:
    return _size(value.double() - exact)


def _size(value: Tensor) -> float:
    return float(value.square().mean().sqrt())
