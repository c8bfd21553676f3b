"""`ottava verify` against a corpus of faults: each is found at its tensor and block, and none where there is none."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ottava.checkpoint import digest as digest_module
from ottava.checkpoint.convert import convert
from ottava.errors import CheckpointError, OttavaError
from ottava.verify import causes, relations, weights
from ottava.verify.causes import ALIKE, CAUSES
from ottava.verify.weights import compare, compare_folders, prove_layouts
from tests.attacks import folders
from tests.attacks.faults import EMBED, FAULTS, HEAD, NORM, Fault, Q, quantise
from tests.attacks.folders import (
    LAYOUTS,
    Coded,
    Plain,
    Stored,
    Written,
    bf16,
    dense,
    first_difference,
    from_bf16,
    save,
    written,
)

KINDS = ("llama", "qwen3_moe", "deepseek_v3")


def planted() -> Iterator[Any]:
    for fault in FAULTS:
        for layout in fault.layouts:
            yield pytest.param(fault, layout, id=f"{fault.name}-{layout}".replace(" ", "_"))


def exact_in(layout: str, fault: Fault) -> Written | None:
    """The sound folder in a layout; None where that layout cannot hold its values."""
    sound = fault.source(folders.model(fault.model))
    try:
        out = written(sound, layout, fault.shards)
    except ValueError:
        return None
    values = {name: weight.values for name, weight in sound.items()}
    return out if first_difference(dense(out.stored), values) is None else None


@pytest.mark.parametrize(("fault", "layout"), list(planted()))
def test_a_planted_fault_is_found(fault: Fault, layout: str, tmp_path: Path) -> None:
    try:
        bad = fault.plant(fault.source(folders.model(fault.model)), layout)
    except ValueError:
        pytest.skip("this layout cannot hold it")
    turned = [*LAYOUTS[len(fault.name) % 4 :], *LAYOUTS][:5]
    good = next(filter(None, (exact_in(other, fault) for other in [*turned, *LAYOUTS])))
    save(tmp_path / "good", good)
    save(tmp_path / "bad", bad)
    if fault.damage is not None:
        fault.damage(tmp_path / "bad")
    for a, b in (("good", "bad"), ("bad", "good"))[: 2 if layout == fault.layouts[0] else 1]:
        found = compare(tmp_path / a, tmp_path / b, workers=1)
        assert list(found) == ["verdict", "digest_a", "digest_b", "tensors", "first_bad"]
        assert found["verdict"] == "different"
        first, side = found["first_bad"], "ab"[b == "bad"]
        named = fault.causes if b == "bad" or not fault.name.startswith("a tensor ") else (first["cause"],)
        assert (first["tensor"], first["cause"] in named) == (fault.tensor, True), first
        assert first["cause"] in CAUSES
        assert first["faulty"] in ((side,) if fault.sure else (side, None)), first
        assert first["certain"] == (
            first["cause"] not in ("stale tensor", "stale shard", "rounded otherwise", "unknown")
        )
        assert list(first["files"]) == ["a", "b"]
        for letter, folder in (("a", a), ("b", b)):
            file = first["files"][letter]
            assert file is None if lacks(fault, folder) else Path(file).parent == tmp_path / folder
        assert first["where"] == (None if first["faulty"] is None else first["files"][first["faulty"]])
        if first["block"] is not None:
            assert first_difference(dense(good.stored), dense(bad.stored)) == (first["tensor"], first["block"])
        else:
            assert found[f"digest_{side}"] is None or fault.tensor in (NORM, HEAD) or not is_matrix(fault, good)
        assert found["digest_a" if side == "b" else "digest_b"] is not None


def lacks(fault: Fault, folder: str) -> bool:
    """Whether a folder, "good" or "bad", is the one that does not have the tensor that is named."""
    if fault.name not in ("a tied head left out", "a tensor left out", "a tensor too many"):
        return False
    return folder == ("good" if fault.causes[0] == "extra tensor" else "bad")


def is_matrix(fault: Fault, good: Written) -> bool:
    """Whether the planted fault leaves a matrix of one shape on both sides, so that a block can be named."""
    if fault.tensor not in good.stored or good.stored[fault.tensor].data.ndim < 2:
        return False
    return fault.causes[0] not in ("missing tensor", "extra tensor", "wrong shape", "tied head forgotten")


def test_the_corpus_is_large_and_every_cause_is_either_planted_or_found_elsewhere() -> None:
    assert len(FAULTS) >= 80
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    found = {cause for fault in FAULTS for cause in fault.causes}
    assert len(found) >= 40
    assert found <= set(CAUSES)
    assert set().union(*ALIKE) <= set(CAUSES)
    elsewhere = {"unknown", "lying header", "trailing bytes", "scales without codes"}
    assert set(CAUSES) - found == elsewhere


# No false alarm.


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Every model in every layout."""
    base = tmp_path_factory.mktemp("sound")
    return {
        (kind, layout): save(base / f"{kind}-{layout}", written(folders.model(kind), layout))
        for kind in KINDS
        for layout in LAYOUTS
    }


