"""What wrapping costs while no seed is active: a wrapped model against the plain one, telemetry on.

Goal: compiled 1.00; eager at or below 0.75 on the smallest MLP and at or below 1.00 everywhere.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import nn

import esper
from benchmarks.harness import arguments, paired, ratio, report


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
    with tempfile.TemporaryDirectory() as folder, esper.Platform.embedded(folder) as platform:
        for name, (build, shape) in MODELS.items():
            torch.manual_seed(0)
            host = build().to(options.device)
            x = torch.randn(shape, device=options.device)
            wrapped = esper.wrap(copy.deepcopy(host), platform=platform)
            for compiled in (False, True):
                torch._dynamo.reset()
                plain_run = torch.compile(host, backend="inductor") if compiled else host
                esper_run = torch.compile(wrapped, backend="esper") if compiled else wrapped
                for kind in ("inference", "training"):
                    if kind == "inference":
                        pair = {"plain": inference(plain_run, x), "esper": inference(esper_run, x)}
                    else:
                        pair = {
                            "plain": training(plain_run, list(host.parameters()), x),
                            "esper": training(esper_run, list(wrapped.parameters()), x),
                        }
                    figures = paired(pair, options.rounds)
                    case = f"{name}, {'compiled' if compiled else 'eager'}, {kind}"
                    details[case] = figures
                    times = {each: sorted(values)[len(values) // 2] * 1e6 for each, values in figures.items()}
                    rows.append((case, times["plain"], times["esper"], ratio(figures, "esper", "plain")))

    def plot(axes: Axes) -> None:
        axes.barh([row[0] for row in rows][::-1], [row[3] for row in rows][::-1])
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_xlabel("wrapped / plain, median of paired rounds")
        axes.tick_params(axis="y", labelsize=7)

    report(
        "dormant_overhead",
        "A wrapped model with dormant seeds against the plain one",
        ("case", "plain, μs", "wrapped, μs", "ratio"),
        rows,
        details,
        plot,
        options,
    )


if __name__ == "__main__":
    main()
