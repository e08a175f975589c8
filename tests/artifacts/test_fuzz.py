"""Random damage: nothing but typed errors comes out of the loader and the parsers, and nothing hangs."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.artifacts import (
    OPERATORS,
    ArtifactError,
    Attachment,
    Blueprint,
    Limits,
    Signature,
    SigningKey,
    Target,
    build_artifact,
    load_artifact,
)
from tests.artifacts.crafted import ARTIFACT, join, split, with_manifest

Result = TypeVar("Result")
fuzz = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SMALL = Limits(max_parameters=2**16, max_value_elements=2**16)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-10, 70)
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["x", "host", "w", "n0", "float32", "gelu", "zero", "kaiming", "F32", *OPERATORS])
)
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        found += places(each, (*path, key))
    return found


def damage(document: Any, draw: st.DataObject) -> Any:
    """Replaces, removes, repeats or renames something, once to three times."""
    for _ in range(draw.draw(st.integers(1, 3))):
        spots = places(document)
        if not spots:
            return document
        *parents, last = draw.draw(st.sampled_from(spots))
        place = document
        for key in parents:
            place = place[key]
        action = draw.draw(st.sampled_from(["replace", "replace", "remove", "repeat", "rename"]))
        if action == "replace":
            place[last] = draw.draw(documents)
        elif action == "remove":
            del place[last]
        elif isinstance(place, list):
            place.insert(draw.draw(st.integers(0, len(place))), place[last])
        else:
            place[draw.draw(st.text(max_size=6) | st.sampled_from(sorted(place)))] = place[last]
    return document


def value_or_refusal(call: Callable[[], Result]) -> Result | None:
    """The result, or None after a typed error with a message that a person can read."""
    refusal: ArtifactError | None = None
    try:
        return call()
    except ArtifactError as error:
        refusal = error
    assert 10 < len(str(refusal)) < 4000
    return None


def load_or_refuse(data: bytes) -> None:
    loaded = value_or_refusal(lambda: load_artifact(data, limits=SMALL))
    if loaded is not None:
        x, host = torch.zeros(2, loaded.in_features), torch.zeros(2, loaded.out_features)
        module = loaded.graph.to_module(loaded.tensors)
        dtype = next(module.parameters(), x).dtype
        inputs = (x.to(dtype), host.to(dtype)) if loaded.graph.uses_host else (x.to(dtype),)
        assert module(*inputs).shape == (2, loaded.out_features)


@fuzz
@given(st.binary(max_size=400))
def test_loader_survives_any_bytes(data: bytes) -> None:
    load_or_refuse(data)
    load_or_refuse(len(data).to_bytes(8, "little") + data)


@fuzz
@given(st.data())
def test_loader_survives_damaged_bytes(draw: st.DataObject) -> None:
    data = bytearray(ARTIFACT.data)
    for _ in range(draw.draw(st.integers(1, 4))):
        begin = draw.draw(st.integers(0, len(data)))
        end = min(len(data), begin + draw.draw(st.integers(0, 12)))
        data[begin:end] = draw.draw(st.binary(max_size=12))
    load_or_refuse(bytes(data))


@fuzz
@given(st.data())
def test_loader_survives_damaged_manifests(draw: st.DataObject) -> None:
    manifest = json.loads(split(ARTIFACT.data)[0]["__metadata__"]["esper"])
    load_or_refuse(with_manifest(json.dumps(damage(manifest, draw))))


@fuzz
@given(st.data())
def test_loader_survives_damaged_headers(draw: st.DataObject) -> None:
    header, body = split(ARTIFACT.data)
    load_or_refuse(join(damage(header, draw), body))


@fuzz
@given(documents | st.text(max_size=200) | st.binary(max_size=200))
def test_blueprint_parser_survives_anything(source: Any) -> None:
    for each in (source, json.dumps(source) if not isinstance(source, bytes) else source):
        value_or_refusal(partial(Blueprint.from_json, each))


BLUEPRINTS = [
    Blueprint.residual_mlp(8, 6, 4),
    Blueprint.low_rank(8, 6, 2),
    Blueprint.from_graph(ARTIFACT.graph, dict(ARTIFACT.tensors)),
    Blueprint.from_graph(ARTIFACT.graph, dict.fromkeys(ARTIFACT.tensors, "orthogonal")),
]


@fuzz
@given(st.sampled_from(BLUEPRINTS), st.data())
def test_damaged_blueprints_are_refused_or_build(blueprint: Blueprint, draw: st.DataObject) -> None:
    document = damage(json.loads(blueprint.to_json()), draw)
    changed = value_or_refusal(lambda: Blueprint.from_json(document, limits=SMALL))
    if changed is not None:
        assert Blueprint.from_json(changed.to_json()).id == changed.id
        build_artifact(changed)


def random_node(draw: st.DataObject, index: int) -> dict[str, Any]:
    """A node of a real opcode with attributes of about the right kind."""
    name = draw.draw(st.sampled_from(sorted(OPERATORS)))
    values = st.integers(-4, 4) | st.lists(st.integers(-4, 4), max_size=3) | st.floats(-2, 2) | st.booleans()
    attributes = {}
    for key in OPERATORS[name].attributes:
        if draw.draw(st.booleans()) or key in ("dim", "dims", "shape", "value", "sizes", "order"):
            attributes[key] = draw.draw(values)
    earlier = ["x", "x", "host", "w", *(f"n{i}" for i in range(index))]
    count = draw.draw(st.integers(*OPERATORS[name].inputs)) if OPERATORS[name].inputs[1] < 5 else 2
    inputs = [f"n{index - 1}" if index else "x", *(draw.draw(st.sampled_from(earlier)) for _ in range(count - 1))]
    return {"name": f"n{index}", "op": name, "inputs": inputs, "attributes": attributes}


@fuzz
@given(st.data())
def test_random_graphs_run_as_checked_or_are_refused(draw: st.DataObject) -> None:
    """What passes the check on the meta device runs on the CPU, and treats every leading position alike."""
    nodes = [random_node(draw, index) for index in range(draw.draw(st.integers(1, 4)))]
    document = {
        "family": "graph",
        "graph": {
            "in_features": 4,
            "out_features": 4,
            "dtype": "float64",
            "tensors": [{"name": "w", "shape": draw.draw(st.lists(st.integers(1, 4), max_size=3))}],
            "nodes": [*nodes, {"name": "out", "op": "add", "inputs": [nodes[-1]["name"], "x"]},
                      {"name": "end", "op": "mul", "inputs": ["out", "w"]}],
            "output": "end",
        },
        "tensors": {"w": {"init": "ones"}},
    }  # fmt: skip
    artifact = value_or_refusal(lambda: build_artifact(Blueprint.from_json(document)))
    if artifact is None:
        return
    module = artifact.graph.to_module(artifact.tensors)
    x = (torch.rand(2, 3, 4, dtype=torch.float64) + 0.1).requires_grad_()
    inputs = (x, x + 1) if artifact.graph.uses_host else (x,)
    whole = module(*inputs)
    alone = torch.stack([module(*(each[i, j] for each in inputs)) for i in range(2) for j in range(3)]).view(2, 3, 4)
    torch.testing.assert_close(whole, alone, equal_nan=True)
    whole.sum().backward()


PACKED = Attachment.create("ab" * 32, Target("a", "b", "c", "d"), b"payload", SigningKey.generate()).pack()


@fuzz
@given(st.data())
def test_attachments_and_signatures_survive_anything(draw: st.DataObject) -> None:
    data = bytearray(PACKED)
    begin = draw.draw(st.integers(0, len(data)))
    data[begin : begin + draw.draw(st.integers(0, 8))] = draw.draw(st.binary(max_size=8))
    value_or_refusal(lambda: Attachment.unpack(bytes(data)))
    value_or_refusal(lambda: Signature.from_json(draw.draw(st.binary(max_size=80))))
