"""Feed-forward blocks that take hidden neurons into their own two linear layers.

A block `W act(V x + v) + w` and neurons beside it, `B act(A x + a) + b` with the share alpha, are one block of more
hidden features: `[W, alpha B] act([V; A] x + [v; a]) + w + alpha b`. The order of summation alone is another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esper.core.sites.targets import unfit_reason
from esper.errors import EsperError, kind_of
from esper.execution.kernels.hidden_neurons import Activation, HiddenNeurons, activation_of, neurons_of
from esper.execution.plans.plan import SeedPlan
from esper_passes import hooks_of

__all__ = ["CannotWidenError", "FeedForward", "feed_forward", "neurons_in"]


class CannotWidenError(EsperError):
    """A block cannot take a kernel in; says which condition does not hold, and what to do about it."""


class FeedForward(NamedTuple):
    """The two linear layers of a block, and what is between them."""

    up: nn.Linear
    activation: nn.Module
    down: nn.Linear

    def check_takes(self, neurons: HiddenNeurons) -> None:
        """Raise :class:`CannotWidenError` unless the activations agree, and it has the biases that `neurons` have."""
        op, attributes = neurons.activation
        own, given = activation_of(self.activation), (op, dict(attributes))
        if own != given:
            remedy = "make the kernel with that of the block" if own is not None else "no kernel has that of the block"
            raise CannotWidenError(
                f"its activation is {self.activation}, and that of the kernel {_named(given)}: {remedy}"
            )
        if neurons.bias is not None and self.up.bias is None:
            raise CannotWidenError(
                "its first linear layer has no bias, and the kernel's neurons have: make the kernel with bias=False"
            )
        if neurons.out_bias is not None and self.down.bias is None:
            raise CannotWidenError(
                "its last linear layer has no bias, and what the kernel adds has: make the kernel by Blueprint.widen, "
                "whose neurons add none"
            )

    @torch.no_grad()
    def take_in(self, neurons: HiddenNeurons, alpha: float) -> None:
        """Compute from now on what the block and `neurons` of that share do; with other, larger parameters."""
        up, down, count = self.up, self.down, neurons.count
        up.weight = _grown(up.weight, neurons.fan_in, 0)
        if up.bias is not None:
            bias = up.bias.new_zeros(count) if neurons.bias is None else neurons.bias
            up.bias = _grown(up.bias, bias, 0)
        down.weight = _grown(down.weight, alpha * neurons.fan_out, 1)
        if neurons.out_bias is not None:
            down.bias.add_(neurons.out_bias.to(down.bias), alpha=alpha)
        up.out_features, down.in_features = up.out_features + count, down.in_features + count


def neurons_in(seed: SeedPlan) -> HiddenNeurons:
    """The neurons that the kernel of `seed` is; raises :class:`CannotWidenError` if a block could not be those."""
    if seed.isolate:
        raise CannotWidenError("the kernel's input is detached, as no part of a block's is: load it without isolate")
    neurons = neurons_of(seed.kernel)
    if neurons is None:
        raise CannotWidenError(
            "the kernel is no sum of what the site has computed and hidden neurons with weights of their own, such as "
            "Blueprint.widen makes with start='identity'"
        )
    return neurons


def feed_forward(block: nn.Module, host: nn.Module) -> FeedForward:
    """`block`, of `host`, as a feed-forward block, if its class and children leave no doubt that it is one.

    It is a sequence of a linear layer, an activation and a linear layer, but for what does nothing; nobody else has the
    layers or their parameters, and no hooks see what is in it. Raises :class:`CannotWidenError` for anything else.
    """
    up, activation, down = _three_parts(block)
    for which, layer in (("first", up), ("last", down)):
        reason = unfit_reason(layer)
        if reason is not None:
            raise CannotWidenError(f"its {which} linear layer cannot be made wider, since {reason}: have it plain")
    for each in (up, activation, down):
        hooks = hooks_of(each)
        if hooks is not None:
            raise CannotWidenError(f"its {_class(each)} has {hooks}, which would see the neurons: remove them")
    places = Counter(id(each) for _, each in host.named_modules(remove_duplicate=False))
    uses = Counter(id(each) for module in host.modules() for each in module._parameters.values())
    for layer, name, parameter in _parameters_of(up, down):
        if places[id(layer)] > 1 or uses[id(parameter)] > 1:
            raise CannotWidenError(
                f"the {name} of its {_class(layer)} is used elsewhere in the model too, which would become wider there"
            )
        if type(parameter) is not nn.Parameter:
            raise CannotWidenError(
                f"the {name} of its {_class(layer)} is {kind_of(parameter)}, and no plain parameter: bake a "
                "model that has its own, such as one that the checkpoint was loaded into"
            )
    return FeedForward(up, activation, down)


def _three_parts(block: nn.Module) -> tuple[nn.Linear, nn.Module, nn.Linear]:
    if type(block).forward is not nn.Sequential.forward:
        raise CannotWidenError(
            f"{type(block).__name__} has a forward of its own, of which is not known that it is linear layer, "
            "activation and linear layer: have seeds at an nn.Sequential of these"
        )
    children = [each for each in block.children() if not _does_nothing(each)]
    dropout = next((each for each in children if isinstance(each, nn.Dropout)), None)
    if dropout is not None:
        raise CannotWidenError(f"it has a {dropout}, which may drop neurons: set its p to 0 for good")
    match children:
        case [nn.Linear() as up, activation, nn.Linear() as down] if up.out_features == down.in_features:
            return up, activation, down
    listed = ", ".join(map(_class, children)) or "nothing"
    raise CannotWidenError(f"it is a sequence of {listed}, and not of a linear layer, an activation and a linear layer")


def _parameters_of(*layers: nn.Linear) -> Iterator[tuple[nn.Linear, str, nn.Parameter]]:
    for layer in layers:
        yield from ((layer, name, each) for name, each in layer._parameters.items() if each is not None)


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _named(activation: Activation) -> str:
    op, attributes = activation
    return f"{op}({', '.join(f'{name}={value!r}' for name, value in attributes.items())})" if attributes else op


def _does_nothing(module: nn.Module) -> bool:
    return type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0.0)


def _grown(parameter: Tensor, more: Tensor, dimension: int) -> nn.Parameter:
    return nn.Parameter(torch.cat([parameter, more.to(parameter)], dimension), parameter.requires_grad)
