"""`esper.bake`: a grown model as a plain PyTorch module."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.core.errors import WrapError
from tests.core.grown import grown
from tests.core.seeds import blueprint, load, outputs
from tests.kernel_shelf import KernelShelf
from tests.models import mlp, small_transformer

MODES = pytest.mark.parametrize("mode", ["module", "fx"])


@MODES
def test_a_baked_model_computes_what_the_wrapped_one_does(shelf: KernelShelf, x: torch.Tensor, mode: str) -> None:
    model = grown(shelf, mode=mode)
    expected = outputs(model, x)
    plain = esper.bake(model)
    assert type(plain) is nn.Sequential
    torch.testing.assert_close(outputs(plain, x), expected)
    assert not any("esper" in type(module).__module__ for module in plain.modules())
    assert {"0.weight", "0.bias", "2.weight", "2.bias"} <= set(plain.state_dict())
    assert {id(p) for p in plain.parameters()}.isdisjoint({id(p) for p in model.parameters()})
    assert torch.equal(outputs(model, x), expected)


def test_gradients_are_those_of_the_wrapped_model(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = grown(shelf)
    plain = esper.bake(model)
    for each in (model, plain):
        each.zero_grad()
        each(x).square().sum().backward()
    ours = [p.grad for p in plain.parameters() if p.grad is not None]
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(ours) == len(theirs)
    for gradient in ours:
        assert any(gradient.shape == other.shape and torch.allclose(gradient, other, atol=1e-6) for other in theirs)


@pytest.mark.slow
def test_it_is_loaded_and_exported_where_esper_is_not_installed(
    shelf: KernelShelf, x: torch.Tensor, tmp_path: Path
) -> None:
    model = grown(shelf)
    plain = esper.bake(model)
    torch.save(plain, tmp_path / "model.pt")
    torch.save((x, outputs(model, x)), tmp_path / "expected.pt")
    program = """
import sys, torch
sys.modules["esper"] = None
model = torch.load("model.pt", weights_only=False)
x, expected = torch.load("expected.pt")
torch.testing.assert_close(model(x), expected)
exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
torch.testing.assert_close(exported.module()(x), expected)
torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_hooks_modes_tied_places_and_attributes_come_along(shelf: KernelShelf) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.again = self.fc
            self.kept = [self.fc]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.kept[0](self.again(self.fc(x)))
            return result

    model: Any = esper.wrap(Twice().eval(), platform=shelf.platform)
    model.fc.register_forward_hook(lambda module, inputs, output: 2 * output)
    load(model, "fc", 0, shelf.put(blueprint(8, 8)).id, alpha=0.5)
    plain: Any = esper.bake(model)
    assert plain.fc is plain.again is plain.kept[0]
    assert not plain.fc.training
    assert plain.fc.in_features == 8
    x = torch.randn(3, 8)
    torch.testing.assert_close(outputs(plain, x), outputs(model, x))


def test_a_transformer_a_dormant_model_and_a_single_layer(shelf: KernelShelf, x: torch.Tensor) -> None:
    host, inputs = small_transformer(), torch.randn(2, 5, 16)
    model = esper.wrap(host, platform=shelf.platform)
    assert [type(each) for each in esper.bake(model).modules()] == [type(each) for each in host.modules()]
    load(model, "0.fc1", 1, shelf.put(blueprint(16, model.kasmina_layers["0.fc1"].output_dim)).id, alpha=0.5)
    torch.testing.assert_close(outputs(esper.bake(model), inputs), outputs(model, inputs))
    alone = esper.wrap(nn.Linear(8, 6), platform=shelf.platform)
    assert type(esper.bake(alone)) is nn.Linear
    load(alone, "", 0, shelf.put(blueprint(8, 6)).id, alpha=0.5)
    torch.testing.assert_close(outputs(esper.bake(alone), x), outputs(alone, x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_affine_kernels_become_part_of_the_weights(
    shelf: KernelShelf, x: torch.Tensor, bias: bool, dtype: torch.dtype
) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(8, 6, bias=bias), nn.ReLU(), nn.Linear(6, 4)), platform=shelf.platform)
    for seed, start in enumerate(("kaiming", "identity", "kaiming")):
        affine = esper.Blueprint.low_rank(8, 6, 2, start=start, seed=seed)  # type: ignore[arg-type]  # one of the starts
        load(model, "0", seed, shelf.put(affine).id, alpha=0.5, trainable=True)
    with torch.no_grad():
        for parameter in model.seed_parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    model.to(dtype)
    plain: Any = esper.bake(model)
    assert [type(each) for each in plain] == [nn.Linear, nn.ReLU, nn.Linear]
    close = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(plain(x.to(dtype)), model(x.to(dtype)), **close)
    nn.Sequential(nn.Linear(8, 6, bias=bias), nn.ReLU(), nn.Linear(6, 4)).load_state_dict(plain.state_dict())
    other = esper.Blueprint.bottleneck(8, 6, 2, start="kaiming", dtype=str(dtype).removeprefix("torch."))
    load(model, "0", 3, shelf.put(other).id, alpha=0.5)
    plain = esper.bake(model)
    assert [name for name, _ in plain[0].named_children()] == ["seed_3"]
    torch.testing.assert_close(plain(x.to(dtype)), model(x.to(dtype)), **close)


