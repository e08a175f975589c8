"""The OpenAPI document, with what FastAPI cannot read off the routes: errors, tokens, bodies read by hand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from esper.services.problems import MEDIA_TYPE, PROBLEMS, ProblemDocument
from esper.services.urza.http.auth import needed_scope
from esper.services.urza.http.request_documents import KernelUpload, SubmissionRequest

__all__ = ["BYTES", "DOCUMENT", "OCTETS", "document_of", "problems", "request_body", "upload_body"]

_SCHEMAS = "#/components/schemas/"
_PROBLEM = {MEDIA_TYPE: {"schema": {"$ref": f"{_SCHEMAS}{ProblemDocument.__name__}"}}}
_BINARY = {"type": "string", "format": "binary"}
_READ_BY_HAND: tuple[type[BaseModel], ...] = (KernelUpload, SubmissionRequest, ProblemDocument)
_ALWAYS = (429, 500, 503, 507)


def _ranges(media_type: str, schema: dict[str, str]) -> dict[int | str, dict[str, Any]]:
    content = {media_type: {"schema": schema}}
    return {
        200: {"description": "All of it", "content": content},
        206: {"description": "The range that was asked for", "content": content},
        304: {"description": "It is what `If-None-Match` names"},
    }


BYTES = _ranges("application/octet-stream", _BINARY)
DOCUMENT = _ranges("application/json", {"type": "object"})
OCTETS: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/octet-stream": {"schema": _BINARY}}}
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses for these statuses; 422 is always among them, as FastAPI would else describe one of its own."""
    return {status: _problem(status) for status in sorted({*statuses, 422})}


def _problem(status: int) -> dict[str, Any]:
    slugs = [f"`{each.slug}`" for each in PROBLEMS if each.status == status]
    return {"description": " or ".join(slugs), "content": _PROBLEM}


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """A JSON body."""
    schema = {"$ref": f"{_SCHEMAS}{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def upload_body(record: type[BaseModel]) -> dict[str, Any]:
    """A multipart body of a JSON document and a file."""
    schema = {
        "type": "object",
        "required": ["record", "content"],
        "properties": {"record": {"$ref": f"{_SCHEMAS}{record.__name__}"}, "content": _BINARY},
    }
    part = {"schema": schema, "encoding": {"record": {"contentType": "application/json"}}}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": part}}}


def document_of(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of `app`."""
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for model in _READ_BY_HAND:
        schema = model.model_json_schema(ref_template=f"{_SCHEMAS}{{model}}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            scope = needed_scope(method.upper(), path)
            if scope is None:
                continue
            operation["security"] = [{"token": []}]
            operation["description"] = f"{operation.get('description', '')}\n\nScope: `{scope}`.".strip()
            for status in (401, 403, *_ALWAYS):
                operation["responses"].setdefault(str(status), _problem(status))
    return document
