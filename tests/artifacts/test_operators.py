"""Every operator of the table against torch, through `to_fx` and `to_module`, for any leading dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from esper.artifacts import OPERATORS, ArtifactGraphError, KernelGraph, Limits, Node, TensorSpec
from esper.artifacts.shapes import LEADING, check_shapes
from tests.services.programs import Program

LEADS = ((), (1,), (4,), (2, 3), (0, 2))
SIZE = 12


@dataclass(frozen=True)
class Case:
    """`op` applied to x [*, 12] (reshaped to [*, *view]) and `weights`, against `reference`."""

    op: str
    reference: Callable[..., Tensor]
    attributes: dict[str, Any] = field(default_factory=dict)
    weights: tuple[tuple[int, ...], ...] = ()
    view: tuple[int, ...] = (SIZE,)
    positive: bool = False
    twice: bool = False  # x is both inputs

    @property
    def label(self) -> str:
        return f"{self.op}-{'-'.join(f'{key}={value}' for key, value in self.attributes.items())}-{self.weights}"


def unary(op: str, reference: Callable[[Tensor], Tensor], positive: bool = False, **attributes: Any) -> Case:
    return Case(op, reference, attributes, positive=positive)


def grid(op: str, reference: Callable[[Tensor], Tensor], **attributes: Any) -> Case:
    return Case(op, reference, attributes, view=(3, 4))


CASES = [
    Case("linear", F.linear, weights=((5, SIZE),)),
    Case("linear", F.linear, weights=((5, SIZE), (5,))),
    Case("matmul", torch.matmul, weights=((SIZE, 5),)),
    Case("matmul", torch.matmul, weights=((4, 5),), view=(3, 4)),
    Case("matmul", torch.matmul, weights=((3, 4, 5),), view=(3, 1, 4)),
    *(
        Case(op, reference, weights=weights, positive=True)
        for op, reference in (
            ("add", torch.add),
            ("sub", torch.sub),
            ("mul", torch.mul),
            ("div", torch.div),
            ("maximum", torch.maximum),
            ("minimum", torch.minimum),
        )
        for weights in (((SIZE,),), ((1,),), ((),))
    ),
    Case("mul", torch.mul, twice=True),
    unary("add_scalar", lambda x: x + 1.5, value=1.5),
    unary("mul_scalar", lambda x: x * 1.5, value=1.5),
    unary("div_scalar", lambda x: x / 1.5, value=1.5),
    unary("rsub_scalar", lambda x: 1.5 - x, value=1.5),
    unary("pow_scalar", lambda x: x**3, value=3),
    unary("pow_scalar", lambda x: x**0.5, positive=True, value=0.5),
    unary("clamp_min", lambda x: x.clamp(min=-0.5), value=-0.5),
    unary("clamp_max", lambda x: x.clamp(max=0.5), value=0.5),
    unary("clamp", lambda x: x.clamp(-0.5, 0.5), min=-0.5, max=0.5),
    unary("neg", torch.neg),
    unary("abs", torch.abs),
    unary("exp", torch.exp),
    unary("expm1", torch.expm1),
    unary("log", torch.log, positive=True),
    unary("log1p", torch.log1p, positive=True),
    unary("sqrt", torch.sqrt, positive=True),
    unary("rsqrt", torch.rsqrt, positive=True),
    unary("reciprocal", torch.reciprocal, positive=True),
    unary("square", torch.square),
    unary("sin", torch.sin),
    unary("cos", torch.cos),
    unary("erf", torch.erf),
    unary("relu", F.relu),
    unary("sigmoid", torch.sigmoid),
    unary("tanh", torch.tanh),
    unary("silu", F.silu),
    unary("mish", F.mish),
    unary("hardswish", F.hardswish),
    unary("hardsigmoid", F.hardsigmoid),
    unary("log_sigmoid", F.logsigmoid),
    unary("selu", F.selu),
    unary("gelu", F.gelu),
    unary("gelu", lambda x: F.gelu(x, approximate="tanh"), approximate="tanh"),
    unary("leaky_relu", F.leaky_relu),
    unary("leaky_relu", lambda x: F.leaky_relu(x, 0.3), negative_slope=0.3),
    unary("elu", lambda x: F.elu(x, 0.7), alpha=0.7),
    unary("celu", lambda x: F.celu(x, 0.7), alpha=0.7),
    unary("softplus", lambda x: F.softplus(x, 2.0, 1.0), beta=2, threshold=1),
    unary("hardtanh", F.hardtanh),
    unary("hardtanh", lambda x: F.hardtanh(x, -0.5, 0.2), min_val=-0.5, max_val=0.2),
    unary("layer_norm", lambda x: F.layer_norm(x, (SIZE,)), shape=[SIZE]),
    Case("layer_norm", lambda x, w: F.layer_norm(x, (SIZE,), w), {"shape": [SIZE]}, ((SIZE,),)),
    Case("layer_norm", lambda x, w, b: F.layer_norm(x, (SIZE,), w, b), {"shape": [SIZE]}, ((SIZE,), (SIZE,))),
    grid("layer_norm", lambda x: F.layer_norm(x, (3, 4), eps=0.1), shape=[3, 4], eps=0.1),
    unary("rms_norm", lambda x: F.rms_norm(x, (SIZE,), eps=1e-6), shape=[SIZE]),
    Case("rms_norm", lambda x, w: F.rms_norm(x, (SIZE,), w, 0.1), {"shape": [SIZE], "eps": 0.1}, ((SIZE,),)),
    grid("softmax", lambda x: x.softmax(-2), dim=-2),
    grid("log_softmax", lambda x: x.log_softmax(-1), dim=-1),
    *(
        grid(op, lambda x, f=reference, d=dims, k=keepdim: f(x, d, keepdim=k), dims=list(dims), keepdim=keepdim)
        for op, reference in (
            ("sum", torch.sum),
            ("mean", torch.mean),
            ("amax", torch.amax),
            ("amin", torch.amin),
            ("logsumexp", torch.logsumexp),
            ("var", torch.var),
        )
        for dims, keepdim in (((-1,), True), ((-2,), False), ((-2, -1), False))
    ),
    grid("var", lambda x: x.var(-1, correction=0), dims=[-1], correction=0),
    grid("vector_norm", lambda x: torch.linalg.vector_norm(x, dim=-1), dims=[-1]),
    grid("vector_norm", lambda x: torch.linalg.vector_norm(x, 1, -2, keepdim=True), dims=[-2], ord=1, keepdim=True),
    grid("cumsum", lambda x: x.cumsum(-2), dim=-2),
    unary("unflatten", lambda x: x.reshape(*x.shape[:-1], 2, 3, 2), dim=-1, sizes=[2, 3, 2]),
    grid("flatten", lambda x: x.reshape(*x.shape[:-2], SIZE), start=-2, end=-1),
    Case("permute", lambda x: x.movedim((-3, -2, -1), (-1, -3, -2)), {"order": [-2, -1, -3]}, view=(2, 3, 2)),
    grid("transpose", lambda x: x.transpose(-1, -2), dim0=-1, dim1=-2),
    grid("unsqueeze", lambda x: x.unsqueeze(-3), dim=-3),
    Case("squeeze", lambda x: x.squeeze(-2), {"dim": -2}, view=(1, SIZE)),
    Case("repeat_interleave", lambda x: x.expand(*x.shape[:-2], 5, SIZE), {"repeats": 5, "dim": -2}, view=(1, SIZE)),
    grid("slice", lambda x: x[..., 1:3], dim=-1, start=1, length=2),
    grid("select", lambda x: x[..., 1, :], dim=-2, index=1),
    grid("flip", lambda x: x.flip(-1, -2), dims=[-1, -2]),
    Case("concat", lambda x, y: torch.cat([x, y], -1), {"dim": -1}, twice=True),
]


def build(case: Case) -> tuple[KernelGraph, dict[str, Tensor]]:
    """A kernel of `case`'s call, whose input is reshaped before and whose result is flattened behind."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"w{index}": torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
        for index, shape in enumerate(case.weights)
    }
    nodes, source = [], "x"
    if case.view != (SIZE,):
        nodes.append(Node("view", "unflatten", ("x",), {"dim": -1, "sizes": list(case.view)}))
        source = "view"
    inputs = (source, source) if case.twice else (source, *tensors)
    nodes.append(Node("out", case.op, inputs, case.attributes))
    sample = torch.rand(case.view, dtype=torch.float64) + 0.5
    arguments = (sample, sample) if case.twice else (sample, *tensors.values())
    shape = tuple(case.reference(*arguments).shape)
    output = "out"
    if not shape:
        nodes.append(Node("last", "unsqueeze", (output,), {"dim": -1}))
        output = "last"
    elif len(shape) > 1:
        nodes.append(Node("last", "flatten", (output,), {"start": -len(shape), "end": -1}))
        output = "last"
    specs = tuple(TensorSpec(name, tuple(tensor.shape), "float64") for name, tensor in tensors.items())
    features = torch.Size(shape).numel()
    return KernelGraph(SIZE, features, "float64", specs, tuple(nodes), output), tensors


