"""Running an uncompiled model as code generated from torch.fx traces; `mode="fx"` of `esper.wrap`."""

from esper.eager.traced_forward import NotTracedError, TracedForward

__all__ = ["NotTracedError", "TracedForward"]
