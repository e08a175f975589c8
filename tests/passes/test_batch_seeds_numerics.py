"""BatchSeeds: what the batched graph computes, against the graph before."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from esper.artifacts import OPERATORS, Blueprint, KernelGraph, Node, TensorSpec
from esper_passes import AddKernels, BatchSeeds, FoldFossils, PassEvent, SeedGraph
from tests.passes.batching import TWO, apply, of_blueprint, with_seeds
from tests.passes.graphs import MarkedLinear, capture_with_inputs

IN, OUT = 4, 6


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
    "deepen": _family(Blueprint.deepen, 3),
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
    after, _ = apply(before, BatchSeeds(min_seeds=min_seeds), AddKernels(), callback=_lint)
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


ATTRIBUTES: dict[str, Any] = {"value": 1.5, "min": 0.2, "max": 0.9, "dim": -1, "dims": [-1], "shape": [3]}
SAME_SHAPE = [  # operators of one input whose result has the shape of it
    name
    for name, operator in OPERATORS.items()
    if operator.inputs[0] == 1
    and not {"keepdim", "sizes", "start", "order", "dim0", "repeats"} & set(operator.attributes)
    if name not in ("unsqueeze", "squeeze", "select", "concat")
]


def _kernel(
    seed: int, op: str, inputs: tuple[str, ...], specs: tuple[TensorSpec, ...]
) -> tuple[SeedGraph, list[Tensor]]:
    """`up(op(0.1 + down(x)^2, ...))`, where `inputs` are "h" for the value that is given and the names of tensors."""
    attributes = {name: ATTRIBUTES[name] for name in OPERATORS[op].attributes if name in ATTRIBUTES}
    graph = KernelGraph(
        IN,
        OUT,
        "float64",
        (TensorSpec("down", (3, IN), "float64"), TensorSpec("up", (OUT, 3), "float64"), *specs),
        (
            Node("low", "linear", ("x", "down"), {}),
            Node("positive", "square", ("low",), {}),
            Node("h", "add_scalar", ("positive",), {"value": 0.1}),
            Node("result", op, inputs, attributes),
            Node("y", "linear", ("result", "up"), {}),
        ),
        "y",
    )
    generator = torch.Generator().manual_seed(seed)
    values = [torch.rand(spec.shape, generator=generator, dtype=torch.double) + 0.1 for spec in graph.tensors]
    return SeedGraph(graph.to_fx(), graph.parameter_names, False, False), [each.requires_grad_() for each in values]


def _check_operator(at_site: list[tuple[SeedGraph, list[Tensor]]]) -> int:
    """Check outputs and gradients; return how many linear calls are left, the host's among them."""
    layer, x, marked, given_ = _captured((3,), True)
    alphas = torch.full((len(at_site),), 0.25, dtype=torch.double)
    before = with_seeds(marked, {3: at_site}, alphas, _lint)
    after, _ = apply(before, TWO, callback=_lint)
    parameters = [value for _, values in at_site for value in values]
    results = []
    for graph in (before, after):
        (output,) = graph(*given_, *parameters, alphas)
        results.append((output, *_gradients(output, [x, *layer.parameters(), *parameters])))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    return sum(node.target is torch._C._nn.linear for node in after.graph.nodes)


@pytest.mark.parametrize("op", SAME_SHAPE)
def test_every_operator_of_one_input(op: str) -> None:
    linear_calls = _check_operator([_kernel(seed, op, ("h",), ()) for seed in range(3)])
    stacked = op not in ("cumsum", "flip")  # these read along the features, and are left as they are
    assert linear_calls == (3 if stacked else 5)


@pytest.mark.parametrize("shape", [(), (1,), (3,)], ids=str)
@pytest.mark.parametrize("op", ["add", "sub", "mul", "div", "maximum", "minimum"])
def test_every_operator_of_a_value_and_a_parameter(op: str, shape: tuple[int, ...]) -> None:
    specs = (TensorSpec("p", shape, "float64"),)
    for inputs in (("h", "p"), ("p", "h")):
        assert _check_operator([_kernel(seed, op, inputs, specs) for seed in range(3)]) == 3


@pytest.mark.parametrize(("op", "inputs"), [("layer_norm", 1), ("layer_norm", 2), ("rms_norm", 1)])
def test_norms_with_parameters(op: str, inputs: int) -> None:
    specs = tuple(TensorSpec(f"p{index}", (3,), "float64") for index in range(inputs))
    kernels = [_kernel(seed, op, ("h", *(spec.name for spec in specs)), specs) for seed in range(3)]
    assert _check_operator(kernels) == 3


def test_a_norm_of_the_input_is_computed_once() -> None:
    def kernel() -> tuple[SeedGraph, list[Tensor]]:
        graph = KernelGraph(
            IN,
            OUT,
            "float64",
            (TensorSpec("scale", (IN,), "float64"), TensorSpec("up", (OUT, IN), "float64")),
            (
                Node("norm", "rms_norm", ("x", "scale"), {"shape": [IN]}),
                Node("y", "linear", ("norm", "up"), {}),
            ),
            "y",
        )
        values = [torch.rand(spec.shape, dtype=torch.double).requires_grad_() for spec in graph.tensors]
        return SeedGraph(graph.to_fx(), graph.parameter_names, False, False), values

    assert _check_operator([kernel(), kernel(), kernel()]) == 2


def test_kernels_of_equal_structure_and_different_sizes_share_the_last_product_alone() -> None:
    sizes = (2, 6, 2, 6)  # eight features, of which two stacks of unequal parts would make another four by four
    at_site = [
        of_blueprint(Blueprint.bottleneck(IN, OUT, size, start="kaiming", seed=seed, dtype="float64"))
        for seed, size in enumerate(sizes)
    ]
    assert _check_operator(at_site) == 4  # the host, one for each size, the last product
