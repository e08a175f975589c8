"""Every private torch API that the passes use. Nothing else here imports a private name of torch."""

from __future__ import annotations

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "enable_python_dispatcher",
    "nn_functions",
    "tree_leaves",
]

nn_functions = torch._C._nn
"""The functions that `torch.nn.functional` passes calls on to, and that graphs name: `linear`, `gelu`, `pad`, ..."""