def identical(a: Path, b: Path) -> None:
    found = compare(a, b, workers=2)
    assert (found["verdict"], found["first_bad"]) == ("identical", None)
    assert found["digest_a"] == found["digest_b"]
    assert len(found["digest_a"]) == 64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("a", "b"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_no_false_alarm_over_any_pair_of_layouts(kind: str, a: str, b: str, sound: dict[Any, Path]) -> None:
    identical(sound[kind, a], sound[kind, b])
    assert compare(sound[kind, a], sound[kind, b], workers=1)["tensors"] == len(folders.model(kind))


def respelled() -> dict[str, Callable[[Written], Written]]:
    def each(change: Callable[[str, Stored], Stored]) -> Callable[[Written], Written]:
        return lambda w: dataclasses.replace(w, stored={n: change(n, item) for n, item in w.stored.items()})

    def as_type(dtype: str) -> Callable[[str, Stored], Stored]:
        kind = folders.KINDS[dtype]
        return lambda _, t: Stored(dtype, folders.from_bf16(t.data).astype(kind)) if t.dtype == "BF16" else t

    return {
        "F32 for BF16": each(as_type("F32")),
        "F64 for BF16": each(as_type("F64")),
        "U8 for F8_E8M0": each(lambda _, t: Stored("U8", t.data) if t.dtype == "F8_E8M0" else t),
        "F8_E8M0 for U8": each(lambda _, t: Stored("F8_E8M0", t.data) if t.dtype == "U8" else t),
        "BF16 scales": each(lambda _, t: Stored("BF16", bf16(t.data)) if t.dtype == "F32" and t.data.ndim > 1 else t),
        "bare names of scales": lambda w: dataclasses.replace(
            w, stored={name.replace("weight_scale_inv", "scale"): item for name, item in w.stored.items()}
        ),
        "another order": lambda w: dataclasses.replace(w, stored=dict(reversed(w.stored.items()))),
        "three shards": lambda w: dataclasses.replace(w, shards=3),
        "two shards": lambda w: dataclasses.replace(w, shards=2),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", respelled())
def test_no_false_alarm_over_spellings(name: str, layout: str, sound: dict[Any, Path], tmp_path: Path) -> None:
    kind = "deepseek_v3"
    other = respelled()[name](written(folders.model(kind), layout))
    identical(save(tmp_path / "b", other, stem="renamed", metadata={"note": name}), sound[kind, "bf16"])
    identical(sound[kind, "mxfp8"], tmp_path / "b")


def test_a_single_file_is_compared_with_a_folder(sound: dict[Any, Path]) -> None:
    identical(sound["llama", "e8m0"] / "model.safetensors", sound["llama", "bf16"])


def test_workers_do_not_matter_and_progress_is_told(sound: dict[Any, Path]) -> None:
    results, told = [], []
    for workers in (1, 2, 5):
        seen: list[tuple[int, int]] = []
        pair = sound["llama", "e8m0"], sound["llama", "bf16"]
        results.append(
            compare(*pair, workers=workers, progress=lambda done, total, seen=seen: seen.append((done, total)))
        )
        told.append(seen)
    assert results[0] == results[1] == results[2]
    for seen in told:
        totals = {total for _, total in seen}
        assert len(totals) == 1
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1][0] == totals.pop()


def test_every_layout_is_proven_and_removed(sound: dict[Any, Path], tmp_path: Path) -> None:
    proof = prove_layouts({"folder": str(sound["llama", "e8m0"]), "scratch": str(tmp_path / "scratch")})
    assert proof["equal"]
    assert set(proof["layouts"]) == set(LAYOUTS)
    assert set(proof["layouts"].values()) == {proof["digest"]}
    assert list((tmp_path / "scratch").iterdir()) == []


# Any damage.


def small(layout: str) -> Written:
    """A few tensors of each kind, with a block of zeros, whose scale stands for nothing."""
    rng = np.random.default_rng(5)
    linear = folders.coded(rng, 300, 160)
    linear.codes[:128, :128] = 0
    linear.codes[7, 7] = 0x80
    model: folders.Model = {
        Q: linear,
        "model.layers.0.mlp.experts.0.up_proj.weight": folders.coded(rng, 40, 33),
        NORM: Plain(folders.from_bf16(bf16(rng.normal(size=19)))),
        "model.layers.0.mlp.gate.e_score_correction_bias": Plain(
            rng.normal(size=3).astype(np.float32).astype(float), "F32"
        ),
        EMBED: Plain(folders.from_bf16(bf16(rng.normal(size=(5, 4))))),
    }
    return written(model, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damaged_byte_is_found(layout: str, tmp_path: Path, data: st.DataObject) -> None:
    good, bad = small(layout), small(layout)
    name = data.draw(st.sampled_from(sorted(bad.stored)))
    item = bad.stored[name]
    item.data = np.array(item.data)
    raw = item.data.reshape(-1).view(np.uint8)
    change = data.draw(st.integers(1, 255))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= change
    save(tmp_path / "a", small(data.draw(st.sampled_from(LAYOUTS))))
    save(tmp_path / "b", bad)
    pair = [tmp_path / "a", tmp_path / "b"]
    swapped = data.draw(st.booleans())
    found = compare(*(pair[::-1] if swapped else pair), workers=1)
    expected = first_difference(dense(good.stored), dense(bad.stored))
    if expected is None:  # the scale of a block of zeros
        assert found["verdict"] == "identical"
        return
    first = found["first_bad"]
    assert (first["tensor"], first["block"]) == expected
    assert first["faulty"] in (None, "a" if swapped else "b"), first
    if change.bit_count() == 1 and first["cause"] != "scale is not a number":
        assert first["cause"] in ("flipped bit", *hidden(first["tensor"], layout))


def hidden(tensor: str, layout: str) -> tuple[str, ...]:
    """What else a flipped bit may look like: in a grid of one column, the last row's scale is the whole last row."""
    return ("scale row lost", "one scale changed") if tensor != NORM and layout != "bf16" else ()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    layout=st.sampled_from(LAYOUTS),
    names=st.sets(st.sampled_from([Q, EMBED, NORM]), min_size=1),
)
def test_random_damage_is_placed_and_not_explained(seed: int, layout: str, names: set[str], tmp_path: Path) -> None:
    """Several bytes in several tensors: the first by name is reported, and no cause is made up."""
    good, bad, rng = small(layout), small(layout), np.random.default_rng(seed)
    for name in names:
        item = bad.stored[name]
        item.data = np.array(item.data)
        places = rng.choice(item.data.size, 6, replace=False)
        item.data.reshape(-1)[places] ^= rng.integers(3, 60, 6).astype(item.data.dtype)
    found = compare(save(tmp_path / "a", good), save(tmp_path / "b", bad), workers=1)["first_bad"]
    assert (found["tensor"], found["block"]) == first_difference(dense(good.stored), dense(bad.stored))
    assert found["cause"] in ("unknown", "NaN or infinity introduced", "stale tensor")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_are_recognised_where_no_rule_chose_them(layout: str, tmp_path: Path) -> None:
    """After rounding with calibration a block's scale is no function of its values: the other side's codes tell it."""
    rng = np.random.default_rng(8)
    codes = rng.integers(0, 0x40, (576, 192)).astype(np.uint8)  # no value above 2
    factors = np.exp2(rng.permutation(10).reshape(5, 2).astype(float) - 12)
    wrong = factors.copy()
    wrong[-1] = 1
    model: folders.Model = {**folders.model("llama"), Q: Coded(codes, factors)}
    bad: folders.Model = {**model, Q: Coded(codes, wrong)}
    for other in ("e8m0", "bf16") if layout != "bf16" else ("e8m0",):
        pair = save(tmp_path / other, written(model, other)), save(tmp_path / "b", written(bad, layout))
        found = compare(*pair, workers=1)["first_bad"]
        assert (found["tensor"], found["cause"], found["faulty"]) == (Q, "scale row lost", "b")


def test_scales_that_are_no_powers_of_two(tmp_path: Path) -> None:
    """DeepSeek-V3's F32 scales have exact values as well, and faults in them are recognised."""
    rng = np.random.default_rng(2)
    model = folders.model("deepseek_v3")
    for name, weight in model.items():
        if isinstance(weight, Coded):
            model[name] = Coded(weight.codes, weight.factors * np.float32(rng.uniform(1, 2)).astype(float))
    good = written(model, "deepseek")
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    identical(save(tmp_path / "a", good), save(tmp_path / "c", dataclasses.replace(good, shards=3)))
    wrong = model[name].factors.copy()
    wrong[-1] = 1
    bad = written({**model, name: Coded(model[name].codes, wrong)}, "deepseek")
    found = compare(tmp_path / "a", save(tmp_path / "b", bad), workers=1)["first_bad"]
    assert (found["tensor"], found["block"], found["cause"]) == (name, [4, 0], "scale row lost")
    rounded = folders.spell(name, Coded(*quantise(model[name].values, "464")), "e8m0")
    bad = dataclasses.replace(good, stored={n: t for n, t in good.stored.items() if not n.startswith(name)})
    bad.stored |= rounded
    found = compare(tmp_path / "a", save(tmp_path / "d", bad), workers=1)["first_bad"]
    assert (found["tensor"], found["cause"]) == (name, "rounded onto the grid")


@pytest.mark.parametrize("bit", [0, 3, 5, 7])
def test_packed_fp4_is_compared_with_its_values(bit: int, tmp_path: Path) -> None:
    """DeepSeek-V4's experts: two E2M1 codes a byte, the first in its low half, a scale for each 1x32."""
    rng = np.random.default_rng(4)
    packed = rng.integers(0, 256, (160, 96)).astype(np.uint8)
    packed[5, 7] = 0x21
    scales = rng.integers(118, 124, (160, 6)).astype(np.uint8)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    exact = np.stack([table[packed & 15], table[packed >> 4]], -1).reshape(160, 192) * np.exp2(
        scales.astype(float) - 127
    ).repeat(32, 1)
    name = "layers.0.ffn.experts.0.w1"
    fp4 = {name + ".weight": Stored("I8", packed.view(np.int8)), name + ".scale": Stored("F8_E8M0", scales)}
    plain = save(tmp_path / "b", Written({name + ".weight": Stored("BF16", bf16(exact))}))
    identical(save(tmp_path / "a", Written(fp4)), plain)
    packed[5, 7] ^= 1 << bit
    found = compare(save(tmp_path / "c", Written(fp4)), plain, workers=1)["first_bad"]
    assert (found["tensor"], found["block"], found["cause"]) == (name + ".weight", [0, 0], "flipped bit")
    packed[5, 7] ^= 1 << bit
    scales[130, 5] ^= 1
    found = compare(tmp_path / "a", save(tmp_path / "d", Written(fp4)), workers=1)["first_bad"]
    assert (found["tensor"], found["block"]) == (name + ".weight", [1, 1])
    assert found["cause"] in ("flipped bit", "one scale changed", "unknown")


def test_the_digest_on_record_says_which_side_is_faulty(tmp_path: Path) -> None:
    """A flipped bit looks alike from both sides; conversion.json knows what was written."""
    flip = next(fault for fault in FAULTS if fault.name == "a bit of a weight")
    sound = folders.model("llama")
    a, b = save(tmp_path / "a", written(sound, "e8m0")), save(tmp_path / "b", flip.plant(sound, "e8m0"))
    first = compare(a, b, workers=1)
    assert first["first_bad"]["faulty"] is None
    for name, expected in (("digest_a", "b"), ("digest_b", "a")):
        for folder in (a, b):
            (folder / "conversion.json").write_text(json.dumps({"digest": first[name]}))
            found = compare(a, b, workers=1)["first_bad"]
            assert (found["faulty"], found["cause"]) == (expected, "flipped bit")
            (folder / "conversion.json").unlink()
    for nonsense in ("{", "[]", '{"digest": 3}', "[" * 100_000):
        (a / "conversion.json").write_text(nonsense)
        assert compare(a, b, workers=1) == first
    (a / "conversion.json").unlink()
    os.mkfifo(a / "conversion.json")
    assert compare(a, b, workers=1) == first


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", ["rounded", "lossy"])
def test_a_model_is_not_faulty_because_its_conversion_is_rounded(source: str, layout: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    model: folders.Model = {
        name: Plain(from_bf16(bf16(rng.normal(size=found.values.shape)))) if isinstance(found, Coded) else found
        for name, found in folders.model("llama").items()
    }
    if source == "lossy":
        model = folders.model("llama")
        model[Q] = Coded(model[Q].codes, model[Q].factors * float(np.float32(1.1)))
    save(tmp_path / "a", written(model, "bf16" if source == "rounded" else "deepseek"))
    (tmp_path / "a" / "config.json").write_text('{"model_type": "llama"}')
    args = {"source": str(tmp_path / "a"), "out": str(tmp_path / "b"), "layout": layout, "allow_lossy": True}
    assert convert(args)["label"] == source
    for a, b in ("ab", "ba"):
        found = compare(tmp_path / a, tmp_path / b, workers=1)["first_bad"]
        assert (found["cause"], found["faulty"]) == ("rounded onto the grid", "a" if a == "b" else "b")
        assert Path(found["where"]).parent == tmp_path / "b"
    if layout == "e8m0":  # a copy that has this record, and not these values, is faulty; whatever its values look like
        save(tmp_path / "c", written(folders.model("llama", 1), "e8m0"))
        (tmp_path / "c" / "conversion.json").write_bytes((tmp_path / "b" / "conversion.json").read_bytes())
        assert compare(tmp_path / "b", tmp_path / "c", workers=1)["first_bad"]["faulty"] == "b"


@pytest.mark.parametrize("label", ["rounded", None])
def test_likeness_accuses_nobody(label: str | None, tmp_path: Path) -> None:
    """A rounding with calibration is not the plain rule's: it resembles its source, and the source is off the grid."""
    rng = np.random.default_rng(3)
    sound = folders.model("llama")
    off = sound[Q].values * (1 + 0.05 * rng.normal(size=sound[Q].values.shape))
    a = save(tmp_path / "a", written({**sound, Q: Plain(from_bf16(bf16(off)))}, "bf16"))
    b = save(tmp_path / "b", written(sound, "e8m0"))
    if label is not None:
        (b / "conversion.json").write_text(json.dumps({"label": label, "digest": compare(a, b)["digest_b"]}))
    for pair in ((a, b), (b, a)):
        found = compare(*pair, workers=1)["first_bad"]
        assert (found["tensor"], found["cause"], found["faulty"]) == (Q, "stale tensor", None)


@pytest.mark.parametrize(
    ("factor", "expected"), [(1.015625, "rounded onto the grid"), (1.09375, "one value overwritten")]
)
def test_one_value_off_the_grid_does_not_make_the_original_faulty(factor: float, expected: str, tmp_path: Path) -> None:
    """The plain rule takes a power of two times 1 + 1/64 back to it, and times 1 + 3/32 to its neighbour."""
    sound = folders.model("llama")
    codes = sound[Q].codes.copy()
    codes[3, 7] = 0x50
    sound[Q] = Coded(codes, sound[Q].factors)
    off = sound[Q].values.copy()
    off[3, 7] *= factor
    a = save(tmp_path / "a", written({**sound, Q: Plain(from_bf16(bf16(off)))}, "bf16"))
    b = save(tmp_path / "b", written(sound, "bf16"))
    (b / "conversion.json").write_text(json.dumps({"label": "rounded", "digest": compare(a, b)["digest_b"]}))
    found = compare(a, b, workers=1)["first_bad"]
    assert (found["cause"], found["faulty"]) == (expected, "b" if expected.startswith("rounded") else None)


def test_a_conversion_on_record_that_rounded_nothing_is_believed(tmp_path: Path) -> None:
    sound = folders.model("llama")
    moved = sound[Q].values * (1 + 0.05 * np.random.default_rng(3).normal(size=sound[Q].values.shape))
    a = save(tmp_path / "a", written({**sound, Q: Plain(from_bf16(bf16(moved)))}, "bf16"))
    b = save(tmp_path / "b", written(sound, "e8m0"))
    (b / "conversion.json").write_text(json.dumps({"label": "on-grid", "digest": compare(a, b)["digest_b"]}))
    assert compare(a, b, workers=1)["first_bad"]["faulty"] == "a"


@pytest.mark.parametrize("value", [3.0, -1.0, np.inf, 0.0])
def test_one_f32_scale_of_any_value(value: float, tmp_path: Path) -> None:
    sound = folders.model("llama")
    bad = written(sound, "deepseek")
    scales = bad.stored[Q + "_scale_inv"]
    scales.data = scales.data.copy()
    scales.data[1, 0] = value
    found = compare(save(tmp_path / "a", written(sound, "e8m0")), save(tmp_path / "b", bad), workers=1)["first_bad"]
    assert (found["tensor"], found["block"], found["cause"]) == (Q, [1, 0], "one scale changed")
    assert "any number" in CAUSES["one scale changed"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_few_values_a_step_away_are_no_other_rounding(layout: str, tmp_path: Path) -> None:
    sound, rng = folders.model("llama"), np.random.default_rng(4)
    bad = dict(sound)
    for name, found in sound.items():
        if isinstance(found, Coded):
            step = (rng.random(found.codes.shape) < 0.02) & ((found.codes & 0x7F) < 0x7D)
            bad[name] = Coded(found.codes + step.astype(np.uint8), found.factors)
    pair = save(tmp_path / "a", written(sound, "bf16")), save(tmp_path / "b", written(bad, layout))
    found = compare(*pair, workers=1)["first_bad"]
    assert (found["cause"], found["certain"], found["faulty"], found["where"]) == ("unknown", False, None, None)


def test_a_tensor_that_lacks_beside_one_that_differs(tmp_path: Path) -> None:
    """Which tensors differ is asked of names that only one folder has, too."""
    stale = next(fault for fault in FAULTS if fault.name == "a tensor of an earlier step")
    sound = folders.model("llama")
    less = {name: found for name, found in sound.items() if name != NORM}
    a = save(tmp_path / "a", written(less, "e8m0"))
    b = save(tmp_path / "b", stale.plant(sound, "e8m0"))
    for pair in ((a, b), (b, a)):
        found = compare(*pair, workers=1)["first_bad"]
        assert (found["tensor"], found["cause"], found["certain"]) == (Q, "stale tensor", False)


def test_causes_by_likeness_say_so() -> None:
    assert not any(causes.certain(cause) for cause in (*causes.BY_LIKENESS, "unknown"))
    assert {cause for cause, meaning in CAUSES.items() if meaning.startswith("by likeness")} == set(causes.BY_LIKENESS)


# What is no verdict.


@pytest.mark.parametrize("fault", [RuntimeError, OSError, MemoryError, KeyError, AssertionError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (weights, "weights"), (weights, "digests"), (weights, "model_digest"), (digest_module, "exact_rows"),
        (weights, "observe"), (causes, "HYPOTHESES"), (relations, "rows"), (weights, "_block"), (weights, "_recorded"),
    ],
)  # fmt: skip
def test_an_exception_is_never_a_verdict(
    module: Any, name: str, fault: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = small("e8m0"), small("e8m0")
    bad.stored[EMBED].data = bad.stored[EMBED].data[::-1] ^ np.arange(4, dtype=np.uint16)
    pair = save(tmp_path / "a", good), save(tmp_path / "b", bad)
    assert compare(*pair, workers=1)["first_bad"]["cause"] == "unknown"

    def fail(*_: Any, **__: Any) -> Any:
        raise fault("planted")

    monkeypatch.setattr(module, name, [("zeroed tensor", fail)] if name == "HYPOTHESES" else fail)
    with pytest.raises(fault):
        compare(*pair, workers=1)


def test_errors_of_a_reader_that_name_no_tensor_are_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = save(tmp_path / "a", small("e8m0")), save(tmp_path / "b", small("bf16"))

    def fail(*_: Any, **__: Any) -> Any:
        raise CheckpointError("planted")

    monkeypatch.setattr(weights, "digests", fail)
    with pytest.raises(CheckpointError, match="planted"):
        compare(*pair, workers=1)


def broken() -> dict[str, Callable[[Path], object]]:
    def index(weight_map: Any) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            (folder / "model.safetensors").rename(folder / "x.safetensors")
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

        return change

    def header(text: bytes) -> Callable[[Path], object]:
        return lambda folder: (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)

    def stray(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        save(folder, dataclasses.replace(small("e8m0"), shards=3))
        (folder / "model-00001-of-00002.safetensors").write_bytes(b"stale")

    def pipe(name: str) -> Callable[[Path], object]:
        return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))

    return {
        "no such folder": lambda folder: (folder / "model.safetensors").unlink(),
        "a shard that the index leaves out": stray,
        "a pipe": pipe("model.safetensors"),
        "an empty file": lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "a garbage header": header(b"\xff\xfe garbage"),
        "a list for a header": header(b"[]"),
        "a huge header": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}"),
        "an index that leaves the folder": index({EMBED: "../a/model.safetensors"}),
        "an index without a map": index({}),
        "an index that is no text": index({EMBED: 3}),
    }


@pytest.mark.parametrize("name", broken())
def test_a_folder_that_cannot_be_read_is_an_error(name: str, tmp_path: Path) -> None:
    save(tmp_path / "a", small("e8m0"))
    broken()[name](save(tmp_path / "b", small("e8m0")))
    for pair in (("a", "b"), ("b", "a"), ("b", "b")):
        with pytest.raises(OttavaError) as caught:
            compare(*(tmp_path / side for side in pair), workers=1)
        assert caught.value.exit_code == 2


def test_damage_on_both_sides_is_reported_of_the_first_tensor(tmp_path: Path) -> None:
    a, b = small("e8m0"), small("mxfp8")
    del a.stored[Q + "_scale_inv"]
    expert = "model.layers.0.mlp.experts.0.up_proj.weight"
    b.stored[expert + "_scale"].data = b.stored[expert + "_scale"].data[:-1]
    pair = save(tmp_path / "a", a), save(tmp_path / "b", b)
    found = compare(*pair, workers=1)
    assert (found["digest_a"], found["digest_b"]) == (None, None)
    assert (found["first_bad"]["tensor"], found["first_bad"]["faulty"]) == (expert, "b")
    assert compare(*pair[::-1], workers=1)["first_bad"]["faulty"] == "a"


def test_scales_without_codes(tmp_path: Path) -> None:
    bad = small("e8m0")
    del bad.stored[Q]
    found = compare(save(tmp_path / "a", small("bf16")), save(tmp_path / "b", bad), workers=1)["first_bad"]
    assert (found["tensor"], found["cause"]) == (Q, "scales without codes")


def test_a_folder_that_changes_under_the_reader(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", small("e8m0")), save(tmp_path / "b", small("bf16"))

    def meddle(done: int, total: int) -> None:
        if done == total:
            save(tmp_path / "b", small("deepseek"))

    with pytest.raises(CheckpointError, match="changed while it was read"):
        compare(a, b, workers=1, progress=meddle)


def test_a_stages_worker_is_told_what_differs(tmp_path: Path) -> None:
    bad = small("e8m0")
    bad.stored[NORM].data = bad.stored[NORM].data + np.uint16(1)
    pair = {"a": str(save(tmp_path / "a", small("bf16"))), "b": str(save(tmp_path / "b", bad))}
    found = compare_folders(pair)
    assert (found["equal"], found["different"]) == (False, [NORM])
    assert compare_folders({"a": pair["a"], "b": pair["a"]})["equal"]
