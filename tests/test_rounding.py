"""Rounding with calibration text: GPTQ against its textbook form and brute force, and the models it goes through."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from ottava.checkpoint.convert import convert
from ottava.checkpoint.layouts import exact, weights
from ottava.checkpoint.names import storage_of
from ottava.checkpoint.resume import Part, locked
from ottava.checkpoint.safetensors import load as load_tensor
from ottava.checkpoint.safetensors import read_header, write
from ottava.errors import Busy, CheckpointError, DataError, FormatError
from ottava.fp8.codec import project, quantise
from ottava.fp8.rounding import damping_for, gptq, grid_scale, nearest, output_error
from ottava.fp8.spec import BIAS, BLOCK, BYTE_MIN, scale_byte
from ottava.models import calibrate as calibration
from ottava.models.calibrate import REPORT, Inputs, convert_calibrated, round_model
from ottava.models.walk import LayeredModel, Passage

GRID = sorted({float(v) for v in torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float() if v == v})


def inputs(columns: int, tokens: int, seed: int) -> Tensor:
    """Correlated inputs with a few large ones, as layers have them: [tokens, columns]."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw) / math.sqrt(columns)
    x = torch.randn(tokens, columns, generator=draw) @ (mix + 0.2 * torch.eye(columns))
    return x * torch.exp(torch.randn(columns, generator=draw))


