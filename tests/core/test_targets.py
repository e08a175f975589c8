"""Which layers and modules become sites, and what is said about the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import esper
from esper.core.errors import TargetError
from esper.core.sites.targets import select_targets


class Own(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Renamed(nn.Linear):
    pass


def model() -> nn.Module:
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
            "decoder": nn.Sequential(nn.Linear(4, 4), nn.Sequential(Renamed(4, 4))),
            "attention": nn.MultiheadAttention(4, 2),
            "own": Own(4, 4),
        }
    )


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, ["encoder.0", "encoder.2", "decoder.0", "decoder.1.0"]),
        (nn.Linear, ["encoder.0", "encoder.2", "decoder.0", "decoder.1.0"]),
        (Renamed, ["decoder.1.0"]),
        ("encoder.2", ["encoder.2"]),
        ("encoder.*", ["encoder.0", "encoder.2"]),
        ("*.0", ["encoder.0", "decoder.0", "decoder.1.0"]),
        ("decoder.?", ["decoder.0", "decoder.1.0"]),
        (["decoder.0", Renamed], ["decoder.0", "decoder.1.0"]),
        ("", ["encoder.0", "encoder.2", "decoder.0", "decoder.1.0"]),
        ({nn.Linear: None}, ["encoder.0", "encoder.2", "decoder.0", "decoder.1.0"]),
        (("encoder.2", "encoder.0"), ["encoder.0", "encoder.2"]),
        (iter(["encoder.2"]), ["encoder.2"]),
    ],
)
def test_selection(wanted: Any, expected: list[str]) -> None:
    host = model()
    selection = select_targets(host, wanted)
    assert list(selection.targets) == expected
    assert all(host.get_submodule(name) is linear for name, linear in selection.targets.items())
    assert not selection.features
    linear = {name for name, module in host.named_modules() if isinstance(module, nn.Linear)}
    assert selection.targets.keys() | selection.refused.keys() == linear


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


class NoTensor(nn.Module):
    def forward(self, *, x: torch.Tensor) -> torch.Tensor:
        return x


class Staged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state = "warm"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("encoder", {"encoder": (4, 4)}),
        (["encoder", "decoder.0"], {"encoder": (4, 4)}),
        (nn.Sequential, {"encoder": (4, 4), "decoder": (4, 4), "decoder.1": (4, 4)}),
        ("own", {"own": (4, 4)}),
        (Own, {"own": (4, 4)}),
        ("encoder.1", {"encoder.1": None}),
        ({"encoder.1": (4, 4)}, {"encoder.1": (4, 4)}),
        ("encod?r", {"encoder": (4, 4)}),
        (Mixing, {"mixing": None}),
        ({"mix*g": (4, 4), nn.Linear: None}, {"mixing": (4, 4)}),
        ("normed", {"normed": (4, 3)}),
        ("norm", {"norm": (6, 6)}),
    ],
)
def test_what_is_no_linear_layer_becomes_a_site_if_it_is_named(wanted: Any, expected: dict[str, Any]) -> None:
    host = model()
    host["mixing"] = Mixing()
    host["normed"] = parametrizations.weight_norm(nn.Linear(4, 3))
    host["norm"] = nn.LayerNorm(6)
    assert dict(select_targets(host, wanted).features) == expected


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (nn.Bilinear, "its forward takes input1, input2, and a site takes one tensor"),
        ("none", "its forward takes no tensor"),
        ("staged", "it has an attribute 'state'"),
        ("lazy", "run the model once"),
        ("replaced", "its forward was replaced"),
    ],
)
def test_modules_that_cannot_be_sites_are_refused(wanted: Any, message: str) -> None:
    host = nn.ModuleDict(
        {
            "two": nn.Bilinear(2, 2, 2),
            "none": NoTensor(),
            "staged": Staged(),
            "lazy": nn.LazyLinear(4),
            "replaced": nn.Sequential(nn.ReLU()),
        }
    )
    host["replaced"].forward = lambda x: x  # type: ignore[method-assign]  # as users do
    with pytest.raises(TargetError, match=message):
        select_targets(host, wanted)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("encoder.1x", r"matches nothing.*did you mean.*'encoder\.\d'"),
        ("head", r"matches nothing in the model; the model has 'encoder.0', 'encoder.2'"),
        (nn.Conv2d, "type Conv2d matches nothing"),
        ("attention.out_proj", "can carry seeds: .*reads its weight without calling it"),
        ("attention", "nothing that 'attention' selects can carry seeds: .* takes query, key, value"),
        ({"encoder": (4, 0)}, r"'encoder' the features \(4, 0\), which are no two whole numbers"),
        ({"encoder": 4}, "the features 4, which are no two"),
        ({"encoder.0": (4, 4)}, "stands for linear layers, which have their sizes"),
        (["encoder.0", "encoder.9"], "'encoder.9' matches nothing"),
        ({}, "empty"),
        ([], "empty"),
        (3, "iterable|not 3"),
        ([3], "not 3"),
    ],
)
def test_mistakes(wanted: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        esper.wrap(model(), wanted)
    assert isinstance(caught.value, esper.EsperError)
    assert isinstance(caught.value, ValueError)


def test_reasons() -> None:
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    patched = nn.Sequential(nn.Linear(4, 4))
    patched.forward = lambda x: x
    host = nn.ModuleDict(
        {
            "first": nn.Linear(4, 4),
            "lazy": nn.LazyLinear(4),
            "normed": parametrizations.weight_norm(nn.Linear(4, 4)),
            "quantised": quantised,
            "patched": patched,
            "parallel": nn.DataParallel(nn.Sequential(nn.Linear(4, 4))),
        }
    )
    host["second"] = host["first"]
    selection = select_targets(host)
    assert list(selection.targets) == ["first"]
    refused = dict(selection.refused)
    assert "run the model once" in refused["lazy"]
    assert "computed at each call" in refused["normed"]
    assert "torch.int8" in refused["quantised"]
    assert "'patched'" in refused["patched.0"]
    assert "DataParallel" in refused["parallel.module.0"]
    assert refused["second"] == "the same module as 'first'"
    assert list(select_targets(host, "second").targets) == ["first"]
    assert select_targets(host, "first").refused["second"] == "the same module as 'first'"


def test_a_model_without_candidates_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"'out_proj' \(.*reads its weight"):
        select_targets(nn.MultiheadAttention(4, 2))


def test_a_linear_layer_alone() -> None:
    assert list(select_targets(nn.Linear(4, 4)).targets) == [""]
