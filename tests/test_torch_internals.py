"""One test for each private torch API: when torch changes, the test's name says which assumption broke."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from esper import torch_internals


def test_the_backend_being_traced_is_found_through_dynamos_wrappers(fresh_dynamo: None) -> None:
    seen = []

    @torch_internals.constant_while_tracing
    def ask() -> bool:
        seen.append(torch_internals.backend_being_traced(lambda backend: backend is ours))
        return seen[-1]

    def ours(module: fx.GraphModule, inputs: Any) -> Any:
        return module.forward

    def theirs(module: fx.GraphModule, inputs: Any) -> Any:
        return module.forward

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if ask() else x - 1

    x = torch.zeros(2)
    assert torch.compile(function, backend=ours)(x).tolist() == [1, 1]
    torch._dynamo.reset()
    assert torch.compile(function, backend=theirs)(x).tolist() == [-1, -1]
    assert seen == [True, False]


def test_what_is_called_at_the_end_of_a_backward_finds_all_gradients() -> None:
    layers, seen = [nn.Linear(2, 2), nn.Linear(2, 2)], []

    def look() -> None:
        seen.append([each.weight.grad is not None for each in layers])

    layers[1].weight.register_post_accumulate_grad_hook(lambda _: torch_internals.at_the_end_of_the_backward(look))
    layers[1](layers[0](torch.ones(1, 2))).sum().backward()
    assert seen == [[True, True]]


def test_outside_of_tracing_no_backend_is_recognised() -> None:
    assert not torch_internals.backend_being_traced(lambda backend: True)


def test_what_traced_code_has_changed_is_known_while_it_is_traced(fresh_dynamo: None) -> None:
    layer, seen = nn.Linear(2, 2, bias=False), []

    @torch_internals.constant_while_tracing
    def look() -> None:
        seen.append(torch_internals.changed_in_trace([layer._parameters]))

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> Any:
            look()
            return self.layer(x)

    model, x = Looking(), torch.ones(2)

    def with_zeros(x: torch.Tensor) -> Any:
        return torch.func.functional_call(model, {"layer.weight": torch.zeros(2, 2)}, (x,))

    torch.compile(model, backend="eager")(x)
    assert seen == [False]
    assert torch.compile(with_zeros, backend="eager", fullgraph=True)(x).tolist() == [0, 0]
    assert seen == [False, True]


def test_a_backward_is_noticed_on_the_thread_that_runs_it() -> None:
    seen: list[bool] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            seen.append(torch_internals.inside_backward())
            return gradient

    Look.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert seen == [True]
    assert not torch_internals.inside_backward()


def test_the_operator_whose_body_is_traced_is_known(fresh_dynamo: None) -> None:
    seen: list[list[str]] = []

    @torch_internals.constant_while_tracing
    def look() -> None:
        seen.append(torch_internals.operators_being_traced())

    def inner(x: torch.Tensor) -> torch.Tensor:
        look()
        return x.sin()

    def choosing(x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, inner, torch.cos, (x,))

    x = torch.ones(2)
    for function in (inner, lambda x: checkpoint(inner, x, use_reentrant=False), torch.vmap(inner), choosing):
        torch._dynamo.reset()
        torch.compile(function, backend="eager", fullgraph=True)(x)
    assert seen == [[], ["tag_activation_checkpoint"], [], ["cond"]]


def test_a_copied_capture_has_all_that_dynamo_noted_on_it(fresh_dynamo: None) -> None:
    kept: list[bool] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
        copied = torch_internals.copy_of_capture(module)
        kept.append(vars(copied).keys() >= vars(module).keys() and copied.graph is not module.graph)
        pairs = list(zip(module.graph.nodes, copied.graph.nodes, strict=True))
        kept.append(all(old.name == new.name and old.meta == new.meta for old, new in pairs))
        kept.append(all(getattr(old, "_dynamo_source", 0) == getattr(new, "_dynamo_source", 0) for old, new in pairs))
        return copied.forward

    torch.compile(nn.Linear(4, 3), backend=backend)(torch.randn(5, 4))
    assert kept == [True, True, True]


def _captured(dynamic: bool) -> tuple[fx.GraphModule, list[Any]]:
    caught: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
        copied = torch_internals.copy_for_recompile(module)
        caught.append((copied, torch_internals.fake_inputs(copied.graph)))
        return module.forward

    layer = nn.Linear(4, 3)
    torch.compile(layer, backend=backend, dynamic=dynamic)(torch.randn(5, 4))
    return caught[0]


def _arguments(
    module: fx.GraphModule, rows: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> list[Any]:
    """The inputs of a captured graph, in its order."""
    order = {"weight": weight, "bias": bias}
    return [
        next((value for key, value in order.items() if key in node.name), rows if node.name[0] == "s" else x)
        for node in module.graph.nodes
        if node.op == "placeholder"
    ]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.slow
def test_a_copied_graph_compiles_again_outside_of_dynamo(dynamic: bool, fresh_dynamo: None) -> None:
    module, inputs = _captured(dynamic)
    assert not any("grapharg" in node.meta for node in module.graph.nodes)
    guards = torch_internals.guard_count(inputs)
    with torch_internals.recompile_context(inputs, module):
        compiled = torch_internals.compile_with_inductor(module, inputs, None)
    assumption = torch_internals.assumption_since(inputs, guards)
    weight, bias = torch.randn(3, 4, requires_grad=True), torch.randn(3, requires_grad=True)
    for rows in (5, 7) if dynamic else (5,):
        x = torch.randn(rows, 4)
        arguments = _arguments(module, rows, x, weight, bias)
        assert assumption is None or assumption.check()(arguments)
        (output,) = compiled(*arguments)
        torch.testing.assert_close(output, x @ weight.T + bias)
        output.sum().backward()


def test_an_assumption_about_a_symbolic_size_is_checked_on_the_real_one(fresh_dynamo: None) -> None:
    _, inputs = _captured(dynamic=True)
    (size,) = (value for value in inputs if isinstance(value, torch.SymInt))
    guards = torch_internals.guard_count(inputs)
    assert torch_internals.assumption_since(inputs, guards) is None
    assert size < 100  # the shape environment notes what it was asked
    assert size // 2 > 1
    assumption = torch_internals.assumption_since(inputs, guards)
    assert assumption is not None
    holds = pickle.loads(pickle.dumps(assumption)).check()
    position = next(index for index, value in enumerate(inputs) if value is size)
    for rows in (7, 99, 100, 3):
        arguments = [rows if index == position else None for index in range(len(inputs))]
        assert holds(arguments) == (4 <= rows < 100)


def test_an_assumption_about_a_size_that_is_no_input_is_read_from_a_tensor(fresh_dynamo: None) -> None:
    _, inputs = _captured(dynamic=True)
    guards = torch_internals.guard_count(inputs)
    assert next(value for value in inputs if isinstance(value, torch.SymInt)) < 100
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    assumption = torch_internals.assumption_since(tensors, guards)
    assert assumption is not None
    for rows in (7, 100):
        assert assumption.check()([torch.empty(rows, 4) for _ in tensors]) == (rows < 100)
    nothing_known = torch_internals.assumption_since([tensors[0].new_empty(3)], guards)
    assert nothing_known is not None
    assert not nothing_known.check()([torch.empty(3)])


def _unpacked(module: fx.GraphModule) -> fx.GraphModule:
    return torch_internals.unpack_graph(torch_internals.pack_graph(module))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_travels_with_sizes_dtypes_and_gradients(dynamic: bool, fresh_dynamo: None) -> None:
    module, inputs = _captured(dynamic)
    unpacked = _unpacked(module)
    assert str(unpacked.graph) == str(module.graph)
    for ours, theirs in zip(torch_internals.fake_inputs(unpacked.graph), inputs, strict=True):
        assert str(ours) == str(theirs) if isinstance(theirs, torch.SymInt) else ours.dtype == theirs.dtype
        if isinstance(theirs, torch.Tensor):
            assert str(ours.shape) == str(theirs.shape)
            assert ours.requires_grad == theirs.requires_grad
    same = torch_internals.describe_graph(unpacked, lambda node: node)
    assert same == torch_internals.describe_graph(module, lambda node: node)


def test_bodies_in_bodies_travel_without_their_values(fresh_dynamo: None) -> None:
    caught: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
        caught.append(torch_internals.copy_for_recompile(module))
        return module.forward

    def inner(x: torch.Tensor) -> torch.Tensor:
        return x.view(-1).sin().view(3, 4)  # fake values that are views

    def outer(x: torch.Tensor) -> torch.Tensor:
        inside: torch.Tensor = checkpoint(inner, x.t().t(), use_reentrant=False)
        return inside.cos()

    x = torch.randn(3, 4, requires_grad=True)
    torch.compile(lambda x: checkpoint(outer, x, use_reentrant=False), backend=backend)(x)
    before = [dict(node.meta) for each in _graphs(caught[0]) for node in each.nodes]
    unpacked = _unpacked(caught[0])
    assert [str(each) for each in _graphs(unpacked)] == [str(each) for each in _graphs(caught[0])]
    assert len(_graphs(unpacked)) == 3
    assert [dict(node.meta) for each in _graphs(caught[0]) for node in each.nodes] == before


def _graphs(module: fx.GraphModule) -> list[fx.Graph]:
    return [each.graph for each in module.modules() if isinstance(each, fx.GraphModule)]


def test_inputs_that_share_memory_are_named_and_travel(fresh_dynamo: None) -> None:
    caught: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
        caught.append(torch_internals.copy_for_recompile(module))
        return module.forward

    whole = torch.randn(4, 6)
    torch.compile(lambda a, b, c: a + b + c, backend=backend)(whole[:, :3], whole[:, 3:], torch.randn(4, 3))
    inputs = torch_internals.fake_inputs(caught[0].graph)
    assert torch_internals.shared_inputs(inputs) == {0, 1}
    unpacked = torch_internals.fake_inputs(_unpacked(caught[0]).graph)
    assert torch_internals.shared_inputs(unpacked) == frozenset()
    assert [each.stride() for each in unpacked] == [(6, 1), (6, 1), (3, 1)]


def test_graphs_that_hold_tensors_or_closures_are_not_sent() -> None:
    with pytest.raises(torch_internals.NotSendableError, match=r"tensors of its own: 0\.weight"):
        torch_internals.pack_graph(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))))
    graph = fx.Graph()
    graph.output(graph.call_function(lambda x: x, (graph.placeholder("x"),)))
    with pytest.raises(torch_internals.NotSendableError, match="lambda"):
        torch_internals.pack_graph(fx.GraphModule(nn.Module(), graph))


def test_parameters_are_static_inputs(fresh_dynamo: None) -> None:
    module, inputs = _captured(dynamic=False)
    static = torch_internals.static_inputs(module.graph)
    assert [inputs[position].requires_grad for position in range(3)] == [position in static for position in range(3)]


def test_settings_of_this_thread_are_captured_and_restored() -> None:
    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch._inductor.config.patch(epilogue_fusion=False),
    ):
        ambient = pickle.loads(pickle.dumps(torch_internals.ambient_state(["cpu"], {"max_autotune": True})))
    assert not torch.is_autocast_enabled("cpu")
    with ambient.restored():
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16
        assert not torch._inductor.config.epilogue_fusion
        assert torch._inductor.config.max_autotune
        assert torch._inductor.config.cpp.threads == torch.get_num_threads()
    assert torch._inductor.config.epilogue_fusion
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(torch_internals.NotSendableError, match="post_grad_custom_post_pass"):
        torch_internals.ambient_state(["cpu"], {"post_grad_custom_post_pass": lambda graph: None})


def test_settings_that_dynamo_does_not_guard_on_are_renewed_and_restored() -> None:
    captured = torch_internals.ambient_state(["cpu"], {"max_autotune": True})
    precision, benchmark = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cudnn.benchmark
    flags = {
        "mkldnn.matmul": "bf16" if precision != "bf16" else "ieee",
        "cudnn.benchmark": not benchmark,
        "math_sdp": False,
        "opt_einsum.enabled": torch.backends.opt_einsum.enabled,
    }
    changed = dict(captured.flags) | flags
    for name, value in changed.items():
        torch_internals._set_flag(name, value)
    try:
        with (
            torch._inductor.config.patch(epilogue_fusion=False),
            torch._functorch.config.patch(activation_memory_budget=0.5, donated_buffer=False),
            torch.compiler.config.patch(cache_key_tag="mine"),
            torch.fx.experimental._config.patch(use_duck_shape=False),
        ):
            renewed = pickle.loads(pickle.dumps(captured.renewed({"max_autotune": True})))
    finally:
        for name, value in captured.flags:
            torch_internals._set_flag(name, value)
    assert torch_internals.ambient_state(["cpu"], {"max_autotune": True}) == captured != renewed
    assert dict(renewed.flags) == changed
    assert renewed.functorch == {**captured.functorch, "activation_memory_budget": 0.5}  # variants donate nothing
    try:
        with renewed.restored():
            assert torch.backends.mkldnn.matmul.fp32_precision == flags["mkldnn.matmul"]
            assert torch.backends.cudnn.benchmark is not benchmark
            assert not torch.backends.cuda.math_sdp_enabled()
            assert torch._functorch.config.activation_memory_budget == 0.5
            assert torch.compiler.config.cache_key_tag == "mine"
            assert not torch.fx.experimental._config.use_duck_shape
            assert not torch._inductor.config.epilogue_fusion
    finally:
        for name, value in captured.flags:
            torch_internals._set_flag(name, value)


@pytest.fixture
def thawed() -> Iterator[None]:
    """Nothing is frozen, as in a program that does not ask for it."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_an_import_without_collections_leaves_nothing_young_to_look_through(thawed: None) -> None:
    collections = [each["collections"] for each in gc.get_stats()]
    with torch_internals.without_collections():
        made = [[] for _ in range(200_000)]  # type: list[list[int]]
        assert [each["collections"] for each in gc.get_stats()] == collections
        assert not gc.isenabled()
    assert gc.isenabled()
    assert len(gc.get_objects(generation=0)) < 100_000
    assert len(gc.get_objects(generation=1)) < 100_000
    assert gc.get_freeze_count() == 0
    del made


