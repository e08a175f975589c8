"""A network with kernels at every layer, by hand and by Esper, in one process; `benchmarks.apart` calls it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import esper
from benchmarks.dormant_overhead import inference, training
from benchmarks.harness import Figures, paired
from benchmarks.workloads import MlpBlock

__all__ = ["active_side"]

_WIDTH, _BLOCKS, _BATCH, _RANK, _ALPHA = 128, 2, 64, 16, 0.25
_PATIENCE = 600.0


class GrownLinear(nn.Module):
    """A linear layer with kernels, as one would write it."""

    def __init__(self, linear: nn.Linear, weights: Mapping[str, Tensor], seeds: int) -> None:
        super().__init__()
        self.linear = linear
        width = weights["down.bias"].shape[0]
        kernel = nn.Sequential()
        kernel.add_module("down", nn.Linear(linear.in_features, width))
        kernel.add_module("activation", nn.GELU())
        kernel.add_module("up", nn.Linear(width, linear.out_features))
        kernel.load_state_dict(dict(weights))
        self.kernels = nn.ModuleList([copy.deepcopy(kernel) for _ in range(seeds)])
        self.register_buffer("alphas", torch.full((seeds,), _ALPHA))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        alphas = self.get_buffer("alphas")
        for i, kernel in enumerate(self.kernels):
            y = torch.lerp(y, kernel(x), alphas[i])
        return y


def active_side(seeds: int, batch_seeds: bool, device: str, rounds: int, platform: str) -> dict[str, Figures]:
    """Seconds of a forward without gradients and of a training step, by "hand" and by "esper", in turn.

    Every linear layer has `seeds` kernels in force, all of one blueprint, each with parameters of its own that learn.
    Raises `RuntimeError` if the two networks do not compute the same.
    """
    torch.manual_seed(0)
    host = nn.Sequential(*[MlpBlock(_WIDTH) for _ in range(_BLOCKS)])
    by_hand = copy.deepcopy(host)
    with esper.Platform.embedded(Path(platform)) as shelf:
        model = esper.wrap(host.to(device), seeds_per_layer=seeds, commit="manual", platform=shelf)
        for name in model.kasmina_layers:
            linear = cast(nn.Linear, by_hand.get_submodule(name))
            blueprint = esper.Blueprint.bottleneck(linear.in_features, linear.out_features, _RANK, start="kaiming")
            by_hand.set_submodule(name, GrownLinear(linear, blueprint.build()[1], seeds))
            _load(model, name, shelf.compile_sync(blueprint).id, seeds)
        model.commit()
        by_hand.to(device)
        x = torch.randn(_BATCH, _WIDTH, device=device)
        runs = {
            "hand": (torch.compile(by_hand), list(by_hand.parameters())),
            "esper": (
                torch.compile(model, backend="esper", options={"batch_seeds": batch_seeds}),
                [*host.parameters(), *model.seed_parameters()],
            ),
        }
        _check_agreement({name: run for name, (run, _) in runs.items()}, x, host, by_hand)
        forwards: dict[str, Callable[[], object]] = {name: inference(run, x) for name, (run, _) in runs.items()}
        steps: dict[str, Callable[[], object]] = {name: training(*both, x) for name, both in runs.items()}
        return {"forward": paired(forwards, rounds), "training": paired(steps, rounds)}


def _load(model: esper.MorphableModel, name: str, kernel: str, seeds: int) -> None:
    asked = [model.request_kernel(name, seed, kernel, alpha=_ALPHA, trainable=True) for seed in range(seeds)]
    if not all(each.result(_PATIENCE) for each in asked):
        raise RuntimeError(f"a kernel was not loaded: {model.kasmina_layers[name].seed_errors}")


def _check_agreement(runs: Mapping[str, Callable[[Tensor], Any]], x: Tensor, host: nn.Module, hand: nn.Module) -> None:
    hand_out, esper_out = runs["hand"](x), runs["esper"](x)
    for out in (hand_out, esper_out):
        out.square().mean().backward()
    gradients = host.get_parameter("0.fc1.weight").grad, hand.get_parameter("0.fc1.linear.weight").grad
    for ours, theirs in ((esper_out, hand_out), gradients):
        try:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        except AssertionError as error:
            raise RuntimeError(f"the network by hand and Esper's disagree: {error}") from error
