"""Data-driven starts: the weights with which a kernel begins, taken from the statistics of its site.

All of them leave the model's function as it is. `selected` chooses, among random hidden units, those that explain most
of the gradient that the layer's own parameters cannot follow (self-expanding networks; Mitchell et al. 2023,
arXiv:2307.04526), one after the other (orthogonal matching pursuit). `gradmax` gives new units the outputs for which
the gradient of their inputs is largest (Evci et al. 2022, arXiv:2201.05125).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.artifacts import Blueprint
from esper.artifacts.families import ACTIVATIONS
from esper.growth.errors import GrowthError
from esper.growth.statistics import SiteStatistics

__all__ = ["SELECTED_FAMILIES", "Selection", "alpha_gradient", "gradmax", "selected"]

_WIDTH = {"bottleneck": "rank", "gated_mlp": "hidden", "widen": "hidden"}
SELECTED_FAMILIES = tuple(_WIDTH)
"""Those whose hidden units :func:`selected` chooses."""
_FIRST = {"bottleneck": ("down",), "gated_mlp": ("gate", "up"), "widen": ("fan_in",)}
_LAST = {"bottleneck": "up", "gated_mlp": "down", "widen": "fan_out"}


@dataclass(frozen=True)
class Selection:
    """A kernel with selected hidden units, and what they are worth.

    `gains` has, for the first k units, the decrease of the loss that a step along them promises, in the natural metric
    of the gradients (SENN's natural expansion score) and beyond what the layer's own parameters do: `host_gain`, in the
    same unit. Compare the two, of one site or of several; a unit that adds little to `gains` is one too many.
    `by_chance` is what a unit gains at most, in all likelihood, where there is nothing to be found. What so many
    parameters of the layer explain of so few rows by chance is not in `host_gain`; with as many inputs as there are
    rows nothing is told from chance, and `by_chance` is above all gains.
    """

    blueprint: Blueprint
    gains: tuple[float, ...]
    host_gain: float
    by_chance: float


def selected(
    statistics: SiteStatistics, blueprint: Blueprint, *, proposals: int = 512, damping: float = 1e-3
) -> Selection:
    """`blueprint`, a bottleneck, a gated MLP or a `widen`, with hidden units chosen among `proposals` random ones.

    Their inputs have unit variance over the sample, biases (where the blueprint has them) are quantiles of it. The
    kernel adds zero to what the site returns, so that loading it changes nothing, and its last linear map has the
    largest gradient. `damping` is added to the moments, relative to their mean diagonal.

    The draws go by the blueprint's own seed: the same statistics give the same kernel. Raises :class:`GrowthError`.
    """
    family, width = _checked(statistics, blueprint)
    if proposals < width:
        raise GrowthError(f"proposals is {proposals}, and {width} units are to be chosen among them")
    candidates, features = _candidates(statistics, blueprint, proposals)
    residual, host_gain, freedom = _residual(statistics, damping)
    if statistics.learns[0] or statistics.learns[1]:
        columns = statistics.host_features()
        features = _without(features, _wide(statistics.row_features())[:, columns])
    chosen, gains = _pursue(features, residual, width)
    weights: dict[str, Any] = {name: tensor[chosen].clone() for name, tensor in candidates.items()}
    last = _LAST[family]
    names = {spec.name for spec in blueprint.graph.tensors}
    weights |= {name: "zeros" for name in (f"{last}.weight", f"{last}.bias") if name in names}
    return Selection(
        Blueprint.from_graph(_with_host(blueprint).graph, weights),
        tuple(gains),
        host_gain,
        _by_chance(residual, proposals) / freedom,
    )


def gradmax(statistics: SiteStatistics, blueprint: Blueprint, *, scale: float = 1.0) -> Blueprint:
    """`blueprint`, a bottleneck, with the outputs for which the gradient of its inputs' weights is largest.

    Its first linear map is zero, its last one has the leading left singular vectors of E[g xᵀ], of length `scale`. For
    activations that are 0 at 0 and have a slope there. Where the layer's own weight learns it has that gradient too, so
    that new units only follow it: use :func:`selected` there. Raises :class:`GrowthError`.
    """
    family, width = _checked(statistics, blueprint)
    activation = str(blueprint.options["activation"])
    at_zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = _activation(activation)(at_zero)
    (slope,) = torch.autograd.grad(value, at_zero)
    if family != "bottleneck" or float(value.detach()) != 0.0 or float(slope) == 0.0:
        raise GrowthError(
            f"gradmax is for bottlenecks with an activation that is 0 at 0 and has a slope there, as tanh, gelu and "
            f"silu; a {family} with {activation} has no gradient to begin with"
        )
    if width > statistics.out_features:
        raise GrowthError(f"gradmax gives at most {statistics.out_features} units here, one an output, not {width}")
    left = torch.linalg.svd(_wide(statistics.cross), full_matrices=False).U
    if width > left.shape[1]:
        raise GrowthError(f"gradmax gives at most {left.shape[1]} units here, one an input, not {width}")
    weights: dict[str, Any] = {}
    for spec in blueprint.graph.tensors:
        weights[spec.name] = "zeros" if spec.name != "up.weight" else _as(left[:, :width] * scale, blueprint)
    return Blueprint.from_graph(_with_host(blueprint).graph, weights)


def alpha_gradient(statistics: SiteStatistics, blueprint: Blueprint) -> float:
    """The derivative of the loss by a kernel's alpha, at alpha 0 and for one batch in the mean, from the sample.

    Negative if blending the kernel in lowers the loss (Firefly's score; Wu et al. 2020, arXiv:2102.08574). It is zero
    for a kernel that changes nothing yet.
    """
    _check_sizes(statistics, blueprint)
    with torch.no_grad():
        change = _evaluated(blueprint, statistics.rows, statistics.row_outputs) - _wide(statistics.row_outputs)
    mean = float((_wide(statistics.row_gradients) * change).sum(1).mean())
    return mean * statistics.count / statistics.batches


# -- of blueprints ---------------------------------------------------------------------------------------------------


def _checked(statistics: SiteStatistics, blueprint: Blueprint) -> tuple[str, int]:
    """The family and the number of hidden units."""
    _check_sizes(statistics, blueprint)
    if blueprint.family not in _WIDTH:
        raise GrowthError(f"hidden units are chosen for {', '.join(_WIDTH)} blueprints, not for {blueprint.family}")
    width = blueprint.options[_WIDTH[blueprint.family]]
    assert isinstance(width, int)
    return blueprint.family, width


def _check_sizes(statistics: SiteStatistics, blueprint: Blueprint) -> None:
    wanted = statistics.in_features, statistics.out_features
    given = blueprint.in_features, blueprint.out_features
    if wanted != given:
        raise GrowthError(
            f"the blueprint is for {given[0]} to {given[1]} features, and layer {statistics.name!r} has {wanted[0]} to "
            f"{wanted[1]}"
        )


def _with_host(blueprint: Blueprint) -> Blueprint:
    """The same with what the site returns added."""
    return Blueprint(blueprint.family, {**blueprint.options, "start": "identity"})


def _candidates(statistics: SiteStatistics, blueprint: Blueprint, count: int) -> tuple[dict[str, Tensor], Tensor]:
    """The first linear maps of `count` hidden units, by their names, and the units' values for the sampled rows."""
    family = blueprint.family
    wide = Blueprint(family, {**blueprint.options, _WIDTH[family]: count, "out_features": count, "start": "zero"})
    weights = {name: _wide(tensor) for name, tensor in wide.build()[1].items()}
    rows = _wide(statistics.rows).cpu()
    seed = blueprint.options["seed"]
    assert isinstance(seed, int)
    generator = torch.Generator().manual_seed(seed)
    first: dict[str, Tensor] = {}
    for name in _FIRST[family]:
        values = rows @ weights[f"{name}.weight"].T
        spread = values.std(0, correction=0).clamp_min(1e-12)
        first[f"{name}.weight"] = weights[f"{name}.weight"] / spread[:, None]
        if f"{name}.bias" in weights:
            places = torch.randint(len(rows), (count,), generator=generator)
            first[f"{name}.bias"] = -(values / spread)[places, torch.arange(count)]
    if family == "gated_mlp" and "up.bias" in first:
        first["up.bias"] = torch.zeros_like(first["up.bias"])  # the gate alone chooses where a unit is at work
    first = {name: _as(tensor, blueprint) for name, tensor in first.items()}
    return first, _units(blueprint, first, _wide(statistics.rows))


@torch.no_grad()
def _units(blueprint: Blueprint, first: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """What hidden units with these first linear maps make of `rows`, `[n, units]`."""
    maps = {name: _wide(tensor.to(rows.device)) for name, tensor in first.items()}
    gate, *others = (
        torch.nn.functional.linear(rows, maps[f"{name}.weight"], maps.get(f"{name}.bias"))
        for name in _FIRST[blueprint.family]
    )
    units: Tensor = _activation(str(blueprint.options["activation"]))(gate)
    return units * others[0] if others else units


def _evaluated(blueprint: Blueprint, rows: Tensor, outputs: Tensor) -> Tensor:
    graph, weights = blueprint.build()
    return _run(blueprint, weights, rows, outputs if graph.uses_host else None)


def _run(blueprint: Blueprint, weights: Mapping[str, Tensor], rows: Tensor, outputs: Tensor | None) -> Tensor:
    """What a kernel of the blueprint's graph with these weights makes of `rows`, in float64."""
    kernel = blueprint.graph.to_module({name: _wide(tensor.to(rows.device)) for name, tensor in weights.items()})
    given = [_wide(rows), *([] if outputs is None else [_wide(outputs)])]
    with torch.no_grad():
        result: Tensor = kernel(*given)
    return result


def _activation(name: str) -> Any:
    op, attributes = ACTIVATIONS[name]
    return lambda value: getattr(torch.nn.functional, op)(value, **attributes)


def _as(tensor: Tensor, blueprint: Blueprint) -> Tensor:
    return tensor.to("cpu", getattr(torch, blueprint.dtype))


# -- of statistics -----------------------------------------------------------------------------------------------------


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.device.type in ("cpu", "cuda") else tensor.cpu().double()


def _damped(moment: Tensor, damping: float) -> Tensor:
    scale = moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return moment + damping * scale * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def _residual(statistics: SiteStatistics, damping: float) -> tuple[Tensor, float, float]:
    """What the layer's own parameters cannot do of the rows' descent, in the natural metric; and what they gain.

    At last, which part of the rows' degrees of freedom is left beside them. A fit of p parameters to n rows explains
    p / n of pure noise, which is taken off of their gain as in the adjusted coefficient of determination.
    """
    if not damping > 0:
        raise GrowthError(f"damping must be more than 0, not {damping}")
    columns = statistics.host_features()
    cross, inputs = _wide(statistics.cross)[:, columns], _wide(statistics.inputs)[columns][:, columns]
    descent = -_wide(statistics.row_gradients)
    values, vectors = torch.linalg.eigh(_damped(_wide(statistics.gradients), damping))
    metric = vectors * values.clamp_min(torch.finfo(torch.float64).tiny).rsqrt() @ vectors.T
    if not len(columns):
        return descent @ metric, 0.0, 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(inputs, damping)))
    step = inverse @ cross.T
    fitted = float(((metric @ cross) * (metric @ step.T)).sum())
    total = float((metric @ _wide(statistics.gradients) * metric).sum())
    used = float((inverse * inputs).sum())  # parameters, those not counted that the damping holds
    freedom = max(statistics.count - used, 1.0) / statistics.count
    host_gain = max(fitted - (1 - freedom) / freedom * (total - fitted), 0.0)
    own = _wide(statistics.row_features())[:, columns]
    return (descent + own @ step) @ metric, host_gain, freedom


def _by_chance(residual: Tensor, proposals: int) -> float:
    """What the best of so many units explains of `residual` if they have nothing to do with it.

    Each explains a sum of chi-squares, weighted by the variances of the residual; the bound on the largest of them is
    that of Laurent and Massart (2000, lemma 1).
    """
    rows = len(residual)
    weights = torch.linalg.eigvalsh(residual.T @ residual / rows).clamp_min(0.0)
    spread = math.log(max(proposals, 2))
    most = weights.sum() + 2 * (weights.square().sum() * spread).sqrt() + 2 * weights.max() * spread
    return float(most) / rows


def _without(features: Tensor, others: Tensor) -> Tensor:
    """`features` less what a linear function of `others` makes of them."""
    gram = _damped(others.T @ others, 1e-9)
    fit: Tensor = torch.linalg.solve(gram, others.T @ features)
    return features - others @ fit


def _pursue(features: Tensor, residual: Tensor, count: int) -> tuple[Tensor, list[float]]:
    """The columns of `features` that explain most of `residual`, one after the other, and what the first k explain."""
    rows, features = len(features), features.clone()
    products = residual.T @ features  # kept up to date, as it takes longest
    least = features.square().sum(0).max() * 1e-9
    chosen: list[int] = []
    gains: list[float] = []
    for _ in range(count):
        energies = features.square().sum(0)
        scores = products.square().sum(0) / (energies.clamp_min(1e-300) * rows)
        scores[energies <= least] = -1.0
        scores[chosen] = -2.0
        best = int(scores.argmax())
        gains.append((gains[-1] if gains else 0.0) + max(float(scores[best]), 0.0))
        chosen.append(best)
        if energies[best] > least:
            unit = features[:, best] / energies[best].sqrt()
            shares = unit @ features
            products -= torch.outer(residual.T @ unit, shares)
            features -= torch.outer(unit, shares)
    return torch.tensor(chosen), gains
