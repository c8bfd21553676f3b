"""What a request may contain, and the shape of every answer and error.

Unknown and unsupported fields are refused, not ignored: a misspelt thinking switch or a dropped
`tools` would change the answer in silence. JSON is parsed by pydantic from the bytes, so malformed
UTF-8, lone surrogates and deep nesting are refused by the parser itself.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ottava.document import suggest
from ottava.engine.session import Token
from ottava.models.chat import Chat

_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A refusal in OpenAI's shape. param: the field at fault; retry: seconds for Retry-After."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _unsupported(value: Any) -> Any:
    if value not in (None, [], {}, 0, "none", "auto"):
        raise ValueError("is not supported by this server")
    return value


Unsupported = Annotated[Any, AfterValidator(_unsupported)]
Ignored = Annotated[Any, Field(description="accepted for compatibility; does not change the answer")]
Text = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    """No unknown fields, no conversions between types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


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


class Thinking(Strict):
    """DeepSeek's switch, with the budget of thinking tokens that Anthropic's API has."""

    type: Literal["enabled", "disabled"]
    budget_tokens: Annotated[int, Field(ge=0)] | None = None


class TemplateKwargs(Strict):
    """vLLM's and SGLang's way to the template; only the thinking switch may pass."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Ignored = None


class ChatRequest(Strict):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    n: Literal[1] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Unsupported = None
    tool_choice: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    logit_bias: Unsupported = None
    frequency_penalty: Unsupported = None
    presence_penalty: Unsupported = None
    parallel_tool_calls: Ignored = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def limit(self) -> int | None:
        """Ids the reply may have, where the client says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> list[str]:
        """The stop texts."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def parse(body: bytes) -> ChatRequest:
    """The request in a body. Raises ApiError 400 naming the field."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(_public(first["loc"], first["type"])) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown field"
        if len(first["loc"]) == 1:
            message += f"; {suggest(str(field), list(ChatRequest.model_fields))}"
    raise ApiError(400, f"{field}: {message}" if field else message, param=field, code=first["type"])


def _public(loc: tuple[int | str, ...], kind: str) -> list[str]:
    """A fault's place without the names that pydantic gives to the members of a union."""
    unknown = kind == "extra_forbidden"  # the last part is the client's own word
    inner = loc[:-1] if unknown else loc
    parts = [str(part) for part in inner if isinstance(part, int) or (part.isidentifier() and part != "str")]
    return [*parts, str(loc[-1])] if unknown else parts


def usage(prompt: int, total: int, reasoning: int) -> dict[str, Any]:
    """Token counts. completion_tokens counts every generated id, </think> and the end included."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": total,
        "total_tokens": prompt + total,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def logprobs(chat: Chat, tokens: list[Token]) -> dict[str, Any]:
    """Log-probabilities of content tokens, in OpenAI's shape."""

    def entry(token: int, value: float) -> dict[str, Any]:
        text = str(chat.tokenizer.decode([token], skip_special_tokens=False))
        return {"token": text, "logprob": max(value, -9999.0), "bytes": None}

    return {
        "content": [
            {**entry(token.id, token.logprob), "top_logprobs": [entry(*other) for other in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }
