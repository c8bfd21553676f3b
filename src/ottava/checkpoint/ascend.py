"""What vllm-ascend reads on an Ascend 950: the mxfp8 layout, described by one file more and one key less.

vllm-ascend takes no MXFP8 from a `quantization_config`. It takes the folders that Huawei's msModelSlim writes, in its
format AscendV1: `quant_model_description.json` names the type of every tensor, and config.json has no
`quantization_config`. The tensors themselves are those of the layout mxfp8: E4M3 [rows, columns] and U8 [rows,
ceil(columns / 32)]. So the values stay the same bits, and `ottava verify` proves it. On A2 and A3, which have no FP8,
vllm-ascend reads the layout bf16 as it is.

Sources: msmodelslim, docs/zh/quantization_formats/ascendv1.md; vllm-ascend 0.23.0, quantization/modelslim_config.py and
quantization/methods/w8a8_mxfp8.py. tests/test_handoff.py holds folders against their rules, and
tests/npu/test_handoff.py against the published package's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ottava.fp8.spec import MX_BLOCK

ENGINE = "vllm-ascend"
DESCRIPTION = "quant_model_description.json"
VERSION = "1.0.0"
QUANTISED, PLAIN = "W8A8_MXFP8", "FLOAT"

SERVE = {
    "mxfp8": "vllm serve DIR --quantization ascend",
    "bf16": "vllm serve DIR --dtype bfloat16",
}
"""How the folder is served, by its layout."""


def rounding_cost(rounded: int, tensors: int, sqnr_db: float | None, dtypes: set[str]) -> str:
    """What a source loses that was not trained on the grid, and how nothing is lost.

    rounded: so many of the tensors were changed; sqnr_db: signal to noise, or None; dtypes: of its linear weights.
    """
    noise = "" if sqnr_db is None else f", {sqnr_db:.1f} dB signal to noise"
    way = "end training on the grid (grid_from, docs/training.md)"
    if dtypes == {"BF16"}:
        way = f"serve the source, which 910B, 910C and 950 compute in BF16 as it is ({SERVE['bf16']}), or {way}"
    return (
        f"{rounded} of {tensors} tensors were rounded to UE8M0 FP8{noise}: vllm-ascend serves the rounded values, in "
        f"either layout. To lose nothing, {way}"
    )


def description(tensors: Mapping[str, Mapping[str, Any]], quantised: set[str]) -> dict[str, Any]:
    """The content of quant_model_description.json.

    tensors: weight -> the tensors that spell it; quantised: the weights in MXFP8.
    """
    types = {
        part: QUANTISED if name in quantised else PLAIN
        for name, parts in sorted(tensors.items())
        for part in sorted(parts)
    }
    return {"model_quant_type": QUANTISED, "version": VERSION, "group_size": MX_BLOCK[1], **types}
