"""What each chip makes of a model, against a count by ml_dtypes and NumPy, value by value."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from ottava.checkpoint import chips, safetensors
from ottava.checkpoint.convert import check, convert
from ottava.checkpoint.engines import ENGINES
from ottava.checkpoint.stream import Reader
from ottava.checkpoint.targets import examine
from ottava.console.terminal import targets_table
from ottava.errors import CheckpointError, RecipeError
from ottava.fp8 import spec
from ottava.fp8.codec import dequantise, quantise
from ottava.models.build import from_config, initialise
from ottava.models.load import load
from ottava.models.published import published
from ottava.models.published import stored as stored_form

FLEETS = Path(__file__).parents[1] / "fleets"
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
EMBED, NORM, BIAS = "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.gate.e_score_correction_bias"
F8 = torch.float8_e4m3fn
HALF = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}
SMALLEST = {"bf16": 2.0**-126, "fp16": 2.0**-14}
CODES = np.unique(
    np.delete(np.arange(256, dtype=np.uint8), [127, 255]).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
)


def write(folder: Path, tensors: dict[str, Tensor], e8m0: tuple[str, ...] = ()) -> Path:
    folder.mkdir()
    plan = dict(safetensors.plan_of(tensors))
    plan |= {name: ("F8_E8M0", tuple(tensors[name].shape)) for name in e8m0}
    safetensors.write(folder / safetensors.SINGLE, tensors.items(), plan)
    return folder


def plain_tensors() -> dict[str, Tensor]:
    return {EMBED: torch.randn(200, 70).bfloat16(), NORM: torch.randn(70).bfloat16(), BIAS: torch.randn(8) * 1e-30}


def blocks_of(values: np.ndarray) -> list[np.ndarray]:
    matrix = values.reshape(-1, values.shape[-1])
    rows, columns = range(0, matrix.shape[0], 128), range(0, matrix.shape[1], 128)
    return [matrix[i : i + 128, j : j + 128] for i, j in product(rows, columns)]


def leaves(block: np.ndarray, half: str, flushes: bool) -> bool:
    with np.errstate(over="ignore"):
        lost = (block.astype(HALF[half]).astype(np.float64) != block).any()
    return bool(lost or (flushes and ((block != 0) & (abs(block) < SMALLEST[half])).any()))


def one_power_of_two(block: np.ndarray) -> bool:
    """By exhaustion: some scale of a master makes a code of every value (448 to 2**-9 times the scale)."""
    sizes = np.unique(abs(block))
    top = int(np.frexp(sizes[-1])[1])
    possible = range(max(top - 9, spec.BYTE_MIN - 127), min(top + 9, spec.BYTE_MAX - 127) + 1)
    return not sizes[-1] or any(np.isin(np.ldexp(sizes, -k), CODES).all() for k in possible)


def affected(found: dict[str, Any], form: str) -> tuple[str, int | None]:
    answer = found["layouts"][form]
    return answer["serves"], answer["blocks_affected"]


def values_of(codes: Tensor, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    wide = codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    spread = scales.repeat(block[0], 0)[: wide.shape[0]].repeat(block[1], 1)[:, : wide.shape[1]]
    return np.asarray(wide * spread)


@pytest.fixture
def master(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A master of ragged weights: scales at both ends of FP16's window, some below BF16's normal numbers."""
    torch.manual_seed(1)
    codes = {UP: torch.randint(0, 0x7F, (300, 400), dtype=torch.uint8), DOWN: torch.zeros(70, 260, dtype=torch.uint8)}
    codes[DOWN][5, 200] = 0x7E
    codes[DOWN][69, 259] = 0x01
    scales = {UP: torch.full((3, 4), 122, dtype=torch.uint8), DOWN: torch.full((1, 3), 127, dtype=torch.uint8)}
    scales[UP][0, 1], scales[UP][1, 0], scales[UP][2, 3] = 9, 112, 111
    scales[UP][1, 3], scales[UP][2, 0] = 134, 135
    scales[DOWN][0] = torch.tensor([1, 135, 4])
    tensors = plain_tensors()
    for name, code in codes.items():
        tensors |= {name: code.view(F8), name + "_scale_inv": scales[name]}
    plain = plain_tensors()
    tensors |= plain
    folder = write(tmp_path / "master", tensors, tuple(name + "_scale_inv" for name in codes))
    powers = {name: s.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64) for name, s in scales.items()}
    values = {name: values_of(codes[name], powers[name], (128, 128)) for name in codes}
    return folder, values | {name: plain[name].double().numpy() for name in (EMBED, NORM)}


