"""Errors that say what was given in the place of something else: on one line, whole, and without addresses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.core.errors import TargetError
from tests.models import mlp


class Thing:
    pass


class Unspeakable:
    def __repr__(self) -> str:
        raise ValueError("never")


def alpha_of_step(step: int) -> float:
    return step / 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (None, "None"),
        (["0", "1"], "['0', '1']"),
        (list(range(100)), "a list"),
        ({"lr": 0.1}, "{'lr': 0.1}"),
        (Thing(), "a Thing"),
        (Thing, "the type Thing"),
        (Unspeakable(), "an Unspeakable"),
        (alpha_of_step, "the function alpha_of_step"),
        (Thing().__repr__, "a method-wrapper"),
        (mlp(8, 6, 4), "a Sequential"),
        (nn.Embedding(2, 3).weight, "a Parameter"),
        (torch.zeros(40, 40), "a Tensor"),
        (b"bytes " * 40, "a bytes"),
        (OSError("x" * 100), "an OSError"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_seed_is_not_given_by_what_is_no_number(value: Any, text: str) -> None:
    if isinstance(value, int):
        value = float(value)
        text = f"{text}.0"
    layer = esper.KasminaLayer(0, 1, 8, 6)
    with pytest.raises(TypeError, match=rf"a whole number from 0 on, not {re.escape(text)}$"):
        layer.seed(value)


def test_long_texts_are_cut_between_quotes() -> None:
    layer = esper.KasminaLayer(0, 1, 8, 6)
    with pytest.raises(TypeError, match=r", not 'ab{79}'\.\.\.$"):
        layer.seed("a" + "b" * 200)  # type: ignore[arg-type]  # which is the mistake


def test_a_wrapped_model_names_what_was_given_for_a_layer_or_a_platform() -> None:
    model = esper.wrap(mlp(8, 6, 4))
    with pytest.raises(TargetError, match=r"not by a Thing"):
        model.select_layers(Thing())  # type: ignore[arg-type]  # which is the mistake
    with pytest.raises(TypeError, match=r"not a Sequential"):
        model.listen(mlp(8, 6))  # type: ignore[arg-type]  # as above
