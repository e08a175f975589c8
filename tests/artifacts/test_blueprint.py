"""Blueprints: families, starts, determinism, canonical JSON and its refusals."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esper.artifacts import Blueprint, KernelGraph, Node, TensorSpec, build_artifact
from esper.artifacts.families import ACTIVATIONS, STARTS
from tests.artifacts.crafted import GRAPH_BLUEPRINT

Make = Callable[..., Blueprint]
FAMILIES: dict[str, Make] = {
    "low_rank": lambda **options: Blueprint.low_rank(8, 6, 3, **options),
    "bottleneck": lambda **options: Blueprint.bottleneck(8, 6, 3, **options),
    "gated_mlp": lambda **options: Blueprint.gated_mlp(8, 6, 5, **options),
    "residual_mlp": lambda **options: Blueprint.residual_mlp(8, 6, 5, depth=2, **options),
    "affine": lambda **options: Blueprint.affine(8, 6, **options),
    "deepen": lambda **options: Blueprint.deepen(8, 6, 5, **options),
    "widen": lambda **options: Blueprint.widen(8, 6, 5, **options),
}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def run(blueprint: Blueprint, x: Tensor, host: Tensor) -> Tensor:
    graph, tensors = blueprint.build()
    module = graph.to_module(tensors)
    return module(x, host) if graph.uses_host else module(x)


@each_family
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_builds_every_start_and_dtype(family: str, start: str, dtype: str) -> None:
    blueprint = FAMILIES[family](start=start, dtype=dtype)
    graph, tensors = blueprint.build()
    assert (graph.in_features, graph.out_features, graph.dtype) == (8, 6, dtype)
    assert all(tensor.dtype == DTYPES[dtype] for tensor in tensors.values())
    x, host = torch.randn(2, 3, 8).to(DTYPES[dtype]), torch.randn(2, 3, 6).to(DTYPES[dtype])
    output = run(blueprint, x, host)
    assert output.shape == (2, 3, 6)
    if start == "zero":
        assert torch.count_nonzero(output) == 0
    elif start == "identity":
        assert torch.equal(output, host)
        for alpha in (0.0, 0.3, 1.0):
            assert torch.equal(torch.lerp(host, output, alpha), host)
    else:
        assert output.float().std() > 0.01
    assert graph.uses_host == (start == "identity" or family == "deepen")


@each_family
@pytest.mark.parametrize("start", STARTS)
def test_every_start_learns(family: str, start: str) -> None:
    """A few steps of gradient descent lower the loss, whatever the start; in the end every weight has moved."""
    graph, tensors = FAMILIES[family](start=start, dtype="float64").build()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    module = graph.to_module(tensors)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 8, generator=generator, dtype=torch.float64)
    target = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    host = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        loss = F.mse_loss(module(x, host) if graph.uses_host else module(x), target)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    after = dict(zip(graph.tensor_names, module.parameters(), strict=True))
    assert all(not torch.equal(before[name], after[name]) for name in before)


def reference(family: str, p: Mapping[str, Tensor], x: Tensor, host: Tensor) -> Tensor:
    """The families, written down a second time."""
    if family == "deepen":
        n = F.layer_norm(host, (6,), p["norm.weight"], p["norm.bias"])
        return F.linear(F.gelu(F.linear(n, p["up.weight"], p["up.bias"])), p["down.weight"], p["down.bias"])
    if family == "low_rank":
        return x @ p["down.weight"].T @ p["up.weight"].T
    if family == "bottleneck":
        return F.linear(F.gelu(F.linear(x, p["down.weight"], p["down.bias"])), p["up.weight"], p["up.bias"])
    if family == "widen":
        return F.linear(F.gelu(F.linear(x, p["fan_in.weight"], p["fan_in.bias"])), p["fan_out.weight"])
    if family == "gated_mlp":
        return F.linear(F.silu(F.linear(x, p["gate.weight"])) * F.linear(x, p["up.weight"]), p["down.weight"])
    if family == "affine":
        return F.linear(x, p["linear.weight"], p["linear.bias"])
    h = F.linear(x, p["head.weight"], p["head.bias"])
    for i in range(2):
        n = F.layer_norm(h, (5,), p[f"blocks.{i}.norm.weight"], p[f"blocks.{i}.norm.bias"])
        n = F.gelu(F.linear(n, p[f"blocks.{i}.up.weight"], p[f"blocks.{i}.up.bias"]))
        h = h + F.linear(n, p[f"blocks.{i}.down.weight"], p[f"blocks.{i}.down.bias"])
    return F.linear(h, p["tail.weight"], p["tail.bias"])


@each_family
@pytest.mark.parametrize("start", ["kaiming", "orthogonal"])
def test_families_compute_what_they_say(family: str, start: str) -> None:
    blueprint = FAMILIES[family](start=start, dtype="float64")
    x, host = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(run(blueprint, x, host), reference(family, blueprint.build()[1], x, host))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }
    function = functions.get(activation) or getattr(F, activation)
    graph, tensors = Blueprint.bottleneck(8, 6, 3, activation=activation, start="kaiming", dtype="float64").build()
    x = torch.randn(4, 8, dtype=torch.float64)
    hidden = function(F.linear(x, tensors["down.weight"], tensors["down.bias"]))
    want = F.linear(hidden, tensors["up.weight"], tensors["up.bias"])
    torch.testing.assert_close(graph.to_module(tensors)(x), want)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "none"])
def test_residual_mlp_norms(norm: str) -> None:
    options = {"depth": 3, "norm": norm, "bias": False, "start": "kaiming"}
    graph, tensors = Blueprint.residual_mlp(8, 6, 5, **options).build()  # type: ignore[arg-type]  # mixed options
    assert sum(node.op == norm for node in graph.nodes) == (0 if norm == "none" else 3)
    assert graph.to_module(tensors)(torch.randn(8)).shape == (6,)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "none"])
def test_deepen_norms_what_the_site_has_computed(norm: str) -> None:
    options = {"norm": norm, "bias": False, "activation": "tanh", "start": "kaiming", "dtype": "float64"}
    blueprint = Blueprint.deepen(8, 6, 5, **options)  # type: ignore[arg-type]  # mixed options
    _, tensors = blueprint.build()
    host = torch.randn(3, 6, dtype=torch.float64)
    normed = {
        "layer_norm": lambda: F.layer_norm(host, (6,)),
        "rms_norm": lambda: F.rms_norm(host, (6,), eps=1e-6),
        "none": lambda: host,
    }[norm]()
    want = (normed @ tensors["up.weight"].T).tanh() @ tensors["down.weight"].T
    torch.testing.assert_close(run(blueprint, torch.randn(3, 8, dtype=torch.float64), host), want)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (33, 7), (7, 33), (1, 5), (2, 2), (5, 1), (1, 1)])
def test_orthogonal_is_orthogonal_and_mixed(rows: int, columns: int) -> None:
    _, tensors = Blueprint.affine(columns, rows, start="orthogonal", dtype="float64").build()
    weight = tensors["linear.weight"]
    gram = weight @ weight.T if rows <= columns else weight.T @ weight
    torch.testing.assert_close(gram, torch.eye(min(rows, columns), dtype=torch.float64), rtol=0, atol=1e-13)
    if min(rows, columns) > 2:  # dense, with entries of the size that a uniformly drawn rotation has
        assert (weight.abs() > 1e-6).double().mean() > 0.99
        normalised = weight * max(rows, columns) ** 0.5
        assert normalised.square().mean() == pytest.approx(1.0, rel=0.05)
        assert 2 < normalised.pow(4).mean() < 4  # 3 for large random rotations


def test_kaiming_has_the_variance_of_its_fan_in() -> None:
    _, tensors = Blueprint.affine(400, 300, start="kaiming").build()
    weight = tensors["linear.weight"]
    assert weight.var().item() == pytest.approx(2 / 400, rel=0.02)
    assert weight.abs().max() <= (6 / 400) ** 0.5
    assert torch.count_nonzero(tensors["linear.bias"]) == 0


def test_seed_and_name_decide_the_weights() -> None:
    first, again = (Blueprint.gated_mlp(8, 8, 8, start="kaiming", seed=1).build()[1] for _ in range(2))
    other = Blueprint.gated_mlp(8, 8, 8, start="kaiming", seed=2).build()[1]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(first["gate.weight"], first["up.weight"])
    big = Blueprint.affine(4, 4, start="kaiming", seed=2**32 + 1).build()[1]
    assert not torch.equal(
        big["linear.weight"], Blueprint.affine(4, 4, start="kaiming", seed=1).build()[1]["linear.weight"]
    )


def test_building_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    Blueprint.bottleneck(8, 8, 4, start="orthogonal").build()
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = Blueprint.bottleneck(8, 8, 4, start="kaiming").build()[1]
        torch.manual_seed(2)
        second = Blueprint.bottleneck(8, 8, 4, start="kaiming").build()[1]
    assert torch.equal(first["down.weight"], second["down.weight"])


def test_callers_modes_and_defaults_do_not_matter() -> None:
    blueprint = Blueprint.residual_mlp(16, 16, 8, start="orthogonal")
    wanted = build_artifact(blueprint, toolchain={})
    copied = Blueprint.from_graph(wanted.graph, dict(wanted.tensors))
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        with torch.inference_mode():
            artifact = build_artifact(Blueprint.from_json(blueprint.to_json()), toolchain={})
            again = Blueprint.from_json(copied.to_json()).build()[1]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert artifact.id == wanted.id
    for tensors in (artifact.tensors, again):
        assert all(torch.equal(tensors[name], wanted.tensors[name]) for name in wanted.tensors)
        assert not any(tensor.is_inference() for tensor in tensors.values())


GOLDEN = {
    "kaiming": "3c647e90aedf2b47a066a1d5662e80bf1dc5ee35137365eb2a3657029ef094e2",
    "orthogonal": "c1d1cb9eeabcf29890ceed08816b2751db7bb91d7dbb3065f8542aa5c89b610b",
}


@pytest.mark.parametrize("start", GOLDEN)
def test_weights_are_the_same_on_every_machine(start: str) -> None:
    """Digests that were recorded once: a change breaks the ids of every stored kernel."""
    blueprint = Blueprint.bottleneck(48, 40, 9, start=start, seed=5, dtype="float64")  # type: ignore[arg-type]  # a str
    assert build_artifact(blueprint, toolchain={}).id == GOLDEN[start]


def test_a_layer_behind_a_site_is_the_same_on_every_machine() -> None:
    """As above."""
    blueprint = Blueprint.deepen(48, 40, 9, start="kaiming", seed=5, dtype="float64")
    assert (
        build_artifact(blueprint, toolchain={}).id == "9b8413c54c677ac0d3b9e697f3fde91e0cb69aa21a8173ab12d5480899947431"
    )


SCRIPT = """
import sys, torch
torch.set_num_threads(int(sys.argv[1])); torch.manual_seed(int(sys.argv[1]))
from esper.artifacts import Blueprint, build_artifact
for start in ("identity", "kaiming", "orthogonal"):
    blueprint = Blueprint.residual_mlp(70, 50, 33, depth=2, start=start, seed=3, dtype="float64")
    print(blueprint.id, build_artifact(blueprint, toolchain={"b": "2", "a": "1"}).id)
