"""Growth: what a model's sites could still learn, measured, and kernels that start from it."""

from __future__ import annotations

from esper.growth.errors import GrowthError
from esper.growth.grower import Grower
from esper.growth.history import GrowthRecord
from esper.growth.probe import Probe
from esper.growth.starts import Selection, alpha_gradient, gradmax, selected
from esper.growth.statistics import SiteStatistics

__all__ = [
    "Grower",
    "GrowthError",
    "GrowthRecord",
    "Probe",
    "Selection",
    "SiteStatistics",
    "alpha_gradient",
    "gradmax",
    "selected",
]
