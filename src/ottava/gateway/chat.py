"""POST /v1/chat/completions: messages in, the model's turn out, its reasoning apart from its content.

The answer has the same text in `reasoning` and `reasoning_content`, as engines renamed the one to the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, model_validator
from typing_extensions import TypedDict

from ottava.engine.session import Piece, Reader, Token
from ottava.gateway.reply import Endpoint, Reply, Terms, TokenLogprob, event, sampling, told
from ottava.gateway.schema import (
    MOST,
    ApiError,
    Asked,
    Finish,
    Ignored,
    StreamOptions,
    Strict,
    Text,
    Trailer,
    Unsupported,
    Usage,
    usage,
)
from ottava.gateway.tools import (
    JSON_OBJECT,
    MOST_TOOLS,
    Choice,
    Format,
    FormatObject,
    FormatSchema,
    MessageCall,
    Named,
    Tools,
    wanted,
)
from ottava.models.chat import Chat
from ottava.models.tools import Call

ChatFinish = Finish | Literal["tool_calls"]


class TextPart(Strict):
    """A part of a message; text only."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn. What earlier turns were thinking is accepted and left out of the prompt."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    name: Ignored = None
    refusal: Unsupported = None
    annotations: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    parsed: Ignored = None
    tool_calls: Annotated[list[MessageCall], Field(max_length=MOST_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a {self.role} message needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a {self.role} message has no tool_calls")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise ValueError("a tool message needs the tool_call_id that it answers, and no other has one")
        return self

    def plain(self) -> dict[str, Any]:
        """As templates take it: role and one text, and calls."""
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        said: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:  # a turn that only called has no content, which some answers give as "", others as null
            said["content"] = text or None
            said["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            said["tool_call_id"] = self.tool_call_id
        return said


class ChatRequest(Asked):
    """The body of a request."""

    messages: Annotated[list[Message], Field(min_length=1)]
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Format | None = None
    tools: Tools | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    functions: Unsupported = None
    function_call: Unsupported = None
    logit_bias: Unsupported = None
    frequency_penalty: Unsupported = None
    presence_penalty: Unsupported = None
    store: Ignored = None

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class Logprobs(TypedDict):
    """Of the tokens of the content."""

    content: list[TokenLogprob]
    refusal: None


class AnswerFunction(TypedDict):
    """arguments: the JSON text of an object."""

    name: str
    arguments: str


class AnswerCall(TypedDict):
    """A call of a tool. index: in a stream, its number."""

    id: str
    type: Literal["function"]
    function: AnswerFunction
    index: NotRequired[int]


class AnswerMessage(TypedDict):
    """The model's turn. reasoning and reasoning_content are the same text; null where it did not think."""

    role: Literal["assistant"]
    content: str
    refusal: None
    reasoning: str | None
    reasoning_content: str | None
    tool_calls: NotRequired[list[AnswerCall]]


class ChatChoice(TypedDict):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: ChatFinish


class ChatAnswer(TypedDict):
    """A plain answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    ottava: NotRequired[Trailer]


class Delta(TypedDict):
    """What a chunk adds to a message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[AnswerCall]]


class ChunkChoice(TypedDict):
    """What a chunk adds to one of `n` answers."""

    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: ChatFinish | None


class ChatChunk(TypedDict):
    """An event of a stream; the last one before [DONE] has no choices but the usage, where that was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage]
    ottava: NotRequired[Trailer]


def terms(request: ChatRequest, chat: Chat, thinking: bool | None) -> Terms:
    """What is asked of the engine. thinking None: nobody asked. Raises ApiError, DataError."""
    messages = [message.plain() for message in request.messages]
    limit = request.max_completion_tokens or request.max_tokens
    thinks = bool(thinking) and chat.think_end is not None
    tools = [tool.function for tool in request.tools or ()]
    choice = request.tool_choice.function if isinstance(request.tool_choice, Named) else request.tool_choice
    many = request.parallel_tool_calls is not False
    schema = _schema(request.response_format)
    want = wanted(chat, thinks, schema, "response_format", tools, choice, many, "tools.{}.function")
    how = sampling(request, chat, bool(thinking), limit, request.top_logprobs or 0)
    how = replace(how, grammar=want.grammar)
    if request.logprobs:
        _ = chat.pieces  # made here, on a thread, as it takes a while the first time
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    ids = chat.render(messages, bool(thinking), want.rendered)
    return Terms([ids], bool(thinking), how, stop, request.n or 1, offer=want.offer)


def _schema(form: Format | None) -> dict[str, Any] | None:
    if isinstance(form, FormatSchema):
        return form.json_schema.schema_
    return JSON_OBJECT if isinstance(form, FormatObject) else None


class ChatShape:
    """A reply as this endpoint says it."""

    def __init__(self, request: ChatRequest, reply: Reply, model: str):
        self._reply, self._logprobs = reply, bool(request.logprobs)
        self._usage = request.stream_options is not None and request.stream_options.include_usage
        self._id, self._model, self._left = f"chatcmpl-{reply.id}", model, len(reply.choices)
        self._called = [0] * len(reply.choices)

    def whole(self, said: Sequence[Sequence[Piece]]) -> ChatAnswer:
        """The plain answer."""
        answer: ChatAnswer = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._reply.created,
            "model": self._model,
            "choices": [self._choice(number, pieces) for number, pieces in enumerate(said)],
            "usage": usage(*self._reply.counts),
        }
        if (trailer := self._reply.trailer()) is not None:
            answer["ottava"] = trailer
        return answer

    def _choice(self, number: int, pieces: Sequence[Piece]) -> ChatChoice:
        reader = self._reply.choices[number].reader
        texts = {part: "".join(p.text for p in pieces if p.part == part) for part in ("reasoning", "content")}
        reasoning = texts["reasoning"] if reader.thought else None
        message: AnswerMessage = {
            "role": "assistant",
            "content": texts["content"],
            "refusal": None,
            "reasoning": reasoning,
            "reasoning_content": reasoning,
        }
        calls = [piece.call for piece in pieces if piece.call is not None]
        if calls:
            message["tool_calls"] = [self._call(number, index, call) for index, call in enumerate(calls)]
        return {
            "index": number,
            "message": message,
            "logprobs": self._told([token for piece in pieces for token in piece.tokens]),
            "finish_reason": _finish(reader),
        }

    def _call(self, number: int, index: int, call: Call) -> AnswerCall:
        function: AnswerFunction = {"name": call.name, "arguments": call.arguments}
        return {"id": f"call_{self._reply.id}_{number}_{index}", "type": "function", "function": function}

    def begin(self) -> Iterator[str]:
        """A chunk that opens each choice."""
        for number, choice in enumerate(self._reply.choices):
            delta: Delta = {"role": "assistant", "content": ""}
            if choice.reader.thought:
                delta |= {"reasoning": "", "reasoning_content": ""}
            yield event(self._chunk(number, delta))

    def piece(self, number: int, piece: Piece) -> Iterator[str]:
        """A chunk with the text, or with a whole call."""
        if piece.call is not None:
            index = self._called[number]
            self._called[number] += 1
            whole: Delta = {"tool_calls": [{**self._call(number, index, piece.call), "index": index}]}
            yield event(self._chunk(number, whole, logprobs=self._told(piece.tokens)))
            return
        reasoning: Delta = {"reasoning": piece.text, "reasoning_content": piece.text}
        delta: Delta = {"content": piece.text} if piece.part == "content" else reasoning
        yield event(self._chunk(number, delta, logprobs=self._told(piece.tokens)))

    def finish(self, number: int) -> Iterator[str]:
        """A chunk that says why the choice is over; that of the last choice says who answered."""
        self._left -= 1
        chunk = self._chunk(number, {}, finish=_finish(self._reply.choices[number].reader))
        if not self._left and (trailer := self._reply.trailer()) is not None:
            chunk["ottava"] = trailer
        yield event(chunk)

    def end(self) -> Iterator[str]:
        """The usage, where it was asked for, and the mark of the end."""
        if self._usage:
            yield event({**self._head(), "choices": [], "usage": usage(*self._reply.counts)})
        yield "data: [DONE]\n\n"

    def failed(self, error: ApiError) -> Iterator[str]:
        """The error as an event."""
        yield event(error.body())

    def _head(self) -> ChatChunk:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._reply.created,
            "model": self._model,
            "choices": [],
        }

    def _chunk(
        self, number: int, delta: Delta, *, finish: ChatFinish | None = None, logprobs: Logprobs | None = None
    ) -> ChatChunk:
        choice: ChunkChoice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head(), "choices": [choice]}

    def _told(self, tokens: Sequence[Token]) -> Logprobs | None:
        if not self._logprobs:
            return None
        return {"content": [told(self._reply.chat, token) for token in tokens], "refusal": None}


def _finish(reader: Reader) -> ChatFinish:
    return "tool_calls" if reader.called and reader.finish == "stop" else reader.finish


ENDPOINT = Endpoint(
    path="/v1/chat/completions",
    summary="The model's turn in a conversation",
    param="messages",
    request=ChatRequest,
    answer=ChatAnswer,
    event=ChatChunk,
    terms=terms,
    shape=ChatShape,
)
