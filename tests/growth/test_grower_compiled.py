"""A grower in a compiled training run: nothing is recompiled on the thread that trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.growth.growing import begin, mean_loss
from tests.kernel_shelf import KernelShelf

pytestmark = pytest.mark.xdist_group("growth")


@pytest.mark.slow
@pytest.mark.parametrize("lead", [None, 3])
def test_a_compiled_model_grows(lead: int | None, shelf: KernelShelf, counted_dynamo: None) -> None:
    run = begin(shelf, lead=lead, budget=23)
    before = mean_loss(run.model)
    forward: Any = torch.compile(run.model, backend="esper")
    run.forward = forward
    run.step()
    graphs = counters["stats"]["unique_graphs"]
    run.until("kept", most=100_000)
    run.until("stopped")
    assert counters["stats"]["unique_graphs"] == graphs
    assert mean_loss(run.model) < 0.7 * before
    with torch.no_grad():
        x = torch.randn(4, 6)
        torch.testing.assert_close(forward(x), run.model(x))
