"""Compiled models under functional transforms, as copies and in files, and when Dynamo is reset."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.func import functional_call, grad, jacrev, jvp, vmap

import esper
from tests.compiler.agreement import agrees, agrees_through_a_swap, compiled, load, put, unload
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# -- functional transforms ---------------------------------------------------------------------------------------------


def _energy(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: run(x).square().sum()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda run, x: grad(_energy(run))(x),
    "vmap": lambda run, x: vmap(run)(x),
    "gradients of each row": lambda run, x: vmap(grad(_energy(run)))(x),
    "jacrev": lambda run, x: jacrev(run)(x[0]),
    "jvp": lambda run, x: jvp(run, (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.parametrize("name", ["gradients of each row", "jacrev", "jvp"])
def test_transforms_inside(name: str, model: esper.MorphableModel, shelf: KernelShelf, x: Tensor) -> None:
    def transformed(x: Tensor) -> Tensor:
        return TRANSFORMS[name](model, x)

    agrees_through_a_swap(compiled(transformed), model, {"0": put(shelf)}, x, eager=transformed, within=torch.no_grad)


@pytest.mark.parametrize("name", ["grad", "vmap"])
def test_transforms_around(name: str, model: esper.MorphableModel, shelf: KernelShelf, x: Tensor) -> None:
    run = compiled(model)
    agrees_through_a_swap(
        lambda x: TRANSFORMS[name](run, x),
        model,
        {"0": put(shelf)},
        x,
        eager=lambda x: TRANSFORMS[name](model, x),
        within=torch.no_grad,
    )


def test_transforms_inside_with_other_kernel_parameters(
    model: esper.MorphableModel, shelf: KernelShelf, x: Tensor
) -> None:
    def slopes(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = grad(lambda given: functional_call(model, given, (x,)).square().sum())(parameters)
        return found

    def ensemble(parameters: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = vmap(lambda given: functional_call(model, given, (x,)))(parameters)
        return outputs

    load(model, "0", 0, put(shelf), alpha=0.5)
    parameters = {name: value.detach() + 0.25 for name, value in model.named_parameters()}
    several = {name: torch.stack([value, value - 0.5]) for name, value in parameters.items()}
    torch.testing.assert_close(compiled(slopes, "eager")(parameters), slopes(parameters))
    torch.testing.assert_close(compiled(ensemble, "eager")(several), ensemble(several))


def test_a_functional_call_with_other_host_parameters(
    model: esper.MorphableModel, shelf: KernelShelf, x: Tensor
) -> None:
    names = [name for name, _ in model.named_parameters()]
    others = [torch.randn_like(parameter) for parameter in model.parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    agrees_through_a_swap(compiled(call), model, {"0": put(shelf)}, x, *others, eager=call)


# -- copies, files, resets ---------------------------------------------------------------------------------------------


each_copy = pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])


@each_copy
def test_copies_of_a_model_that_is_compiled_in_place(
    copied: Callable[[Any], Any], model: esper.MorphableModel, shelf: KernelShelf, x: Tensor
) -> None:
    model.compile(backend="esper", options={"inner": "aot_eager"})
    load(model, "0", 0, put(shelf))
    active = agrees(model, model, x)
    twin = copied(model)
    twin.compile(backend="esper", options={"inner": "aot_eager"})
    torch.testing.assert_close(agrees(twin, twin, x), active)
    unload(twin, "0", 0)
    assert not torch.allclose(agrees(twin, twin, x), active)
    assert torch.equal(agrees(model, model, x), active)


@each_copy
def test_a_copy_of_the_compiled_model_is_compiled(
    copied: Callable[[Any], Any], model: esper.MorphableModel, shelf: KernelShelf, x: Tensor
) -> None:
    run = compiled(model)
    load(model, "0", 0, put(shelf))
    active = agrees(run, model, x)
    twin = copied(run)
    assert type(twin) is type(run)
    assert isinstance(twin._orig_mod, esper.MorphableModel)
    assert twin._orig_mod is not model
    torch.testing.assert_close(agrees(twin, twin._orig_mod, x), active)


def test_a_checkpoint_of_the_compiled_model(model: esper.MorphableModel, shelf: KernelShelf, x: Tensor) -> None:
    run = compiled(model)
    load(model, "0", 0, put(shelf))
    active = agrees(run, model, x)
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    fresh = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    other = compiled(fresh)
    other(x)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(agrees(other, fresh, x), active)


def test_a_reset_of_dynamo_in_every_phase(model: esper.MorphableModel, shelf: KernelShelf, x: Tensor) -> None:
    def resetting(x: Tensor) -> Tensor:
        torch._dynamo.reset()
        output: Tensor = run(x)
        torch._dynamo.reset()
        return output

    run = compiled(model)
    agrees_through_a_swap(resetting, model, {"0": put(shelf)}, x)
    loss = run(x).sum()
    torch._dynamo.reset()
    load(model, "0", 0, put(shelf))
    loss.backward()
    agrees(run, model, x)


def test_a_reset_of_dynamo_lets_go_of_what_was_compiled(
    model: esper.MorphableModel, shelf: KernelShelf, x: Tensor
) -> None:
    class Variant:
        def __init__(self, forward: Callable[..., Any]) -> None:
            self.forward = forward

        def __call__(self, *inputs: Any) -> Any:
            return self.forward(*inputs)

    made: list[weakref.ref[Variant]] = []

    def inner(module: fx.GraphModule, inputs: object) -> Variant:
        variant = Variant(module.forward)
        made.append(weakref.ref(variant))
        return variant

    run = compiled(model, inner)
    run(x).sum().backward()
    load(model, "0", 0, put(shelf))
    run(x).sum().backward()
    assert len(made) == 2
    torch._dynamo.reset()
    gc.collect()
    assert [variant() for variant in made] == [None, None]
    agrees(run, model, x)
    unload(model, "0", 0)
    agrees(run, model, x)
