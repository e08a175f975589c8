"""`FoldFossils`: the alphas of fossilized seeds become constants of the graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from esper_passes._blend import SEED, TYPE_AS, carried
from esper_passes._chains import TO_DTYPE, alpha_index, cast_of, erase_dead, is_blend, release, seed_of
from esper_passes._subgraphs import rewrite_bodies
from esper_passes.base import PassResult

__all__ = ["FoldFossils"]


@dataclass(frozen=True)
class FoldFossils:
    """Replace the alphas in `constants`, which maps indices among the alphas to values from 0 to 1, by these values.

    It follows :class:`InlineKernels`. Where alpha is 0 the blend and the kernel disappear; where it is 1 the kernel's
    output stands alone, and what was blended before it goes, the site's linear call too unless a kernel reads it. Any
    other alpha becomes a number in its `lerp`. Placeholders stay, also those that nothing reads any more. A parameter
    of what has gone gets no gradient, where it got zeros before.

    Raises `ValueError` for a value outside of [0, 1].
    """

    name: ClassVar[str] = "fold_fossils"
    constants: Mapping[int, float]

    def __post_init__(self) -> None:
        for index, alpha in self.constants.items():
            if not math.isfinite(alpha) or not 0.0 <= alpha <= 1.0:
                raise ValueError(f"the alpha at index {index} is {alpha}, and has to be from 0 to 1")

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        return PassResult(graph_module, bool(self.constants) and self._rewrite(graph_module))

    def _rewrite(self, module: fx.GraphModule) -> bool:
        modified = rewrite_bodies(module, self._rewrite)
        hosts: dict[str, fx.Node | None] = {}
        for node in list(module.graph.nodes):
            index = alpha_index(node) if is_blend(node) else None
            if index is not None and index in self.constants:
                hosts[seed_of(node)[0]] = cast_of(node)[1]
                _fold(node, float(self.constants[index]))
        for call, host in hosts.items():
            erase_dead(module.graph, call)
            if host is not None:
                release(host)
        if hosts:
            module.recompile()
        return modified or bool(hosts)


def _fold(blend: fx.Node, alpha: float) -> None:
    """Have the users of `blend` use what it is at the constant `alpha`."""
    y, cast, _ = blend.args
    assert isinstance(y, fx.Node)
    if 0.0 < alpha < 1.0:
        blend.args = (y, cast, alpha)
    else:
        blend.replace_all_uses_with(y if alpha == 0.0 else _alone(blend))


def _alone(blend: fx.Node) -> fx.Node:
    """The output of a kernel in the dtype of the site, without reading the site's linear call if that can be."""
    kernel, host, dtype = cast_of(blend)
    with blend.graph.inserting_before(blend):
        if dtype is None:
            alone = blend.graph.call_function(TYPE_AS, (kernel, host))
        else:
            alone = blend.graph.call_function(TO_DTYPE, (kernel, dtype))
    alone.meta = {**carried(blend), SEED: blend.meta[SEED]}
    return alone
