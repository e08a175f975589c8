"""Kernels in optimizers: what is put right, or said, where an optimizer of `torch.optim` takes a step.

- Kernels added as a group of their own, beside a learning-rate scheduler that was made before, join the group of their
  layer's weight: most schedulers cannot go on with more groups than they were made for.
- Steps are counted for the models whose parameters an optimizer holds, see `esper.execution.kernels.optimizer_steps`.
- A loaded state is given back by name, see `esper.execution.kernels.optimizer_state`.
- Gradients of kernels that learn, and stand in no optimizer, are dropped after each step of the host's: nothing else
  would, and they would add up. That is said once. An optimizer that holds them may not have taken a step yet: another
  thread looks for it first.

The hooks are process-wide, as there is no other way to hear of an optimizer, and are there once a kernel is in force or
is to come with an alpha that moves.
They look twice only where an optimizer's groups or the kernels in force are others than at its last step. No device is
waited for.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Iterable, MutableMapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from esper.execution.kernels.optimizer_search import look_for_optimizers
from esper.execution.kernels.optimizer_state import KernelParameter, give_back, name_states
from esper.execution.kernels.optimizer_steps import OptimizerSteps
from esper.forking import ModuleLock, reset_after_fork
from esper.user_warnings import warn_user

__all__ = ["KernelParameter", "Kernels", "count_steps", "kernels_changed"]

_LOG = logging.getLogger("esper.execution")
_NOT_OPTIONS = frozenset({"params", "param_names"})
_PATIENCE = 2
"""After how many steps of the host's optimizer a kernel is asked for in all optimizers there are."""


class Kernels(Protocol):
    """The kernels in force in one model."""

    def kernel_parameters_in_force(self) -> Iterable[KernelParameter]:
        """All of their parameters."""
        ...

    def model_parameters(self) -> Iterable[Tensor]:
        """Those of the whole model."""
        ...

    @property
    def optimizer_steps(self) -> OptimizerSteps:
        """Where steps of its optimizers are counted."""
        ...


@dataclass(slots=True)
class _Seen:
    """What an optimizer was like at its last step."""

    signature: tuple[Any, ...] = ()
    loaded: bool = True
    """Whether its state may be another one since."""
    names_kernels: bool = False
    steps: list[OptimizerSteps] = field(default_factory=list)
    """Those of the models whose parameters this optimizer holds."""
    unheld: list[KernelParameter] = field(default_factory=list)
    """Kernels that learn, beside parameters of this optimizer, and stood in no optimizer so far."""
    questions: list[_Question] = field(default_factory=list)
    """What was asked of them, and is answered at a step of this optimizer: to whom it may concern."""


@dataclass(slots=True, eq=False)
class _Question:
    """Whether any optimizer holds `kernels`, of all that there are."""

    kernels: list[KernelParameter]
    optimizers: Future[list[weakref.ref[Optimizer]]]

    def held(self) -> set[int]:
        """The kernels' parameters that one holds, by their ids; once all are found."""
        alive = [each for reference in self.optimizers.result() if (each := reference()) is not None]
        wanted = {id(each.parameter) for each in self.kernels}
        groups = (group for each in alive for group in each.param_groups)
        return wanted.intersection(id(parameter) for group in groups for parameter in group["params"])


