"""Seeds at modules that are no `nn.Linear`: blocks, sequences, subclasses, in both modes, uncompiled and compiled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper
from esper import Blueprint
from esper.artifacts import load_artifact
from esper.core.errors import SiteCallError, TargetError, WrapError
from esper.execution.kasmina_layer import UnknownFeaturesError
from tests.core.seeds import load, outputs, states
from tests.kernel_shelf import KernelShelf
from tests.models import TransformerBlock

W = 8
MODES: Any = ["module", "fx"]
RUNS: dict[str, Callable[[nn.Module], Any]] = {
    "uncompiled": lambda model: model,
    "esper": lambda model: torch.compile(model, backend="esper", options={"inner": "eager"}),
    "another backend": lambda model: torch.compile(model, backend="eager"),
}
each_mode = pytest.mark.parametrize("mode", MODES)
each_run = pytest.mark.parametrize("run", RUNS)


class Block(nn.Module):
    """A feed-forward block with what blocks have beside layers: a buffer, a reference to a child, a method."""

    def __init__(self, width: int = W) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.register_buffer("scale", torch.tensor(0.5))
        self.parts = [self.norm, self.fc1]
        self.dropped = nn.Dropout(0.5)

    def branch(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return self.dropped(self.fc2(torch.relu(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.branch(x)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def host() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Doubled(W, W), Block(), nn.Linear(W, 3)).eval()


def wrapped(shelf: KernelShelf, target: Any = (Block, Doubled), mode: Any = "module", **options: Any) -> Any:
    plain = host()
    model = esper.wrap(plain, target, platform=shelf.platform, mode=mode, **options)
    model(torch.zeros(1, W))  # which tells the features
    return plain, model


def deepen(shelf: KernelShelf, seed: int = 1, start: Any = "kaiming") -> str:
    return shelf.put(Blueprint.deepen(W, W, 5, seed=seed, start=start)).id


def expected(plain: nn.Sequential, shelf: KernelShelf, x: Tensor, *seeds: tuple[int, str, float]) -> Tensor:
    """What the host computes with kernels behind its modules: (module, kernel, alpha)."""
    for index, module in enumerate(plain):
        given, x = x, module(x)
        for _, kernel, alpha in (each for each in seeds if each[0] == index):
            loaded = load_artifact(shelf.platform.store.kernels.content(kernel)[0])
            own = loaded.graph.to_module(dict(loaded.tensors))
            made = own(given, x) if loaded.graph.uses_host else own(given)
            x = alpha * made + (1 - alpha) * x
    return x


@each_mode
def test_a_site_is_of_its_modules_class_and_leaves_the_host_as_it_was(shelf: KernelShelf, mode: Any) -> None:
    plain, model = wrapped(shelf, mode=mode)
    x = torch.randn(4, W)
    assert list(model.kasmina_layers) == ["0", "1", "2"]
    assert all(type(layer).__name__ == name for layer, name in zip(model, ("Block", "Doubled", "Block"), strict=False))
    assert all(isinstance(model.kasmina_layers[name], esper.KasminaLayer) for name in "012")
    assert isinstance(model[0], Block)
    assert not isinstance(model[0], nn.Linear)
    assert model[0] is model.kasmina_layers["0"]
    assert model[0].parts[1] is model[0].fc1
    assert model[0].parts[1] is not plain[0].fc1
    assert model.layer_mappings == {"0": "Block", "1": "Doubled", "2": "Block"}
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [*dict(model.named_modules())] == [*dict(plain.named_modules())]
    assert all(a is b for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert torch.equal(model(x), plain(x))
    assert torch.equal(model[0].branch(x), plain[0].branch(x))
    assert "num_seeds=4, active_seeds=0" in repr(model[0])
    layer = model.kasmina_layers["1"]
    assert "in_features=8, out_features=8, bias=True, num_seeds=4" in repr(layer)
    assert (layer.input_dim, layer.output_dim, layer.placement) == (W, W, (torch.device("cpu"), torch.float32))
    assert layer.get_layer_stats()["layer_name"] == "1"
    assert torch.equal(layer.default_transform(x), plain[1](x))
    assert [row.name for row in model.explain().rows if row.is_site] == ["0", "1", "2"]
    assert esper.unwrap(model) is plain
    assert type(plain[0]) is Block


@each_run
@each_mode
def test_kernels_are_blended_with_what_the_module_returns(
    shelf: KernelShelf, mode: Any, run: str, fresh_dynamo: None
) -> None:
    """Loaded, weighted, unloaded, for good; never stale, and with the gradients of the formula."""
    plain, model = wrapped(shelf, mode=mode)
    call, x = RUNS[run](model), torch.randn(4, W, requires_grad=True)
    assert torch.equal(call(x), plain(x))
    first, second = deepen(shelf), shelf.put(Blueprint.bottleneck(W, W, 3, start="kaiming")).id
    load(model, "0", 0, first, alpha=0.5, trainable=True)
    load(model, "1", 2, second, alpha=0.25)
    want = expected(plain, shelf, x, (0, first, 0.5), (1, second, 0.25))
    got = call(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), [x, *plain.parameters()]),
        torch.autograd.grad(want.square().sum(), [x, *plain.parameters()]),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    call(x).square().sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in model.kasmina_layers["0"].kernel_parameters(0))
    model.set_alpha("0", 0, 1.0)
    assert model.unload_kernel("1", 2)
    want = expected(plain, shelf, x, (0, first, 1.0))
    torch.testing.assert_close(call(x), want, rtol=1e-5, atol=1e-6)
    assert model.fossilize("0", 0)
    assert states(model)["0"][0] == "FOSSILIZED"
    torch.testing.assert_close(call(x), want, rtol=1e-5, atol=1e-6)


@each_run
@each_mode
def test_a_kernel_that_was_just_loaded_changes_nothing(
    shelf: KernelShelf, mode: Any, run: str, fresh_dynamo: None
) -> None:
    plain, model = wrapped(shelf, mode=mode)
    call, x = RUNS[run](model), torch.randn(4, W)
    load(model, "0", 0, deepen(shelf), alpha=0.5)
    before = outputs(call, x)
    for alpha in (0.25, 1.0):
        load(model, "0", 1, deepen(shelf, seed=2, start="identity"), alpha=alpha, trainable=True)
        torch.testing.assert_close(outputs(call, x), before, rtol=1e-6, atol=1e-6)
        model.unload_kernel("0", 1)
    del plain


@each_run
@each_mode
def test_sites_stand_inside_of_sites(shelf: KernelShelf, mode: Any, run: str, fresh_dynamo: None) -> None:
    plain, model = wrapped(shelf, [Block, "0.fc?", nn.Linear], mode=mode)
    assert list(model.kasmina_layers) == ["0", "0.fc1", "0.fc2", "2", "2.fc1", "2.fc2", "3"]
    assert list(model.select_layers("0")) == ["0"]
    assert list(model.select_layers("0.*")) == ["0.fc1", "0.fc2"]
    assert list(model.select_layers(Block)) == ["0", "2"]
    assert list(model.select_layers(model[2])) == ["2"]
    call, x = RUNS[run](model), torch.randn(4, W)
    inner = shelf.put(Blueprint.bottleneck(2 * W, W, 3, start="kaiming", seed=3))
    outer = deepen(shelf)
    load(model, "0.fc2", 0, inner.id, alpha=0.5)
    load(model, "0", 0, outer, alpha=0.5)
    kernel = inner.graph.to_module(dict(inner.tensors))
    grown = copy.deepcopy(plain)
    grown[0].fc2.register_forward_hook(lambda _, given, y: 0.5 * kernel(given[0]) + 0.5 * y)
    want = expected(grown, shelf, x, (0, outer, 0.5))
    torch.testing.assert_close(call(x), want, rtol=1e-5, atol=1e-6)
    model.unload_kernel("0", 0)
    torch.testing.assert_close(call(x), grown(x), rtol=1e-5, atol=1e-6)
    model.unload_kernel("0.fc2", 0)
    torch.testing.assert_close(call(x), plain(x), rtol=1e-6, atol=1e-6)


@each_mode
def test_copies_pickles_and_checkpoints_have_the_kernels(shelf: KernelShelf, mode: Any) -> None:
    plain, model = wrapped(shelf, mode=mode)
    x = torch.randn(4, W)
    load(model, "2", 1, deepen(shelf), alpha=0.5, trainable=True)
    want = outputs(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin[0], Block)
        assert twin[0].parts[0] is twin[0].norm
        assert torch.equal(outputs(twin, x), want)
        assert twin.kasmina_layers["2"].features == (W, W)
        assert not {id(each) for each in twin.parameters()} & {id(each) for each in model.parameters()}
    again = esper.wrap(host(), (Block, Doubled), platform=shelf.platform, mode=mode)  # which nobody has called
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs(again, x), want)
    vanilla = host()
    vanilla.load_state_dict(plain.state_dict(), strict=True)
    again.load_state_dict(vanilla.state_dict(), strict=True)
    with pytest.raises(WrapError, match="kernels stand behind '2', which are no linear layers"):
        esper.bake(model)


@pytest.mark.parametrize("by", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_one_site_stands_alone(shelf: KernelShelf, by: Any, fresh_dynamo: None) -> None:
    plain, model = wrapped(shelf, [Block, nn.Linear])
    x = torch.randn(4, W)
    load(model, "0", 1, deepen(shelf), alpha=0.5)
    layer, want = by(model[0]), outputs(model[0], x)
    assert isinstance(layer, Block)
    assert torch.equal(outputs(layer, x), want)
    assert torch.equal(outputs(torch.compile(layer, backend="esper", options={"inner": "eager"}), x), want)
    assert torch.equal(outputs(torch.compile(layer, backend="eager"), x), want)
    assert layer.unload_kernel(1)
    assert torch.equal(outputs(layer, x), plain[0](x))
    assert model[0].state.active_seeds() == (1,)


def test_train_and_eval_reach_what_is_inside(shelf: KernelShelf) -> None:
    plain, model = wrapped(shelf)
    model.train()
    assert model[0].dropped.training
    x = torch.randn(64, W)
    torch.manual_seed(5)
    first = model(x)
    torch.manual_seed(5)
    plain.train()
    assert torch.equal(first, plain(x))


def test_hooks_on_a_site_see_what_it_takes_and_returns(shelf: KernelShelf) -> None:
    _, model = wrapped(shelf)
    load(model, "0", 0, deepen(shelf), alpha=0.5)
    x = torch.randn(4, W, requires_grad=True)
    returned = outputs(model[0], x)
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda _, given, y: seen.extend([given[0], y]))
    model[0].register_full_backward_hook(lambda _, into, out: seen.extend([into[0], out[0]]))
    model(x).sum().backward()
    assert torch.equal(seen[0], x)
    assert torch.equal(seen[1], returned)
    assert [each.shape for each in seen[2:]] == [(4, W), (4, W)]


@each_run
def test_the_activations_of_a_block_are_computed_anew(shelf: KernelShelf, run: str, fresh_dynamo: None) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Any:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)  # type: ignore[assignment]  # torch leaves it untyped
            return x

    plain = Checkpointed().eval()
    model = esper.wrap(plain, {Block: (W, W)}, platform=shelf.platform)
    call, x = RUNS[run](model), torch.randn(4, W)
    load(model, "blocks.1", 0, deepen(shelf, start="identity"), trainable=True)
    torch.testing.assert_close(call(x), plain(x))
    call(x).square().sum().backward()
    assert model.kasmina_layers["blocks.1"].kernel_parameters(0)[-1].grad.abs().sum() > 0  # type: ignore[union-attr]  # it has one


def test_blocks_that_are_sites_are_compiled_one_by_one(shelf: KernelShelf, fresh_dynamo: None) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(*[TransformerBlock(W, 2) for _ in range(3)], nn.Linear(W, 2))
    model = esper.wrap(plain, [TransformerBlock, nn.Linear], platform=shelf.platform)
    assert esper.compile_blocks(model, options={"inner": "eager"}) == ["0", "1", "2"]
    x = torch.randn(2, 5, W)
    torch.testing.assert_close(model(x), plain(x))
    assert model.compile_report().graphs  # compiled
    kernel = deepen(shelf)
    for name in "02":
        load(model, name, 0, kernel, alpha=0.5)
    torch.testing.assert_close(model(x), expected(plain, shelf, x, (0, kernel, 0.5), (2, kernel, 0.5)))


class Broken(nn.Module):
    """A block whose forward breaks the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x)


