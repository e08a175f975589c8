"""`AddKernels`: what kernels add to a site's output is added to it, instead of blended in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from esper_passes._blend_sums import Addend, Emitter, addends
from esper_passes._chains import TO_DTYPE, Chain, chains, erase_dead, seed_of
from esper_passes._subgraphs import rewrite_bodies
from esper_passes._torch_internals import nn_functions
from esper_passes.base import PassResult

__all__ = ["AddKernels"]

_LINEAR = nn_functions.linear


@dataclass(frozen=True)
class AddKernels:
    """Blend `y + f(x)` with `y` as `y + alpha * f(x)`, where all kernels of a site do no more than add.

    A `lerp` has the backward compute `(1 - alpha) g + alpha g` for what arrives as `g`, as large as the site's output;
    that is `g` itself. Where `f` ends in a linear map of something narrower, that is what is multiplied by `alpha`, and
    nothing of the size of the output is but `f`.

    It follows :class:`BatchSeeds`, which leaves the sites with few kernels. Sites whose dtype is not recorded stay as
    they are. Results differ by rounding, and not at all where the shares are 0 or 1.
    """

    name: ClassVar[str] = "add_kernels"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        return PassResult(graph_module, self._rewrite(graph_module))

    def _rewrite(self, module: fx.GraphModule) -> bool:
        modified = rewrite_bodies(module, self._rewrite)
        added = [_add(chain) for chain in chains(module.graph)]
        if any(added):
            module.recompile()
        return modified or any(added)


def _add(chain: Chain) -> bool:
    if chain.dtype is None or not all(chain.keeps):
        return False
    emit, parts = Emitter(chain.end), addends(chain)
    total = chain.base
    for part in parts:
        if part.index:
            scaled = _scaled(part, chain.blends[part.index - 1].args[2], emit)
            total = emit(torch.add, total, emit(TO_DTYPE, scaled, chain.dtype))
    chain.end.replace_all_uses_with(total)
    erase_dead(chain.end.graph, chain.call)
    return True


def _scaled(part: Addend, alpha: Any, emit: Emitter) -> fx.Node:
    linear = part.linear
    if linear is None or not seed_of(linear.h)[0] or linear.elements >= linear.features**2:
        return emit(torch.mul, part.node, alpha)
    bias = None if linear.bias is None else emit(torch.mul, linear.bias, alpha)
    return emit(_LINEAR, emit(torch.mul, linear.h, alpha), linear.weight, *([] if bias is None else [bias]))