@pytest.mark.parametrize("chip", ["A100", "910B", "CPU", "310P"])
def test_blocks_of_a_master_counted_by_value(master: tuple[Path, dict[str, np.ndarray]], chip: str) -> None:
    folder, values = master
    found = examine(folder, chip)[chip]
    half = "fp16" if chip == "310P" else "bf16"
    everything = [block for value in values.values() for block in blocks_of(value)]
    count = sum(leaves(block, half, flushes=found["subnormals"] != "kept") for block in everything)
    answer = found["layouts"][half]
    assert answer["blocks"] == len(everything) == 12 + 3 + 2 + 1
    assert affected(found, half) == ("lossily" if count else "exactly", count)
    assert count == {"A100": 0, "910B": 2, "CPU": 2, "310P": count}[chip]
    assert ("fp16" in found["layouts"]) == (chip == "310P")


def test_scales_in_f32_are_the_same_scales(tmp_path: Path, master: tuple[Path, dict[str, np.ndarray]]) -> None:
    found = {name: safetensors.load(entry) for name, entry in safetensors.entries(master[0]).items()}
    for name in (UP + "_scale_inv", DOWN + "_scale_inv"):
        found[name] = found[name].float()
    widened = examine(write(tmp_path / "deepseek", found))
    assert widened == examine(master[0])
    assert widened["310P"]["layouts"]["fp16"]["blocks_affected"] > widened["910B"]["layouts"]["bf16"]["blocks_affected"]


def test_fp16_is_judged_by_values_not_by_scales_alone(tmp_path: Path) -> None:
    """The same scale, outside FP16's window for all codes: the block is affected only if it holds such a code."""
    for code, certain in ((0x08, 0), (0x01, 1), (0x30, 0)):  # 2**-6, 2**-9 and 1/2 at a scale of 2**-16
        codes = torch.full((4, 4), code, dtype=torch.uint8).view(F8)
        scale = torch.full((1, 1), 127 - 16, dtype=torch.uint8)
        folder = write(tmp_path / str(code), {UP: codes, UP + "_scale_inv": scale}, (UP + "_scale_inv",))
        found = examine(folder, "310P")["310P"]
        assert affected(found, "fp16") == ("lossily", 1)
        why = found["layouts"]["fp16"]["why"]
        assert ("1 blocks hold values that FP16 has not" in why) == bool(certain)
        assert ("whether it keeps them is unknown" in why) == (not certain)


def test_a_usual_master_is_served_exactly_and_in_the_right_form(tmp_path: Path) -> None:
    torch.manual_seed(2)
    codes, scales = quantise(torch.randn(200, 300) * 0.02)
    name = UP + "_scale_inv"
    for kind, stored in (("e8m0", scales), ("deepseek", torch.ldexp(torch.ones(2, 3), scales.int() - 127))):
        tensors = {UP: codes, name: stored, **plain_tensors()}
        folder = write(tmp_path / kind, tensors, (name,) if kind == "e8m0" else ())
        found = examine(folder)
        assert list(found) == list(chips.formats())
        best = {chip: answer["recommended"] for chip, answer in found.items()}
        assert best["310P"] in ("fp16", "int8")
        assert {chip: form for chip, form in best.items() if chip != "310P"} == {
            **dict.fromkeys(("H100", "H800", "H20"), "deepseek"),
            **dict.fromkeys(("A100", "910B", "910C"), "bf16"),
            **dict.fromkeys(("950PR", "950DT"), "mxfp8"),
            **dict.fromkeys(("B200", "CPU"), "e8m0"),
        }
        for chip, answer in found.items():
            if chip != "310P":
                assert affected(answer, answer["recommended"]) == ("exactly", 0)
            assert affected(answer, "int8")[0] in ("lossily", "no"), "INT8 is never called exact"
        assert affected(found["910B"], "e8m0") == ("no", None)
        assert affected(found["910B"], "int8") == ("lossily", 6), "the six blocks of the one quantised weight"


