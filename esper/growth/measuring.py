"""Measurements in the middle of training that leave training as it was."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper import torch_internals
from esper.core.morphable_model import MorphableModel
from esper.errors import shown
from esper.execution.kasmina_layer import KasminaLayer
from esper.growth.errors import GrowthError
from esper.growth.probe import Probe
from esper.growth.statistics import SiteStatistics

__all__ = ["CALLED", "LossFunction", "PartialJudgement", "PartialProbe", "undisturbed"]

LossFunction = Callable[[Any, Any], Tensor]
"""The loss of a model for a batch: `(model, batch) -> scalar`."""
CALLED = "loss_fn is called as loss_fn(model, batch) and must return a scalar tensor"


@contextlib.contextmanager
def undisturbed(model: MorphableModel) -> Iterator[None]:
    """Within, the model is in evaluation mode, uncompiled and without gradients.

    Afterwards modes, gradients and torch's random numbers are what they were, whatever happens.
    """
    modes = [(module, module.training) for module in model.modules()]
    gradients = {id(each): (each, each.grad) for each in model.parameters()}
    training = model.training
    devices = sorted({each.device.index or 0 for each in model.parameters() if each.device.type == "cuda"})
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(_restore, model, training, modes, gradients)
        for each, _ in gradients.values():
            each.grad = None
        model.eval()
        yield


def _restore(
    model: MorphableModel,
    training: bool,
    modes: list[tuple[nn.Module, bool]],
    gradients: dict[int, tuple[nn.Parameter, Tensor | None]],
) -> None:
    for each in model.parameters():
        each.grad = None  # also of kernels that came into force meanwhile
    for each, gradient in gradients.values():
        each.grad = gradient
    model.train(training)
    for module, mode in modes:
        module.training = mode


class _Batches:
    """Batches one by one, those of a list or a loader; after `taken` of them, which another run has seen."""

    def __init__(self, name: str, batches: Iterable[Any], taken: int = 0) -> None:
        self._name, self._batches, self._skipped = name, batches, taken
        self._following: Iterator[Any] | None = None
        self.taken = taken
        self.is_over = False
        """Whether the batch that was taken was the last one."""

    def take(self) -> Any:
        """The next batch. Looks whether another one follows it, and raises :class:`GrowthError` if there is none."""
        if self._following is None:
            self._following = iter(self._batches)
            for _ in range(self._skipped):
                next(self._following, None)
            self._look()
        if self.is_over:
            after = f" after {self.taken}, of which there were more before" if self.taken else ""
            raise GrowthError(f"{self._name} gave no batch{after}: pass some, in what gives the same ones each time")
        batch = self._next
        self.taken += 1
        self._look()
        return batch

    def _look(self) -> None:
        assert self._following is not None
        try:
            self._next = next(self._following)
        except StopIteration:
            self._next, self.is_over = None, True


class PartialProbe:
    """A probe that goes on by one batch at a time, while the model is trained in between.

    Inputs and gradients of a batch are those of one and the same model. Their sums are over models that differ by a few
    steps of training, as if one had a batch from each of them.
    """

    def __init__(
        self,
        model: MorphableModel,
        layers: Sequence[str],
        loss_function: LossFunction,
        batches: Iterable[Any],
        rows: int,
        seed: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`state` is what :meth:`state` returned, of a probe of the same layers."""
        self._model, self._layers, self._loss = model, list(layers), loss_function
        self._seed, self._probe = seed, Probe(model, self._layers, rows=rows, seed=seed)
        self.flops = 0
        self.batch_flops = 0
        """Those of the first batch."""
        if state is not None:
            self.flops, self.batch_flops = int(state["flops"]), int(state["batch_flops"])
            self._probe.load_state_dict(state["seen"])
        self._batches = _Batches("probe_batches", batches, 0 if state is None else int(state["taken"]))

    @property
    def taken(self) -> int:
        """How many batches have gone forward and backward."""
        return self._batches.taken

    @property
    def is_over(self) -> bool:
        """Whether that was all of them."""
        return self._batches.is_over

    @property
    def reached(self) -> frozenset[str]:
        """The layers that a gradient has reached."""
        return self._probe.reached

    def take(self) -> None:
        """Let the next batch go forward and backward. Raises :class:`GrowthError`, and what the batches raise."""
        with undisturbed(self._model), torch.enable_grad(), contextlib.ExitStack() as stack:
            batch = self._batches.take()
            for name in self._layers:
                stack.callback(self._model.kasmina_layers[name].register_forward_hook(_reach).remove)
            stack.enter_context(self._probe)
            flops = stack.enter_context(torch_internals.counting_flops())
            loss = _loss_of(self._loss, self._model, batch)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.flops += flops.total
        self.batch_flops = self.batch_flops or flops.total
        if self.is_over and not self.reached:
            layers = ", ".join(map(repr, self._layers))
            raise GrowthError(f"no gradient has reached any of {layers}: does loss_fn use the model?")

    def statistics(self) -> dict[str, SiteStatistics]:
        """Of the layers that a gradient has reached; waits for the device. Raises :class:`GrowthError`."""
        return {name: self._probe[name] for name in self._layers if name in self.reached}

    def state(self) -> dict[str, Any]:
        """What it has seen so far, as data: as large as the statistics are."""
        return {
            "layers": list(self._layers),
            "seed": self._seed,
            "taken": self.taken,
            "flops": self.flops,
            "batch_flops": self.batch_flops,
            "seen": self._probe.state_dict(),
        }


