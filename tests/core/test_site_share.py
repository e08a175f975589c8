"""What `wrap` says of how much of a model can grow."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn

import esper
from tests.models import mlp


class Conv1D(nn.Module):
    """As GPT-2 has it: a linear map whose weight is the transposed one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def gpt(vocabulary: int = 10) -> nn.Module:
    """An embedding, four Conv1D, a norm, and a head that is tied to the embedding."""
    model = nn.Sequential(
        nn.Embedding(vocabulary, 8), *(Conv1D(8, 8) for _ in range(4)), nn.LayerNorm(8), nn.Linear(8, vocabulary, False)
    )
    model[-1].weight = model[0].weight
    return model


def told(caplog: pytest.LogCaptureFixture) -> str:
    (line,) = [each.getMessage() for each in caplog.records if "of the" in each.getMessage()]
    return line


@pytest.mark.parametrize("vocabulary", [10, 1000])
def test_gpt_2_is_told_that_only_its_head_grows(vocabulary: int) -> None:
    with pytest.warns(
        UserWarning, match=r"1 site holds \d+ % of the .*passed over 4 Conv1D.*Name their types"
    ) as found:
        model = esper.wrap(gpt(vocabulary))
    assert list(model.kasmina_layers) == ["6"]
    assert len(found) == 1
    assert found[0].filename == __file__


def test_gpt_2_grows_everywhere_if_its_layers_are_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = esper.wrap(gpt(), [nn.Linear, Conv1D])
    assert [layer.features for layer in model.kasmina_layers.values()] == [*[(8, 8)] * 4, (8, 10)]


def test_the_share_of_the_sites_is_logged_with_the_classes_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "esper")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        esper.wrap(gpt(), "6")
        assert (
            told(caplog) == "1 site holds 21 % of the 384 parameters; the others are in Conv1D (75 %), LayerNorm (4 %)"
        )
        caplog.clear()
        esper.wrap(mlp(8, 6, 4))
        assert told(caplog) == "2 sites hold 100 % of the 82 parameters"
        caplog.clear()
        esper.wrap(nn.Sequential(nn.Conv2d(3, 32, 3), nn.Flatten(), nn.Linear(32, 2)))
        assert told(caplog) == "1 site holds 7 % of the 962 parameters; the others are in Conv2d (93 %)"


def test_a_model_of_other_parts_is_no_cause_for_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        esper.wrap(nn.Sequential(nn.Embedding(1000, 8), nn.LayerNorm([4, 8]), nn.Linear(8, 8)))
        esper.wrap(nn.TransformerEncoderLayer(8, 2, 4))
        esper.wrap(nn.Sequential(nn.Linear(8, 80), nn.ReLU(), nn.Linear(80, 8), Conv1D(8, 8)))