def case(rows: int, columns: int, seed: int, tokens: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and a Hessian."""
    x = inputs(columns, tokens or 4 * columns, seed)
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) / 9, x.T @ x


def damped(h: Tensor, damping: float) -> Tensor:
    d = h.double().diagonal()
    return h.double() + torch.diag(damping * d + 1e-6 * d.mean())


def error(w: Tensor, r: Tensor, h: Tensor) -> float:
    return float(output_error(w, r, h))


# The scales.


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 300), (576, 192)])
def test_the_scales_are_those_of_the_rule(shape: tuple[int, int]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * torch.exp2(torch.arange(shape[1]) / 16.0)
    w[:128, :128] = 0
    found = grid_scale(w)
    for i, j in itertools.product(range(0, shape[0], BLOCK), range(0, shape[1], BLOCK)):
        block, scales = (t[i : i + BLOCK, j : j + BLOCK] for t in (w, found))
        amax = float(block.abs().max())
        assert float(scales.min()) == float(scales.max()) == 2.0 ** ((scale_byte(amax) if amax else BYTE_MIN) - BIAS)
    assert torch.equal(nearest(w, found).view(torch.int32), project(w).view(torch.int32))


# GPTQ.


def textbook(w: Tensor, h: Tensor, damping: float, act_order: bool) -> Tensor:
    """GPTQ as the paper derives it: one row at a time, the inverse Hessian of what is left by elimination, float64."""
    d = h.double().diagonal()
    order = d.argsort(descending=True, stable=True).tolist() if act_order else list(range(len(d)))
    scales = grid_scale(w)
    out = torch.empty_like(w)
    for row in range(len(w)):
        rest, inverse = w[row].double().clone(), torch.linalg.inv(damped(h, damping))
        for j in order:
            s = float(scales[row, j])
            target = max(-448.0, min(448.0, float(rest[j]) / s))
            q = min(GRID, key=lambda v: abs(v - target)) * s
            rest -= (rest[j] - q) / inverse[j, j] * inverse[:, j]
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            out[row, j] = q
    return out


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("rows", "columns", "damping"), [(3, 9, 0.0), (2, 40, 0.1), (2, 150, 0.5)])
def test_it_is_the_textbook_s_gptq(rows: int, columns: int, damping: float, act_order: bool) -> None:
    w, h = case(rows, columns, columns)
    ours = gptq(w, h, damping=damping, act_order=act_order, sweeps=0)
    assert torch.equal(ours, textbook(w, h, damping, act_order))
    assert not torch.equal(ours, project(w))


@pytest.mark.parametrize("seed", range(4))
def test_between_brute_force_and_plain_rounding(seed: int) -> None:
    """All 253 values for each of three weights: none of the 16 million is better, and plain rounding is no better."""
    w, h = case(1, 3, seed, tokens=50)
    d = w.double().T - torch.tensor(GRID, dtype=torch.float64) * grid_scale(w).double().T
    a, b, c = d[0][:, None, None], d[1][:, None], d[2]
    m = h.double().tolist()
    best = (
        a * a * m[0][0] + b * b * m[1][1] + c * c * m[2][2] + 2 * (a * b * m[0][1] + a * c * m[0][2] + b * c * m[1][2])
    )
    ours, plain = error(w, gptq(w, h, damping=0.0, sweeps=5), h), error(w, project(w), h)
    assert float(best.min()) * (1 - 1e-6) <= ours <= plain * (1 + 1e-6)
    assert ours < 4 * float(best.min())


@given(st.integers(1, 40), st.integers(2, 60), st.integers(0, 10**6))
def test_never_worse_than_plain_rounding_in_aggregate_and_every_sweep_helps(rows: int, columns: int, seed: int) -> None:
    w, h = case(rows, columns, seed)
    target = damped(h, 0.01)
    errors = [error(w, gptq(w, h, damping=0.01, sweeps=sweeps), target) for sweeps in range(4)]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    if rows >= 10 and columns >= 10:
        assert errors[0] < error(w, project(w), target)


def test_the_gain_on_fresh_inputs_of_the_same_kind() -> None:
    w, _ = case(200, 160, 5)
    x = inputs(160, 3000, 8)
    h, fresh = x[:2000].T @ x[:2000], x[2000:].T @ x[2000:]
    ours = gptq(w, h, damping=damping_for(160, 2000))
    assert 10 * math.log10(error(w, project(w), fresh) / error(w, ours, fresh)) > 2


@pytest.mark.parametrize("power", [-118, -60, 0, 60, 115])
@pytest.mark.parametrize("shape", [(5, 7), (128, 256), (130, 300)])
def test_the_result_is_its_own_projection(shape: tuple[int, int], power: int) -> None:
    w, h = case(*shape, seed=11)
    w = w * 2.0**power
    ours = gptq(w, h, damping=0.01)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(project(ours.to(dtype)).float().view(torch.int32), ours.view(torch.int32))


def test_also_where_a_block_is_spelt_with_a_smaller_scale() -> None:
    """The largest value, a little above 464 halves of a scale, comes out below it: its scale is halved."""
    w, h = torch.tensor([[232.1, 20.0, 3.0]]), torch.tensor([[1.0, 0.99, 0.0], [0.99, 1.0, 0.0], [0.0, 0.0, 0.1]])
    h = h * torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])  # the second input is larger, and rounded first
    w[0, 1] = 21.01
    before, after = quantise(w)[1], quantise(ours := gptq(w, h, damping=0.0))[1]
    assert int(after) == int(before) - 1
    assert torch.equal(project(ours), ours)


def test_a_value_that_would_have_to_exceed_the_largest_code_saturates() -> None:
    w = torch.tensor([[448.0, 17.1]])
    h = torch.tensor([[1.0, 1.9], [1.9, 4.0]])
    wide = torch.tensor([[500.0, -500.0, 0.0]])
    assert gptq(wide, torch.eye(3), torch.ones(1, 3)).tolist() == [[448.0, -448.0, 0.0]]
    assert float(gptq(w.expand(50, 2) * torch.linspace(0.9, 1.2, 50)[:, None], h, torch.ones(50, 2)).abs().max()) == 448


def test_uncorrelated_inputs_and_no_inputs_leave_plain_rounding() -> None:
    w, _ = case(40, 200, 1)
    assert torch.equal(gptq(w, torch.diag(torch.rand(200) + 0.1)), project(w))
    assert torch.equal(gptq(w, torch.zeros(200, 200)), project(w))


def test_weights_on_the_grid_stay_as_they_are() -> None:
    w, h = case(130, 150, 2)
    w = project(w)
    assert torch.equal(gptq(w, h, damping=0.01), w)


def test_a_hessian_of_few_tokens_is_factored_all_the_same() -> None:
    w, h = case(20, 100, 4, tokens=1)
    ours = gptq(w, h, damping=0.0)
    assert torch.equal(project(ours), ours)
    assert error(w, ours, h) <= error(w, project(w), h)


def test_column_order_is_a_permutation_of_the_work_only() -> None:
    w, h = case(30, 140, 6)
    order = h.diagonal().argsort(descending=True, stable=True)
    there = gptq(w[:, order], h[order][:, order], grid_scale(w)[:, order], act_order=False, damping=0.1)
    assert torch.equal(gptq(w, h, damping=0.1)[:, order], there)


def test_batches_and_stacks_are_as_one_by_one() -> None:
    pairs = [case(70, 133, seed) for seed in range(3)]
    alone = [gptq(w, h) for w, h in pairs]
    together = gptq(torch.stack([w for w, _ in pairs]), torch.stack([h for _, h in pairs]))
    assert torch.equal(together, torch.stack(alone))
    h = pairs[0][1]
    ws = [w for w, _ in pairs]
    stacked = gptq(torch.cat(ws), h, torch.cat([grid_scale(w) for w in ws]))
    assert torch.equal(stacked, torch.cat([gptq(w, h) for w in ws]))


def test_what_has_no_answer_is_refused() -> None:
    w, h = case(4, 5, 0)
    with pytest.raises(FormatError):
        gptq(w, h * torch.nan)
    with pytest.raises(FormatError):
        gptq(w * torch.inf, h)
    with pytest.raises(FormatError, match="semidefinite"):
        gptq(w, h - 1e9 * torch.ones(5, 5))


# Whole models.

WORDS = [f"w{i}" for i in range(96)]
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 97, "hidden_size": 96,
    "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3 = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False}
MOE = {"moe_intermediate_size": 48, "num_experts_per_tok": 2, "norm_topk_prob": True}
QWEN3_MOE = {
    **QWEN3, **MOE, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 6,
    "decoder_sparse_step": 1, "mlp_only_layers": [0],
}  # fmt: skip
DEEPSEEK = {
    **{key: value for key, value in LLAMA.items() if key != "head_dim"}, **MOE, "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 6, "q_lora_rank": 24, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "routed_scaling_factor": 1.5,
}  # fmt: skip
FAMILIES = {"llama": LLAMA, "qwen3": QWEN3, "qwen3_moe": QWEN3_MOE, "deepseek_v3": DEEPSEEK}


def make(folder: Path, config: Mapping[str, Any], seed: int = 0) -> Any:
    """A tiny random model, saved in BF16 as Transformers saves it, with a tokenizer of words; the model, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    torch.manual_seed(seed)
    built = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **settings), attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "embed" in name else 1.5 / math.sqrt(parameter.shape[-1]))
                parameter.copy_(parameter.bfloat16())
    copy.deepcopy(built).to(torch.bfloat16).save_pretrained(folder)  # a copy: that rounds the rotation too
    tokenizer = Tokenizer(models.WordLevel({"?": 0, **{word: i + 1 for i, word in enumerate(WORDS)}}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return built


def text(path: Path, words: int = 2000, seed: int = 1) -> Path:
    draw = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    path.write_text(" ".join(WORDS[i] for i in draw.tolist()))
    return path


def overlay(folder: Path) -> dict[str, Tensor]:
    return {n: load_tensor(entry) for path in folder.glob("*.safetensors") for n, entry in read_header(path).items()}


def calibrate(tmp_path: Path, config: Mapping[str, Any], **more: Any) -> tuple[Path, Path, dict[str, Any]]:
    source, out = tmp_path / "source", tmp_path / "overlay"
    if not source.exists():
        make(source, config)
    args = {"source": source, "out": out, "text": text(tmp_path / "t.txt"), "tokens": 1536, "window": 64, **more}
    return source, out, round_model(args)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_every_family(tmp_path: Path, family: str) -> None:
    source, out, report = calibrate(tmp_path, FAMILIES[family])
    found = weights(source)
    linear = {name for name, weight in found.items() if storage_of(name, len(weight.shape)) == "fp8"}
    rounded = overlay(out)
    assert set(rounded) == set(report["tensors"]) == linear
    assert json.loads((out / REPORT).read_text()) == report
    for name, values in rounded.items():
        original, fact = exact(found[name]), report["tensors"][name]
        assert values.dtype == torch.bfloat16
        assert torch.equal(project(values).view(torch.int16), values.view(torch.int16))
        assert fact["tokens"] == 1536 or ".experts." in name
        few = fact["tokens"] < original.shape[1]
        assert fact["method"] == ("nearest" if few else "gptq")
        assert (name in report["nearest"]) == few == torch.equal(values, project(original)), name
        assert few or fact["gain_db"] > 0, name
    assert report["tokens"] == 1536
    for layer in (1, 2):  # every token goes to two experts
        stem = f"model.layers.{layer}.mlp.experts."
        routed = [fact["tokens"] for n, fact in report["tensors"].items() if n.startswith(stem) and "up_proj" in n]
        assert sum(routed) == (2 * 1536 if "num_experts_per_tok" in FAMILIES[family] else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_sees_what_the_rounded_layers_before_it_pass_on(tmp_path: Path, family: str) -> None:
    """The whole model, run by Transformers with the overlay's layers 0 and 1, gives the Hessians of layer 2."""
    from ottava.models.published import published

    model = make(tmp_path / "source", FAMILIES[family]).float()
    source, out, report = calibrate(tmp_path, FAMILIES[family])
    rounded = overlay(out)
    for name, item in published(model).items():
        if name in rounded and not name.startswith("model.layers.2."):
            item.tensor.copy_(rounded[name])
    words = (tmp_path / "t.txt").read_text().split()
    ids = torch.tensor([int(word[1:]) + 1 for word in words])
    windows = [w for w in torch.split(ids, 64) if len(w) == 64]
    windows = [windows[i * len(windows) // 24] for i in range(24)]
    seen: dict[str, list[Tensor]] = {"self_attn.o_proj": [], "input_layernorm": []}
    layer = model.model.layers[2]
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x: seen["self_attn.o_proj"].append(x[0][0]))
    layer.input_layernorm.register_forward_hook(lambda *x: seen["input_layernorm"].append(x[2][0]))
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None], use_cache=False)
    stacked = {"deepseek_v3": ("q_a_proj", "kv_a_proj_with_mqa")}.get(family, ("q_proj", "k_proj", "v_proj"))
    for names, where in ((stacked, "input_layernorm"), (("o_proj",), "self_attn.o_proj")):
        fulls = [f"model.layers.2.self_attn.{name}.weight" for name in names]
        h = sum((x.T @ x).double() for x in seen[where])  # window by window: one other bit leads to many other codes
        ws = [exact(weights(source)[full]).float() for full in fulls]
        scale = torch.cat([grid_scale(w) for w in ws])
        expected = gptq(torch.cat(ws), h, scale, damping=damping_for(h.shape[1], 1536))
        found = torch.cat([rounded[full].float() for full in fulls])
        assert float((expected == found).double().mean()) > 0.99, names
        gain = 10 * math.log10(error(ws[0], project(ws[0]), h) / error(ws[0], rounded[fulls[0]].float(), h))
        assert gain == pytest.approx(report["tensors"][fulls[0]]["gain_db"], abs=0.05)


def test_experts_are_rounded_with_their_own_tokens(tmp_path: Path) -> None:
    """What one expert was given, found by calling the layer's own router."""
    model = make(tmp_path / "source", QWEN3_MOE).float()
    source, out, report = calibrate(tmp_path, {**QWEN3_MOE})
    rounded = overlay(out)
    from ottava.models.published import published

    for name, item in published(model).items():
        if name in rounded and name.startswith("model.layers.0."):
            item.tensor.copy_(rounded[name])
    calls: list[tuple[Tensor, Tensor]] = []
    block = model.model.layers[1].mlp
    block.experts.register_forward_pre_hook(lambda _, x: calls.append((x[0].clone(), x[1])))
    ids = torch.tensor([int(word[1:]) + 1 for word in (tmp_path / "t.txt").read_text().split()])
    windows = [w for w in torch.split(ids, 64) if len(w) == 64]
    with torch.no_grad():
        for i in range(24):
            model(input_ids=windows[i * len(windows) // 24][None], use_cache=False)
    x, routes = torch.cat([c[0] for c in calls]), torch.cat([c[1] for c in calls])
    for expert in range(6):
        mine = x[[expert in row for row in routes.tolist()]]
        stem = f"model.layers.1.mlp.experts.{expert}."
        facts = [report["tensors"][f"{stem}{part}.weight"] for part in ("gate_proj", "up_proj", "down_proj")]
        assert [fact["tokens"] for fact in facts] == [len(mine)] * 3
        if len(mine) < 96:
            continue
        gate, up, down = [exact(weights(source)[f"{stem}{p}_proj.weight"]).float() for p in ("gate", "up", "down")]
        scale = torch.cat([grid_scale(gate), grid_scale(up)])
        expected = gptq(torch.cat([gate, up]), (mine.T @ mine).double(), scale, damping=damping_for(96, len(mine)))
        assert float((expected[:48] == rounded[f"{stem}gate_proj.weight"].float()).double().mean()) > 0.99
        g, u = rounded[f"{stem}gate_proj.weight"].float(), rounded[f"{stem}up_proj.weight"].float()
        inner = torch.nn.functional.silu(mine @ g.T) * (mine @ u.T)
        expected = gptq(down, (inner.T @ inner).double(), damping=damping_for(48, len(mine)))
        assert float((expected == rounded[f"{stem}down_proj.weight"].float()).double().mean()) > 0.99


def test_rarely_routed_experts_are_rounded_to_nearest_and_listed(tmp_path: Path) -> None:
    _, _, report = calibrate(tmp_path, QWEN3_MOE, tokens=192)
    assert report["nearest"]
    assert {report["tensors"][name]["method"] for name in report["nearest"]} == {"nearest"}
    assert all(".experts." in name for name in report["nearest"])


class Stop(Exception):
    pass


def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make(source, DEEPSEEK)
    args = {"source": source, "text": text(tmp_path / "t.txt"), "tokens": 512, "window": 64}
    whole = round_model({**args, "out": tmp_path / "a"})

    def stop(done: int, of: int) -> None:
        assert of == 3
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        round_model({**args, "out": tmp_path / "b"}, stop)
    layers = sorted((tmp_path / "b").glob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in layers]
    assert len(layers) == 2
    assert not (tmp_path / "b" / REPORT).exists()
    assert round_model({**args, "out": tmp_path / "b"}) == whole
    assert [path.stat().st_mtime_ns for path in layers] == times
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    text(tmp_path / "t.txt", seed=9)  # other text, other bits: nothing of the earlier run is used
    round_model({**args, "out": tmp_path / "b"})
    assert layers[0].stat().st_mtime_ns != times[0]


def test_the_text_is_taken_evenly_from_every_file(tmp_path: Path) -> None:
    make(tmp_path / "s", LLAMA)
    files = [text(tmp_path / "a.txt", 3000), text(tmp_path / "b.txt", 200, seed=2)]
    report = round_model({"source": tmp_path / "s", "out": tmp_path / "o", "text": files, "tokens": 1024, "window": 64})
    assert [(item["name"], item["tokens"]) for item in report["texts"]] == [("a.txt", 512), ("b.txt", 192)]
    assert report["tokens"] == 704


def test_the_default_text(tmp_path: Path) -> None:
    make(tmp_path / "s", LLAMA)
    report = round_model({"source": tmp_path / "s", "out": tmp_path / "o", "tokens": 512, "window": 64})
    assert [item["name"] for item in report["texts"]] == ["pydoc_data.topics", "calibration.txt"]
    assert [item["tokens"] for item in report["texts"]] == [256, 256]


def test_the_master_holds_the_overlay_s_values(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make(source, DEEPSEEK)
    args = {"source": source, "text": text(tmp_path / "t.txt"), "tokens": 512, "window": 64}
    round_model({**args, "out": tmp_path / "overlay"})
    bytes_told, layers_told = list[tuple[int, int]](), list[tuple[int, int]]()
    report = convert_calibrated(
        {**args, "out": tmp_path / "master", "layout": "e8m0"},
        lambda done, of: bytes_told.append((done, of)),
        lambda done, of: layers_told.append((done, of)),
    )
    count = len(list((tmp_path / "overlay").glob("layer-*.safetensors")))
    assert layers_told == [(number + 1, count) for number in range(count)]
    total = sum(weight.data.end - weight.data.start for weight in weights(source).values())
    assert (bytes_told[-1], {of for _, of in bytes_told}) == ((total, total), {total})
    rounded, master = overlay(tmp_path / "overlay"), weights(tmp_path / "master")
    for name, weight in weights(source).items():
        kept = exact(weight).float()
        assert torch.equal(exact(master[name]).float(), rounded[name].float() if name in rounded else kept), name
        assert (master[name].data.dtype == "F8_E4M3") == (name in rounded)
    assert (report["rounding"], report["label"]) == ("gptq", "rounded")
    assert report["calibration"]["texts"][0]["name"] == "t.txt"
    assert json.loads((tmp_path / "master" / "conversion.json").read_text()) == report
    assert set(json.loads((tmp_path / "master" / REPORT).read_text())["tensors"]) == set(rounded)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["master", "overlay", "source", "t.txt"]


def prepared(tmp_path: Path, config: Mapping[str, Any] = LLAMA) -> dict[str, Any]:
    """A small model and how to calibrate it to the master "o"."""
    make(tmp_path / "s", config)
    words = text(tmp_path / "t.txt")
    return {"source": tmp_path / "s", "out": tmp_path / "o", "text": words, "tokens": 512, "window": 64}


def test_inputs_that_are_all_but_parallel(tmp_path: Path) -> None:
    """Words that the vocabulary lacks are one and the same token: a Hessian of rank one, but for rounding errors."""
    args = prepared(tmp_path)
    (tmp_path / "t.txt").write_text("unknown " * 20000)
    report = round_model({**args, "tokens": 16384, "window": 512})
    gains = [fact["gain_db"] for fact in report["tensors"].values()]
    assert all(gain is None or math.isfinite(gain) for gain in gains)


def test_an_error_that_is_no_more_than_noise_has_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "output_error", lambda *_: torch.tensor(-1e-12))
    (fact,) = calibration._round([torch.randn(4, 5)], torch.eye(5, dtype=torch.float64), 9)
    assert (fact.method, fact.gain_db) == ("gptq", None)


def test_sums_of_products_are_not_rounded_to_float32() -> None:
    x = torch.randn(300, 1) @ torch.randn(1, 40) + 1e-6 * torch.randn(300, 40)
    layer = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(40, 8, bias=False)})
    seen = Inputs(layer, "model.layers.0.mlp.")
    for half in (x[:100], x[100:]):
        layer["up_proj"](half)
        seen.sum_up()
    wide = x.double()
    torch.testing.assert_close(seen.hessians["up_proj.weight",], wide.T @ wide, rtol=1e-12, atol=1e-12)
    assert seen.tokens["up_proj.weight",] == 300


def test_what_another_model_left_is_no_part_of_this(tmp_path: Path) -> None:
    args = prepared(tmp_path, {**LLAMA, "num_hidden_layers": 1})
    make(tmp_path / "larger", LLAMA)

    def stop(done: int, of: int) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        convert_calibrated({**args, "source": tmp_path / "larger"}, stop)
    assert (tmp_path / "o.rounding" / "layer-00001.safetensors").exists()
    report = convert_calibrated(args)
    assert report == convert_calibrated({**args, "out": tmp_path / "anew"})
    assert not (tmp_path / "o.rounding").exists()


def test_two_calibrations_exclude_each_other(tmp_path: Path) -> None:
    args = prepared(tmp_path)
    with locked(tmp_path / "o.rounding", calibration.OURS):
        for attempt in (convert_calibrated, lambda given: round_model({**given, "out": tmp_path / "o.rounding"})):
            with pytest.raises(Busy):
                attempt(args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "t.txt"]


def test_the_master_is_published_with_all_its_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args, real, seen = prepared(tmp_path), Part.publish, []

    def publish(part: Part, out: Path) -> None:
        seen.append({path.name: path.read_bytes() for path in part.folder.iterdir()})
        real(part, out)

    monkeypatch.setattr(Part, "publish", publish)
    report = convert_calibrated(args)
    (before,) = seen
    assert json.loads(before["conversion.json"]) == report
    assert {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}.items() <= before.items()
    assert REPORT in before


def test_a_conversion_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The overlay is left as it was: otherwise the conversion would take it for another."""
    args = prepared(tmp_path)

    def stop(part: Part, out: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Part, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_calibrated(args)
    state = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o.rounding").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(Part, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_calibrated(args)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o.rounding").iterdir()} == state
    assert convert_calibrated(args) == convert_calibrated({**args, "out": tmp_path / "whole"})


@pytest.mark.parametrize("fault", ["out", "engine", "layout", "no linears", "other scales"])
def test_what_can_be_known_is_said_before_the_rounding(fault: str, tmp_path: Path) -> None:
    args = prepared(tmp_path)
    if fault == "out":
        (tmp_path / "o").mkdir()
        (tmp_path / "o" / "file").write_text("x")
    elif fault in ("engine", "layout"):
        args[fault] = "nonesuch"
    else:
        path = tmp_path / "s" / "model.safetensors"
        tensors = {name: load_tensor(entry) for name, entry in read_header(path).items()}
        if fault == "no linears":
            tensors = {name: tensor for name, tensor in tensors.items() if "_proj" not in name}
        else:
            name = "model.layers.2.mlp.up_proj.weight"
            codes, _ = quantise(tensors[name])
            tensors |= {name: codes, name + "_scale_inv": torch.full((2, 1), 0.3)}
        write(path, tensors.items())
    there, layers = sorted(path.name for path in tmp_path.iterdir()), []
    with pytest.raises(CheckpointError):
        convert_calibrated(args, lambda done, of: layers.append(done))
    assert not layers
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_codes_that_lie_on_the_grid_stay_as_they_are(tmp_path: Path) -> None:
    args = prepared(tmp_path)
    master = convert({"source": tmp_path / "s", "out": tmp_path / "e8m0"})
    report = convert_calibrated({**args, "source": tmp_path / "e8m0"})
    assert (report["label"], report["digest"]) == ("on-grid", master["digest"])


NORMS = {"phi": "final_layernorm", "lfm2": "embedding_norm", "persimmon": "final_layernorm"}
"""Families whose last norm has another name, which nothing depends on."""


def other(folder: Path, kind: str, **more: Any) -> Any:
    """A small model of another family, in LLAMA's sizes, saved in BF16; the model, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in LLAMA.items() if key not in ("model_type", "architectures")}
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**settings, "pad_token_id": 0, "head_dim": 16, **more}),
        attn_implementation="eager",
        dtype=torch.float32,
    ).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(parameter.bfloat16())
    copy.deepcopy(built).to(torch.bfloat16).save_pretrained(folder)
    return built


