"""POST /v1/completions: text or ids in, what follows them out; with `echo`, the prompt and what the model thinks of it.

A prompt is continued as it is, without a template, and control tokens in it are control tokens: it is the client's own.
Where a form of the thinking switch is sent, the prompt is asked as a user's turn in that mode instead.
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
    Text,
    Trailer,
    Unsupported,
    Usage,
    usage,
)
from ottava.models.chat import Chat

LIMIT = 16  # ids of a reply where the client sets no limit, as in OpenAI's API
PROMPTS = 16
"""Prompts that a request may have; with their choices they may be as many as the engine takes at a time."""

Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(min_length=1)]


class CompletionRequest(Asked):
    """The body of a request."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=PROMPTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST)] | None = None
    best_of: Literal[1] | None = None
    add_special_tokens: bool | None = None
    stream_options: StreamOptions | None = None
    suffix: Unsupported = None
    logit_bias: Unsupported = None
    frequency_penalty: Unsupported = None
    presence_penalty: Unsupported = None
    store: Ignored = None

    @model_validator(mode="after")
    def _agree(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 needs echo: true")
        return self

    @property
    def given(self) -> Sequence[str | list[int]]:
        """The prompts."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        many = [one for one in self.prompt if not isinstance(one, int)]
        return many or [[one for one in self.prompt if isinstance(one, int)]]


class CompletionLogprobs(TypedDict):
    """Of the text's tokens, under the model at temperature 1; null for the first of an echoed prompt.

    top_logprobs: the likeliest and the chosen one. text_offset: the character of `text` at which the piece begins that
    a token is part of.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """The text behind a prompt. reasoning: where a mode was asked for, as in a chat; null without."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish
    reasoning: NotRequired[str | None]
    reasoning_content: NotRequired[str | None]


class CompletionAnswer(TypedDict):
    """A plain answer: `n` choices for each prompt, in their order."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    ottava: NotRequired[Trailer]


class CompletionDelta(TypedDict):
    """What a chunk adds to a choice."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    reasoning: NotRequired[str]
    reasoning_content: NotRequired[str]


class CompletionChunk(TypedDict):
    """An event of a stream; the last one before [DONE] has no choices but the usage, where that was asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionDelta]
    usage: NotRequired[Usage]
    ottava: NotRequired[Trailer]


def terms(request: CompletionRequest, chat: Chat, thinking: bool | None) -> Terms:
    """What is asked of the engine. thinking None: nobody asked. Raises ApiError, DataError."""
    limit = LIMIT if request.max_tokens is None else request.max_tokens
    how = sampling(request, chat, bool(thinking), limit, request.logprobs or 0)
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    scored = bool(request.echo) and request.logprobs is not None
    if thinking is None:
        prompts = [_ids(one, chat, request.add_special_tokens is not False) for one in request.given]
        return Terms(prompts, False, how, stop, request.n or 1, raw=True, scored=scored)
    if request.echo:
        raise ApiError(400, "echo needs a prompt without a mode, which makes it a user's turn", param="echo")
    turns = [_turn(one, chat, thinking) for one in request.given]
    return Terms(turns, thinking, how, stop, request.n or 1)


def _ids(prompt: str | list[int], chat: Chat, special: bool) -> list[int]:
    if isinstance(prompt, str):
        found, _ = chat.spans(prompt, special=special)
        if not found:
            raise ApiError(400, "prompt: it has no tokens", param="prompt")
        return found
    for one in prompt:
        if chat.tokenizer.id_to_token(one) is None:
            raise ApiError(400, f"prompt: {one} is no token's id", param="prompt")
    return prompt


def _turn(prompt: str | list[int], chat: Chat, thinking: bool) -> list[int]:
    if not isinstance(prompt, str):
        message = "ids are continued as they are: write the mode into them, or send the prompt as text"
        raise ApiError(400, message, param="prompt")
    return chat.render([{"role": "user", "content": prompt}], thinking)


