"""The marker operators as they stand, and the questions about graphs that hold them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from esper_passes import (
    ENTER,
    SITE,
    is_enter,
    is_site,
    runtimes_in,
    site_call,
    site_calls_in,
    site_id,
    sites_in,
)
from tests.passes.graphs import MLP, MarkedLinear, Shown, capture


def _tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = torch.randn(3, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype), torch.randn(5, dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_site_as_it_stands_is_the_linear_call(dtype: torch.dtype, with_bias: bool) -> None:
    x, weight, bias = _tensors(dtype)
    given = (x, weight, bias if with_bias else None)
    site, plain = SITE(*given, 3), linear(*given)
    assert torch.equal(site, plain)
    leaves = [tensor for tensor in given if tensor is not None]
    for left, right in zip(
        torch.autograd.grad(site.square().sum(), leaves), torch.autograd.grad(plain.square().sum(), leaves), strict=True
    ):
        assert torch.equal(left, right)


def test_a_site_passes_a_gradient_check_of_first_and_second_order() -> None:
    tensors = _tensors(torch.float64)
    assert torch.autograd.gradcheck(lambda *given: SITE(*given, 3), tensors)
    assert torch.autograd.gradgradcheck(lambda *given: SITE(*given, 3), tensors)


def test_a_site_is_autocast_like_the_linear_call() -> None:
    x, weight, bias = _tensors()
    with torch.autocast("cpu", torch.bfloat16):
        site, plain = SITE(x, weight, bias, 3), linear(x, weight, bias)
    assert site.dtype == torch.bfloat16
    assert torch.equal(site, plain)


def test_a_site_under_vmap_is_batched_without_a_loop() -> None:
    x, weight, bias = _tensors()
    weights = torch.stack([weight, 2 * weight])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # vmap warns where it falls back to a loop
        over_x = torch.vmap(lambda row: (ENTER(1), SITE(row, weight, bias, 3))[1])(x)
        over_weight = torch.vmap(lambda one: SITE(x, one, None, 3))(weights)
        per_sample = torch.vmap(torch.func.grad(lambda w, row: SITE(row, w, bias, 3).sum()), (None, 0))(weight, x)
    torch.testing.assert_close(over_x, linear(x, weight, bias))
    torch.testing.assert_close(over_weight, torch.stack([linear(x, one) for one in weights]))
    torch.testing.assert_close(per_sample, x.detach().unsqueeze(1).expand(3, 5, 4))


def test_markers_run_on_meta_and_on_fake_tensors() -> None:
    site = SITE(torch.empty(2, 3, 4, device="meta"), torch.empty(5, 4, device="meta"), None, 3)
    assert (site.shape, site.device.type) == ((2, 3, 5), "meta")
    with FakeTensorMode():
        ENTER(7)
        site = SITE(torch.empty(2, 4), torch.empty(5, 4), torch.empty(5), 3)
    assert (site.shape, site.device.type) == ((2, 5), "cpu")


def test_entering_does_nothing_in_any_mode() -> None:
    assert ENTER(7) is None
    with torch.inference_mode(), torch.autocast("cpu"):
        assert ENTER(7) is None


def test_dynamo_traces_both_markers_and_keeps_them(shown: Shown) -> None:
    module = capture(MLP(), torch.randn(2, 4))
    module.graph.eliminate_dead_code()
    shown(module)
    assert [node.name for node in module.graph.nodes if is_enter(node)] == ["enter"]
    assert [site_id(node) for node in module.graph.nodes if is_site(node)] == [3, 5]


def test_a_marked_model_trains_under_aot_autograd_with_its_markers_in_place() -> None:
    model, x = MLP(), torch.randn(2, 4)
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum().backward()
    compiled = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for left, right in zip(compiled, model.parameters(), strict=True):
        torch.testing.assert_close(left, right.grad)


def test_sites_are_listed_in_order_of_first_use() -> None:
    first, second = MarkedLinear(4, 4, 9), MarkedLinear(4, 4, 2)

    def forward(x: Tensor) -> Tensor:
        ENTER(8)
        ENTER(6)
        return first(second(first(x)))

    graph = capture(forward, torch.randn(1, 4)).graph
    assert sites_in(graph) == (9, 2)
    assert site_calls_in(graph) == (9, 2, 9)
    assert runtimes_in(graph) == (8, 6)


def test_sites_in_the_body_of_a_checkpoint_are_found() -> None:
    first, second = MarkedLinear(4, 4, 9), MarkedLinear(4, 4, 2)

    def inner(x: Tensor) -> Tensor:
        ENTER(8)
        return second(x).relu()

    def forward(x: Tensor) -> Tensor:
        return first(checkpoint(inner, x, use_reentrant=False))

    graph = capture(forward, torch.randn(1, 4)).graph
    assert sites_in(graph) == (2, 9)
    assert runtimes_in(graph) == (8,)


def test_a_graph_whose_bodies_cannot_be_found_is_refused_rather_than_misread() -> None:
    layer = MarkedLinear(4, 4, 2)
    module = capture(lambda x: checkpoint(layer, x, use_reentrant=False), torch.randn(1, 4))
    alone = fx.Graph()
    alone.output(alone.graph_copy(module.graph, {}))
    with pytest.raises(ValueError, match="not owned by exactly one graph module"):
        sites_in(alone)


def test_a_plain_graph_has_neither_sites_nor_runtimes() -> None:
    graph = capture(MLP(marked=False), torch.randn(1, 4)).graph
    assert (sites_in(graph), site_calls_in(graph), runtimes_in(graph)) == ((), (), ())


def test_the_arguments_of_a_site_may_be_given_by_name() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    node = graph.call_function(torch.ops.esper.site, (x,), {"site": 4, "bias": None, "weight": weight})
    graph.output(node)
    assert site_call(node) == (x, weight, None, 4)
    assert sites_in(graph) == (4,)


def test_a_site_whose_id_is_no_constant_is_refused() -> None:
    graph = fx.Graph()
    x, weight, identity = (graph.placeholder(name) for name in ("x", "weight", "identity"))
    node = graph.call_function(SITE, (x, weight, None, identity))
    with pytest.raises(ValueError, match="not a constant"):
        site_id(node)
    with pytest.raises(ValueError, match="no esper::site call"):
        site_id(x)
