"""Kernels compose: any number, order, start, share and fossils, uncompiled in both modes and compiled."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import Blueprint
from tests.composition import ADDED, AFFINE, IN, KINDS, OUT, Planted, composed
from tests.core.seeds import load, outputs
from tests.kernel_shelf import KernelShelf

SEEDS = 5
MODES: Any = ["module", "fx"]
RUNS: dict[str, Callable[[nn.Module], Any]] = {
    "uncompiled": lambda model: model,
    "esper": lambda model: torch.compile(model, backend="esper", options={"inner": "eager"}),
    "another backend": lambda model: torch.compile(model, backend="eager"),
}


@dataclass
class Program:
    """Kernels to be loaded into seeds, in some order, and those to be made fossils afterwards, in some order."""

    kinds: dict[int, tuple[str, float, bool]]
    """By seed: kind, alpha, isolate."""
    loads: list[int]
    fossils: list[int]

    @classmethod
    def random(cls, number: int) -> Program:
        """Every third with kernels alone that can be folded, or that can be folded behind others."""
        draw = random.Random(number)
        kinds = [list(KINDS), AFFINE, [*ADDED, *ADDED, *KINDS]][number % 3]
        seeds = draw.sample(range(SEEDS), draw.randint(1, SEEDS))
        fossils = draw.sample(seeds, draw.randint(0, len(seeds)))
        share = {seed: draw.choice([0.0, 0.25, 0.5, 1.0]) for seed in seeds}
        isolated = {seed: draw.random() < 0.2 for seed in seeds}
        return cls({seed: (draw.choice(kinds), share[seed], isolated[seed]) for seed in seeds}, seeds, fossils)


def grown(shelf: KernelShelf, program: Program, mode: Any, bias: bool = True) -> tuple[esper.MorphableModel, list[Any]]:
    """A model of one layer with the kernels of `program`, their parameters drawn, and the same for the formula."""
    model = esper.wrap(
        nn.Sequential(nn.Linear(IN, OUT, bias=bias)).double(), seeds_per_layer=SEEDS, platform=shelf.platform, mode=mode
    )
    layer, planted = model.kasmina_layers["0"], {}
    for seed in program.loads:
        kind, alpha, isolate = program.kinds[seed]
        artifact = shelf.put(KINDS[kind].blueprint(seed, "float64"))
        load(model, "0", seed, artifact.id, alpha=alpha, trainable=True, isolate=isolate)
        parameters = dict(zip(artifact.graph.tensor_names, layer.kernel_parameters(seed), strict=True))
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.copy_(torch.randn_like(parameter))
        planted[seed] = Planted(kind, parameters, alpha, isolate)
    return model, [planted[seed] for seed in sorted(planted)]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_any_program_computes_the_formula(shelf: KernelShelf, mode: Any, run: str, fresh_dynamo: None) -> None:
    for number in range(30 if run == "uncompiled" else 6):
        torch._dynamo.reset()
        program = Program.random(number)
        model, planted = grown(shelf, program, mode, bias=number % 4 != 3)
        host = model.get_parameter("0.weight"), dict(model.named_parameters()).get("0.bias")
        weight, bias = (None if each is None else each.detach().clone().requires_grad_() for each in host)
        assert weight is not None
        call, x = RUNS[run](model), torch.randn(3, IN, dtype=torch.double, requires_grad=True)
        kernels = [each for seed in planted for each in seed.parameters.values()]
        agrees(call(x), composed(x, weight, bias, planted), [x, *kernels], [x, *kernels])
        agrees(call(x), composed(x, weight, bias, planted), [host[0]], [weight])
        for seed in program.fossils:
            assert model.fossilize("0", seed)
            agrees(call(x), composed(x, weight, bias, planted), [x], [x])
        left = list(model.seed_parameters())
        agrees(call(x), composed(x, weight, bias, planted), left, left)


def agrees(output: Tensor, expected: Tensor, ours: list[Any], theirs: list[Any]) -> None:
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    if not ours:
        return
    wanted = torch.autograd.grad(expected.square().sum(), theirs, allow_unused=True, materialize_grads=True)
    got = torch.autograd.grad(output.square().sum(), ours, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_one_that_was_just_loaded_changes_nothing_wherever_it_is_put(
    shelf: KernelShelf, mode: Any, run: str, fresh_dynamo: None
) -> None:
    """Among kernels that have learned, fossils that were folded and fossils that were not."""
    kinds = {1: ("affine, added", 0.5, False), 2: ("bottleneck", 0.5, False), 3: ("gated, added", 0.5, False)}
    model, _ = grown(shelf, Program(kinds, [3, 1, 2], []), mode)
    assert model.fossilize("0", 1)
    assert model.fossilize("0", 2)
    call, x = RUNS[run](model), torch.randn(3, IN, dtype=torch.double)
    before = outputs(call, x)
    family = Blueprint.bottleneck(IN, OUT, 3, dtype="float64")
    for seed, alpha in ((0, 1.0), (4, 0.5)):
        load(model, "0", seed, shelf.put(family).id, alpha=alpha, trainable=True)
        torch.testing.assert_close(outputs(call, x), before, rtol=1e-12, atol=1e-12)
    model.set_alpha("0", 0, 0.25)
    torch.testing.assert_close(outputs(call, x), before, rtol=1e-12, atol=1e-12)
    call(x).square().sum().backward()
    layer = model.kasmina_layers["0"]
    for seed in (0, 3, 4):
        gradients = [parameter.grad for parameter in layer.kernel_parameters(seed)]
        assert any(gradient is not None and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("mode", MODES)
def test_an_isolated_kernel_hands_on_as_much_gradient_as_it_leaves_of_the_output(shelf: KernelShelf, mode: Any) -> None:
    """At alpha 1 none, at less the rest: it detaches what it is given, and the blend does not."""
    kinds = {0: ("bottleneck, added", 1.0, False), 1: ("bottleneck, added", 1.0, True)}
    model, _ = grown(shelf, Program(kinds, [0, 1], []), mode)
    x = torch.randn(3, IN, dtype=torch.double)
    layer = model.kasmina_layers["0"]
    found = {}
    for alpha in (1.0, 0.75):
        model.set_alpha("0", 1, alpha)
        model.zero_grad()
        model(x).sum().backward()
        found[alpha] = [float(layer.kernel_parameters(seed)[-1].grad.abs().sum()) for seed in (0, 1)]  # type: ignore[union-attr]  # they have gradients
    assert found[1.0][0] == 0.0
    assert found[0.75][0] == pytest.approx(0.25 * OUT * 3)
    assert found[1.0][1] == pytest.approx(OUT * 3)
