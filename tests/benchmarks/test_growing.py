"""What the benchmarks of growth say of their figures, and what they count."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import esper
from benchmarks import growth_characters as characters
from benchmarks import growth_depth as depth
from benchmarks import growth_size as size
from benchmarks import growth_size_tasks as size_tasks
from benchmarks import growth_teacher as teacher
from benchmarks.growing import (
    Arm,
    Pair,
    comparison_section,
    decayed,
    goal_section,
    interval,
    probe_flops,
    shown,
    steps_of,
)
from benchmarks.growth_skill_data import BATCH
from benchmarks.growth_skill_network import Shape, network
from esper.growth import GrowthRecord
from tests.kernel_shelf import KernelShelf

ROOT = Path(__file__).parent.parent.parent


def counted(loss: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def test_a_mean_comes_with_its_interval() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, round(half, 3)) == (2.0, 2.484)  # 4.303 standard errors, of two degrees of freedom
    assert shown([1.0, 2.0, 3.0], 1) == "2.0 ± 2.5"


def test_a_single_seed_has_no_interval() -> None:
    assert interval([1.5]) == (1.5, math.inf)
    assert shown([1.5]) == "1.500"


@pytest.mark.parametrize(
    ("ours", "factor", "more", "verdict"),
    [
        ([1.0, 1.05, 0.95], 0.6, False, "met"),
        ([1.0, 1.05, 0.95], 0.4, False, "missed"),
        ([1.0, 1.5, 0.8], 0.5, False, "missed, within the interval"),
        ([1.0, 1.5, 0.4], 0.5, False, "met, within the interval"),
        ([1.0, 1.05, 0.95], 0.4, True, "met"),
        ([1.0, 1.05, 0.95], 0.6, True, "missed"),
    ],
)
def test_a_goal_is_judged_by_pairs_of_seeds(ours: list[float], factor: float, more: bool, verdict: str) -> None:
    row = Pair("a", ours, [2.0, 2.0, 2.0], more).goal(factor)
    assert row[2:] == (f"{'at least' if more else 'at most'} {factor:g}", verdict)


def test_what_is_equal_has_met_its_goal_and_is_a_tie() -> None:
    pair = Pair("a", [1.0, 2.0], [1.0, 2.0])
    assert (pair.goal(1.0)[-1], pair.comparison()[-1]) == ("met", "a tie")


@pytest.mark.parametrize(
    ("ours", "more", "verdict"),
    [([1.0, 1.1, 0.9], False, "better"), ([1.0, 1.1, 0.9], True, "worse"), ([1.0, 3.0, 2.1], False, "a tie")],
)
def test_arms_are_compared_by_pairs_of_seeds(ours: list[float], more: bool, verdict: str) -> None:
    assert Pair("a", ours, [2.0, 2.1, 1.9], more).comparison()[-1] == verdict


def test_goals_and_comparisons_are_tables() -> None:
    pair = Pair("a", [1.0, 1.0], [2.0, 2.0])
    assert goal_section([pair.goal(0.6)]).rows == [("a", "0.500", "at most 0.6", "met")]
    assert comparison_section([pair]).rows == [("a", "0.500", "better")]


def test_an_arm_gathers_seeds() -> None:
    arm = Arm("a")
    arm.add(1.0, 5.0, 0.1, more=2.0)
    arm.add(3.0, 5.0, 0.1, more=4.0)
    assert (arm.mean, arm.more) == (2.0, {"more": [2.0, 4.0]})


def test_a_decayed_rate_ends_at_zero_and_is_given_back() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    seen: list[float] = []
    steps_of(optimizer, lambda: weight.sum(), 4, decayed, seen)
    assert weight.item() == pytest.approx(1.0 - 0.1 * (1 + 1 + 1 + 0.5))
    assert (len(seen), optimizer.param_groups[0]["lr"], decayed(1.0)) == (4, 0.1, 0.0)


def test_a_probe_costs_its_moments_and_a_selection_more_with_each_unit() -> None:
    moments = 2 * 100 * (4 * 4 + 2 * 2 + 2 * 4)
    assert probe_flops(100, 3, 2, 0) == moments
    one, two, three = (probe_flops(100, 3, 2, chosen, proposals=7) for chosen in (1, 2, 3))
    assert two - one == three - two == 2 * 100 * 7 * 5
    assert one > moments + two - one


@pytest.mark.parametrize("hidden", [5, 10])
def test_flops_of_a_student_are_those_of_its_products(hidden: int) -> None:
    task = teacher.Task.made("relu", 0)
    model = nn.Sequential(nn.Linear(10, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, 10, bias=False))
    assert counted(lambda: task.loss(model)) == teacher.step_flops(hidden)


@pytest.mark.parametrize("kernels", [(0, 0, 0), (1, 1, 1), (0, 2, 1), (0, 0, 1)])
@pytest.mark.parametrize("frozen", [False, True])
def test_flops_of_a_skill_are_those_of_its_products(kernels: tuple[int, ...], frozen: bool) -> None:
    shape = Shape(Shape.of("digits", 64).layers, kernels)
    model = network(shape, 0)
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("kernels" in name)
        if not any(kernels):
            return
    x, y = torch.rand(BATCH, 64), torch.randint(10, (BATCH,))
    assert counted(lambda: F.cross_entropy(model(x), y)) == shape.step_flops(frozen=frozen)


def test_flops_of_a_character_model_are_those_of_its_products() -> None:
    text = characters.Text.load()
    model = characters.CharacterModel(text.characters, 0)
    contexts, following = next(text.batches(0))
    layers = characters.linear_layers(model)
    assert counted(lambda: F.cross_entropy(model(contexts), following)) == characters.step_flops(layers)


def test_a_model_that_grew_computes_as_much_as_one_that_had_its_depth_from_the_beginning(shelf: KernelShelf) -> None:
    experiment = depth.Experiment(0, 4, shelf.platform)
    model = esper.wrap(
        characters.CharacterModel(experiment.text.characters, 0, depth.SMALL), list(depth.ANYWHERE),
        seeds_per_layer=depth.BIG - depth.SMALL, platform=shelf.platform, commit="manual",
    )  # fmt: skip
    contexts, following = next(experiment.text.batches(0))
    before = model(contexts)
    kernels = experiment._kernels(depth.BEHIND)
    for place, blueprint in kernels.items():
        assert model.request_kernel(*place, shelf.put(blueprint).id, trainable=True).result()
    model.commit()
    assert len(kernels) == depth.BIG - depth.SMALL
    assert torch.equal(model(contexts), before)
    assert counted(lambda: F.cross_entropy(model(contexts), following)) == experiment.costs[depth.BIG]


@pytest.mark.slow
def test_a_model_that_grows_in_depth_is_measured_beside_its_controls(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.growth_depth", "--seeds", "2", "--budgets", "10", "20"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'passes'}"}
    subprocess.run([*command, "--results", str(tmp_path)], cwd=ROOT, env=environment, check=True, timeout=250)
    document = json.loads((tmp_path / "growth_depth.json").read_text(encoding="utf-8"))
    rows = [row[:2] for row in document["rows"]]
    assert all([steps, name] in rows for steps in (10, 20) for name in (depth.NEVER, depth.SCRATCH, depth.EQUAL))
    assert all([20, name] in rows for name in (depth.RANDOM_PLACE, depth.RANDOM_START))
    moved = {tuple(row[:2]): row[-1] for row in document["rows"]}
    assert moved[10, depth.GROWN] == moved[20, depth.GROWN] == "0.0e+00"
    assert (tmp_path / "growth_depth.png").exists()


def test_flops_of_a_frozen_character_model_are_those_of_its_kernels_and_what_leads_to_them() -> None:
    layers = {"a": (6, 4), "b": (4, 3)}
    rows = characters.BATCH
    ranks = {"a": 2, "b": 1}
    first, second = (nn.Linear(*sizes, bias=False).requires_grad_(False) for sizes in layers.values())
    lora = [
        (nn.Linear(i, r, bias=False), nn.Linear(r, o, bias=False))
        for (i, o), r in zip(layers.values(), (2, 1), strict=True)
    ]

    def loss() -> Tensor:
        x = torch.rand(rows, 6)
        for layer, (down, up) in zip((first, second), lora, strict=True):
            x = layer(x) + up(down(x))
        return x.sum()

    assert counted(loss) == characters.step_flops(layers, ranks)
    assert characters.low_rank_parameters(layers, ranks) == 2 * 10 + 7


@pytest.mark.parametrize("hidden", [0, 8])
@pytest.mark.parametrize("name", ["wine", "teacher 8"])
def test_flops_of_a_size_are_those_of_its_products(name: str, hidden: int) -> None:
    task = size_tasks.TASKS[name](0)
    model, batch = size.Model(task, hidden, 0), next(task.batches(0))
    assert counted(lambda: task.loss(model, batch)) == size.step_flops(task, hidden)


def test_flops_of_a_grower_are_those_of_every_size_that_it_had() -> None:
    task = size_tasks.TASKS["wine"](0)
    none, eight, sixteen = (size.step_flops(task, hidden) for hidden in (0, 8, 16))
    history = [
        GrowthRecord(100, "in force", width=8, compute_share=0.0),
        GrowthRecord(200, "kept", width=8, compute_share=0.5),
        GrowthRecord(300, "in force", width=8),
        GrowthRecord(400, "unloaded", width=8),
    ]
    flops, hidden = size.flops_of(task, history)
    trained = 100 * none + 200 * eight + 100 * sixteen + (size.STEPS - 400) * eight
    assert (flops, hidden) == (trained + 200 * none, 8)


@pytest.mark.parametrize("name", ["breast_cancer", "moons", "teacher 64"])
def test_what_is_judged_and_tested_on_is_not_trained_on(name: str) -> None:
    task = size_tasks.TASKS[name](1)
    rows = [{tuple(row) for row in part[0].tolist()} for part in (task.train, task.judged, task.test)]
    assert not rows[0] & rows[1]
    assert not (rows[0] | rows[1]) & rows[2]
    assert task.points(nn.Linear(task.features, task.outputs)) < 100.0


@pytest.mark.slow
def test_students_that_grow_are_measured_beside_their_controls(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.growth_teacher", "--seeds", "1", "--activations", "relu"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'passes'}"}
    subprocess.run([*command, "--results", str(tmp_path)], cwd=ROOT, env=environment, check=True, timeout=250)
    document = json.loads((tmp_path / "growth_teacher.json").read_text(encoding="utf-8"))
    names = [row[0] for row in document["rows"]]
    assert {"never grown: 5 neurons", "10 from scratch, equal steps", "10 from scratch, equal FLOPs, decayed"} <= {
        *names
    }
    assert {"Esper: selected", "Esper: random identity start"} <= {*names}
    assert (tmp_path / "growth_teacher.png").exists()