def test_the_cache_directory_is_inductors_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "there"))
    assert torch_internals.compiler_cache_dir() == str(tmp_path / "there")
    with torch._inductor.config.patch(force_disable_caches=True):
        assert torch_internals.compiler_cache_dir() is None


def test_where_nothing_is_cached_nothing_is_missed() -> None:
    assert isinstance(torch_internals.cache_misses(), int)
    with torch.compiler.config.patch(force_disable_caches=True):
        assert torch_internals.cache_misses() is None


def test_what_machine_code_depends_on_is_known() -> None:
    factors = torch_internals.system_factors()
    assert factors["torch"] == torch.__version__
    assert all(factors.values())


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_graph_compiles_elsewhere_and_loads_here(dynamic: bool, grad: bool, fresh_dynamo: None) -> None:
    module, _ = _captured(dynamic)
    unpacked, pauses = _unpacked(module), []
    with torch.set_grad_enabled(grad):
        data = torch_internals.compile_graph(unpacked, frozenset(), torch_internals.static_inputs(module.graph))
    compiled, assumption = torch_internals.load_graph(data, {}, lambda: pauses.append(None))
    assert pauses
    weight, bias = torch.randn(3, 4, requires_grad=grad), torch.randn(3, requires_grad=grad)
    for rows in (5, 7) if dynamic else (5,):
        arguments = _arguments(module, rows, torch.randn(rows, 4), weight, bias)
        x = next(each for each in arguments if isinstance(each, torch.Tensor) and each.shape == (rows, 4))
        assert assumption is None or assumption.check()(arguments)
        (output,) = compiled(list(arguments))
        torch.testing.assert_close(output, x @ weight.T + bias)
        if grad:
            got = torch.autograd.grad(output.square().sum(), [weight, bias])
            expected = torch.autograd.grad((x @ weight.T + bias).square().sum(), [weight, bias])
            torch.testing.assert_close(got, expected)
    python, _, *rest = pickle.loads(data)
    with pytest.raises(torch_internals.StaleVariantError, match=r"was made by torch 0\.1"):
        torch_internals.load_graph(pickle.dumps((python, "0.1", *rest)), {}, lambda: None)


