"""Folding a fossil into the host's own weights: when it is exact, and when it is safe.

The weights are written in place, at a commit. An autograd graph that still needs them as they were would raise in its
backward: a commit where a forward begins waits until there is none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from esper.errors import EsperError
from esper.execution.kernels.fossils import fold, is_added, is_affine, is_cheap
from esper.execution.plans.plan import Plan, SeedPlan
from esper.execution.plans.runtime import Runtime
from esper.execution.seeds.seed import SeedLayer
from esper.torch_internals import held_elsewhere, write_count

__all__ = ["CannotFoldError", "Fold"]

_PATIENCE = 64  # forwards


class CannotFoldError(EsperError):
    """A fossil cannot become part of the host's weights, or not now; it stays a kernel."""


@dataclass(eq=False)
class Fold:
    """Taking the fossil `seed`, of share `alpha`, into the weight and bias of `layer`.

    It exists while that is staged: called at the commit, on the thread that runs the model.
    """

    layer: SeedLayer
    seed: SeedPlan
    alpha: float
    runtime: Runtime
    _seen: int | None = field(default=None, init=False)
    _asked: int = field(default=0, init=False)
    _folded: list[Tensor] | None = field(default=None, init=False)

    def is_exact(self, plan: Plan) -> bool:
        """Whether the layer computes the same with the fossil in its weights, whatever becomes of the other kernels.

        The layer is linear; the fossil is affine, and cheap to fold; it gets its input undetached; the weights stand
        nowhere else. Where kernels of `plan` stand before it at the site, it adds to the output, and so do they.
        """
        graph, layer = self.seed.kernel.graph, self.layer
        weights = self._weights()
        before = [each for each in plan.sites.get(layer.site, ()) if each.seed < self.seed.seed]
        return (
            bool(weights)
            and not self.seed.isolate
            and is_affine(graph, constant=len(weights) > 1)
            and is_cheap(graph)
            and (not before or is_added(graph))
            and all(is_added(each.kernel.graph) and not each.isolate for each in before)
            and all(type(each) is nn.Parameter and self.runtime.model.uses_of(each) == 1 for each in weights)
        )

    def is_safe(self) -> bool:
        """To be asked where a forward begins: whether no backward is to come that needs the weights as they are.

        So it is if nothing but the parameters holds their memory, or if the weight was written since it was asked
        before, as an optimizer does. After some dozens of forwards without either, it is safe because
        :meth:`__call__` refuses.
        """
        self._asked += 1
        weights = self._weights()
        before, self._seen = self._seen, write_count(weights[0])
        if before not in (None, self._seen) or not any(map(held_elsewhere, weights)):
            self._asked = 0
            return True
        return self._asked > _PATIENCE

    def __call__(self) -> None:
        """Fold; raises :class:`CannotFoldError` where that would not be exact any more, or is not safe."""
        if self._asked > _PATIENCE:
            raise CannotFoldError("something holds the weights' memory at every forward")
        if self.runtime.is_passed_over(self.layer.site):
            raise CannotFoldError(
                "no forward has called the layer; where code reads its weight, kernels have no effect"
            )
        if not self.is_exact(self.runtime.plan):
            raise CannotFoldError("a kernel was put before it meanwhile")
        weights = self._weights()
        if self._folded is None:  # else an interrupt came while they were written
            new = [each.detach().clone() for each in weights]
            fold(new[0], new[1] if len(new) > 1 else None, self.seed.kernel, self.alpha)
            self._folded = new
        with torch.no_grad():
            for weight, folded in zip(weights, self._folded, strict=True):
                weight.copy_(folded)

    def _weights(self) -> list[Tensor]:
        """Weight and perhaps bias of the layer; none of a module that is no linear layer."""
        return [each for each in self.layer.linear_map or () if each is not None]
