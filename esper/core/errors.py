"""Errors of wrapping and of the wrapped model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

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

    @classmethod
    def of(cls, name: object, layers: Iterable[str]) -> UnknownLayerError:
        """What to say of `name`, where `layers` have seeds."""
        names = list(layers)
        near = difflib.get_close_matches(str(name), names, n=3)
        shown = ", ".join(map(repr, near or names[:8]))
        more = f" and {len(names) - 8} more" if not near and len(names) > 8 else ""
        hint = f"did you mean {shown}?" if near else f"there are {shown}{more}"
        return cls(f"there is no layer {name!r} with seeds; {hint}")


def described(value: object) -> str:
    """What `value`, which is not what was asked for, is."""
    if isinstance(value, nn.Module) and torch_internals.is_compiled(value):
        return f"what torch.compile made of it ({type(value).__name__})"
    return f"the type {value.__name__}" if isinstance(value, type) else kind_of(value)
