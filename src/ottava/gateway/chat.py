"""POST /v1/chat/completions: messages in, the model's turn out, its reasoning apart from its content.

The answer has the same text in `reasoning` and `reasoning_content`, as engines renamed the one to the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NotRequired

from pydantic import Field, model_validator
from typing_extensions import TypedDict

from ottava.engine.session import Piece, Token
from ottava.gateway.reply import Endpoint, Reply, Terms, event, finite, sampling, text_of
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
from ottava.models.chat import Chat


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
    tool_calls: Unsupported = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a {self.role} message needs content")
        return self

    def plain(self) -> dict[str, str]:
        """As templates take it: role and one text."""
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


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
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Unsupported = None
    tool_choice: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    logit_bias: Unsupported = None
    frequency_penalty: Unsupported = None
    presence_penalty: Unsupported = None
    parallel_tool_calls: Ignored = None
    store: Ignored = None

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class Logprob(TypedDict):
    """A token and its log-probability at temperature 1. bytes: null, as a token need not be whole characters."""

    token: str
    logprob: float
    bytes: None


class TokenLogprob(Logprob):
    """A token of the content, and the likeliest ones in its place."""

    top_logprobs: list[Logprob]


class Logprobs(TypedDict):
    """Of the tokens of the content."""

    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(TypedDict):
    """The model's turn. reasoning and reasoning_content are the same text; null where it did not think."""

    role: Literal["assistant"]
    content: str
    refusal: None
    reasoning: str | None
    reasoning_content: str | None


class ChatChoice(TypedDict):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: Finish


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


class ChunkChoice(TypedDict):
    """What a chunk adds to one of `n` answers."""

    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: Finish | None


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
    how = sampling(request, chat, bool(thinking), limit, request.top_logprobs or 0)
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return Terms([chat.render(messages, bool(thinking))], bool(thinking), how, stop, request.n or 1)


class ChatShape:
    """A reply as this endpoint says it."""

    def __init__(self, request: ChatRequest, reply: Reply, model: str):
        self._reply, self._logprobs = reply, bool(request.logprobs)
        self._usage = request.stream_options is not None and request.stream_options.include_usage
        self._id, self._model, self._left = f"chatcmpl-{reply.id}", model, len(reply.choices)

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
        return {
            "index": number,
            "message": {
                "role": "assistant",
                "content": texts["content"],
                "refusal": None,
                "reasoning": reasoning,
                "reasoning_content": reasoning,
            },
            "logprobs": self._told([token for piece in pieces for token in piece.tokens]),
            "finish_reason": reader.finish,
        }

    def begin(self) -> Iterator[str]:
        """A chunk that opens each choice."""
        for number, choice in enumerate(self._reply.choices):
            delta: Delta = {"role": "assistant", "content": ""}
            if choice.reader.thought:
                delta |= {"reasoning": "", "reasoning_content": ""}
            yield event(self._chunk(number, delta))

    def piece(self, number: int, piece: Piece) -> Iterator[str]:
        """A chunk with the text."""
        reasoning: Delta = {"reasoning": piece.text, "reasoning_content": piece.text}
        delta: Delta = {"content": piece.text} if piece.part == "content" else reasoning
        yield event(self._chunk(number, delta, logprobs=self._told(piece.tokens)))

    def finish(self, number: int) -> Iterator[str]:
        """A chunk that says why the choice is over; that of the last choice says who answered."""
        self._left -= 1
        chunk = self._chunk(number, {}, finish=self._reply.choices[number].reader.finish)
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
        self, number: int, delta: Delta, *, finish: Finish | None = None, logprobs: Logprobs | None = None
    ) -> ChatChunk:
        choice: ChunkChoice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head(), "choices": [choice]}

    def _told(self, tokens: Sequence[Token]) -> Logprobs | None:
        if not self._logprobs:
            return None
        chat = self._reply.chat
        content: list[TokenLogprob] = [
            {
                **_logprob(chat, token.id, token.logprob),
                "top_logprobs": [_logprob(chat, *other) for other in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _logprob(chat: Chat, token: int, value: float) -> Logprob:
    return {"token": text_of(chat, token), "logprob": finite(value), "bytes": None}


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
