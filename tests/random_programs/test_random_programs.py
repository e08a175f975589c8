"""Random programs: whatever is done to a model, in whatever order, it computes what the formula says.

Fifty programs run here; `ESPER_RANDOM_PROGRAMS=1000` runs as many as that says.
"""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import Tensor, nn

import esper
from esper.execution.lifecycle import LifecycleError
from tests.kernel_shelf import KernelShelf
from tests.random_programs.reference import KINDS, LAYERS, Host, Kernel, Reference, kernel_values

PROGRAMS = int(os.environ.get("ESPER_RANDOM_PROGRAMS", "50"))
FEATURES = {"first": (6, 8), "second": (8, 8), "third": (8, 4)}
layers, seeds = st.sampled_from(LAYERS), st.integers(0, 2)
alphas = st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0])
ramps = st.tuples(alphas, alphas, st.integers(1, 4))
kernels = st.builds(
    Kernel,
    kind=st.sampled_from(KINDS),
    identity=st.booleans(),
    trainable=st.booleans(),
    isolate=st.booleans(),
    alpha=alphas,
)


def blueprint(kernel: Kernel, layer: str, number: int) -> esper.Blueprint:
    """The blueprint of a kernel; one that starts as the identity has its last map trained, so to say, by `stirred`."""
    size, options = FEATURES[layer], {"start": "identity" if kernel.identity else "kaiming", "seed": number}
    if kernel.kind == "bottleneck":
        return esper.Blueprint.bottleneck(*size, 3, activation="tanh", **options)  # type: ignore[arg-type]  # keywords from a dict or parameters
    if kernel.kind == "gated_mlp":
        return esper.Blueprint.gated_mlp(*size, 3, **options)  # type: ignore[arg-type]  # keywords from a dict or parameters
    if kernel.kind == "low_rank":
        return esper.Blueprint.low_rank(*size, 2, **options)  # type: ignore[arg-type]  # keywords from a dict or parameters
    return esper.Blueprint.affine(*size, **options)  # type: ignore[arg-type]  # keywords from a dict or parameters


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


