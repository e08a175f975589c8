"""Which site grows, and by how much: candidates at every site, and the score of each."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esper.artifacts import Blueprint
from esper.errors import shown
from esper.execution.kasmina_layer import KasminaLayer
from esper.growth.errors import GrowthError
from esper.growth.policy import GrowthPolicy
from esper.growth.starts import SELECTED_FAMILIES, Pursuit, pursued
from esper.growth.statistics import SiteStatistics
from esper.torch_internals import counting_flops

__all__ = ["Choice", "Place", "Scored", "choose", "parameters_of"]


@dataclass(frozen=True)
class Place:
    """A free seed of a layer, and the blueprints that could be loaded there, by their numbers of hidden units."""

    layer: str
    seed: int
    blueprints: Mapping[int, Blueprint]


@dataclass(frozen=True)
class Scored:
    """The best candidate at one site.

    `gain` is the decrease of the loss that it promises beyond what chance gives, in the natural metric; `host_gain`
    what the layer's own parameters promise; `score` the gain per added parameter.
    """

    place: Place
    width: int
    gain: float
    host_gain: float
    parameters: int

    @property
    def score(self) -> float:
        return self.gain / self.parameters

    def numbers(self) -> dict[str, Any]:
        """For a record."""
        numbers = ("width", "gain", "host_gain", "parameters")
        return {"layer": self.place.layer, "seed": self.place.seed, **{name: getattr(self, name) for name in numbers}}

    @property
    def ratio(self) -> float:
        """The gain relative to the layer's own."""
        return self.gain / self.host_gain if self.host_gain > 0 else math.copysign(math.inf, self.gain)


@dataclass(frozen=True)
class Choice:
    """A decision to grow."""

    layer: str
    seed: int
    width: int
    gain: float
    host_gain: float
    parameters: int
    blueprint: Blueprint
    rows: int
    """That a batch brings to the layer."""

    def numbers(self) -> dict[str, Any]:
        """For a record."""
        return {name: value for name, value in vars(self).items() if name not in ("blueprint", "rows")}

    def state(self) -> dict[str, Any]:
        """As data."""
        return {**vars(self), "blueprint": self.blueprint.to_json()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Choice:
        """What :meth:`state` made."""
        return cls(**{**state, "blueprint": Blueprint.from_json(state["blueprint"])})


def parameters_of(blueprint: Blueprint) -> int:
    """How many parameters a kernel of `blueprint` adds."""
    return sum(math.prod(spec.shape) for spec in blueprint.graph.tensors)


def candidates(layer: KasminaLayer, policy: GrowthPolicy, seed: int, most: int) -> dict[int, Blueprint]:
    """The blueprints for `layer` of at most `most` parameters, by width, smallest first; their draws go by `seed`."""
    found = {}
    for width in policy.widths:
        blueprint = _candidate(layer, policy, width, seed)
        if parameters_of(blueprint) <= most:
            found[width] = blueprint
    return found


def least_parameters(layer: KasminaLayer, policy: GrowthPolicy) -> int:
    """Those of the smallest candidate. Raises :class:`GrowthError` for a family that cannot be."""
    return min(parameters_of(_candidate(layer, policy, width, policy.seed)) for width in policy.widths)


def _candidate(layer: KasminaLayer, policy: GrowthPolicy, width: int, seed: int) -> Blueprint:
    if callable(policy.family):
        blueprint = policy.family(layer, width)
        if not isinstance(blueprint, Blueprint):
            raise GrowthError(f"family must return a Blueprint for a layer and a width, not {shown(blueprint)}")
        if blueprint.family not in SELECTED_FAMILIES:
            raise GrowthError(
                f"a grower selects the hidden units of {', '.join(SELECTED_FAMILIES)} blueprints, and family returned "
                f"one of {blueprint.family} for layer {layer.layer_name!r}: load such kernels by request_kernel()"
            )
        return Blueprint(blueprint.family, {**blueprint.options, "seed": seed})
    dtype = next((str(each.dtype).removeprefix("torch.") for each in layer.parameters()), "float32")
    size = {"bottleneck": "rank", "gated_mlp": "hidden"}[policy.family]
    features = {"in_features": layer.input_dim, "out_features": layer.output_dim}
    return Blueprint(policy.family, {**features, size: width, "seed": seed, "dtype": dtype})


def choose(
    statistics: Mapping[str, SiteStatistics], places: Sequence[Place], policy: GrowthPolicy, draw: int
) -> tuple[Choice | None, Scored | None, int]:
    """What to grow, if anything is worth it, the best candidate in either case, and the FLOPs of it all.

    `draw` is the seed of what is random.
    """
    scored: list[Scored] = []
    pursuits: dict[str, Pursuit] = {}
    with counting_flops() as flops:  # and not of making blueprints, which are checked once in a process
        for place in places:
            width, blueprint = max(place.blueprints.items())
            found = pursued(statistics[place.layer], blueprint, proposals=max(policy.proposals, width))
            pursuits[place.layer] = found
            scored.append(_best_width(place, found, policy))
    best = max(scored, key=lambda each: each.score, default=None)  # the first in the model's order, if they are equal
    if best is None or best.gain <= 0 or best.ratio < policy.threshold:
        return None, best, flops.total
    if policy.place == "random":
        best = _elsewhere(best, scored, draw)
    blueprint, more = best.place.blueprints[best.width], 0
    seen = statistics[best.place.layer]
    if policy.start == "selected":
        found = pursuits[best.place.layer]
        if not found.fits(blueprint):
            with counting_flops() as again:
                found = pursued(seen, blueprint, proposals=max(policy.proposals, best.width))
            more = again.total
        blueprint = found.kernel(blueprint)
    rows = -(-seen.count // seen.batches)
    return Choice(**best.numbers(), blueprint=blueprint, rows=rows), best, flops.total + more


def _best_width(place: Place, found: Pursuit, policy: GrowthPolicy) -> Scored:
    """The width of the highest score, or a larger one whose further units are worth nearly as much each."""
    by_chance = policy.chance * found.by_chance
    steps = [
        Scored(place, width, found.gains[width - 1] - width * by_chance, found.host_gain, parameters_of(each))
        for width, each in sorted(place.blueprints.items())
    ]
    best = first = max(steps, key=lambda each: each.score)
    for wider in steps[steps.index(first) + 1 :]:
        further = (wider.gain - best.gain) / max(wider.parameters - best.parameters, 1)
        if further <= 0 or further < policy.marginal * first.score:
            break
        best = wider
    return best


def _elsewhere(best: Scored, scored: Sequence[Scored], draw: int) -> Scored:
    """A random site with a candidate as wide as the best one, which may be the best one."""
    wide = [each for each in scored if best.width in each.place.blueprints]
    other = random.Random(draw).choice(wide)
    parameters = parameters_of(other.place.blueprints[best.width])
    return Scored(other.place, best.width, other.gain, other.host_gain, parameters)
