"""GET /openapi.json: what the endpoints take and answer, made from the very types that they are written with.

A description that is kept by hand goes wrong in silence. Requests are the pydantic models that parse them; answers and
events are the TypedDicts that the type checker holds the code to; the tests validate every response against this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from ottava.gateway.reply import Endpoint
from ottava.gateway.schema import Error

REFUSALS: Mapping[int, str] = {
    400: "The request is malformed, asks for both modes, or for what the model cannot do",
    401: "No valid key",
    404: "No such model",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is not declared as JSON",
    429: "More than this key may; Retry-After says when to come back",
    500: "A fault of the server",
    503: "The queue is full, the server is draining, or no backend can answer; Retry-After says when to come back",
    504: "The answer took longer than the server's deadline",
}
_LATER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "string", "pattern": "^[0-9]+$"}}}
_CHALLENGE = {"WWW-Authenticate": {"description": "Bearer.", "schema": {"type": "string"}}}


class Model(TypedDict):
    """A name by which the model may be asked; a suffix stands for a mode."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["ottava"]


class Models(TypedDict):
    """All names."""

    object: Literal["list"]
    data: list[Model]


class Health(TypedDict):
    """Whether new requests are taken."""

    status: Literal["ok", "draining", "dead"]


class Checked(TypedDict):
    """Which backends were held against the reference, one object each, and what the canary has seen since."""

    backends: list[dict[str, Any]]
    canary: dict[str, Any] | None


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    types = [
        Error,
        Model,
        Models,
        Health,
        Checked,
        *(kind for one in endpoints for kind in (one.request, one.answer, one.event)),
    ]
    paths = {one.path: {"post": _operation(one)} for one in endpoints}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Ottava", "version": version("ottava"), "description": "OpenAI's API over one hybrid model."},
        "security": [{"key": []}, {}],
        "paths": paths | _reading(),
        "components": {
            "schemas": _schemas(types),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    stream = {"x-event-schema": _ref(endpoint.event)}  # OpenAPI 3.1 has no word for the data of an event
    good = {"application/json": {"schema": _ref(endpoint.answer)}, "text/event-stream": stream}
    body = {"required": True, "content": {"application/json": {"schema": _ref(endpoint.request)}}}
    responses = {"200": {"description": "The answer, whole or as a stream", "content": good}}
    responses |= {str(status): _refusal(status) for status in REFUSALS}
    return {"summary": endpoint.summary, "requestBody": body, "responses": responses}


def _reading() -> dict[str, Any]:
    """The paths that are only read."""
    name = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    document = {"application/json": {"schema": {"type": "object", "required": ["openapi"]}}}
    health = {status: _answer("Whether new requests are taken", Health) for status in ("200", "503")}
    refused = {"401": _refusal(401)}
    return {
        "/v1/models": {"get": {"responses": {"200": _answer("The model's names", Models), **refused}}},
        "/v1/models/{id}": {
            "parameters": [name],
            "get": {"responses": {"200": _answer("A name", Model), **refused, "404": _refusal(404)}},
        },
        "/health": {"get": {"security": [{}], "responses": health}},
        "/parity": {"get": {"responses": {"200": _answer("The backends' certificates", Checked), **refused}}},
        "/metrics": {
            "get": {
                "responses": {
                    "200": {"description": "For Prometheus", "content": {"text/plain": {"schema": {"type": "string"}}}},
                    **refused,
                }
            }
        },
        "/openapi.json": {"get": {"responses": {"200": {"description": "This", "content": document}, **refused}}},
    }


def _answer(description: str, kind: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ref(kind)}}}


def _refusal(status: int) -> dict[str, Any]:
    headers = _LATER if status in (429, 503) else _CHALLENGE if status == 401 else {}
    return _answer(REFUSALS[status], Error) | ({"headers": headers} if headers else {})


def _ref(kind: Any) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _schemas(types: Sequence[Any]) -> dict[str, Any]:
    adapters = [(kind.__name__, "validation", TypeAdapter(kind)) for kind in types]
    _, found = TypeAdapter.json_schemas(adapters, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas: dict[str, Any] = found["$defs"]
    for schema in schemas.values():
        if "properties" in schema:  # a TypedDict says nothing of other keys, and there are none
            schema.setdefault("additionalProperties", False)
    return schemas
