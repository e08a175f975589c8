"""Errors of wrapping and of the wrapped model."""

from torch import nn

from esper import torch_internals
from esper.errors import EsperError, kind_of

__all__ = ["RegionError", "SiteCallError", "TargetError", "UnknownLayerError", "WrapError", "described"]


class WrapError(EsperError, TypeError):
    """What was given to `esper.wrap` cannot be wrapped."""


class TargetError(EsperError, ValueError):
    """`target_layers` names something that the model does not have."""


class RegionError(EsperError, ValueError):
    """The blocks of this model cannot be compiled by themselves, or it does not have those that were named."""


class SiteCallError(EsperError, TypeError):
    """A module that carries seeds was called with something else than one tensor, or returned something else."""


class UnknownLayerError(EsperError, KeyError):
    """No layer of this name has seeds."""


def described(value: object) -> str:
    """What `value`, which is not what was asked for, is."""
    if isinstance(value, nn.Module) and torch_internals.is_compiled(value):
        return f"what torch.compile made of it ({type(value).__name__})"
    return f"the type {value.__name__}" if isinstance(value, type) else kind_of(value)
