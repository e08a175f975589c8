"""What the tests of replicas share: a site module, and a model wrapped by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from esper.core.replica.replace_modules import replace_modules
from esper.core.sites.targets import select_targets

__all__ = ["Planted", "Site", "agrees", "planted"]


class Site(nn.Linear):
    """Stands at a site, shares the layer's parameters, and computes what the layer computes."""

    @classmethod
    def of(cls, linear: nn.Linear) -> Site:
        site = cls.__new__(cls)
        site.__dict__.update(linear.__dict__)
        site.__dict__["_modules"] = {}
        return site


@dataclass
class Planted:
    """A host, its replica and the replica's sites."""

    host: nn.Module
    root: nn.Module
    sites: dict[str, Site]


def planted(host: nn.Module, target_layers: Any = None) -> Planted:
    """`host` with a :class:`Site` at each target."""
    sites: dict[str, Site] = {}

    def replace(name: str, linear: nn.Linear) -> Site:
        sites[name] = Site.of(linear)
        return sites[name]

    root = replace_modules(host, select_targets(host, target_layers).targets, replace)
    return Planted(host, root, sites)


def agrees(host: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Assert that `run` computes what `host` does, bit for bit: outputs, and gradients of inputs and parameters."""
    expected = _outcome(host, host, args, kwargs)
    actual = _outcome(host, run, args, kwargs)
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert isinstance(ours, torch.Tensor)
            assert torch.equal(ours, theirs)
        else:
            assert type(ours) is type(theirs)
            assert ours == theirs


def _outcome(host: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
    """Flattened outputs, inputs as they are afterwards, and gradients."""
    host.zero_grad(set_to_none=True)
    args, kwargs = _fresh(args), _fresh(kwargs)
    torch.manual_seed(0)
    leaves, spec = torch.utils._pytree.tree_flatten(run(*args, **kwargs))
    given = [each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    total = sum(
        (each.double().square().sum() for each in leaves if isinstance(each, torch.Tensor) and each.requires_grad),
        start=torch.zeros((), dtype=torch.double),
    )
    if total.requires_grad:
        total.backward()
    grads = [parameter.grad for parameter in host.parameters()] + [each.grad for each in given if each.is_leaf]
    buffers = [buffer.clone() for buffer in host.buffers()]
    return [str(spec), *leaves, *(each.detach().clone() for each in given), *grads, *buffers]


def _fresh(structure: Any) -> Any:
    def copy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().clone().requires_grad_(value.requires_grad)

    return torch.utils._pytree.tree_map(copy, structure)
