"""BatchSeeds: what the batched graph computes, against the graph before."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from esper.artifacts import Blueprint
from esper_passes import BatchSeeds, FoldFossils, PassEvent
from tests.passes.batching import apply, of_blueprint, with_seeds
from tests.passes.graphs import MarkedLinear, capture_with_inputs

IN, OUT = 4, 6
TWO = BatchSeeds(min_seeds=2)


def _module(*layers: nn.Module) -> Callable[..., Blueprint]:
    return lambda start, seed: Blueprint.from_module(nn.Sequential(*layers), IN)


def _family(make: Callable[..., Blueprint], size: int | None, **options: Any) -> Callable[..., Blueprint]:
    sizes = () if size is None else (size,)
    return lambda start, seed: make(IN, OUT, *sizes, start=start, seed=seed, dtype="float64", **options)


FAMILIES = {
    "affine": _family(Blueprint.affine, None),
    "affine without bias": _family(Blueprint.affine, None, bias=False),
    "low rank": _family(Blueprint.low_rank, 3),
    "low rank with bias": _family(Blueprint.low_rank, 2, bias=True),
    "bottleneck": _family(Blueprint.bottleneck, 3),
    "bottleneck, other activation": _family(Blueprint.bottleneck, 3, activation="leaky_relu"),
    "gated": _family(Blueprint.gated_mlp, 3),
    "residual": _family(Blueprint.residual_mlp, 3, depth=2),
    "residual, rms": _family(Blueprint.residual_mlp, 3, norm="rms_norm"),
}


@st.composite
def seeds(draw: st.DrawFn) -> list[tuple[str, str, bool, bool, float | None]]:
    """Family, start, isolate, whether it learns, the constant alpha of a fossil."""
    one = st.tuples(
        st.sampled_from(sorted(FAMILIES)),
        st.sampled_from(["kaiming", "kaiming", "identity"]),
        st.booleans(),
        st.booleans(),
        st.sampled_from([None, None, None, 0.0, 0.25, 1.0]),
    )
    kinds = draw(st.lists(one, min_size=1, max_size=3))
    return draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=6))


@given(seeds(), st.sampled_from([(), (3,), (2, 3)]), st.booleans(), st.sampled_from([1, 2, 3]))
@settings(max_examples=60, deadline=None)
def test_any_seeds_compute_what_they_did_alone(
    chosen: list[tuple[str, str, bool, bool, float | None]], lead: tuple[int, ...], bias: bool, min_seeds: int
) -> None:
    layer, x, marked, given_ = _captured(lead, bias)
    at_site = [
        of_blueprint(FAMILIES[family](start, index), isolate, learns)
        for index, (family, start, isolate, learns, _) in enumerate(chosen)
    ]
    alphas = torch.linspace(0.125, 0.875, len(chosen), dtype=torch.float64)
    constants = {index: each[-1] for index, each in enumerate(chosen) if each[-1] is not None}
    before, _ = apply(with_seeds(marked, {3: at_site}, alphas, _lint), FoldFossils(constants), callback=_lint)
    after, _ = apply(before, BatchSeeds(min_seeds=min_seeds), callback=_lint)
    parameters = [value for _, values in at_site for value in values]
    leaves = [x, *layer.parameters(), *(value for value in parameters if value.requires_grad)]
    results = []
    for graph in (before, after):
        (output,) = graph(*given_, *parameters, alphas)
        results.append((output, *_gradients(output, leaves)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@cache
def _captured(lead: tuple[int, ...], bias: bool) -> tuple[MarkedLinear, Tensor, fx.GraphModule, list[Any]]:
    layer = MarkedLinear(IN, OUT, 3, bias=bias).double()
    x = torch.randn(*lead, IN, dtype=torch.double, requires_grad=True)
    return layer, x, *capture_with_inputs(layer, x)


def _lint(event: PassEvent) -> None:
    event.graph_module.graph.lint()


def _gradients(output: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    if not output.requires_grad:
        return ()
    return torch.autograd.grad(output.square().sum(), leaves, allow_unused=True, materialize_grads=True)
