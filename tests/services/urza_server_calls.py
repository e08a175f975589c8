"""What clients and workers send to Urza, written out as plain HTTP requests."""

from __future__ import annotations

import json
from typing import Any

import httpx

from esper.artifacts import Artifact, Blueprint, Signature, SigningKey, artifact_message, build_artifact
from esper.contracts.validation import ValidationReport

__all__ = ["add_kernel", "claim", "record_of", "submission", "submit", "upload"]

KEY = SigningKey.generate()


def submission(blueprint: Blueprint, name: str | None = None) -> dict[str, Any]:
    """The body of a submission."""
    return {"blueprint": json.loads(blueprint.to_json()), "name": name}


def submit(client: httpx.Client, blueprint: Blueprint, name: str | None = None) -> httpx.Response:
    return client.post("/api/v1/blueprints", json=submission(blueprint, name))


def claim(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/internal/v1/blueprints/claim", json={"worker": "a test", **fields})


def record_of(artifact: Artifact, signature: Signature | None = None) -> dict[str, Any]:
    """The part `record` of an upload."""
    graph = artifact.graph
    report = ValidationReport(blueprint_id=artifact.blueprint_id, pipeline="fast", passed=True, artifact_id=artifact.id)
    return {
        "blueprint_id": artifact.blueprint_id,
        "metadata": {
            "in_features": graph.in_features,
            "out_features": graph.out_features,
            "dtype": graph.dtype,
            "uses_host": graph.uses_host,
            "parameter_count": sum(spec.elements for spec in graph.tensors),
            "node_count": len(graph.nodes),
            "graph_digest": graph.digest,
        },
        "report": report.model_dump(mode="json"),
        "signature": None if signature is None else json.loads(signature.to_json()),
    }


def upload(client: httpx.Client, record: Any, content: bytes) -> httpx.Response:
    """A kernel as a multipart body."""
    files = {
        "record": (None, record if isinstance(record, str) else json.dumps(record), "application/json"),
        "content": ("kernel", content, "application/octet-stream"),
    }
    return client.post("/internal/v1/kernels", files=files)


def add_kernel(client: httpx.Client, of: Blueprint, name: str | None = None) -> Artifact:
    """Do over HTTP what a submitter and a worker do when all goes well, except for compiling and measuring."""
    assert submit(client, of, name).status_code in (200, 201)
    claimed = claim(client, blueprint_id=of.id)
    assert claimed.status_code == 200, claimed.text
    artifact = build_artifact(of)
    record = record_of(artifact, KEY.sign(artifact_message(artifact.id)))
    stored = upload(client, record, artifact.data)
    assert stored.status_code == 201, stored.text
    ended = client.put(
        f"/internal/v1/blueprints/{of.id}/status",
        json={
            "status": "validated",
            "token": claimed.json()["token"],
            "report": record["report"],
            "artifact_id": artifact.id,
        },
    )
    assert ended.status_code == 200, ended.text
    return artifact
