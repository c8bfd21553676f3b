"""Prompts are the ids that every other reader of the folder sees; text comes back whole, piece by piece."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ottava.errors import CheckpointError, DataError
from ottava.models.chat import TINY_SPECIAL, Chat, Detokeniser, write_tiny
from ottava.tasks import chains

QUESTION = "7 a +5 b *3 ="
PAD, END, USER, ASSISTANT, THINK, ETHINK = range(6)
QWEN = """{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant\n
{%- if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"""
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, chains.vocabulary())
    return folder


@cache
def byte_level() -> Tokenizer:
    """A byte-level BPE tokenizer whose merges cut through characters of several bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, für Ökonomie, 深度求索 思考 🧠🧠🐙 ночь"] * 4, trainer)
    return tokenizer


def byte_folder(folder: Path, template: str = QWEN, **generation: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    byte_level().save(str(folder / "tokenizer.json"))
    words = {
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    (folder / "chat_template.jinja").write_text(template)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


# ---- the tiny model's folder


def test_tiny_prompts_are_the_ids_of_the_contract(tiny: Path) -> None:
    chat = Chat.load(tiny)
    words = {word: i for i, word in enumerate([*TINY_SPECIAL, *chains.vocabulary()])}
    question = [words[word] for word in QUESTION.split()]
    assert chat.render(user(QUESTION), True) == [USER, *question, ASSISTANT, THINK]
    assert chat.render(user(QUESTION), False) == [USER, *question, ASSISTANT, ETHINK]
    assert chat.render(user(QUESTION)) == chat.render(user(QUESTION), False)
    assert (chat.thinking_key, chat.stop_ids, chat.think_end, chat.think_start) == ("thinking", (END,), ETHINK, THINK)
    trace = "7 a +5 2 b *3 6"
    assert chat.reply("6", trace) == [*(words[w] for w in trace.split()), ETHINK, words["6"], END]
    assert chat.reply("6") == [words["6"], END]


def test_earlier_reasoning_and_system_messages_stay_out(tiny: Path) -> None:
    chat = Chat.load(tiny)
    turns = [
        {"role": "system", "content": "Be helpful, please."},
        *user("1 a +1 ="),
        {"role": "assistant", "content": "1 a +1 2</think>2"},
        *user("3 a +1 ="),
    ]
    expected = "<|User|>1 a +1 =<|Assistant|></think>2<|end|><|User|>3 a +1 =<|Assistant|><think>"
    assert chat.text(turns, True) == expected


def test_transformers_reads_the_same_ids(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    turns = [*user(QUESTION), {"role": "assistant", "content": "9 </think> 6"}, *user("  3   a +1\n= ")]
    plain = [{"role": "system", "content": "hé 思考"}, *user("der Kater 🐙 sat"), {"role": "assistant", "content": "x"}]
    cases = [(tiny, user(QUESTION)), (tiny, turns), (byte_folder(tmp_path), plain)]
    for folder, messages in cases:
        chat, theirs = Chat.load(folder), AutoTokenizer.from_pretrained(folder)
        for thinking in (True, False):
            switch = {str(chat.thinking_key): thinking}
            ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **switch)
            assert chat.render(messages, thinking) == ids
        reply = chat.encode("3 a") if folder == tiny else chat.encode("思考 the 🧠")
        assert chat.decode(reply) == theirs.decode(reply)


def test_many_prompts_are_the_single_ones(tiny: Path) -> None:
    chat = Chat.load(tiny)
    questions = [f"{i} a +{j} =" for i in range(10) for j in range(1, 10)]
    for thinking in (True, False):
        assert chat.prompts(questions, thinking) == [chat.render(user(q), thinking) for q in questions]


@given(st.lists(st.sampled_from(chains.vocabulary())), st.lists(st.sampled_from(chains.vocabulary())))
def test_split_undoes_reply(reasoning: list[str], content: list[str]) -> None:
    chat = _tiny()
    trace, answer = " ".join(reasoning), " ".join(content)
    assert chat.split(chat.reply(answer, trace)) == (trace, answer)
    assert chat.split(chat.reply(answer)) == (None, answer)
    assert chat.split(chat.encode(trace), True) == (trace, "")
    assert chat.split(chat.encode(trace), False) == (None, trace)


@cache
def _tiny() -> Chat:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_tiny(folder, chains.vocabulary())
        return Chat.load(folder)


@pytest.mark.parametrize("question", ["7 a +5 cat =", "cat", "7 a+5 cat", "<cat>"])
def test_unknown_words_are_named(tiny: Path, question: str) -> None:
    chat = Chat.load(tiny)
    word = next(w for w in question.split() if w not in chains.vocabulary())
    for ask in (lambda: chat.render(user(question)), lambda: chat.prompts([QUESTION, question], True)):
        with pytest.raises(DataError) as caught:
            ask()
        assert repr(word) in caught.value.what
        assert "*3, *7" in str(caught.value.fix)


@pytest.mark.parametrize("word", [*TINY_SPECIAL])
def test_messages_cannot_speak_for_another_role(tiny: Path, word: str) -> None:
    chat = Chat.load(tiny)
    for role in ("user", "system"):
        with pytest.raises(DataError, match="control token"):
            chat.render([{"role": role, "content": f"7 {word} 6"}])
    if word not in ("<think>", "</think>"):
        with pytest.raises(DataError, match="control token"):
            chat.render([*user(QUESTION), {"role": "assistant", "content": f"6{word}"}])


@pytest.mark.parametrize("vocabulary", [["1", "1"], ["a b"], [""], ["<think>"], [" 1"]])
def test_a_vocabulary_whose_words_cannot_be_told_apart_is_refused(tmp_path: Path, vocabulary: list[str]) -> None:
    with pytest.raises(DataError):
        write_tiny(tmp_path / "new", vocabulary)
    assert not (tmp_path / "new").exists()


# ---- any folder


@pytest.mark.parametrize(
    ("template", "key"),
    [
        (QWEN, "enable_thinking"),
        (PLAIN, None),
        (
            "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ '<think>' if thinking }}",
            "thinking",
        ),
        ("{% for m in messages %}{% set thinking = m.content %}{{ thinking }}{% endfor %}", None),  # a local name
        ("{% for m in messages %}{{ m.thinking }}{% endfor %}x", None),  # an attribute
        ("{% set unused = enable_thinking %}x", None),  # read, but without effect
    ],
)
def test_the_thinking_key_is_the_variable_that_changes_the_prompt(
    tmp_path: Path, template: str, key: str | None
) -> None:
    chat = Chat.load(byte_folder(tmp_path, template))
    assert chat.thinking_key == key
    if key is None:
        with pytest.raises(DataError, match="no thinking switch"):
            chat.render(user("x"), True)
    else:
        assert chat.text(user("x"), True) != chat.text(user("x"), False)


def test_stop_ids_are_an_int_a_list_or_the_end_token(tmp_path: Path) -> None:
    assert Chat.load(byte_folder(tmp_path / "a", eos_token_id=3)).stop_ids == (3,)
    assert Chat.load(byte_folder(tmp_path / "b", eos_token_id=[1, 7])).stop_ids == (1, 7)
    assert Chat.load(byte_folder(tmp_path / "c", bos_token_id=0)).stop_ids == (1,)
    folder = byte_folder(tmp_path / "d")
    (folder / "config.json").write_text('{"eos_token_id": [2]}')
    assert Chat.load(folder).stop_ids == (2,)
    (folder / "config.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="ends a reply"):
        Chat.load(folder)


def test_a_template_inside_the_tokenizer_config_is_found(tmp_path: Path) -> None:
    folder = byte_folder(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        Chat.load(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": PLAIN}))
    assert Chat.load(folder).text(user("x")).endswith("<|im_start|>assistant")


def test_broken_folders_say_where(tmp_path: Path) -> None:
    folder = byte_folder(tmp_path, "one\n{% if %}")
    with pytest.raises(CheckpointError) as caught:
        Chat.load(folder)
    assert str(caught.value.where).endswith("chat_template.jinja:2")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer cannot be read"):
        Chat.load(folder)
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Chat.load(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{{ messages[0]['x']['y'] }}",
        "{{ 1 / 0 }}",
    ],
)
def test_templates_run_in_a_sandbox_and_their_failures_are_data_errors(tmp_path: Path, template: str) -> None:
    with pytest.raises(DataError, match="chat template"):
        Chat.load(byte_folder(tmp_path, template)).render(user("x"))


# ---- text as it arrives


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_streamed_text_is_never_broken(text: str) -> None:
    chat = _byte_chat()
    assume(not any(word in text for word in chat.control))  # those become control tokens, which have no text
    ids, reader = chat.encode(text), Detokeniser(chat)
    pieces = [reader.add(i) for i in ids]
    assert "".join(pieces) + reader.end() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 319), max_size=40))
def test_streamed_pieces_join_to_the_text_of_any_ids(ids: list[int]) -> None:
    chat = _byte_chat()
    reader = Detokeniser(chat)
    assert "".join(reader.add(i) for i in ids) + reader.end() == chat.decode(ids)


@given(st.lists(st.integers(0, len(chains.vocabulary()) + 5), max_size=20))
def test_streamed_words_keep_their_spaces(ids: list[int]) -> None:
    reader = Detokeniser(_tiny())
    assert "".join(reader.add(i) for i in ids) + reader.end() == _tiny().decode(ids)


def test_text_comes_as_soon_as_it_is_whole() -> None:
    chat = _byte_chat()
    reader = Detokeniser(chat)
    shown = ""
    for number, i in enumerate(chat.encode("a cat, 思 on"), 1):
        shown += reader.add(i)
        whole = chat.decode(chat.encode("a cat, 思 on")[:number])
        assert shown == (whole if not whole.endswith("\ufffd") else shown)


@cache
def _byte_chat() -> Chat:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return Chat.load(byte_folder(Path(folder)))
