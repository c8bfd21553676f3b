"""Holds every answer that a test sees against the server's own OpenAPI document."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import httpx
import jsonschema

from ottava.gateway.app import ENDPOINTS
from ottava.gateway.openapi import document


@cache
def described() -> dict[str, Any]:
    """The document."""
    return document(ENDPOINTS)


@cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    """Of one of the document's types."""
    schemas = described()["components"]["schemas"]
    return jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}})


def data_of(text: str) -> list[Any]:
    """The events' data of a stream that has come to its end; a chat's and a completion's [DONE] is left out."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def conforms(method: str, path: str, status: int, headers: httpx.Headers, text: str) -> None:
    """Raise where an answer of a described operation is not as described."""
    paths = described()["paths"]
    named = "/v1/models/{id}" if path.startswith("/v1/models/") else path
    operation = paths.get(named, {}).get(method.lower())
    if operation is None:
        assert status in (404, 405), (method, path, status)
        return validator("Error").validate(json.loads(text))
    told = operation["responses"][str(status)]
    for header in told.get("headers", ()):
        if status != 503:  # a fault of the model has no hour at which to come again
            assert header in headers, (path, status, header)
    kind = headers["content-type"].split(";")[0]
    content = told["content"][kind]
    if kind == "text/event-stream":
        for data in data_of(text):
            name = "Error" if set(data) == {"error"} else content["x-event-schema"]["$ref"].rsplit("/", 1)[1]
            validator(name).validate(data)
    elif "$ref" in content["schema"]:
        validator(content["schema"]["$ref"].rsplit("/", 1)[1]).validate(json.loads(text))
    return None


async def hook(response: httpx.Response) -> None:
    """For the clients of tests."""
    await response.aread()
    conforms(response.request.method, response.request.url.path, response.status_code, response.headers, response.text)


def plain_hook(response: httpx.Response) -> None:
    """The same for clients that wait."""
    if "event-stream" not in response.headers["content-type"]:  # who reads a stream looks at it there
        response.read()
        conforms(
            response.request.method, response.request.url.path, response.status_code, response.headers, response.text
        )
