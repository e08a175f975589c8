"""Which families stand at a plain linear layer: all of them, if the features are those of the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper import Blueprint
from esper.artifacts import ArtifactError
from tests.core.seeds import load, outputs, states
from tests.kernel_shelf import KernelShelf

IN, OUT = 8, 6
FAMILIES: dict[str, Callable[..., Blueprint]] = {
    "low_rank": lambda *features, **options: Blueprint.low_rank(*features, 3, **options),
    "bottleneck": lambda *features, **options: Blueprint.bottleneck(*features, 3, **options),
    "gated_mlp": lambda *features, **options: Blueprint.gated_mlp(*features, 3, **options),
    "residual_mlp": lambda *features, **options: Blueprint.residual_mlp(*features, 3, **options),
    "affine": lambda *features, **options: Blueprint.affine(*features, **options),
    "deepen": lambda *features, **options: Blueprint.deepen(*features, 3, **options),
    "widen": lambda *features, **options: Blueprint.widen(*features, 3, **options),
}
RUNS: dict[str, Callable[[Any], Any]] = {
    "uncompiled": lambda model: model,
    "esper": lambda model: torch.compile(model, backend="esper", options={"inner": "eager"}),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def wrapped(shelf: KernelShelf) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, 1))
    return host, esper.wrap(host, platform=shelf.platform)


@each_family
@pytest.mark.parametrize("run", RUNS)
def test_every_family_starts_as_an_identity_and_all_of_it_learns(
    shelf: KernelShelf, family: str, run: str, fresh_dynamo: None
) -> None:
    host, model = wrapped(shelf)
    call, x = RUNS[run](model), torch.randn(5, IN)
    load(model, "0", 0, shelf.put(FAMILIES[family](IN, OUT)).id, alpha=0.5, trainable=True)
    torch.testing.assert_close(call(x), host(x), rtol=1e-6, atol=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the last map begins at zero, and the others learn from its first step on
        optimizer.zero_grad()
        call(x).square().sum().backward()
        optimizer.step()
    assert all(each.grad is not None and each.grad.any() for each in model.kasmina_layers["0"].kernel_parameters(0))


@pytest.mark.parametrize("run", RUNS)
def test_at_a_linear_layer_deepen_reads_what_the_layer_has_made(
    shelf: KernelShelf, run: str, fresh_dynamo: None
) -> None:
    """Of as many features as come out; how many go in does not matter to it."""
    host, model = wrapped(shelf)
    call, x = RUNS[run](model), torch.randn(5, IN)
    artifact = shelf.put(Blueprint.deepen(IN, OUT, 3, start="kaiming", norm="rms_norm", activation="relu", bias=False))
    load(model, "0", 0, artifact.id, alpha=0.5)
    norm, up, down = (artifact.tensors[f"{name}.weight"] for name in ("norm", "up", "down"))
    y = host[0](x)  # type: ignore[index]  # a sequence
    normed = nn.functional.rms_norm(y, (OUT,), norm, eps=1e-6)
    deepened = 0.5 * (torch.relu(normed @ up.T) @ down.T) + 0.5 * y
    want = host[2](deepened.tanh())  # type: ignore[index]  # as above
    torch.testing.assert_close(outputs(call, x), want)
    assert model.fossilize("0", 0)
    torch.testing.assert_close(outputs(call, x), want)
    torch.testing.assert_close(outputs(esper.bake(model), x), want)


@each_family
@pytest.mark.parametrize("features", [(IN, IN), (OUT, OUT), (OUT, IN)])
def test_other_features_are_refused_at_the_request(shelf: KernelShelf, family: str, features: tuple[int, int]) -> None:
    host, model = wrapped(shelf)
    kernel, x = shelf.put(FAMILIES[family](*features)).id, torch.randn(5, IN)
    told = (
        f"maps {features[0]} to {features[1]} features, but layer '0' maps {IN} to {OUT}; compile a blueprint with "
        f"in_features={IN}, out_features={OUT}."
    )
    assert not model.request_kernel("0", 0, kernel).result()
    assert told in model.kasmina_layers["0"].seed_errors[0]
    assert states(model)["0"] == ["ERROR_RECOVERY", *["DORMANT"] * 3]
    assert torch.equal(model(x), host(x))


def test_blueprints_of_other_features_are_refused_before_any_is_compiled(shelf: KernelShelf) -> None:
    host, model = wrapped(shelf)
    wanted = {"0": Blueprint.deepen(OUT, IN, 3, seed=77), "2": Blueprint.widen(OUT, 1, 3, seed=77)}
    request = model.request_kernels(["0", "2"], wanted)
    assert not request.result(0)
    assert list(request.errors) == ["0"]
    assert (
        f"the blueprint's kernel maps {OUT} to {IN} features, but layer '0' maps {IN} to {OUT}" in request.errors["0"]
    )
    submitted = {each.id for each in shelf.platform.store.blueprints.list(limit=1000)}
    assert submitted.isdisjoint(each.id for each in wanted.values())
    assert states(model) == {"0": ["ERROR_RECOVERY", *["DORMANT"] * 3], "2": ["DORMANT"] * 4}
    x = torch.randn(5, IN)
    assert torch.equal(model(x), host(x))


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_one_feature_is_not_deepened_behind_a_norm_which_would_be_a_constant(shelf: KernelShelf, norm: Any) -> None:
    with pytest.raises(
        ArtifactError, match=r"norm must be 'none' where out_features is 1, since a norm of one feature"
    ):
        Blueprint.deepen(OUT, 1, 3, norm=norm)
    host, model = wrapped(shelf)
    load(model, "2", 0, shelf.put(Blueprint.deepen(OUT, 1, 3, norm="none")).id)
    x = torch.randn(5, IN)
    assert torch.equal(model(x), host(x))
