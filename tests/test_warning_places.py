"""Warnings point to the line of the user's program from which all began, whatever torch and Esper called in between."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper import Blueprint
from tests.core.seeds import blueprint, load
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

Prepared = tuple[Callable[[], object], str]
X = torch.ones(2, 8)


def no_optimizer(shelf: KernelShelf) -> Prepared:
    model: Any = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    load(model, "0", 0, shelf.put(blueprint()).id, trainable=True)

    def train() -> None:
        piling = True
        while piling:  # until another thread has found that no optimizer has them
            model(X).sum().backward()
            optimizer.step()
            piling = any(each.grad is not None for each in model.seed_parameters())

    return train, "trainable and stand in no optimizer"


def features_told_wrong(shelf: KernelShelf) -> Prepared:
    model = esper.wrap(nn.Sequential(nn.Sequential(mlp(8, 6))), {"0.0": (9, 6)}, platform=shelf.platform)
    return lambda: model(X), "maps 8 to 6 features, and not 9 to 6"


def replaced_block(shelf: KernelShelf) -> Prepared:
    model: Any = esper.wrap(nn.Sequential(mlp(8, 6)), {"0": (8, 6)}, platform=shelf.platform)
    load(model, "0", 0, shelf.put(Blueprint.deepen(8, 6, 2)).id)
    model[0] = mlp(8, 6)
    return lambda: model(X), "are unloaded, since it was replaced by Sequential"


def layer_set_again(shelf: KernelShelf) -> Prepared:
    model: Any = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    first = model[0]
    model[0] = nn.Linear(8, 6)
    model(X)
    return lambda: setattr(model, "0", first), "setting it again does not bring back"


def no_sites(shelf: KernelShelf) -> Prepared:
    return lambda: esper.wrap(nn.Sequential(nn.Tanh()), platform=shelf.platform), "no layer can carry seeds"


def lost_fossil(shelf: KernelShelf) -> Prepared:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    load(model, "0", 0, shelf.put(blueprint()).id)
    assert model.fossilize("0", 0)
    return lambda: esper.unwrap(model), "without 1 fossilized kernel"


def here(act: Callable[[], object]) -> None:
    act()


def elsewhere(act: Callable[[], object]) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    "prepare", [no_optimizer, features_told_wrong, replaced_block, layer_set_again, no_sites, lost_fossil]
)
@pytest.mark.parametrize("run", [here, elsewhere])
def test_a_warning_points_to_the_line_that_called(
    shelf: KernelShelf, prepare: Callable[[KernelShelf], Prepared], run: Callable[[Callable[[], object]], None]
) -> None:
    """On another thread of the user's too."""
    act, message = prepare(shelf)

    with pytest.warns(UserWarning, match=message) as found:
        run(act)
    (warned,) = (each for each in found if message in str(each.message))
    assert warned.filename == __file__
    lines, first = inspect.getsourcelines(act)
    assert first <= warned.lineno < first + len(lines)


def test_it_is_told_once_a_place_and_errors_where_the_filter_says_so() -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(2):
            esper.wrap(nn.Sequential(nn.Tanh()))
        esper.wrap(nn.Sequential(nn.Tanh()))
    assert [each.filename for each in found] == [__file__] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="no layer can carry seeds"):
            esper.wrap(nn.Sequential(nn.Tanh()))