class _Optimizers:
    """The optimizers of this process. Its hooks run on whatever thread takes a step; the lock is held for moments."""

    def __init__(self) -> None:
        self._lock = ModuleLock()
        self._models: weakref.WeakSet[Kernels] = weakref.WeakSet()
        self._numbers = itertools.count(1)
        self._version = 0
        self._seen: weakref.WeakKeyDictionary[Optimizer, _Seen] = weakref.WeakKeyDictionary()
        self._held: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()
        """Kernels' parameters that an optimizer holds or has held."""
        self._steps: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
        """Others: at how many steps of the host they had a gradient."""
        self._unheld: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()
        """Those of them that were asked for in all optimizers: whether it is known that none holds them."""
        self._hooked = False
        reset_after_fork(self)

    def after_fork(self) -> None:
        """The parent's threads look for what it has asked; see `esper.forking`."""
        for seen in self._seen.values():
            self._forget_questions(seen)

    def _forget_questions(self, seen: _Seen) -> None:
        for kernel in (kernel for each in seen.questions for kernel in each.kernels):
            self._unheld.pop(kernel.parameter, None)
        seen.questions = []

    def follow(self, model: Kernels, *, changed: bool) -> None:
        with self._lock.held():
            if not changed and model in self._models:
                return
            self._models.add(model)
            self._version = next(self._numbers)
            if not self._hooked:
                self._hooked = True
                register_optimizer_step_pre_hook(self.before_step)
                register_optimizer_step_post_hook(self.after_step)

    def _known(self) -> dict[int, KernelParameter]:
        with self._lock.held():
            models = list(self._models)
        return {id(each.parameter): each for model in models for each in model.kernel_parameters_in_force()}

    # -- before a step ---------------------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        version, groups = self._version, _shape(optimizer)
        seen = self._seen.get(optimizer)
        if seen is not None and seen.signature == (version, groups) and not seen.loaded:
            return
        left: list[str] = []
        try:
            seen = seen or self._seen.setdefault(optimizer, _Seen())
            left = self._look(optimizer, seen)
            seen.signature = version, _shape(optimizer)
        except Exception:  # noqa: BLE001  # a fault of ours must not end a user's step
            _LOG.exception("an optimizer's kernels could not be looked at")
        if left:
            warn_user(
                f"the optimizer's loaded state has nothing for {_listed(left)}, which begin without: it was saved with "
                "other kernels",
            )

    def _look(self, optimizer: Optimizer, seen: _Seen) -> list[str]:
        """Put right what is not; the kernels that a loaded state has nothing for."""
        known = self._known()
        holds = {id(each) for group in optimizer.param_groups for each in group["params"]}
        mine = {key: kernel for key, kernel in known.items() if key in holds}
        for kernel in mine.values():
            self._held[kernel.parameter] = True
        left: list[str] = []
        if mine:
            if not seen.names_kernels:
                self._register(optimizer, seen)
            left = give_back(optimizer, mine) if seen.loaded else []
            _join_groups(optimizer, mine)
        seen.loaded = False
        with self._lock.held():
            models = list(self._models)
        held = []
        for model in models:
            holds_any = any(id(parameter) in holds for parameter in model.model_parameters())
            model.optimizer_steps.know(optimizer, holds=holds_any)
            held += [model] if holds_any else []
        seen.steps = [model.optimizer_steps for model in held]
        seen.unheld = [
            each
            for model in held
            for each in model.kernel_parameters_in_force()
            if each.parameter.requires_grad and each.parameter not in self._held
        ]
        return left

    def _register(self, optimizer: Optimizer, seen: _Seen) -> None:
        """From now on its saved states have the kernels' names, and a load is noted. There may have been one before."""
        seen.names_kernels = seen.loaded = True

        def naming(optimizer: Optimizer, saved: dict[str, Any]) -> None:
            name_states(optimizer, saved, self._known())

        def loaded(_: Optimizer) -> None:
            seen.loaded = True

        optimizer.register_state_dict_post_hook(naming)
        optimizer.register_load_state_dict_post_hook(loaded)

    # -- after a step ----------------------------------------------------------------------------------------------

    def after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        seen = self._seen.get(optimizer)
        if seen is None:
            return
        for steps in seen.steps:
            steps.note_step(optimizer)
        if not seen.unheld:
            self._forget_questions(seen)
            return
        found: list[str] = []
        try:
            found = self._drop_gradients(seen)
        except Exception:  # noqa: BLE001  # as above
            _LOG.exception("gradients of kernels in no optimizer could not be dropped")
        if found:
            warn_user(
                f"the kernels of {_listed(found)} are trainable and stand in no optimizer, so they do not learn: "
                "model.attach_optimizer(optimizer) has them in it as they come and go. Their gradients are dropped "
                "after each step meanwhile, or they would add up",
            )

    def _drop_gradients(self, seen: _Seen) -> list[str]:
        """Returns the kernels for which that is done for the first time."""
        piling = [each for each in seen.unheld if each.parameter.grad is not None]
        asking = []
        for each in piling:
            steps = self._steps[each.parameter] = self._steps.get(each.parameter, 0) + 1
            asking += [each] if steps >= _PATIENCE and each.parameter not in self._unheld else []
        if asking:
            self._ask(seen, asking)
        found = self._answered(seen)
        for each in piling:
            if self._unheld.get(each.parameter) and each.parameter not in self._held:
                each.parameter.grad = None
        seen.unheld = [each for each in seen.unheld if each.parameter not in self._held]
        return found

    def _ask(self, seen: _Seen, kernels: list[KernelParameter]) -> None:
        question = _Question(kernels, look_for_optimizers())
        with self._lock.held():
            seen.questions.append(question)
        for each in kernels:
            self._unheld[each.parameter] = False

    def _answered(self, seen: _Seen) -> list[str]:
        """Note what was found since the last time; returns the kernels that are known to stand in no optimizer now."""
        with self._lock.held():
            answered = [each for each in seen.questions if each.optimizers.done()]
            seen.questions = [each for each in seen.questions if each not in answered]
        unheld = []
        for question in answered:
            held = question.held()
            for kernel in question.kernels:
                if id(kernel.parameter) in held:
                    self._held[kernel.parameter] = True
                elif kernel.parameter not in self._held:  # it may have joined one since
                    self._unheld[kernel.parameter] = True
                    unheld.append(kernel.owner)
        return list(dict.fromkeys(unheld))


