"""Artifacts: what comes back, and every way in which one can be bad."""

from __future__ import annotations

import json
import sys
import threading
import tracemalloc
from typing import Any

import pytest
import safetensors.torch
import torch

from esper.artifacts import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactGraphError,
    ArtifactLimitError,
    Blueprint,
    Limits,
    SigningKey,
    TrustStore,
    UntrustedArtifactError,
    artifact_id,
    artifact_message,
    build_artifact,
    load_artifact,
)
from tests.artifacts.crafted import (
    ARTIFACT,
    BLUEPRINT,
    graph,
    join,
    node,
    split,
    top,
    with_header,
    with_manifest,
    with_weights,
)

KEY = SigningKey.generate()
TRUST = TrustStore([KEY.public_bytes])


def test_loads_what_was_built() -> None:
    loaded = load_artifact(
        ARTIFACT.data,
        expected_id=ARTIFACT.id,
        signature=KEY.sign(artifact_message(ARTIFACT.id)),
        trust=TRUST,
    )
    assert loaded == ARTIFACT
    assert hash(loaded) == hash(ARTIFACT)
    assert loaded.id == artifact_id(ARTIFACT.data)
    assert loaded.graph == BLUEPRINT.graph
    assert (loaded.in_features, loaded.out_features, loaded.blueprint_id) == (8, 6, BLUEPRINT.id)
    _, tensors = BLUEPRINT.build()
    assert list(loaded.tensors) == list(tensors)
    assert all(torch.equal(loaded.tensors[name], tensors[name]) for name in tensors)
    assert repr(loaded) == f"Artifact(id='{ARTIFACT.id}')"


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_is_a_safetensors_file(dtype: str) -> None:
    artifact = build_artifact(Blueprint.gated_mlp(8, 8, 4, start="kaiming", dtype=dtype))
    tensors = safetensors.torch.load(artifact.data)
    assert set(tensors) == set(artifact.tensors)
    assert all(torch.equal(tensors[name], artifact.tensors[name]) for name in tensors)
    assert set(json.loads(split(artifact.data)[0]["__metadata__"]["esper"])) == {"schema", "graph", "provenance"}


def test_loaded_weights_do_not_alias_each_other_or_the_file() -> None:
    loaded = load_artifact(ARTIFACT.data)
    for tensor in loaded.tensors.values():
        tensor.add_(1.0)
    again = load_artifact(ARTIFACT.data)
    assert again.id == ARTIFACT.id
    assert not any(torch.equal(again.tensors[name], loaded.tensors[name]) for name in again.tensors)


def test_provenance_is_part_of_the_id_and_attachments_are_not() -> None:
    parent = build_artifact(BLUEPRINT, toolchain={"test": "2"})
    child = build_artifact(BLUEPRINT, toolchain={"test": "1"}, parent=parent.id)
    assert len({ARTIFACT.id, parent.id, child.id}) == 3
    provenance: Any = load_artifact(child.data).manifest["provenance"]
    assert provenance["parent"] == parent.id
    assert dict(provenance["toolchain"]) == {"test": "1"}
    default: Any = build_artifact(BLUEPRINT).manifest["provenance"]
    assert default["toolchain"]["torch"] == torch.__version__.split("+")[0]


def test_order_of_toolchain_entries_does_not_matter() -> None:
    first = build_artifact(BLUEPRINT, toolchain={"a": "1", "b": "2"})
    second = build_artifact(BLUEPRINT, toolchain={"b": "2", "a": "1"})
    assert first.id == second.id


