"""The cycle of a `Grower`: wait, probe, score, stage, try, judge, rest; and what of it one step does."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from esper.artifacts import Blueprint
from esper.contracts.messages import TopicNames
from esper.core.morphable_model import MorphableModel
from esper.core.remote_control import default_platform
from esper.errors import EsperError
from esper.execution.background import BackgroundThreads
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.plans.alpha import LinearRamp
from esper.growth.checks import refuse_ranks
from esper.growth.choosing import Choice, Place, candidates, choose
from esper.growth.costs import NOTICEABLE, Clock, Costs, Losses
from esper.growth.errors import GrowthError
from esper.growth.history import GrowthEvent, GrowthRecord, LossCurve
from esper.growth.measuring import KnownFlops, LossFunction, PartialJudgement, PartialProbe
from esper.growth.policy import GrowthPolicy
from esper.growth.stages import Judging, Probing, Scores, Scoring, Stage, Staging, Stopped, Trying, Waiting
from esper.user_warnings import warn_user

__all__ = ["GrowthCycle"]

_LOG = logging.getLogger("esper.growth")
_SCORING = BackgroundThreads("esper-growth", 1)
_NICER = 10
_FREE = (SeedLifecycleState.DORMANT, SeedLifecycleState.ERROR_RECOVERY)


class GrowthCycle:
    """What a grower does from step to step, on the thread that trains; candidates are scored on another one.

    `layers` are those that may grow, with the parameters of the smallest candidate for each.
    """

    def __init__(
        self,
        model: MorphableModel,
        loss_function: LossFunction,
        layers: Mapping[str, int],
        policy: GrowthPolicy,
        probe_batches: Iterable[Any],
        judge_batches: Iterable[Any],
        costs: Costs,
    ) -> None:
        self._model, self._loss, self._layers, self._policy = model, loss_function, layers, policy
        self._probe_batches, self._judge_batches = probe_batches, judge_batches
        self._stage: Stage = Waiting(policy.first)
        self._steps = self._spent = self._misses = self._round = 0
        self._history: list[GrowthRecord] = []
        self._curve, self._costs, self._losses = LossCurve(), costs, Losses()
        self._bad_loss: float | None = None
        self._unseen: set[str] = set()
        self._warned = False
        self._clock, self._flops = Clock(), KnownFlops()

    def _next(self, stage: Stage) -> Stage:
        if isinstance(stage, Waiting):
            return self._wait(stage)
        if isinstance(stage, Probing):
            return self._probe(stage)
        if isinstance(stage, Scoring):
            return self._score(stage)
        if isinstance(stage, Staging):
            return self._await_kernel(stage)
        if isinstance(stage, Trying):  # or judging
            return self._try(stage)
        return stage

    def _note_losses(self, losses: Iterable[tuple[int, float]]) -> None:
        for step, loss in losses:
            if math.isfinite(loss):
                self._curve.add(step, loss)
                self._bad_loss = None
            elif self._bad_loss is None:
                self._bad_loss, reason = loss, f"the loss is {loss}: nothing grows meanwhile"
                if not self._history or self._history[-1].reason != reason:  # else one that comes and goes fills it
                    self._tell(reason, step)

    def _wait(self, stage: Waiting) -> Stage:
        policy = self._policy
        if policy.until is not None and self._steps > policy.until:
            return self._stop(f"step {policy.until} is over")
        if self._steps < stage.due:
            return stage
        if self._bad_loss is not None:
            return self._dropped()
        if policy.compute_share is not None and not self._costs.allows(policy.compute_share, self._steps):
            return stage
        self._costs.begin_round()
        refuse_ranks(self._model)
        self._round += 1
        free = self._free_seeds()
        if not free:
            return self._stop(self._why_nothing_fits())
        probe = self._new_probe(list(free), policy.draw(self._round))
        return self._probe(Probing(self._steps, probe))

    def _dropped(self) -> Stage:
        """Nothing grows while the loss is not finite."""
        return Waiting(self._steps + self._policy.cooldown)

    def _new_probe(self, layers: Sequence[str], draw: int, state: Mapping[str, Any] | None = None) -> PartialProbe:
        return PartialProbe(
            self._model, layers, self._loss, self._probe_batches, self._policy.rows, draw, self._flops, state
        )

    def _probe(self, stage: Probing) -> Stage:
        """Let one more batch go forward and backward."""
        if self._bad_loss is not None:
            return self._dropped()
        probe = stage.probe
        is_first = not probe.taken
        flops = probe.take()
        self._costs.extra += flops
        if is_first:
            self._costs.note_step(flops, self._steps)
        return self._probed(probe) if probe.is_over else stage

    def _probed(self, probe: PartialProbe) -> Stage:
        free = self._free_seeds()
        for name in free:
            if name not in probe.reached and name not in self._unseen:
                self._unseen.add(name)
                self._record("left out", layer=name, reason="the probe's batches do not reach it")
        seen = {name: seed for name, seed in free.items() if name in probe.reached}
        draw, left = self._policy.draw(self._round), self._policy.budget - self._spent
        scores = _SCORING.submit(partial(self._scores, probe, seen, draw, left))
        return self._score(Scoring(self._steps, scores))

    def _free_seeds(self) -> dict[str, int]:
        """One of each layer that has one, and a candidate that the budget allows."""
        found = {}
        for name, least in self._layers.items():
            layer = self._model.kasmina_layers[name]
            seed = next((each.index for each in layer.seeds if each.lifecycle in _FREE), None)
            if seed is not None and layer.absence is None and least <= self._policy.budget - self._spent:
                found[name] = seed
        return found

    def _why_nothing_fits(self) -> str:
        reasons = []
        for name, least in self._layers.items():
            layer = self._model.kasmina_layers[name]
            if layer.absence is not None:
                reasons.append(f"layer {name!r} is not in the model any more")
            elif not any(each.lifecycle in _FREE for each in layer.seeds):
                reasons.append(f"all {len(layer.seeds)} of layer {name!r} are in use (seeds_per_layer of esper.wrap)")
            else:
                reasons.append(f"layer {name!r} needs {least:,} parameters at least")
        more = f", and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        left = self._policy.budget - self._spent
        return f"no seed is free where {left:,} parameters, which are left, would do: {'; '.join(reasons[:3])}{more}"

    def _scores(self, probe: PartialProbe, seeds: Mapping[str, int], draw: int, left: int) -> Scores:
        """On a thread of its own, which makes blueprints, too: many of them take as long as a step."""
        _be_nice()
        statistics, places = probe.statistics(), []
        for name, seed in seeds.items():
            if blueprints := candidates(self._model.kasmina_layers[name], self._policy, draw, left):
                places.append(Place(name, seed, blueprints))
        choice, best, flops = choose(statistics, places, self._policy, draw)
        compiling = None if choice is None else self._compile(choice.blueprint)
        return Scores(choice, {} if best is None else best.numbers(), flops, compiling)

    def _compile(self, blueprint: Blueprint) -> Future[Any]:
        platform: Any = self._model._wrapping.options.platform or default_platform()
        compiling: Future[Any] = platform.request(blueprint, timeout=self._policy.timeout)
        return compiling

    def _score(self, stage: Scoring) -> Stage:
        if not self._is_ready(stage.since, stage.scores):
            return stage
        scores = self._result(stage.since, stage.scores)
        self._costs.extra += scores.flops
        if self._bad_loss is not None:
            return self._dropped()
        if scores.choice is None or scores.compiling is None:
            self._record("nothing", at=stage.since, reason="no candidate is worth it", **scores.best)
            return self._missed()
        self._record("chosen", at=stage.since, **scores.choice.numbers())
        return self._await_kernel(Staging(stage.since, scores.choice, scores.compiling))

    def _is_ready(self, since: int, future: Future[Any]) -> bool:
        """Whether to go on with what `future` has; where the lead says so, whether it has that or not."""
        return future.done() if self._policy.lead is None else self._steps >= since + self._policy.lead

    def _result(self, since: int, future: Future[Any], timeout: float | None = None) -> Any:
        """What `future` has, which is waited for where the lead says so; a wait that one notices is told once."""
        with self._clock.waiting():
            try:
                future.exception(NOTICEABLE if timeout is None else min(timeout, NOTICEABLE))
            except TimeoutError:
                if not self._clock.is_told:
                    self._clock.is_told = True
                    _LOG.warning(
                        "step %d waits for what grows by the probe until step %d, as lead=%s says. The first kernel of "
                        "a structure takes some ten seconds; with lead=None training goes on meanwhile",
                        self._steps,
                        since,
                        self._policy.lead,
                    )
            return future.result(timeout)

    def _await_kernel(self, stage: Staging) -> Stage:
        self._stage = stage  # for whom this fails, or is interrupted while it waits
        if self._bad_loss is not None:
            self._withdraw(stage)
            self._record(
                "failed", **stage.choice.numbers(), reason=f"the loss is {self._bad_loss} before it is in force"
            )
            return self._dropped()
        if not stage.kernel:
            if not self._is_ready(stage.since, stage.compiling):
                return stage
            stage = self._request(stage)
        choice = stage.choice
        layer = self._model.kasmina_layers[choice.layer]
        if layer.kernel_in_force(choice.seed) == stage.kernel:
            self._spent += choice.parameters
            self._record("in force", **choice.numbers())
            return Trying(self._steps, choice, stage.kernel)
        if stage.request is not None and stage.request.done():
            is_coming = layer.seeds[choice.seed].lifecycle is SeedLifecycleState.LOADING
            if not stage.request.result() or not is_coming:  # the second if the commit failed
                reason = layer.seed_errors.get(choice.seed, "something else was asked of it meanwhile")
                raise GrowthError(f"seed {choice.seed} of layer {choice.layer!r} has not got its kernel: {reason}")
        return stage

    def _request(self, stage: Staging) -> Staging:
        choice, kernel = stage.choice, self._result(stage.since, stage.compiling).id
        if self._model.kasmina_layers[choice.layer].kernel_in_force(choice.seed) == kernel:
            return Staging(stage.since, choice, stage.compiling, kernel)  # of a checkpoint
        request = self._model.request_kernel(
            choice.layer, choice.seed, kernel, alpha=LinearRamp(0.0, 1.0, self._policy.ramp), trainable=True
        )
        self._stage = stage = Staging(stage.since, choice, stage.compiling, kernel, request)
        if self._policy.lead is not None:
            self._result(stage.since, request, self._policy.timeout)
        return stage

    def _try(self, stage: Trying) -> Stage:
        choice, policy = stage.choice, self._policy
        layer = self._model.kasmina_layers[choice.layer]
        lifecycle = layer.seeds[choice.seed].lifecycle
        if layer.kernel_in_force(choice.seed) != stage.kernel or lifecycle is not SeedLifecycleState.ACTIVE:
            what = "fossilized" if lifecycle is SeedLifecycleState.FOSSILIZED else "unloaded or replaced"
            return self._let_be(stage, f"others have {what} it before it was judged")
        if self._bad_loss is not None:
            return self._unload(stage, f"the loss became {self._bad_loss}")
        taken, whole = self._steps - stage.since, policy.ramp + policy.trial
        if self._model.runtime.schedule(layer.seeds[choice.seed].alpha_index) is not None:
            return stage if taken < 2 * whole else self._let_be(stage, "its alpha is on a schedule of others")
        return stage if taken < whole else self._judge(stage)

    def _new_judgement(self, choice: Choice, losses: Mapping[str, Any] | None = None) -> PartialJudgement:
        return PartialJudgement(
            self._model, choice.layer, choice.seed, self._loss, self._judge_batches, self._flops, losses
        )

    def _let_be(self, stage: Trying, reason: str) -> Stage:
        """Others have taken the kernel over: what they do with it stays."""
        layer, choice = self._model.kasmina_layers[stage.choice.layer], stage.choice
        self._spent -= 0 if layer.kernel_in_force(choice.seed) == stage.kernel else choice.parameters
        self._record("removed", **choice.numbers(), reason=reason)
        return self._rest()

    def _judge(self, stage: Trying) -> Stage:
        """Judge by one more batch, and decide after the last one."""
        choice = stage.choice
        if not isinstance(stage, Judging):
            stage = Judging(stage.since, choice, stage.kernel, self._new_judgement(choice))
        self._costs.extra += stage.judgement.take()
        if not stage.judgement.is_over:
            return stage
        loss_with, loss_without = stage.judgement.losses
        numbers: dict[str, Any] = {"loss_with": loss_with, "loss_without": loss_without}
        if not loss_without - loss_with > self._policy.margin * abs(loss_without):  # nor is NaN
            is_bad = not math.isfinite(loss_with)
            reason = f"the loss is {loss_with} with it" if is_bad else "the loss is not lower enough with it"
            return self._unload(stage, reason, **numbers)
        if self._policy.keep == "fossilized":
            self._model.fossilize(choice.layer, choice.seed)
        self._misses = 0
        self._record("kept", **choice.numbers(), **numbers)
        return self._rest()

    def _unload(self, stage: Trying, reason: str, **numbers: Any) -> Stage:
        choice = stage.choice
        self._model.unload_kernel(choice.layer, choice.seed)
        self._spent -= choice.parameters
        self._costs.extra += 6 * choice.parameters * choice.rows * (self._steps - stage.since)  # forward and backward
        self._record("unloaded", **choice.numbers(), **numbers, reason=reason)
        return self._missed()

    # -- ends --------------------------------------------------------------------------------------------------------

    def _rest(self) -> Stage:
        self._costs.end_round()
        return Waiting(self._steps + max(self._policy.cooldown, 1))

    def _missed(self) -> Stage:
        self._misses += 1
        if self._misses >= self._policy.patience:
            return self._stop(f"nothing was worth keeping {self._misses} times in a row")
        return self._rest()

    def _stop(self, reason: str) -> Stage:
        self._stage = Stopped(reason)
        self._record("stopped", reason=reason)
        return self._stage

    def _withdraw(self, stage: Stage) -> None:
        """Take back a kernel that was asked for and is not in force."""
        if isinstance(stage, Staging) and stage.kernel:
            self._model.unload_kernel(stage.choice.layer, stage.choice.seed)

    def _fail(self, reason: str, error: Exception) -> None:
        """What was begun is undone; training goes on as it was."""
        if not isinstance(error, EsperError) or error.__cause__ is not None:
            _LOG.error("a grower's part of a step failed", exc_info=error)
        stage, numbers = self._stage, {}
        try:
            if isinstance(stage, (Staging, Trying)):
                numbers = stage.choice.numbers()
            if isinstance(stage, Trying):
                self._spent -= stage.choice.parameters
                self._model.unload_kernel(stage.choice.layer, stage.choice.seed)
            self._withdraw(stage)
        except Exception as second:  # noqa: BLE001  # as above
            reason = f"{reason}; and unloading: {type(second).__name__}: {second}"
        self._tell(reason, self._steps, **numbers)
        self._stage = self._missed()

    def _tell(self, reason: str, step: int, **numbers: Any) -> None:
        self._record("failed", reason=reason, at=step, **numbers)
        if not self._warned:
            self._warned = True
            warn_user(
                f"a grower could not do its part at step {step}, and training goes on: {reason}. Further failures are "
                "in its history",
            )

    def _record(self, event: GrowthEvent, *, at: int | None = None, **numbers: Any) -> None:
        step = self._steps if at is None else at
        if self._history:  # a loss on a device is read late, and what a probe came to is known late
            step = max(step, self._history[-1].step)
        share, seconds = self._costs.share(step), self._clock.lap()
        record = GrowthRecord(step, event, loss=self._curve.mean, seconds=seconds, compute_share=share, **numbers)
        self._history.append(record)
        _LOG.info("step %d: %s %s %s", step, event, record.layer, record.reason)
        sink = next(iter(self._model.kasmina_layers.values())).control.sink
        if sink is not None:
            sink.publish(TopicNames.SYSTEM_EVENTS_EPOCH, record.report())


def _be_nice() -> None:
    """Leave the processors to who trains, where a thread can; those that it starts for products are as nice."""
    if sys.platform == "linux":
        with contextlib.suppress(PermissionError):  # the process has become less nice since
            nice = min(19, os.getpriority(os.PRIO_PROCESS, os.getpid()) + _NICER)
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
