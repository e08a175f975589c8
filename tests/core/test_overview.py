"""What the seeds of a model are doing, as numbers for a logger and as a table for a notebook."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from torch import nn

import esper
from esper.artifacts import Blueprint
from esper.core.errors import WrapError
from esper.execution.lifecycle import SeedLifecycleState
from tests.kernel_shelf import KernelShelf


def _model(shelf: KernelShelf) -> esper.MorphableModel:
    host = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))
    return esper.wrap(host, platform=shelf.platform, seeds_per_layer=2)


def test_scalars_say_what_each_seed_in_use_does(shelf: KernelShelf) -> None:
    model = _model(shelf)
    assert set(model.scalars().values()) == {0}
    kernel = shelf.put(Blueprint.low_rank(8, 6, rank=2)).id
    assert model.request_kernel("0", 1, kernel, alpha=0.5).result()
    assert not model.request_kernel("2", 0, kernel).result()
    model.commit()
    scalars = model.scalars("run/")
    assert scalars["run/seeds/active"] == 1
    assert scalars["run/seeds/in_error"] == scalars["run/seeds/errors"] == scalars["run/2/0/errors"] == 1
    assert scalars["run/kernel_parameters"] == 2 * (8 + 6)
    assert scalars["run/0/1/state"] == SeedLifecycleState.ACTIVE
    assert scalars["run/0/1/alpha"] == 0.5
    assert scalars["run/2/0/alpha"] == 0
    assert not any(name.startswith("run/0/0") for name in scalars)
    assert all(type(each) in (int, float) for each in scalars.values())


def test_a_notebook_shows_the_seeds_in_use(shelf: KernelShelf) -> None:
    class Cells(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.texts: list[str] = []

        def handle_data(self, data: str) -> None:
            self.texts.append(data)

    model = _model(shelf)
    assert "4 seeds in 2 layers, none in use" in model._repr_html_()
    kernel = shelf.put(Blueprint.low_rank(8, 6, rank=2)).id
    assert model.request_kernel("0", 1, kernel, alpha=0.5).result()
    assert not model.request_kernel("2", 0, "<no such kernel>").result()
    model.commit()
    cells = Cells()
    cells.feed(model._repr_html_())
    assert cells.texts[0] == "Sequential: 4 seeds in 2 layers, 2 in use"
    assert "ACTIVE" in cells.texts
    assert kernel[:12] in cells.texts
    assert any("<no such kernel>" in text for text in cells.texts)


def test_a_host_with_a_method_of_that_name_is_refused() -> None:
    class Host(nn.Linear):
        def scalars(self) -> None: ...

    with pytest.raises(WrapError, match="'scalars'"):
        esper.wrap(Host(2, 2))
