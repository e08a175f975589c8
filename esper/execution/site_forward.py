"""The forward of a `KasminaLayer`.

In a file of its own, and short: Dynamo traces every instruction of it at every site, guards on all that it reads, and
reads the whole file once in every process.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling  # by itself: each dot is an instruction and a guard

from esper import torch_internals
from esper.execution.plans import registry
from esper.execution.site_marker import marked_by_esper
from esper_passes import TAGGED_SITE

__all__ = ["kernels_have_hooks", "site_forward"]


def site_forward(self: Any, input: Tensor) -> Tensor:
    """What the `KasminaLayer` computes of `input`, `[*, input_dim] -> [*, output_dim]`."""
    if is_dynamo_compiling():
        if _is_one_marker():
            marked: Tensor = TAGGED_SITE(input, self.weight, self.bias, self._site_tag)
            return marked
        return self._forward_traced(input)  # type: ignore[no-any-return]  # the layer's class is above this one
    return self._run(input)  # type: ignore[no-any-return]  # as above


def _layer_being_traced() -> Any:
    return torch_internals.argument_being_traced(site_forward.__code__, "self")


@torch_internals.constant_while_tracing
def _is_one_marker() -> bool:
    """Whether the layer that Dynamo traces is a site of a model, for Esper's backend, and nothing but its marker.

    Looked up behind Dynamo's back: what is read here is no guard. What was traced for one layer serves another only if
    that has a tag of the same dtype, which says that it is a site too; of hooks on layers Dynamo never keeps guards.
    """
    layer = _layer_being_traced()
    if layer is None or layer._stands_alone or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    return marked_by_esper() and not kernels_have_hooks()


@torch_internals.constant_while_tracing
def kernels_have_hooks() -> bool:
    """Whether hooks are on a kernel in force in the model whose layer Dynamo traces: no marker could run them.

    On any of the model's kernels, since its layers may share what is compiled of one of them. If that layer cannot be
    told, on any kernel.
    """
    layer = _layer_being_traced()
    runtimes = registry.runtimes() if layer is None else [layer.runtime]
    return any(seed.kernel.module.has_hooks for runtime in runtimes for seed in runtime.plan.seeds())
