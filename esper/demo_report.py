"""The report of `esper demo`: the tables in the terminal and the picture."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from esper.demo import DemoReport, Phase, Trace

__all__ = ["print_report", "save_picture"]

_GROWN, _CONTROL = "#c2570c", "#5b6770"


def print_report(report: DemoReport, console: Console) -> None:
    """Print accuracies, step times by phase, and the seed's events."""
    console.print(_accuracies(report))
    console.print(_verdict(report))
    console.print(_step_times(report))
    console.print(_events(report))
    console.print(f"kernel [bold]{report.artifact_id}[/bold]", soft_wrap=True)


def _accuracies(report: DemoReport) -> Table:
    table = Table(title="Accuracy on 540 images that were not trained on")
    for column in ("", "parameters", "steps", "accuracy"):
        table.add_column(column, justify="left" if not column else "right")
    steps, host = len(report.grown.loss), report.host_parameters
    submitted = next(phase.stop for phase in report.phases if phase.name == "host alone")
    rows = (
        ("before growth", host, submitted, report.accuracy_before),
        ("after growth", host + report.kernel_parameters, steps, report.accuracy_after),
        ("control, never grown", host, len(report.control.loss), report.accuracy_control),
    )
    for name, parameters, count, accuracy in rows:
        table.add_row(name, f"{parameters:,}", f"{count:,}", f"{accuracy:.2%}")
    return table


def _verdict(report: DemoReport) -> str:
    gain = (report.accuracy_after - report.accuracy_control) * 100
    if gain > 0:
        return f"Growth gained {gain:.2f} points of accuracy over the control."
    return f"Growth did not help on this seed: {-gain:.2f} points below the control."


def _step_times(report: DemoReport) -> Table:
    table = Table(title="Training step, milliseconds")
    for column in ("phase", "steps", "median", "worst"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    traces: list[tuple[Phase, Trace]] = [(phase, report.grown) for phase in report.phases if phase.stop > phase.start]
    traces.append((Phase("control (first step compiles)", 0, len(report.control.seconds)), report.control))
    for phase, trace in traces:
        times = [1e3 * seconds for seconds in trace.seconds[phase.start : phase.stop]]
        table.add_row(phase.name, f"{len(times):,}", f"{statistics.median(times):.2f}", f"{max(times):.2f}")
    return table


def _events(report: DemoReport) -> Table:
    table = Table(title="The seed's life")
    for column in ("seconds", "step", "event"):
        table.add_column(column, justify="left" if column == "event" else "right")
    for event in report.events:
        table.add_row(f"{event.seconds:.1f}", f"{event.step:,}", event.what)
    return table


def save_picture(report: DemoReport, path: Path) -> None:
    """Loss, alpha and step time over steps, as a PNG at `path`; missing folders are made."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, alpha, seconds) = plt.subplots(
        3, 1, figsize=(10, 8), sharex=True, height_ratios=(3, 1, 2), layout="constrained"
    )
    for trace, colour, label in ((report.control, _CONTROL, "control"), (report.grown, _GROWN, "grown")):
        smooth = _smoothed(trace.loss)
        loss.plot(np.arange(len(smooth)) + len(trace.loss) - len(smooth), smooth, color=colour, label=label)
    loss.set_yscale("log")
    loss.set_ylabel("training loss")
    loss.legend(loc="upper right")
    loss.set_title(
        f"Digits: {report.accuracy_after:.1%} grown, {report.accuracy_control:.1%} not, on unseen images", loc="left"
    )
    alpha.plot(report.grown.alpha, color=_GROWN)
    alpha.set_ylabel("alpha")
    alpha.set_ylim(-0.05, 1.05)
    seconds.plot(np.asarray(report.grown.seconds) * 1e3, ".", markersize=1.5, color=_GROWN)
    seconds.set_yscale("log")
    seconds.set_ylabel("step, ms")
    seconds.set_xlabel("training step")
    for axes in (loss, alpha, seconds):
        axes.spines[["top", "right"]].set_visible(False)
        for phase in report.phases:
            if phase.stop - phase.start > 1:
                axes.axvline(phase.stop, color="black", linewidth=0.6, alpha=0.35)
    for phase in report.phases:
        if phase.stop - phase.start > len(report.grown.loss) / 40:
            alpha.text((phase.start + phase.stop) / 2, 1.12, phase.name, ha="center", va="bottom", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smoothed(values: list[float], window: int = 100) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Mean over `window` steps."""
    window = max(1, min(window, len(values)))
    smoothed: np.ndarray[tuple[int], np.dtype[np.float64]] = np.convolve(values, np.ones(window) / window, "valid")
    return smoothed
