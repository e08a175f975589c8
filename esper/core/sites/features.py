"""How many features a module takes and gives, where it says so itself."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules import activation

__all__ = ["Features", "told_features"]

Features = tuple[int, int]
"""The sizes of the last dimensions of input and output."""

_KEEPS_FEATURES = (nn.Identity, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)
_CHANGES_FEATURES = (nn.GLU, nn.MultiheadAttention)


def told_features(module: nn.Module) -> Features | None:
    """Those of a linear layer of any kind, a norm, or a sequence that begins and ends with such; else None.

    Of other modules only a forward can tell: in which order they call what is inside of them is not known.
    """
    if type(module).forward is nn.Sequential.forward:
        children = list(module.children())
        first, last = _first_told(children), _first_told(reversed(children))
        return (first[0], last[1]) if first and last else None
    own = vars(module)
    if {"in_features", "out_features"} <= own.keys():
        return _checked(own["in_features"], own["out_features"])
    weight = module._parameters.get("weight")
    if weight is not None and weight.dim() == 2 and own.get("nf") == weight.shape[1]:  # Conv1D of transformers
        return _checked(*weight.shape)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return _checked(module.normalized_shape[-1], module.normalized_shape[-1])
    return None


def _first_told(modules: Iterable[nn.Module]) -> Features | None:
    """Of the first of `modules` that may change features."""
    changing = (each for each in modules if not _keeps_features(each))
    first = next(changing, None)
    return None if first is None else told_features(first)


def _keeps_features(module: nn.Module) -> bool:
    is_activation = type(module).__module__ == activation.__name__ and not isinstance(module, _CHANGES_FEATURES)
    return is_activation or type(module) in _KEEPS_FEATURES


def _checked(*sizes: object) -> Features | None:
    known = [each for each in sizes if isinstance(each, int) and not isinstance(each, bool) and each > 0]
    return (known[0], known[1]) if len(known) == 2 else None