@pytest.mark.slow
def test_a_library_that_is_cut_short_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    caught: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
        caught.append(torch_internals.copy_for_recompile(module))
        return module.forward

    torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.randn(5))
    data = torch_internals.compile_graph(_unpacked(caught[0]), frozenset(), frozenset())
    torch_internals.load_graph(data, {}, lambda: None)
    for library in tmp_path.rglob("*.main.so"):
        whole = library.read_bytes()
        library.unlink()  # this process has it open
        library.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(torch_internals.StaleVariantError, match=r"main\.so is cut short"):
        torch_internals.load_graph(data, {}, lambda: None)
    torch._inductor.utils.clear_caches()
    with pytest.raises(torch._inductor.exc.InductorError, match=r"main\.so: file cut short"):
        torch_internals.compile_graph(_unpacked(caught[0]), frozenset(), frozenset())


@pytest.mark.slow
def test_a_graph_that_writes_to_shared_memory_is_refused(fresh_dynamo: None) -> None:
    caught: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
        caught.append(torch_internals.copy_for_recompile(module))
        return module.forward

    whole = torch.randn(4, 6)
    torch.compile(lambda a, b: a.add_(b), backend=backend)(whole[:, :3], whole[:, 3:])
    shared = torch_internals.shared_inputs(torch_internals.fake_inputs(caught[0].graph))
    with pytest.raises(torch_internals.NotSendableError, match="shares memory"):
        torch_internals.compile_graph(_unpacked(caught[0]), shared, frozenset())


