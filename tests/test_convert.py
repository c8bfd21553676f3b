"""The converter: going on after kills, exact respelling of every format that is read, overlays, refusals, memory."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ottava.checkpoint import convert as converter
from ottava.checkpoint import resume, spelling, stream
from ottava.checkpoint.convert import convert
from ottava.checkpoint.digest import digests, values_digest
from ottava.checkpoint.layouts import LAYOUTS
from ottava.checkpoint.names import storage_of
from ottava.checkpoint.resume import LOG, part_of
from ottava.checkpoint.safetensors import SINGLE, entries, load, plan_of, read, write, write_folder
from ottava.errors import Busy, CheckpointError, FormatError, OttavaError, ResourceError
from ottava.fp8.codec import dequantise, project, quantise

LAYER = "model.layers.0.mlp."
UP, DOWN = LAYER + "up_proj.weight", LAYER + "down_proj.weight"
EMBED = "model.embed_tokens.weight"
F8, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def save(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    write(folder / SINGLE, tensors.items())
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return folder


def run(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    return convert({"source": str(source), "out": str(out), **options})


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def model(layers: int = 6, side: int = 300) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {EMBED: torch.randn(500, 64).bfloat16(), "model.norm.weight": torch.randn(64).bfloat16()}
    for i in range(layers):
        tensors[f"model.layers.{i}.mlp.up_proj.weight"] = torch.randn(side, side + i).bfloat16()
        tensors[f"model.layers.{i}.mlp.down_proj.weight"] = torch.randn(side + i, side)
    return tensors


# Kills.


def in_a_child(work: Callable[[], object]) -> int:
    """Fork, do the work there, leave without ceremony."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def test_killed_at_any_moment_it_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "s"
    tensors = model(layers=24)
    save(source, {})
    (source / SINGLE).unlink()
    write_folder(source, plan_of(tensors), tensors.items(), shard_bytes=2_000_000)
    options: dict[str, Any] = {"shard_bytes": 1_500_000, "workers": 2}
    run(source, tmp_path / "whole", **options)
    wanted = files_of(tmp_path / "whole")
    monkeypatch.setattr(converter, "GROUP_BYTES", 0)  # every weight is noted as soon as it is done
    monkeypatch.setattr(stream, "UNIT", 1)
    rng = random.Random(time.time_ns())
    went_on = kills = 0
    for _ in range(3):
        out = tmp_path / "out"
        limit = 0.02
        while True:
            went_on += (out.with_name("out.part") / LOG).exists()
            child = in_a_child(lambda out=out: run(source, out, **options))
            time.sleep(rng.uniform(0, limit))
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert status == 0 or out.exists(), "it refused what a kill had left"
                break
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            kills += os.WIFSIGNALED(status)
            limit *= 1.3
        assert files_of(out) == wanted
        assert names_in(tmp_path) == ["out", "s", "whole"]
        shutil.rmtree(out)
    assert kills >= 3
    assert went_on


def test_stopped_while_it_gets_its_name(tmp_path: Path) -> None:
    """The last calls of a conversion, each one the last that happens: no leftover is taken for somebody else's."""
    source, out = save(tmp_path / "s", model(layers=1)), tmp_path / "out"
    run(source, tmp_path / "whole")
    wanted = files_of(tmp_path / "whole")
    ends = []
    for last in range(100):
        left = last
        real = {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}

        def counted(name: str, *args: Any, real: Mapping[str, Any] = real, **more: Any) -> Any:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return real[name](*args, **more)

        with pytest.MonkeyPatch.context() as patch:
            for name in real:
                patch.setattr(os, name, partial(counted, name))
            try:
                run(source, out)
            except KeyboardInterrupt:
                ends.append("out" if out.exists() else "part")
            else:
                break
        if out.exists():
            with pytest.raises(CheckpointError, match="not empty"):
                run(source, out)
        else:
            run(source, out)
        assert files_of(out) == wanted
        assert names_in(tmp_path) == ["out", "s", "whole"]
        shutil.rmtree(out)
    assert {"part", "out"} == set(ends)


