"""What every request may contain, and the shape of every error.

Unknown and unsupported fields are refused, not ignored: a misspelt thinking switch or a dropped
`tools` would change the answer in silence. JSON is parsed by pydantic from the bytes, so malformed
UTF-8, lone surrogates and deep nesting are refused by the parser itself.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from typing_extensions import TypedDict

from ottava.document import suggest

MOST = 8
"""Choices that a request may ask for: each is a job of its own."""

LONGEST_NAME = 100  # characters of a client's own word that an error gives back

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


NOTHING: tuple[Any, ...] = (None, False, 0, [], {}, "none", "auto")
"""What may be said in a field that is not supported: what changes nothing."""


def _unsupported(value: Any) -> Any:
    if value not in NOTHING:
        raise ValueError("is not supported by this server")
    return value


Unsupported = Annotated[Any, AfterValidator(_unsupported), WithJsonSchema({"enum": list(NOTHING)})]
Ignored = Annotated[Any, Field(description="accepted for compatibility; does not change the answer")]
Text = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    """No unknown fields, no conversions between types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Thinking(Strict):
    """DeepSeek's switch, with the budget of thinking tokens that Anthropic's API has."""

    type: Literal["enabled", "disabled"]
    budget_tokens: Annotated[int, Field(ge=0)] | None = None


class TemplateKwargs(Strict):
    """vLLM's and SGLang's way to the template; only the thinking switch may pass."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Reasoning(Strict):
    """The switch of OpenAI's Responses. Reasoning is given whole: no summary of it is made."""

    effort: Effort | None = None
    summary: Ignored = None
    generate_summary: Ignored = None


class Asked(Strict):
    """What every endpoint takes: the model, each form of the thinking switch, and how ids are chosen."""

    model: Annotated[str, Field(max_length=256)] | None = None
    thinking: Thinking | None = None
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    stream: bool | None = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    user: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None


class StreamOptions(Strict):
    """include_usage: a last chunk with the counts."""

    include_usage: bool = False
    include_obfuscation: Ignored = None


Finish = Literal["stop", "length"]


class UsageDetails(TypedDict):
    """reasoning_tokens: the ids before </think>."""

    reasoning_tokens: int


class Usage(TypedDict):
    """Counts of ids. completion_tokens counts every generated one, </think> and the end included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: UsageDetails


Step = TypedDict("Step", {"backend": str, "from": int, "choice": NotRequired[int]})


class Trailer(TypedDict):
    """Who said the ids from which on, where there are several backends; of which choice, where there are several.

    exact: what was taken over is what would have followed anyway, to the bit; false: nobody promises it.
    """

    failovers: int
    exact: bool
    path: list[Step]


class ErrorDetails(TypedDict):
    """What was wrong; the field at fault; a name for programs."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class Error(TypedDict):
    """Every refusal and fault."""

    error: ErrorDetails


def usage(prompt: int, total: int, reasoning: int) -> Usage:
    """The counts of a reply."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": total,
        "total_tokens": prompt + total,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


Request = TypeVar("Request", bound=Asked)


def parse(kind: type[Request], body: bytes) -> Request:
    """The request in a body. Raises ApiError 400 naming the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(_public(first["loc"], first["type"]))[:LONGEST_NAME] or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown field"
        if len(first["loc"]) == 1:
            message += f"; {suggest(str(field), list(kind.model_fields))}"
    raise ApiError(400, f"{field}: {message}" if field else message, param=field, code=first["type"])


def _public(loc: tuple[int | str, ...], kind: str) -> list[str]:
    """A fault's place without the names that pydantic gives to the members of a union."""
    unknown = kind == "extra_forbidden"  # the last part is the client's own word
    inner = loc[:-1] if unknown else loc
    parts = [str(part) for part in inner if isinstance(part, int) or (part.isidentifier() and part != "str")]
    return [*parts, str(loc[-1])] if unknown else parts
