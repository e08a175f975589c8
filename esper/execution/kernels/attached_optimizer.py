"""An optimizer attached to a model: it holds those kernels of the model that learn, as they come and go.

At a commit, on the thread that carries it out, parameters enter as groups of their own without a state, or leave with
theirs. Nothing of the host's is touched, and no device is waited for. A commit of another thread's that comes in the
middle of a step is followed at its end.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import LBFGS, Adagrad, Muon, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from esper.execution.kernels.optimizer_state import KernelParameter
from esper.execution.kernels.param_groups import (
    BESIDE,
    FACTOR,
    LABELS,
    NAMES,
    WARMED,
    Group,
    GroupOptions,
    OptimizerError,
    new_group,
    refresh_rates,
    scaled,
    with_parameters,
)
from esper.execution.kernels.rate_schedulers import kept_lists, own_ones, rearrange, refuse_unable, schedulers_of
from esper.execution.kernels.saved_groups import SavedGroups
from esper.user_warnings import warn_user

__all__ = ["AttachedOptimizer", "GrowingModel", "refuse_optimizer"]

_LOG = logging.getLogger("esper.execution")


class GrowingModel(Protocol):
    """The model, as far as its optimizers are concerned."""

    def learning_in(self, optimizer: AttachedOptimizer) -> Iterable[KernelParameter]:
        """The parameters of kernels in force that are to stand in `optimizer`."""
        ...

    def model_parameters(self) -> Iterable[Tensor]:
        """Those of the whole model."""
        ...

    @property
    def plan_version(self) -> int:
        """The number of changes so far."""
        ...


def refuse_optimizer(optimizer: Optimizer) -> None:
    """Raise :class:`OptimizerError` for one whose groups cannot come and go."""
    kind = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise OptimizerError("LBFGS takes no parameters later: make it anew when kernels have come or gone")
    if "ZeroRedundancyOptimizer" in (each.__name__ for each in type(optimizer).__mro__):
        raise OptimizerError(
            f"{kind} divides the parameters that it is made for among ranks, and gives none back: use the optimizer "
            "itself, or FSDP2, which divides states too"
        )
    if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
        _LOG.info("%s loads states by itself: the groups of kernels have to be there by then", kind)


class AttachedOptimizer:
    """`optimizer` with its `schedulers`, which follows `model`'s kernels as `options` say. Lives as long as it."""

    def __init__(
        self, optimizer: Optimizer, schedulers: Sequence[LRScheduler], options: GroupOptions, model: GrowingModel
    ) -> None:
        self.optimizer = optimizer
        self._schedulers = list(schedulers)
        self._options = options
        self._reference = weakref.ref(model)
        self._factors: list[float] = []  # by the host's groups
        self._searched = bool(schedulers)
        self._stepping: int | None = None  # the thread that is in a step
        self._is_behind = False
        self._may_be_stale = False  # schedulers' lists, since something was loaded
        self._warmed: list[tuple[Group, Any, Any]] = []  # during a step: groups, their rates, what these are for it
        self._latest: tuple[int, dict[int, Group]] = (-1, {})  # those of the latest commit, by what they are beside
        self._saved: SavedGroups | None = None
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(self._before_saving),
            optimizer.register_load_state_dict_pre_hook(self._before_loading),
            optimizer.register_load_state_dict_post_hook(self._after_loading),
        ]

    def release(self) -> None:
        """Follow no more: the groups stay, as any others."""
        for hook in self._hooks:
            hook.remove()
        for group in self.optimizer.param_groups:
            for name in (LABELS, BESIDE, FACTOR, WARMED):
                group.pop(name, None)

    # -- kernels come and go -------------------------------------------------------------------------------------------

    @property
    def model(self) -> GrowingModel | None:
        """The model, if it lives."""
        return self._reference()

    @property
    def _groups(self) -> list[Group]:
        return self.optimizer.param_groups

    def _learning(self) -> list[KernelParameter]:
        return [] if (model := self.model) is None else list(model.learning_in(self))

    def _held(self) -> set[int]:
        return {id(each) for group in self._groups if LABELS in group for each in group["params"]}

    def hosts_ids(self) -> set[int]:
        """The `id` of each parameter that is in no group of kernels."""
        return {id(each) for group in self._groups if LABELS not in group for each in group["params"]}

    def take_over(self) -> None:
        """Have the kernels in force in groups of their own, also those that stand in others; these keep their state."""
        kernels = {id(each.parameter) for each in self._learning()}
        before, groups, known = list(self._groups), [], []
        for group in before:
            kept = [place for place, each in enumerate(group["params"]) if id(each) not in kernels]
            whole, goes = len(kept) == len(group["params"]), not kept and bool(group["params"])
            groups += [] if goes else [group if whole else with_parameters(group, kept)]
            known += [{**group, LABELS: []} if goes else group]  # what has no kernels is a group of the host's
        if not groups:
            groups, known = [{**before[0], "params": []}], [before[0], *known[1:]]
        states, put_back = dict(self.optimizer.state), kept_lists(self._schedulers)
        try:
            self._set(groups)
            rearrange(self._schedulers, known, groups)
            self._factors = [self._options.factor(host) for host in groups]
            self.follow()
        except BaseException:
            self._set(before)
            put_back()
            raise
        self.optimizer.state.update(states)

    def follow(self) -> None:
        """Hold the kernels that learn in the model as it is now, and no others; raises what the optimizer does."""
        if self._stepping not in (None, threading.get_ident()):
            self._is_behind = True
            return
        self._is_behind = False
        wanted = {id(each.parameter): each for each in self._learning()}
        self._let_go(self._held() - wanted.keys())
        self.admit(list(wanted.values()))
        self._place_saved(at_last=False)

    def admit(self, kernels: Sequence[KernelParameter]) -> None:
        """Hold `kernels`, those that it does not yet; raises what the optimizer does, with nothing changed."""
        if self._stepping not in (None, threading.get_ident()):
            return  # the commit that wants this is followed later
        held = self._held()
        new = [each for each in kernels if id(each.parameter) not in held]
        if not new:
            return
        flat = next((each for each in new if each.parameter.dim() != 2), None)
        if isinstance(self.optimizer, Muon) and flat is not None:
            raise OptimizerError(
                f"Muon takes matrices alone, and {flat.name!r} of the kernel of {flat.owner} is none: attach an AdamW"
            )
        self._look_for_schedulers()
        before, put_back = list(self._groups), kept_lists(self._schedulers)
        kept = [{**group, "params": list(group["params"])} for group in before]
        others = own_ones(self._schedulers)
        try:
            self._enter(new)
            rearrange(self._schedulers, before, self._groups)
            refuse_unable(others)
        except BaseException:
            for group, values in zip(before, kept, strict=True):
                group.update(values)
            self._set(before)
            put_back()
            raise

    def _enter(self, new: Sequence[KernelParameter]) -> None:
        hosts = self._hosts()
        beside = self._by_host(new)
        now, (version, latest) = -1 if (model := self.model) is None else model.plan_version, self._latest
        if version != now:
            latest = {}
        joined = {place: group for place, group in latest.items() if any(group is each for each in self._groups)}
        for place in sorted(beside.keys() - joined.keys()):  # in one order on all ranks
            factor = self._factors[place] if place < len(self._factors) else self._options.factor(hosts[place])
            self.optimizer.add_param_group(new_group(hosts[place], place, factor, self._options, beside[place]))
            latest = {**latest, place: self._groups[-1]}
        for place in sorted(beside.keys() & joined.keys()):
            _join(joined[place], beside[place])
        self._latest = now, latest
        if isinstance(self.optimizer, Adagrad):  # which makes states when it is made, and not at the first step
            self._begin_states([each.parameter for each in new])

    def _hosts(self) -> list[Group]:
        return [group for group in self._groups if LABELS not in group]

    def _by_host(self, kernels: Iterable[KernelParameter]) -> dict[int, list[KernelParameter]]:
        """`kernels` by the number of the host's group that has their layer's weight, or else the model's parameters."""
        home = {id(each): place for place, group in enumerate(self._hosts()) for each in group["params"]}
        beside: dict[int, list[KernelParameter]] = {}
        for each in kernels:
            place = home.get(id(each.beside))
            beside.setdefault(self._first_of_model(home) if place is None else place, []).append(each)
        return beside

    def _first_of_model(self, home: Mapping[int, int]) -> int:
        model = self.model
        places = [home[id(each)] for each in (model.model_parameters() if model else ()) if id(each) in home]
        return min(places, default=0)

    def _begin_states(self, parameters: Sequence[Tensor]) -> None:
        known = ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")
        twin = Adagrad(parameters, **{name: self.optimizer.defaults[name] for name in known})
        for each in parameters:
            self.optimizer.state[each] = twin.state[each]

    def _let_go(self, gone: set[int]) -> None:
        if not gone:
            return
        groups, parameters = [], []
        for group in self._groups:
            if LABELS not in group or gone.isdisjoint(map(id, group["params"])):
                groups.append(group)
                continue
            parameters += [each for each in group["params"] if id(each) in gone]
            kept = [place for place, each in enumerate(group["params"]) if id(each) not in gone]
            groups += [with_parameters(group, kept)] if kept else []
        self._arrange(groups)
        for each in parameters:
            self.optimizer.state.pop(each, None)

    def _arrange(self, groups: list[Group]) -> None:
        before = list(self._groups)
        self._set(groups)
        rearrange(self._schedulers, before, groups)

    def _set(self, groups: list[Group]) -> None:
        """Another list, since a step on another thread may be going through the present one."""
        self.optimizer.param_groups = groups

    def _look_for_schedulers(self) -> None:
        """Find out whether one was made since the optimizer was attached, which most write into groups; once."""
        if not self._searched and any("initial_lr" in group for group in self._groups):
            self._searched = True
            self._schedulers = schedulers_of(self.optimizer)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _before_step(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._cool()  # if the step before was cut short
        self._place_saved(at_last=True)
        if self._may_be_stale:
            self._may_be_stale = False
            self._look_for_schedulers()  # one that was made later has loaded lists for groups that are others here
            rearrange(self._schedulers, self._groups, self._groups)
        self._stepping = threading.get_ident()
        if self._options.warmup:
            for group in self._groups:
                if WARMED in group:
                    warm = scaled(group["lr"], self._options.warmth(group[WARMED]))
                    self._warmed.append((group, group["lr"], warm))
                    group["lr"] = warm

    def _after_step(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._stepping = None
        warmed = self._cool()
        for group in warmed:
            group[WARMED] += 1
        if any(group[WARMED] >= self._options.warmup for group in warmed):
            self._end_warmup([group for group in warmed if group[WARMED] >= self._options.warmup])
        if self._is_behind:
            try:
                self.follow()
            except Exception:  # noqa: BLE001  # a fault of the optimizer's must not end a user's step
                _LOG.exception("an optimizer could not take the kernels in force")

    def _cool(self) -> list[Group]:
        """Undo what a step's beginning did to rates; the groups of which that is."""
        warmed, self._warmed = self._warmed, []
        for group, rate, warm in warmed:
            if group["lr"] is warm:
                group["lr"] = rate
        return [group for group, _, _ in warmed]

    def _end_warmup(self, groups: Sequence[Group]) -> None:
        """From now on `peak` is a part of the rate that schedulers go on from."""
        for group in groups:
            del group[WARMED]
            group[FACTOR] *= self._options.peak
            rate = scaled(group["lr"], self._options.peak)
            self._refresh_rates(group)
            group["lr"] = rate  # which need not be that of the host times a number by now
        rearrange(self._schedulers, self._groups, self._groups)

    # -- states that are saved and loaded ------------------------------------------------------------------------------

    def _before_saving(self, *_: Any) -> None:
        self._place_saved(at_last=False)

    def _before_loading(self, _: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        labels = frozenset(label for group in self._groups for label in group.get(LABELS, ()))
        groups = state.get("param_groups", [])
        if not any(LABELS in group for group in groups) and len(groups) == len(self._groups):
            return None  # of as many groups, whatever these were
        self._saved = SavedGroups(state, labels)
        return self._saved.hosts_part(state, self._groups)

    def _after_loading(self, _: Optimizer) -> None:
        self._may_be_stale = True
        if self._saved is None:
            self._label_loaded()
            return
        for group in self._groups:
            if LABELS in group:
                self._refresh_rates(group)
        self._place_saved(at_last=False)

    def _refresh_rates(self, group: Group) -> None:
        hosts = self._hosts()
        refresh_rates(group, hosts[min(group[BESIDE], len(hosts) - 1)])

    def _label_loaded(self) -> None:
        """Know the groups of kernels again where a state that does not name them was loaded over them."""
        kernels = {id(each.parameter): each for each in self._learning()}
        unknown = [group for group in self._groups if LABELS not in group and group["params"]]
        for group in [each for each in unknown if all(id(parameter) in kernels for parameter in each["params"])]:
            own = [kernels[id(each)] for each in group["params"]]
            group[LABELS] = [each.label for each in own]
            group[BESIDE] = next(iter(self._by_host(own)))
            group[FACTOR] = self._options.lr_factor

    def _place_saved(self, *, at_last: bool) -> None:
        saved = self._saved
        if saved is None:
            return
        groups, states = saved.place(self._groups)
        self._arrange(groups)
        self.optimizer.state.update(states)
        if at_last or not (saved.labels or saved.unsaved):
            self._saved = None
        if at_last and saved.unsaved:
            warn_user(
                f"the optimizer's loaded state has nothing for {_listed(saved.unsaved)}, which begin without: it was "
                "saved with other kernels",
            )
        if at_last and saved.labels:
            warn_user(
                f"the optimizer's loaded state has parts for {_listed(saved.labels)}, kernels that the model does not "
                "have, which are dropped: load the model's checkpoint of the same moment",
            )


def _join(group: Group, kernels: Sequence[KernelParameter]) -> None:
    """Put `kernels` into a group of the same commit's, whose kernels are in one order in whatever order they come."""
    group["params"] = [*group["params"], *(each.parameter for each in kernels)]
    group[LABELS] = [*group[LABELS], *(each.label for each in kernels)]
    if NAMES in group:
        group[NAMES] = [*group[NAMES], *(each.full_name for each in kernels)]
    order = sorted(range(len(group[LABELS])), key=lambda place: group[LABELS][place].rsplit(":", 2)[0])
    group.update(with_parameters(group, order))


def _listed(labels: Iterable[str]) -> str:
    owners = sorted({tuple(label.rsplit(":", 3)[:2]) for label in labels})
    shown = ", ".join(f"seed {seed} of layer {layer!r}" for layer, seed in owners[:4])
    return shown + (f" and {len(owners) - 4} more" if len(owners) > 4 else "")