@torch.no_grad()
@pytest.mark.parametrize("kind", NORMS)
def test_other_families_are_walked_as_they_run(tmp_path: Path, kind: str) -> None:
    """Layer after layer gives what the whole model, run by Transformers, gives to its last norm."""
    args = prepared(tmp_path)
    built = other(tmp_path / "s", kind)
    ids, seen = torch.randint(97, (3, 64)), []
    getattr(built.model, NORMS[kind]).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    built(input_ids=ids, use_cache=False)
    walked = LayeredModel(
        tmp_path / "s", json.loads((tmp_path / "s" / "config.json").read_text()), weights(tmp_path / "s")
    )
    hidden = walked.embed(ids)
    for number in range(len(walked.layers)):
        layer, given = walked.layer(number)
        hidden = torch.stack([walked.run(layer, window, given) for window in hidden])
    torch.testing.assert_close(hidden, seen[0], rtol=1e-4, atol=1e-4)
    if kind == "persimmon":  # none of its linears is kept in FP8
        with pytest.raises(CheckpointError, match="no linear weights"):
            convert_calibrated(args)
    else:
        assert convert_calibrated(args)["calibration"]["gain_db"]["median"] > 0


@pytest.mark.parametrize("kind", ["deepseek_v4", "gpt2", "gpt_oss"])
def test_other_families_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig

    args = prepared(tmp_path)
    if kind == "gpt_oss":
        other(tmp_path / "s", kind, num_local_experts=4)
    else:  # its description is enough
        AutoConfig.for_model(kind).save_pretrained(tmp_path / "s")
    with pytest.raises(CheckpointError, match=kind) as caught:
        round_model(args)
    assert caught.value.fix == "convert it with --rounding nearest"


