"""The runtime of one model: the plan in force, what is staged, and when one becomes the other.

Threads. `plan` is read by anyone. :meth:`Runtime.commit` runs on the thread that runs the model, between two forwards;
:meth:`publish` on any thread. The one lock is held for pointer changes only, never while something is fetched, hashed,
traced or compiled. A forked child has a lock of its own.
"""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch

from esper import torch_internals
from esper.errors import EsperError
from esper.execution.kernels.loaded_kernel import LoadedKernel
from esper.execution.kernels.optimizer_steps import OptimizerSteps
from esper.execution.lifecycle import Transition
from esper.execution.plans.alpha import AlphaSchedule, Schedule
from esper.execution.plans.alphas import SeedAlphas
from esper.execution.plans.commit import Commit
from esper.execution.plans.executors import PlanExecutors
from esper.execution.plans.gate import Gate
from esper.execution.plans.handover import FirstForward, PlanHandover, UnfinishedHandovers
from esper.execution.plans.model_link import ModelLink
from esper.execution.plans.plan import Plan
from esper.execution.plans.plan_edit import PlanEdit
from esper.execution.state_layout import KasminaStateLayout
from esper.execution.telemetry import Telemetry
from esper.forking import reset_after_fork

__all__ = ["CommitError", "CommitMode", "Runtime"]

_LOG = logging.getLogger("esper.execution")

CommitMode = Literal["auto", "manual"]


class CommitError(EsperError, RuntimeError):
    """A commit was asked for at a moment at which the plan must not change."""


