"""The statistics of one site over some batches: second moments of inputs and gradients, and a sample of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.growth.errors import GrowthError

__all__ = ["RunningStatistics", "SiteStatistics"]

_SUMS = ("inputs", "cross", "gradients")
_SAMPLED = ("keys", "rows", "outputs", "row_gradients")


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """What a site took in and what gradients it was given, over the batches of a probe.

    `x` are its inputs with a 1 appended, `g` the gradients of the loss with respect to what the site returns, one row
    for each position of a batch. All tensors are float32 and on the model's device.
    """

    name: str
    """The layer's dotted name."""
    count: int
    """Rows."""
    batches: int
    """Calls of the layer that a backward came back to."""
    inputs: Tensor
    """E[x xᵀ], `[in_features + 1, in_features + 1]`."""
    cross: Tensor
    """E[g xᵀ], `[out_features, in_features + 1]`: the gradient of weight and bias, but for the number of rows."""
    gradients: Tensor
    """E[g gᵀ], `[out_features, out_features]`."""
    rows: Tensor
    """A uniform sample of the inputs, `[n, in_features]`."""
    row_outputs: Tensor
    """What the site returned for `rows`, kernels in force included, `[n, out_features]`."""
    row_gradients: Tensor
    """The gradients for `rows`, `[n, out_features]`."""
    learns: tuple[bool, bool]
    """Whether the layer's own weight learns, and its bias."""

    @property
    def in_features(self) -> int:
        return self.rows.shape[1]

    @property
    def out_features(self) -> int:
        return self.row_gradients.shape[1]

    def host_features(self) -> Tensor:
        """The columns of `inputs` that the layer's own parameters that learn are multiplied with, `int64 [k]`."""
        weight, bias = self.learns
        columns = [*(range(self.in_features) if weight else ()), *([self.in_features] if bias else ())]
        return torch.tensor(columns, dtype=torch.int64, device=self.inputs.device)

    def row_features(self) -> Tensor:
        """The sampled inputs with a 1 appended, `[n, in_features + 1]`."""
        return torch.cat([self.rows, self.rows.new_ones(len(self.rows), 1)], 1)


class RunningStatistics:
    """The statistics of one site while batches go by. For the threads that run the model's backward, one at a time."""

    def __init__(self, name: str, in_features: int, out_features: int, rows: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, device=device)

        self._name, self._most = name, rows
        self._count = self._batches = 0
        self._inputs = zeros(in_features + 1, in_features + 1)
        self._cross = zeros(out_features, in_features + 1)
        self._gradients = zeros(out_features, out_features)
        self._keys = zeros(0)
        self._rows, self._outputs = zeros(0, in_features), zeros(0, out_features)
        self._row_gradients = zeros(0, out_features)

    @property
    def device(self) -> torch.device:
        return self._inputs.device

    def add(self, x: Tensor, g: Tensor, chosen: Tensor, keys: Tensor, outputs: Tensor) -> None:
        """Rows `x` and their gradients `g`. Waits for no device.

        `chosen` are those that may enter the sample, `keys` their random numbers, `outputs` what the site returned.
        """
        x, g = x.float(), g.float()
        with_one = torch.cat([x, x.new_ones(len(x), 1)], 1)
        self._count += len(x)
        self._batches += 1
        self._inputs.addmm_(with_one.T, with_one)
        self._cross.addmm_(g.T, with_one)
        self._gradients.addmm_(g.T, g)
        parts = {
            "_keys": keys,
            "_rows": x[chosen],
            "_outputs": outputs.float(),
            "_row_gradients": g[chosen],
        }
        joined = {name: torch.cat([getattr(self, name), part]) for name, part in parts.items()}
        if len(joined["_keys"]) > self._most:  # those of the largest keys are a uniform sample of all rows so far
            kept = joined["_keys"].topk(self._most).indices
            joined = {name: tensor[kept] for name, tensor in joined.items()}
        vars(self).update(joined)

    def state(self) -> dict[str, Any]:
        """The sums and the sample so far, copied."""
        tensors = {name: getattr(self, f"_{name}").clone() for name in _SUMS + _SAMPLED}
        return {"count": self._count, "batches": self._batches, **tensors}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned. Raises `ValueError` if that is of another site."""
        found = {name: state[name].to(self.device, torch.float32, copy=True) for name in _SUMS + _SAMPLED}
        rows = len(found["keys"])
        for name, tensor in found.items():
            known = getattr(self, f"_{name}").shape
            wanted = known if name in _SUMS else (rows, *known[1:])
            if tensor.shape != torch.Size(wanted):
                raise ValueError(f"{name} of layer {self._name!r} is of shape {list(tensor.shape)}, not {list(wanted)}")
        self._count, self._batches = int(state["count"]), int(state["batches"])
        vars(self).update({f"_{name}": tensor for name, tensor in found.items()})

    def finish(self, learns: tuple[bool, bool]) -> SiteStatistics:
        """The statistics so far. Raises :class:`GrowthError` if there are none, or they are not finite."""
        if not self._count:
            raise GrowthError(
                f"no gradient has reached layer {self._name!r}: run loss.backward() on batches that use it, within the "
                "probe's block"
            )
        inputs, cross, gradients = (each / self._count for each in (self._inputs, self._cross, self._gradients))
        if not all(bool(each.isfinite().all()) for each in (inputs, cross, gradients)):
            raise GrowthError(
                f"inputs or gradients of layer {self._name!r} were infinite or NaN: look at the loss of the batches"
            )
        return SiteStatistics(
            self._name, self._count, self._batches, inputs, cross, gradients,
            self._rows, self._outputs, self._row_gradients, learns,
        )  # fmt: skip