@each_run
def test_a_graph_may_break_inside_of_a_site(shelf: KernelShelf, run: str, fresh_dynamo: None) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(Broken(), nn.Linear(W, 3))
    model = esper.wrap(plain, {"0": (W, W), "1": None, "0.*": None}, platform=shelf.platform)
    call, x = RUNS[run](model), torch.randn(4, W)
    torch.testing.assert_close(call(x), plain(x))
    kernel = deepen(shelf)
    load(model, "0", 0, kernel, alpha=0.5)
    torch.testing.assert_close(call(x), expected(plain, shelf, x, (0, kernel, 0.5)))
    model.unload_kernel("0", 0)
    torch.testing.assert_close(call(x), plain(x))


@pytest.mark.parametrize("run", ["uncompiled", "esper"])
def test_the_first_forward_tells_the_features(shelf: KernelShelf, run: str, fresh_dynamo: None) -> None:
    model = esper.wrap(host(), Block, platform=shelf.platform)
    layer = model.kasmina_layers["0"]
    with pytest.raises(
        UnknownFeaturesError,
        match=r"call the model once, or give .* target_layers=\{'0': \(in_features, out_features\)\}",
    ):
        layer.input_dim  # noqa: B018  # which raises
    kernel = deepen(shelf)
    assert not model.request_kernel("0", 0, kernel).result()
    assert "not known before its first forward" in layer.seed_errors[0]
    RUNS[run](model)(torch.randn(2, W))
    assert (layer.input_dim, layer.output_dim) == (W, W)
    load(model, "0", 0, kernel)
    assert not model.request_kernel("0", 1, shelf.put(Blueprint.deepen(W, 3, 2)).id).result()
    assert "maps 8 to 3 features" in layer.seed_errors[1]


