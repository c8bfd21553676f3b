"""A checkpoint's own chat template: compiled in a sandbox, and asked what it can do by having it render a probe.

A variable that a template mentions without effect is no switch, and a form of tool calls that cannot be read back is
of no use. So nothing is taken from a model's name or from the template's words: what a rendering shows is what holds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ottava.errors import CheckpointError, DataError
from ottava.models.tools import FORMS, Call, Form, read

THINKING_KEYS = ("thinking", "enable_thinking")
PROBE = [{"role": "user", "content": "1"}]
"""What a template is tried with."""
PROBE_CALL = Call("probe_tool", '{"probe_key": "probe value"}')
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": PROBE_CALL.name,
        "description": "probe",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}, "required": ["probe_key"]},
    },
}

Message = Mapping[str, Any]


def source_of(folder: Path, config: Mapping[str, Any]) -> tuple[str, Path]:
    """The template of a model folder, and the file it stands in. config: its tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8"), path
    inline = config.get("chat_template")
    if isinstance(inline, str):
        return inline, folder / "tokenizer_config.json"
    raise CheckpointError(
        "the model has no chat template", where=path, fix="a base model cannot chat; use its instruct form"
    )


def compile_template(source: str, words: Mapping[str, str], where: Path) -> tuple[jinja2.Template, str | None]:
    """The template and its thinking key: a variable that it reads and whose value changes the prompt."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=_raise, strftime_now=lambda form: time.strftime(form))
    environment.filters["tojson"] = _tojson
    try:
        template = environment.from_string(source)
        names = {node.name for node in environment.parse(source).find_all(jinja2.nodes.Name)}
    except jinja2.TemplateSyntaxError as error:
        where_line = f"{where}:{error.lineno}"
        raise CheckpointError(f"the chat template is not valid: {error.message}", where=where_line) from None
    for key in THINKING_KEYS:
        if key in names:
            on, off = (render(template, PROBE, {**words, key: value}) for value in (True, False))
            if on != off:
                return template, key
    return template, None


def calls_of(template: jinja2.Template, words: Mapping[str, str]) -> tuple[Form, bool] | None:
    """How a template writes calls of tools, and whether it wants their arguments as an object, not as JSON text.

    None where it does not read `tools`, or writes calls in none of the forms that can be read back.
    """
    try:
        if render(template, PROBE, words) == render(template, PROBE, {**words, "tools": [PROBE_TOOL]}):
            return None
    except DataError:
        return None
    arguments = json.loads(PROBE_CALL.arguments)
    for given in (PROBE_CALL.arguments, arguments):
        function = {"name": PROBE_CALL.name, "arguments": given}
        said = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
        try:
            text = render(template, [*PROBE, said], words)
        except DataError:
            continue
        for form in FORMS:
            _, found = read(form, {PROBE_CALL.name}, text)
            if [(call.name, json.loads(call.arguments)) for call in found] == [(PROBE_CALL.name, arguments)]:
                return form, given is arguments
    return None


def render(template: jinja2.Template, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
    """The prompt as text, up to where the assistant begins. Raises DataError where the template refuses."""
    try:
        return template.render(**{"tools": None, **variables}, messages=messages, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template refuses these messages: {error.message}") from None
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise DataError(f"the chat template cannot render these messages: {error}") from None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As templates expect it of Transformers: without the escapes that jinja2's own makes for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