class Runtime(PlanExecutors):
    """The plan of one model and everything that follows it.

    `number` and `sites` are what `registry` calls it and its sites, `state` holds all of the model's seeds, and `model`
    answers what is asked of the model itself.
    """

    def __init__(
        self,
        number: int,
        sites: Sequence[int],
        state: KasminaStateLayout,
        model: ModelLink[Any],
        telemetry: Telemetry | None,
        commit: CommitMode = "auto",
    ) -> None:
        if commit not in ("auto", "manual"):
            raise ValueError(f'commit must be "auto" or "manual", not {commit!r}')
        super().__init__(model.modules)
        self.id = number
        self.sites = frozenset(sites)
        self.state = state
        self.model = model
        self.telemetry = telemetry
        self.commit_mode: CommitMode = commit
        self._layers_changed = False
        self.whole: dict[int, int] = {}
        """Threads that are inside of a forward of the whole model, while there is something to commit."""
        self.has_graph_breaks = False
        """Whether a forward consists of several parts: then :meth:`note_forward` has to be called where it begins."""
        self._first_forward: FirstForward | None = None
        self.pending = False  # guarded on by graphs of other backends, which re-trace when something is staged
        self.scheduled = False  # as above, for schedules
        self.gate: Gate | None = None
        """Says when what is staged is due, where the model changes together with other ranks."""
        self.share: Callable[[LoadedKernel], None] | None = None
        """Makes the parameters of a kernel ones that all ranks share, where those of the model are."""
        self.called: set[int] = set()
        """Sites that a forward has called, or that were compiled."""
        self.features_seen: dict[int, tuple[int, int]] = {}
        """Sizes of input and output of sites at modules of which only a call can tell them."""
        self.begun_while_tracing = False  # see `esper.execution.site_marker`
        self._handovers = UnfinishedHandovers()
        self._committing = threading.RLock()  # held by whoever carries it out
        self.optimizer_steps = OptimizerSteps()
        self._alphas = SeedAlphas(state, self.optimizer_steps)
        self._thread = threading.get_ident()  # the one that runs the model, as far as is known
        self.settings = contextvars.copy_context()
        """The context, and in it the settings of torch's compilers, that the thread that runs the model was seen in."""
        self.has_run = False  # the first forward says which thread that is
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Nobody in this child holds the lock, whoever held it in the parent; see `esper.forking`."""
        self.lock = threading.RLock()
        self._committing = threading.RLock()
        self._target = self._edited(self._plan, self._staged)  # the fork may have come between the two

    def is_passed_over(self, site: int) -> bool:
        """Whether forwards have run, and none has called `site`: code reads its layer's weight, or does without it."""
        return self.has_run and site not in self.called and not self.begun_while_tracing

    def divide(self) -> None:
        """From now on a forward consists of several parts."""
        if self.has_graph_breaks and self._first_forward is None:
            return  # without the lock: parts that run uncompiled say so at every call
        with self.lock:
            self._first_forward = None
            self._note_beginnings()

    def may_divide(self) -> None:
        """The beginning of a forward was compiled: until the next one nobody knows whether it is all of it."""
        with self.lock:
            if not self.has_graph_breaks:
                self._first_forward = FirstForward(threading.get_ident())
                self._note_beginnings()
                if not torch_internals.inside_backward():
                    self.starts.note(self)  # it counts as under way for whoever is told to look from now on

    def _note_beginnings(self) -> None:
        if not self.has_graph_breaks:
            self.starts.forget_before(self.version)
            self.has_graph_breaks = True
            self._install_entry_hooks()  # whoever begins a forward learns of it when the boundary is behind it

    def note_forward(self) -> None:
        """A forward begins on this thread; called at least where :attr:`has_graph_breaks`.

        Inside a backward none does: one that has begun before is repeated, and goes on with the plan that it had.
        """
        if torch_internals.backward_id() != -1:
            return
        self.starts.note(self)
        if self._handovers:
            self._handovers.finish()
        first = self._first_forward
        if first is not None and first.is_over():
            self._stays_whole(first)

    def note_handover(self, handover: PlanHandover) -> None:
        """Have `handover` finish, also where nobody calls it: what is not run any more keeps no kernels."""
        self._handovers.add(handover)

    def _stays_whole(self, first: FirstForward) -> None:
        with self.lock:
            if self._first_forward is first:
                self._first_forward, self.has_graph_breaks = None, False
                if not self.has_entry_hooks:
                    for executor in list(self._executors):
                        executor.remove_entry_hook()

    def note_settings(self) -> None:
        """A change is asked for, or a forward begins: take the settings under which to compile, if on its thread."""
        if threading.get_ident() == self._thread:
            self.settings = contextvars.copy_context()

    # -- staging ---------------------------------------------------------------------------------------------------

    def publish(self, *edits: PlanEdit) -> None:
        """Stage `edits` for the next commit, in which they come into force together."""
        with self.lock:
            self._stage(edits)
            if self.commit_mode == "auto":
                self.pending = self.gate is None
                self._install_entry_hooks()

    def change_behind(self, gate: Gate) -> None:
        """From the next forward on, what is staged comes into force when `gate` says so."""
        with self.lock:
            self.gate = gate
            self.scheduled = True  # graphs of other backends ask where every forward begins
            self._install_entry_hooks()

    def withdraw(self, edit: PlanEdit, *, in_any_case: bool = False) -> bool:
        """Take a staged edit back; False, and nothing done, if it is committed, or others could not go without it."""
        with self.lock:
            others = [each for each in self._staged if each is not edit]
            target = self._edited(self._plan, others)
            is_staged = len(others) < len(self._staged) and not (self._commit and self._commit.contains(edit))
            if not is_staged or not (in_any_case or self.ready(target)):
                return False
            self._staged, self._target = others, target
            self.pending = self.pending and bool(others)
            return True

    # -- committing ------------------------------------------------------------------------------------------------

    def enter(self, whole: bool = False) -> None:
        """The model, or with `whole` false a part of it, was entered: a forward may begin on this thread."""
        if not torch_internals.inside_backward() and self.entries.begins(whole):
            self.on_forward_start()

    def enter_whole(self, forward: Callable[[], Any]) -> Any:
        """As :meth:`enter` for the whole model; call `forward`, in which nothing else has to look for a beginning."""
        self.enter(whole=True)
        thread = threading.get_ident()
        self.whole[thread] = self.whole.get(thread, 0) + 1
        try:
            return forward()
        finally:
            if self.whole[thread] > 1:
                self.whole[thread] -= 1
            else:
                del self.whole[thread]

    def note_layers_changed(self) -> None:
        """A module of the model was exchanged: look, before the next forward, whether it was a layer with seeds."""
        with self.lock:
            self._layers_changed = True
            self._install_entry_hooks()

    def look_for_layers(self, *, anew: bool = False) -> None:
        """Have the sites follow layers that were exchanged, if any may have been; between two forwards.

        Nobody tells of layers that were deleted, or took others' places in a list: `anew` looks for those too.
        """
        if (self._layers_changed or anew) and not torch_internals.inside_backward():
            self._layers_changed = False
            self.model.follow_layers()

    def on_forward_start(self) -> None:
        """A forward begins on this thread: commit what is staged, move the scheduled alphas.

        A forward that begins inside a backward is an activation recomputation, and has to see the plan of the forward
        that it repeats: nothing happens then.
        """
        if torch_internals.inside_backward():
            return
        if not self.has_run:
            self.model.find_peers()
        self._thread, self.has_run = threading.get_ident(), True
        self.note_settings()
        self.look_for_layers()
        if self.gate is not None and self.commit_mode == "auto" and self._is_training_forward():
            self.gate.begin()
        if self._commit is not None or (self._staged and self.commit_mode == "auto"):
            self._flip(lambda edit: self.commit_mode == "auto" and not edit.is_held and edit.is_safe(), wait=False)
        if self._renewed:
            self._follow_renewed()
        if self._alphas.moving and self._is_training_forward():
            self._advance_schedules()
        self.note_forward()
        self._remove_entry_hooks_if_settled()

    def _is_training_forward(self) -> bool:
        return torch.is_grad_enabled() and self.model.is_training()

    def commit(self, *, alone: bool = False) -> list[Transition]:
        """Put everything staged in force at once, between two forwards, and return what changed.

        Of what ranks have to agree about, that which is due; with `alone` everything. Raises :class:`CommitError`
        inside a backward, where an activation recomputation may be under way, and inside a forward of this model, but
        for `alone`.
        """
        self.refuse_in_backward()
        if not alone and self.entries.is_inside():
            raise CommitError(
                "the plan cannot change in the middle of a forward, of which this is a part: what is staged comes into "
                "force with the next one, or at a commit() between the two"
            )
        if self.gate is not None and not alone and self.commit_mode == "manual":
            self.gate.begin()
        transitions = self._flip(lambda edit: alone or not edit.is_held)
        self.note_forward()  # or what this thread calls next, without a forward's beginning, would see the plan before
        self._remove_entry_hooks_if_settled()
        return transitions

    def refuse_in_backward(self) -> None:
        """Raise :class:`CommitError` inside a backward."""
        if torch_internals.inside_backward():
            raise CommitError("the plan cannot change during a backward pass: ask between two training steps")

    def commit_if_idle(self) -> None:
        """Commit at once when the calling thread is the one that runs the model, between a backward and a forward."""
        if (
            self.commit_mode == "auto"
            and self.gate is None
            and threading.get_ident() == self._thread
            and not torch_internals.inside_backward()
            and not self.entries.is_inside()
        ):
            self.commit()

    def _flip(self, now: Callable[[PlanEdit], bool] = lambda _: True, *, wait: bool = True) -> list[Transition]:
        """Put what is staged in force, or the part of it that is to come `now`; what an interrupt cut short, first.

        An interrupt (Ctrl-C) on the way is raised once everything is in force. Another thread that is committing is
        waited for, without `wait` only if it changes no more than pointers.
        """
        held = False
        transitions: list[Transition] = []
        try:
            [held] = map(self._committing.acquire, (False,))  # between a call and `held` an interrupt could come
            commit = None if held else self._commit
            if not wait and commit is not None and commit.plan is None and commit.writes_tensors:
                return []
            with self._committing:
                while self._commit is not None or self._begin_commit(now):
                    transitions += self._carried_out()
        finally:
            if held:
                self._committing.release()
        return transitions

    def _carried_out(self) -> list[Transition]:
        commit = self._commit
        if commit is None:
            return []
        try:
            self._carry_out(commit)
        except Exception:
            self._conclude(commit)
            raise
        except BaseException:
            self._carry_out(commit)
            raise
        for transition in commit.transitions:
            _LOG.info("%s", transition)
        return commit.transitions

    def _carry_out(self, commit: Commit) -> None:
        """Every step here does nothing that a repetition from the beginning would spoil."""
        commit.write_tensors()
        with self.lock:
            self.state.catch_up()
            commit.plan = self._edited(self._plan, commit.edits)
            with self.state.together():
                commit.apply()
            if commit.edits:
                for executor in list(self._executors):
                    executor.follow(commit.plan)
                self.model.hold_kernels(commit.plan)
            self._conclude(commit)

    def _conclude(self, commit: Commit) -> None:
        with self.lock:
            super()._conclude(commit)
            self.pending = bool(self._staged) and self.commit_mode == "auto" and self.gate is None

    def _needs_entry_hooks(self) -> bool:
        staged = bool(self._staged) and self.commit_mode == "auto"
        unfinished = self._commit is not None
        return (
            not self.has_run
            or self.gate is not None  # every forward is counted
            or self._layers_changed
            or staged
            or unfinished
            or self._alphas.moving
            or bool(self._renewed)
        )

    # -- alpha -----------------------------------------------------------------------------------------------------

    def alpha_reader(self, plan: Plan) -> Callable[[], torch.Tensor]:
        """A function that reads the alphas of `plan`'s seeds at this runtime's sites, in the plan's order.

        What it returns, :meth:`SeedAlphas.reader` says.
        """
        own = (seed for site, seeds in plan.sites.items() if site in self.sites for seed in seeds)
        return self._alphas.reader([seed.alpha_index for seed in own])

    def start_alpha(self, alpha_index: int, alpha: float | AlphaSchedule, first: float, step: int = 0) -> None:
        """Set a seed's alpha to `first`, already checked.

        A schedule moves it from the next training forward on, where it is called with `step`.
        """
        with self.lock:
            if callable(alpha):  # before there is a schedule: an interrupt must not leave one that nobody moves
                self.scheduled = True
                self._install_entry_hooks()
            self._alphas.start(alpha_index, alpha, first, step)
            self.scheduled = self._alphas.moving or self.gate is not None

    def schedule(self, alpha_index: int) -> Schedule | None:
        """What moves this alpha, if anything does, and where it is."""
        return self._alphas.schedule(alpha_index)

    def forget_schedules(self, alpha_indices: Iterable[int]) -> None:
        """Stop moving these alphas."""
        with self.lock:
            self._alphas.forget(alpha_indices)
            self.scheduled = self._alphas.moving or self.gate is not None

    def _advance_schedules(self) -> None:
        ended = self._alphas.advance()
        if ended:
            with self.lock:
                self._alphas.end(ended)
                self.scheduled = self._alphas.moving or self.gate is not None
