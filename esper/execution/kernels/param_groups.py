"""The parameter groups of kernels in an optimizer of `torch.optim`: what is written in one, and how it is made.

A group of kernels is known by its entry `esper_kernels`, the labels of its parameters in their order. It has the
options of the host's group beside it, numbered among the host's by `esper_beside`, its rates times `esper_lr_factor`,
and while they are warmed up the number of steps so far in `esper_warmup`. All of these are numbers and strings, which
an optimizer's state carries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from esper.errors import EsperError, shown
from esper.execution.kernels.optimizer_state import KernelParameter

__all__ = [
    "BESIDE",
    "FACTOR",
    "LABELS",
    "NAMES",
    "WARMED",
    "Group",
    "GroupOptions",
    "OptimizerError",
    "new_group",
    "refresh_rates",
    "scaled",
    "with_parameters",
]

Group = dict[str, Any]

LABELS, BESIDE, FACTOR, WARMED = "esper_kernels", "esper_beside", "esper_lr_factor", "esper_warmup"
NAMES = "param_names"
"""torch's own, where an optimizer was given named parameters."""
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""Of which schedulers write all but the first."""


class OptimizerError(EsperError, ValueError):
    """An optimizer, a scheduler or an option that kernels cannot be put into, or with."""


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """How the groups of kernels differ from the host's beside them.

    Over their first `warmup` steps their rate goes from `start` to `peak` times what it would be, in equal parts, and
    stays at `peak` times that.
    """

    lr_factor: float = 1.0
    lr: float | None = None
    """In place of `lr_factor`, the rate itself, as that which the host's group began with."""
    warmup: int = 0
    start: float = 1.0
    peak: float = 1.3
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def checked(
        cls, defaults: Mapping[str, Any], warmup: object, others: Mapping[str, Any], **rates: Any
    ) -> GroupOptions:
        """Raises `TypeError` for what is no option, and :class:`OptimizerError` for a value that is none of one."""
        unknown = [name for name in others if name not in defaults or name == "params"]
        if unknown:
            known = ", ".join(sorted({"lr_factor", "warmup", "warmup_start", "peak", *defaults}))
            raise TypeError(f"this optimizer's groups have no option {unknown[0]!r}; there are {known}")
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise OptimizerError(f"warmup is a whole number of the optimizer's steps, 0 for none, not {shown(warmup)}")
        options = dict(others)
        lr = options.pop("lr", None)
        numbers = {**rates, **({"lr": lr} if lr is not None else {}), "weight_decay": options.get("weight_decay", 0.0)}
        for name, value in numbers.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 <= value < math.inf:
                raise OptimizerError(f"{name} must be a number of at least 0, not {shown(value)}")
        if lr is not None and rates["lr_factor"] != 1.0:
            raise OptimizerError("lr and lr_factor both say what the kernels' rate is: pass one of them")
        return cls(lr=lr, warmup=warmup, others=options, **rates)

    def factor(self, host: Group) -> float:
        """The kernels' rate beside that of `host`."""
        if self.lr is None:
            return self.lr_factor
        base = float(host["initial_lr"] if "initial_lr" in host else host["lr"])
        if base == 0:
            raise OptimizerError(f"lr={self.lr} cannot be a multiple of the host's rate, which is 0: pass lr_factor")
        return self.lr / base

    def warmth(self, taken: int) -> float:
        """What the rate is multiplied with at a group's next step, after `taken` of them."""
        return self.start + (self.peak - self.start) * min((taken + 1) / self.warmup, 1.0)


def scaled(value: Any, factor: float) -> Any:
    """A rate times `factor`; of a tensor another tensor, on its device."""
    return value.detach().clone() * factor if isinstance(value, Tensor) else value * factor


def new_group(
    host: Group, beside: int, factor: float, options: GroupOptions, kernels: Sequence[KernelParameter]
) -> Group:
    """A group for `kernels`, beside `host`, for `add_param_group`."""
    own = {LABELS, BESIDE, FACTOR, WARMED, NAMES, "params"}
    group = {name: value for name, value in host.items() if name not in own}
    group.update(options.others)
    group.update({BESIDE: beside, FACTOR: factor, **({WARMED: 0} if options.warmup else {})})
    group[LABELS] = [each.label for each in kernels]
    named = NAMES in host
    group["params"] = [(each.full_name, each.parameter) if named else each.parameter for each in kernels]
    refresh_rates(group, host)
    return group


def refresh_rates(group: Group, host: Group) -> None:
    """Give a group of kernels the rates that `host` beside it has now."""
    with torch.inference_mode(False), torch.no_grad():
        for name in _RATES:
            if name in host:
                group[name] = scaled(host[name], group[FACTOR])


def with_parameters(group: Group, kept: Sequence[int]) -> Group:
    """`group` with those of its parameters whose places are `kept`."""
    parallel = {name: [group[name][place] for place in kept] for name in ("params", NAMES, LABELS) if name in group}
    return {**group, **parallel}
