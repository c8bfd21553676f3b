"""Tools and structured output of a request: what is allowed, and what the engine is asked to hold a reply to.

Tools and schemas are a client's own data that reaches templates, validators and compilers, and servers have fallen
over unvalidated ones (CVE-2025-48944). So their names, number, size and validity are checked before anything
is rendered; what cannot be enforced is refused, as a reply that only looks valid is worse than none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from ottava.engine.session import Offer
from ottava.errors import DataError
from ottava.gateway.schema import ApiError, Ignored, Strict
from ottava.models import constrain
from ottava.models.chat import NO_TOOLS, Chat

MOST_TOOLS = 128
JSON_OBJECT: dict[str, Any] = {"type": "object"}
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Schema = dict[str, Any]


class Function(Strict):
    """A function that the model may call. parameters: a JSON schema of an object. strict: calls are held to it."""

    name: Name
    description: Annotated[str, Field(max_length=16_384)] | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool; functions are the only ones."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """A function by its name."""

    name: Name


class Named(Strict):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[list[Tool], Field(max_length=MOST_TOOLS)]
Choice = Literal["none", "auto", "required"] | Named


class MessageFunction(Strict):
    """What was called. arguments: JSON text."""

    name: Name
    arguments: str
    parsed_arguments: Ignored = None


class MessageCall(Strict):
    """A call of an earlier turn."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"]
    function: MessageFunction
    index: Ignored = None

    def plain(self) -> dict[str, Any]:
        """As templates take it."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": self.type, "function": function}


class FormatText(Strict):
    """Any text."""

    type: Literal["text"]


class FormatObject(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """A schema, and how it is called. It is enforced whether strict or not."""

    name: Name
    description: Annotated[str, Field(max_length=16_384)] | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class FormatSchema(Strict):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


Format = Annotated[FormatText | FormatObject | FormatSchema, Field(discriminator="type")]


@dataclass(frozen=True)
class Wanted:
    """What tools and format mean for a reply. rendered: as the template gets them; grammar: see `Sampling`."""

    rendered: Sequence[Mapping[str, Any]] | None = None
    offer: Offer | None = None
    grammar: str | None = None


def wanted(
    chat: Chat,
    thinking: bool,
    schema: Schema | None,
    where: str,
    tools: Sequence[Tool] = (),
    choice: Choice | None = None,
    many: bool = True,
) -> Wanted:
    """schema: of the content, which the field `where` asks for; many: several calls may follow each other.

    Raises ApiError.
    """
    after = chat.think_end if thinking else None
    if choice == "none":
        _check_tools(tools)
        tools = ()
    elif not tools and choice not in (None, "auto"):
        raise ApiError(400, "tool_choice: there are no tools to choose from", param="tool_choice")
    if schema is not None:
        if tools:
            raise ApiError(400, f"tools and {where} are not supported together", param=where)
        check_schema(schema, where)
        try:
            spec = constrain.spec_of_json(schema, after)
        except DataError as error:
            raise ApiError(400, f"{where}: {error.what}", param=where) from None
        return Wanted(grammar=_checked(chat, spec, where))
    if not tools:
        return Wanted()
    _check_tools(tools)
    if chat.calls is None:
        raise ApiError(400, f"tools: {NO_TOOLS}", param="tools")
    form = chat.calls[0]
    rendered = [tool.model_dump(exclude_unset=True, exclude={"function": {"strict"}}) for tool in tools]
    offer = Offer(form, frozenset(tool.function.name for tool in tools))
    called = tools
    if isinstance(choice, Named):
        called, many = [tool for tool in tools if tool.function.name == choice.function.name], False
        if not called:
            what = f"tool_choice: no tool has the name {choice.function.name!r}"
            raise ApiError(400, what, param="tool_choice")
    free = choice in (None, "auto")
    if free and many and not any(tool.function.strict for tool in tools):
        return Wanted(rendered, offer)
    arguments = {tool.function.name: _held_to(tool.function, free) for tool in called}
    spec = constrain.spec_of_calls(form, arguments, many=many, free=free, after=after)
    return Wanted(rendered, offer, _checked(chat, spec, "tools"))


def _held_to(function: Function, free: bool) -> Schema:
    """The schema that arguments have to follow. Where the model is free to call, only that of a strict function."""
    if free and not function.strict:
        return JSON_OBJECT
    return function.parameters or NO_ARGUMENTS


def _checked(chat: Chat, spec: str, param: str) -> str:
    try:
        constrain.check(chat, spec)
    except DataError as error:
        raise ApiError(400, "\n".join(filter(None, (f"{param}: {error.what}", error.fix))), param=param) from None
    return spec


def _check_tools(tools: Sequence[Tool]) -> None:
    names: set[str] = set()
    size = 0
    for number, tool in enumerate(tools):
        where = f"tools.{number}.function"
        if tool.function.name in names:
            raise ApiError(400, f"{where}.name: {tool.function.name!r} is there twice", param="tools")
        names.add(tool.function.name)
        if tool.function.parameters is None:
            continue
        size += check_schema(tool.function.parameters, f"{where}.parameters")
        if size > constrain.LARGEST:
            raise ApiError(400, f"tools: their schemas have more than {constrain.LARGEST} characters", param="tools")
        if tool.function.parameters and tool.function.parameters.get("type") != "object":
            raise ApiError(400, f'{where}.parameters: the type has to be "object"', param="tools")


def check_schema(schema: Schema, where: str) -> int:
    """The characters of a valid JSON schema (draft 2020-12). Raises ApiError."""
    try:
        import jsonschema
    except ImportError:
        raise ApiError(400, f"{where}: this needs jsonschema: {constrain.EXTRA}", param=where) from None
    try:
        size = len(json.dumps(schema))
        if size > constrain.LARGEST:
            what = f"{where}: a schema of {size} characters; {constrain.LARGEST} are allowed"
            raise ApiError(400, what, param=where)
        jsonschema.Draft202012Validator.check_schema(schema, format_checker=None)  # Python's regexes are not JSON's
    except jsonschema.SchemaError as error:
        path = "".join(f".{part}" for part in error.absolute_path)
        raise ApiError(400, f"{where}{path}: not a JSON schema: {error.message[:300]}", param=where) from None
    except RecursionError:
        raise ApiError(400, f"{where}: the schema is nested too deep", param=where) from None
    return size