def expected(case: Case, x: Tensor, tensors: dict[str, Tensor], features: int) -> Tensor:
    """What torch makes of it."""
    value = x.reshape(*x.shape[:-1], *case.view)
    result = case.reference(*((value, value) if case.twice else (value, *tensors.values())))
    return result.reshape(*x.shape[:-1], features)


def sample(case: Case, lead: tuple[int, ...]) -> Tensor:
    x = torch.randn(*lead, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x.abs() + 0.1 if case.positive else x


@pytest.mark.filterwarnings("ignore:var.. degrees of freedom")  # an empty batch has none, in torch too
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_matches_torch_through_fx_and_module(case: Case) -> None:
    graph, tensors = build(case)
    check_shapes(graph, LEADING, Limits())
    as_fx = graph.to_fx()
    as_fx.lint()
    assert [node.target for node in as_fx.nodes if node.op == "placeholder"] == ["x", *graph.parameter_names]
    function = fx.GraphModule(torch.nn.Module(), as_fx)
    module = graph.to_module(tensors)
    for lead in LEADS:
        x = sample(case, lead)
        want = expected(case, x, tensors, graph.out_features)
        torch.testing.assert_close(function(x, *tensors.values()), want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(module(x), want, rtol=1e-12, atol=1e-12)


def test_every_operator_has_a_case() -> None:
    assert {case.op for case in CASES} == set(OPERATORS)


ALL_CHECKS = """
import sys
from esper.artifacts import Limits
from esper.artifacts.shapes import LEADING, check_shapes, import_meta_kernels
from tests.artifacts.test_operators import CASES, build

graphs = [build(case)[0] for case in CASES]
modules = [set(sys.modules)]
import_meta_kernels()
modules.append(set(sys.modules))
for graph in graphs:
    check_shapes(graph, LEADING, Limits())
modules.append(set(sys.modules))
print("torch._dynamo" in modules[1] - modules[0], sorted(modules[2] - modules[1]))
"""


@pytest.mark.slow
def test_checks_import_nothing_once_meta_kernels_were_imported() -> None:
    assert Program(ALL_CHECKS).finish() == ["True []"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_dynamo_takes_every_operator_whole(case: Case) -> None:
    graph, tensors = build(case)
    module = graph.to_module(tensors)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    x = sample(case, (2, 3))
    torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("op", "attributes", "message"),
    [
        ("softmax", {"dim": 0}, "dim must be an integer from -8 to -1, not 0"),
        ("softmax", {}, "dim is missing"),
        ("softmax", {"dim": True}, "not True"),
        ("softmax", {"dim": -1.0}, r"not -1\.0"),
        ("softmax", {"dim": -1, "dmi": 2}, "unknown key 'dmi'; did you mean 'dim'"),
        ("gelu", {"approximate": "tahn"}, "did you mean 'tanh'"),
        ("mul_scalar", {"value": float("inf")}, "a finite number, not inf"),
        ("mul_scalar", {"value": 10**400}, "a finite number"),
        ("mul_scalar", {"value": "2"}, "a finite number, not '2'"),
        ("sum", {"dims": [-1, -1]}, "none twice"),
        ("sum", {"dims": []}, "at least one dimension"),
        ("permute", {"order": [-1, -3]}, "an order of the last 2 dimensions"),
        ("unflatten", {"dim": -1, "sizes": [0]}, r"sizes\[0\] must be an integer from 1"),
        ("unflatten", {"dim": -1, "sizes": [2] * 9}, "at most 8 items"),
        ("relu", [], "must be an object, not an array"),
    ],
)
def test_refuses_bad_attributes(op: str, attributes: Any, message: str) -> None:
    with pytest.raises(ArtifactGraphError, match=message):
        Node("n", op, ("x",), attributes)


def test_unknown_opcode_names_near_misses() -> None:
    with pytest.raises(ArtifactGraphError, match=r"no 'sofmax'; did you mean 'softmax'"):
        Node("n", "sofmax", ("x",), {"dim": -1})


@pytest.mark.parametrize("name", ["__import__", "os.system", "torch.load", "eval"])
def test_opcodes_lead_nowhere_else(name: str) -> None:
    with pytest.raises(ArtifactGraphError, match="the operator table has no"):
        Node("n", name, ("x",), {})


def test_counts_inputs() -> None:
    with pytest.raises(ArtifactGraphError, match="linear takes 2 to 3 inputs, not 1"):
        Node("n", "linear", ("x",), {})
    with pytest.raises(ArtifactGraphError, match="relu takes 1 inputs, not 2"):
        Node("n", "relu", ("x", "x"), {})
