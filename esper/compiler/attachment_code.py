"""The compiled code of an attachment: what Inductor makes of a kernel's graph, as bytes, and as a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import fx

from esper import torch_internals
from esper.artifacts import KernelGraph

__all__ = ["CompiledKernel", "compile_attachment", "load_attachment"]

CompiledKernel = Callable[..., torch.Tensor]
"""`(x [n, in], [host [n, out],] *parameters) -> [n, out]`, differentiable in every argument."""

_EXAMPLE_ROWS = 8  # any number of at least 2 will do: 0 and 1 are the sizes that tracing specialises on


def compile_attachment(
    graph: KernelGraph,
    tensors: Mapping[str, torch.Tensor],
    device: str = "cpu",
    options: Mapping[str, bool | int] = MappingProxyType({}),
) -> bytes:
    """Compile `graph` with Inductor, for :func:`load_attachment`.

    `tensors` gives shapes, dtypes and strides by tensor name; their values do not enter the payload. `options` are
    Inductor's settings by name. Takes seconds and patches process-wide state, so call it in a process of its own.
    Raises what Inductor raises, for example when no C++ compiler is found.
    """
    kernel = graph.to_fx()
    (output,) = [node for node in kernel.nodes if node.op == "output"]
    output.args = ((output.args[0],),)  # Inductor takes graphs that return a tuple
    dtype = getattr(torch, graph.dtype)
    features = (graph.in_features, graph.out_features) if graph.uses_host else (graph.in_features,)
    rows = [torch.zeros(_EXAMPLE_ROWS, width, dtype=dtype, device=device, requires_grad=True) for width in features]
    parameters = [
        torch.zeros_like(tensors[name], device=device, memory_format=torch.contiguous_format).requires_grad_()
        for name in graph.tensor_names
    ]
    module = fx.GraphModule(torch.nn.Module(), kernel)
    return torch_internals.serialise_compiled(module, [*rows, *parameters], range(len(rows)), options)


def load_attachment(compiled_code: bytes) -> CompiledKernel:
    """What :func:`compile_attachment` compiled.

    This loads machine code: check the signature first (`Attachment.verify`). Raises whatever keeps it from being
    loaded: no C++ compiler where Inductor's cache lacks a part of it, damaged bytes, another torch.
    """
    compiled = torch_internals.deserialise_compiled(compiled_code)

    def kernel(*arguments: torch.Tensor) -> torch.Tensor:
        outputs: Sequence[torch.Tensor] = compiled(*arguments)
        return outputs[0]

    return kernel
