"""docs/format.md against the code: its Python is executed, its tables are read, and the tests it names exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ottava.checkpoint import safetensors
from ottava.checkpoint.digest import values_digest
from ottava.fp8 import spec
from ottava.fp8.codec import dequantise, quantise

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "format.md").read_text()
UP, EMBED = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
EXPERT, EXPERT_SCALE = "layers.0.ffn.experts.3.w1.weight", "layers.0.ffn.experts.3.w1.scale"
ATTN, ATTN_SCALE = "layers.0.attn.wq_a.weight", "layers.0.attn.wq_a.scale"


def page_digest() -> Any:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(code, "docs/format.md", "exec"), found)
    return found["digest"]


def write(folder: Path, tensors: dict[str, Tensor], e8m0: tuple[str, ...] = (), shard_bytes: int = 1 << 30) -> Path:
    folder.mkdir()
    plan = dict(safetensors.plan_of(tensors))
    plan |= {name: ("F8_E8M0", tuple(tensors[name].shape)) for name in e8m0}
    safetensors.write_folder(folder, plan, tensors.items(), shard_bytes=shard_bytes)
    return folder


def fp8(block: tuple[int, int] = (128, 128)) -> tuple[Tensor, Tensor]:
    codes = torch.randint(0, 0x7F, (300, 200), dtype=torch.uint8) | torch.randint(0, 2, (300, 200)).byte() << 7
    scales = torch.randint(80, 160, spec.grid(300, 200, block), dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn), scales


def plain() -> dict[str, Tensor]:
    mixed = torch.randn(300, 3).bfloat16().float()
    mixed[130, 0] = 1 + 2**-20  # the second band needs F32
    wide = mixed.double()
    wide[299, 2] = 1 + 2**-40  # and the third F64
    return {
        EMBED: torch.randn(257, 5).bfloat16(),
        "a.f32": mixed,
        "a.f64": wide,
        "b.f16": torch.randn(3, 4, 5).half(),
        "b.vector": torch.tensor([0.0, -0.0, 1.5]),
        "c.number": torch.tensor(2.5),
        "c.empty": torch.empty(0, 4),
        "c.empty-rows": torch.empty(4, 0),
        "d.tid2eid": torch.arange(700).reshape(350, 2),
        "d.ints": torch.arange(9, dtype=torch.int32),
        "d.bytes": torch.arange(7, dtype=torch.uint8),
        "d.flags": torch.tensor([True, False]),
        "é": torch.ones(1),
    }


def case(kind: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors of a folder in one of the forms that are read, and which of them are F8_E8M0."""
    if kind == "plain":
        return plain(), ()
    codes, scales = fp8({"mxfp8": (1, 32), "v4.1": (32, 32)}.get(kind, (128, 128)))
    if kind == "mxfp8":
        return {UP: codes, UP + "_scale": scales}, ()
    if kind in ("v4", "v4.1"):
        packed, groups = torch.randint(-128, 128, (130, 48), dtype=torch.int8), torch.randint(0, 250, (130, 3)).byte()
        return {ATTN: codes, ATTN_SCALE: scales, EXPERT: packed, EXPERT_SCALE: groups}, (ATTN_SCALE, EXPERT_SCALE)
    powers = torch.ldexp(torch.ones(3, 2), scales.int() - 127)
    stored = {"e8m0": scales, "deepseek": powers, "v3": powers * 1.32288}[kind]
    return {UP: codes, UP + "_scale_inv": stored}, (UP + "_scale_inv",) if kind == "e8m0" else ()


@pytest.mark.parametrize("kind", ["e8m0", "deepseek", "v3", "mxfp8", "v4", "v4.1", "plain"])
def test_the_lines_of_the_page_compute_the_digest(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(len(kind))
    tensors, e8m0 = case(kind)
    digest = page_digest()
    folder = write(tmp_path / "one", tensors, e8m0)
    assert digest(folder) == values_digest(folder)
    sharded = write(tmp_path / "shards", tensors, e8m0, shard_bytes=50_000)
    assert digest(sharded) == values_digest(sharded) == digest(folder)
    for name, tensor in tensors.items():
        if tensor.numel():
            changed = tensor.clone()
            changed.view(-1).view(torch.uint8)[-1] ^= 1
            other = write(tmp_path / f"{len(list(tmp_path.iterdir()))}", {**tensors, name: changed}, e8m0)
            if tensor.dtype != torch.bool:
                assert digest(other) == values_digest(other) != digest(folder), name


def test_the_page_says_that_layouts_have_one_digest(tmp_path: Path) -> None:
    torch.manual_seed(9)
    codes, scales = quantise(torch.randn(300, 200))
    across = scales.repeat_interleave(4, 1)[:, :7].repeat_interleave(128, 0)[:300]
    spellings = [
        {UP: dequantise(codes, scales, torch.bfloat16)},
        {UP: dequantise(codes, scales)},
        {UP: codes, UP + "_scale_inv": torch.ldexp(torch.ones(3, 2), scales.int() - 127)},
        {UP: codes, UP + "_scale": across},
    ]
    folders = [write(tmp_path / str(number), tensors) for number, tensors in enumerate(spellings)]
    assert len({page_digest()(folder) for folder in folders} | {values_digest(folder) for folder in folders}) == 1


def test_the_windows_of_the_page_are_those_of_the_specification() -> None:
    tables = (spec.EXACT, spec.EXACT_FLUSHED, spec.EXACT_FP4, spec.EXACT_FP4_FLUSHED)
    for label, dtype in (("BF16", "BF16"), ("FP16", "F16"), ("FP32", "F32")):
        spans = " | ".join("{} to {}".format(*table[dtype]) for table in tables)
        assert f"| {label} | {spans} |" in PAGE
    assert f"**{spec.BYTE_MIN} to {spec.BYTE_MAX}**" in PAGE
    assert f"**{spec.LIMIT:.0f}**" in PAGE
    assert f"**{spec.FP4_SPAN}**" in PAGE


def test_the_largest_code_of_a_block_is_240_or_more() -> None:
    """Over every normal BF16 maximum whose scale is not held: code 240 (0x77) to 448 (0x7E)."""
    amax = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).reshape(-1, 1, 1)
    codes, scales = quantise(amax)
    free = (scales > spec.BYTE_MIN) & (amax > 2.0**-100) & (amax.double() <= 464 * 2.0**119)
    assert int(free.sum()) > 25_000
    assert set(codes.view(torch.uint8)[free].tolist()) == set(range(0x77, 0x7F))


def test_dividing_by_448_is_no_fixpoint() -> None:
    def by_448(amax: float) -> tuple[float, float]:
        scale = 2.0 ** torch.tensor(amax / 448).log2().ceil().item()
        return scale, float(torch.tensor(amax / scale).to(torch.float8_e4m3fn).float()) * scale

    assert by_448(450.0) == (2.0, 448.0)
    assert by_448(448.0) == (1.0, 448.0)


def test_a_lowered_maximum_is_spelled_anew_with_the_same_values() -> None:
    codes = torch.tensor([[224.0, 3.0, -0.25]]).to(torch.float8_e4m3fn)  # as a rounding may leave it at scale 1
    value = dequantise(codes, torch.tensor([[127]], dtype=torch.uint8))
    again, scales = quantise(value)
    assert scales.item() == 126
    assert torch.equal(dequantise(again, scales), value)


def test_the_tests_that_the_page_names_exist() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").glob("**/*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 20
    assert [name for name in sorted(named) if f"def {name}(" not in sources] == []
