"""A `Grower`'s stage as data, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from esper.artifacts import Blueprint
from esper.errors import shown
from esper.futures import InterruptSafeFuture
from esper.growth.choosing import Choice
from esper.growth.costs import Costs
from esper.growth.errors import GrowthError
from esper.growth.history import GrowthRecord, LossCurve
from esper.growth.stages import Scores, Scoring, Stage, Staging, Stopped, Trying, Waiting

__all__ = ["VERSION", "LoadedState", "loaded_stage", "saved_stage"]

VERSION = 1

Compile = Callable[[Blueprint], Future[Any]]


def saved_stage(stage: Stage) -> dict[str, Any]:
    """`stage` as numbers, texts, lists and dicts; waits for candidates to be scored, and not for compilers."""
    if isinstance(stage, Waiting):
        return {"kind": "waiting", "due": stage.due}
    if isinstance(stage, Stopped):
        return {"kind": "stopped", "reason": stage.reason}
    if isinstance(stage, Scoring):
        error = stage.scores.exception()
        state: dict[str, Any] = {"kind": "scoring", "since": stage.since, "error": error and f"{error}"}
        if error is None:
            scores = stage.scores.result()
            choice = scores.choice and scores.choice.state()
            state |= {"choice": choice, "best": dict(scores.best), "flops": scores.flops}
        return state
    state = {"since": stage.since, "choice": stage.choice.state()}
    return state | ({"kind": "staging"} if isinstance(stage, Staging) else {"kind": "trying", "kernel": stage.kernel})


def loaded_stage(state: Mapping[str, Any], compiler: Compile) -> Stage:
    """What :func:`saved_stage` made; kernels that are not there yet are asked for again."""
    kind = state["kind"]
    if kind == "waiting":
        return Waiting(int(state["due"]))
    if kind == "stopped":
        return Stopped(str(state["reason"]))
    if kind == "scoring":
        return Scoring(int(state["since"]), _scores(state, compiler))
    choice = Choice.from_state(state["choice"])
    if kind == "staging":
        return Staging(int(state["since"]), choice, compiler(choice.blueprint))
    if kind == "trying":
        return Trying(int(state["since"]), choice, str(state["kernel"]))
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

    def __init__(self, state: Any, compiler: Compile) -> None:
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
            self.seconds = float(state["probe_seconds"])
            self.stage = loaded_stage(state["stage"], compiler)
        except (KeyError, TypeError, ValueError) as cause:
            raise GrowthError(f"a grower's state is damaged: {type(cause).__name__}: {cause}") from cause
