"""The plan of one graph: the kernels at its sites, whoever they belong to."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from esper.execution.plans.plan import Plan

__all__ = ["GraphPlan"]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class GraphPlan(Plan):
    """Active seeds by the numbers of a graph's sites; `device` is that of the alphas.

    Layers and models that share a graph share its variants, since plans of equal structure here are alike for it.
    """

    device: torch.device = _CPU

    @property
    def specialization_key(self) -> Hashable:
        """As of any plan; a variant is compiled for the device of the alphas too."""
        sites = super().specialization_key
        return (sites, str(self.device)) if sites else sites