def test_scales_that_are_no_powers_of_two(tmp_path: Path) -> None:
    """DeepSeek-V3's own form: exact on Hopper as it is, and nowhere else; a block of zeros has no wrong scale."""
    torch.manual_seed(3)
    codes = torch.randint(1, 0x7F, (256, 300), dtype=torch.uint8).view(F8)
    codes.view(torch.uint8)[128:, 256:] = 0
    scales = torch.tensor([[0.25, 1.5, 2.0], [1.32288 * 2**-10, 0.5, 0.007]])
    folder = write(tmp_path / "v3", {UP: codes, UP + "_scale_inv": scales})
    values = values_of(codes, scales.double().numpy(), (128, 128))
    wrong = sum(not one_power_of_two(block) for block in blocks_of(values))
    assert wrong == 2
    inexact = sum(leaves(block, "bf16", flushes=False) for block in blocks_of(values))
    assert inexact == 1, "4 bits times a scale of 2 bits are few enough for BF16"
    found = examine(folder)
    assert affected(found["H800"], "deepseek") == ("exactly", 0)
    assert affected(found["B200"], "e8m0") == ("lossily", wrong)
    assert affected(found["950DT"], "mxfp8") == ("lossily", wrong)
    for chip in ("A100", "910B", "H800"):
        assert affected(found[chip], "bf16") == ("lossily", inexact)
    assert "no E4M3 codes times one power of two" in found["B200"]["layouts"]["e8m0"]["why"]


def test_groups_of_32_with_scales_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(4)
    codes = torch.randint(1, 0x7F, (130, 290), dtype=torch.uint8).view(F8)
    scales = torch.full((130, 10), 120, dtype=torch.uint8)
    scales[3, 1], scales[128, 9] = 121, 90
    folder = write(tmp_path / "mx", {UP: codes, UP + "_scale": scales})
    values = values_of(codes, scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64), (1, 32))
    wrong = sum(not one_power_of_two(block) for block in blocks_of(values))
    assert 1 <= wrong <= 2
    found = examine(folder)
    assert affected(found["950PR"], "mxfp8") == ("exactly", 0)
    assert affected(found["H800"], "deepseek") == ("lossily", wrong)
    assert affected(found["B200"], "e8m0") == ("lossily", wrong)
    assert found["B200"]["recommended"] == "mxfp8"
    assert affected(found["A100"], "bf16") == ("exactly", 0)


def test_fp4_experts(tmp_path: Path) -> None:
    """DeepSeek-V4's form: always exact in MXFP8 and BF16; in 128x128 blocks where the groups' scales are near."""
    torch.manual_seed(5)
    weight, scale = "layers.0.ffn.experts.3.w1.weight", "layers.0.ffn.experts.3.w1.scale"
    packed = torch.randint(0, 256, (256, 128), dtype=torch.uint8).view(torch.int8)
    scales = torch.randint(110, 120, (256, 8), dtype=torch.uint8)
    scales[7, 1], scales[200, 7] = 90, 140
    folder = write(tmp_path / "v4", {weight: packed, scale: scales}, (scale,))
    found = examine(folder)
    assert affected(found["950DT"], "mxfp8") == ("exactly", 0)
    assert affected(found["910C"], "bf16") == ("exactly", 0)
    assert affected(found["B200"], "e8m0") == ("lossily", 2)
    assert affected(found["H20"], "deepseek") == ("lossily", 2)
    assert found["H20"]["recommended"] == "bf16"
    assert found["H20"]["layouts"]["bf16"]["blocks"] == 4


def test_bf16_weights_on_the_grid_and_off_it(tmp_path: Path) -> None:
    torch.manual_seed(6)
    w = torch.randn(200, 300).bfloat16()
    on = dequantise(*quantise(w), torch.bfloat16)
    mixed = on.clone()
    mixed[10, 5], mixed[190, 299] = w.abs().max() * 1.0078125, 2.0**-130
    wrong = sum(not one_power_of_two(block) for block in blocks_of(mixed.double().numpy()))
    for name, weight, count, tiny in (("on", on, 0, 0), ("mixed", mixed, wrong, 1)):
        found = examine(write(tmp_path / name, {UP: weight, **plain_tensors()}))
        exact = weight.double().numpy()
        groups = [[block[i : i + 1, j : j + 32] for i, j in product(range(len(block)), range(0, 128, 32))]
                  for block in blocks_of(exact)]  # fmt: skip
        bad = sum(not all(one_power_of_two(group) for group in parts if group.size) for parts in groups)
        assert affected(found["950PR"], "mxfp8") == ("lossily" if bad else "exactly", bad)
        assert bool(bad) == bool(count)
        assert affected(found["B200"], "e8m0") == ("lossily" if count else "exactly", count)
        assert affected(found["H100"], "deepseek") == ("lossily" if count else "exactly", count)
        assert affected(found["A100"], "bf16") == ("exactly", 0)
        assert affected(found["CPU"], "bf16") == ("lossily" if tiny else "exactly", tiny)
    assert wrong == 2
    assert "flushes to zero" in found["CPU"]["layouts"]["bf16"]["why"]