def _reach(layer: KasminaLayer, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Of a site at which nothing learns, and nothing before it, too, the gradient is asked for."""
    del layer, inputs
    if not output.requires_grad and output.is_floating_point() and torch.is_grad_enabled():
        return output.detach().requires_grad_()
    return None


class PartialJudgement:
    """A kernel's counterfactual, one batch at a time: the mean loss with its alpha at 1, and at 0.

    Both are of the same model for each batch, which may be trained between two of them.
    """

    def __init__(
        self,
        model: MorphableModel,
        layer: str,
        seed: int,
        loss_function: LossFunction,
        batches: Iterable[Any],
        losses: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """`losses` are those that :meth:`state` returned."""
        self._model, self._layer, self._seed, self._loss = model, layer, seed, loss_function
        known = losses or {"with": (), "without": ()}
        self._losses = {name: [float(each) for each in known[name]] for name in ("with", "without")}
        self._batches = _Batches("judge_batches", batches, len(self._losses["without"]))

    @property
    def is_over(self) -> bool:
        """Whether all batches were taken."""
        return self._batches.is_over

    def take(self) -> int:
        """Judge by the next batch; returns FLOPs. The kernel's alpha is to be on no schedule.

        Raises :class:`GrowthError`, and what the batches raise.
        """
        alpha = self._model.kasmina_layers[self._layer].state.alpha(self._seed)
        found = {}
        try:
            # With gradients on, though nobody wants them: else machine code of kernels may run, which rounds otherwise.
            with undisturbed(self._model), torch_internals.counting_flops() as flops, torch.enable_grad():
                batch = self._batches.take()
                for name, each in (("with", 1.0), ("without", 0.0)):
                    self._model.set_alpha(self._layer, self._seed, each)
                    found[name] = _loss_of(self._loss, self._model, batch).detach()
        finally:
            self._model.set_alpha(self._layer, self._seed, alpha)
        for name, loss in found.items():
            self._losses[name].append(float(loss))
        return flops.total

    @property
    def losses(self) -> tuple[float, float]:
        """The mean over the batches so far, with the kernel and without."""
        with_it, without = (sum(each) / len(each) for each in self._losses.values())
        return with_it, without

    def state(self) -> dict[str, list[float]]:
        """What it has seen so far, as data."""
        return {name: list(each) for name, each in self._losses.items()}


def _loss_of(loss_function: LossFunction, model: MorphableModel, batch: Any) -> Tensor:
    try:
        loss = loss_function(model, batch)
    except Exception as cause:
        raise GrowthError(f"{CALLED}, and raised {type(cause).__name__}: {cause}") from cause
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise GrowthError(f"{CALLED}, not {_described(loss)}")
    return loss.reshape(())


def _described(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else shown(value)
