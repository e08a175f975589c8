"""Step time and memory of one model with 1 to 100,000 dormant seeds. Goal: flat.

Ten layers of 64, batch 64, training steps; each model against the plain one in the same rounds. Memory is the growth of
the process's resident set while the model is wrapped, beside the bytes that the seeds' state takes on the device.
"""

from __future__ import annotations

import copy
import gc
import tempfile

import psutil
import torch
from matplotlib.axes import Axes

import esper
from benchmarks.dormant_overhead import mlp, training
from benchmarks.harness import arguments, paired, ratio, report, stoppable

LAYERS = 10
SEEDS = (LAYERS, 100, 1_000, 10_000, 100_000)


def main() -> None:
    options = arguments(__doc__ or "")
    process = psutil.Process()
    torch.manual_seed(0)
    host = mlp(*[64] * (LAYERS + 1)).to(options.device)
    x = torch.randn(64, 64, device=options.device)
    rows = []
    details = {}
    with tempfile.TemporaryDirectory() as folder, esper.Platform.embedded(folder) as platform, stoppable():
        for total in (1, *SEEDS):
            targets = ["0"] if total == 1 else None
            gc.collect()
            before = process.memory_info().rss
            wrapped = esper.wrap(
                copy.deepcopy(host), targets, seeds_per_layer=max(total // LAYERS, 1), platform=platform
            )
            grown = (process.memory_info().rss - before) / 2**20
            torch._dynamo.reset()
            alternatives = {
                "plain": training(host, list(host.parameters()), x),
                "eager": training(wrapped, list(wrapped.parameters()), x),
                "plain compiled": training(torch.compile(host), list(host.parameters()), x),
                "compiled": training(torch.compile(wrapped, backend="esper"), list(wrapped.parameters()), x),
            }
            figures = paired(alternatives, options.rounds)
            details[str(total)] = figures
            state = wrapped.runtime.state.nbytes / 2**20
            eager, compiled = ratio(figures, "eager", "plain"), ratio(figures, "compiled", "plain compiled")
            rows.append((total, eager, compiled, state, grown))

    def plot(axes: Axes) -> None:
        axes.semilogx([row[0] for row in rows], [row[1] for row in rows], "o-", label="eager")
        axes.semilogx([row[0] for row in rows], [row[2] for row in rows], "s-", label="compiled")
        axes.set_ylim(0, 1.5)
        axes.set_xlabel("dormant seeds in the model")
        axes.set_ylabel("training step, wrapped / plain")
        axes.legend()

    report(
        "seed_scaling",
        "Dormant seeds: training step against the plain model, and memory",
        ("seeds", "eager ratio", "compiled ratio", "state, MiB", "resident growth, MiB"),
        rows,
        details,
        plot,
        options,
    )


if __name__ == "__main__":
    main()