def test_threads_build_the_same_bytes() -> None:
    ids: list[str] = []
    blueprint = Blueprint.residual_mlp(32, 32, 16, start="orthogonal")
    threads = [threading.Thread(target=lambda: ids.append(build_artifact(blueprint).id)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 4
    assert len(set(ids)) == 1


def test_truncated_at_any_byte() -> None:
    for length in range(len(ARTIFACT.data)):
        with pytest.raises(ArtifactCorruptError):
            load_artifact(ARTIFACT.data[:length])
        with pytest.raises(ArtifactCorruptError, match="hash to"):
            load_artifact(ARTIFACT.data[:length], expected_id=ARTIFACT.id)


def test_bytes_behind_the_end() -> None:
    for extra in (b"\0", b"\0" * 8, ARTIFACT.data):
        with pytest.raises(ArtifactCorruptError, match="tensors end at byte"):
            load_artifact(ARTIFACT.data + extra)


def test_any_flipped_bit_is_noticed_by_the_hash() -> None:
    signature = KEY.sign(artifact_message(ARTIFACT.id))
    for position in range(len(ARTIFACT.data)):
        flipped = bytearray(ARTIFACT.data)
        flipped[position] ^= 1 << (position % 8)
        with pytest.raises(ArtifactCorruptError, match="fetch it again"):
            load_artifact(bytes(flipped), expected_id=ARTIFACT.id)
        with pytest.raises(UntrustedArtifactError, match="does not fit"):
            load_artifact(bytes(flipped), signature=signature, trust=TRUST)


def test_any_flipped_bit_without_a_hash_is_harmless_or_typed() -> None:
    """Nobody promised these bytes: what loads is a well-formed kernel, what does not is a typed error."""
    for position in range(len(ARTIFACT.data)):
        for bit in range(8) if position < 10 else (position * 3 % 8,):
            flipped = bytearray(ARTIFACT.data)
            flipped[position] ^= 1 << bit
            try:
                loaded = load_artifact(bytes(flipped))
            except ArtifactError:
                continue
            assert loaded.id != ARTIFACT.id
            assert all(torch.isfinite(tensor).all() for tensor in loaded.tensors.values())


def test_unsigned_and_strangers() -> None:
    stranger = SigningKey.generate()
    message = artifact_message(ARTIFACT.id)
    with pytest.raises(UntrustedArtifactError, match="is not signed; sign it"):
        load_artifact(ARTIFACT.data, trust=TRUST)
    with pytest.raises(UntrustedArtifactError, match="not trusted; to trust it, add its public key"):
        load_artifact(ARTIFACT.data, trust=TRUST, signature=stranger.sign(message))
    with pytest.raises(UntrustedArtifactError, match="not trusted"):
        load_artifact(ARTIFACT.data, trust=TrustStore(), signature=KEY.sign(message))
    with pytest.raises(UntrustedArtifactError, match="does not fit the content"):
        load_artifact(ARTIFACT.data, trust=TRUST, signature=KEY.sign(artifact_message("0" * 64)))
    with pytest.raises(UntrustedArtifactError, match="does not fit the content"):
        load_artifact(ARTIFACT.data, trust=TRUST, signature=KEY.sign(bytes.fromhex(ARTIFACT.id)))
    load_artifact(ARTIFACT.data, signature=stranger.sign(message))  # nobody asked for trust


def test_trust_is_checked_before_anything_is_parsed() -> None:
    with pytest.raises(UntrustedArtifactError):
        load_artifact(b"not a container", trust=TRUST)
    with pytest.raises(ArtifactCorruptError, match="hash to"):
        load_artifact(b"not a container", expected_id=ARTIFACT.id, trust=TRUST)
    with pytest.raises(ArtifactLimitError, match=r"size in bytes is 15, but Limits\.max_bytes is 3"):
        load_artifact(b"not a container", expected_id=ARTIFACT.id, trust=TRUST, limits=Limits(max_bytes=3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 10, 23])
def test_weights_must_be_finite(value: float, position: int) -> None:
    weight = ARTIFACT.tensors["down.weight"].clone()
    weight.view(-1)[position] = value
    with pytest.raises(ArtifactGraphError, match=r"tensor 'down.weight' holds NaN or infinity"):
        load_artifact(with_weights({"down.weight": weight}))


@pytest.mark.parametrize(
    "limits",
    [
        Limits(max_bytes=100),
        Limits(max_header_bytes=100),
        Limits(max_nodes=2),
        Limits(max_tensors=3),
        Limits(max_rank=1),
        Limits(max_dimension=7),
        Limits(max_parameters=50),
        Limits(max_value_elements=23),
    ],
)
def test_every_limit_is_kept(limits: Limits) -> None:
    with pytest.raises((ArtifactLimitError, ArtifactGraphError), match=r"but Limits|from 1 to 7"):
        load_artifact(ARTIFACT.data, limits=limits)


def test_refusing_costs_little_memory() -> None:
    """A few hundred bytes that declare terabytes are refused without asking for them."""
    giants = [
        with_header(lambda h: h["down.weight"].update(shape=[2**20, 2**20], data_offsets=[0, 2**42])),
        with_manifest(graph(tensors=[{"name": f"t{i}", "shape": [2**20, 64]} for i in range(1000)])),
        with_manifest(graph(in_features=2**20, out_features=2**20)),
        b"\xff\xff\xff\xff\xff\xff\xff\x7f" + b"{}",
    ]
    tracemalloc.start()
    for data in giants:
        with pytest.raises(ArtifactError):
            load_artifact(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_loading_runs_nothing_from_the_artifact() -> None:
    """Names that would be code, paths or imports if anyone evaluated them are data or refused."""
    ran: list[str] = []

    def audit(event: str, arguments: Any) -> None:
        if active and event in (
            "os.system",
            "subprocess.Popen",
            "exec",
            "compile",
            "open",
            "socket.connect",
            "pickle.find_class",
        ):
            ran.append(f"{event} {arguments!r:.100}")

    active = False
    sys.addaudithook(audit)
    hostile = [
        with_manifest(node(1, op="__import__('os').system('true')")),
        with_manifest(node(1, name="a;__import__('os').system('true')#")),
        with_manifest(node(1, attributes={"approximate": "none'); __import__('os').abort(); ('"})),
        with_manifest(node(1, op="torch.ops.aten.relu.default")),
        with_manifest(graph(output="__builtins__")),
        with_manifest(top(graph={"__reduce__": ["os.system", "true"]})),
        with_manifest(top(provenance={"blueprint": "file:///etc/passwd", "parent": None, "toolchain": {}})),
        with_manifest('{"__class__": "os.system", "py/object": "os.system"}'),
    ]
    benign = ARTIFACT.data
    load_artifact(benign)  # imports and caches
    active = True
    try:
        load_artifact(benign)
        for data in hostile:
            with pytest.raises(ArtifactError):
                load_artifact(data)
    finally:
        active = False
    assert ran == []


def test_generated_code_holds_no_text_of_the_artifact() -> None:
    """Names that are legal reach the generated module only as harmless identifiers."""
    names = {"down.weight": "__import__", "down.bias": "os.system", "up.weight": "eval-exec", "up.bias": "class"}

    def rename(manifest: Any) -> None:
        for spec in manifest["graph"]["tensors"]:
            spec["name"] = names[spec["name"]]
        for each in manifest["graph"]["nodes"]:
            each["inputs"] = [names.get(name, name) for name in each["inputs"]]

    header, body = split(with_manifest(rename))
    loaded = load_artifact(join({names.get(key, key): value for key, value in header.items()}, body))
    module = loaded.graph.to_module(loaded.tensors)
    reference = ARTIFACT.graph.to_module(ARTIFACT.tensors)
    x = torch.randn(3, 8)
    torch.testing.assert_close(module(x), reference(x))