class Program(RuleBasedStateMachine):
    """One model, eager or compiled, and what it has to compute."""

    shelf: KernelShelf
    model: Any
    run: Callable[[Tensor], Tensor]

    @initialize(mode=st.sampled_from(["module", "module", "fx", "fx", "compiled"]), number=st.integers(0, 2**16))
    def wrap(self, mode: str, number: int) -> None:
        torch.manual_seed(number)
        self.mode, self.number, self.dtype = mode, number, torch.float32
        self.reference = Reference()
        self.hooks: dict[str, Any] = {}
        self._use(self._wrapped(Host()))

    def _wrapped(self, host: Host) -> Any:
        mode: Any = "fx" if self.mode == "fx" else "module"
        return esper.wrap(host, seeds_per_layer=3, platform=self.shelf.platform, mode=mode)  # type: ignore[arg-type]  # a text among the parameters

    def _use(self, model: Any) -> None:
        self.model = self.run = model
        if self.mode == "compiled":
            self.run = torch.compile(model, backend="esper", options={"inner": "eager"})

    def _input(self) -> Tensor:
        self.number += 1
        return torch.randn(4, 6, generator=torch.Generator().manual_seed(self.number)).to(self.dtype)

    # -- kernels ---------------------------------------------------------------------------------------------------

    @rule(layer=layers, seed=seeds, kernel=kernels, ramp=st.none() | ramps)
    def load(self, layer: str, seed: int, kernel: Kernel, ramp: tuple[float, float, int] | None) -> None:
        if self.dtype is not torch.float32 or self.reference.is_fossil(layer, seed):
            return
        kernel = copy.copy(kernel)
        alpha: Any = kernel.alpha
        if ramp is not None:
            alpha, kernel.ramp, kernel.alpha = esper.LinearRamp(*ramp), (*ramp, 0), ramp[0]
        self.number += 1
        artifact = self.shelf.put(blueprint(kernel, layer, self.number)).id
        options = {"alpha": alpha, "trainable": kernel.trainable, "isolate": kernel.isolate}
        assert self.model.request_kernel(layer, seed, artifact, **options).result(60), self.model.get_model_stats()
        self.reference.kernels[layer, seed] = kernel

    @rule(layer=layers, seed=seeds)
    def unload(self, layer: str, seed: int) -> None:
        if self.reference.is_fossil(layer, seed):
            with pytest.raises(LifecycleError):
                self.model.unload_kernel(layer, seed)
        else:
            assert self.model.unload_kernel(layer, seed) is ((layer, seed) in self.reference.kernels)
            self.reference.kernels.pop((layer, seed), None)

    @rule(layer=layers, seed=seeds)
    def fossilize(self, layer: str, seed: int) -> None:
        self.infer()  # what is staged comes into force
        kernel = self.reference.kernels.get((layer, seed))
        if kernel is not None and not kernel.fossil:
            assert self.model.fossilize(layer, seed)
            kernel.fossil, kernel.ramp = True, None

    @rule(layer=layers, seed=seeds, alpha=alphas, ramp=st.none() | ramps)
    def set_alpha(self, layer: str, seed: int, alpha: float, ramp: tuple[float, float, int] | None) -> None:
        kernel = self.reference.kernels.get((layer, seed))
        if kernel is not None and not kernel.fossil:
            self.model.set_alpha(layer, seed, alpha if ramp is None else esper.LinearRamp(*ramp))
            kernel.alpha, kernel.ramp = (alpha, None) if ramp is None else (ramp[0], (*ramp, 0))

    # -- forwards --------------------------------------------------------------------------------------------------

    def _expected(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The reference's output, its leaves, and its input, after a forward of the model."""
        for key, kernel in list(self.reference.kernels.items()):
            if kernel.fossil and not kernel_values(self.model, *key):
                del self.reference.kernels[key]  # the reference reads the host's weights
                self.reference.folded.add(key)
        leaves, given = self.reference.leaves(self.model), x.detach().double().requires_grad_()
        keep = torch.ones(4, 8, dtype=self.dtype)
        if self.reference.training:
            torch.manual_seed(self.number)
            keep = torch.nn.functional.dropout(keep, 0.5)
        return self.reference(given, leaves, lambda h: h * keep.double()), leaves, given

    @rule()
    def infer(self) -> None:
        x = self._input()
        torch.manual_seed(self.number)
        with torch.no_grad():
            output = self.run(x)
        self._agree(output, self._expected(x)[0])

    @rule(penalty=st.booleans(), twice=st.booleans())
    def train_step(self, penalty: bool, twice: bool) -> None:
        x = self._input().requires_grad_()
        self.model.zero_grad()
        if self.reference.training:
            self.reference.advance()
        torch.manual_seed(self.number)
        output = self.run(x)
        expected, leaves, given = self._expected(x)
        self._agree(output, expected)
        if not output.requires_grad:
            return
        losses = [_loss(each, inputs, penalty) for each, inputs in ((output, x), (expected, given))]
        for loss in losses:
            if twice:
                loss.backward(retain_graph=True)
            loss.backward()
        for name, parameter in self.model.named_parameters():
            theirs = leaves[name].grad
            if parameter.grad is None or theirs is None:
                assert _nothing(parameter.grad), name
                assert _nothing(theirs), name
            else:
                self._agree(parameter.grad, theirs)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad.clamp(-1, 1)

    def _agree(self, ours: Tensor, theirs: Tensor) -> None:
        torch.testing.assert_close(ours.detach().double(), theirs.detach(), rtol=1e-3, atol=1e-4)

    # -- what else is done to a model ------------------------------------------------------------------------------

    @rule(training=st.booleans())
    def train(self, training: bool) -> None:
        self.model.train(training)
        self.reference.training = training

    @rule(scale=st.sampled_from([0.5, 1.0, 2.0]))
    def change_an_attribute(self, scale: float) -> None:
        self.model.scale = self.reference.scale = scale
        if self.mode == "fx":
            self.model.retrace()

    @rule(layer=layers)
    def hook(self, layer: str) -> None:
        if self.mode == "compiled":
            return  # Dynamo does not look at hooks that come after it compiled a module
        if layer in self.hooks:
            self.hooks.pop(layer).remove()
            self.reference.doubled.discard(layer)
        else:
            self.hooks[layer] = self.model.get_submodule(layer).register_forward_hook(doubled)
            self.reference.doubled.add(layer)

    @rule()
    def cast(self) -> None:
        self.dtype = torch.float64 if self.dtype is torch.float32 else torch.float32
        self.model.to(self.dtype)

    @rule(layer=layers, learns=st.booleans())
    def freeze(self, layer: str, learns: bool) -> None:
        self.model.get_submodule(layer).weight.requires_grad_(learns)

    @precondition(lambda self: not self.hooks)
    @rule()
    def copy(self) -> None:
        self.infer()
        self._use(copy.deepcopy(self.model))

    @precondition(lambda self: not self.hooks)
    @rule()
    def save_and_load(self) -> None:
        self.infer()
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        file.seek(0)
        old, fresh = self.model, self._wrapped(Host().to(self.dtype))
        fresh.load_state_dict(torch.load(file, weights_only=True))
        for name, parameter in fresh.named_parameters():
            parameter.requires_grad_(old.get_parameter(name).requires_grad)
        fresh.train(self.reference.training)
        fresh.scale = self.reference.scale
        self.reference.folded.clear()
        self._use(fresh)


def _loss(output: Tensor, inputs: Tensor, penalty: bool) -> Tensor:
    loss = output.square().mean()
    if penalty:
        (slope,) = torch.autograd.grad(output.sum(), inputs, create_graph=True)
        loss = loss + 0.1 * slope.square().mean()
    return loss


def _nothing(gradient: Tensor | None) -> bool:
    return gradient is None or not gradient.any()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
def test_random_programs(shelf: KernelShelf, fresh_dynamo: None) -> None:
    Program.shelf = shelf
    run_state_machine_as_test(  # type: ignore[no-untyped-call]  # hypothesis leaves it untyped
        Program,
        settings=settings(
            max_examples=PROGRAMS,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize="ESPER_RANDOM_PROGRAMS" not in os.environ,
        ),
    )
