"""POST /v1/responses: OpenAI's newer API, where reasoning and message are items of one output.

Nothing is kept between requests. What would need it (previous_response_id, conversation, background, store: true) is
refused, and a client sends the items of earlier turns again, as the API allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator
from typing_extensions import TypedDict

from ottava.engine.session import Piece
from ottava.gateway.reply import Endpoint, Reply, Terms, event, sampling
from ottava.gateway.schema import ApiError, Asked, Effort, ErrorDetails, Ignored, Strict, Text, Trailer, Unsupported
from ottava.gateway.tools import JSON_OBJECT, FormatObject, FormatText, NamedSchema, wanted
from ottava.models.chat import Chat


def _stateless(value: Any) -> Any:
    if not (value is None or value is False):
        raise ValueError("this server keeps nothing between requests: send the earlier items as input again")
    return value


Stateless = Annotated[Any, AfterValidator(_stateless), WithJsonSchema({"enum": [None, False]})]
Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Strict):
    """Text in an item; what an answer said about it is left out."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Ignored = None
    logprobs: Ignored = None


class InputMessage(Strict):
    """A turn."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText]
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None

    def plain(self) -> dict[str, str]:
        """As templates take it: role and one text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class InputReasoning(Strict):
    """What an earlier turn was thinking: accepted, and left out of the prompt, as templates leave it out."""

    type: Literal["reasoning"]
    id: Ignored = None
    summary: Ignored = None
    content: Ignored = None
    encrypted_content: Ignored = None
    status: Ignored = None


class FlatSchema(NamedSchema):
    """JSON of a schema."""

    type: Literal["json_schema"]


class TextConfig(Strict):
    """How the text is to be."""

    format: Annotated[FormatText | FormatObject | FlatSchema, Field(discriminator="type")] | None = None
    verbosity: Ignored = None


