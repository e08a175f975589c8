"""The OpenAPI document: the one in the documentation, true, and allowing nothing that breaks the server."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from esper.artifacts import Attachment, SigningKey, Target
from esper.services.problems import PROBLEMS
from esper.services.urza import UrzaStore
from tests.services.shelf import add_kernel, blueprint
from tests.services.urza_server import RunningUrza, settings

ROOT = Path(__file__).parents[2]
TARGET = Target(torch="2.13.0", python="cpython3.11", compiler="inductor", device="cpu.test")
TOKEN = "schemathesis-0123456789"


def written() -> str:
    specification = importlib.util.spec_from_file_location("openapi_hook", ROOT / "docs" / "hooks" / "openapi.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    text: str = module.text()
    return text


def test_the_document_in_the_documentation_is_this_one() -> None:
    there = (ROOT / "docs" / "openapi.json").read_text(encoding="utf-8")
    assert there == written(), "run: python docs/hooks/openapi.py"


def test_the_server_hands_it_out(urza: RunningUrza) -> None:
    with urza.client() as client:
        served = client.get("/openapi.json").json()
    assert served == json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))


class TestDocument:
    @pytest.fixture
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))
        return found

    def operations(self, document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                yield f"{method} {path}", operation

    def test_every_operation_says_what_it_does_and_who_may(self, document: dict[str, Any]) -> None:
        for name, operation in self.operations(document):
            assert operation["description"], name
            assert ("security" in operation) == ("/health" not in name), name
            assert ("Scope: `" in operation["description"]) == ("/health" not in name), name

    def test_every_error_is_a_problem_document(self, document: dict[str, Any]) -> None:
        for name, operation in self.operations(document):
            for status, response in operation["responses"].items():
                if int(status) >= 400 and "/health" not in name:
                    assert list(response["content"]) == ["application/problem+json"], f"{name} {status}"

    def test_every_reference_leads_somewhere(self, document: dict[str, Any]) -> None:
        text = json.dumps(document)
        for name in {each.partition('"')[0] for each in text.split("#/components/schemas/")[1:]}:
            assert name in document["components"]["schemas"], name
        assert "HTTPValidationError" not in text, "FastAPI's own errors are never sent"


@pytest.mark.slow
def test_no_request_that_the_document_allows_or_nearly_allows_breaks_the_server(any_store: UrzaStore) -> None:
    artifact, _ = add_kernel(any_store, blueprint(1), "mine")
    any_store.kernels.add_attachment(Attachment.create(artifact.id, TARGET, b"code", SigningKey.generate()))
    any_store.blueprints.submit(blueprint(2))
    config = settings(tokens=[{"name": "all", "token": TOKEN, "scopes": ["read", "submit", "worker"]}])
    requests: dict[str, int] = {}
    with RunningUrza(any_store, config) as urza:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        schema = schemathesis.openapi.from_url(f"{urza.url}/openapi.json", headers=headers)
        known = {"blueprint_id": blueprint(1).id, "artifact_id": artifact.id, "reference": "mine", "target": TARGET.key}
        for result in schema.get_all_operations():
            operation = result.ok()
            requests[operation.label] = sum(
                exercise(operation, mode, headers, ids) for mode in schemathesis.GenerationMode for ids in ({}, known)
            )
        with urza.client(TOKEN) as client:
            assert client.get("/health").status_code == 200
            assert client.get(f"/api/v1/kernels/{artifact.id}/content").content == artifact.data
    assert len(requests) > 20
    assert min(requests.values()) >= 2, requests
    assert sum(requests.values()) > 400, requests


def exercise(operation: Any, mode: Any, headers: dict[str, str], known: dict[str, str]) -> int:
    """Send a bounded number of requests, always the same, each checked against the document; how many it were."""
    count = 0

    @hypothesis.settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        nonlocal count
        count += 1
        for name, value in known.items():
            if name in (case.path_parameters or {}):
                case.path_parameters[name] = value
        case.call_and_validate(
            headers=headers,
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_schema_conformance,
            ],
        )

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # where there is nothing that can be said wrongly
        send()
    return count


class TestPage:
    """`docs/urza.md` names every route and every kind of error, and no others."""

    PAGE = (ROOT / "docs" / "urza.md").read_text(encoding="utf-8")

    def test_routes(self) -> None:
        listed = dict(re.findall(r"^\| `([A-Z]+ /\S+)` \| (\w*) ?\|", self.PAGE, re.MULTILINE))
        described = {
            f"{method.upper()} {path}": re.search(r"Scope: `(\w+)`", operation["description"])
            for path, operations in json.loads(written())["paths"].items()
            for method, operation in operations.items()
        }
        assert listed == {route: "" if scope is None else scope[1] for route, scope in described.items()}

    def test_errors(self) -> None:
        listed = re.findall(r"^\| `([a-z-]+)` \| (\d{3}) \|", self.PAGE, re.MULTILINE)
        assert listed == [(each.slug, str(each.status)) for each in PROBLEMS]

    def test_metrics(self, urza: RunningUrza) -> None:
        with urza.client() as client:
            served = set(re.findall(r"^# TYPE (esper_urza_\w+)", client.get("/metrics").text, re.MULTILINE))
        listed = set(re.findall(r"`(esper_urza_\w+)`", self.PAGE))
        assert listed == {each for each in served if not each.endswith("_created")}
