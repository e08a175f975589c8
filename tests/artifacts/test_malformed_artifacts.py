"""Containers and manifests that are wrong in one place, each refused with a typed error that names the place."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from esper.artifacts import ArtifactCorruptError, ArtifactError, ArtifactGraphError, ArtifactLimitError, load_artifact
from esper.errors import EsperError
from tests.artifacts.crafted import ARTIFACT, graph, join, node, split, top, with_header, with_manifest

RELUS = [{"name": f"n{i}", "op": "relu", "inputs": [f"n{i - 1}" if i else "x"], "attributes": {}} for i in range(2049)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (node(1, op="eval"), ArtifactGraphError, r"nodes\[1\]: node 'gelu_1': the operator table has no 'eval'"),
        (node(1, op="gleu"), ArtifactGraphError, "did you mean 'gelu'"),
        (node(1, inputs=["linear_2"]), ArtifactGraphError, "'gelu_1' and 'linear_2' form a cycle"),
        (node(1, inputs=["gelu_1"]), ArtifactGraphError, "'gelu_1' and 'gelu_1' form a cycle"),
        (node(1, inputs=["ghost"]), ArtifactGraphError, "reads 'ghost', which nothing in the graph is called"),
        (node(1, inputs=["x", "x"]), ArtifactGraphError, "gelu takes 1 inputs, not 2"),
        (node(1, inputs=["x"]), ArtifactGraphError, "does not reach the output"),
        (node(1, inputs=["x"] * 100_000), ArtifactGraphError, "at most 256 items"),
        (node(1, attributes={"approximate": "exactly"}), ArtifactGraphError, "approximate is 'exactly'"),
        (node(1, attributes={"__class__": "x"}), ArtifactGraphError, "unknown key '__class__'"),
        (node(1, target="os.system"), ArtifactGraphError, "unknown key 'target'"),
        (node(1, name="linear_2"), ArtifactGraphError, "name of another value"),
        (node(1, name="x"), ArtifactGraphError, "means an input of the kernel"),
        (node(1, name="import os"), ArtifactGraphError, "must be a string that matches"),
        (
            graph(nodes=RELUS),
            ArtifactLimitError,
            r"number of manifest.graph.nodes is 2049, but Limits\.max_nodes is 2048",
        ),
        (graph(in_features=2**20), ArtifactGraphError, "does not accept shapes"),
        (graph(in_features=2**63), ArtifactGraphError, "manifest.graph.in_features must be"),
        (graph(out_features=7), ArtifactGraphError, "the output has shape"),
        (graph(dtype="float64"), ArtifactGraphError, "'down.weight' is float32 .* needs float64"),
        (graph(output="gelu_1"), ArtifactGraphError, "does not reach the output"),
        (graph(tensors=[]), ArtifactGraphError, "which nothing in the graph is called"),
        (graph(tensors=[{"name": "t", "shape": [2**20, 2**20]}]), ArtifactLimitError, "the size of tensor 't'"),
        (graph(tensors=[{"name": "t", "shape": [2**62]}]), ArtifactLimitError, "a dimension of tensor 't'"),
        (graph(tensors=[{"name": "t", "shape": [2] * 9}]), ArtifactGraphError, "at most 8 items"),
        (lambda m: m["graph"]["tensors"].append(m["graph"]["tensors"][0]), ArtifactGraphError, "is declared twice"),
        (lambda m: m["graph"]["tensors"][0].update(shape=[8, 3]), ArtifactGraphError, r"its graph needs .* \(8, 3\)"),
        (lambda m: m["graph"]["tensors"][0].update(name="other"), ArtifactGraphError, "reads 'down.weight'"),
        (lambda m: m["graph"].pop("output"), ArtifactGraphError, "manifest.graph.output is missing"),
        (lambda m: [m], ArtifactCorruptError, "manifest must be an object"),
        (lambda m: m.pop("graph"), ArtifactCorruptError, "manifest.graph is missing"),
        (top(schema=2), ArtifactCorruptError, "manifest.schema is 2, this version reads 1; update esper"),
        (top(schema="1"), ArtifactCorruptError, "manifest.schema must be an integer"),
        (top(shcema=1), ArtifactCorruptError, "unknown key 'shcema'; did you mean 'schema'"),
        (top(code="import os"), ArtifactCorruptError, "unknown key 'code'"),
        (top(provenance={}), ArtifactCorruptError, "manifest.provenance.blueprint is missing"),
        (
            top(provenance={"blueprint": "../" * 20, "parent": None, "toolchain": {}}),
            ArtifactCorruptError,
            "manifest.provenance.blueprint must be a string that matches",
        ),
        (
            top(provenance={"blueprint": "0" * 64, "parent": None, "toolchain": {str(i): "" for i in range(33)}}),
            ArtifactCorruptError,
            "toolchain has 33 entries",
        ),
    ],
)
def test_bad_manifests(change: Any, error: type[ArtifactError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        load_artifact(with_manifest(change))
    assert isinstance(caught.value, EsperError)
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the manifest is not JSON"),
        ("{", "the manifest is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": NaN}', "holds NaN"),
        ('{"a": 1, "a": 2}', "has the key 'a' twice"),
        ("!!python/object/apply:os.system ['true']", "the manifest is not JSON"),
    ],
)
def test_manifests_that_are_no_json(text: str, message: str) -> None:
    with pytest.raises(ArtifactCorruptError, match=message):
        load_artifact(with_manifest(text))


def entry(**changes: Any) -> Callable[[Any], None]:
    return lambda header: header["down.weight"].update(changes)


def shift(header: Any) -> None:
    for name, fields in header.items():
        if name != "__metadata__":
            fields["data_offsets"] = [offset + 4 for offset in fields["data_offsets"]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h: h.pop("down.weight"), ArtifactCorruptError, "leaves a gap"),
        (lambda h: h.update(extra=h["down.weight"]), ArtifactCorruptError, "overlaps the tensor before it"),
        (lambda h: h.pop("__metadata__"), ArtifactCorruptError, "metadata is"),
        (lambda h: h["__metadata__"].update(more="x"), ArtifactCorruptError, "exactly 'esper'"),
        (lambda h: h["__metadata__"].update(esper=3), ArtifactCorruptError, "must be a string"),
        (entry(dtype="I64"), ArtifactCorruptError, "header.down.weight.dtype is 'I64'"),
        (entry(dtype="F64"), ArtifactCorruptError, "has 96 bytes, its shape"),
        (entry(dtype=["F32"]), ArtifactCorruptError, "dtype must be one of"),
        (entry(shape=[24]), ArtifactGraphError, r"of shape \(24,\), its graph needs"),
        (entry(shape=[8, 3]), ArtifactGraphError, r"of shape \(8, 3\), its graph needs"),
        (entry(shape=[3, 9]), ArtifactCorruptError, "has 96 bytes, its shape"),
        (entry(shape=[2**40, 2**40]), ArtifactLimitError, "a dimension of tensor 'down.weight' is 1099511627776"),
        (entry(shape=[2**20, 2**20]), ArtifactLimitError, "the size of tensor 'down.weight'"),
        (entry(shape=[1] * 64), ArtifactLimitError, "the rank of tensor 'down.weight' is 64"),
        (entry(shape=[0, 8]), ArtifactCorruptError, r"shape\[0\] must be an integer from 1"),
        (entry(shape=[-3, -8]), ArtifactCorruptError, r"shape\[0\] must be an integer from 1"),
        (entry(shape="3,8"), ArtifactCorruptError, "shape must be an array"),
        (entry(data_offsets=[0]), ArtifactCorruptError, "must be two integers"),
        (entry(data_offsets=[0, 2**61]), ArtifactCorruptError, "overlaps|has 2305843009213693952 bytes"),
        (entry(data_offsets=[96, 0]), ArtifactCorruptError, "overlaps|leaves a gap"),
        (entry(data_offsets=[-1, 95]), ArtifactCorruptError, r"data_offsets\[0\] must be"),
        (entry(strides=[1, 3]), ArtifactCorruptError, "unknown key 'strides'"),
        (shift, ArtifactCorruptError, "leaves a gap before it"),
        (lambda h: h.update({"bad name": h.pop("up.bias")}), ArtifactGraphError, "has the name 'bad name'"),
        (
            lambda h: h.update({"other": h.pop("up.bias")}),
            ArtifactGraphError,
            r"missing \['up.bias'\], extra \['other'\]",
        ),
        (
            lambda h: h.update({f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(1025)}),
            ArtifactLimitError,
            "number of tensors is 1029",
        ),
    ],
)
def test_bad_headers(change: Any, error: type[ArtifactError], message: str) -> None:
    with pytest.raises(error, match=message):
        load_artifact(with_header(change))


def test_extra_and_missing_tensors() -> None:
    header, body = split(ARTIFACT.data)
    extra = {**header, "zz": {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}}
    with pytest.raises(ArtifactGraphError, match=r"missing \[\], extra \['zz'\]"):
        load_artifact(join(extra, body + b"\0" * 4))
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    begin = header.pop(last)["data_offsets"][0]
    with pytest.raises(ArtifactGraphError, match=rf"missing \['{last}'\]"):
        load_artifact(join(header, body[:begin]))


def test_duplicate_tensors() -> None:
    header, body = split(ARTIFACT.data)
    text = json.dumps(header)
    twice = text[:-1] + ', "down.bias": ' + json.dumps(header["down.bias"]) + "}"
    with pytest.raises(ArtifactCorruptError, match=r"has the key 'down.bias' twice"):
        load_artifact(join(twice, body))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", ArtifactCorruptError, "0 bytes, fewer than its 8-byte prefix"),
        (b"\xff" * 8, ArtifactLimitError, "header length is 18446744073709551615"),
        (b"\xff" * 100, ArtifactLimitError, "header length"),
        ((2**22 + 1).to_bytes(8, "little"), ArtifactLimitError, "header length is 4194305"),
        ((100).to_bytes(8, "little") + b"{}", ArtifactCorruptError, "has 100 bytes, but only 2 follow"),
        (join("", b""), ArtifactCorruptError, "header is not JSON"),
        (join("[]", b""), ArtifactCorruptError, "header must be an object"),
        (join("{}", b""), ArtifactCorruptError, "metadata is"),
        (join("[" * 200_000, b""), ArtifactCorruptError, "nested too deeply"),
        (join("[" + "[]," * 400_000 + "[]]", b""), ArtifactCorruptError, "holds more than 262144 values"),
        (join('{"a": 1e400}', b""), ArtifactCorruptError, "no float can hold"),
        (join('{"a": ' + "1" * 10_000 + "}", b""), ArtifactCorruptError, "an integer of 10000 digits"),
        ((4).to_bytes(8, "little") + b"\xff\xfe{}", ArtifactCorruptError, "header is not UTF-8"),
        (b"PK\x03\x04" + b"\0" * 100, ArtifactLimitError, "header length|size"),
        (b"\x80\x02cos\nsystem\n(S'true'\ntR." + b"\0" * 64, ArtifactLimitError, "header length"),
    ],
)
def test_bytes_that_are_no_container(data: bytes, error: type[ArtifactError], message: str) -> None:
    with pytest.raises(error, match=message):
        load_artifact(data)
