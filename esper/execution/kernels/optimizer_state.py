"""The kernels' names in an optimizer's saved state, by which it is given back to the right kernels.

`torch.optim` matches a loaded state to parameters by position, and kernels come in any order. So a saved state has,
beside what the optimizer keeps for a kernel's parameter, a number that stands for the parameter's name. Once it is
loaded, the parameters are put where their states, and the options of their groups, are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

__all__ = ["KernelParameter", "give_back", "name_states", "without_name"]

_KEY = "esper_kernel"
"""Where a saved state has the number. A number, because `Optimizer.load_state_dict` takes strings apart."""


@dataclass(frozen=True, slots=True)
class KernelParameter:
    """A parameter of a kernel in force, and where that is."""

    parameter: nn.Parameter
    layer: str
    seed: int
    name: str
    artifact_id: str
    beside: nn.Parameter | None
    """The weight of the layer that has the kernel."""
    full_name: str
    """Its name among the model's parameters."""

    @property
    def number(self) -> int:
        """What stands for its name in a saved state; the same in every process."""
        name = f"{self.layer}\n{self.seed}\n{self.name}\n{self.artifact_id}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1

    @property
    def label(self) -> str:
        """What stands for it in a group that is saved; the same in every process."""
        return f"{self.layer}:{self.seed}:{self.name}:{self.artifact_id}"

    @property
    def owner(self) -> str:
        """The kernel, for messages."""
        return f"seed {self.seed} of layer {self.layer!r}"


Known = Mapping[int, KernelParameter]
"""The parameters of kernels in force, by their `id`."""


def name_states(optimizer: Optimizer, saved: dict[str, Any], known: Known) -> None:
    """Write into `saved`, which is what `optimizer.state_dict()` is about to return, whose states the kernels' are."""
    states = saved["state"]
    for group, packed in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, index in zip(group["params"], packed["params"], strict=True):
            kernel = known.get(id(parameter))
            if kernel is not None and (states.get(index) or type(optimizer) is SGD):  # others look for their own keys
                states[index] = {**states.get(index, {}), _KEY: kernel.number}


def without_name(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state as it was before :func:`name_states`."""
    return {key: value for key, value in state.items() if key != _KEY}


def give_back(optimizer: Optimizer, known: Known) -> list[str]:
    """Put the parameters of `optimizer`, whose state was loaded, where their states are.

    Returns the kernels that are left without a state, as none of those that were saved is theirs.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    states = [optimizer.state.get(each) or {} for each in parameters]
    wanted = [state.pop(_KEY, None) for state in states]
    numbers = [kernel.number if (kernel := known.get(id(each))) else None for each in parameters]
    if wanted == numbers or not any(wanted):
        return []
    order = _matched(wanted, numbers, [bool(state) for state in states])
    arranged = iter(parameters[index] for index in order)
    for group in optimizer.param_groups:
        group["params"][:] = [next(arranged) for _ in group["params"]]
    for each in parameters:
        optimizer.state.pop(each, None)
    without = []
    for index, state, number in zip(order, states, wanted, strict=True):
        parameter, kernel = parameters[index], known.get(id(parameters[index]))
        if state and number == numbers[index]:
            optimizer.state[parameter] = {key: _as_of(parameter, key, value) for key, value in state.items()}
        elif kernel is not None and state:
            without.append(kernel.owner)
    return list(dict.fromkeys(without))


def _matched(wanted: list[int | None], numbers: list[int | None], filled: list[bool]) -> list[int]:
    """For each place the index of the parameter that belongs there; `filled` says which places have a state.

    A place that wants a kernel gets it. The host's parameters have the others, in their order. What is left over are
    kernels that no place wants, in places whose kernels are not there or had no state.
    """
    places = range(len(wanted))
    order: dict[int, int] = {place: place for place in places if wanted[place] == numbers[place] is not None}
    free = [index for index in places if index not in order]
    for place in places:
        if place not in order and wanted[place] is not None:
            found = next((index for index in free if numbers[index] == wanted[place]), None)
            if found is not None:
                order[place] = found
                free.remove(found)
    for place in [each for each in free if each not in order and wanted[each] is None]:
        if numbers[place] is None or not filled[place]:
            order[place] = place
            free.remove(place)
    open_places = sorted((place for place in places if place not in order), key=lambda place: wanted[place] is not None)
    free.sort(key=lambda index: numbers[index] is not None)
    order.update(zip(open_places, free, strict=True))
    return [order[place] for place in places]


def _as_of(parameter: Tensor, key: str, value: Any) -> Any:
    """A part of a state that torch has cast for the parameter in whose place it was."""
    is_step = key == "step" or not isinstance(value, torch.Tensor) or not value.is_floating_point()
    return value if is_step else value.to(device=parameter.device, dtype=parameter.dtype)
