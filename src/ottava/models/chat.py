"""The one place where conversations become token ids and back, with the thinking switch.

A prompt that differs by one token between training and serving spoils a model without an error, and
a switch sent under the wrong name is ignored in silence: the answer then lands in `reasoning` and
`content` is null. So the trainer, the evaluation and the gateway all render through this class, with
the template that lies beside the weights and the one key that this template reads.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import jinja2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ottava.errors import CheckpointError, DataError, check_folder, from_os_error
from ottava.models.template import PROBE, calls_of, compile_template, render, source_of
from ottava.models.tools import Form

THINK_START, THINK_END = "<think>", "</think>"
NO_TOOLS = "the chat template of this model has no tools, or writes their calls in a form that is not known"
TINY_SPECIAL = ("<|pad|>", "<|end|>", "<|User|>", "<|Assistant|>", THINK_START, THINK_END)
TINY_TEMPLATE = """\
{#- Turns of the tiny model. `thinking` is its only switch; a system message is left out: it knows no such words. -#}
{%- if thinking is not defined %}{% set thinking = false %}{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
<|User|>{{ message.content }}
{%- elif message.role == 'assistant' -%}
<|Assistant|></think>{{ (message.content or '').split('</think>')[-1] }}<|end|>
{%- elif message.role != 'system' -%}
{{ raise_exception('this model knows no ' ~ message.role ~ ' messages') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|Assistant|>{{ '<think>' if thinking else '</think>' }}
{%- endif -%}
"""

Message = Mapping[str, Any]

Cut = Literal["words", "characters", "pairs"]
"""How a tiny tokenizer cuts its task's text. words: a word is a token, and the space between two is none. characters:
every character is one, the space too. pairs: a word with the space before it, and a letter with the word behind it."""


@dataclass(frozen=True)
class Chat:
    """A model folder's tokenizer and template.

    thinking_key: the template variable that switches thinking, None where it has none.
    stop_ids: ids that end a reply, the usual one first. think_end: the id of </think> or None.
    """

    tokenizer: Tokenizer
    template: jinja2.Template
    words: Mapping[str, str]  # the special tokens under the names that templates use: bos_token, eos_token, ...
    thinking_key: str | None
    stop_ids: tuple[int, ...]
    think_start: int | None
    think_end: int | None
    control: Mapping[str, int]  # texts that the tokenizer turns into control tokens wherever they stand, and their ids

    @classmethod
    def load(cls, folder: Path | str) -> Chat:
        """Read tokenizer.json, the template and the stop ids of a Hugging Face folder. Raises CheckpointError."""
        folder = Path(folder)
        config = _json(folder / "tokenizer_config.json", {})
        tokenizer = read_tokenizer(folder / "tokenizer.json")
        words = _special_words(config | _json(folder / "special_tokens_map.json", {}))
        source, where = source_of(folder, config)
        template, key = compile_template(source, words, where)
        added = tokenizer.get_added_tokens_decoder().items()
        control = {t.content: i for i, t in added if t.special or _is_mark(t.content, source)}
        return cls(
            tokenizer,
            template,
            words,
            key,
            _stop_ids(folder, tokenizer, words),
            tokenizer.token_to_id(THINK_START),
            tokenizer.token_to_id(THINK_END),
            control,
        )

    @property
    def stop(self) -> int:
        """The id that usually ends a reply."""
        return self.stop_ids[0]

    @property
    def thinks(self) -> bool:
        """Whether it can be asked with thinking on, and its reply be parted."""
        return self.thinking_key is not None and self.think_end is not None

    @functools.cached_property
    def opened(self) -> bool:
        """Whether a prompt for thinking ends in <think>; where it does not, a reply begins with it."""
        asked = {**self.words, self.thinking_key: True} if self.thinking_key else dict(self.words)
        return render(self.template, PROBE, asked).rstrip().endswith(THINK_START)

    @functools.cached_property
    def first(self) -> int | None:
        """The id that every prompt begins with, as far as an empty one tells; None where it tells nothing."""
        try:
            return next(iter(self.render([{"role": "user", "content": ""}])), None)
        except DataError:
            return None

    @functools.cached_property
    def calls(self) -> tuple[Form, bool] | None:
        """How the template writes calls of tools, and how it wants their arguments: see `calls_of`."""
        return calls_of(self.template, self.words)

    @functools.cached_property
    def constrained(self) -> Any:
        """The vocabulary for constrained decoding: see `constrain.vocabulary`, also for what it raises."""
        from ottava.models.constrain import vocabulary

        return vocabulary(self)

    @functools.cached_property
    def pieces(self) -> list[bytes] | None:
        """What each id adds to a text, in bytes; None where that depends on the ids around it."""
        from ottava.models.constrain import pieces

        return pieces(self.tokenizer)

    def text(
        self, messages: Sequence[Message], thinking: bool = False, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """The prompt as text, up to where the assistant begins.

        messages, tools: as OpenAI's API has them, the arguments of a call as JSON text.
        Raises DataError where the template refuses, where a message or a tool holds a control token (it could
        end the turn and speak for another role), where thinking is asked of a model without the switch, or in a
        conversation in which its template does not open it, and where tools are given to a template that ignores them.
        """
        if thinking and self.thinking_key is None:
            raise DataError("this model has no thinking switch", fix="ask without thinking")
        for number, message in enumerate(messages):
            self._refuse_control(message, f"messages[{number}]", message.get("role") == "assistant")
        called = any(message.get("role") == "tool" or message.get("tool_calls") for message in messages)
        if (tools or called) and self.calls is None:
            raise DataError(NO_TOOLS, fix="ask without tools, or put a template that reads `tools` beside the weights")
        self._refuse_control(tools or (), "tools", False)
        if called:
            messages = [self._with_calls(message, number) for number, message in enumerate(messages)]
        variables = {**self.words, "tools": list(tools) if tools else None}
        if self.thinking_key is None:
            return render(self.template, messages, variables)
        text = render(self.template, messages, {**variables, self.thinking_key: thinking})
        if thinking and called and text == render(self.template, messages, {**variables, self.thinking_key: False}):
            raise DataError("this model's template does not think behind a tool's result", fix="ask without thinking")
        return text

    def render(
        self, messages: Sequence[Message], thinking: bool = False, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of the prompt. Raises DataError as `text` does, also for a word that the vocabulary lacks."""
        return self.encode(self.text(messages, thinking, tools))

    def prompts(self, questions: Sequence[str], thinking: bool = False) -> list[list[int]]:
        """Token ids for many single questions at once: 20,000 short ones take about a second."""
        texts = [self.text([{"role": "user", "content": question}], thinking) for question in questions]
        try:
            return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception:
            for text in texts:
                self.encode(text)
            raise

    def reply(self, content: str, reasoning: str | None = None) -> list[int]:
        """The ids that a model should produce: reasoning, </think>, content, end; or content, end.

        Reasoning begins with <think> where the template leaves that to the model.
        """
        if reasoning is None:
            return [*self.encode(content), self.stop]
        if self.think_end is None:
            raise DataError("this model has no </think> token, so no reasoning can be written for it")
        opening = [] if self.opened or self.think_start is None else [self.think_start]
        return [*opening, *self.encode(reasoning), self.think_end, *self.encode(content), self.stop]

    def split(self, ids: Sequence[int], thinking: bool | None = None) -> tuple[str | None, str]:
        """(reasoning, content) of generated ids, parted at the first </think>.

        thinking True: without a </think> all is reasoning, as it was cut off. False: all is content.
        None: reasoning only where there is a </think>.
        """
        ids = list(ids)
        if thinking is False or self.think_end is None or (thinking is None and self.think_end not in ids):
            return None, self.decode(ids)
        end = ids.index(self.think_end) if self.think_end in ids else len(ids)
        return self.decode(ids[:end]), self.decode(ids[end + 1 :])

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added. Raises DataError naming a word that the vocabulary lacks."""
        return self.spans(text)[0]

    def spans(self, text: str, *, special: bool = False) -> tuple[list[int], list[int]]:
        """Token ids of a text, and the character of the text at which each begins. Raises DataError.

        special: with what the tokenizer puts around a text that no template has seen, as the id that begins a sequence.
        """
        try:
            found = self.tokenizer.encode(text, add_special_tokens=special)
            return list(found.ids), [start for start, _ in found.offsets]
        except Exception as error:  # the library raises bare Exception
            self._refuse_unknown(text, error)

    def decode(self, ids: Sequence[int], marks: bool = False) -> str:
        """The text of ids; control tokens are left out. marks: but those that mark calls of tools are not."""
        shown = self._marks if marks else {}
        text, rest = "", list[int]()
        for i in ids:
            if i in shown:
                text, rest = text + self._plain(rest) + shown[i], []
            else:
                rest.append(i)
        return text + self._plain(rest)

    def _plain(self, ids: Sequence[int]) -> str:
        silent = (self.think_start, self.think_end)
        return str(self.tokenizer.decode([i for i in ids if i not in silent], skip_special_tokens=True))

    @functools.cached_property
    def _marks(self) -> dict[int, str]:
        """Special tokens that mark calls of tools."""
        marks = self.calls[0].marks if self.calls is not None else ()
        added = self.tokenizer.get_added_tokens_decoder()
        return {i: token.content for i, token in added.items() if token.special and token.content in marks}

    def _with_calls(self, message: Message, number: int) -> Message:
        """A message with the arguments of its calls as the template wants them."""
        if not message.get("tool_calls") or self.calls is None or not self.calls[1]:
            return message
        where = f"messages[{number}].tool_calls"
        calls = []
        for call in message["tool_calls"]:
            try:
                arguments = json.loads(call["function"]["arguments"])
            except (ValueError, RecursionError):
                raise DataError("the arguments are not JSON", where=where) from None
            self._refuse_control(arguments, where, False)  # what was escaped in the text
            calls.append({**call, "function": {**call["function"], "arguments": arguments}})
        return {**message, "tool_calls": calls}

    def _refuse_control(self, held: Any, where: str, own: bool) -> None:
        """own: it is the text of an assistant's turn, which may have thought and called in it."""
        if isinstance(held, str):
            allowed = (THINK_START, THINK_END, *(self.calls[0].marks if self.calls else ())) if own else ()
            for word in self.control:
                if word in held and word not in allowed:
                    raise DataError(f"the control token {word!r} may not stand in a message", where=where)
        elif isinstance(held, Mapping):
            for key, value in held.items():
                self._refuse_control(key, where, False)
                self._refuse_control(value, where, own and key == "content")
        elif isinstance(held, (list, tuple)):
            for value in held:
                self._refuse_control(value, where, False)

    def _encodes(self, word: str) -> bool:
        try:
            self.tokenizer.encode(word, add_special_tokens=False)
        except Exception:  # the library raises bare Exception
            return False
        return True

    def _refuse_unknown(self, text: str, error: Exception) -> NoReturn:
        for word in self.control:
            text = text.replace(word, " ")
        known = self.tokenizer.get_vocab(with_added_tokens=False)
        for word in text.split():
            if word not in known and not self._encodes(word):
                some = ", ".join(sorted(set(known) - set(self.control))[:60])
                raise DataError(f"the model does not know the word {word!r}", fix=f"it knows: {some}") from None
        raise DataError(f"the text cannot be turned into tokens: {error}") from None


class Detokeniser:
    """Text from ids as they arrive, so that the pieces joined are the text of all of them.

    A character may be spread over several ids, so text that ends in the replacement character is held
    back; and the ids of the last piece stay as context, as some decoders join or strip at the beginning.
    """

    def __init__(self, chat: Chat, before: Sequence[int] = (), marks: bool = False):
        """before: ids behind which the text goes on, so that what joins the two is not lost. marks: see `decode`."""
        self._chat, self._context, self._new, self._marks = chat, list(before), list[int](), marks
        if self._chat.decode(self._context).endswith("\ufffd"):
            self._context = []  # a character that was cut off does not go on

    def add(self, token: int) -> str:
        """The text that this id completes, or nothing yet."""
        self._new.append(token)
        text = self._pending()
        if not text or text.endswith("\ufffd"):
            return ""
        self._context, self._new = self._new, []
        return text

    def end(self) -> str:
        """What is still held back: nothing, or a character that was cut off."""
        text, self._new = self._pending(), []
        return text

    def _pending(self) -> str:
        known = len(self._chat.decode(self._context, self._marks))
        return self._chat.decode([*self._context, *self._new], self._marks)[known:]


def write_tiny(folder: Path | str, vocabulary: Sequence[str], cut: Cut = "words") -> None:
    """Write the tiny chain model's tokenizer, template and generation settings into `folder`.

    vocabulary: the task's words; ids of tokens follow the six special ones. There is no unknown token, so text that
    cannot be written is refused. Raises DataError on words that cannot be told apart.
    """
    words = [*TINY_SPECIAL, *vocabulary]
    bad = [word for i, word in enumerate(words) if word.split() != [word] or word in words[:i]]
    if bad:
        raise DataError(f"{bad[0]!r} cannot be a word of the vocabulary: empty, with a space, or twice there")
    folder = Path(folder)
    tokenizer = _by_words(words) if cut == "words" else _by_characters(vocabulary, _merges(vocabulary, cut))
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in TINY_SPECIAL])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": TINY_SPECIAL[0],
        "eos_token": TINY_SPECIAL[1],
        "clean_up_tokenization_spaces": False,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
        (folder / "chat_template.jinja").write_text(TINY_TEMPLATE)
        settings = {"pad_token_id": 0, "eos_token_id": 1}
        (folder / "generation_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    except OSError as error:
        raise from_os_error(error, "writing the tokenizer") from error


def _by_words(words: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _by_characters(vocabulary: Sequence[str], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """Byte-pair encoding over the characters of the words and the space."""
    tokens = [*TINY_SPECIAL, " ", *sorted(set("".join(vocabulary))), *("".join(merge) for merge in merges)]
    numbers = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=list(merges), unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _merges(vocabulary: Sequence[str], cut: Cut) -> list[tuple[str, str]]:
    """What is put together, in this order: words, a space and the word behind it, a letter and the longer word."""
    if cut == "characters":
        return []
    words = [(word[:end], word[end]) for word in vocabulary for end in range(1, len(word))]
    spaced = [(" ", word) for word in vocabulary]
    letters = [word for word in vocabulary if word.isalpha()]
    longer = [word for word in vocabulary if len(word) > 1]
    paired = [(f" {letter}", f" {word}") for letter in letters for word in longer]
    return list(dict.fromkeys([*words, *spaced, *paired]))


def _json(path: Path, default: dict[str, Any]) -> dict[str, Any]:
    """A JSON object in a file; `default` where there is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=path) from None
    if not isinstance(data, dict):
        raise CheckpointError("expected a JSON object", where=path)
    return data


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json. Raises CheckpointError."""
    check_folder(path.parent)
    if not path.is_file():
        fix = "put it beside the weights: the model's publisher has it"
        raise CheckpointError("the model folder has no tokenizer.json", where=path, fix=fix)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        what, fix = f"the tokenizer cannot be read: {error}", "fetch it again: the model's publisher has it"
        raise CheckpointError(what, where=path, fix=fix) from None


def _special_words(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ...: each is a string, or an object with its `content`."""
    found = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


def _is_mark(token: str, source: str) -> bool:
    """Whether a token that is not called special is one that prompts are built of: it stands in the template."""
    bracketed = token[:1] in ("<", "[") and token[-1:] in (">", "]")
    return token in (THINK_START, THINK_END) or (bracketed and token in source)


def _stop_ids(folder: Path, tokenizer: Tokenizer, words: Mapping[str, str]) -> tuple[int, ...]:
    """From generation_config.json, else config.json (each an int or a list), else the tokenizer's eos_token."""
    for name in ("generation_config.json", "config.json"):
        ids = _json(folder / name, {}).get("eos_token_id")
        ids = [ids] if isinstance(ids, int) else ids
        if isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids):
            return tuple(ids)
    found = tokenizer.token_to_id(words.get("eos_token", ""))
    if found is None:
        raise CheckpointError("the model names no token that ends a reply", where=folder / "generation_config.json")
    return (found,)
