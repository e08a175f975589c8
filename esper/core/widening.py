"""Feed-forward blocks that take hidden neurons into their own two linear layers.

A block `W act(V x + v) + w` and neurons beside it, `B act(A x + a) + b` with the share alpha, are one block of more
hidden features: `[W, alpha B] act([V; A] x + [v; a]) + w + alpha b`. The order of summation alone is another one.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esper.core.sites.targets import unfit_reason
from esper.execution.kernels.hidden_neurons import HiddenNeurons, activation_of
from esper_passes import hooks_of

__all__ = ["FeedForward", "feed_forward"]


class FeedForward(NamedTuple):
    """The two linear layers of a block, and what is between them."""

    up: nn.Linear
    activation: nn.Module
    down: nn.Linear

    def fits(self, neurons: HiddenNeurons) -> bool:
        """Whether the block can take `neurons` in: the activations agree, and it has the biases that they have."""
        has_biases = (neurons.bias is None or self.up.bias is not None) and (
            neurons.out_bias is None or self.down.bias is not None
        )
        op, attributes = neurons.activation
        return has_biases and activation_of(self.activation) == (op, dict(attributes))

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


def feed_forward(block: nn.Module, host: nn.Module) -> FeedForward | None:
    """`block`, of `host`, as a feed-forward block, if its class and children leave no doubt that it is one.

    It is a sequence of a linear layer, an activation and a linear layer, but for what does nothing; nobody else has the
    layers or their parameters, and no hooks see what is in it.
    """
    if type(block).forward is not nn.Sequential.forward:
        return None
    children = [each for each in block.children() if not _does_nothing(each)]
    if len(children) != 3 or any(hooks_of(each) is not None for each in children):
        return None
    up, activation, down = children
    if not isinstance(up, nn.Linear) or not isinstance(down, nn.Linear):
        return None
    if any(unfit_reason(each) is not None for each in (up, down)) or up.out_features != down.in_features:
        return None
    places = Counter(id(each) for _, each in host.named_modules(remove_duplicate=False))
    uses = Counter(id(each) for module in host.modules() for each in module._parameters.values())
    own = [each for layer in (up, down) for each in layer._parameters.values() if each is not None]
    alone = all(places[id(each)] == 1 for each in (up, down)) and all(uses[id(each)] == 1 for each in own)
    plain = all(type(each) is nn.Parameter for each in own)
    return FeedForward(up, activation, down) if alone and plain else None


def _does_nothing(module: nn.Module) -> bool:
    return type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0.0)


def _grown(parameter: Tensor, more: Tensor, dimension: int) -> nn.Parameter:
    return nn.Parameter(torch.cat([parameter, more.to(parameter)], dimension), parameter.requires_grad)
