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

from pydantic import AfterValidator, Field

from ottava.engine.session import Offer
from ottava.errors import DataError
from ottava.gateway.schema import ApiError, Ignored, Strict, Unsupported
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
    """A tool of a chat; functions are the only ones."""

    type: Literal["function"]
    function: Function


class _OfType(Strict):
    type: Literal["function"]  # looked at first: of another type, all else is of no interest


class FlatTool(Function, _OfType):
    """The same as responses write it. There a function is strict unless that is denied, as in OpenAI's API."""

    strict: Annotated[bool | None, AfterValidator(lambda said: said is not False)] = True
    defer_loading: Unsupported = None
    allowed_callers: Ignored = None
    output_schema: Ignored = None


class NamedFunction(Strict):
    """A function by its name."""

    name: Name


class Named(Strict):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class FlatNamed(NamedFunction):
    """The same as responses write it."""

    type: Literal["function"]


Tools = Annotated[list[Tool], Field(max_length=MOST_TOOLS)]
FlatTools = Annotated[list[FlatTool], Field(max_length=MOST_TOOLS)]
HowMany = Literal["none", "auto", "required"]
Choice = HowMany | Named
FlatChoice = HowMany | FlatNamed


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
    tools: Sequence[Function] = (),
    choice: HowMany | NamedFunction | None = None,
    many: bool = True,
    place: str = "tools.{}",
) -> Wanted:
    """schema: of the content, which the field `where` asks for; many: several calls may follow each other; place: the
    field of a tool's function, by the tool's number.

    Raises ApiError.
    """
    after = chat.think_end if thinking else None
    if choice == "none":
        _check_tools(tools, place)
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
    _check_tools(tools, place)
    if chat.calls is None:
        raise ApiError(400, f"tools: {NO_TOOLS}", param="tools")
    form = chat.calls[0]
    rendered = [{"type": "function", "function": _rendered(tool)} for tool in tools]
    offer = Offer(form, frozenset(tool.name for tool in tools))
    called = tools
    if isinstance(choice, NamedFunction):
        called, many = [tool for tool in tools if tool.name == choice.name], False
        if not called:
            raise ApiError(400, f"tool_choice: no tool has the name {choice.name!r}", param="tool_choice")
    free = choice in (None, "auto")
    if free and many and not any(tool.strict for tool in tools):
        return Wanted(rendered, offer)
    arguments = {tool.name: _held_to(tool, free) for tool in called}
    spec = constrain.spec_of_calls(form, arguments, many=many, free=free, after=after)
    return Wanted(rendered, offer, _checked(chat, spec, "tools"))


def _rendered(function: Function) -> dict[str, Any]:
    """As templates take it: what is null was not said."""
    said = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {key: value for key, value in said.items() if value is not None}


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


def _check_tools(tools: Sequence[Function], place: str) -> None:
    names: set[str] = set()
    size = 0
    for number, tool in enumerate(tools):
        where = place.format(number)
        if tool.name in names:
            raise ApiError(400, f"{where}.name: {tool.name!r} is there twice", param="tools")
        names.add(tool.name)
        if tool.parameters is None:
            continue
        size += check_schema(tool.parameters, f"{where}.parameters")
        if size > constrain.LARGEST:
            raise ApiError(400, f"tools: their schemas have more than {constrain.LARGEST} characters", param="tools")
        if tool.parameters and tool.parameters.get("type") != "object":
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
