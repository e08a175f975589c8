"""The fast path of nn.TransformerEncoderLayer, which reads the weights of linear layers without calling them.

The fast path is for inference. It computes the same with the host's weights alone, so it stays for as long as no seed
in the layer is active. The replica of such a layer leaves it, and that of the nn.TransformerEncoder around it does
not turn to nested tensors, while one is.

For `backend="esper"` Dynamo never traces the fast path: that would be a graph without sites, and a swap would have to
trace another. In eval() and without gradients such a layer then has the graph that it has with gradients.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from esper.core.replica.subclassing import subclass_in_disguise
from esper.execution.site_marker import traced_by_esper

__all__ = ["adapted_class"]

_classes: WeakValueDictionary[type, type] = WeakValueDictionary()


def adapted_class(kind: type) -> type:
    """The class for replicas of modules of class `kind`; `kind` itself, unless it has a fast path past its sites."""
    if issubclass(kind, nn.TransformerEncoderLayer):
        attribute = "activation_relu_or_gelu"  # 1 or 2 for functions that the fast path knows, 0 for others
    elif issubclass(kind, nn.TransformerEncoder):
        attribute = "use_nested_tensor"
    else:
        return kind
    known = _classes.get(kind)
    if known is None:
        known = _classes[kind] = subclass_in_disguise(kind, {attribute: _zero_while_active(attribute)})
    return known


def _zero_while_active(attribute: str) -> property:
    def read(self: nn.Module) -> Any:
        if torch.compiler.is_dynamo_compiling() and traced_by_esper():
            return 0
        for module in self.modules():
            if module.__dict__.get("_seeds"):  # the seeds in force at a site
                return 0
            if module._forward_hooks or module._forward_pre_hooks:  # the layer asks too, in a way Dynamo cannot follow
                return 0
        return self.__dict__[attribute]

    def write(self: nn.Module, value: Any) -> None:
        self.__dict__[attribute] = value

    return property(read, write)
