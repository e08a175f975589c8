"""Which kernels are affine, and what a host's weight and bias become when such a kernel is folded into them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from esper.artifacts import OPERATORS, ArtifactGraphError, Blueprint, KernelGraph, Node, TensorSpec, build_artifact
from esper.artifacts.shapes import check_shapes
from esper.execution.kernels.fossils import fold, is_added, is_affine, is_cheap
from esper.execution.kernels.loaded_kernel import LoadedKernel
from tests import composition
from tests.composition import KINDS

IN, OUT = 6, 4

AFFINE = [
    Blueprint.affine(IN, OUT, start="kaiming"),
    Blueprint.affine(IN, OUT, start="identity"),
    Blueprint.low_rank(IN, OUT, 3, bias=True, start="kaiming"),
    Blueprint.low_rank(IN, OUT, 3, bias=True, start="identity"),
    Blueprint.from_module(nn.Sequential(nn.Linear(IN, 5), nn.Linear(5, OUT)), IN),
]
LINEAR = [
    Blueprint.affine(IN, OUT, bias=False, start="orthogonal"),
    Blueprint.low_rank(IN, OUT, 3, start="kaiming"),
    Blueprint.low_rank(IN, OUT, 3, start="identity"),
]
OTHERS = [
    Blueprint.bottleneck(IN, OUT, 3, start="kaiming"),
    Blueprint.bottleneck(IN, OUT, 3, start="identity"),
    Blueprint.gated_mlp(IN, OUT, 3, start="kaiming"),
    Blueprint.residual_mlp(IN, OUT, 3, start="kaiming"),
    Blueprint.residual_mlp(IN, OUT, 3, norm="none", start="identity"),
    Blueprint.residual_mlp(IN, OUT, 3, norm="rms_norm", start="kaiming"),
]


def loaded(blueprint, trainable=False):
    return LoadedKernel.from_artifact(build_artifact(blueprint), trainable=trainable)


def randomised(kernel):
    """Weights as training might leave them, biases that are not zero among them."""
    with torch.no_grad():
        for parameter in kernel.parameters:
            parameter.copy_(torch.randn_like(parameter))
    return kernel


def graph_of(*nodes, tensors=(), features=(IN, OUT), output="y"):
    specs = tuple(TensorSpec(name, shape, "float32") for name, shape in tensors)
    return KernelGraph(*features, "float32", specs, nodes, output)


# ---- which kernels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blueprint", AFFINE)
def test_families_with_a_constant_are_affine_and_not_linear(blueprint):
    assert is_affine(blueprint.graph)
    assert not is_affine(blueprint.graph, constant=False)


@pytest.mark.parametrize("blueprint", LINEAR)
def test_families_without_a_constant_are_linear(blueprint):
    assert is_affine(blueprint.graph)
    assert is_affine(blueprint.graph, constant=False)


@pytest.mark.parametrize("blueprint", OTHERS)
def test_no_other_family_is_affine(blueprint):
    assert not is_affine(blueprint.graph)


def test_what_is_computed_of_weights_alone_may_be_anything():
    gate = graph_of(
        Node("s", "sigmoid", ("g",), {}),
        Node("v", "linear", ("x", "w"), {}),
        Node("y", "mul", ("v", "s"), {}),
        tensors=(("g", (OUT,)), ("w", (OUT, IN))),
    )
    assert is_affine(gate, constant=False)


@pytest.mark.parametrize("op", [name for name, operator in OPERATORS.items() if operator.inputs[0] <= 2])
def test_an_operator_that_counts_as_affine_is_affine_at_any_input(op):
    """Every operator of the table, of the input and, where it takes two, of the input twice and of a parameter."""
    attributes = {
        "value": 2.5, "min": -0.5, "max": 0.5, "dim": -1, "dims": [-1], "shape": [IN], "sizes": [2, 3], "start": -1,
        "end": -1, "order": [-1], "dim0": -1, "dim1": -1, "repeats": 1, "length": IN, "index": 0,
    }  # fmt: skip
    if op == "slice":
        attributes["start"] = 0
    given = {name: attributes[name] for name in OPERATORS[op].attributes if name in attributes}
    seconds = ("x", "p", "w") if OPERATORS[op].inputs[1] > 1 else ("",)
    counted = 0
    for second in seconds:
        for inputs in ((second,), ("x", second), (second, "x")):
            used = tuple(name for name in inputs if name)
            if "x" not in used:
                continue
            tensors = [(name, shape) for name, shape in (("p", (IN,)), ("w", (IN, IN))) if name in used]
            try:
                graph = graph_of(Node("y", op, used, given), tensors=tensors, features=(IN, IN))
                check_shapes(graph, ((2, 3),))
            except ArtifactGraphError:
                continue  # no kernel
            if is_affine(graph):
                counted += 1
                _check_affine(graph, linear=is_affine(graph, constant=False))
    known = {"linear", "matmul", "add", "sub", "mul", "div", "add_scalar", "mul_scalar", "div_scalar", "rsub_scalar"}
    assert (counted > 0) == (op in known | {"neg"})


def _check_affine(graph, linear):
    tensors = {spec.name: torch.rand(spec.shape, dtype=torch.double) + 0.5 for spec in graph.tensors}
    module = graph.to_module(tensors)
    first, second = torch.randn(2, 7, IN, dtype=torch.double)
    zero = module(torch.zeros(IN, dtype=torch.double))
    torch.testing.assert_close(
        module(2 * first - 3 * second) - zero, 2 * (module(first) - zero) - 3 * (module(second) - zero)
    )
    assert not linear or not zero.any()


@pytest.mark.parametrize("kind", KINDS)
def test_which_kernels_add_to_the_output(kind):
    added = [name for name in KINDS if name.endswith("added") and not name.startswith("output")]
    assert is_added(KINDS[kind].blueprint(0, "float32").graph) == (kind in (*added, "output less a map"))


def test_what_is_much_work_at_a_commit_is_left():
    """Any single map, and a low rank, of a large layer; and all maps of a small one."""
    assert is_cheap(Blueprint.affine(4096, 4096, start="identity").graph)
    assert is_cheap(Blueprint.low_rank(4096, 4096, 16, start="identity").graph)
    assert not is_cheap(Blueprint.low_rank(4096, 4096, 2048).graph)
    assert is_cheap(Blueprint.low_rank(64, 64, 2048).graph)
    product = (Node("w", "matmul", ("a", "b"), {}), Node("h", "neg", ("x",), {}), Node("y", "linear", ("h", "w"), {}))
    shapes = (("a", (OUT, 4096)), ("b", (4096, IN)))
    assert not is_cheap(graph_of(*product, tensors=shapes))  # the size of what it computes is not known beforehand


# ---- folding -------------------------------------------------------------------------------------------------------


def folded(weight, bias, kernel, alpha):
    """The weight and bias of the folded layer; `weight` and `bias` stay."""
    new_weight, new_bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
    fold(new_weight, new_bias, kernel, alpha)
    return new_weight, new_bias


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("blueprint", AFFINE + LINEAR)
def test_the_folded_layer_is_the_blend(blueprint, alpha, trainable):
    kernel = loaded(blueprint, trainable)
    kernel = randomised(kernel) if trainable else kernel
    weight, bias = torch.randn(OUT, IN, requires_grad=True), torch.randn(OUT, requires_grad=True)
    before = [parameter.clone() for parameter in kernel.parameters]
    new_weight, new_bias = folded(weight, bias, kernel, alpha)
    x = torch.randn(9, IN, dtype=torch.double)
    torch.testing.assert_close(
        functional.linear(x, new_weight.double(), new_bias.double()),
        blend(x, weight, bias, kernel, alpha),
        rtol=0,
        atol=3e-6,  # a rounding of each of six weights
    )
    assert all(torch.equal(*pair) for pair in zip(kernel.parameters, before, strict=True))


def blend(x, weight, bias, kernel, alpha):
    tensors = {
        spec.name: parameter.detach().double()
        for spec, parameter in zip(kernel.graph.tensors, kernel.parameters, strict=True)
    }
    module = kernel.graph.to_module(tensors)
    host = functional.linear(x, weight.detach().double(), None if bias is None else bias.detach().double())
    return torch.lerp(host, module(x, host) if kernel.uses_host else module(x), alpha)


@pytest.mark.parametrize("blueprint", LINEAR)
def test_a_host_without_bias_takes_a_linear_kernel(blueprint):
    weight, kernel = torch.randn(OUT, IN), randomised(loaded(blueprint, trainable=True))
    new_weight, new_bias = folded(weight, None, kernel, 0.25)
    assert new_bias is None
    x = torch.randn(9, IN, dtype=torch.double)
    torch.testing.assert_close(x @ new_weight.double().T, blend(x, weight, None, kernel, 0.25), rtol=0, atol=3e-6)


def test_the_ends_of_alpha_are_exact():
    weight, bias = torch.randn(OUT, IN), torch.randn(OUT)
    kernel = randomised(loaded(Blueprint.affine(IN, OUT, start="kaiming"), trainable=True))
    for alpha, expected in ((0.0, (weight, bias)), (1.0, kernel.parameters)):
        assert all(torch.equal(*pair) for pair in zip(folded(weight, bias, kernel, alpha), expected, strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once_to_their_own_dtype(dtype):
    kernel = randomised(loaded(Blueprint.affine(IN, OUT, start="kaiming", dtype=dtype), trainable=True))
    weight = torch.randn(OUT, IN).to(getattr(torch, dtype))
    bias = torch.randn(OUT).to(weight.dtype)
    new_weight, new_bias = folded(weight, bias, kernel, 0.3)
    own_weight, own_bias = (parameter.detach().double() for parameter in kernel.parameters)
    for new, old, own in ((new_weight, weight, own_weight), (new_bias, bias, own_bias)):
        exact = torch.lerp(old.double(), own, 0.3)
        assert ((new.double() - exact).abs() <= 0.51 * torch.finfo(new.dtype).eps * exact.abs().clamp(min=1e-3)).all()


def test_a_kernel_that_reads_its_input_in_several_ways():
    """The input itself, scaled and shifted, beside two linear layers of it."""
    graph = graph_of(
        Node("a", "linear", ("x", "w", "c"), {}),
        Node("b", "matmul", ("x", "m"), {}),
        Node("n", "neg", ("x",), {}),
        Node("s", "add_scalar", ("n",), {"value": 0.5}),
        Node("t", "mul", ("s", "p"), {}),
        Node("u", "sub", ("a", "b"), {}),
        Node("y", "add", ("u", "t"), {}),
        tensors=(("w", (IN, IN)), ("c", (IN,)), ("m", (IN, IN)), ("p", (IN,))),
        features=(IN, IN),
    )
    assert is_affine(graph)
    tensors = {spec.name: {"init": "kaiming"} for spec in graph.tensors}
    kernel = randomised(loaded(Blueprint("graph", {"graph": graph.to_json(), "tensors": tensors}), trainable=True))
    weight, bias = torch.randn(IN, IN), torch.randn(IN)
    new_weight, new_bias = folded(weight, bias, kernel, 0.6)
    x = torch.randn(9, IN, dtype=torch.double)
    torch.testing.assert_close(
        functional.linear(x, new_weight.double(), new_bias.double()),
        blend(x, weight, bias, kernel, 0.6),
        rtol=0,
        atol=3e-6,
    )


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_mode_of_the_forward_that_commits_makes_no_difference(mode):
    weight, bias = torch.randn(OUT, IN), torch.randn(OUT)
    kernel = randomised(loaded(Blueprint.low_rank(IN, OUT, 3, bias=True), trainable=True))
    expected = folded(weight, bias, kernel, 0.3)
    with mode():
        result = folded(weight, bias, kernel, 0.3)
    assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_every_affine_kind_is_folded_as_the_formula_says(kind, alpha):
    """Those that scale the output, or map it, among them."""
    blueprint = KINDS[kind].blueprint(0, "float64")
    if not is_affine(blueprint.graph):
        assert kind not in composition.AFFINE
        return
    kernel = randomised(loaded(blueprint, trainable=True))
    features = composition.OUT, composition.IN
    weight, bias = torch.randn(features, dtype=torch.double), torch.randn(features[0], dtype=torch.double)
    parameters = dict(zip(kernel.graph.tensor_names, kernel.parameters, strict=True))
    x = torch.randn(5, composition.IN, dtype=torch.double)
    expected = composition.composed(x, weight, bias, [composition.Planted(kind, parameters, alpha)])
    torch.testing.assert_close(functional.linear(x, *folded(weight, bias, kernel, alpha)), expected)


def test_a_constant_of_more_features_than_what_it_is_added_to():
    graph = graph_of(
        Node("a", "linear", ("x", "narrow"), {}),
        Node("b", "sub", ("p", "a"), {}),
        Node("y", "linear", ("b", "wide"), {}),
        tensors=(("narrow", (1, IN)), ("p", (3,)), ("wide", (OUT, 3))),
    )
    tensors = dict.fromkeys(graph.tensor_names, "kaiming")
    kernel = randomised(loaded(Blueprint.from_graph(graph, tensors), trainable=True))
    weight, bias, x = torch.randn(OUT, IN), torch.randn(OUT), torch.randn(9, IN, dtype=torch.double)
    new_weight, new_bias = folded(weight, bias, kernel, 0.6)
    torch.testing.assert_close(
        functional.linear(x, new_weight.double(), new_bias.double()),
        blend(x, weight, bias, kernel, 0.6),
        rtol=0,
        atol=3e-6,
    )


def test_autocast_does_not_go_on_with_the_old_weight():
    layer, kernel, x = nn.Linear(IN, OUT), loaded(AFFINE[0]), torch.randn(9, IN)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)  # autocast keeps the weight in bfloat16 until the region ends
        fold(layer.weight, layer.bias, kernel, 0.5)
        inside = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inside, layer(x))
