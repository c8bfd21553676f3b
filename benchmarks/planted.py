"""Folders with one fault each, that the certificate and the canary are to find: a sound folder in, a faulty one out.

Each is the mildest form of its kind, as faults that are seen at a glance prove little. All are written in the BF16
layout, with the companions of the source, so that nothing but the fault differs in value.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ottava.checkpoint import layouts, safetensors
from ottava.fp8.codec import dequantise, quantise

FAULTS = ("scale row", "one layer re-quantised", "4-bit swap", "another model", "mode prefix")
"""In the order of the issue, the mode prefix last: it lies in the template and not in the weights."""

LINEAR = re.compile(r"\.layers\.(\d+)\..*_proj\.weight$")
PREFIXES = ("'<think>' if thinking else '</think>'", "'</think>' if thinking else '<think>'")


def plant(folder: Path, out: Path, fault: str, seed: int = 0) -> Path:
    """Write `folder` with one of FAULTS to the new folder `out`."""
    values = {name: layouts.exact(weight) for name, weight in layouts.weights(folder).items()}
    linear = [name for name in values if LINEAR.search(name)]
    depth = 1 + max(int(LINEAR.search(name)[1]) for name in linear)  # type: ignore[index]
    inside = [name for name in linear if f".layers.{depth // 2}." in name]
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, tuple[list[str], Callable[[Tensor], Tensor]]] = {
        "scale row": ([next(name for name in inside if "down_proj" in name)], _row_above),
        "one layer re-quantised": (inside, _through_f32),
        "4-bit swap": (linear, _int4),
        "another model": (linear, lambda w: _moved(w, generator)),
        "mode prefix": ([], lambda w: w),
    }
    names, change = changes[fault]
    values |= {name: change(values[name].float()).bfloat16() for name in names}
    out.mkdir(parents=True)
    safetensors.write(out / "model.safetensors", values.items())
    layouts.finish(out, folder, layouts.read_config(folder), None)
    if fault == "mode prefix":
        _template(out / "chat_template.jinja")
    return out


def _row_above(w: Tensor) -> Tensor:
    """The scales of the last row of blocks are those of the row above; twice their own where they are equal."""
    codes, scales = quantise(w)
    above = scales[-2] if len(scales) > 1 else scales[-1]
    scales[-1] = torch.where(above == scales[-1], scales[-1] + 1, above)
    return dequantise(codes, scales)


def _through_f32(w: Tensor) -> Tensor:
    """Rounded to E4M3 once more, with amax / 448 of each 128x128 block as the scale, as other tools do."""
    return _in_blocks(w, 128, 128, lambda block: _e4m3(block, block.abs().max().clamp_min(1e-12) / 448))


def _e4m3(block: Tensor, scale: Tensor) -> Tensor:
    return (block / scale).to(torch.float8_e4m3fn).float() * scale


def _int4(w: Tensor) -> Tensor:
    """Symmetric 4-bit integers, a scale of amax / 7 for each 1x32."""
    rows, columns = w.shape
    groups = torch.nn.functional.pad(w, (0, -columns % 32)).view(rows, -1, 32)
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7
    return ((groups / scale).round() * scale).flatten(1)[:, :columns]


def _moved(w: Tensor, generator: torch.Generator) -> Tensor:
    """A version of it that was trained on: every weight moved by a twentieth of their spread."""
    return w + 0.05 * w.std() * torch.randn(w.shape, generator=generator)


def _in_blocks(w: Tensor, height: int, width: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    out = w.clone()
    for row in range(0, len(w), height):
        for column in range(0, w.shape[1], width):
            part = (slice(row, row + height), slice(column, column + width))
            out[part] = change(w[part])
    return out


def _template(path: Path) -> None:
    """The prefix by which a mode is told is the other mode's; of a template without modes, the assistant's turn."""
    text = path.read_text()
    old, new = PREFIXES if PREFIXES[0] in text else ("<|im_start|>assistant\\n", "<|im_start|>assistant\\n\\n")
    old, new = (old, new) if old in text else ("<|im_start|>assistant\n", "<|im_start|>assistant\n\n")
    assert old in text, "a template of another kind"
    path.write_text(text.replace(old, new))