def test_unquantised_tensors_count_in_the_type_they_are_cast_to(tmp_path: Path) -> None:
    embed = torch.ones(130, 130)
    embed[129, 0] = 70000.0  # BF16 has it, FP16 has not
    found = examine(write(tmp_path / "m", {EMBED: embed.bfloat16(), BIAS: torch.full((4,), 1e-30)}))
    assert found["310P"]["layouts"]["fp16"]["blocks"] == 4, "F32 tensors are kept, and not counted"
    assert affected(found["310P"], "fp16") == ("lossily", 1)
    assert affected(found["310P"], "int8") == ("lossily", 1)
    assert affected(found["CPU"], "e8m0") == ("exactly", 0)
    wide = examine(write(tmp_path / "n", {NORM: torch.tensor([1.0009765625]).half()}))
    assert affected(wide["A100"], "bf16") == ("lossily", 1), "F16 has three bits more than BF16"
    assert affected(wide["310P"], "fp16") == ("exactly", 0)


def test_ascend_answers_carry_their_level(master: tuple[Path, dict[str, np.ndarray]]) -> None:
    found = examine(master[0])
    for chip in ("910B", "910C", "950PR", "950DT", "310P"):
        assert found[chip]["vendor"] == "Huawei"
        assert found[chip]["evidence"].startswith("L0: ")
    for chip, answer in found.items():
        assert json.loads(json.dumps(answer)) == answer, chip
        for form in answer["layouts"].values():
            assert form["source"]
            assert form["date"]
            assert form["certainty"]
            assert (form["blocks_affected"] is None) == (form["serves"] == "no")


def test_chips_are_found_by_the_names_people_use(master: tuple[Path, dict[str, np.ndarray]]) -> None:
    reference = examine(master[0], "910B")["910B"]
    for name in ("910B3", "Ascend 910B", "ascend910b4", "ASCEND-910B2"):
        assert examine(master[0], name) == {name: reference}
    with pytest.raises(RecipeError, match="nothing is known"):
        examine(master[0], "910A")
    with pytest.raises(RecipeError, match="did you mean 'H800'"):
        examine(master[0], "H80")


def test_int8_is_not_exact_where_no_weight_is_known_to_be_rounded(tmp_path: Path) -> None:
    """As in GPT-2, whose weights have other names: an engine rounds them, and the activations."""
    folder = write(tmp_path / "m", {"h.0.attn.c_attn.weight": torch.ones(128, 256).bfloat16()})
    found = examine(folder, "910B")["910B"]
    assert affected(found, "int8") == ("lossily", 0)
    assert "activations are rounded too" in found["layouts"]["int8"]["why"]
    assert found["recommended"] == "bf16"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["formats"]["H800"]["takes"].pop("mxfp8"), "nothing is said of mxfp8"),
        (lambda d: d["formats"]["H800"]["takes"]["bf16"].pop("source"), "'formats.H800.takes.bf16.source' is missing"),
        (lambda d: d["formats"]["H800"].update(fp9=1), "unknown key 'fp9'"),
        (lambda d: d["formats"]["H800"]["subnormals"].update(value="lost"), "'kept', 'flushed' or 'unknown'"),
        (lambda d: d.pop("formats"), "'formats' is missing"),
    ],
)
def test_wrong_facts_are_refused_with_their_place(tmp_path: Path, edit: Any, message: str) -> None:
    data = json.loads((FLEETS / "chips.json").read_text())
    edit(data)
    path = tmp_path / "chips.json"
    path.write_text(json.dumps(data, indent=1))
    with pytest.raises(RecipeError, match=message) as caught:
        chips.formats(path)
    assert str(path) in str(caught.value.where)


def test_memory_is_a_band_whatever_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    original = Reader.rows

    def spy(self: Reader, *args: Any, **more: Any) -> torch.Tensor:
        nonlocal largest
        found = original(self, *args, **more)
        largest = max(largest, found.nbytes)
        return found

    monkeypatch.setattr(Reader, "rows", spy)
    codes, scales = quantise(torch.randn(4096, 128))
    folder = write(tmp_path / "m", {UP: codes, UP + "_scale_inv": scales, EMBED: torch.randn(9000, 64).bfloat16()})
    examine(folder)
    assert 0 < largest <= 128 * 128 * 2


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    codes, scales = quantise(torch.randn(256, 128))
    folder = write(tmp_path / "m", {UP: codes, UP + "_scale_inv": scales[:1]})
    with pytest.raises(CheckpointError, match="scales of shape"):
        examine(folder)


