"""The linear layer that a `KasminaLayer` is without its seeds, with what torch's utilities have made of its parameters.

`torch.nn.utils.parametrize` gives a module a class of its own, with properties, and a child; pruning and the older
`weight_norm` and `spectral_norm` leave plain attributes, which hooks compute anew.
"""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from esper import torch_internals

__all__ = ["OWN_ATTRIBUTES", "parametrize_alike", "plain_linear"]

OWN_ATTRIBUTES = frozenset(
    {
        "layer_id",
        "layer_name",
        "site",
        "first_seed",
        "runtime",
        "control",
        "seeds",
        "kernel_cache",
        "state",
        "seed_errors",
        "absence",
    }
    | {
        "_runtime_id",
        "_stands_alone",
        "_meter",
        "_has_entry_hook",
        "_site_tag",
        "_runtime_tag",
        "_seeds",
        "_alphas",
        "_current",
        "_run",
        "_told_features",
        "_is_seen",
    }
)
"""What a `KasminaLayer` has besides what its host has."""


def plain_linear(layer: nn.Linear, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """A linear layer of class `kind` with the parameters, hooks and attributes of `layer`, and nothing of Esper.

    Its children are none but the parametrizations.
    """
    linear: nn.Linear = object.__new__(kind)
    linear.__dict__.update({name: value for name, value in layer.__dict__.items() if name not in OWN_ATTRIBUTES})
    linear.__dict__["_modules"] = {}
    parametrize_alike(layer, linear)
    return linear


def parametrize_alike(source: nn.Linear, target: nn.Linear) -> None:
    """Give `target`, which has the parameters of `source`, the parametrizations that `source` has."""
    if parametrize.is_parametrized(source):
        target._modules["parametrizations"] = source._modules["parametrizations"]
        torch_internals.inject_parametrizations(target)