def test_features_that_were_given_wrong_are_told_at_the_first_call(shelf: KernelShelf) -> None:
    model = esper.wrap(host(), {Block: (4, 4)}, platform=shelf.platform)
    load(model, "0", 0, shelf.put(Blueprint.deepen(4, 4, 2)).id)
    with pytest.raises(SiteCallError, match="'0' maps 8 to 8 features, and not 4 to 4 as its kernels do: unload them"):
        model(torch.randn(2, W))
    model.unload_kernel("0", 0)
    model(torch.randn(2, W))
    assert model.kasmina_layers["0"].features == (W, W)


class Calling(nn.Module):
    def __init__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.module, self.args, self.kwargs = module, args, kwargs

    def forward(self, x: Tensor) -> Any:
        return self.module(*(x if each is ... else each for each in self.args), **self.kwargs)


class Options(nn.Module):
    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return x if mask is None else x * mask


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Pooling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(0)


@pytest.mark.parametrize(
    ("calling", "message"),
    [
        (
            Calling(Options(), ..., 2.0),
            "'module' was called with an argument, an argument, and a site takes one tensor",
        ),
        (Calling(Options(), ..., mask=2.0), "'module' was called with an argument, mask"),
        (Calling(Options()), "'module' was called with nothing"),
        (Calling(Options(), 3), "'module' was called with an int"),
        (
            Calling(Pair(), ...),
            "'module' returns a tuple, and a site returns one tensor: leave it out",
        ),
    ],
)
@each_run
def test_other_calls_are_refused(
    shelf: KernelShelf, calling: nn.Module, message: str, run: str, fresh_dynamo: None
) -> None:
    model = esper.wrap(calling, "module", platform=shelf.platform)
    with pytest.raises(SiteCallError, match=message):
        RUNS[run](model)(torch.ones(2, W))