class ResponseRequest(Asked):
    """The body of a request."""

    input: str | Annotated[list[InputMessage | InputReasoning], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    text: TextConfig | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: Stateless = None
    conversation: Stateless = None
    store: Stateless = None
    background: Stateless = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    top_logprobs: Unsupported = None
    tools: Unsupported = None
    tool_choice: Unsupported = None
    prompt: Unsupported = None
    stream_options: Ignored = None
    parallel_tool_calls: Ignored = None
    max_tool_calls: Ignored = None

    @model_validator(mode="after")
    def _has_a_message(self) -> ResponseRequest:
        if not self.messages:
            raise ValueError("input has no message")
        return self

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns as templates take them, without the instructions."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return [item.plain() for item in self.input if isinstance(item, InputMessage)]


class ReasoningText(TypedDict):
    """What the model was thinking."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(TypedDict):
    """The thinking, whole: there is no summary of it."""

    id: str
    type: Literal["reasoning"]
    summary: list[str]
    content: list[ReasoningText]
    status: Status


class OutputText(TypedDict):
    """What the model says."""

    type: Literal["output_text"]
    text: str
    annotations: list[str]
    logprobs: list[str]


class MessageItem(TypedDict):
    """The model's turn."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[OutputText]
    status: Status


Item = ReasoningItem | MessageItem
Part = ReasoningText | OutputText


class InputDetails(TypedDict):
    """No prompt is kept for another request."""

    cached_tokens: Literal[0]
    cache_write_tokens: Literal[0]


class OutputDetails(TypedDict):
    """reasoning_tokens: the ids before </think>."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Counts of ids. output_tokens counts every generated one, </think> and the end included."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(TypedDict):
    """Why a response is not whole."""

    reason: Literal["max_output_tokens"]


class SaidReasoning(TypedDict):
    """The effort that was asked for."""

    effort: Effort | None
    summary: None


class SaidFormat(TypedDict):
    """What was asked for; of a schema, with its name and itself."""

    type: Literal["text", "json_object", "json_schema"]
    name: NotRequired[str]
    schema: NotRequired[dict[str, Any]]
    description: NotRequired[str]
    strict: NotRequired[bool]


class SaidText(TypedDict):
    """The form of the text."""

    format: SaidFormat


class ResponseAnswer(TypedDict):
    """A response: plain, or as the first and last events of a stream have it."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ErrorDetails | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: SaidReasoning
    store: Literal[False]
    temperature: float
    text: SaidText
    tool_choice: Literal["auto"]
    tools: list[str]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    ottava: NotRequired[Trailer]


class ResponseEvent(TypedDict):
    """An event of a stream, numbered; which of the fields it has follows from its type."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: int
    response: NotRequired[ResponseAnswer]
    output_index: NotRequired[int]
    content_index: NotRequired[int]
    item_id: NotRequired[str]
    item: NotRequired[Item]
    part: NotRequired[Part]
    delta: NotRequired[str]
    text: NotRequired[str]
    logprobs: NotRequired[list[str]]


def terms(request: ResponseRequest, chat: Chat, thinking: bool | None) -> Terms:
    """What is asked of the engine. thinking None: nobody asked. Raises ApiError, DataError."""
    first = [] if request.instructions is None else [{"role": "system", "content": request.instructions}]
    form = request.text.format if request.text is not None else None
    schema = form.schema_ if isinstance(form, FlatSchema) else JSON_OBJECT if isinstance(form, FormatObject) else None
    want = wanted(chat, bool(thinking) and chat.think_end is not None, schema, "text.format")
    how = sampling(request, chat, bool(thinking), request.max_output_tokens, 0)
    how = replace(how, grammar=want.grammar)
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    ids = chat.render([*first, *request.messages], bool(thinking))
    return Terms([ids], bool(thinking), how, stop)


class ResponseShape:
    """A reply as this endpoint says it. A plain answer is the response of the stream's last event."""

    def __init__(self, request: ResponseRequest, reply: Reply, model: str):
        self._request, self._reply, self._model = request, reply, model
        self._output: list[Item] = []
        self._events = 0

    def whole(self, said: Sequence[Sequence[Piece]]) -> ResponseAnswer:
        """The plain answer."""
        pieces = (event for piece in said[0] for event in self.piece(0, piece))
        for _ in chain(self.begin(), pieces, self.finish(0)):
            pass  # what the events tell is what `_output` then holds
        return self._response(self._status())

    def begin(self) -> Iterator[str]:
        """The response without its output; then the first item."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        yield from self._open("reasoning" if self._reply.choices[0].reader.thought else "content")

    def piece(self, number: int, piece: Piece) -> Iterator[str]:
        """More of the item that is open; or the end of the thinking and the beginning of the message."""
        if piece.part == "content" and self._output[-1]["type"] == "reasoning":
            yield from self._close("completed")
            yield from self._open("content")
        self._output[-1]["content"][0]["text"] += piece.text
        yield self._event(f"response.{self._kind}.delta", **self._place(), delta=piece.text, **self._logprobs())

    def finish(self, number: int) -> Iterator[str]:
        """The end of the last item. A reply that was cut off while thinking has no message."""
        if self._output[-1]["type"] == "reasoning" and self._status() == "completed":
            yield from self._close("completed")
            yield from self._open("content")
        yield from self._close(self._status())

    def end(self) -> Iterator[str]:
        """The whole response."""
        status = self._status()
        yield self._event(f"response.{status}", response=self._response(status))

    def failed(self, error: ApiError) -> Iterator[str]:
        """The response as far as it came, with the error."""
        details = {**error.body()["error"], "code": error.code or "server_error"}
        yield self._event("response.failed", response=self._response("failed", details))

    def _open(self, part: Literal["reasoning", "content"]) -> Iterator[str]:
        item: Item
        empty: Part
        if part == "reasoning":
            name = f"rs_{self._reply.id}"
            item = {"id": name, "type": "reasoning", "summary": [], "content": [], "status": "in_progress"}
            empty = {"type": "reasoning_text", "text": ""}
        else:
            name = f"msg_{self._reply.id}"
            item = {"id": name, "type": "message", "role": "assistant", "content": [], "status": "in_progress"}
            empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._output.append(item)
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)
        yield self._event("response.content_part.added", **self._place(), part=empty)
        item["content"].append(empty)  # type: ignore[arg-type]

    def _close(self, status: Status) -> Iterator[str]:
        item = self._output[-1]
        part = item["content"][0]
        yield self._event(f"response.{self._kind}.done", **self._place(), text=part["text"], **self._logprobs())
        yield self._event("response.content_part.done", **self._place(), part=part)
        item["status"] = status
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    @property
    def _kind(self) -> str:
        return "reasoning_text" if self._output[-1]["type"] == "reasoning" else "output_text"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}

    def _logprobs(self) -> dict[str, list[str]]:
        return {"logprobs": []} if self._kind == "output_text" else {}

    def _status(self) -> Literal["completed", "incomplete"]:
        return "completed" if self._reply.choices[0].reader.finish == "stop" else "incomplete"

    def _event(self, kind: str, **more: Any) -> str:
        self._events += 1
        return event({"type": kind, "sequence_number": self._events - 1, **more}, kind)

    def _response(
        self, status: Literal["in_progress", "completed", "incomplete", "failed"], error: Any = None
    ) -> ResponseAnswer:
        request, reply = self._request, self._reply
        over = status in ("completed", "incomplete")
        answer: ResponseAnswer = {
            "id": f"resp_{reply.id}",
            "object": "response",
            "created_at": reply.created,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._model,
            "output": self._output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "store": False,
            "temperature": request.temperature or 0.0,
            "text": {"format": _said_format(request.text)},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": self._usage() if over else None,
        }
        if over and (trailer := reply.trailer()) is not None:
            answer["ottava"] = trailer
        return answer

    def _usage(self) -> ResponseUsage:
        prompt, total, reasoning = self._reply.counts
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": total,
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": prompt + total,
        }


def _said_format(text: TextConfig | None) -> SaidFormat:
    if text is None or text.format is None:
        return {"type": "text"}
    said: Any = text.format.model_dump(by_alias=True, exclude_none=True)
    return said  # type: ignore[no-any-return]


ENDPOINT = Endpoint(
    path="/v1/responses",
    summary="The items that follow those of the input",
    param="input",
    request=ResponseRequest,
    answer=ResponseAnswer,
    event=ResponseEvent,
    terms=terms,
    shape=ResponseShape,
)
