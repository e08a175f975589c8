"""What a `Grower` did: records of its decisions, their table, and the course of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from esper.contracts.messages import GrowthReport
from esper.growth.errors import GrowthError

__all__ = ["GrowthEvent", "GrowthRecord", "LossCurve", "plotted", "table"]

GrowthEvent = Literal["nothing", "chosen", "in force", "kept", "unloaded", "removed", "failed", "left out", "stopped"]

_MOST_POINTS = 2000


@dataclass(frozen=True)
class GrowthRecord:
    """One decision of a :class:`~esper.growth.Grower`, with its numbers; what does not apply is None or empty."""

    step: int
    """Of the grower: how often its `step` was called. Never less than that of the record before.

    What a probe comes to is of the step of its last batch.
    """
    event: GrowthEvent
    """`nothing` scored; a candidate was `chosen`; it is `in force`; it was `kept` or `unloaded` after its trial; others
    `removed` it; something `failed`; a layer is `left out`; the grower has `stopped`."""
    layer: str = ""
    seed: int | None = None
    width: int | None = None
    """Hidden units."""
    parameters: int = 0
    """That the kernel adds."""
    gain: float | None = None
    """The natural expansion score: the decrease of the loss that is expected in the natural metric of the gradients."""
    host_gain: float | None = None
    """The same, of what the layer's own parameters can do."""
    loss: float | None = None
    """The running mean of the losses that the grower was told."""
    loss_with: float | None = None
    """On the judging batches, with the kernel's alpha at 1."""
    loss_without: float | None = None
    """The same with its alpha at 0."""
    seconds: float = 0.0
    """That the training thread was held up by the grower since the record before, waits included."""
    compute_share: float | None = None
    """FLOPs of all probes, scores and trials so far, as a share of those of the whole run."""
    reason: str = ""

    @property
    def score(self) -> float | None:
        """The gain per added parameter."""
        return None if self.gain is None or not self.parameters else self.gain / self.parameters

    @property
    def ratio(self) -> float | None:
        """The gain relative to the host's own; infinite where the host has none."""
        if self.gain is None or self.host_gain is None:
            return None
        return self.gain / self.host_gain if self.host_gain > 0 else math.copysign(math.inf, self.gain)

    def state(self) -> dict[str, Any]:
        """As data."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def report(self) -> GrowthReport:
        """As a message."""
        return GrowthReport(**self.state())


_COLUMNS = (  # heading, attribute, form
    ("step", "step", "{}"),
    ("event", "event", "{}"),
    ("layer", "layer", "{}"),
    ("width", "width", "{}"),
    ("parameters", "parameters", "{:,}"),
    ("gain", "gain", "{:.3g}"),
    ("gain/host's", "ratio", "{:.3g}"),
    ("loss with", "loss_with", "{:.4g}"),
    ("loss without", "loss_without", "{:.4g}"),
    ("seconds", "seconds", "{:.3f}"),
    ("compute", "compute_share", "{:.2%}"),
    ("reason", "reason", "{}"),
)


def table(records: Sequence[GrowthRecord], head: str) -> str:
    """`records` as text, below the line `head`."""
    rows = [[name for name, _, _ in _COLUMNS], *([_cell(each, *column) for _, *column in _COLUMNS] for each in records)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([head, *lines])


def _cell(record: GrowthRecord, attribute: str, form: str) -> str:
    value = getattr(record, attribute)
    return "" if value is None or value == "" or (attribute == "parameters" and not value) else form.format(value)


@dataclass
class LossCurve:
    """The losses of a run, of at most 2000 steps, evenly apart, and their running mean."""

    every: int = 1
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    mean: float | None = None

    def add(self, step: int, loss: float) -> None:
        """A finite loss."""
        self.mean = loss if self.mean is None else 0.98 * self.mean + 0.02 * loss
        if step % self.every:
            return
        self.steps.append(step)
        self.losses.append(loss)
        if len(self.steps) > _MOST_POINTS:
            self.every *= 2
            kept = [place for place, each in enumerate(self.steps) if not each % self.every]
            self.steps = [self.steps[place] for place in kept]
            self.losses = [self.losses[place] for place in kept]

    def state(self) -> dict[str, Any]:
        """As data."""
        return {"every": self.every, "steps": list(self.steps), "losses": list(self.losses), "mean": self.mean}


_COLOURS = {"in force": "#5b6770", "kept": "#2f7d32", "unloaded": "#c2570c", "failed": "#b00020", "removed": "#7b1fa2"}


def plotted(curve: LossCurve, records: Sequence[GrowthRecord], path: str | Path) -> Path:
    """Draw the loss and what was grown into the picture `path`. Raises :class:`GrowthError` without matplotlib."""
    try:
        from matplotlib.figure import Figure  # a plain figure: no window, and none of the user's settings of pyplot
    except ImportError as cause:
        raise GrowthError("a picture needs matplotlib: pip install matplotlib") from cause
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve.steps, curve.losses, color="#9aa5ad", linewidth=0.8, label="loss")
    named: set[str] = set()
    for record in records:
        if record.event in _COLOURS:
            label = None if record.event in named else record.event
            named.add(record.event)
            axes.axvline(record.step, color=_COLOURS[record.event], linewidth=1.2, linestyle="--", label=label)
        if record.event == "in force":
            text = f"{record.layer} +{record.width}"
            axes.annotate(
                text, (record.step, 1), xycoords=("data", "axes fraction"), rotation=90, fontsize=7,
                xytext=(2, -2), textcoords="offset points", va="top",
            )  # fmt: skip
    if curve.losses and min(curve.losses) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(loc="upper right")
    path = Path(path)
    figure.savefig(path, dpi=120)
    return path