"""


@pytest.mark.slow
def test_ids_are_equal_in_any_process() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT, threads],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in (("0", "1"), ("12345", "2"))
    }
    assert len(outputs) == 1
    assert len(outputs.pop().split()) == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_what_nobody_chose_a_start_for_changes_nothing_at_any_share(family: str) -> None:
    graph, tensors = FAMILIES[family]().build()
    x, y = torch.randn(3, 8), torch.randn(3, 6)
    output = graph.to_module(tensors)(x, y)
    assert all(torch.equal(torch.lerp(y, output, alpha), y) for alpha in (0.0, 0.3, 1.0))


def test_the_id_of_a_start_that_is_given_is_what_it_was() -> None:
    text = (
        '{"activation":"gelu","bias":true,"dtype":"float32","family":"bottleneck","in_features":8,"out_features":6,'
        '"rank":2,"schema":1,"seed":0,"start":"zero"}'
    )
    assert Blueprint.bottleneck(8, 6, 2, start="zero").id == hashlib.sha256(text.encode()).hexdigest()


def test_canonical_json_and_id() -> None:
    blueprint = Blueprint.bottleneck(8, 6, 2)
    text = blueprint.to_json()
    assert text == (
        '{"activation":"gelu","bias":true,"dtype":"float32","family":"bottleneck","in_features":8,"out_features":6,'
        '"rank":2,"schema":1,"seed":0,"start":"identity"}'
    )
    short = {"rank": 2, "family": "bottleneck", "out_features": 6, "in_features": 8}
    for source in (text, text.encode(), json.loads(text), short, json.dumps(short, indent=2)):
        other = Blueprint.from_json(source)
        assert other == blueprint
        assert other.id == blueprint.id
        assert hash(other) == hash(blueprint)
    assert pickle.loads(pickle.dumps(blueprint)) == blueprint
    assert Blueprint.bottleneck(8, 6, 3).id != blueprint.id
    assert repr(blueprint).startswith("Blueprint(bottleneck, 8 -> 6, float32, id=")


def test_graph_blueprint_draws_and_keeps_weights() -> None:
    blueprint = Blueprint.from_json(GRAPH_BLUEPRINT)
    graph, tensors = blueprint.build()
    assert torch.equal(tensors["b"], torch.tensor([1.0, -2.0]))
    assert tensors["w"].abs().sum() > 0
    assert Blueprint.from_json(blueprint.to_json()) == blueprint
    same = Blueprint.from_graph(graph, {"w": "kaiming", "b": tensors["b"]}, seed=4)
    assert same.id == blueprint.id
    assert graph.to_module(tensors)(torch.zeros(4)).tolist() == [1.0, -2.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_survive_json_bit_for_bit(dtype: str) -> None:
    graph = KernelGraph(3, 3, dtype, (TensorSpec("w", (3,), dtype),), (Node("y", "mul", ("x", "w"), {}),), "y")
    weight = torch.tensor([1 / 3, -0.0, 1e-7]).to(DTYPES[dtype])
    _, tensors = Blueprint.from_json(Blueprint.from_graph(graph, {"w": weight}).to_json()).build()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]
    assert torch.equal(tensors["w"].view(bits), weight.view(bits))
