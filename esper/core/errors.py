"""Errors of wrapping and of the wrapped model."""

from esper.errors import EsperError

__all__ = ["TargetError", "UnknownLayerError", "WrapError"]


class WrapError(EsperError, TypeError):
    """What was given to `esper.wrap` cannot be wrapped."""


class TargetError(EsperError, ValueError):
    """`target_layers` names something that the model does not have."""


class UnknownLayerError(EsperError, KeyError):
    """No layer of this name has seeds."""