def test_stopped_while_a_failure_is_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = save(tmp_path / "s", model(layers=1)), tmp_path / "out"
    assert stopped(source, out, 1, monkeypatch)

    def fail(done: int, total: int) -> None:
        raise CheckpointError("a fault")

    real, seen = Path.unlink, []

    def once(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name == "out.part" and seen:
            raise KeyboardInterrupt
        seen.append(path.name)
        real(path, missing_ok=missing_ok)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", once)
        with pytest.raises(KeyboardInterrupt):
            convert({"source": str(source), "out": str(out)}, fail)
    assert seen
    assert LOG in names_in(tmp_path / "out.part")
    assert run(source, out)["tensors"] == len(model(layers=1))


def stopped(source: Path, out: Path, after: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[str]:
    """Interrupt a conversion after some units; the weights that its log names."""
    calls = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(converter, "GROUP_BYTES", 0)
        with pytest.raises(KeyboardInterrupt):
            convert({"source": str(source), "out": str(out), "workers": 1, **options}, interrupt)
    lines = (out.with_name(out.name + ".part") / LOG).read_text().splitlines()[1:]
    return [json.loads(line)["name"] for line in lines]


def touched(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> set[str]:
    """Convert; the weights that were read."""
    seen: set[str] = set()

    def watched(reader: Any, task: Any, unit: Any) -> Any:
        seen.add(task.weight.name)
        return spelling.convert_unit(reader, task, unit)

    with monkeypatch.context() as patch:
        patch.setattr(converter, "convert_unit", watched)
        run(source, out, **options)
    return seen


def test_finished_weights_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = model()
    source = save(tmp_path / "s", tensors)
    run(source, tmp_path / "whole")
    logged = stopped(source, tmp_path / "out", 5, monkeypatch)
    assert len(logged) == 5
    with (tmp_path / "out.part" / LOG).open("ab") as log:
        log.write(b'{"name":"model.layers.5.mlp.up_proj.weight","ha')  # torn by the kill
    again = stopped(source, tmp_path / "out", 3, monkeypatch)
    assert again[:5] == logged
    assert len(again) == 8
    assert touched(source, tmp_path / "out", monkeypatch) == set(tensors) - set(again)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("change", ["options", "source", "file", "log"])
def test_another_task_starts_anew(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = model()
    source = save(tmp_path / "s", tensors)
    assert stopped(source, tmp_path / "out", 5, monkeypatch)
    part, options = tmp_path / "out.part", {}
    if change == "options":
        options = {"layout": "mxfp8"}
    elif change == "source":
        write(source / SINGLE, (tensors | {UP: tensors[UP] + 1}).items())
    elif change == "file":
        (part / SINGLE).unlink()
    else:
        (part / LOG).write_bytes(b"{}\n" + (part / LOG).read_bytes())
    assert touched(source, tmp_path / "out", monkeypatch, **options) == set(tensors)
    run(source, tmp_path / "whole", **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    "line",
    [b'{"name":"%s"}', b"3", b'{"name":"%s","hash":"zz","changed":0,"signal":1.0,"noise":0.0}', b'["%s"]'],
)
def test_a_log_with_lines_of_another_kind_is_not_believed(
    line: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = model()
    source = save(tmp_path / "s", tensors)
    assert stopped(source, tmp_path / "out", 5, monkeypatch)
    with (tmp_path / "out.part" / LOG).open("ab") as log:
        log.write(line.replace(b"%s", UP.encode()) + b"\n")
    assert touched(source, tmp_path / "out", monkeypatch) == set(tensors)
    run(source, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_full_disk_costs_no_finished_weights(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = model()
    source = save(tmp_path / "s", tensors)
    logged = stopped(source, tmp_path / "out", 5, monkeypatch)

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if when == "before":
            patch.setattr(resume, "SPARE", 1 << 62)
        else:
            patch.setattr(os, "pwrite", full)
        with pytest.raises(ResourceError):
            run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert touched(source, tmp_path / "out", monkeypatch) == set(tensors) - set(logged)
    run(source, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_other_failures_of_a_resumed_run_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "s", model())
    assert stopped(source, tmp_path / "out", 5, monkeypatch)

    def fail(done: int, total: int) -> None:
        raise CheckpointError("a fault")

    with pytest.raises(CheckpointError, match="a fault"):
        convert({"source": str(source), "out": str(tmp_path / "out")}, fail)
    assert names_in(tmp_path) == ["s"]


def test_two_converters_exclude_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "s", model())
    with part_of(tmp_path / "out") as held:
        held.begin({}, {})
        for _ in range(2):
            with pytest.raises(Busy, match="another conversion"):
                run(source, tmp_path / "out")
            assert (tmp_path / "out.part" / LOG).exists()
    assert names_in(tmp_path / "out") == []
    assert run(source, tmp_path / "out")["tensors"] == len(model())


def test_the_lock_of_a_folder_that_was_renamed_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other converter finishes between our opening of OUT.part and our lock."""
    real, renamed = os.open, False

    def racing(path: Any, *rest: Any, **more: Any) -> int:
        nonlocal renamed
        descriptor = real(path, *rest, **more)
        if not renamed:
            renamed = True
            (tmp_path / "out.part").rename(tmp_path / "elsewhere")
        return descriptor

    monkeypatch.setattr(resume.os, "open", racing)
    with part_of(tmp_path / "out") as part:
        part.begin({}, {})
        assert part.folder.exists()
    assert names_in(tmp_path / "elsewhere") == []


# Space, and sources that change.


def test_the_disk_is_asked_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "s", model())
    real = os.statvfs(tmp_path)

    class Small:
        f_blocks, f_bavail, f_frsize = 1000, 20, real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda path: Small)
    with pytest.raises(ResourceError, match=f"{20 * real.f_frsize:,} are free") as caught:
        run(source, tmp_path / "out")
    size = sum(entry.end - entry.start for entry in entries(source).values())
    needs = int(str(caught.value).split("needs ")[1].split(" ")[0].replace(",", ""))
    assert size / 4 < needs < size + resume.SPARE
    assert names_in(tmp_path) == ["s"]


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "s", model())
    for allowed in (0, 1, 7):
        real, left = os.pwrite, [allowed]

        def full(*args: Any, real: Any = real, left: list[int] = left) -> int:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(real(*args))

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(ResourceError, match="disk full"):
                run(source, tmp_path / "out")
        assert names_in(tmp_path) == ["s"]


@pytest.mark.parametrize("change", ["more", "time", "companion", "another"])
def test_a_folder_that_is_being_written_is_refused(change: str, tmp_path: Path) -> None:
    source = save(tmp_path / "s", model())

    def touch(done: int, total: int) -> None:
        if done == total:
            if change == "more":
                with (source / SINGLE).open("ab") as file:
                    file.write(b"x")
            elif change == "time":
                os.utime(source / SINGLE)
            else:
                (source / {"companion": "tokenizer.json", "another": "model-2.safetensors"}[change]).write_text("{}")

    with pytest.raises(CheckpointError, match="being written"):
        convert({"source": str(source), "out": str(tmp_path / "out")}, touch)
    assert names_in(tmp_path) == ["s"]


def test_a_source_that_shrinks_names_its_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "s", model())
    real = converter._plan

    def shrinking(*args: Any) -> Any:
        plan = real(*args)
        os.truncate(source / SINGLE, (source / SINGLE).stat().st_size - 1)
        return plan

    monkeypatch.setattr(converter, "_plan", shrinking)
    with pytest.raises(CheckpointError, match="cut short while") as caught:
        run(source, tmp_path / "out")
    assert caught.value.tensor is not None
    assert names_in(tmp_path) == ["s"]


# What is written does not depend on how the work is cut.


def test_files_do_not_depend_on_workers_units_or_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = model() | {"wide": torch.randn(1, 20_000), "bias.e_score_correction_bias": torch.randn(20_000)}
    tensors |= {
        "ids": torch.arange(20_000),
        "exact": torch.randn(3, 9_000).bfloat16(),
        "half": torch.randn(9_000).half(),
    }
    source = save(tmp_path / "s", tensors)
    first = run(source, tmp_path / "a", workers=1)
    wanted = files_of(tmp_path / "a")
    for workers in (2, 5):
        assert run(source, tmp_path / f"{workers}", workers=workers) == first
        assert files_of(tmp_path / f"{workers}") == wanted
    for module in (stream, spelling):
        monkeypatch.setattr(module, "LARGEST", 10_000)
    monkeypatch.setattr("ottava.checkpoint.digest.LARGEST", 10_000)
    monkeypatch.setattr(stream, "UNIT", 10_000)
    assert run(source, tmp_path / "pieces") == first
    assert files_of(tmp_path / "pieces") == wanted
    assert values_digest(tmp_path / "pieces") == first["digest"]


def test_progress_counts_the_bytes_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "s", model())
    seen: list[tuple[int, int]] = []
    total = sum(entry.end - entry.start for entry in entries(source).values())
    convert({"source": str(source), "out": str(tmp_path / "out")}, lambda done, of: seen.append((done, of)))
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    logged = stopped(source, tmp_path / "again", 5, monkeypatch)
    seen.clear()
    convert({"source": str(source), "out": str(tmp_path / "again")}, lambda done, of: seen.append((done, of)))
    already = sum(entry.end - entry.start for name, entry in entries(source).items() if name in logged)
    assert seen[0][0] > already > 0
    assert seen[-1] == (total, total)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([1, 3, 127, 128, 129, 192, 300, 576]),
    st.sampled_from([1, 31, 32, 33, 128, 160, 257, 576]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_layouts_over_shapes(tmp_path: Path, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Every layout holds the values of the reference, whatever the raggedness, and leads to every other."""
    for name in names_in(tmp_path):
        shutil.rmtree(tmp_path / name)
    w = (torch.randn(rows, columns) * torch.exp(torch.randn(rows, 1))).to(dtype)
    codes, scales = quantise(w)
    bf16 = save(tmp_path / "wanted", {UP: dequantise(codes, scales).bfloat16()})
    source = save(tmp_path / "s", {UP: w})
    reports = {layout: run(source, tmp_path / layout, layout=layout) for layout in LAYOUTS}
    assert {report["digest"] for report in reports.values()} == {values_digest(bf16)}
    for layout in LAYOUTS:
        assert values_digest(tmp_path / layout) == values_digest(bf16)
        back = run(tmp_path / layout, tmp_path / f"{layout} back", layout="e8m0", exact=True)
        assert back["label"] == "on-grid"
        assert files_of(tmp_path / f"{layout} back")[SINGLE] == files_of(tmp_path / "e8m0")[SINGLE]
    out = {name: load(entry) for name, entry in entries(tmp_path / "e8m0").items()}
    assert torch.equal(out[UP].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(out[UP + "_scale_inv"].view(torch.uint8), scales)
    assert torch.equal(read(tmp_path / "bf16", UP), read(bf16, UP))


# Sources that were quantised by others.


def test_other_scales_are_refused_unless_told(tmp_path: Path) -> None:
    """DeepSeek-V3: any F32 scales. The result is the nearest grid to the exact values, in every layout."""
    torch.manual_seed(0)
    codes, scales = torch.randn(300, 200).to(F8), torch.rand(3, 2) + 0.1
    norm = torch.randn(4).bfloat16()
    source = save(tmp_path / "s", {UP: codes, UP + "_scale_inv": scales, "model.norm.weight": norm})
    for layout in LAYOUTS:
        with pytest.raises(CheckpointError, match="no power of two") as caught:
            run(source, tmp_path / "out", layout=layout)
        assert caught.value.tensor == UP
    assert names_in(tmp_path) == ["s"]
    value = codes.double() * scales.double().repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    wanted = dequantise(*quantise(value.float()))
    reports = [run(source, tmp_path / layout, layout=layout, allow_lossy=True) for layout in LAYOUTS]
    assert {(report["label"], report["rounded"], report["on_grid"]) for report in reports} == {("lossy", 1, False)}
    assert len({report["digest"] for report in reports}) == 1
    assert torch.equal(read(tmp_path / "bf16", UP).float(), wanted)
    noise = ((wanted.double() - value) ** 2).sum()
    sqnr = float(10 * torch.log10((value**2).sum() / noise))
    assert reports[0]["sqnr_db"] == pytest.approx(sqnr, abs=0.01)


def test_other_scales_whose_values_lie_on_the_grid_are_exact(tmp_path: Path) -> None:
    """One scale of 1.5 on codes that are powers of two, and one below the window above zeros."""
    codes = torch.ones(130, 130).to(F8)
    scales = torch.tensor([[1.5, 2.0**-127], [1.0, 2.0**-100]])
    source = save(tmp_path / "s", {UP: codes, UP + "_scale_inv": scales})
    reports = {layout: run(source, tmp_path / layout, layout=layout, allow_lossy=True) for layout in LAYOUTS}
    assert reports["bf16"]["label"] == "on-grid"  # 2**-127 is a BF16 value
    assert reports["e8m0"]["label"] == "lossy"  # but no code stands for it: the least scale byte is 10
    codes[:128, 128:] = 0
    source = save(tmp_path / "t", {UP: codes, UP + "_scale_inv": scales})
    for layout in LAYOUTS:
        report = run(source, tmp_path / f"t {layout}", layout=layout)
        assert (report["label"], report["digest"]) == ("on-grid", values_digest(source))


def test_values_that_float32_loses_are_not_taken_for_zeros(tmp_path: Path) -> None:
    codes = torch.full((4, 4), 2.0**-9).to(F8)
    source = save(tmp_path / "s", {UP: codes, UP + "_scale_inv": torch.full((1, 1), 2.0**-149)})
    with pytest.raises(CheckpointError, match="no power of two from"):
        run(source, tmp_path / "out")
    assert run(source, tmp_path / "out", allow_lossy=True)["label"] == "lossy"


def packed_fp4(rows: int, columns: int, spread: int) -> tuple[Tensor, Tensor]:
    """Random codes, a largest magnitude in every group, exponents of the groups over `spread`."""
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    packed[:, ::16] |= 0x07
    scales = torch.randint(0, spread + 1, (rows, columns // 32), dtype=torch.uint8) + 100
    scales[0, 0], scales[0, 1] = 100, 100 + spread
    packed[0, :16] = 0x11  # the smallest group holds the smallest magnitude alone
    return packed.view(torch.int8), scales.view(E8M0)


def v4(spread: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    out = {"embed.weight": torch.randn(20, 64).bfloat16(), "layers.0.attn.attn_sink": torch.randn(4)}
    out |= {"layers.0.ffn.gate.weight": torch.randn(4, 64).bfloat16(), "layers.0.ffn.gate.tid2eid": torch.arange(9)}
    for expert in range(2):
        for name in ("w1", "w2", "w3"):
            stem = f"layers.0.ffn.experts.{expert}.{name}."
            out[stem + "weight"], out[stem + "scale"] = packed_fp4(150, 192, spread)
    codes, scales = quantise(torch.randn(200, 192))
    out |= {"layers.0.attn.wq_a.weight": codes, "layers.0.attn.wq_a.scale": scales.view(E8M0)}
    return out


V4 = {"model_type": "deepseek_v4", "expert_dtype": "fp4", "quantization_config": {"fmt": "e4m3"}}


def test_deepseek_v4_is_exact_where_exponents_span_little(tmp_path: Path) -> None:
    source = save(tmp_path / "s", v4(14), V4)
    wanted = values_digest(source)
    for layout in LAYOUTS:
        report = run(source, tmp_path / layout, layout=layout)
        assert (report["label"], report["quantised"], report["digest"]) == ("on-grid", 7, wanted)
        assert values_digest(tmp_path / layout) == wanted
        assert "expert_dtype" not in json.loads((tmp_path / layout / "config.json").read_text())
    out = entries(tmp_path / "e8m0")
    assert out["layers.0.ffn.experts.0.w1.weight"].shape == (150, 192)
    assert out["layers.0.ffn.experts.0.w1.weight_scale_inv"].shape == (2, 2)
    assert out["layers.0.attn.attn_sink"].dtype == "F32"
    assert out["layers.0.ffn.gate.tid2eid"].dtype == "I64"


def test_deepseek_v4_that_spans_too_much(tmp_path: Path) -> None:
    source = save(tmp_path / "s", v4(20), V4)
    for layout in ("e8m0", "deepseek"):
        with pytest.raises(CheckpointError, match="no scale of a 128x128 block reaches") as caught:
            run(source, tmp_path / "out", layout=layout)
        assert caught.value.tensor == "layers.0.ffn.experts.0.w1.weight"
    for layout in ("mxfp8", "bf16"):  # both can say every value
        report = run(source, tmp_path / layout, layout=layout)
        assert (report["label"], report["digest"]) == ("on-grid", values_digest(source))
        assert values_digest(tmp_path / layout) == report["digest"]
    assert run(source, tmp_path / "e8m0", allow_lossy=True)["label"] == "lossy"


def test_mxfp8_of_others(tmp_path: Path) -> None:
    """Groups with scales of their own stay as they are, and become blocks only where that is exact."""
    torch.manual_seed(0)
    codes = torch.randn(130, 160).mul(100).to(F8)
    near = torch.randint(120, 123, (130, 5), dtype=torch.uint8)
    codes[:, :32] = 64  # at any of the scales a power of two
    near[:, 1:] = near[:1, 1:2]
    far = torch.randint(50, 200, (130, 5), dtype=torch.uint8)
    for name, scales in {"near": near, "far": far}.items():
        source = save(tmp_path / name, {UP: codes, UP + "_scale": scales})
        for layout in ("mxfp8", "bf16"):
            out = tmp_path / f"{name} {layout}"
            assert run(source, out, layout=layout)["label"] == "on-grid"
            assert values_digest(out) == values_digest(source)
        assert torch.equal(read(tmp_path / f"{name} mxfp8", UP + "_scale"), scales)
    assert run(tmp_path / "near", tmp_path / "near e8m0")["label"] == "on-grid"
    with pytest.raises(CheckpointError, match="1x32 blocks has values") as caught:
        run(tmp_path / "far", tmp_path / "out")
    assert caught.value.tensor == UP


def test_blocks_of_32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codes = torch.randn(200, 150).to(F8)
    scales = torch.full((7, 5), 120, dtype=torch.uint8)
    source = save(tmp_path / "s", {UP: codes, UP + "_scale_inv": scales.view(E8M0)})
    for layout in LAYOUTS:
        report = run(source, tmp_path / layout, layout=layout)
        assert (report["label"], report["digest"]) == ("on-grid", values_digest(source))
        assert values_digest(tmp_path / layout) == report["digest"]


def test_a_nan_among_codes_is_refused(tmp_path: Path) -> None:
    codes, scales = quantise(torch.randn(200, 150))
    codes.view(torch.uint8)[150, 3] = 0x7F
    source = save(tmp_path / "s", {UP: codes, UP + "_scale_inv": scales})
    for layout in LAYOUTS:
        for allow_lossy in (False, True):
            with pytest.raises(CheckpointError, match="NaN") as caught:
                run(source, tmp_path / "out", layout=layout, allow_lossy=allow_lossy)
            assert caught.value.tensor == UP


# Overlays.


def test_an_overlay_replaces_the_values_and_is_measured_against_the_source(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {UP: torch.randn(300, 200).bfloat16(), DOWN: torch.randn(100, 300), EMBED: torch.randn(9, 4).bfloat16()}
    source = save(tmp_path / "s", tensors)
    laid = project(tensors[UP].float() * 1.01).bfloat16()
    (tmp_path / "o").mkdir()
    write(tmp_path / "o" / "layer-0.safetensors", [(UP, laid)])
    noise = ((laid.double() - tensors[UP].double()) ** 2).sum()
    noise += ((dequantise(*quantise(tensors[DOWN])).double() - tensors[DOWN].double()) ** 2).sum()
    signal = (tensors[UP].double() ** 2).sum() + (tensors[DOWN].double() ** 2).sum()
    seen = set()
    for layout in LAYOUTS:
        report = run(source, tmp_path / layout, layout=layout, overlay=str(tmp_path / "o"))
        assert (report["label"], report["rounded"], report["rounding"]) == ("rounded", 2, "overlay")
        assert report["sqnr_db"] == pytest.approx(float(10 * torch.log10(signal / noise)), abs=2e-3)
        assert values_digest(tmp_path / layout) == report["digest"]
        seen.add(report["digest"])
    assert len(seen) == 1
    assert torch.equal(read(tmp_path / "bf16", UP), laid)
    plain = run(source, tmp_path / "plain")
    a, b = digests(tmp_path / "plain"), digests(tmp_path / "e8m0")
    assert [name for name in a if a[name] != b[name]] == [UP]
    assert plain["rounding"] == "nearest"
    (tmp_path / "o" / "rounding.json").write_text('{"method": "gptq"}')
    assert run(source, tmp_path / "gptq", overlay=str(tmp_path / "o"))["rounding"] == "gptq"


def test_notes_and_an_overlay_s_report_go_with_the_result(tmp_path: Path) -> None:
    source = save(tmp_path / "s", {UP: torch.randn(4, 4).bfloat16()})
    (tmp_path / "o").mkdir()
    write(tmp_path / "o" / "a.safetensors", [(UP, project(torch.randn(4, 4)).bfloat16())])
    (tmp_path / "o" / "rounding.json").write_text('{"method": "gptq"}')
    report = run(source, tmp_path / "out", overlay=str(tmp_path / "o"), notes={"calibration": {"tokens": 3}})
    assert (report["rounding"], report["calibration"]) == ("gptq", {"tokens": 3})
    assert json.loads((tmp_path / "out" / "conversion.json").read_text()) == report
    assert (tmp_path / "out" / "rounding.json").read_text() == '{"method": "gptq"}'


@pytest.mark.parametrize("byte", [12, 100, 187, 192, 230, 246])
def test_the_signal_of_the_largest_and_smallest_codes_is_finite(byte: int, tmp_path: Path) -> None:
    """One matrix of nothing but 256 x 2^(byte - 127), and one that is rounded."""
    codes, noisy = torch.full((128, 128), 256.0).to(torch.float8_e4m3fn), torch.randn(128, 128)
    scales = torch.full((1, 1), byte, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    report = run(save(tmp_path / "s", {UP: codes, UP + "_scale_inv": scales, DOWN: noisy}), tmp_path / "out")
    signal = 128 * 128 * 2.0 ** (2 * (byte - 119)) + float((noisy.double() ** 2).sum())
    noise = float(((project(noisy).double() - noisy.double()) ** 2).sum())
    assert report["sqnr_db"] == pytest.approx(10 * math.log10(signal / noise), abs=1e-3)


def test_an_overlay_of_codes_is_a_second_rounding(tmp_path: Path) -> None:
    codes, scales = quantise(torch.randn(200, 150))
    source = save(tmp_path / "s", {UP: codes, UP + "_scale_inv": scales})
    laid = project(torch.randn(200, 150)).bfloat16()
    (tmp_path / "o").mkdir()
    write(tmp_path / "o" / "a.safetensors", [(UP, laid)])
    for layout in LAYOUTS:
        with pytest.raises(CheckpointError, match="rounded once already"):
            run(source, tmp_path / "out", layout=layout, overlay=str(tmp_path / "o"))
        report = run(source, tmp_path / layout, layout=layout, overlay=str(tmp_path / "o"), allow_lossy=True)
        assert report["label"] == "lossy"
        assert report["digest"] == values_digest(save(tmp_path / f"{layout} wanted", {UP: laid}))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (UP, torch.randn(4, 4).bfloat16(), "do not lie on the grid"),
        (UP, torch.ones(4, 4), "an overlay holds BF16"),
        (UP, torch.ones(4, 5).bfloat16(), "an overlay holds BF16"),
        (DOWN, torch.ones(4, 4).bfloat16(), "an overlay holds BF16"),
        (EMBED, torch.ones(4, 4).bfloat16(), "an overlay holds BF16"),
        (None, None, "without"),
    ],
)
def test_overlays_that_do_not_fit(name: str | None, tensor: Tensor | None, message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = save(tmp_path / "s", {UP: torch.randn(4, 4).bfloat16(), EMBED: torch.ones(4, 4).bfloat16()})
    (tmp_path / "o").mkdir()
    if name is not None and tensor is not None:
        write(tmp_path / "o" / "a.safetensors", [(name, tensor)])
    with pytest.raises((CheckpointError, FormatError), match=message):
        run(source, tmp_path / "out", overlay=str(tmp_path / "o"))
    assert names_in(tmp_path) == ["o", "s"]


# Options.


def test_what_is_not_flushed_is_the_same(tmp_path: Path) -> None:
    source = save(tmp_path / "s", model())
    assert run(source, tmp_path / "a", flush=False) == run(source, tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_layout_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(OttavaError, match="unknown layout 'fp7'"):
        run(save(tmp_path / "s", model()), tmp_path / "out", layout="fp7")


def test_an_engine_is_asked_before_anything_is_written(tmp_path: Path) -> None:
    """transformers 5.23 infers blocks from the shape of the scales: 300 rows of three blocks would be 100 each."""
    source = save(tmp_path / "s", model())
    with pytest.raises(CheckpointError, match="transformers") as caught:
        run(source, tmp_path / "out", engine="transformers")
    assert caught.value.tensor in model()
    assert names_in(tmp_path) == ["s"]
    assert run(source, tmp_path / "out", engine="transformers", layout="bf16")["layout"] == "bf16"


def test_missing_keys_of_deepseek_v3_are_written_and_others_kept(tmp_path: Path) -> None:
    for keys in ({}, {"topk_method": "greedy"}):
        source = save(tmp_path / f"s{len(keys)}", model(), {"model_type": "deepseek_v3", **keys})
        run(source, tmp_path / f"o{len(keys)}")
        config = json.loads((tmp_path / f"o{len(keys)}" / "config.json").read_text())
        assert (config["topk_method"], config["scoring_func"]) == (keys.get("topk_method", "noaux_tc"), "sigmoid")


@pytest.mark.parametrize(
    ("storage", "names"),
    [
        (
            "fp8",
            """model.layers.3.self_attn.q_proj.weight model.layers.3.self_attn.kv_a_proj_with_mqa.weight
            model.layers.3.mlp.experts.17.down_proj.weight model.layers.3.mlp.shared_experts.gate_proj.weight
            model.layers.3.mlp.shared_expert.up_proj.weight model.layers.0.block_sparse_moe.experts.7.w2.weight
            model.layers.0.self_attn.indexer.wq_b.weight model.layers.0.self_attn.indexer.wk.weight
            layers.0.attn.wq_a.weight layers.9.attn.wo_b.weight layers.0.attn.indexer.wq_b.weight
            layers.0.ffn.experts.255.w3.weight layers.0.ffn.shared_experts.w1.weight mtp.0.e_proj.weight
            mtp.0.attn.wkv.weight model.language_model.layers.1.mlp.up_proj.weight""",
        ),
        (
            "bf16",
            """model.embed_tokens.weight lm_head.weight model.norm.weight model.layers.3.mlp.gate.weight
            model.layers.3.mlp.shared_expert_gate.weight model.layers.0.block_sparse_moe.gate.weight
            model.layers.61.eh_proj.weight model.layers.0.self_attn.indexer.weights_proj.weight embed.weight head.weight
            layers.0.ffn.gate.weight layers.0.attn.compressor.wkv.weight layers.0.attn.compressor.wgate.weight
            layers.0.attn.indexer.compressor.wkv.weight layers.0.attn.indexer.weights_proj.weight
            layers.0.attn.q_norm.weight visual.blocks.0.mlp.up_proj.weight model.layers.0.self_attn.q_proj.bias""",
        ),
        (
            "f32",
            """model.layers.3.mlp.gate.e_score_correction_bias layers.0.ffn.gate.bias layers.0.attn.attn_sink
            layers.0.attn.compressor.ape layers.0.hc_attn_fn hc_head_scale
            model.layers.0.self_attn.indexer.k_norm.bias""",
        ),
    ],
)
def test_what_is_quantised_by_name(storage: str, names: str) -> None:
    assert {name: storage_of(name, 2) for name in names.split()} == dict.fromkeys(names.split(), storage)


def test_only_matrices_are_quantised() -> None:
    assert [storage_of(UP, dims) for dims in (1, 2, 3)] == ["bf16", "fp8", "bf16"]


# Memory.


PEAK = """
import sys
from pathlib import Path
from ottava.checkpoint.convert import convert
from ottava.checkpoint.digest import values_digest
def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024
before, peaks = status("VmRSS"), []
for name in sys.argv[2:]:
    for layout in ("e8m0", "bf16"):
        convert({"source": f"{sys.argv[1]}/{name}", "out": f"{sys.argv[1]}/{name}.{layout}", "layout": layout})
        values_digest(Path(f"{sys.argv[1]}/{name}.{layout}"), 2)
    peaks.append(status("VmHWM") - before)
print(*peaks)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    w = torch.randn(1024, 4096).bfloat16()
    for name, layers in (("small", 3), ("large", 24)):
        save(tmp_path / name, {f"model.layers.{i}.mlp.up_proj.weight": w for i in range(layers)})
    command = [sys.executable, "-c", PEAK, str(tmp_path), "small", "large"]
    small, large = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert large < 200
    assert large - small < 25  # the models differ by 176 MB


def test_what_is_somebody_elses_is_never_removed(tmp_path: Path) -> None:
    source = save(tmp_path / "source", model(1, 130))
    for name, place in (("mine.part", "mine"), ("linked.part", "linked")):
        (tmp_path / "thesis").mkdir(exist_ok=True)
        (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
        if place == "mine":
            shutil.copytree(tmp_path / "thesis", tmp_path / name)
        else:
            (tmp_path / name).symlink_to(tmp_path / "thesis")
        with pytest.raises(CheckpointError, match="something else is here"):
            convert({"source": source, "out": tmp_path / place})
        assert (tmp_path / name / "thesis.txt").read_text() == "years of work"


def test_the_working_folder_itself_may_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "source", model(1, 130))
    expected = convert({"source": source, "out": tmp_path / "named"})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert convert({"source": source, "out": "."}) == expected
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no link"):
        convert({"source": source, "out": tmp_path / "link"})


@pytest.mark.parametrize("theirs", ["precious.txt", "photos/a.jpg"])
def test_a_log_alone_does_not_make_a_folder_ours(theirs: str, tmp_path: Path) -> None:
    """Whoever has a folder OUT.part with a conversion.log in it keeps what else is there."""
    source = tmp_path / "source"
    save(source, {"model.layers.0.mlp.up_proj.weight": torch.randn(8, 8).bfloat16()})
    kept = tmp_path / "out.part" / theirs
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    (tmp_path / "out.part" / "conversion.log").touch()
    with pytest.raises(CheckpointError, match="something else is here"):
        convert({"source": str(source), "out": str(tmp_path / "out")})
    assert kept.read_text() == "mine"


def test_source_and_output_are_no_folders_of_each_other(tmp_path: Path) -> None:
    source = save(tmp_path / "a" / "s", {UP: torch.randn(32, 32).bfloat16()})
    (tmp_path / "link").symlink_to(source)
    for out, what in (
        (source / "sub", "inside the source"), (tmp_path / "link" / "sub" / "deeper", "inside the source"),
        (source / ".." / "s", "the output is the source"), (tmp_path / "a", "the source lies inside"),
    ):  # fmt: skip
        for begin in (convert, converter.check):
            with pytest.raises(CheckpointError, match=what) as caught:
                begin({"source": str(source), "out": str(out)})
            assert (caught.value.where, "beside" in str(caught.value.fix)) == (str(out), True)
    assert names_in(source) == ["config.json", SINGLE]
    assert run(source, tmp_path / "a" / "s2")["warnings"]


def test_what_a_source_lacks_is_said_and_converted_all_the_same(tmp_path: Path) -> None:
    source = save(tmp_path / "s", {UP: torch.randn(32, 32).bfloat16()}, {"hidden_size": 32})
    both = run(source, tmp_path / "both")
    assert [text.split(":")[0] for text in both["warnings"]] == [
        "the source has no tokenizer.json",
        "the source's config.json names no model_type",
    ]
    assert json.loads((tmp_path / "both" / "conversion.json").read_text()) == both
    (source / "tokenizer.json").write_text("{}")
    (one,) = run(source, tmp_path / "one")["warnings"]
    assert "model_type" in one
    (source / "config.json").write_text('{"model_type": "llama"}')
    assert run(source, tmp_path / "none")["warnings"] == []
