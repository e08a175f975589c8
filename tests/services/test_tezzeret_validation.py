"""What validation lets pass and what not. In this process; nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from esper.artifacts import Blueprint, KernelGraph, Node, TensorSpec, build_artifact
from esper.contracts.validation import ValidationCheck
from esper.services.tezzeret.latency import measure_latencies
from esper.services.tezzeret.validation import check_agreement, check_eager

LEADING = ((), (1,), (2, 3))


def unary(*ops: str) -> KernelGraph:
    names = ["x", *(f"n{index}" for index in range(len(ops)))]
    nodes = tuple(Node(names[i + 1], op, (names[i],), {}) for i, op in enumerate(ops))
    return KernelGraph(4, 4, "float32", (), nodes, names[-1])


def failures(checks: list[ValidationCheck]) -> dict[str, str]:
    return {check.name: check.detail for check in checks if not check.passed}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("start", ["zero", "identity", "kaiming", "orthogonal"])
def test_sound_kernels_pass_in_every_dtype(dtype: str, start: str) -> None:
    blueprint = Blueprint.from_json(
        {"family": "gated_mlp", "in_features": 6, "out_features": 6, "hidden": 10, "dtype": dtype, "start": start}
    )
    artifact = build_artifact(blueprint)
    assert failures(check_eager(artifact.graph, artifact.tensors, LEADING)) == {}


def test_an_output_that_overflows_on_large_inputs_fails() -> None:
    assert "10000" in failures(check_eager(unary("exp"), {}, LEADING))["large inputs"]


def test_an_output_that_is_not_finite_fails() -> None:
    found = failures(check_eager(unary("neg", "abs", "neg", "sqrt"), {}, LEADING))
    assert "not finite" in found["finite outputs"]


def test_a_gradient_that_is_not_finite_fails() -> None:
    nodes = (Node("a", "mul_scalar", ("x",), {"value": 0.0}), Node("y", "sqrt", ("a",), {}))  # zero times infinity
    found = failures(check_eager(KernelGraph(4, 4, "float32", (), nodes, "y"), {}, LEADING))
    assert list(found) == ["gradients"]
    assert "the gradient of x is not finite" in found["gradients"]


def test_a_kernel_that_ignores_its_input_fails() -> None:
    nodes = (Node("a", "mul_scalar", ("x",), {"value": 0.0}), Node("y", "mul", ("a", "a"), {}))
    assert failures(check_eager(KernelGraph(4, 4, "float32", (), nodes, "y"), {}, LEADING)) == {}  # a gradient of zero
    bias = TensorSpec("b", (4,), "float32")
    constant = KernelGraph(4, 4, "float32", (bias,), (Node("y", "neg", ("b",), {}),), "y")
    found = failures(check_eager(constant, {"b": torch.ones(4)}, ((),)))
    assert "does not depend on any input" in found["gradients"]


def test_a_wrong_shape_fails() -> None:
    graph = KernelGraph(4, 4, "float32", (), (Node("y", "sum", ("x",), {"dims": [-1], "keepdim": True}),), "y")
    assert "wanted torch.float32 (4,)" in failures(check_eager(graph, {}, LEADING))["shapes"]


def test_a_kernel_that_differs_from_run_to_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = unary("neg")
    original = KernelGraph.to_fx

    def noisy(kernel: KernelGraph) -> fx.Graph:
        made = original(kernel)
        (call,) = [node for node in made.nodes if node.op == "call_function"]
        call.target = lambda x: x + torch.rand_like(x)
        return made

    monkeypatch.setattr(KernelGraph, "to_fx", noisy)  # the operator table has nothing random in it
    assert "two runs" in failures(check_eager(graph, {}, LEADING))["repeatable"]


class TestAgreement:
    @pytest.fixture
    def kernel(self) -> tuple[KernelGraph, dict[str, Tensor]]:
        artifact = build_artifact(Blueprint.bottleneck(16, 16, 4, start="identity"))
        return artifact.graph, dict(artifact.tensors)

    def compare(self, kernel: tuple[KernelGraph, dict[str, Tensor]], change: Callable[..., Tensor]) -> ValidationCheck:
        graph, tensors = kernel
        module = fx.GraphModule(nn.Module(), graph.to_fx())
        return check_agreement(graph, tensors, lambda *arguments: change(module, *arguments), (2, 7))

    def test_the_same_code_agrees(self, kernel: tuple[KernelGraph, dict[str, Tensor]]) -> None:
        check = self.compare(kernel, lambda module, *arguments: module(*arguments))
        assert check.passed
        assert "largest difference 0" in check.detail

    def test_rounding_that_is_as_good_as_eager_agrees(self, kernel: tuple[KernelGraph, dict[str, Tensor]]) -> None:
        def in_double(module: nn.Module, *arguments: Tensor) -> Tensor:
            result: Tensor = module(*(each.double() for each in arguments)).float()
            return result

        assert self.compare(kernel, in_double).passed

    def test_a_small_error_in_the_output_is_found(self, kernel: tuple[KernelGraph, dict[str, Tensor]]) -> None:
        check = self.compare(kernel, lambda module, *arguments: module(*arguments) * 1.001)
        assert not check.passed
        assert "output at 2 rows" in check.detail

    def test_an_error_in_one_gradient_is_found(self, kernel: tuple[KernelGraph, dict[str, Tensor]]) -> None:
        def without_last(module: nn.Module, *arguments: Tensor) -> Tensor:
            result: Tensor = module(*arguments[:-1], arguments[-1].detach() * 0.5 + arguments[-1] * 0.5)
            return result

        check = self.compare(kernel, without_last)
        assert not check.passed
        assert "gradient of" in check.detail

    def test_a_missing_gradient_is_found(self, kernel: tuple[KernelGraph, dict[str, Tensor]]) -> None:
        check = self.compare(kernel, lambda module, *arguments: module(arguments[0].detach(), *arguments[1:]))
        assert not check.passed
        assert check.detail == "the attachment has no gradient of x"

    def test_low_precision_is_judged_by_its_distance_from_the_truth(self) -> None:
        artifact = build_artifact(Blueprint.gated_mlp(32, 32, 64, dtype="bfloat16", start="kaiming"))
        graph, tensors = artifact.graph, artifact.tensors
        module = fx.GraphModule(nn.Module(), graph.to_fx())

        def in_float(*arguments: Tensor) -> Tensor:  # what a compiler does that keeps intermediate results in float32
            result: Tensor = module(*(each.float() for each in arguments)).bfloat16()
            return result

        assert check_agreement(graph, tensors, in_float, (37,)).passed
        assert not check_agreement(graph, tensors, lambda *a: module(*a) * 1.1, (37,)).passed


def test_latencies_are_measured_for_each_number_of_rows() -> None:
    artifact = build_artifact(Blueprint.affine(8, 8))
    module = fx.GraphModule(nn.Module(), artifact.graph.to_fx())
    found = measure_latencies(artifact.graph, artifact.tensors, module, (1, 32), 0.001)
    assert [each.rows for each in found] == [1, 32]
    assert all(0 < each.graph_us < 1e6 for each in found)
    assert found[0].attachment_us is None, "compiled code takes two rows or more"
    assert found[1].attachment_us is not None
