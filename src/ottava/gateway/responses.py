"""POST /v1/responses: OpenAI's newer API, where reasoning, messages and calls are items of one output.

Nothing is kept between requests. What would need it (previous_response_id, conversation, background, store: true) is
refused, and a client sends the items of earlier turns again, as the API allows.
"""

from __future__ import annotations

from dataclasses import replace

from ottava.gateway.reply import Endpoint, Terms, sampling
from ottava.gateway.response_input import FlatSchema, ResponseRequest
from ottava.gateway.response_output import ResponseAnswer, ResponseEvent, ResponseShape
from ottava.gateway.tools import JSON_OBJECT, FormatObject, wanted
from ottava.models.chat import Chat


def terms(request: ResponseRequest, chat: Chat, thinking: bool | None) -> Terms:
    """What is asked of the engine. thinking None: nobody asked. Raises ApiError, DataError."""
    first = [] if request.instructions is None else [{"role": "system", "content": request.instructions}]
    form = request.text.format if request.text is not None else None
    schema = form.schema_ if isinstance(form, FlatSchema) else JSON_OBJECT if isinstance(form, FormatObject) else None
    thinks = bool(thinking) and chat.think_end is not None
    many = request.parallel_tool_calls is not False
    want = wanted(chat, thinks, schema, "text.format", request.tools or (), request.tool_choice, many)
    how = sampling(request, chat, bool(thinking), request.max_output_tokens, request.top_logprobs or 0)
    how = replace(how, grammar=want.grammar)
    if request.logprobs:
        _ = chat.pieces  # made here, on a thread, as it takes a while the first time
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    ids = chat.render([*first, *request.messages], bool(thinking), want.rendered)
    return Terms([ids], bool(thinking), how, stop, offer=want.offer)


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
