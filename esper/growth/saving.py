"""A `Grower`'s stage as data, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from esper.artifacts import Blueprint
from esper.core.errors import TargetError
from esper.errors import shown
from esper.futures import InterruptSafeFuture
from esper.growth.choosing import Choice
from esper.growth.costs import Clock, Costs
from esper.growth.errors import GrowthError
from esper.growth.history import GrowthRecord, LossCurve
from esper.growth.measuring import PartialJudgement, PartialProbe
from esper.growth.stages import Judging, Probing, Scores, Scoring, Stage, Staging, Stopped, Trying, Waiting

__all__ = ["VERSION", "LoadedState", "Makers", "loaded_stage", "saved_stage"]

VERSION = 2

Compile = Callable[[Blueprint], Future[Any]]


@dataclass(frozen=True)
class Makers:
    """How a grower makes what is no data."""

    compile: Compile
    probe: Callable[[Mapping[str, Any]], PartialProbe]
    judgement: Callable[[Choice, Mapping[str, Any]], PartialJudgement]


def saved_stage(stage: Stage) -> dict[str, Any]:
    """`stage` as numbers, texts, lists and dicts; waits for candidates to be scored, and not for compilers."""
    if isinstance(stage, Waiting):
        return {"kind": "waiting", "due": stage.due}
    if isinstance(stage, Stopped):
        return {"kind": "stopped", "reason": stage.reason}
    if isinstance(stage, Probing):
        return {"kind": "probing", "since": stage.since, "probe": stage.probe.state()}
    if isinstance(stage, Scoring):
        error = stage.scores.exception()
        state: dict[str, Any] = {"kind": "scoring", "since": stage.since, "error": error and f"{error}"}
        if error is None:
            scores = stage.scores.result()
            choice = scores.choice and scores.choice.state()
            state |= {"choice": choice, "best": dict(scores.best), "flops": scores.flops}
        return state
    state = {"since": stage.since, "choice": stage.choice.state()}
    if isinstance(stage, Staging):
        return state | {"kind": "staging"}
    if isinstance(stage, Judging):
        return state | {"kind": "judging", "kernel": stage.kernel, "losses": stage.judgement.state()}
    return state | {"kind": "trying", "kernel": stage.kernel}


def loaded_stage(state: Mapping[str, Any], makers: Makers) -> Stage:
    """What :func:`saved_stage` made; kernels that are not there yet are asked for again."""
    kind = state["kind"]
    if kind == "waiting":
        return Waiting(int(state["due"]))
    if kind == "stopped":
        return Stopped(str(state["reason"]))
    if kind == "probing":
        return Probing(int(state["since"]), makers.probe(state["probe"]))
    if kind == "scoring":
        return Scoring(int(state["since"]), _scores(state, makers.compile))
    choice = Choice.from_state(state["choice"])
    if kind == "staging":
        return Staging(int(state["since"]), choice, makers.compile(choice.blueprint))
    if kind == "trying":
        return Trying(int(state["since"]), choice, str(state["kernel"]))
    if kind == "judging":
        judgement = makers.judgement(choice, state["losses"])
        return Judging(int(state["since"]), choice, str(state["kernel"]), judgement)
    raise GrowthError(f"a grower's stage is none of {shown(kind)}")


def _scores(state: Mapping[str, Any], compiler: Compile) -> Future[Scores]:
    future: Future[Scores] = InterruptSafeFuture()
    if state["error"] is not None:
        future.set_exception(GrowthError(str(state["error"])))
        return future
    choice = None if state["choice"] is None else Choice.from_state(state["choice"])
    compiling = None if choice is None else compiler(choice.blueprint)
    future.set_result(Scores(choice, dict(state["best"]), int(state["flops"]), compiling))
    return future


class LoadedState:
    """A grower's state as it was saved, checked. Raises :class:`GrowthError`."""

    def __init__(self, state: Any, makers: Makers) -> None:
        version = state.get("version") if isinstance(state, Mapping) else None
        if version != VERSION:
            raise GrowthError(f"this is not what Grower.state_dict() of this version returned: version {version!r}")
        try:
            self.numbers = {name: int(state[name]) for name in ("steps", "spent", "misses", "round")}
            self.history = [GrowthRecord(**each) for each in state["history"]]
            self.curve = LossCurve(**state["curve"])
            self.costs = Costs(**state["costs"])
            self.unseen, self.warned = set(state["unseen"]), bool(state["warned"])
            self.bad_loss: float | None = state["bad_loss"]
            self.clock = Clock(**state["clock"])
            self.stage = loaded_stage(state["stage"], makers)
        except (KeyError, TargetError, TypeError, ValueError) as cause:
            raise GrowthError(f"a grower's state is damaged: {type(cause).__name__}: {cause}") from cause
