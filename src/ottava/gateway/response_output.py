"""What `/v1/responses` answers: reasoning, messages and calls as items of one output, plain or as events.

A plain answer is what the events of its stream tell, put together by the code that makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from ottava.engine.session import Piece
from ottava.gateway.reply import Logprob, Reply, TokenLogprob, event, told
from ottava.gateway.response_input import ResponseRequest, TextConfig
from ottava.gateway.schema import ApiError, Effort, ErrorDetails, Trailer
from ottava.gateway.tools import FlatChoice, FlatNamed, FlatTool, HowMany
from ottava.models.tools import Call

Kind = Literal["reasoning", "message"]
Status = Literal["in_progress", "completed", "incomplete"]


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
    """What the model says. logprobs: where they were asked for, of the tokens of the text."""

    type: Literal["output_text"]
    text: str
    annotations: list[str]
    logprobs: list[TokenLogprob]


class MessageItem(TypedDict):
    """The model's turn."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[OutputText]
    status: Status


class CallItem(TypedDict):
    """A call of a tool. arguments: the JSON text of an object; call_id: what its output has to name."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Status


Item = ReasoningItem | MessageItem | CallItem
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


class SaidTool(TypedDict):
    """A tool that was offered. strict: its calls are held to its parameters."""

    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool


class SaidChoice(TypedDict):
    """The tool that had to be called."""

    type: Literal["function"]
    name: str


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
    tool_choice: HowMany | SaidChoice
    tools: list[SaidTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    ottava: NotRequired[Trailer]


class EventLogprob(TypedDict):
    """As events have it: without bytes."""

    token: str
    logprob: float


class EventTokenLogprob(EventLogprob):
    """A token, and the likeliest ones in its place."""

    top_logprobs: list[EventLogprob]


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
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
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
    name: NotRequired[str]
    arguments: NotRequired[str]
    logprobs: NotRequired[list[EventTokenLogprob]]


class ResponseShape:
    """A reply as this endpoint says it. A plain answer is the response of the stream's last event."""

    def __init__(self, request: ResponseRequest, reply: Reply, model: str):
        self._request, self._reply, self._model = request, reply, model
        self._output: list[Item] = []
        self._said: ReasoningItem | MessageItem | None = None  # the item that is open; the last of the output
        self._events = 0

    def whole(self, said: Sequence[Sequence[Piece]]) -> ResponseAnswer:
        """The plain answer."""
        pieces = (event for piece in said[0] for event in self.piece(0, piece))
        for _ in chain(self.begin(), pieces, self.finish(0)):
            pass  # what the events tell is what `_output` then holds
        return self._response(self._status())

    def begin(self) -> Iterator[str]:
        """The response without its output; then the reasoning, if there is any."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        if self._reply.choices[0].reader.thought:
            yield from self._open("reasoning")

    def piece(self, number: int, piece: Piece) -> Iterator[str]:
        """More of the item that is open, or its end and another one: a call is an item of its own."""
        if piece.call is not None:
            yield from self._close("completed")
            yield from self._call(piece.call)
            return
        kind: Kind = "reasoning" if piece.part == "reasoning" else "message"
        if self._said is None or self._said["type"] != kind:
            yield from self._close("completed")
            yield from self._open(kind)
        assert self._said is not None
        part = self._said["content"][0]
        part["text"] += piece.text
        more: dict[str, Any] = {}
        if part["type"] == "output_text":
            new = [told(self._reply.chat, token) for token in piece.tokens] if self._request.logprobs else []
            part["logprobs"] += new
            more["logprobs"] = _without_bytes(new)
        yield self._event(f"response.{part['type']}.delta", **self._place(), delta=piece.text, **more)

    def finish(self, number: int) -> Iterator[str]:
        """The end of the last item. A reply that was cut off while thinking has no message, one that ended has one,
        or a call."""
        thought = self._said is not None and self._said["type"] == "reasoning"
        if not self._output or (thought and self._status() == "completed"):
            yield from self._close("completed")
            yield from self._open("message")
        yield from self._close(self._status())

    def end(self) -> Iterator[str]:
        """The whole response."""
        status = self._status()
        yield self._event(f"response.{status}", response=self._response(status))

    def failed(self, error: ApiError) -> Iterator[str]:
        """The response as far as it came, with the error."""
        details = {**error.body()["error"], "code": error.code or "server_error"}
        yield self._event("response.failed", response=self._response("failed", details))

    def _open(self, kind: Kind) -> Iterator[str]:
        item: ReasoningItem | MessageItem
        empty: Part
        if kind == "reasoning":
            item = {"id": self._id("rs"), "type": "reasoning", "summary": [], "content": [], "status": "in_progress"}
            empty = {"type": "reasoning_text", "text": ""}
        else:
            item = {"id": self._id("msg"), "type": "message", "role": "assistant", "content": [],
                    "status": "in_progress"}  # fmt: skip
            empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._added(item)
        self._said = item
        yield self._event("response.content_part.added", **self._place(), part=empty)
        item["content"].append(empty)  # type: ignore[arg-type]

    def _close(self, status: Status) -> Iterator[str]:
        """The end of the item that is open, where one is."""
        if self._said is None:
            return
        part = self._said["content"][0]
        more = {"logprobs": _without_bytes(part["logprobs"])} if part["type"] == "output_text" else {}
        yield self._event(f"response.{part['type']}.done", **self._place(), text=part["text"], **more)
        yield self._event("response.content_part.done", **self._place(), part=part)
        yield self._done(self._said, status)
        self._said = None

    def _call(self, call: Call) -> Iterator[str]:
        """A call comes whole: before its end nobody knows that it is one."""
        name, number = self._id("fc"), sum(item["type"] == "function_call" for item in self._output)
        item: CallItem = {"id": name, "type": "function_call", "call_id": f"call_{self._reply.id}_{number}",
                          "name": call.name, "arguments": "", "status": "in_progress"}  # fmt: skip
        yield self._added(item)
        place = {"item_id": name, "output_index": len(self._output) - 1}
        yield self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        item["arguments"] = call.arguments
        said = {"name": call.name, "arguments": call.arguments}
        yield self._event("response.function_call_arguments.done", **place, **said)
        yield self._done(item, "completed")

    def _added(self, item: Item) -> str:
        self._output.append(item)
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _done(self, item: Item, status: Status) -> str:
        item["status"] = status
        return self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _id(self, kind: str) -> str:
        """Of the item that is to be opened."""
        return f"{kind}_{self._reply.id}_{len(self._output)}"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}

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
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "store": False,
            "temperature": request.temperature or 0.0,
            "text": {"format": _said_format(request.text)},
            "tool_choice": _said_choice(request.tool_choice),
            "tools": [_said_tool(tool) for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
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


def _said_tool(tool: FlatTool) -> SaidTool:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": bool(tool.strict),
    }


def _said_choice(choice: FlatChoice | None) -> HowMany | SaidChoice:
    return {"type": "function", "name": choice.name} if isinstance(choice, FlatNamed) else choice or "auto"


def _without_bytes(tokens: Sequence[TokenLogprob]) -> list[EventTokenLogprob]:
    def bare(one: Logprob) -> EventLogprob:
        return {"token": one["token"], "logprob": one["logprob"]}

    return [{**bare(token), "top_logprobs": [bare(other) for other in token["top_logprobs"]]} for token in tokens]
