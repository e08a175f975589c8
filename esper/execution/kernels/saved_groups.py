"""The groups of kernels in an optimizer's saved state, on their way to the kernels, which may come sooner or later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esper.execution.kernels.optimizer_state import without_name
from esper.execution.kernels.param_groups import LABELS, NAMES, WARMED, Group, with_parameters

__all__ = ["SavedGroups"]


class SavedGroups:
    """Those of one state, until each kernel was given its own: what `Optimizer.state_dict` has for it, by label."""

    def __init__(self, state: Mapping[str, Any], present: frozenset[str]) -> None:
        """`present` are the labels of those that the optimizer holds."""
        self._groups: list[Group] = [group for group in state["param_groups"] if LABELS in group]
        self.unsaved = present - self.labels
        """Of kernels' parameters that the optimizer held when the state was loaded, those that it has nothing for."""
        self._states: dict[str, Mapping[str, Any]] = {}
        for group in self._groups:
            for label, index in zip(group[LABELS], group["params"], strict=True):
                self._states[label] = without_name(state["state"].get(index) or {})

    @property
    def labels(self) -> frozenset[str]:
        """Of the kernels' parameters that are still to come."""
        return frozenset(label for group in self._groups for label in group[LABELS])

    def hosts_part(self, state: Mapping[str, Any], groups: Sequence[Group]) -> dict[str, Any]:
        """`state` for an optimizer with `groups`, of which those of kernels stay as they are, without states."""
        hosts = [group for group in state["param_groups"] if LABELS not in group]
        taken = {index for group in hosts for index in group["params"]}
        fresh = max((index for index in taken if isinstance(index, int)), default=-1) + 1
        own, arranged = iter(hosts), []
        for group in groups:
            if LABELS in group:
                count = len(group["params"])
                arranged.append({**group, "params": list(range(fresh, fresh + count))})
                fresh += count
            else:
                arranged += [each] if (each := next(own, None)) is not None else []
        kernels = {index for group in self._groups for index in group["params"]}
        states = {index: each for index, each in state["state"].items() if index not in kernels}
        return {**state, "param_groups": [*arranged, *own], "state": states}  # torch says if there are too many

    def place(self, groups: Sequence[Group]) -> tuple[list[Group], dict[Tensor, dict[str, Any]]]:
        """Give the kernels in `groups` what is theirs: `groups` as they were saved, and the states of parameters.

        What is not placed waits further.
        """
        at = {label: (group, place) for group in groups for place, label in enumerate(group.get(LABELS, ()))}
        placed: list[Group] = []
        states: dict[Tensor, dict[str, Any]] = {}
        for saved in self._groups:
            labels = [label for label in saved[LABELS] if label in at]
            if not labels:
                continue
            parts = [with_parameters(at[label][0], [at[label][1]]) for label in labels]
            joined = {name: [each for part in parts for each in part[name]] for name in _parallel(parts[0])}
            others = {name: value for name, value in parts[0].items() if name != WARMED}  # which may be over
            group = _own_tensors({**others, **saved, **joined})
            placed.append(group)
            for label, parameter in zip(labels, group["params"], strict=True):
                if state := self._states.pop(label):
                    states[parameter] = {key: _cast(parameter, key, each, group) for key, each in state.items()}
        found = {label for group in placed for label in group[LABELS]}
        rest = [_without(group, found) for group in groups]
        kept = [group for group in rest if LABELS not in group]
        unsaved = [group for group in rest if group.get(LABELS)]
        self._groups = [group for group in (_without(group, found) for group in self._groups) if group[LABELS]]
        return [*kept, *placed, *unsaved], states


def _parallel(group: Group) -> list[str]:
    return [name for name in ("params", NAMES, LABELS) if name in group]


def _without(group: Group, labels: set[str]) -> Group:
    if LABELS not in group or labels.isdisjoint(group[LABELS]):
        return group
    return with_parameters(group, [place for place, label in enumerate(group[LABELS]) if label not in labels])


def _own_tensors(group: Group) -> Group:
    return {name: each.clone() if isinstance(each, Tensor) else each for name, each in group.items()}


def _cast(parameter: Tensor, key: str, value: Any, group: Group) -> Any:
    """A part of a state as `Optimizer.load_state_dict` would have it: of the parameter's device, and its dtype."""
    if not isinstance(value, Tensor):
        return value
    if key == "step":
        on_device = group.get("capturable") or group.get("fused")
        return value.to(parameter.device, torch.float32) if on_device else value
    return value.to(parameter.device, parameter.dtype if parameter.is_floating_point() else value.dtype)
