"""What `/v1/responses` takes: the request, the items of its input, and the turns that these are to a template.

Items are finer than turns: what a model said in one turn comes back as reasoning, messages and calls, one item each.
They are put together again, so that the prompt is the one that a chat with the same turns has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, WithJsonSchema, model_validator

from ottava.gateway.schema import Asked, Ignored, Strict, Text, Unsupported
from ottava.gateway.tools import FlatChoice, FlatTools, FormatObject, FormatText, Name, NamedSchema

LOGPROBS = "message.output_text.logprobs"
"""What `include` has where log-probabilities are wanted."""


def _stateless(value: Any) -> Any:
    if not (value is None or value is False):
        raise ValueError("this server keeps nothing between requests: send the earlier items as input again")
    return value


Stateless = Annotated[Any, AfterValidator(_stateless), WithJsonSchema({"enum": [None, False]})]
CallId = Annotated[str, Field(min_length=1, max_length=256)]


class InputText(Strict):
    """Text in an item; what an answer said about it is left out."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Ignored = None
    logprobs: Ignored = None
    parsed: Ignored = None


class InputMessage(Strict):
    """A turn, or what was said in it."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText]
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None


class InputReasoning(Strict):
    """What an earlier turn was thinking: accepted, and left out of the prompt, as templates leave it out."""

    type: Literal["reasoning"]
    id: Ignored = None
    summary: Ignored = None
    content: Ignored = None
    encrypted_content: Ignored = None
    status: Ignored = None


class InputCall(Strict):
    """A call of an earlier turn. arguments: JSON text."""

    type: Literal["function_call"]
    call_id: CallId
    name: Name
    arguments: str
    id: Ignored = None
    status: Ignored = None
    caller: Ignored = None
    namespace: Unsupported = None
    parsed_arguments: Ignored = None
    in_background: Annotated[Unsupported, Field(alias="async")] = None
    async_: Unsupported = None  # as the official client's objects name it

    def plain(self) -> dict[str, Any]:
        """As templates take it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


class InputResult(Strict):
    """What a call came to."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: str | list[InputText]
    id: Ignored = None
    status: Ignored = None
    caller: Ignored = None
    name: Ignored = None
    namespace: Unsupported = None


def _kind_of(item: Any) -> str | None:
    """The tag of an item; one without a type is a message. Tags have a space: messages of errors leave them out."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return f"a {kind}" if isinstance(kind, str) else None


Item = Annotated[
    Annotated[InputMessage, Tag("a message")]
    | Annotated[InputReasoning, Tag("a reasoning")]
    | Annotated[InputCall, Tag("a function_call")]
    | Annotated[InputResult, Tag("a function_call_output")],
    Discriminator(
        _kind_of,
        custom_error_type="unknown_item",
        custom_error_message="an item is a message, reasoning, function_call or function_call_output",
    ),
]
Items = Annotated[list[Item], Field(min_length=1)]
Input = Annotated[
    Annotated[str, Tag("a text")] | Annotated[Items, Tag("a list")],
    Discriminator(lambda said: "a text" if isinstance(said, str) else "a list"),
]


class FlatSchema(NamedSchema):
    """JSON of a schema."""

    type: Literal["json_schema"]


class TextConfig(Strict):
    """How the text is to be."""

    format: Annotated[FormatText | FormatObject | FlatSchema, Field(discriminator="type")] | None = None
    verbosity: Ignored = None


class ResponseRequest(Asked):
    """The body of a request."""

    input: Input
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    text: TextConfig | None = None
    tools: FlatTools | None = None
    tool_choice: FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: Stateless = None
    conversation: Stateless = None
    store: Stateless = None
    background: Stateless = None
    prompt: Unsupported = None
    stream_options: Ignored = None
    max_tool_calls: Ignored = None

    @model_validator(mode="after")
    def _agree(self) -> ResponseRequest:
        if not self.messages:
            raise ValueError("input has no message")
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f'top_logprobs needs include: ["{LOGPROBS}"]')
        return self

    @property
    def logprobs(self) -> bool:
        """Whether log-probabilities are wanted."""
        return LOGPROBS in (self.include or ())

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The turns as templates take them, without the instructions."""
        return [{"role": "user", "content": self.input}] if isinstance(self.input, str) else turns(self.input)


def turns(items: Sequence[InputMessage | InputReasoning | InputCall | InputResult]) -> list[dict[str, Any]]:
    """Items as turns: role, text and calls. Raises ValueError where a result answers no call, or one too many."""
    found: list[dict[str, Any]] = []
    made: set[str] = set()
    unanswered: set[str] = set()
    for number, item in enumerate(items):
        if isinstance(item, InputCall):
            if item.call_id in made:
                raise ValueError(f"input.{number}.call_id: two calls have the same")
            made.add(item.call_id)
            unanswered.add(item.call_id)
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": None})
            found[-1]["content"] = found[-1]["content"] or None  # a turn that only called has none
            found[-1].setdefault("tool_calls", []).append(item.plain())
        elif isinstance(item, InputResult):
            if item.call_id not in unanswered:
                raise ValueError(f"input.{number}.call_id: no earlier call waits for this output")
            unanswered.remove(item.call_id)
            found.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
        elif isinstance(item, InputMessage):
            _say(found, "system" if item.role == "developer" else item.role, _text(item.content))
    return found


def _say(found: list[dict[str, Any]], role: str, text: str) -> None:
    """Add a message: to the turn that has called, where it goes on, else as a turn."""
    if role == "assistant" and found and found[-1].get("tool_calls"):
        found[-1]["content"] = (found[-1]["content"] or "") + text or None
    else:
        found.append({"role": role, "content": text})


def _text(said: str | list[InputText]) -> str:
    return said if isinstance(said, str) else "".join(part.text for part in said)
