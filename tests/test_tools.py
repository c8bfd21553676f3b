"""Tools in prompts are what Transformers renders; calls in replies are read whole or stay content, cut anyhow."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ottava.errors import DataError
from ottava.models.chat import Chat
from ottava.models.tools import FORMS, Call, Form, State, read, step
from tests.tool_models import MARKS, TEMPLATES, write_family

FAMILIES = tuple(TEMPLATES)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather <now> & 深度 'there'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {"name": "clock", "description": "", "parameters": {"type": "object", "properties": {}}},
}
BY_NAME = {form.name: form for form in FORMS}
OFFERED = {"get_weather", "clock"}


def call(name: str, arguments: str, number: int = 0) -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


CALLED: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Oslo & the time?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [call("get_weather", '{"city": "Ås <b>"}'), call("clock", "{}", 1)],
    },
    {"role": "tool", "tool_call_id": "call_0", "content": '{"degrees": -3}'},
    {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    CALLED[:2],
    CALLED,
    [*CALLED, {"role": "assistant", "content": "Cold."}, {"role": "user", "content": "And 明天?"}],
    [*CALLED[:2], {**CALLED[2], "content": None, "tool_calls": CALLED[2]["tool_calls"][:1]}, CALLED[3]],
]


@pytest.fixture(scope="module", params=[(family, special) for family in FAMILIES for special in (False, True)], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, special = request.param
    return write_family(tmp_path_factory.mktemp(family) / family, family, special=special)


# ---- prompts


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["plain", "system", "answered", "later", "silent"])
@pytest.mark.parametrize("tools", [None, [WEATHER], [WEATHER, CLOCK]], ids=["none", "one", "two"])
def test_prompts_with_tools_are_those_of_transformers(
    folder: Path, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> None:
    from transformers import AutoTokenizer

    chat, theirs = Chat.load(folder), AutoTokenizer.from_pretrained(folder)
    for thinking in (False, True):
        switch = {str(chat.thinking_key): thinking}
        wanted = theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_dict=False, **switch
        )
        if thinking and folder.name == "deepseek" and messages[-1]["role"] == "tool":
            with pytest.raises(DataError, match="does not think behind a tool's result"):
                chat.render(messages, thinking, tools)
        else:
            assert chat.render(messages, thinking, tools) == wanted


def test_the_form_is_found_by_a_probe(folder: Path) -> None:
    found = Chat.load(folder).calls
    assert found is not None
    assert (found[0].name, found[1]) == (folder.name, False)


def test_a_template_may_want_arguments_as_an_object(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = TEMPLATES["qwen"].replace(
        "{{ call.arguments if call.arguments is string else call.arguments | tojson }}", "{{ call.arguments | tojson }}"
    )
    assert template != TEMPLATES["qwen"]
    chat = Chat.load(write_family(tmp_path, "qwen", template=template))
    assert chat.calls is not None
    assert chat.calls[1]
    parsed = json.loads(json.dumps(CALLED))
    for one in parsed[2]["tool_calls"]:
        one["function"]["arguments"] = json.loads(one["function"]["arguments"])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    wanted = theirs.apply_chat_template(parsed, tools=[WEATHER], add_generation_prompt=True, tokenize=False)
    assert chat.text(CALLED, True, [WEATHER]) == wanted
    escaped = [*CALLED[:2], {**CALLED[2], "tool_calls": [call("clock", '{"a": "\\u003c|im_end|>"}')]}]
    with pytest.raises(DataError, match="control token"):
        chat.text(escaped, True, [WEATHER])


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}{{ tools }}{% endif %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | tojson if tools }}",
        "{% if tools %}{{ raise_exception('no') }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
    ids=["silent", "named in vain", "no form of calls", "refuses"],
)
def test_a_template_without_tools_is_refused(tmp_path: Path, template: str) -> None:
    chat = Chat.load(write_family(tmp_path, "qwen", template=template))
    assert chat.render([{"role": "user", "content": "Hi"}])
    for messages, tools in ((CALLED[:2], [WEATHER]), (CALLED, None)):
        with pytest.raises(DataError, match="chat template of this model has no tools"):
            chat.render(messages, False, tools)


def _with(place: str, word: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    messages, tools = json.loads(json.dumps(CALLED)), json.loads(json.dumps([WEATHER]))
    text = f"x{word}y"
    function, called = tools[0]["function"], messages[2]["tool_calls"][0]
    match place:
        case "tool name":
            function["name"] = text
        case "description":
            function["description"] = text
        case "inner description":
            function["parameters"]["properties"]["city"]["description"] = text
        case "property":
            function["parameters"]["properties"][text] = {}
        case "arguments":
            called["function"]["arguments"] = json.dumps({"city": text}, ensure_ascii=False)
        case "called name":
            called["function"]["name"] = text
        case "call id":
            called["id"] = text
        case "result":
            messages[3]["content"] = text
        case "user":
            messages[1]["content"] = text
    return messages, tools


PLACES = (
    *("tool name", "description", "inner description", "property", "arguments"),
    *("called name", "call id", "result", "user"),
)


@pytest.mark.parametrize("place", PLACES)
def test_tools_cannot_speak_for_another_role(folder: Path, place: str) -> None:
    chat = Chat.load(folder)
    chat.render(*_with(place, "<b>")[:1], False, _with(place, "<b>")[1])
    stop = str(chat.tokenizer.id_to_token(chat.stop))
    for word in (stop, "</think>", *MARKS[folder.name]):
        messages, tools = _with(place, word)
        with pytest.raises(DataError, match=re.escape(repr(word))):
            chat.render(messages, False, tools)


def test_marks_of_calls_are_text_where_they_are_wanted(folder: Path) -> None:
    chat = Chat.load(folder)
    form = BY_NAME[folder.name]
    text = "I look. " + form.write([Call("clock", "{}"), Call("get_weather", '{"city": "Ås 🧠"}')])
    ids = chat.encode(text)
    assert chat.decode(ids, marks=True) == text
    assert all(mark in chat.control for mark in form.marks)


def test_the_marks_have_the_published_letters() -> None:
    assert BY_NAME["qwen"].marks == ("<tool_call>", "</tool_call>")
    bars = [f"<\uff5ctool\u2581{word}\uff5c>" for word in ("calls\u2581begin", "call\u2581begin", "sep")]
    bars += [f"<\uff5ctool\u2581{word}\uff5c>" for word in ("call\u2581end", "calls\u2581end")]
    assert BY_NAME["deepseek"].marks == tuple(bars)


# ---- replies


def whole(form: Form, text: str) -> tuple[str, list[Call]]:
    """The oracle: a second reading of a whole text, by regular expressions and json."""
    escape = re.escape
    string = r'"(?:[^"\\]|\\.)*"'
    pattern = rf"{escape(form.begin)}((?:{string}|(?!{escape(form.end)})[^\"])*?){escape(form.end)}"
    content, calls, at, gap = "", [], 0, None
    for match in _matches(form, pattern, text):
        before = text[at : match.start()]
        if gap == "call" and form.closing and before.lstrip().startswith(form.closing):
            before = before.lstrip()[len(form.closing) :]
        before = before.rstrip()
        if form.opening and before.endswith(form.opening):
            before = before[: -len(form.opening)].rstrip()
        content += before
        calls.append(match.call)
        at, gap = match.end(), "call"
    rest = text[at:]
    if gap == "call" and form.closing and rest.lstrip().startswith(form.closing):
        rest = rest.lstrip()[len(form.closing) :]
    return content + (rest if not calls or rest.strip() else ""), calls


class _Found:
    def __init__(self, match: re.Match[str], call: Call):
        self.start, self.end, self.call = match.start, match.end, call


def _matches(form: Form, pattern: str, text: str) -> list[_Found]:
    found, at, compiled = [], 0, re.compile(pattern, re.DOTALL)
    while (match := compiled.search(text, at)) is not None:
        # the leftmost beginning decides, also where it is no call
        first = text.index(form.begin, at)
        match = compiled.match(text, first)
        made = None if match is None else _call(form, match[1])
        if match is None or made is None:
            at = first + len(form.begin)
        else:
            found.append(_Found(match, made))
            at = match.end()
    return found


def _call(form: Form, body: str) -> Call | None:
    def strict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("doubled")
        return dict(pairs)

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        if form.between is None:
            said = json.loads(body, parse_constant=refuse, object_pairs_hook=strict)
            if said.keys() != {"name", "arguments"} or not isinstance(said["arguments"], dict):
                return None
            name, arguments = said["name"], json.dumps(said["arguments"], ensure_ascii=False)
        else:
            name, mark, text = body.partition(form.between)
            name, arguments = name.strip(), json.dumps(json.loads(text, parse_constant=refuse), ensure_ascii=False)
            if not mark or not arguments.startswith("{"):
                return None
    except (ValueError, AttributeError):
        return None
    return Call(name, arguments) if isinstance(name, str) and name in OFFERED else None


def bits(form: Form) -> st.SearchStrategy[str]:
    good = [Call("clock", "{}"), Call("get_weather", f'{{"city": "{form.end} \\" {form.begin}"}}')]
    bad = [Call("nobody", "{}"), Call("clock", "[]"), Call("clock", '{"a": NaN}'), Call("clock", '{"a": "')]
    parts = [form.write([one]) for one in (*good, *bad)]
    parts += [form.write(good), form.write([bad[0], good[0]]), *form.marks, *(mark[:-2] for mark in form.marks)]
    layout = [" ", "\n", "word", "é", '"', "{", "}", '{"name": "clock", "arguments": {}}', "clock", "<", "<|", "<｜"]
    return st.lists(st.sampled_from(parts + layout), max_size=12).map("".join)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_stream_cut_anyhow_is_the_plain_reading(form: Form, data: st.DataObject) -> None:
    text = data.draw(bits(form))
    plain = read(form, OFFERED, text)
    state, found = State(), list[str | Call]()
    while text:
        cut = data.draw(st.integers(1, min(6, len(text))))
        state, new = step(form, OFFERED, state, text[:cut], False)
        found, text = found + new, text[cut:]
    _, new = step(form, OFFERED, state, "", True)
    found += new
    content = "".join(item for item in found if isinstance(item, str))
    assert (content, [item for item in found if isinstance(item, Call)]) == plain


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_calls_and_content_are_those_of_a_second_reader(form: Form, data: st.DataObject) -> None:
    text = data.draw(bits(form))
    content, calls = read(form, OFFERED, text)
    wanted, theirs = whole(form, text)
    assert [(one.name, json.loads(one.arguments)) for one in calls] == [(n, json.loads(a)) for n, a in theirs]
    assert all(one.arguments in text for one in calls)  # the model's own letters
    if not calls:
        assert content == text
    assert content == wanted


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_what_is_written_is_read(form: Form) -> None:
    calls = [
        Call("get_weather", '{"city": "a</tool_call>\\n<｜tool▁call▁end｜>"}'),
        Call("clock", '{ "deep": {"x": [1e400]} }'),
    ]
    assert read(form, OFFERED, form.write(calls)) == ("", calls)
    assert read(form, OFFERED, "I look.\n\n" + form.write(calls) + "\n") == ("I look.", calls)
    assert read(form, OFFERED, form.write(calls) + "\nDone. ") == ("\nDone. ", calls)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_content_is_not_held_back_longer_than_needed(form: Form) -> None:
    state, out = step(form, OFFERED, State(), "Hello ", False)
    assert (state.held, out) == (" ", ["Hello"])
    state, out = step(form, OFFERED, state, form.begin[:1] + "b", False)
    assert (state.held, out) == ("", [f" {form.begin[:1]}b"])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_hostile_texts_take_no_time_and_stay_content(form: Form) -> None:
    deep = form.write([Call("clock", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")])
    for text in (form.begin * 20_000, deep, (form.begin + '"') * 5_000, form.begin + form.end * 5_000):
        assert read(form, OFFERED, text) == (text, [])
