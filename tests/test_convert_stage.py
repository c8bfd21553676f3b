"""The converter and its stage: labels that can be trusted, refusals that help, nothing half-written."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ottava import artifact
from ottava.artifact import Artifact, digest_of
from ottava.checkpoint.convert import convert
from ottava.checkpoint.digest import values_digest
from ottava.checkpoint.safetensors import INDEX, SINGLE, entries, load, plan_of, read, write, write_folder
from ottava.context import Context, Process
from ottava.errors import CheckpointError, FormatError, OttavaError, RecipeError
from ottava.fp8.codec import dequantise, project, quantise
from ottava.journal import Journal
from ottava.recipe import Fleet, Pool
from ottava.stages import convert as stage

LAYER = "model.layers.1."
FP8 = {
    **{LAYER + f"self_attn.{name}.weight": shape for name, shape in {
        "q_a_proj": (24, 64), "q_b_proj": (96, 24), "kv_a_proj_with_mqa": (40, 64), "kv_b_proj": (130, 32),
        "o_proj": (64, 160),
    }.items()},
    **{LAYER + f"mlp.experts.{i}.{name}.weight": (32, 64) for i in range(2) for name in ("gate_proj", "up_proj")},
    **{LAYER + f"mlp.experts.{i}.down_proj.weight": (64, 32) for i in range(2)},
    LAYER + "mlp.shared_experts.up_proj.weight": (32, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 300),
}  # fmt: skip
KEPT = {
    "model.embed_tokens.weight": (50, 64),
    "lm_head.weight": (50, 64),
    "model.norm.weight": (64,),
    LAYER + "input_layernorm.weight": (64,),
    LAYER + "mlp.gate.weight": (2, 64),
}
BIAS = LAYER + "mlp.gate.e_score_correction_bias"
UP = LAYER + "mlp.shared_experts.up_proj.weight"
CONFIG = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "dtype": "float32"}


def model(dtype: torch.dtype = torch.bfloat16, *, on_grid: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {name: (torch.randn(shape) / 8).to(dtype) for name, shape in {**FP8, **KEPT}.items()}
    if on_grid:
        for name, tensor in tensors.items():
            tensors[name] = (project(tensor.float()) if name in FP8 else tensor.bfloat16()).to(dtype)
    return tensors | {BIAS: torch.randn(2)}


def save(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] = CONFIG) -> Path:
    folder.mkdir(parents=True)
    write(folder / SINGLE, tensors.items())
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_text(f'"{name}"')
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


def run(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    return convert({"source": str(source), "out": str(out), **options})


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is written.


def test_a_bf16_model_is_rounded_to_the_nearest_codes(tmp_path: Path) -> None:
    tensors = model()
    report = run(save(tmp_path / "s", tensors), tmp_path / "out")
    out = {name: load(entry) for name, entry in entries(tmp_path / "out").items()}
    assert set(out) == {*tensors, *(name + "_scale_inv" for name in FP8)}
    signal = noise = 0.0
    for name in FP8:
        codes, scales = quantise(tensors[name])
        assert out[name].dtype == torch.float8_e4m3fn
        assert out[name + "_scale_inv"].dtype == torch.float8_e8m0fnu
        assert torch.equal(out[name].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(out[name + "_scale_inv"].view(torch.uint8), scales)
        value = tensors[name].double()
        signal += float((value**2).sum())
        noise += float(((dequantise(codes, scales).double() - value) ** 2).sum())
    for name in (*KEPT, BIAS):
        assert out[name].dtype == tensors[name].dtype
        assert torch.equal(out[name], tensors[name])
    assert (report["label"], report["on_grid"]) == ("rounded", False)
    assert (report["tensors"], report["quantised"], report["rounded"]) == (len(tensors), len(FP8), len(FP8))
    assert report["sqnr_db"] == pytest.approx(10 * math.log10(signal / noise), abs=1e-3)
    assert 29 < report["sqnr_db"] < 34
    assert report["digest"] == values_digest(tmp_path / "out")
    assert report["bytes"] == (tmp_path / "out" / SINGLE).stat().st_size


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    report = run(save(tmp_path / "s", model()), tmp_path / "out")
    assert names_in(tmp_path / "out") == sorted([
        "chat_template.jinja", "config.json", "conversion.json", "generation_config.json", SINGLE, "tokenizer.json",
        "tokenizer_config.json",
    ])  # fmt: skip
    assert json.loads((tmp_path / "out" / "conversion.json").read_text()) == report
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    assert (config["topk_method"], config["scoring_func"], config["dtype"]) == ("noaux_tc", "sigmoid", "bfloat16")
    assert names_in(tmp_path) == ["out", "s"]


def test_other_models_get_no_keys_of_deepseek(tmp_path: Path) -> None:
    source = save(tmp_path / "s", model(), {"model_type": "llama", "torch_dtype": "float32"})
    run(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(config) == {"model_type", "torch_dtype", "quantization_config"}
    assert config["torch_dtype"] == "bfloat16"


# The label.


def test_a_model_on_the_grid_keeps_its_bits(tmp_path: Path) -> None:
    source = save(tmp_path / "s", model(on_grid=True))
    report = run(source, tmp_path / "out")
    assert (report["label"], report["on_grid"], report["rounded"], report["sqnr_db"]) == ("on-grid", True, 0, None)
    assert report["digest"] == values_digest(source)


def test_float32_on_the_grid_is_on_the_grid(tmp_path: Path) -> None:
    tensors = model(on_grid=True)
    bf16 = run(save(tmp_path / "a", tensors), tmp_path / "a.out")
    f32 = run(save(tmp_path / "b", {name: tensor.float() for name, tensor in tensors.items()}), tmp_path / "b.out")
    assert bf16 == f32
    assert (tmp_path / "a.out" / SINGLE).read_bytes() == (tmp_path / "b.out" / SINGLE).read_bytes()


@pytest.mark.parametrize("name", [UP, "model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
def test_one_value_off_by_one_bit_is_rounded(name: str, tmp_path: Path) -> None:
    tensors = model(torch.float32, on_grid=True)
    tensors[name].view(torch.int32).view(-1)[-1] += 1
    report = run(save(tmp_path / "s", tensors), tmp_path / "out")
    assert (report["label"], report["on_grid"], report["rounded"]) == ("rounded", False, 1)
    assert (report["sqnr_db"] is None) == (name == "model.norm.weight")


def test_float16_and_float32_sources(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.float32):
        tensors = model(dtype)
        report = run(save(tmp_path / str(dtype), tensors), tmp_path / f"{dtype}.out")
        assert report["rounded"] > report["quantised"]  # embeddings and norms do not fit BF16 either
        for name in KEPT:
            assert torch.equal(read(tmp_path / f"{dtype}.out", name), tensors[name].bfloat16())
        assert torch.equal(read(tmp_path / f"{dtype}.out", BIAS), tensors[BIAS])
        for name in FP8:
            stored = read(tmp_path / f"{dtype}.out", name).view(torch.uint8)
            assert torch.equal(stored, quantise(tensors[name])[0].view(torch.uint8))


def test_converting_the_converted_changes_no_byte(tmp_path: Path) -> None:
    first = run(save(tmp_path / "s", model()), tmp_path / "m1")
    for layout in ("bf16", "mxfp8", "deepseek"):
        run(tmp_path / "m1", tmp_path / layout, layout=layout)
    for source in ("m1", "bf16", "mxfp8", "deepseek"):
        again = run(tmp_path / source, tmp_path / f"{source}.out")
        assert (again["label"], again["digest"]) == ("on-grid", first["digest"])
        assert (tmp_path / f"{source}.out" / SINGLE).read_bytes() == (tmp_path / "m1" / SINGLE).read_bytes()


def test_sharded_sources(tmp_path: Path) -> None:
    tensors = model()
    whole = run(save(tmp_path / "a", tensors), tmp_path / "a.out")
    sharded = save(tmp_path / "b", {})
    (sharded / SINGLE).unlink()
    write_folder(sharded, plan_of(tensors), tensors.items(), shard_bytes=20_000)
    assert (sharded / INDEX).exists()
    assert run(sharded, tmp_path / "b.out") == whole


# Refusals.


def fp8_source(scale: float) -> dict[str, Tensor]:
    tensors = model(on_grid=True)
    for name in FP8:
        tensors[name], scales = quantise(tensors[name])
        tensors[name + "_scale_inv"] = torch.ldexp(torch.ones(scales.shape), scales.int() - 127)
    tensors[UP + "_scale_inv"] *= scale
    return tensors


def test_fp8_with_other_scales_is_refused_and_with_powers_of_two_taken(tmp_path: Path) -> None:
    source = save(tmp_path / "bad", fp8_source(1.32288), CONFIG | {"quantization_config": {"scale_fmt": "ue8m0"}})
    with pytest.raises(CheckpointError) as caught:
        run(source, tmp_path / "out")
    message = str(caught.value)
    assert "no power of two" in message
    assert "quantise from the BF16/FP32 master" in message
    assert UP in message
    assert str(source / SINGLE) in message
    report = run(save(tmp_path / "good", fp8_source(1.0)), tmp_path / "out")
    assert report["digest"] == values_digest(save(tmp_path / "bf16", model(on_grid=True)))
    assert report["on_grid"]


def broken() -> Iterator[tuple[str, dict[str, Tensor], type[OttavaError], str]]:
    good = model()
    bad = good[UP].clone()
    bad[3, 5] = torch.nan
    yield "NaN", good | {UP: bad}, FormatError, "infinity or NaN"
    embedding = good["model.embed_tokens.weight"].clone()
    embedding[0, 0] = torch.inf
    yield "inf", good | {"model.embed_tokens.weight": embedding}, FormatError, r"(?s)infinity in a tensor.*mend"
    yield "NaN in a norm", good | {"model.norm.weight": torch.full((64,), torch.nan)}, FormatError, r"(?s)NaN in.*mend"
    yield (
        "large",
        good | {"model.norm.weight": torch.full((64,), 3.4e38)},
        FormatError,
        r"(?s)3\.4e\+38 is too large for BF16.*mend",
    )
    fused = {LAYER + "mlp.experts.gate_up_proj": torch.zeros(2, 64, 64).bfloat16()}
    yield "fused", good | fused, CheckpointError, "experts fused into one tensor"
    yield "int8", good | {UP: torch.zeros(4, 4, dtype=torch.int8)}, CheckpointError, "a linear weight of type I8"
    yield "no linear", {name: good[name] for name in KEPT}, CheckpointError, "no linear weights"
    yield "f8 alone", good | {UP: good[UP].to(torch.float8_e4m3fn)}, CheckpointError, "without scales"
    empty = {UP: torch.zeros(0, 4)}
    yield "empty", good | empty, CheckpointError, "no matrix"


@pytest.mark.parametrize("case", list(broken()), ids=lambda case: case[0])
def test_refusals_name_the_place_and_leave_nothing(
    case: tuple[str, dict[str, Tensor], type[OttavaError], str], tmp_path: Path
) -> None:
    _, tensors, kind, message = case
    source = save(tmp_path / "s", tensors)
    with pytest.raises(kind, match=message) as caught:
        run(source, tmp_path / "out")
    assert str(source) in str(caught.value)
    assert names_in(tmp_path) == ["s"]


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        run(tmp_path / "s", tmp_path / "out")
    (tmp_path / "s" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no model in this folder"):
        run(tmp_path / "s", tmp_path / "out")
    assert names_in(tmp_path) == ["s"]


# The stage.


class Here:
    """Runs what a stage calls in this process."""

    def call(
        self, target: str, args: Mapping[str, Any], *, pool: Pool | None = None, workers: int = 1, logs: Path
    ) -> list[dict[str, Any]]:
        module, name = target.split(":")
        return [getattr(importlib.import_module(module), name)(json.loads(json.dumps(args)))] * workers

    def spawn(
        self, target: str, args: Mapping[str, Any], *, pool: Pool | None, logs: Path, env: Mapping[str, str] = {}
    ) -> Process:
        raise NotImplementedError


def context(tmp_path: Path) -> Context:
    pool = Pool(name="cpu")
    (tmp_path / "out").mkdir()
    return Context(
        stage="convert",
        seed=0,
        recipe_name="test",
        fleet=Fleet(name="one", pools=(pool,)),
        pool=pool,
        fallback=(),
        stages={},
        out=tmp_path / "out",
        work=tmp_path / "work",
        journal=Journal(tmp_path / "journal.jsonl"),
        launcher=Here(),
        destination=tmp_path / "artifacts" / "convert",
        meta={"stage": "convert"},
    )


def trained(tmp_path: Path) -> Artifact:
    save(tmp_path / "train" / "model", model(on_grid=True))
    return artifact.commit(tmp_path / "train", tmp_path / "artifacts" / "train", stage="train", summary={})


def test_stage_converts_the_trained_model(tmp_path: Path) -> None:
    train = trained(tmp_path)
    made = stage.run(stage.Spec(), {"model": train}, context(tmp_path))
    made = artifact.load(made.path)
    assert made.summary == {key: made.json("conversion.json")[key] for key in stage_summary()}
    assert made.summary["on_grid"]
    assert made.summary["digest"] == values_digest(train.file("model")) == values_digest(made.file("model"))
    assert made.json("model/conversion.json") == made.json("conversion.json")
    events = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [event["fraction"] for event in events] == [0.0, 1.0]


def stage_summary() -> tuple[str, ...]:
    return "digest", "on_grid", "label", "layout", "rounding", "sqnr_db", "bytes"


def test_stage_converts_a_named_folder(tmp_path: Path) -> None:
    source = save(tmp_path / "published", model())
    made = stage.run(stage.Spec(source=str(source)), {}, context(tmp_path))
    assert made.summary["label"] == "rounded"
    assert made.summary["sqnr_db"] > 29


def test_stage_writes_the_layout_asked_for(tmp_path: Path) -> None:
    source = save(tmp_path / "published", model())
    made = stage.run(stage.Spec(source=str(source), layout="mxfp8"), {}, context(tmp_path))
    assert made.summary["layout"] == made.json("conversion.json")["layout"] == "mxfp8"
    assert UP + "_scale" in entries(made.file("model"))


def test_calibration_is_for_gptq(tmp_path: Path) -> None:
    text = tmp_path / "text"
    with pytest.raises(ValueError, match="no such file"):
        stage.Spec(rounding="gptq", calibration=str(text))
    text.write_text("a")
    with pytest.raises(ValueError, match="for rounding: gptq"):
        stage.Spec(calibration=str(text))
    keys = [stage.Spec(rounding="gptq", calibration=str(text)).model_dump(mode="json")]
    text.write_text("b")
    keys.append(stage.Spec(rounding="gptq", calibration=str(text)).model_dump(mode="json"))
    assert keys[0] != keys[1]


def test_stage_without_a_source(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    with pytest.raises(RecipeError, match="no model to convert"):
        stage.run(stage.Spec(), {}, ctx)
    with pytest.raises(CheckpointError, match="no such folder"):
        stage.run(stage.Spec(source=str(tmp_path / "nowhere")), {}, ctx)


def test_a_changed_byte_of_the_source_is_another_task(tmp_path: Path) -> None:
    def asked(source: Path | None) -> str:
        return digest_of(stage.Spec(source=source and str(source)).model_dump(mode="json"))

    source = save(tmp_path / "s", model())
    first = asked(source)
    assert asked(source) == first
    path = source / "config.json"
    path.write_text(path.read_text().replace("deepseek_v3", "deepseek_v4"))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    second = asked(source)
    path.rename(source / "other.json")
    assert len({first, second, asked(source), asked(None), asked(tmp_path / "nowhere")}) == 5


def test_the_stage_is_imported_without_torch() -> None:
    code = "import sys, ottava.stages.convert; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
