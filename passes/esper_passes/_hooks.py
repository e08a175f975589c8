"""The hooks that calling a module runs, which a graph without that call would not run."""

from __future__ import annotations

from torch import nn

__all__ = ["hooks_of"]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def hooks_of(module: nn.Module) -> str | None:
    """The kind of hooks that `module` has, such as `"forward pre hooks"`, or None."""
    kind = next((kind for kind in _HOOKS if getattr(module, kind)), None)
    return None if kind is None else kind.strip("_").replace("_", " ")