class CompletionShape:
    """A reply as this endpoint says it."""

    def __init__(self, request: CompletionRequest, reply: Reply, model: str):
        self._request, self._reply, self._model = request, reply, model
        self._usage = request.stream_options is not None and request.stream_options.include_usage
        self._left = len(reply.choices)
        self._said = [0] * len(reply.choices)  # characters of each choice's text so far
        self._raw = reply.terms.raw

    def whole(self, said: Sequence[Sequence[Piece]]) -> CompletionAnswer:
        """The plain answer: every choice is the pieces of its stream, joined."""
        answer: CompletionAnswer = {
            "id": f"cmpl-{self._reply.id}",
            "object": "text_completion",
            "created": self._reply.created,
            "model": self._model,
            "choices": [self._choice(number, pieces) for number, pieces in enumerate(said)],
            "usage": usage(*self._reply.counts),
        }
        if (trailer := self._reply.trailer()) is not None:
            answer["ottava"] = trailer
        return answer

    def _choice(self, number: int, pieces: Sequence[Piece]) -> CompletionChoice:
        reader = self._reply.choices[number].reader
        deltas = [*self._echo(number), *(self._delta(number, piece) for piece in pieces)]
        choice: CompletionChoice = {
            "index": number,
            "text": "".join(delta["text"] for delta in deltas),
            "logprobs": _joined([delta["logprobs"] for delta in deltas]) if self._wanted else None,
            "finish_reason": reader.finish,
        }
        if not self._raw:
            reasoning = "".join(delta.get("reasoning", "") for delta in deltas) if reader.thought else None
            choice |= {"reasoning": reasoning, "reasoning_content": reasoning}
        return choice

    def begin(self) -> Iterator[str]:
        """The prompt of each choice, where it is to be echoed."""
        for number in range(len(self._reply.choices)):
            for delta in self._echo(number):
                yield self._chunk(delta)

    def piece(self, number: int, piece: Piece) -> Iterator[str]:
        """A chunk with the text."""
        yield self._chunk(self._delta(number, piece))

    def finish(self, number: int) -> Iterator[str]:
        """A chunk that says why the choice is over; that of the last choice says who answered."""
        self._left -= 1
        finish = self._reply.choices[number].reader.finish
        yield self._chunk({"index": number, "text": "", "logprobs": None, "finish_reason": finish})

    def end(self) -> Iterator[str]:
        """The usage, where it was asked for, and the mark of the end."""
        if self._usage:
            yield event({**self._head(), "usage": usage(*self._reply.counts)})
        yield "data: [DONE]\n\n"

    def failed(self, error: ApiError) -> Iterator[str]:
        """The error as an event."""
        yield event(error.body())

    def _head(self) -> CompletionChunk:
        reply = self._reply
        created, name = reply.created, f"cmpl-{reply.id}"
        return {"id": name, "object": "text_completion", "created": created, "model": self._model, "choices": []}

    def _chunk(self, delta: CompletionDelta) -> str:
        chunk: CompletionChunk = {**self._head(), "choices": [delta]}
        if not self._left and (trailer := self._reply.trailer()) is not None:
            chunk["ottava"] = trailer
        return event(chunk)

    def _delta(self, number: int, piece: Piece) -> CompletionDelta:
        if piece.part == "reasoning":
            delta: CompletionDelta = {"index": number, "text": "", "logprobs": None, "finish_reason": None}
            return {**delta, "reasoning": piece.text, "reasoning_content": piece.text}
        told = self._told([token.id for token in piece.tokens], piece.tokens, [self._said[number]] * len(piece.tokens))
        self._said[number] += len(piece.text)
        return {"index": number, "text": piece.text, "logprobs": told, "finish_reason": None}

    def _echo(self, number: int) -> Iterator[CompletionDelta]:
        if not self._request.echo:
            return
        reply, at = self._reply, number // self._reply.terms.n
        prompt, ids = self._request.given[at], reply.terms.prompts[at]
        if isinstance(prompt, str):
            text, offsets = prompt, reply.chat.spans(prompt, special=self._request.add_special_tokens is not False)[1]
        else:
            text, offsets = spelled(reply.chat, ids)
        told = self._told(ids, reply.scored[at], offsets) if reply.scored else None
        self._said[number] = len(text)
        yield {"index": number, "text": text, "logprobs": told, "finish_reason": None}

    @property
    def _wanted(self) -> bool:
        return self._request.logprobs is not None

    def _told(
        self, ids: Sequence[int], tokens: Sequence[Token | None], offsets: Sequence[int]
    ) -> CompletionLogprobs | None:
        if not self._wanted:
            return None
        chat = self._reply.chat
        names = [text_of(chat, one) for one in ids]
        values = [None if token is None else finite(token.logprob) for token in tokens]
        tops: list[dict[str, float] | None] = []
        for name, token in zip(names, tokens, strict=True):
            top = {} if token is None else {text_of(chat, other): finite(value) for other, value in reversed(token.top)}
            tops.append(None if token is None else {name: finite(token.logprob)} | top)
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": list(offsets)}


def _joined(parts: Sequence[CompletionLogprobs | None]) -> CompletionLogprobs:
    whole: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for part in parts:
        if part is not None:
            whole["tokens"] += part["tokens"]
            whole["token_logprobs"] += part["token_logprobs"]
            whole["top_logprobs"] += part["top_logprobs"]
            whole["text_offset"] += part["text_offset"]
    return whole


def spelled(chat: Chat, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of ids, control tokens too, and the character at which the piece begins that each is part of."""

    def decode(some: Sequence[int]) -> str:
        return str(chat.tokenizer.decode(list(some), skip_special_tokens=False))

    text, offsets, context, new = "", list[int](), list[int](), list[int]()
    for number, one in enumerate(ids):
        new.append(one)
        offsets.append(len(text))
        more = decode([*context, *new])[len(decode(context)) :]
        if not more.endswith("\ufffd") or number + 1 == len(ids):
            text, context, new = text + more, new, []
    return text, offsets


ENDPOINT = Endpoint(
    path="/v1/completions",
    summary="What follows a text",
    param="prompt",
    request=CompletionRequest,
    answer=CompletionAnswer,
    event=CompletionChunk,
    terms=terms,
    shape=CompletionShape,
)
