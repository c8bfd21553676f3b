"""The converter against a plain copy loop, the digest against a read loop, and the memory both need.

The copy loop is what a disk allows one thread that does nothing else: it reads the bytes that the
converter reads into one reused buffer of 16 MiB and writes as many as the converter writes. It ends as
the converter does, with everything flushed to disk. Models are synthetic: layers of 4096 x 4096 BF16.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import paired
from ottava.checkpoint.convert import convert
from ottava.checkpoint.digest import values_digest
from ottava.checkpoint.safetensors import write_folder
from ottava.checkpoint.stream import default_workers

BUFFER = 16 << 20
SIDE = 4096


def rows(quick: bool) -> list[dict[str, Any]]:
    """Rows for `python -m benchmarks.fp8`: ours / baseline in GB of source a second, and one of memory."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("OTTAVA_BENCH_DIR")) as name:
        place = Path(name)
        source = synthetic(place / "source", 0.3 if quick else 1.0)
        pairs = 3 if quick else 8
        out = [*_speed(source, place, pairs), _many(place, pairs), _digest(source, pairs)]
        shutil.rmtree(source)
        small, large = (0.1, 0.3) if quick else (0.3, 3.0)
        return [*out, _memory(place, small, large)]


def synthetic(folder: Path, gigabytes: float, side: int = SIDE) -> Path:
    """A BF16 model folder of about this size."""
    folder.mkdir(parents=True)
    count = max(round(gigabytes * 1e9 / (2 * side * side)), 1)
    plan = {f"model.layers.{i}.mlp.up_proj.weight": ("BF16", (side, side)) for i in range(count)}
    base = (torch.randn(side, side) * 0.02).bfloat16()

    def stream() -> Iterator[tuple[str, Tensor]]:
        for i, key in enumerate(plan):
            yield key, base.roll(i + 1, 0)

    write_folder(folder, plan, stream())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def copy_loop(source: Path, target: Path, read: int, written: int, *, flush: bool) -> float:
    """Seconds to pread `read` bytes of a folder's tensor files and pwrite `written`, by one thread."""
    buffer = memoryview(bytearray(BUFFER))
    target.unlink(missing_ok=True)
    begun = time.perf_counter()
    out = os.open(target, os.O_WRONLY | os.O_CREAT)
    done = put = 0
    for path in sorted(source.glob("*.safetensors")):
        file, at = os.open(path, os.O_RDONLY), 0
        while done < read and (count := os.preadv(file, [buffer], at)):
            at, done = at + count, done + count
            due = written * done // read - put
            put += os.pwrite(out, buffer[:due], put)
        os.close(file)
    if flush:
        os.fsync(out)
    took = time.perf_counter() - begun
    os.close(out)
    return took


def _speed(source: Path, place: Path, pairs: int) -> Iterator[dict[str, Any]]:
    read = _size(source)
    for layout in ("e8m0", "bf16"):
        written = _size(_converted(source, place / "once", layout))
        for name, put in (("as many bytes", written), ("the whole source", read)):
            loop = _loop(source, place / "copy", read, put)
            row = paired(f"convert to {layout} / copy loop of {name}", _timed(source, place, layout), loop, pairs)
            yield row | {"gigabytes": read / 1e9, "workers": default_workers()}


def _loop(source: Path, target: Path, read: int, written: int) -> Callable[[], float]:
    return lambda: read / 1e9 / copy_loop(source, target, read, written, flush=True)


def _many(place: Path, pairs: int) -> dict[str, Any]:
    """Thousands of small tensors: what Python costs."""
    source = synthetic(place / "many", 0.1, side=160)
    read, written = _size(source), _size(_converted(source, place / "once", "e8m0"))
    loop = _loop(source, place / "copy", read, written)
    row = paired("convert 2000 tensors of 51 kB / copy loop", _timed(source, place, "e8m0"), loop, pairs)
    shutil.rmtree(source)
    return row


def _digest(source: Path, pairs: int) -> dict[str, Any]:
    size = _size(source)

    def ours() -> float:
        begun = time.perf_counter()
        values_digest(source, default_workers())
        return size / 1e9 / (time.perf_counter() - begun)

    def reads() -> float:
        buffer = memoryview(bytearray(BUFFER))
        begun = time.perf_counter()
        for path in source.glob("*.safetensors"):
            file, at = os.open(path, os.O_RDONLY), 0
            while count := os.preadv(file, [buffer], at):
                at += count
            os.close(file)
        return size / 1e9 / (time.perf_counter() - begun)

    return paired("digest / read loop", ours, reads, pairs) | {"gigabytes": size / 1e9}


def _memory(place: Path, small: float, large: float) -> dict[str, Any]:
    """Peak memory over an interpreter with torch loaded, MiB: `ours` of the large model, `baseline` of the small."""
    peaks = {}
    for gigabytes in (small, large):
        source = synthetic(place / "memory", gigabytes)
        command = [sys.executable, "-m", "benchmarks.fp8.convert", str(source), str(place / "out")]
        peaks[gigabytes] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        shutil.rmtree(source)
        shutil.rmtree(place / "out")
    ratio = peaks[large] / peaks[small]
    name = f"peak memory, MiB over torch: {large} GB model / {small} GB model"
    row = {"name": name, "ours": peaks[large], "baseline": peaks[small], "ratio": ratio}
    return row | {"low": ratio, "high": ratio}


def _converted(source: Path, out: Path, layout: str) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    convert({"source": str(source), "out": str(out), "layout": layout})
    return out


def _timed(source: Path, place: Path, layout: str) -> Callable[[], float]:
    size = _size(source)

    def run() -> float:
        shutil.rmtree(place / "once", ignore_errors=True)
        begun = time.perf_counter()
        convert({"source": str(source), "out": str(place / "once"), "layout": layout})
        return size / 1e9 / (time.perf_counter() - begun)

    return run


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _peak_of_a_conversion(source: str, out: str) -> float:
    """MiB that a conversion adds to the memory of this process at its highest."""

    def status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1])

    before = status("VmRSS")
    with suppress(OSError):  # not everywhere allowed; then the peak of the imports counts too
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    convert({"source": source, "out": out})
    return math.ceil((status("VmHWM") - before) / 1024)


if __name__ == "__main__":
    print(_peak_of_a_conversion(*sys.argv[1:]))
