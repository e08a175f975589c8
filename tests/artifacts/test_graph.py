"""Graphs: edges, names, shapes across leading dimensions, digests, and what is made of them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from esper.artifacts import ArtifactGraphError, ArtifactLimitError, KernelGraph, Limits, Node, TensorSpec
from esper.artifacts.shapes import check_shapes


def spec(name: str, *shape: int, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, shape, dtype)


def kernel(
    *nodes: Node, tensors: tuple[TensorSpec, ...] = (), features: int = 4, output: str | None = None
) -> KernelGraph:
    return KernelGraph(4, features, "float32", tensors, nodes, output or nodes[-1].name)


def relu(name: str, *inputs: str) -> Node:
    return Node(name, "relu", inputs or ("x",), {})


def add(name: str, left: str, right: str) -> Node:
    return Node(name, "add", (left, right), {})


MLP = kernel(
    Node("h", "linear", ("x", "down.weight", "down.bias"), {}),
    relu("r", "h"),
    Node("y", "linear", ("r", "up.weight"), {}),
    add("out", "host", "y"),
    tensors=(spec("down.weight", 3, 4), spec("down.bias", 3), spec("up.weight", 5, 3)),
    features=5,
)


def weights(graph: KernelGraph) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {each.name: torch.randn(each.shape, generator=generator) for each in graph.tensors}


def test_fx_placeholders_are_inputs_then_tensors_in_order() -> None:
    graph = MLP.to_fx()
    graph.lint()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = ["x", "host", "down_weight", "down_bias", "up_weight"]
    assert [node.target for node in placeholders] == names
    assert [node.name for node in placeholders] == names
    assert MLP.parameter_names == tuple(names[2:])
    assert {node.op for node in graph.nodes} == {"placeholder", "call_function", "output"}


def test_module_computes_the_graph_and_shares_its_tensors() -> None:
    tensors = weights(MLP)
    module = MLP.to_module(tensors)
    x, host = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    want = host + (x @ tensors["down.weight"].T + tensors["down.bias"]).relu() @ tensors["up.weight"].T
    torch.testing.assert_close(module(x, host), want)
    parameters = dict(module.named_parameters())
    assert set(parameters) == {"down_weight", "down_bias", "up_weight"}
    assert parameters["up_weight"].data_ptr() == tensors["up.weight"].data_ptr()
    module(x, host).sum().backward()
    assert all(parameter.grad is not None for parameter in parameters.values())


def test_module_keeps_parameters_that_it_is_given() -> None:
    tensors: dict[str, Tensor] = {name: nn.Parameter(value) for name, value in weights(MLP).items()}
    module = MLP.to_module(tensors)
    assert {id(each) for each in module.parameters()} == {id(each) for each in tensors.values()}


def test_module_pickles_and_copies() -> None:
    module = MLP.to_module(weights(MLP))
    x, host = torch.randn(3, 4), torch.randn(3, 5)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x, host), module(x, host))


def test_module_refuses_tensors_that_do_not_fit() -> None:
    tensors = weights(MLP)
    with pytest.raises(ArtifactGraphError, match=r"missing \['up.weight'\], not used \['other'\]"):
        MLP.to_module({**{k: v for k, v in tensors.items() if k != "up.weight"}, "other": torch.ones(1)})
    with pytest.raises(ArtifactGraphError, match=r"'up.weight' has shape \(3, 5\), the graph needs \(5, 3\)"):
        MLP.to_module({**tensors, "up.weight": tensors["up.weight"].T})


@pytest.mark.parametrize(
    "names",
    [
        ("a.b", "a_b", "a-b"),
        ("0.weight", "1.weight"),
        ("forward", "training", "graph", "code", "_parameters", "meta", "__class__", "__init__", "state_dict"),
        ("class", "lambda", "None", "True", "print", "sum", "float", "self", "torch"),
        ("add", "add_1", "relu", "linear_2", "inf", "nan", "device"),
    ],
)
def test_any_tensor_names_become_unique_identifiers(names: tuple[str, ...]) -> None:
    nodes, value = [], "x"
    for index, name in enumerate(names):
        nodes.append(add(f"n{index}", value, name))
        value = f"n{index}"
    graph = kernel(*nodes, tensors=tuple(spec(name, 4) for name in names))
    assert len(set(graph.parameter_names)) == len(names)
    assert all(name.isidentifier() for name in graph.parameter_names)
    tensors = weights(graph)
    x = torch.zeros(4)
    as_fx = graph.to_fx()
    as_fx.lint()
    assert [node.target for node in as_fx.nodes][1 : 1 + len(names)] == list(graph.parameter_names)
    torch.testing.assert_close(graph.to_module(tensors)(x), sum(tensors.values(), x))
    function = fx.GraphModule(nn.Module(), as_fx)
    torch.testing.assert_close(function(x, *tensors.values()), sum(tensors.values(), x))


def test_json_round_trip_and_pickle() -> None:
    assert KernelGraph.from_json(MLP.to_json()) == MLP
    assert pickle.loads(pickle.dumps(MLP)) == MLP
    assert hash(copy.deepcopy(MLP)) == hash(MLP)


def test_digest_ignores_names_and_sees_structure() -> None:
    renamed = kernel(
        Node("a", "linear", ("x", "w", "b"), {}),
        relu("c", "a"),
        Node("d", "linear", ("c", "v"), {}),
        add("e", "host", "d"),
        tensors=(spec("w", 3, 4), spec("b", 3), spec("v", 5, 3)),
        features=5,
    )
    assert renamed.digest == MLP.digest
    assert len(MLP.digest) == 64
    base = kernel(Node("a", "leaky_relu", ("x",), {}))
    spelled_out = kernel(Node("a", "leaky_relu", ("x",), {"negative_slope": 0.01}))
    steeper = kernel(Node("a", "leaky_relu", ("x",), {"negative_slope": 0.02}))
    assert base.digest == spelled_out.digest
    others = [steeper, kernel(relu("a")), kernel(relu("a", "host")), kernel(relu("a"), relu("b", "a"))]
    assert len({graph.digest for graph in (base, MLP, *others)}) == 6


def test_digest_depends_on_the_order_of_tensors() -> None:
    """Callers line tensors up by position, so an order is structure."""
    nodes = (add("a", "x", "v"), Node("b", "mul", ("a", "w"), {}))
    first = kernel(*nodes, tensors=(spec("v", 4), spec("w", 4)))
    second = kernel(*nodes, tensors=(spec("w", 4), spec("v", 4)))
    assert first.digest != second.digest


@pytest.mark.parametrize(
    ("nodes", "tensors", "output", "message"),
    [
        ((relu("a", "b"), relu("b", "a")), (), "b", "nodes 'a' and 'b' form a cycle"),
        ((relu("a", "a"),), (), "a", "nodes 'a' and 'a' form a cycle"),
        ((relu("a", "b"), relu("b")), (), "a", "reads 'b', which comes later"),
        ((relu("a", "nowhere"),), (), "a", "reads 'nowhere', which nothing in the graph is called"),
        ((relu("a"), relu("b")), (), "b", "'a' does not reach the output"),
        ((relu("a"),), (spec("w", 4),), "a", "'w' does not reach the output"),
        ((relu("a"), relu("a")), (), "a", "node 'a' has the name of another value"),
        ((add("w", "x", "w"),), (spec("w", 4),), "w", "node 'w' has the name of another value"),
        ((add("a", "x", "w"),), (spec("w", 4), spec("w", 4)), "a", "tensor 'w' is declared twice"),
        ((relu("a"),), (), "x", "the output 'x' is not a node"),
        ((relu("a"),), (), "z", "the output 'z' is not a node"),
        ((add("a", "x", "w"),), (spec("w", 4, dtype="float64"),), "a", "'w' is float64 in a float32 kernel"),
        ((), (), "x", "the output 'x' is not a node"),
    ],
)
def test_refuses_bad_edges(nodes: tuple[Node, ...], tensors: tuple[TensorSpec, ...], output: str, message: str) -> None:
    with pytest.raises(ArtifactGraphError, match=message):
        KernelGraph(4, 4, "float32", tensors, nodes, output)


@pytest.mark.parametrize("name", ["", "a b", "x", "host", "é", "a" * 129, "../../etc/passwd", "a;b", ".a"])
def test_refuses_bad_names(name: str) -> None:
    with pytest.raises(ArtifactGraphError, match="name"):
        relu(name)
    with pytest.raises(ArtifactGraphError, match="name"):
        spec(name, 4)


def test_refuses_bad_tensors_and_kernels() -> None:
    with pytest.raises(ArtifactGraphError, match="use at most 8 dimensions"):
        spec("w", *[1] * 9)
    with pytest.raises(ArtifactGraphError, match="each at least 1"):
        spec("w", 0)
    with pytest.raises(ArtifactGraphError, match="use one of float32"):
        spec("w", 1, dtype="int64")
    with pytest.raises(ArtifactGraphError, match="each is at least 1"):
        KernelGraph(0, 4, "float32", (), (relu("a"),), "a")
    with pytest.raises(ArtifactGraphError, match="kernel's dtype is 'complex64'"):
        KernelGraph(4, 4, "complex64", (), (relu("a"),), "a")
    with pytest.raises(ArtifactGraphError, match="more than a float16 can hold"):
        KernelGraph(4, 4, "float16", (), (Node("a", "mul_scalar", ("x",), {"value": 1e6}),), "a")


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (0,), (2, 0, 3)])
def test_shape_check_accepts_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    check_shapes(MLP, (lead,))


def test_a_check_of_shapes_pauses_after_every_operator() -> None:
    pauses: list[None] = []
    leads = ((4,), (4, 1))  # that no other test asks for: what passed is not run again
    check_shapes(MLP, leads, pause=lambda: pauses.append(None))
    assert len(pauses) == len(MLP.nodes) * (1 + len(leads))


W44, W4 = spec("w", 4, 4), spec("w", 4)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (kernel(Node("a", "linear", ("x", "w"), {}), tensors=(spec("w", 5, 3),), features=5), "does not accept shapes"),
        (kernel(relu("a"), features=5), r"the output has shape \['\*', 4\], the kernel declares \['\*', 5\]"),
        (
            kernel(Node("a", "transpose", ("x",), {"dim0": -1, "dim1": -2})),
            "names the last 2 dimensions, its input has 1",
        ),
        (kernel(Node("a", "softmax", ("x",), {"dim": -2})), "names the last 2 dimensions"),
        (kernel(Node("a", "flatten", ("x",), {"start": -2, "end": -1})), "names the last 2 dimensions"),
        (kernel(Node("a", "slice", ("x",), {"dim": -1, "start": 3, "length": 2})), "exceeds dimension size"),
        (kernel(Node("a", "unflatten", ("x",), {"dim": -1, "sizes": [3, 2]})), "unflatten does not accept"),
        (kernel(Node("a", "matmul", ("w", "x"), {}), tensors=(W44,)), "a kernel must treat leading|does not accept"),
        (kernel(Node("a", "matmul", ("x", "x"), {}), relu("b", "a")), "the output has shape|does not accept"),
        (kernel(relu("a", "w"), tensors=(W4,)), "the output 'a' does not depend on the input"),
        # [4] + [4, 1] broadcasts into the leading dimension
        (
            kernel(add("a", "x", "w"), Node("b", "amax", ("a",), {"dims": [-2]}), tensors=(spec("w", 4, 1),)),
            "a kernel must treat leading dimensions alike|does not accept",
        ),
        # a sum leaves [*]; torch would let softmax take the last leading dimension for a trailing one
        (
            kernel(
                Node("a", "sum", ("x",), {"dims": [-1]}),
                Node("b", "softmax", ("a",), {"dim": -1}),
                Node("c", "unsqueeze", ("b",), {"dim": -1}),
                Node("d", "mul", ("c", "x"), {}),
            ),
            "softmax names the last 1 dimensions, its input has 0",
        ),
    ],
)
def test_shape_check_refuses(graph: KernelGraph, message: str) -> None:
    with pytest.raises(ArtifactGraphError, match=message):
        check_shapes(graph, ((2, 3),))


def test_shape_check_bounds_values() -> None:
    grow: list[Node] = [Node("n0", "unsqueeze", ("x",), {"dim": -1})]
    for index in range(1, 6):
        grow.append(Node(f"n{index}", "repeat_interleave", (f"n{index - 1}",), {"repeats": 2**20, "dim": -1}))
    graph = kernel(*grow, Node("out", "sum", ("n5",), {"dims": [-1]}))
    with pytest.raises(ArtifactLimitError, match="number of elements of node 'n2' is 4398046511104"):
        check_shapes(graph, ((2, 3),))
    deep = [Node("n0", "unsqueeze", ("x",), {"dim": -1})]
    deep += [Node(f"n{index}", "unsqueeze", (f"n{index - 1}",), {"dim": -1}) for index in range(1, 9)]
    with pytest.raises(ArtifactLimitError, match="the rank of node"):
        check_shapes(kernel(*deep), ((2, 3),))


def parsed(**changes: Any) -> dict[str, Any]:
    return {**MLP.to_json(), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_feature": 3}, "graph has the unknown key 'in_feature'; did you mean 'in_features'"),
        ({"in_features": "4"}, "graph.in_features must be an integer from 1"),
        ({"in_features": 0}, "graph.in_features must be an integer from 1"),
        ({"in_features": 4.0}, r"not 4\.0"),
        ({"in_features": 2**40}, "graph.in_features must be an integer from 1 to 1048576"),
        ({"dtype": "float8"}, "graph.dtype is 'float8'"),
        ({"nodes": {}}, "graph.nodes must be an array"),
        ({"nodes": [3]}, r"graph.nodes\[0\] must be an object, not 3"),
        ({"nodes": [{"name": "a", "op": "relu"}]}, r"graph.nodes\[0\].inputs is missing"),
        ({"nodes": [{"name": "a", "op": "relu", "inputs": [1]}]}, r"graph.nodes\[0\].inputs\[0\] must be the name"),
        (
            {"nodes": [{"name": "a", "op": "rleu", "inputs": ["x"]}]},
            r"graph.nodes\[0\]: node 'a': .* did you mean 'relu'",
        ),
        ({"nodes": [{"name": "a", "op": "relu", "inputs": ["x"], "target": "os.system"}]}, "unknown key 'target'"),
        ({"tensors": [{"name": "w", "shape": [-1]}]}, r"graph.tensors\[0\].shape\[0\] must be an integer from 1"),
        ({"tensors": [{"name": "w", "shape": [True]}]}, "not True"),
        ({"tensors": [{"name": "w", "shape": [1], "path": "/"}]}, "unknown key 'path'"),
    ],
)
def test_from_json_names_the_path(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactGraphError, match=message):
        KernelGraph.from_json(parsed(**changes))


def test_from_json_applies_limits_before_building() -> None:
    chain = [{"name": f"n{i}", "op": "relu", "inputs": [f"n{i - 1}" if i else "x"]} for i in range(50)]
    with pytest.raises(ArtifactLimitError, match=r"number of graph.nodes is 50, but Limits.max_nodes is 49"):
        KernelGraph.from_json(parsed(nodes=chain, tensors=[], output="n49"), limits=Limits(max_nodes=49))
    for shape, message in (([2**21], "a dimension of tensor"), ([2**14] * 2, "the size of"), ([2] * 7, "the rank of")):
        with pytest.raises(ArtifactLimitError, match=message):
            KernelGraph.from_json(parsed(tensors=[{"name": "w", "shape": shape}]), limits=Limits(max_rank=6))
    many = [{"name": f"t{index}", "shape": [1]} for index in range(1025)]
    with pytest.raises(ArtifactLimitError, match=r"number of graph.tensors is 1025"):
        KernelGraph.from_json(parsed(tensors=many))
    big = [{"name": f"t{index}", "shape": [2**10, 2**10]} for index in range(65)]
    with pytest.raises(ArtifactLimitError, match=r"total number of parameters"):
        KernelGraph.from_json(parsed(tensors=big))
