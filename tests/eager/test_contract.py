"""What `mode="fx"` promises: torch.fx's contract, and that no call runs a branch that it was not traced for."""

from __future__ import annotations

import copy
import io
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import esper
from tests.core.planting import agrees
from tests.core.seeds import blueprint, load
from tests.eager.hosts import Attention, Block, Deciding, fx_wrapped, model, source
from tests.kernel_shelf import KernelShelf
from tests.models import mlp


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4)


def traced(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward` is traced whole, and the code does what the host does, twice."""
    host = model(forward)
    wrapped = fx_wrapped(host)
    for _ in range(2):
        agrees(host, wrapped, *(args or (torch.randn(3, 4, requires_grad=True),)), **kwargs)
    assert source(wrapped)
    assert wrapped.explain().untraced == {}
    return wrapped


def refusal(forward: Callable[..., Any]) -> str:
    """Why `forward` is not traced; the model computes what its host does all the same."""
    host = model(forward)
    wrapped = fx_wrapped(host)
    agrees(host, wrapped, torch.randn(3, 4))
    return str(wrapped.explain().untraced[""])


# -- the trace ---------------------------------------------------------------------------------------------------------


def test_the_graph_module_is_traced_and_shares_the_models_modules(x: torch.Tensor) -> None:
    wrapped = fx_wrapped(mlp(4, 6, 4))
    graph_module = wrapped.graph_module
    assert isinstance(graph_module, fx.GraphModule)
    assert [node.target for node in graph_module.graph.find_nodes(op="call_module")] == ["0", "1", "2"]
    assert graph_module.get_submodule("0") is wrapped.kasmina_layers["0"]
    assert torch.equal(graph_module(x), wrapped(x))
    assert "call_module" not in graph_module.print_readable(print_output=False)


def test_python_values_are_constants_until_retrace(x: torch.Tensor) -> None:
    host = model(lambda self, x: self.layer(x) * self.factor)
    wrapped = fx_wrapped(host)
    before = wrapped(x)
    wrapped.factor = 2.0
    assert torch.equal(wrapped(x), before)
    wrapped.retrace()
    assert torch.allclose(wrapped(x), before * 4)
    wrapped.retrace()
    assert "2.0" in wrapped.graph_module.code


def test_train_and_eval_have_a_trace_each(x: torch.Tensor) -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        return functional.dropout(self.layer(x), 0.5, self.training) if self.training else self.inner(x)

    host = model(forward)
    wrapped = fx_wrapped(host)
    seen = []
    for mode in (True, False, True, False):
        host.train(mode)
        wrapped.train(mode)
        agrees(host, wrapped, x)
        seen.append(source(wrapped))
    assert "dropout" in seen[0]
    assert "tanh" in seen[1]
    assert "dropout" in wrapped.train().graph_module.code
    assert "inner" in wrapped.eval().graph_module.code


def test_a_part_frozen_by_hand_is_seen_where_train_is_called_again(x: torch.Tensor) -> None:
    host = nn.Sequential(nn.Linear(4, 4), model(lambda self, x: self.layer(x) if self.training else -self.layer(x)))
    wrapped = fx_wrapped(host)
    for _ in range(2):
        for module in (host, wrapped):
            module.train()
            module[1].eval()
        agrees(host, wrapped, x)
        for module in (host, wrapped):
            module.train()
        agrees(host, wrapped, x)


def test_dropout_and_batch_norm_follow_train_and_eval() -> None:
    host = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    wrapped = fx_wrapped(copy.deepcopy(host))
    for flag in (True, False, True):
        host.train(flag)
        wrapped.train(flag)
        x = torch.randn(8, 4)
        torch.manual_seed(0)
        expected = host(x)
        torch.manual_seed(0)
        assert torch.equal(wrapped(x), expected)
    assert torch.equal(wrapped[1].running_mean, host[1].running_mean)


def test_parameters_are_followed_when_replaced_moved_and_loaded(x: torch.Tensor) -> None:
    host = model(lambda self, x: self.inner(self.layer(x)) * self.weight + self.steps)
    wrapped = fx_wrapped(host)
    agrees(host, wrapped, x)
    host.weight = nn.Parameter(torch.randn(4))
    host.layer.weight = nn.Parameter(torch.randn(4, 4))
    wrapped.steps = torch.ones(4)
    agrees(host, wrapped, x)
    wrapped.load_state_dict(model(type(host).forward).state_dict())
    agrees(host, wrapped, x)
    wrapped.double()
    agrees(host, wrapped, x.double())
    with torch.no_grad():
        host.weight.zero_()
    assert torch.equal(wrapped(x.double()), host.steps.expand(3, 4))


def test_what_is_computed_from_parameters_is_computed_at_each_call(x: torch.Tensor) -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        assert self.weight.shape[0] == 4
        assert isinstance(self.weight, nn.Parameter)
        assert self.absent is None
        return functional.linear(self.layer(x), self.layer.weight * self.weight) + self.plain

    wrapped = traced(forward, x)
    with torch.no_grad():
        wrapped.weight.mul_(2)
    assert not torch.equal(wrapped(x), wrapped(x) * 0)
    agrees(esper.unwrap(wrapped), wrapped, x)


def test_tensors_are_made_and_drawn_at_each_call(x: torch.Tensor) -> None:
    wrapped = traced(lambda self, x: self.layer(x) + torch.arange(4) + torch.randn(4) + torch.zeros(4), x)
    assert not torch.equal(wrapped(x), wrapped(x))


def test_in_place_operations_keep_their_meaning() -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        y = self.layer(x)
        z = y
        z += 1
        y[:, 0] = 5
        x.add_(1)
        functional.relu(z, inplace=True)
        self.steps.add_(1)
        n = m = x.size(0)
        n += 1
        return y, z, x, n, m

    with torch.no_grad():
        host = model(forward)
        wrapped = fx_wrapped(copy.deepcopy(host))
        for _ in range(2):
            x = torch.randn(3, 4)
            ours, theirs = wrapped(x.clone()), host(x.clone())
            for each, other in zip(ours[:3], theirs[:3], strict=True):
                assert torch.equal(each, other)
            assert ours[3:] == theirs[3:]
    assert wrapped.steps.tolist() == [2.0] * 4


# -- calls -------------------------------------------------------------------------------------------------------------


def hugging(self: Any, x: Any = None, labels: Any = None, scale: float = 1.0, output_hidden: bool = False) -> Any:
    hidden = self.layer(x)
    if output_hidden:
        return {"hidden": hidden * scale}
    if labels is not None:
        return ((hidden - labels).square().mean() * scale, hidden)
    return hidden * scale


def test_optional_arguments(x: torch.Tensor) -> None:
    host = model(hugging)
    wrapped = fx_wrapped(host)
    labels = torch.randn(3, 4)
    for _ in range(2):
        agrees(host, wrapped, x)
        agrees(host, wrapped, x, labels)
        agrees(host, wrapped, labels=labels, x=x)
        agrees(host, wrapped, x=x, labels=None)
        agrees(host, wrapped, x, None, 0.5)
        agrees(host, wrapped, x, scale=2)
        agrees(host, wrapped, x, scale=torch.tensor(3.0))
        agrees(host, wrapped, x, output_hidden=True)
        agrees(host, wrapped, x, output_hidden=1)
    for module in (host, wrapped):
        with pytest.raises(TypeError):
            module(None)


def test_a_model_is_traced_for_some_kinds_of_calls_and_runs_its_modules_for_the_others(x: torch.Tensor) -> None:
    host = model(hugging)
    wrapped = fx_wrapped(host)
    for step in range(40):
        agrees(host, wrapped, x, scale=step * 0.25)
    traces = wrapped._eager._traced._parts[0]._traces
    assert len(traces) == 16
    wrapped.retrace()
    agrees(host, wrapped, x)
    assert "linear" in source(wrapped)


def test_variadics_and_keyword_only_arguments(x: torch.Tensor) -> None:
    def forward(self: Any, x: Any, /, *rest: Any, scale: float = 2.0, **options: Any) -> Any:
        y = self.layer(x) * scale
        for each in rest:
            y = y + each
        return y + len(options)

    host = model(forward)
    wrapped = fx_wrapped(host)
    for _ in range(2):
        agrees(host, wrapped, x)
        agrees(host, wrapped, x, torch.randn(3, 4))
        agrees(host, wrapped, x, scale=3.0)
        agrees(host, wrapped, x, other=1)
    assert "linear" in source(wrapped)


def test_containers_and_none_where_a_tensor_was(x: torch.Tensor) -> None:
    def forward(self: Any, x: Any, mask: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return self.layer(x[0]) + x[1]
        if isinstance(x, dict):
            return self.inner(x["x"])
        return self.layer(x) if mask is None else self.layer(x) * mask

    host = model(forward)
    wrapped = fx_wrapped(host)
    for _ in range(2):
        agrees(host, wrapped, x, None)
        agrees(host, wrapped, x, torch.rand(4))
        agrees(host, wrapped, (x, torch.rand(4)), None)
        agrees(host, wrapped, {"x": x}, None)


def test_wrong_arguments_raise_what_the_host_raises(x: torch.Tensor) -> None:
    wrapped = fx_wrapped(Attention())
    for _ in range(2):
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
            wrapped()
        with pytest.raises(TypeError, match="unexpected keyword argument 'masks'"):
            wrapped(torch.randn(2, 5, 16), masks=None)
        wrapped(torch.randn(2, 5, 16))


class Pair(NamedTuple):
    first: Any
    second: Any


def test_structured_results() -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        y = self.layer(x)
        return (y, [y + 1, None], {"z": y, 3: (y,)}, Pair(y, 1), (), slice(None), "text", 1.5, float("inf"), -1)

    traced(forward)


def test_results_of_classes_that_torch_fx_would_not_make_again(x: torch.Tensor) -> None:
    assert "OrderedDict" in refusal(lambda self, x: OrderedDict(a=self.layer(x)))


@pytest.mark.parametrize("train", [True, False])
def test_a_block_of_a_transformer(train: bool) -> None:
    host = nn.Sequential(Block(), Block()).train(train)
    wrapped = fx_wrapped(host)
    agrees(host, wrapped, torch.randn(2, 5, 16, requires_grad=True))
    assert wrapped.explain().regions == ("",)


def test_attention_and_encoder_layers_are_called_as_they_are(shelf: KernelShelf) -> None:
    x = torch.randn(2, 5, 16)
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.1, batch_first=True)
    for part in (nn.MultiheadAttention(16, 4, batch_first=True), layer):

        class Around(nn.Module):
            def __init__(self, part: nn.Module) -> None:
                super().__init__()
                self.part, self.out = part, nn.Linear(16, 16)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                is_attention = isinstance(self.part, nn.MultiheadAttention)
                return self.out(self.part(x, x, x)[0] if is_attention else self.part(x))

        for mode in (True, False):
            host = Around(part).train(mode)
            wrapped = fx_wrapped(host, platform=shelf.platform)
            agrees(host, wrapped, x)
            assert wrapped.explain().regions == ("",)
        load(wrapped, "out", 0, shelf.put(blueprint(16, 16)).id, alpha=0.5)
        assert not torch.allclose(wrapped(x), host(x))
    load(wrapped, "part.linear1", 0, shelf.put(blueprint(16, 32)).id, alpha=0.5)
    before = wrapped(x)
    wrapped.unload_kernel("out", 0)
    assert not torch.allclose(wrapped(x), before)
    wrapped.unload_kernel("part.linear1", 0)
    agrees(host, wrapped, x)


def test_an_encoder_alone_and_a_layer_alone() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    for host, x in ((encoder, torch.randn(2, 5, 16)), (nn.Linear(4, 3), torch.randn(2, 4))):
        wrapped = fx_wrapped(host)
        with torch.no_grad():
            assert torch.equal(wrapped(x), host(x))


def test_a_module_called_twice_and_tied_modules(shelf: KernelShelf, x: torch.Tensor) -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        return self.again(self.layer(self.layer(x))) + self.inner[0](x)

    host = model(forward)
    host.again = host.layer
    host.inner[0].weight = host.layer.weight
    wrapped = fx_wrapped(host, platform=shelf.platform)
    agrees(host, wrapped, x)
    assert source(wrapped).count("linear(") == 4
    host.layer.weight = nn.Parameter(torch.randn(4, 4))  # which unties it
    agrees(host, wrapped, x)
    load(wrapped, "layer", 0, shelf.put(blueprint(4, 4)).id, alpha=0.5)
    wrapped(x)
    assert source(wrapped).count("lerp(") == 3


# -- what is not traced ------------------------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # one gradient
        return grad * 7


def _caught(self: Any, x: torch.Tensor) -> Any:
    try:
        return self.layer(x) if x.sum() > 100 else x
    except Exception:  # noqa: BLE001  # what the test is about
        return self.layer(x) * 2


def _in(context: Callable[[], Any]) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor) -> Any:
        y = self.inner(x)
        with context():
            return self.layer(x) + y

    return forward


REFUSED: dict[str, Callable[..., Any]] = {
    "a value": lambda self, x: self.layer(x) if x.sum() > 0 else x,
    "a size": lambda self, x: self.layer(x) if x.shape[0] > 2 else x,
    "a caught exception": _caught,
    "a type": lambda self, x: self.layer(x) if isinstance(self.layer(x), torch.Tensor) else x,
    "an attribute": lambda self, x: self.layer(x) if not hasattr(self.inner(x), "logits") else x,
    "python's random numbers": lambda self, x: self.layer(x) if random.random() < 2 else x,
    "numpy's random numbers": lambda self, x: self.layer(x) if np.random.rand() < 2 else x,
    "torch's random numbers": lambda self, x: self.layer(x) if torch.rand([]) < 2 else x,
    "no_grad": _in(torch.no_grad),
    "inference_mode": _in(lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast": _in(lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)),
    "a checkpoint": lambda self, x: checkpoint(self.layer, x, use_reentrant=False),
    "a function of autograd": lambda self, x: Doubled.apply(self.layer(x)),
    "vmap": lambda self, x: torch.vmap(self.layer)(x),
    "iteration": lambda self, x: [self.layer(row) for row in x],
    "a length": lambda self, x: self.layer(x) * len(x),
    "an attribute that it sets": lambda self, x: (setattr(self, "last", x), self.layer(x))[1],
    "a buffer that it sets": lambda self, x: (setattr(self, "steps", self.steps + 1), self.layer(x) + self.steps)[1],
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_wrong_in_silence_is_not_traced(what: str) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    host = model(REFUSED[what])
    wrapped = fx_wrapped(copy.deepcopy(host))
    names = {name: set(vars(module)) for name, module in wrapped.named_modules()}
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    reasons = wrapped.explain().untraced
    assert reasons[""], reasons
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert {name: set(vars(module)) for name, module in wrapped.named_modules()} == names
    for _ in range(2):
        x = torch.randn(3, 4)
        ours, theirs = wrapped(x), host(x)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(AttributeError, match="graph_module"):
        _ = wrapped.graph_module


def test_a_model_in_the_other_mode_has_no_graph() -> None:
    wrapped = esper.wrap(mlp(4, 4), mode="module")
    with pytest.raises(AttributeError, match="graph_module"):
        _ = wrapped.graph_module
    assert not hasattr(wrapped, "graph_module")
    assert str(wrapped.explain()).endswith('runs as a module, as mode="module" has it; mode="fx" traces')
    wrapped.retrace()


def test_an_argument_has_what_a_tensor_has(x: torch.Tensor) -> None:
    def forward(self: Any, x: Any) -> Any:
        x = x["x"] if hasattr(x, "keys") else x
        return self.layer(x) if isinstance(x, torch.Tensor) else None

    traced(forward, x)


# -- hooks and replaced forwards ---------------------------------------------------------------------------------------


def test_hooks_on_a_site_fire_whenever_they_are_registered(x: torch.Tensor) -> None:
    host = mlp(4, 4, 4)
    wrapped = fx_wrapped(host)
    plain = wrapped(x)
    handle = wrapped[0].register_forward_hook(lambda module, args, output: output * 2)
    doubled = wrapped(x)
    assert torch.equal(doubled, host[2](host[1](host[0](x) * 2)))
    handle.remove()
    assert torch.equal(wrapped(x), plain)
    assert "module" not in source(wrapped)
    seen: list[Any] = []
    wrapped[1].register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs))
    wrapped(x.requires_grad_()).sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["layer", "inner.1"])
def test_a_forward_that_is_replaced_on_a_leaf_counts_at_once(name: str, x: torch.Tensor) -> None:
    wrapped = fx_wrapped(model(lambda self, x: self.inner(self.layer(x))))
    before = wrapped(x)
    leaf = wrapped.get_submodule(name)
    leaf.forward = lambda x: x * 0
    assert not torch.equal(wrapped(x), before)
    del leaf.forward
    assert torch.equal(wrapped(x), before)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "weight norm": lambda layer: nn.utils.weight_norm(layer),
    "weight norm, parametrized": lambda layer: parametrizations.weight_norm(layer),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "a tensor for a parameter": lambda layer: (delattr(layer, "weight"), setattr(layer, "weight", torch.ones(4, 4))),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_computed_parameters_are_computed(change: str, x: torch.Tensor) -> None:
    host = model(lambda self, x: self.inner(self.layer(x)))
    wrapped = fx_wrapped(host)
    wrapped(x)
    twin = fx_wrapped(copy.deepcopy(host))
    for each in (wrapped, twin):
        torch.manual_seed(0)
        CHANGES[change](each.layer)
        each.eval()
    assert torch.allclose(wrapped(x), wrapped.inner(wrapped.layer(x)))
    assert torch.allclose(wrapped(x), twin(x), atol=1e-6)


def test_hooks_on_containers_are_seen_before_and_after_the_trace(x: torch.Tensor) -> None:
    host = model(lambda self, x: self.inner(self.layer(x)))
    calls: list[str] = []
    host.inner.register_forward_hook(lambda module, args, output: calls.append("before"))
    wrapped = fx_wrapped(host)
    wrapped(x)
    assert calls == ["before"]
    assert wrapped.explain().regions == ("", "inner")
    wrapped.inner.register_forward_pre_hook(lambda module, args: calls.append("after"))
    wrapped(x)
    assert calls == ["before", "after", "before"]
    assert [node.target for node in wrapped.graph_module.graph.find_nodes(op="call_module")] == ["layer", "inner"]


def test_hooks_of_the_model_and_of_all_modules(x: torch.Tensor) -> None:
    host = model(lambda self, x: self.inner(self.layer(x)))
    wrapped = fx_wrapped(host)
    calls: list[Any] = []
    wrapped.register_forward_hook(lambda module, args, output: calls.append("model"))
    wrapped(x)
    assert calls == ["model"]
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: calls.append(type(module)))
    wrapped(x)
    handle.remove()
    assert [each for each in calls if each != "model"][:4] == [
        type(each) for each in (wrapped.layer, wrapped.inner[0], wrapped.inner[1], wrapped.inner)
    ]


def test_children_that_are_replaced_are_seen(x: torch.Tensor) -> None:
    wrapped = fx_wrapped(mlp(4, 4, 4))
    before = wrapped(x)
    wrapped[1] = nn.Tanh()
    assert not torch.equal(wrapped(x), before)
    assert type(wrapped.graph_module.get_submodule("1")) is nn.Tanh
    wrapped[2] = nn.Linear(4, 7)
    assert wrapped(x).shape == (3, 7)


class _Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


# -- other tracers -----------------------------------------------------------------------------------------------------


def test_torch_fx_traces_a_wrapped_model(x: torch.Tensor) -> None:
    for host in (mlp(4, 6, 4), model(lambda self, x: self.inner(self.layer(x)))):
        around = _Around(fx_wrapped(host))
        for _ in range(2):
            assert torch.equal(fx.symbolic_trace(around)(x), host(x))
            assert torch.equal(around(x), host(x))


def test_torch_export_takes_a_wrapped_model(x: torch.Tensor) -> None:
    host = model(lambda self, x: self.inner(self.layer(x)) * self.weight)
    for called_before in (False, True):
        for strict in (False, True):
            wrapped = fx_wrapped(host)
            if called_before:
                wrapped(x)
            exported = torch.export.export(wrapped, (x,), strict=strict)
            torch.testing.assert_close(exported.module()(x), host(x))
            agrees(host, wrapped, x)


@pytest.mark.parametrize("backend", ["esper", "eager"])
def test_dynamo_traces_the_hosts_own_python(backend: str, x: torch.Tensor, fresh_dynamo: None) -> None:
    host = model(lambda self, x: self.inner(self.layer(x)) * self.factor)
    wrapped = fx_wrapped(host)
    wrapped(x)
    options = {"options": {"inner": "eager"}} if backend == "esper" else {}
    compiled = torch.compile(wrapped, backend=backend, fullgraph=True, **options)
    agrees(host, compiled, x)
    wrapped.factor = 2.0
    host.factor = 2.0
    agrees(host, compiled, x)


# -- copies ------------------------------------------------------------------------------------------------------------


def test_copies_and_pickles_are_traced_anew(shelf: KernelShelf, x: torch.Tensor) -> None:
    for host in (nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())), Deciding()):
        wrapped = fx_wrapped(host, platform=shelf.platform)
        name = next(iter(wrapped.kasmina_layers))
        load(wrapped, name, 0, shelf.put(blueprint(4, 4)).id, alpha=0.5)
        expected = wrapped(x)
        file = io.BytesIO()
        torch.save(wrapped, file)
        file.seek(0)
        for twin in (copy.deepcopy(wrapped), torch.load(file, weights_only=False)):
            assert torch.equal(twin(x), expected)
            with torch.no_grad():
                for layer in twin.kasmina_layers.values():
                    layer.weight.zero_()
            assert not torch.equal(twin(x), expected)
            assert torch.equal(wrapped(x), expected)
            assert twin.explain().regions == wrapped.explain().regions


def test_copies_and_pickles_of_a_part(x: torch.Tensor) -> None:
    wrapped = fx_wrapped(Deciding())
    expected = wrapped.first(x)
    file = io.BytesIO()
    torch.save(wrapped.first, file)
    file.seek(0)
    for twin in (copy.deepcopy(wrapped.first), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), expected)
        assert type(twin) is nn.Sequential
        with torch.no_grad():
            twin[2].bias.add_(1)
        assert torch.allclose(twin(x), expected + 1)
        assert torch.equal(wrapped.first(x), expected)


def test_a_model_without_attributes_of_ours(x: torch.Tensor) -> None:
    wrapped = fx_wrapped(Deciding())
    wrapped(x)
    assert not [name for module in wrapped.modules() for name in vars(module) if "part" in name or "trace" in name]


def test_a_forward_set_on_an_inlined_module_counts_at_once(shelf: KernelShelf) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.fc(x)
            return result

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Block(), nn.Linear(6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.head(self.block(x))
            return result

    model: Any = esper.wrap(Around(), platform=shelf.platform, mode="fx")
    x = torch.randn(3, 8)
    before, old = model(x), model.block.forward
    model.block.forward = lambda x: old(x) * 0
    torch.testing.assert_close(model(x), model.head.bias.expand(3, 1))
    del model.block.forward
    torch.testing.assert_close(model(x), before)
