"""Attachments: a kernel's forward and backward as machine code for one toolchain and hardware.

The payload is what Inductor compiled, for any number of rows, with gradients for the input, the host output (where the
kernel reads it) and every parameter. Signing, naming and storing are in `esper.artifacts.attachment`; this module only
compiles and loads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import fx

from esper import torch_internals
from esper.artifacts import ArtifactError, Attachment, AttachmentError, KernelGraph, Target
from esper.execution.background import waiting
from esper.execution.loaded_kernel import LoadedKernel
from esper.execution.sources import KernelSource

__all__ = ["CompiledKernel", "attach_from", "compile_attachment", "load_attachment"]

_LOG = logging.getLogger("esper.compiler")

CompiledKernel = Callable[..., torch.Tensor]
"""`(x [n, in], [host [n, out],] *parameters) -> [n, out]`, differentiable in every argument."""

_EXAMPLE_ROWS = 8  # any number of at least 2 will do: 0 and 1 are the sizes that tracing specialises on


def compile_attachment(
    graph: KernelGraph,
    tensors: Mapping[str, torch.Tensor],
    device: str = "cpu",
    options: Mapping[str, bool | int] = MappingProxyType({}),
) -> bytes:
    """Compile `graph` with Inductor and return the payload of an attachment.

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


def load_attachment(payload: bytes) -> CompiledKernel:
    """The compiled kernel of a payload.

    This loads machine code: check the signature first (`Attachment.verify`). Raises what deserialising raises when the
    payload was made by another torch; a caller that checked the target does not see that.
    """
    compiled = torch_internals.deserialise_compiled(payload)

    def kernel(*arguments: torch.Tensor) -> torch.Tensor:
        outputs: Sequence[torch.Tensor] = compiled(*arguments)
        return outputs[0]

    return kernel


def attach_from(source: KernelSource, kernel: LoadedKernel) -> None:
    """Give `kernel` its compiled attachment, if `source` has one for this toolchain and hardware from a trusted signer.

    An attachment by a stranger, or one that does not verify, is left alone with a warning; the graph runs then.
    For background threads: it may fetch, and it loads machine code.
    """
    if kernel.attached:
        return
    target = Target.current(str(kernel.device.type))
    with waiting():
        packed = source.attachment(kernel.artifact_id, target.key)
    trust = source.trust()
    if packed is None or trust is None:
        _say_once(f"kernel {kernel.artifact_id[:12]} has no attachment for this machine: eager models run its graph")
        return
    try:
        attachment = Attachment.unpack(packed)
        if (attachment.artifact_id, attachment.target.key) != (kernel.artifact_id, target.key):
            raise AttachmentError("it was made for another kernel or another machine")
        attachment.verify(trust)
    except ArtifactError as error:
        _LOG.warning("an attachment of kernel %s is not used: %s", kernel.artifact_id[:12], error)
        return
    kernel.attach(load_attachment(attachment.payload))


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _LOG.info(message)
