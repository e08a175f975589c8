"""What eager PyTorch can do, an eager model with kernels in force can: with kernels as users get them.

Every kernel is taken three ways: without an attachment, with the one that a platform's worker compiled, and with the
same one said to be faster for any number of rows, so that it runs where it may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import esper
from esper import Platform
from esper.artifacts import build_artifact
from tests.core.seeds import load
from tests.kernel_shelf import COMPILED, KernelShelf, compiled_code

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("attachments")]

ARTIFACTS = {name: build_artifact(blueprint) for name, blueprint in COMPILED.items()}
KERNELS = {name: fx.GraphModule(nn.Module(), artifact.graph.to_fx()) for name, artifact in ARTIFACTS.items()}
SETUPS: dict[str, list[dict[str, Any]]] = {
    "trainable": [{"kernel": "bottleneck", "trainable": True}],
    "frozen": [{"kernel": "bottleneck"}],
    "isolated and gated": [{"kernel": "gated", "trainable": True, "isolate": True}],
    "gated": [{"kernel": "gated", "trainable": True}],
    "reading the host": [{"kernel": "identity", "trainable": True}],
    "several seeds": [{"kernel": "gated", "trainable": True}, {"kernel": "bottleneck", "isolate": True}],
}
ALPHA = 0.5
Values = dict[str, Tensor]
Run = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def platforms(
    shelf: KernelShelf, compiled: Platform, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, Platform]]:
    """The same kernels with different attachments."""
    with KernelShelf(tmp_path_factory.mktemp("faster")) as faster:
        for name, blueprint in COMPILED.items():
            kernel = ARTIFACTS[name].id
            assert shelf.put(blueprint).id == faster.put(blueprint).id == kernel
            faster.attach(kernel, compiled_code(compiled, kernel))
        yield {"without": shelf.platform, "as compiled": compiled, "faster": faster.platform}


def grown(platform: Platform, setup: Sequence[Mapping[str, Any]], mode: Any) -> esper.MorphableModel:
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)), platform=platform, mode=mode)
    for seed, each in enumerate(setup):
        options = {name: value for name, value in each.items() if name != "kernel"}
        load(model, "0", seed, ARTIFACTS[each["kernel"]].id, alpha=ALPHA, **options)
    return model


def formula(model: esper.MorphableModel, setup: Sequence[Mapping[str, Any]]) -> tuple[Run, Values]:
    """The model by hand, in float64, with parameters of its own."""
    values = {
        name: parameter.detach().double().requires_grad_(parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }

    def run(x: Tensor) -> Tensor:
        y = host = F.linear(x, values["0.weight"], values["0.bias"])
        for seed, each in enumerate(setup):
            given, beside = (x.detach(), host.detach()) if each.get("isolate") else (x, host)
            graph, kernel = ARTIFACTS[each["kernel"]].graph, KERNELS[each["kernel"]]
            own = [values[f"_esper.0:{seed}.{name}"] for name in graph.parameter_names]
            y = torch.lerp(y, kernel(given, *([beside] if graph.uses_host else []), *own), ALPHA)
        return F.linear(torch.tanh(y), values["2.weight"], values["2.bias"])

    return run, values


# Each takes what to run, its input and the parameters that learn, and returns what it computed.


def once(run: Run, x: Tensor, learning: Sequence[Tensor]) -> list[Tensor]:
    y = run(x)
    return [y, *torch.autograd.grad(y.square().sum() + y.sum(), [x, *learning])]


def gradient_penalty(run: Run, x: Tensor, learning: Sequence[Tensor]) -> list[Tensor]:
    (slope,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
    penalty = ((slope.norm(dim=1) - 1) ** 2).mean()
    return [slope, *_filled(torch.autograd.grad(penalty, [x, *learning], allow_unused=True), [x, *learning])]


def hessian(run: Run, x: Tensor, learning: Sequence[Tensor]) -> list[Tensor]:
    def loss(x: Tensor) -> Tensor:
        return run(x).square().sum()

    functional: Any = torch.autograd.functional
    return [
        functional.hessian(loss, x.detach()),
        functional.hessian(loss, x.detach(), vectorize=True),
        functional.jacobian(run, x.detach(), vectorize=True),
        *functional.hvp(loss, x.detach(), torch.ones_like(x)),
    ]


def batched_gradients(run: Run, x: Tensor, learning: Sequence[Tensor]) -> list[Tensor]:
    y = run(x)
    basis = torch.eye(len(y), dtype=y.dtype).unsqueeze(-1)
    return list(torch.autograd.grad(y, [x, *learning], basis, is_grads_batched=True))


def two_losses(run: Run, x: Tensor, learning: Sequence[Tensor]) -> list[Tensor]:
    y = run(x)
    y.sum().backward(retain_graph=True)
    y.square().sum().backward()
    return _taken([x, *learning])


def gradients_by_task(run: Run, x: Tensor, learning: Sequence[Tensor]) -> list[Tensor]:
    y = run(x)
    first = torch.autograd.grad(y.sum(), [x, *learning], retain_graph=True)
    return [*first, *torch.autograd.grad(y.square().sum(), [x, *learning])]


def backward_in_parts(run: Run, x: Tensor, learning: Sequence[Tensor]) -> list[Tensor]:
    loss = run(x).square().sum()
    loss.backward(inputs=list(learning[:3]), retain_graph=True)
    loss.backward(inputs=[x, *learning[3:]])
    return _taken([x, *learning])


def inference(run: Run, x: Tensor, learning: Sequence[Tensor]) -> list[Tensor]:
    with torch.inference_mode():
        results = [run(x), run(x.detach() + 1)]
    with torch.no_grad():
        results.append(run(x))
    return [*results, *once(run, x, learning)]


def transforms(run: Run, x: Tensor, learning: Sequence[Tensor]) -> list[Tensor]:
    def loss(row: Tensor) -> Tensor:
        return run(row).square().sum()

    x = x.detach()
    _, tangent = torch.func.jvp(run, (x,), (torch.ones_like(x),))
    return [torch.func.vmap(torch.func.grad(loss))(x), torch.func.vmap(torch.func.jacrev(run))(x), tangent]


def recomputed(run: Run, x: Tensor, learning: Sequence[Tensor]) -> list[Tensor]:
    return once(lambda x: checkpoint(run, x, use_reentrant=False), x, learning)  # type: ignore[no-any-return]  # torch leaves it untyped


def saved_elsewhere(run: Run, x: Tensor, learning: Sequence[Tensor]) -> list[Tensor]:
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept.clone(), lambda kept: kept):
        y = run(x)
    return list(torch.autograd.grad(y.sum(), [x, *learning]))


def without_donated_buffers(run: Run, x: Tensor, learning: Sequence[Tensor]) -> list[Tensor]:
    with torch._functorch.config.patch(donated_buffer=False):
        return [*two_losses(run, x, learning), *once(run, x, learning)]


def hooked(run: Run, x: Tensor, learning: Sequence[Tensor]) -> list[Tensor]:
    seen: list[Tensor] = []
    handles = [each.register_hook(seen.append) for each in (x, *learning)]
    run(x).sum().backward()
    for handle in handles:
        handle.remove()
    return sorted(seen, key=lambda each: (each.shape, each.abs().sum().item()))


def _taken(tensors: Sequence[Tensor]) -> list[Tensor]:
    gradients = _filled([each.grad for each in tensors], tensors)
    for each in tensors:
        each.grad = None
    return gradients


def _filled(gradients: Sequence[Tensor | None], of: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(b) if a is None else a for a, b in zip(gradients, of, strict=True)]


ACTIONS = (
    once, gradient_penalty, hessian, batched_gradients, two_losses, gradients_by_task, backward_in_parts, inference,
    transforms, recomputed, saved_elsewhere, without_donated_buffers, hooked,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:There is a performance drop")
@pytest.mark.parametrize("attachment", ["without", "as compiled", "faster"])
@pytest.mark.parametrize("mode", ["fx", "module"])
@pytest.mark.parametrize("setup", SETUPS)
def test_it_does_what_the_formula_does(
    platforms: Mapping[str, Platform], attachment: str, mode: str, setup: str
) -> None:
    model = grown(platforms[attachment], SETUPS[setup], mode)
    by_hand, values = formula(model, SETUPS[setup])
    learning = {name: each for name, each in model.named_parameters() if each.requires_grad}
    x = torch.randn(5, 8)
    for action in ACTIONS:
        with torch.no_grad():
            model(x)
        got = action(model, x.clone().requires_grad_(), list(learning.values()))
        wanted = action(by_hand, x.double().requires_grad_(), [values[name] for name in learning])
        assert len(got) == len(wanted), action.__name__
        for each in (*learning.values(), *values.values()):
            each.grad = None
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(
                one.double(), other, rtol=1e-4, atol=1e-5, msg=lambda text, action=action: f"{action.__name__}: {text}"
            )


@pytest.mark.parametrize("attachment", ["without", "as compiled", "faster"])
@pytest.mark.parametrize("mode", ["fx", "module"])
def test_it_trains_and_is_evaluated_under_autocast(
    platforms: Mapping[str, Platform], attachment: str, mode: str
) -> None:
    model = grown(platforms[attachment], SETUPS["several seeds"], mode)
    by_hand, _ = formula(model, SETUPS["several seeds"])
    x = torch.randn(5, 8)
    for without_gradients in (torch.no_grad, torch.inference_mode, partial(torch.set_grad_enabled, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16), without_gradients():
            y = model(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), by_hand(x.double()), rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)
