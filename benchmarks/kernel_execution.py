"""The gain of an eager host by a kernel's compiled attachment, over running the kernel's graph.

Every kernel is compiled by the platform, as a user's would be, and loaded; the alternatives are its executor and its
module (the graph) on the same input, forward alone and forward with backward. The executor, "attachment" in the table,
runs the attachment where nothing is differentiated and where the platform measured it to be faster, and else the graph.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from matplotlib.axes import Axes

import esper
from benchmarks.harness import arguments, paired, ratio, report
from esper import Blueprint
from esper.artifacts import Target
from esper.execution.kernel_cache import KernelCache
from esper.execution.kernels.loaded_kernel import AttachedKernel

BLUEPRINTS: dict[str, Callable[[int], Blueprint]] = {
    "low rank 16": lambda width: Blueprint.low_rank(width, width, rank=16, start="kaiming"),
    "bottleneck 64": lambda width: Blueprint.bottleneck(width, width, rank=64, start="kaiming"),
    "gated MLP": lambda width: Blueprint.gated_mlp(width, width, hidden=2 * width, start="kaiming"),
    "residual MLP": lambda width: Blueprint.residual_mlp(width, width, hidden=width, start="kaiming"),
}
WIDTHS = (64, 512)
ROWS = (8, 128, 2048)


def with_backward(
    kernel: Callable[..., torch.Tensor], parameters: Sequence[torch.Tensor], *inputs: torch.Tensor
) -> Callable[[], object]:
    """Forward and backward to the inputs that need a gradient and to the parameters, as in training."""
    wanted = [each for each in inputs if each.requires_grad] + list(parameters)

    def run() -> object:
        return torch.autograd.grad(kernel(*inputs).sum(), wanted)

    return run


def without_gradient(
    kernel: Callable[..., torch.Tensor], _: Sequence[torch.Tensor], *inputs: torch.Tensor
) -> Callable[[], object]:
    """Forward alone."""

    def run() -> object:
        with torch.no_grad():
            return kernel(*inputs)

    return run


def unpack(executor: Callable[..., torch.Tensor]) -> None:
    """Wait until an attachment that is of use is unpacked, as it would be after the first forwards of an evaluation."""
    if isinstance(executor, AttachedKernel):
        attachment, deadline = executor.attachment, time.monotonic() + 300
        while any(attachment.for_rows(rows) is None and attachment.is_faster(rows) for rows in ROWS):
            if time.monotonic() > deadline:
                raise SystemExit("an attachment was not unpacked within 300 s")
            time.sleep(0.1)


def main() -> None:
    options = arguments(__doc__ or "")
    rows = []
    details = {}
    with tempfile.TemporaryDirectory() as folder, esper.Platform.embedded(folder) as platform:
        cache = KernelCache(source=platform.kernel_source)
        for name, build in BLUEPRINTS.items():
            for width in WIDTHS:
                artifact = platform.compile_sync(build(width))
                kernel = cache.fetch(artifact.id).place(options.device, trainable=True)
                esper.attach_from(platform.kernel_source, kernel)
                if platform.kernel_source.attachment(artifact.id, Target.current(options.device).key) is None:
                    raise SystemExit(f"{name}: the platform made no attachment for this machine")
                unpack(kernel.executor)
                for count in ROWS:
                    x = torch.randn(count, width, device=options.device, requires_grad=True)
                    inputs = (x, torch.randn_like(x)) if kernel.uses_host else (x,)
                    for kind, prepare in (("forward", without_gradient), ("both", with_backward)):
                        pair = {
                            "graph": prepare(kernel.module, kernel.parameters, *inputs),
                            "attachment": prepare(kernel.executor, kernel.parameters, *inputs),
                        }
                        figures = paired(pair, options.rounds, seconds=0.02)
                        case = f"{name}, {width} wide, {count} rows, {kind}"
                        details[case] = figures
                        times = {each: sorted(values)[len(values) // 2] * 1e6 for each, values in figures.items()}
                        rows.append((case, times["graph"], times["attachment"], ratio(figures, "attachment", "graph")))

    def plot(axes: Axes) -> None:
        axes.barh([row[0] for row in rows][::-1], [row[3] for row in rows][::-1])
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_xlabel("attachment / graph, median of paired rounds")
        axes.tick_params(axis="y", labelsize=5)

    report(
        "kernel_execution",
        "A kernel as an eager host runs it, against its graph",
        ("case", "graph, μs", "attachment, μs", "ratio"),
        rows,
        details,
        plot,
        options,
    )


if __name__ == "__main__":
    main()
