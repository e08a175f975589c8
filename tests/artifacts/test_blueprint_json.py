"""Blueprint documents that are refused, with the path of the field and near misses."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import torch

from esper.artifacts import Blueprint, BlueprintError, Limits
from tests.artifacts.crafted import GRAPH_BLUEPRINT


def changed(**changes: Any) -> dict[str, Any]:
    base = {"schema": 1, "family": "bottleneck", "in_features": 8, "out_features": 6, "rank": 2}
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


def graph_with(path: str, value: Any) -> dict[str, Any]:
    document: Any = json.loads(json.dumps(GRAPH_BLUEPRINT))
    *parents, last = path.split(".")
    place = document
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = value
    return document  # type: ignore[no-any-return]  # JSON


NAN = base64.b64encode(torch.tensor([1.0, float("nan")]).numpy().tobytes()).decode()
INF = base64.b64encode(torch.tensor([float("-inf"), 0.0]).numpy().tobytes()).decode()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "the blueprint is not JSON"),
        ("nonsense", "the blueprint is not JSON"),
        (b"\xff\xfe", "the blueprint is not UTF-8"),
        ("[]", "blueprint must be an object, not an array of 0"),
        ("null", "blueprint must be an object, not None"),
        ("3", "blueprint must be an object, not 3"),
        ('{"family": "affine", "family": "affine"}', "has the key 'family' twice"),
        ('{"family": NaN}', "holds NaN"),
        ('{"family": -Infinity}', "holds -Infinity"),
        ('{"family": 1e999}', "holds 1e999"),
        ('{"family": ' + "9" * 5000 + "}", "an integer of 5000 digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"family":' * 50_000, "nested too deeply|is not JSON"),
        ("[" + "{}," * 300_000 + "{}]", "holds more than 262144 values"),
        ({}, "blueprint.family is missing"),
        ({3: 4}, "blueprint has the key 3; keys are strings"),
        (changed(family="botleneck"), "blueprint.family is 'botleneck'; did you mean 'bottleneck'"),
        (changed(family=["bottleneck"]), "blueprint.family must be one of"),
        (changed(schema=2), "blueprint.schema must be an integer from 1 to 1, not 2"),
        (changed(rnak=2), "blueprint has the unknown key 'rnak'; did you mean 'rank'"),
        (changed(hidden=2), "blueprint has the unknown key 'hidden'; known: "),
        (changed(rank=...), "blueprint.rank is missing"),
        (changed(rank="2"), "blueprint.rank must be an integer from 1 to 1048576, not '2'"),
        (changed(rank=True), "not True"),
        (changed(rank=2.0), r"not 2\.0"),
        (changed(rank=None), "not None"),
        (changed(rank={"a": [1]}), "not an object of 1"),
        (changed(rank=0), "blueprint.rank must be"),
        (changed(rank=-5), "blueprint.rank must be"),
        (changed(rank=2**80), "blueprint.rank must be"),
        (changed(in_features=2**21), "blueprint.in_features must be"),
        (
            changed(in_features=2**20, out_features=2**20, rank=2**20),
            "the size of tensor 'down.weight' is 1099511627776",
        ),
        (changed(seed=-1), "blueprint.seed must be"),
        (changed(seed=2**63), "blueprint.seed must be"),
        (changed(bias=1), "blueprint.bias must be true or false, not 1"),
        (changed(dtype="float8"), "blueprint.dtype is 'float8'; did you mean"),
        (changed(dtype="int32"), "blueprint.dtype is 'int32'"),
        (changed(start="identiy"), "blueprint.start is 'identiy'; did you mean 'identity'"),
        (changed(activation="gleu"), "did you mean 'gelu'"),
        (changed(activation="__import__('os')"), "blueprint.activation is"),
        (changed(family="graph"), "blueprint.graph is missing"),
        (graph_with("graph", []), "blueprint.graph must be an object"),
        (graph_with("graph.nodes.0.op", "exec"), "has no 'exec'"),
        (graph_with("graph.nodes.0.inputs", ["x", "w", "y"]), "form a cycle"),
        (graph_with("graph.out_features", 3), "the output has shape"),
        (graph_with("graph.tensors.0.shape", [2**20, 2**20]), "the size of tensor 'w'"),
        (graph_with("graph.tensors.0.shape", [10**18]), "a dimension of tensor 'w'"),
        (graph_with("graph.tensors.0.extra", 1), r"blueprint.graph.tensors\[0\] has the unknown key 'extra'"),
        (graph_with("tensors", {}), "blueprint.tensors.w is missing"),
        (graph_with("tensors.v", {"init": "ones"}), "blueprint.tensors has the unknown key 'v'"),
        (graph_with("tensors.w", {"init": "kaming"}), "blueprint.tensors.w.init is 'kaming'; did you mean 'kaiming'"),
        (graph_with("tensors.w", {}), "blueprint.tensors.w.init is missing"),
        (graph_with("tensors.w.mean", 0), "blueprint.tensors.w has the unknown key 'mean'"),
        (graph_with("tensors.b", {"base64": "AAAA"}), "holds 4 characters of base64; float32 of shape"),
        (graph_with("tensors.b", {"base64": "AAAAAAAAAA!="}), "is not base64"),
        (graph_with("tensors.b", {"base64": "é" * 12}), "is not base64"),
        (graph_with("tensors.b", {"base64": "AAAAAAAAAAB="}), "is not canonical base64|is not base64"),
        (graph_with("tensors.b", {"base64": 12}), "blueprint.tensors.b.base64 must be a string"),
        (graph_with("tensors.b", {"base64": NAN}), "tensor 'b' holds NaN or infinity"),
        (graph_with("tensors.b", {"base64": INF}), "tensor 'b' holds NaN or infinity"),
    ],
)
def test_refuses_with_path_and_near_misses(source: Any, message: str) -> None:
    with pytest.raises(BlueprintError, match=message) as caught:
        Blueprint.from_json(source)
    assert len(str(caught.value)) < 2000


def test_limits_are_arguments() -> None:
    with pytest.raises(BlueprintError, match=r"Limits.max_blueprint_bytes is 10"):
        Blueprint.from_json(Blueprint.affine(2, 2).to_json(), limits=Limits(max_blueprint_bytes=10))
    with pytest.raises(BlueprintError, match=r"total number of parameters is 6, but Limits.max_parameters is 5"):
        Blueprint.from_json(Blueprint.affine(2, 2).to_json(), limits=Limits(max_parameters=5))


def test_constructor_checks_like_from_json() -> None:
    with pytest.raises(BlueprintError, match=r"did you mean 'affine'"):
        Blueprint("afine", {})
    with pytest.raises(BlueprintError, match=r"blueprint.rank must be"):
        Blueprint.low_rank(8, 8, 0)
    with pytest.raises(BlueprintError, match=r"blueprint.activation is 'sine'"):
        Blueprint.gated_mlp(8, 8, 4, activation="sine")