RAGGED = {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576)}
"""SmolLM2's attention."""


@pytest.mark.parametrize(
    ("shapes", "blocked", "mxfp8"),
    [
        (RAGGED, ["transformers", "vllm", "vllm-cpu"], ["vllm-cpu"]),
        ({"q_proj": (256, 128), "o_proj": (128, 256)}, [], ["vllm-cpu"]),
        ({"o_proj": (128, 48)}, [], ["transformers", "vllm", "vllm-cpu"]),
    ],
)
def test_engines_that_refuse_the_shapes_are_named(
    tmp_path: Path, shapes: dict[str, tuple[int, int]], blocked: list[str], mxfp8: list[str]
) -> None:
    """'exact' is said of a chip; what convert --for would refuse stands beside it, by the same rules."""
    tensors = plain_tensors()
    for part, shape in shapes.items():
        name = f"model.layers.0.self_attn.{part}.weight"
        codes, scales = quantise(torch.randn(shape))
        tensors |= {name: codes, name + "_scale_inv": torch.ldexp(torch.ones(scales.shape), scales.int() - 127)}
    folder = write(tmp_path / "m", tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    found = examine(folder)
    assert affected(found["H100"], "deepseek") == ("exactly", 0)
    told = {"e8m0": blocked, "deepseek": blocked, "mxfp8": mxfp8, "bf16": [], "int8": [], "fp16": []}
    on_ascend = told | {form: [*blocked, "vllm-ascend"] for form in ("e8m0", "deepseek")}
    for chip in found.values():
        wanted = on_ascend if chip["vendor"] == "Huawei" else told
        assert {form: answer["refused_by"] for form, answer in chip["layouts"].items()} == {
            form: wanted[form] for form in chip["layouts"]
        }
    told = on_ascend
    for layout, engine in product(("e8m0", "deepseek", "mxfp8", "bf16"), ENGINES):
        args = {"source": str(folder), "out": str(tmp_path / f"{layout}-{engine}"), "layout": layout, "engine": engine}
        if engine in told[layout]:
            with pytest.raises(CheckpointError, match=f"^error: {engine} "):
                check(args)
        else:
            check(args)
    below = targets_table({chip: answer for chip, answer in found.items() if answer["vendor"] != "Huawei"}).split(
        "\n\n"
    )[1]
    assert "convert --for ENGINE" in below
    assert ("e8m0 and deepseek by transformers, vllm, vllm-cpu" in below) == bool(blocked)
    assert ("mxfp8 by vllm-cpu" in below) == (mxfp8 == ["vllm-cpu"])


def test_a_cpu_serves_every_layout_of_this_project(tmp_path: Path) -> None:
    """What the table says of CPUs is what the engine's loader does: the master's values, whatever the layout."""
    config = {"model_type": "llama", "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40}
    model = from_config(config)
    initialise(model, 1)
    tensors = {name: stored_form(item) for name, item in published(model).items()}
    source = write(tmp_path / "source", tensors)
    (source / "config.json").write_text(json.dumps(config))
    takes = chips.formats()["CPU"].takes
    expected: dict[str, Tensor] = {}
    for layout in ("e8m0", "deepseek", "mxfp8", "bf16"):
        convert({"source": str(source), "out": str(tmp_path / layout), "layout": layout})
        state = load(tmp_path / layout).state_dict()
        expected = expected or state
        assert all(torch.equal(state[name], value) for name, value in expected.items())
        assert takes[layout].value, layout  # type: ignore[index]
        assert affected(examine(tmp_path / layout, "CPU")["CPU"], layout) == ("exactly", 0)


def test_the_table_says_what_the_object_says(tmp_path: Path) -> None:
    codes, scales = quantise(torch.randn(256, 128))
    found = examine(write(tmp_path / "m", {UP: codes, UP + "_scale_inv": scales}))
    head, *lines = targets_table(found).split("\n\n")[0].splitlines()
    assert [line.split()[:2] for line in lines] == [
        [name, chip["recommended"] or "none"] for name, chip in found.items()
    ]
    start = head.index("bf16")
    for line, chip in zip(lines, found.values(), strict=True):
        word = {"exactly": "exact", "lossily": "lossy", "no": "no"}[chip["layouts"]["bf16"]["serves"]]
        assert line[start:].startswith(word)
