"""The layer with seeds of a model that is one linear layer itself."""

from __future__ import annotations

from typing import cast
from weakref import ReferenceType

import torch
from torch import nn

from esper.core.copies.copying import as_host
from esper.core.wrapping import WrappedModel
from esper.execution.assembly import LayerParts
from esper.execution.kasmina_layer import LinearSite

__all__ = ["RootLayer"]


class RootLayer(LinearSite):
    """A layer with seeds that is no child of its model but computes for it, with the weight and bias of the model.

    Hooks, parametrizations and pruning stand at the model.
    """

    _model: ReferenceType[WrappedModel]

    @classmethod
    def of(cls, model: ReferenceType[WrappedModel], linear: nn.Linear, parts: LayerParts) -> RootLayer:
        """As :meth:`LinearSite.at_site`, for the wrapped `model` of `linear`."""
        bare = nn.Module()
        layer = cls.__new__(cls)
        layer.__dict__.update(linear.__dict__)
        layer.__dict__.pop("forward", None)
        layer.__dict__.update({name: value for name, value in bare.__dict__.items() if name.endswith("_hooks")})
        layer.__dict__.update(_modules={}, _model=model)
        layer._join(parts)
        return layer

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # an attribute, elsewhere
        return self._host.weight

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]  # as above
        return self._host.bias

    @property
    def _host(self) -> nn.Linear:
        return cast("nn.Linear", self._model())

    def as_host(self) -> nn.Linear:
        """As :meth:`KasminaLayer.as_host`, with the hooks of the model."""
        return cast("nn.Linear", as_host(cast("WrappedModel", self._model())))
