"""Where a `Grower` is in its cycle: waiting, probing, scoring, staging, trying, judging, or at its end."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from esper.growth.choosing import Choice
from esper.growth.measuring import PartialJudgement, PartialProbe

__all__ = ["Judging", "Probing", "Scores", "Scoring", "Stage", "Staging", "Stopped", "Trying", "Waiting"]


@dataclass(frozen=True)
class Waiting:
    """Until the step `due`."""

    due: int


@dataclass(frozen=True)
class Probing:
    """A batch goes forward and backward at each step, the first of them at the step `since`."""

    since: int
    probe: PartialProbe


@dataclass(frozen=True)
class Scores:
    """What came of a probe."""

    choice: Choice | None
    best: dict[str, Any] = field(default_factory=dict)
    """The numbers of the best candidate."""
    flops: int = 0
    compiling: Future[Any] | None = None
    """Of the choice's kernel."""


@dataclass(frozen=True)
class Scoring:
    """Candidates are scored on another thread, and the best one is compiled, since the last batch of the
    probe at step `since`."""

    since: int
    scores: Future[Scores]


@dataclass(frozen=True)
class Staging:
    """A choice becomes a kernel, and this comes into force."""

    since: int
    choice: Choice
    compiling: Future[Any]
    kernel: str = ""
    request: Future[bool] | None = None


@dataclass(frozen=True)
class Trying:
    """A kernel is in force since the step `since`: its alpha rises, then it is tried."""

    since: int
    choice: Choice
    kernel: str


@dataclass(frozen=True)
class Judging(Trying):
    """The trial is over: the kernel is judged by a batch at each step, and learns on between them."""

    judgement: PartialJudgement


@dataclass(frozen=True)
class Stopped:
    """Nothing more will grow."""

    reason: str


Stage = Waiting | Probing | Scoring | Staging | Trying | Judging | Stopped