def _shape(optimizer: Optimizer) -> list[int]:
    """What changes when a group or a parameter is added or removed."""
    return [number for group in optimizer.param_groups for number in (id(group["params"]), len(group["params"]))]


def _join_groups(optimizer: Optimizer, kernels: dict[int, KernelParameter]) -> None:
    """Have the kernels of groups that came after a scheduler was made go on in a group that it knows.

    Every scheduler of torch writes `initial_lr` into the groups that it is made for, except `ReduceLROnPlateau`, which
    takes new groups.
    """
    groups = optimizer.param_groups
    scheduled = [group for group in groups if "initial_lr" in group]
    if not scheduled or len(scheduled) == len(groups):
        return
    home = {id(parameter): group for group in scheduled for parameter in group["params"]}
    joined = []
    for group in groups:
        parameters = group["params"]
        if "initial_lr" in group or not parameters or not all(id(each) in kernels for each in parameters):
            continue
        if not _all_default(group, optimizer.defaults):
            _LOG.warning(
                "a group of kernels with options of its own was added after a learning-rate scheduler was made: if the "
                "scheduler cannot take more groups, make it anew, or add the kernels without options"
            )
            continue
        joined.append(id(group))
        names = group.get("param_names", [None] * len(parameters))
        for parameter, name in zip(parameters, names, strict=True):
            target = home.get(id(kernels[id(parameter)].beside), scheduled[0])
            target["params"].append(parameter)
            if "param_names" in target:
                target["param_names"].append(name)
    groups[:] = [group for group in groups if id(group) not in joined]


def _all_default(group: dict[str, Any], defaults: dict[str, Any]) -> bool:
    """Whether a group was given nothing but its parameters."""
    return all(_same(value, defaults.get(name)) for name, value in group.items() if name not in _NOT_OPTIONS)


def _same(value: Any, default: Any) -> bool:
    return value is default or (not isinstance(value, Tensor) and type(value) is type(default) and value == default)


def _listed(kernels: list[str]) -> str:
    return ", ".join(kernels[:4]) + (f" and {len(kernels) - 4} more" if len(kernels) > 4 else "")


_optimizers = _Optimizers()


def kernels_changed(model: Kernels) -> None:
    """Other kernels of `model` are in force than before."""
    _optimizers.follow(model, changed=True)


def count_steps(model: Kernels) -> None:
    """Count the steps of `model`'s optimizers from now on."""
    _optimizers.follow(model, changed=False)