@pytest.mark.parametrize("why", ["tied", "isolated", "parametrized", "behind another"])
def test_affine_kernels_that_cannot_become_part_of_the_weights_stay(
    shelf: KernelShelf, x: torch.Tensor, why: str
) -> None:
    host = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    if why == "tied":
        host[2].weight = host[0].weight
    model = esper.wrap(host, platform=shelf.platform)
    if why == "parametrized":
        nn.utils.parametrizations.weight_norm(model[0])  # type: ignore[index]  # a Sequential
    if why == "behind another":
        load(model, "0", 0, shelf.put(blueprint(8, 8, start="kaiming")).id, alpha=0.5)
    affine = esper.Blueprint.low_rank(8, 8, 2, start="kaiming")
    load(model, "0", 1, shelf.put(affine).id, alpha=0.5, trainable=True, isolate=why == "isolated")
    plain: Any = esper.bake(model)
    assert "seed_1" in dict(plain[0].named_children())
    torch.testing.assert_close(outputs(plain, x), outputs(model, x))


def test_unwrapping_a_model_with_fossils_says_how_they_are_kept(shelf: KernelShelf) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=0.5)
    esper.unwrap(model)
    assert model.fossilize("0", 0)
    model.commit()
    with pytest.warns(UserWarning, match=r"without 1 fossilized kernel .*esper\.bake"):
        esper.unwrap(model)


@pytest.mark.parametrize("wrong", [mlp(8, 4), None, "model"])
def test_what_is_not_wrapped_is_not_baked(wrong: Any) -> None:
    with pytest.raises(WrapError, match=r"esper\.bake takes what esper\.wrap returned"):
        esper.bake(wrong)


def test_what_torch_compile_made_of_a_wrapped_model_is_named_as_that() -> None:
    compiled: Any = torch.compile(esper.wrap(mlp(8, 4)), backend="esper")
    for function in (esper.bake, esper.unwrap):
        with pytest.raises(WrapError, match=r"takes what esper\.wrap returned, not what torch\.compile made of it"):
            function(compiled)


def test_a_baked_state_dict_is_plain_data(shelf: KernelShelf) -> None:
    file = io.BytesIO()
    torch.save(esper.bake(grown(shelf)).state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)


@MODES
@pytest.mark.parametrize("trainable", [False, True])
def test_a_grown_model_is_traced_for_torchscript(
    shelf: KernelShelf, x: torch.Tensor, mode: str, trainable: bool
) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform, mode=mode)  # type: ignore[arg-type]  # a text among the parameters
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=0.5, trainable=trainable)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, x)
    other = torch.randn(9, 8)
    torch.testing.assert_close(traced(other), model(other))
    model(x).sum().backward()
    assert all((parameter.grad is not None) for parameter in model.seed_parameters())


def test_scripting_says_what_can_be_scripted(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = grown(shelf)
    with pytest.raises(TypeError, match=r"script what esper\.bake\(model\) returns"):
        torch.jit.script(model)
    torch.testing.assert_close(torch.jit.script(esper.bake(model))(x), model(x))
