"""Small checkpoints of both families of tool calls, for tests: a tokenizer, a template, and where wanted a model.

The templates are our own. They have the structure of the published ones (which marks, where, what stands between),
not their words.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

QWEN = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}Tools:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
Write a call as <tool_call>
{"name": NAME, "arguments": OBJECT}
</tool_call><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' %}<|im_start|>assistant
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- set call = call.function if call.function else call %}
{%- if not loop.first or message.content %}{{ '\\n' }}{% endif %}<tool_call>
{"name": "{{ call.name }}", "arguments": {{ call.arguments if call.arguments is string else call.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}
{%- endif %}"""

DEEPSEEK = """\
{%- if not thinking is defined %}{% set thinking = false %}{% endif %}
{%- set ns = namespace(system='', after_tool=false) %}
{%- for message in messages %}{% if message.role == 'system' %}
{%- set ns.system = ns.system + message.content %}{% endif %}{% endfor %}
{{- bos_token }}{{ ns.system }}
{%- if tools %}

## Tools
{% for tool in tools %}
### {{ tool.function.name }}
{{ tool.function.description }} {{ tool.function.parameters | tojson }}
{% endfor %}{% endif %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{% set ns.after_tool = false %}{{ '<｜User｜>' + message['content'] }}
{%- elif message['role'] == 'assistant' %}
{%- if not ns.after_tool %}<｜Assistant｜></think>{% endif %}
{%- if message['tool_calls'] %}{{ message['content'] or '' }}<｜tool▁calls▁begin｜>
{%- for call in message['tool_calls'] -%}
{{ '<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>' + call['function']['arguments'] }}
{{- '<｜tool▁call▁end｜>' }}
{%- endfor %}<｜tool▁calls▁end｜><｜end▁of▁sentence｜>
{%- else %}{{ message['content'] + '<｜end▁of▁sentence｜>' }}{% set ns.after_tool = false %}{% endif %}
{%- elif message['role'] == 'tool' %}{% set ns.after_tool = true -%}
{{ '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.after_tool %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}
{%- endif %}"""

TEMPLATES = {"qwen": QWEN, "deepseek": DEEPSEEK}
SPECIAL = {
    "qwen": ["<|im_start|>", "<|im_end|>"],
    "deepseek": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
}
MARKS = {
    "qwen": ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"],
    "deepseek": [
        *(f"<｜tool▁{word}｜>" for word in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")),
        *(f"<｜tool▁output▁{word}｜>" for word in ("begin", "end")),
    ],
}
TEXT = [
    "the cat sat on the mat, für Ökonomie, 深度求索 思考 🧠🧠🐙 ночь",
    '{"name": "get_weather", "arguments": {"city": "Oslo"}}',
    '{"a": [1, 2, 3.5, true, false, null], "b": "x"}',
]


@cache
def tokenizer(family: str, special: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer with the family's tokens. special: whether those that mark calls are called so."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL[family],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXT * 4, trainer)
    for word in ("<think>", "</think>", *MARKS[family]):
        token = AddedToken(word, special=special and "think" not in word, normalized=False)
        (made.add_special_tokens if token.special else made.add_tokens)([token])
    return made


def write_family(folder: Path, family: str, *, special: bool = False, template: str | None = None) -> Path:
    """Write tokenizer, template and settings of a family into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer(family, special)
    made.save(str(folder / "tokenizer.json"))
    begin, end = SPECIAL[family][:2]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": begin}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATES[family] if template is None else template)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": made.token_to_id(end)}))
    return folder


@cache
def engine(family: str, special: bool = False) -> Any:
    """An engine of random weights, whose bits do not depend on company; it lives as long as the process."""
    import tempfile

    from ottava.engine.session import Engine
    from ottava.models.chat import Chat

    with tempfile.TemporaryDirectory() as folder:
        chat = Chat.load(write_family(Path(folder), family, special=special))
    return Engine(random_model(chat.tokenizer.get_vocab_size()), chat, slots=4, queue=64)


def random_model(words: int) -> Any:
    """Random weights that BF16 holds exactly."""
    import torch

    from ottava.models.build import from_config

    model = from_config(config(words))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_((torch.randn_like(parameter) * 2.0 / parameter.shape[-1] ** 0.5).bfloat16())
    return model


def write_model(folder: Path, family: str) -> Path:
    """A folder that a backend can load."""
    from ottava.checkpoint import safetensors
    from ottava.models.published import published, stored

    write_family(folder, family)
    words = tokenizer(family).get_vocab_size()
    model = random_model(words)
    (folder / "config.json").write_text(json.dumps({**config(words), "architectures": [type(model).__name__]}))
    safetensors.write(folder / "model.safetensors", [(name, stored(item)) for name, item in published(model).items()])
    return folder


def config(words: int) -> dict[str, Any]:
    """Of a small Llama. The model has more outputs than the vocabulary has tokens, as published ones have."""
    return {
        "model_type": "llama", "vocab_size": words + 12, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 4096, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 1,
    }  # fmt: skip
