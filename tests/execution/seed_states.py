"""Seed states for the tests of this folder."""

import numpy as np
import torch

from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.state_layout import KasminaStateLayout

S = SeedLifecycleState
DTYPES = {
    "lifecycle_states": torch.uint8,
    "active_kernel_id": torch.int64,
    "alpha_blend": torch.float16,
    "health_accumulator": torch.float32,
    "last_update_epoch": torch.int32,
    "exec_latency_μs": torch.int16,
    "error_count": torch.int16,
    "fallback_active": torch.bool,
}
KERNEL, OTHER = "ab" * 32, "12" * 32


def fields(layout):
    return {name: getattr(layout, name) for name in DTYPES}


def assert_mirrored(layout):
    """Device and mirror hold the same, bit for bit."""
    for name, tensor in fields(layout).items():
        assert np.array_equal(tensor.cpu().numpy(), layout.mirror(name)), name


def activate(layout, seed, kernel=KERNEL):
    layout.set_lifecycle(seed, S.LOADING)
    layout.set_lifecycle(seed, S.ACTIVE, kernel)


def populated():
    layout = KasminaStateLayout(5)
    activate(layout, 1)
    layout.set_alpha(1, 0.3)
    layout.record_error(2)
    layout.record_latency(1, 17)
    layout.record_health(4, 0.5)
    layout.touch_epoch(1, 9)
    layout.set_lifecycle(3, S.LOADING)
    layout.fail_load(3)
    return layout