def test_a_module_that_changes_other_dimensions_gets_no_kernel(shelf: KernelShelf, fresh_dynamo: None) -> None:
    model = esper.wrap(Calling(Pooling(), ...), "module", platform=shelf.platform)
    assert RUNS["esper"](model)(torch.ones(2, W)).shape == (W,)
    assert not model.request_kernel("module", 0, deepen(shelf)).result()
    assert "not known before its first forward" in model.kasmina_layers["module"].seed_errors[0]
    with pytest.raises(
        SiteCallError, match=r"'module' has made \[8\] of \[2, 8\], and a site keeps all dimensions but"
    ):
        model(torch.ones(2, W))


def test_the_one_input_may_be_passed_by_name(shelf: KernelShelf, fresh_dynamo: None) -> None:
    block = Block().eval()
    model = esper.wrap(nn.ModuleDict({"block": block}), {"block": (W, W)}, platform=shelf.platform)
    load(model, "block", 0, deepen(shelf), alpha=0.5)
    x = torch.randn(4, W)
    assert torch.equal(model.block(x=x), model.block(x))
    assert torch.equal(torch.compile(model.block, backend="eager")(x=x), model.block(x))


def test_a_module_that_is_replaced_loses_its_seeds_with_a_warning(shelf: KernelShelf) -> None:
    _, model = wrapped(shelf)
    load(model, "0", 0, deepen(shelf))
    model[0] = Block()
    with pytest.warns(
        UserWarning, match="kernels in seeds 0 of layer '0' are unloaded, since it was replaced by Block"
    ):
        model(torch.randn(2, W))
    assert not model.request_kernel("0", 0, deepen(shelf)).result()


