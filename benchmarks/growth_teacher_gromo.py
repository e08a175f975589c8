"""The student of `growth_teacher` in gromo, which grows by methods of its own; none where it is not installed."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from benchmarks.growth_teacher import Task

__all__ = ["GROMO", "GromoStudent"]

_TINY = {"compute_delta": False}
_GRADMAX = {
    "compute_delta": False, "use_covariance": False, "alpha_zero": True, "use_projection": False,
    "ignore_singular_values": True,
}  # fmt: skip
_METHODS: Mapping[str, Mapping[str, Any]] = {
    "TINY": _TINY,
    "TINY with Fisher": {**_TINY, "use_fisher": True},
    "GradMax": _GRADMAX,
}
"""Options of `compute_optimal_updates`, as its documentation gives them for the two papers."""
GROMO = tuple(_METHODS) if importlib.util.find_spec("gromo") else ()
"""The methods that can be run here."""
_SCALES = tuple(10.0 ** (power / 2) for power in range(-6, 7))
"""What TINY's step is tried with; the one of the lowest loss is taken, as in gromo's tutorials."""


class GromoStudent:
    """A growing MLP of gromo's, without biases."""

    def __init__(self, task: Task, rate: float, step_flops: Callable[[int], float]) -> None:
        from gromo.containers.growing_mlp import GrowingMLP
        from gromo.utils.utils import ReLUDerivativeOneAtZero

        activation = ReLUDerivativeOneAtZero() if task.activation == "relu" else nn.SiLU()
        hidden, features = task.small[0].shape
        self.task, self._rate, self._step_flops = task, rate, step_flops
        self.model = GrowingMLP(
            features, task.y.shape[1], hidden, 1, activation, use_bias=False, flatten=False, device=torch.device("cpu")
        )
        with torch.no_grad():
            for layer, weight in zip(self.model.layers, task.small, strict=True):
                layer.weight.copy_(weight)
        self.optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=self._rate)

    def grow(self, method: str) -> float:
        """One more neuron; returns the FLOPs of finding its weights."""
        hidden = self.model.layers[0].weight.shape[0]
        self.model.init_computation()
        self.optimizer.zero_grad()
        (self.task.loss(self.model) * self.task.y.numel()).backward()  # a sum, as its thresholds expect
        self.model.update_computation()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of eigenvalues below its thresholds
            self.model.compute_optimal_updates(maximum_added_neurons=1, **_METHODS[method])
        self.model.reset_computation()
        self.model.select_update(0)
        layer = self.model.currently_updated_layer
        if method == "GradMax":
            layer.normalize_optimal_updates(normalization_type="gradmax_normalization")
            self.model.set_scaling_factor(1.0)
            tried = 0
        else:
            self.model.set_scaling_factor(min(_SCALES, key=self._loss_at))
            tried = len(_SCALES)
        self.model.apply_change()
        self.optimizer = self._new_optimizer()
        rows, features = self.task.x.shape
        moments = 2.0 * rows * (features**2 + features * hidden * 2 + hidden**2 + features**2)
        return self._step_flops(hidden) + moments + tried * 0.4 * self._step_flops(hidden + 1)

    def _loss_at(self, scale: float) -> float:
        self.model.set_scaling_factor(scale)

        def extended(x: Tensor) -> Tensor:
            output: Tensor = self.model.extended_forward(x)
            return output[0] if isinstance(output, tuple) else output

        with torch.no_grad():
            return float(self.task.loss(extended))

    def newest_gradient(self) -> float:
        """The norm of the gradient of the neuron that came last."""
        first, last = (layer.weight.grad for layer in self.model.layers)
        assert first is not None
        assert last is not None
        return math.sqrt(float(first[-1].square().sum()) + float(last[:, -1].square().sum()))
