"""`Grower`: decides when, where and how large a model grows while it trains, and whether what grew may stay."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from esper.core.morphable_model import MorphableModel
from esper.core.parts.many_layers import Layers
from esper.execution.lifecycle import SeedLifecycleState
from esper.growth.checks import attach, checked_batches, checked_loss_function, checked_model, unfit_layers
from esper.growth.choosing import least_parameters
from esper.growth.costs import NOTICEABLE, Costs, Losses
from esper.growth.cycle import GrowthCycle
from esper.growth.errors import GrowthError
from esper.growth.history import GrowthRecord, plotted, table
from esper.growth.measuring import LossFunction, PartialProbe
from esper.growth.policy import Candidate, GrowthPolicy, Keep, StartOf
from esper.growth.policy import Place as PlaceOf
from esper.growth.saving import VERSION, LoadedState, Makers, saved_stage
from esper.growth.stages import Judging, Probing, Scoring, Staging, Stopped, Trying, Waiting

__all__ = ["Grower"]

_growers: weakref.WeakKeyDictionary[MorphableModel, weakref.ref[Grower]] = weakref.WeakKeyDictionary()


class Grower(GrowthCycle):
    """Grows a model while it trains, without learned controllers: `grower.step(loss)` after each optimizer step.

    ::

        grower = esper.Grower(model, optimizer, loss_fn, budget=10_000, probe_batches=batches)
        for x, y in loader:
            optimizer.zero_grad()
            loss = loss_function(model(x), y)
            loss.backward()
            optimizer.step()
            grower.step(loss)
        print(grower)

    It waits, then probes: `probe_batches` go forward and backward, one at each step, and candidates at all sites are
    scored by the decrease of the loss that they promise and the layers' own parameters do not (the natural expansion
    score of self-expanding networks; Mitchell et al. 2023, arXiv:2307.04526). The best per added parameter is compiled
    while training goes on, comes into force without changing the model's function, and its alpha rises. After a trial
    it is judged: the loss on `judge_batches`, one at each step, with its alpha at 1 against that at 0. It stays, or
    goes. Then it all begins again, until the budget is used, nothing has been worth keeping `patience` times in a row,
    or the step `until` is over.

    Training is left as it was by all of this: probes and judgements run in evaluation mode, uncompiled, and give back
    gradients, modes and random numbers. What fails is recorded, warned of once, and training goes on.

    `step` waits for nothing by default: the grower's clock stands still until the kernel is in force, which takes as
    many steps as compiling takes. With `lead` it takes exactly so many, and `step` waits then if it has to, which it
    says once: so the same seeds and data give the same run. One grower a model, on the thread that trains it; not where
    several ranks do.
    """

    def __init__(
        self,
        model: MorphableModel,
        optimizer: Optimizer,
        loss_fn: LossFunction,
        *,
        budget: int,
        probe_batches: Iterable[Any],
        judge_batches: Iterable[Any] | None = None,
        layers: Layers = None,
        scheduler: Any = None,
        lr_factor: float = 1.0,
        warmup: int = 0,
        peak: float | None = None,
        first: int = 100,
        cooldown: int = 100,
        ramp: int = 50,
        trial: int = 100,
        lead: int | None = None,
        until: int | None = None,
        patience: int = 3,
        threshold: float = 0.05,
        chance: float = 1.0,
        marginal: float = 0.25,
        margin: float = 0.0,
        compute_share: float | None = None,
        widths: Sequence[int] = (2, 4, 8, 16, 32),
        family: str | Candidate = "bottleneck",
        proposals: int = 128,
        rows: int = 4096,
        place: PlaceOf = "best",
        start: StartOf = "selected",
        keep: Keep = "fossilized",
        step_flops: float | None = None,
        timeout: float = 600.0,
        seed: int = 0,
    ) -> None:
        """`loss_fn` takes the model and a batch: `lambda model, batch: cross_entropy(model(batch[0]), batch[1])`.

        - `budget`: how many parameters may be added in all.
        - `probe_batches`, `judge_batches`: gone through in each probe and each judgement, one batch a step, so that a
          batch of the size that is trained on makes a step two to five times as long; a list, or a loader that gives
          the same batches each time. Better not those that are trained on. By default one is the other.
        - `layers`: where to grow, as in `MorphableModel.select_layers`; by default at all sites.
        - `scheduler`, `lr_factor`, `warmup`, `peak`: those of `MorphableModel.attach_optimizer`, which is called unless
          `optimizer` is attached.
        - `first`: the step of the first probe's first batch. `cooldown`: steps between the end of a growth and the
          next probe.
        - `ramp`: steps in which alpha rises to 1. `trial`: steps from then to the judgement's first batch.
        - `lead`: steps from the last batch of a probe to the kernel's first forward; None for as few as compiling
          takes.
        - `until`: the last step at which a probe may begin, at least `first`, such as where a schedule begins to decay.
        - `patience`: how many probes without a growth that stays, one after the other, end it.
        - `threshold`: the least gain of a candidate, relative to what the layer's own parameters promise.
        - `chance`: how many times what the best of so many random units explains of pure noise is taken off of gains.
        - `marginal`: wider candidates are preferred as long as their further units gain, by the parameter, at least
          this part of the best width's.
        - `margin`: by which part of the loss a kernel has to lower it to stay.
        - `compute_share`: which part of the run's FLOPs may go into probes, scores, judgements and trials in vain: a
          probe begins only where one more round like the last leaves it at that. By default no matter how many.
        - `widths`: hidden units of candidates. `family`: theirs, `"bottleneck"`, `"gated_mlp"`, or a function of a
          layer and a width that returns a blueprint of these. `proposals`: random units that they are selected among.
        - `rows`: of the sample of each site.
        - `place="random"` and `start="random"`: controls, which grow as large and at the same moments, but at a random
          site, or from random units.
        - `keep`: what becomes of a kernel that stays: `"fossilized"`, or `"active"`, which can be unloaded.
        - `step_flops`: of a training step; by default those of the first probe batch.
        - `timeout`: seconds after which a compilation is given up.
        - `seed`: of everything random.

        Raises :class:`GrowthError` for what cannot be, what `attach_optimizer` and `select_layers` raise, and changes
        nothing then.
        """
        constants = {name: value for name, value in locals().items() if name in GrowthPolicy.names()}
        policy = GrowthPolicy(**constants)
        checked_model(model)
        checked_loss_function(loss_fn)
        if step_flops is not None and not step_flops > 0:
            raise GrowthError(f"step_flops must be more than 0, not {step_flops!r}")
        probed_by = judged_by = checked_batches("probe_batches", probe_batches)
        if judge_batches is not None:
            judged_by = checked_batches("judge_batches", judge_batches)
        if (other := _growers.get(model)) is not None and other() is not None:
            raise GrowthError("another grower grows this model: close() that one first")
        names = list(model.select_layers(layers))
        unfit = unfit_layers(model, names)
        if len(unfit) == len(names):
            raise GrowthError(f"no layer can grow: {'; '.join(unfit.values())}")
        fit = [name for name in names if name not in unfit]
        least = {name: least_parameters(model.kasmina_layers[name], policy) for name in fit}
        attach(model, optimizer, scheduler, lr_factor, warmup, peak)
        _growers[model] = weakref.ref(self)
        costs = Costs(step=step_flops, is_said=step_flops is not None)
        super().__init__(model, loss_fn, least, policy, probed_by, judged_by, costs)
        for name, reason in unfit.items():
            self._record("left out", layer=name, reason=reason)

    # -- while training goes on ------------------------------------------------------------------------------------

    def step(self, loss: Tensor | float) -> None:
        """A step of training is over, and `loss` is its loss; after the optimizer's step, between two forwards.

        Raises :class:`GrowthError` for what is no loss; whatever else fails is recorded.
        """
        due = isinstance(self._stage, Waiting) and self._steps + 1 >= self._stage.due
        known = self._losses.add(self._steps + 1, loss, now=due or self._is_judged_next())
        self._steps += 1
        with self._clock.holding():
            try:
                self._note_losses(known)
                self._stage = self._next(self._stage)
            except Exception as error:  # noqa: BLE001  # recorded and warned of: it must not end a user's training
                self._fail(f"{type(error).__name__}: {error}", error)

    def _is_judged_next(self) -> bool:
        stage = self._stage
        return isinstance(stage, Trying) and self._steps + 1 >= stage.since + self._policy.ramp + self._policy.trial

    # -- what it says ----------------------------------------------------------------------------------------------

    @property
    def history(self) -> tuple[GrowthRecord, ...]:
        """Every decision so far, with its numbers."""
        return tuple(self._history)

    @property
    def steps(self) -> int:
        """How often `step` was called."""
        return self._steps

    @property
    def spent(self) -> int:
        """How many parameters of the budget are in the model, those on trial included."""
        return self._spent

    @property
    def stopped(self) -> str | None:
        """Why nothing more will grow, if it will not."""
        return self._stage.reason if isinstance(self._stage, Stopped) else None

    def __str__(self) -> str:
        """The history as a table."""
        kept = [each for each in self._history if each.event == "kept"]
        spent = f"{self._spent:,} of {self._policy.budget:,} parameters added"
        stage, clock = self._stage, self._clock
        end = "" if self.stopped is None else f"; stopped: {self.stopped}"
        if isinstance(stage, Probing):
            end = f"; a probe has seen {stage.probe.taken} batches since step {stage.since}"
        elif isinstance(stage, Judging):
            end = f"; a kernel is judged at layer {stage.choice.layer}"
        elif isinstance(stage, (Scoring, Staging)):
            end = f"; what was probed until step {stage.since} is not in force yet"
        if clock.waited >= NOTICEABLE:
            end += f"; step {'waits, and has' if clock.is_waiting else 'has'} waited {clock.waited:.1f} s in all"
        head = f"{self._steps:,} steps, {len(kept)} growths kept, {spent}{end}"
        return table(self._history, head)

    def plot(self, path: str | Path) -> Path:
        """Draw losses and growths into the picture `path`. Raises :class:`GrowthError` without matplotlib."""
        self._note_losses(self._losses.read())
        return plotted(self._curve, self._history, path)

    def close(self) -> None:
        """Decide no more, and leave the model to another grower. What has grown stays, also what is on trial."""
        if not isinstance(self._stage, Stopped):
            self._withdraw(self._stage)
            self._stop("closed")
        if (known := _growers.get(self._model)) is not None and known() is self:
            del _growers[self._model]

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where it is and all that it did, as data for `torch.save`; also in the middle of a growth.

        Waits for candidates that are being scored. In the middle of a probe it has a copy of what that has summed up,
        which may be as large as the model: see :class:`Probe`.
        """
        self._note_losses(self._losses.read())
        return {
            "version": VERSION,
            "steps": self._steps,
            "spent": self._spent,
            "misses": self._misses,
            "round": self._round,
            "stage": saved_stage(self._stage),
            "history": [each.state() for each in self._history],
            "curve": self._curve.state(),
            "costs": self._costs.state(),
            "unseen": sorted(self._unseen),
            "warned": self._warned,
            "bad_loss": self._bad_loss,
            "clock": self._clock.state(),
            "flops": dict(self._flops.known),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned, after model and optimizer have loaded theirs of that moment.

        A kernel that was not in force then is asked for again. The constants are those of this grower. Raises
        :class:`GrowthError` for what is no such state, with nothing changed.
        """
        loaded = LoadedState(state_dict, Makers(self._compile, self._load_probe, self._new_judgement))
        if self._awaits_a_load():  # else the model's own state has taken it back, and what is there now is to stay
            self._withdraw(self._stage)
        self._steps, self._spent, self._misses, self._round = loaded.numbers.values()
        self._history, self._curve, self._unseen = loaded.history, loaded.curve, loaded.unseen
        self._costs, self._losses = loaded.costs, Losses()
        self._bad_loss, self._warned, self._clock = loaded.bad_loss, loaded.warned, loaded.clock
        self._flops.known = loaded.flops.known
        self._stage = loaded.stage
        if isinstance(self._stage, Staging):  # as far as it was, so that the kernel comes at the same forward
            try:
                self._stage = self._await_kernel(self._stage)
            except Exception as error:  # noqa: BLE001  # as in a step
                self._fail(f"{type(error).__name__}: {error}", error)

    def _awaits_a_load(self) -> bool:
        if not isinstance(self._stage, Staging):
            return False
        seed = self._model.kasmina_layers[self._stage.choice.layer].seeds[self._stage.choice.seed]
        return seed.lifecycle is SeedLifecycleState.LOADING

    def _load_probe(self, state: Mapping[str, Any]) -> PartialProbe:
        return self._new_probe(state["layers"], int(state["seed"]), state)