def test_kernels_take_the_dtype_of_the_modules_parameters(shelf: KernelShelf) -> None:
    model = esper.wrap(host().double(), {Block: (W, W)}, platform=shelf.platform)
    kernel = shelf.put(Blueprint.deepen(W, W, 3, dtype="float64", start="kaiming")).id
    assert not model.request_kernel("0", 0, deepen(shelf)).result()
    load(model, "0", 0, kernel)
    model.float()
    assert model(torch.randn(2, W)).dtype == torch.float32


def test_a_module_without_parameters_can_be_a_site(shelf: KernelShelf) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(3, W), nn.GELU()), {"1": (W, W)}, platform=shelf.platform)
    load(model, "1", 0, deepen(shelf), alpha=0.5)
    assert model(torch.randn(2, 3)).shape == (2, W)


def test_a_fossil_that_stands_alone_keeps_what_the_module_does_to_others(
    shelf: KernelShelf, fresh_dynamo: None
) -> None:
    """An in-place module whose output nothing reads any more: what it has written is read elsewhere."""

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = x * 1
            return self.relu(y) + y

    model = esper.wrap(Writing(), {"relu": (W, W)}, platform=shelf.platform)
    kernel = shelf.put(Blueprint.bottleneck(W, W, 2, start="kaiming")).id
    load(model, "relu", 0, kernel)
    x = torch.randn(4, W)
    call, want = RUNS["esper"](model), outputs(model, x)
    assert torch.equal(outputs(call, x), want)
    model.fossilize("relu", 0)
    assert torch.equal(outputs(call, x), want)
    assert torch.equal(outputs(model, x), want)


def test_features_that_were_told_wrongly_are_seen_and_warned_of(shelf: KernelShelf) -> None:
    model = esper.wrap(host(), {"0": (W + 1, W)}, platform=shelf.platform)
    assert model.kasmina_layers["0"].input_dim == W + 1
    with pytest.warns(UserWarning, match=f"'0' maps {W} to {W} features, and not {W + 1} to {W} as was told"):
        model(torch.randn(2, W))
    assert model.kasmina_layers["0"].input_dim == W


def test_a_convolution_is_no_site() -> None:
    with pytest.raises(TargetError, match="its features are not the last dimension of its input and output"):
        esper.wrap(nn.Sequential(nn.Conv1d(4, 4, 1), nn.Flatten(), nn.Linear(16, 2)), ["0", "2"])


@each_mode
def test_a_forward_that_has_begun_sees_no_kernel_that_is_staged_meanwhile(shelf: KernelShelf, mode: Any) -> None:
    plain, model = wrapped(shelf, mode=mode)
    x, kernel = torch.randn(2, W), deepen(shelf)

    def ask(*_: object) -> None:
        handle.remove()
        assert model.request_kernels(["0", "1"], kernel).result()

    handle = model[0].register_forward_hook(ask)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x)), "not even the second block, which has yet to run"
        both = expected(plain, shelf, x, (0, kernel, 1.0), (1, kernel, 1.0))
        torch.testing.assert_close(model(x), both)