def test_layers_that_are_given_more_of_the_text_are_refused() -> None:
    passage = Passage(last=False)
    x = torch.zeros(1, 2, 3)
    passage(x, mask=(torch.ones(2), None))
    passage(x, mask=(torch.ones(2), None))
    with pytest.raises(ValueError, match="depends on the text"):
        passage(x, mask=(torch.zeros(2), None))


def test_mistakes_are_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make(source, LLAMA)
    words = text(tmp_path / "t.txt")

    def attempt(**more: Any) -> None:
        round_model({"source": source, "out": tmp_path / "o", "text": words, "tokens": 512, "window": 64, **more})

    with pytest.raises(DataError, match="cannot be read"):
        attempt(text=tmp_path / "none.txt")
    with pytest.raises(DataError, match="has no window of"):
        attempt(tokens=63)
    with pytest.raises(DataError, match="has no window of"):
        attempt(window=4096)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="cannot be read"):
        attempt(text=tmp_path / "latin.txt")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "abacus"}))
    with pytest.raises(CheckpointError, match="abacus"):
        attempt()
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(CheckpointError, match=r"gate_proj.weight.*shape"):
        attempt()
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"model.layers.3\S+ is missing"):
        attempt()
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        attempt()
    tensors = {name: exact(weight) for name, weight in weights(source).items()}
    broken = tensors["model.layers.1.mlp.up_proj.weight"].clone()
    broken[0, 0] = torch.nan
    write(source / "model.safetensors", {**tensors, "model.layers.1.mlp.up_proj.weight": broken}.items())
    make(tmp_path / "other", LLAMA)
    (source / "tokenizer.json").write_bytes((tmp_path / "other" / "tokenizer.json").read_bytes())
    with pytest.raises(FormatError):
        attempt()


def test_what_lies_on_the_grid_stays_as_it_is() -> None:
    w = project(torch.randn(128, 96))
    w[w.abs() < 0.3] *= -0.0
    x = torch.randn(500, 96, dtype=torch.float64)
    assert bool(torch.signbit(w[w == 0]).any())
    assert torch.equal(gptq(w, x.T @ x).view(torch.int32), w.view(torch.int32))
