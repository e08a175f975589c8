"""Wrapped models that are given to a spawned process, as `DataLoader` and `Process` do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import esper
from esper.execution.kasmina_layer import KasminaLayer
from tests.core.grown import grown
from tests.kernel_shelf import KernelShelf
from tests.models import mlp


def outputs(models: list[Any], x: torch.Tensor, answers: Any) -> None:
    with torch.no_grad():
        answers.put([model(x).tolist() for model in models])


@pytest.mark.slow
def test_models_and_layers_are_sent_to_a_spawned_process_with_the_default_sharing_strategy(shelf: KernelShelf) -> None:
    assert torch.multiprocessing.get_sharing_strategy() == "file_descriptor"
    x = torch.randn(5, 8)
    models = [esper.wrap(mlp(8, 6, 4), platform=shelf.platform), grown(shelf), KasminaLayer(0, 2, 8, 6)]
    expected = [model(x).tolist() for model in models]
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=outputs, args=(models, x, answers))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    assert answers.get() == expected
