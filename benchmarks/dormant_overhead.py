"""The cost of wrapping while no seed is active: a wrapped model, in either mode, against the plain one; telemetry on.

Goal: 1.00, and with mode="fx" at or below 0.75 for the smallest MLP, uncompiled.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import nn

import esper
from benchmarks.harness import arguments, paired, ratio, report, stoppable


class Block(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for first, second in pairwise(widths):
        layers += [nn.Linear(first, second), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 10-20-5, batch 4": (lambda: mlp(10, 20, 5), (4, 10)),
    "MLP 784-256-10, batch 128": (lambda: mlp(784, 256, 10), (128, 784)),
    "MLP 1024-2048-1024, batch 64": (lambda: mlp(1024, 2048, 1024), (64, 1024)),
    "transformer, 4 blocks of 64": (lambda: nn.Sequential(*[Block(64, 4) for _ in range(4)]), (8, 32, 64)),
}


MODES: tuple[Literal["module", "fx"], ...] = ("module", "fx")


def run_of(name: str, model: nn.Module, compiled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """What is timed of a model."""
    return torch.compile(model, backend="inductor" if name == "plain" else "esper") if compiled else model


def inference(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], object]:
    """A forward without gradients."""

    def run() -> object:
        with torch.no_grad():
            return model(x)

    return run


def training(
    model: Callable[[torch.Tensor], torch.Tensor], parameters: list[nn.Parameter], x: torch.Tensor
) -> Callable[[], object]:
    """Forward, backward and an SGD step."""
    optimizer = torch.optim.SGD(parameters, lr=1e-6)

    def run() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return run


def main() -> None:
    options = arguments(__doc__ or "")
    rows = []
    details = {}
    with tempfile.TemporaryDirectory() as folder, esper.Platform.embedded(folder) as platform, stoppable():
        for name, (build, shape) in MODELS.items():
            torch.manual_seed(0)
            host = build().to(options.device)
            x = torch.randn(shape, device=options.device)
            models = {"plain": host}
            models |= {mode: esper.wrap(copy.deepcopy(host), platform=platform, mode=mode) for mode in MODES}
            for compiled in (False, True):
                torch._dynamo.reset()
                runs = {each: run_of(each, model, compiled) for each, model in models.items()}
                for kind in ("inference", "training"):
                    if kind == "inference":
                        alternatives = {each: inference(run, x) for each, run in runs.items()}
                    else:
                        alternatives = {
                            each: training(run, list(models[each].parameters()), x) for each, run in runs.items()
                        }
                    figures = paired(alternatives, options.rounds)
                    case = f"{name}, {'compiled' if compiled else 'eager'}, {kind}"
                    details[case] = figures
                    times = {each: sorted(values)[len(values) // 2] * 1e6 for each, values in figures.items()}
                    ours = [value for mode in MODES for value in (times[mode], ratio(figures, mode, "plain"))]
                    rows.append((case, times["plain"], *ours))

    def plot(axes: Axes) -> None:
        for place, (mode, column) in enumerate(zip(MODES, (3, 5), strict=True)):
            heights = [len(rows) - index - 0.2 - 0.4 * place for index in range(len(rows))]
            axes.barh(heights, [row[column] for row in rows], height=0.4, label=f'mode="{mode}"')
        axes.set_yticks([len(rows) - index - 0.4 for index in range(len(rows))], [row[0] for row in rows])
        axes.legend()
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_xlabel("wrapped / plain, median of paired rounds")
        axes.tick_params(axis="y", labelsize=7)

    report(
        "dormant_overhead",
        "A wrapped model with dormant seeds against the plain one",
        ("case", "plain, μs", "module, μs", "module / plain", "fx, μs", "fx / plain"),
        rows,
        details,
        plot,
        options,
    )


if __name__ == "__main__":
    main()