def test_what_aotautograd_returns_is_called_without_its_wrapper(fresh_dynamo: None) -> None:
    boxed: list[Any] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
        compiled = torch._dynamo.lookup_backend("aot_eager")(module, inputs)
        boxed.append(torch_internals.boxed(compiled))
        return compiled

    x = torch.randn(3)
    torch.compile(lambda x: x * 2, backend=backend)(x)
    torch.testing.assert_close(boxed[0]([x])[0], x * 2)
    assert boxed[0].__code__.co_name != "<lambda>"  # the one that calls any other callable
    assert torch_internals.boxed(lambda a, b: a + b)([1, 2]) == 3


def test_fake_tensors_join_the_mode_of_the_graph(fresh_dynamo: None) -> None:
    _, inputs = _captured(dynamic=False)
    (fake,) = torch_internals.fake_like([torch.ones(2, 3)], among=inputs)
    assert fake.shape == (2, 3)
    assert fake.fake_mode is next(each for each in inputs if isinstance(each, torch.Tensor)).fake_mode  # type: ignore[attr-defined]  # a fake tensor


def test_modes_have_inductor_options() -> None:
    assert torch_internals.inductor_options("reduce-overhead", {}) == {"triton.cudagraphs": True}


@pytest.mark.slow
def test_compiled_code_survives_serialisation_for_any_number_of_rows() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    graph.output((graph.call_function(torch._C._nn.linear, (x, weight)),))
    examples = [torch.zeros(8, 4, requires_grad=True), torch.zeros(3, 4, requires_grad=True)]
    data = torch_internals.serialise_compiled(fx.GraphModule(nn.Module(), graph), examples, [0], {})
    compiled = torch_internals.deserialise_compiled(data)
    for rows in (2, 9):
        x_value = torch.randn(rows, 4, requires_grad=True)
        w_value = torch.randn(3, 4, requires_grad=True)
        (output,) = compiled(x_value, w_value)
        torch.testing.assert_close(output, x_value @ w_value.T)
        gradients = torch.autograd.grad(output.sum(), [x_value, w_value])
        expected = torch.autograd.grad((x_value @ w_value.T).sum(), [x_value, w_value])
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_a_compiled_module_is_recognised_and_esper_alone_does_not_import_dynamo() -> None:
    program = """
import sys, torch, esper
from torch import nn
model = nn.Linear(2, 2)
assert not esper.torch_internals.is_compiled(model)
esper.wrap(nn.Sequential(nn.Linear(2, 2)))(torch.ones(1, 2))
assert "torch._dynamo" not in sys.modules
assert esper.torch_internals.is_compiled(torch.compile(model))
assert not esper.torch_internals.is_compiled_in_place(model)
model.compile()
assert esper.torch_internals.is_compiled(model)
assert esper.torch_internals.is_compiled_in_place(model)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_one_code_may_be_compiled_more_often_than_the_setting_says() -> None:
    model = nn.Linear(2, 2)
    model.compile(backend="eager", **torch_internals.recompile_limit(100))
    with torch._dynamo.config.patch(recompile_limit=1000):
        assert torch_internals.recompile_limit(100) in ({}, {"recompile_limit": 1000})


def test_what_would_do_more_with_an_operation_is_known() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_internals.transforms_active())
        return x * 2

    x = torch.ones(2)
    look(x)
    with torch.device("cpu"):
        look(x)
    assert seen == [False, False]
    torch.func.vmap(look)(x)
    torch.func.jvp(look, (x,), (x,))
    torch.jit.trace(look, (x,), check_trace=False)
    with torch.overrides.BaseTorchFunctionMode():
        look(x)
    assert seen[2:] == [True] * 4


def test_who_else_holds_a_tensors_memory_is_known() -> None:
    tensor = torch.ones(2)
    assert not torch_internals.held_elsewhere(tensor)
    view = tensor[:1]
    assert torch_internals.held_elsewhere(tensor)
    del view
    assert not torch_internals.held_elsewhere(tensor)
    leaf = nn.Parameter(torch.ones(2))
    loss = (leaf * leaf).sum()
    assert torch_internals.held_elsewhere(leaf)
    del loss


def test_writes_are_counted() -> None:
    tensor = torch.ones(2)
    before = torch_internals.write_count(tensor)
    tensor[:1].add_(1)
    assert torch_internals.write_count(tensor) == before + 1


def test_a_backend_is_found_by_its_name() -> None:
    from torch._dynamo.backends.debugging import eager

    assert torch_internals.find_backend("eager") is eager
    with pytest.raises(Exception, match="no such backend"):
        torch_internals.find_backend("no such backend")


def test_functions_are_named_in_graphs_as_torch_nn_functional_has_them() -> None:
    assert torch_internals.nn_functions.linear is torch.nn.functional.linear
    assert torch_internals.nn_functions.gelu is torch.nn.functional.gelu
    assert isinstance(torch.ops.aten.add.Tensor, torch_internals.OpOverload)


def test_floating_point_operations_are_counted() -> None:
    layer, x = nn.Linear(4, 3), torch.ones(5, 4, requires_grad=True)
    with torch_internals.counting_flops() as flops:
        layer(x).sum().backward()
        layer.to_empty(device="meta")(torch.ones(5, 4, device="meta"))  # computes nothing
    layer.to_empty(device="cpu")
    assert flops.total == 3 * 2 * 5 * 4 * 3  # the product, and those for the gradients of weight and input
    layer(x)
    assert flops.total == 3 * 2 * 5 * 4 * 3


@pytest.mark.slow
def test_inductors_options_have_names() -> None:
    assert "max_autotune" in torch_internals.inductor_option_names()
