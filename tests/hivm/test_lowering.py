"""Every Triton kernel lowers to HIVM for an Ascend 910B, a 910C and a 950: level L3 of docs/ascend.md.

No chip ran it, and no instruction of a chip was made: hivmc, which is to do that, is in neither package.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.triton_sources import sources

from .lower import NotLoweredError, hivm, linalg

ROWS = 16
CHIPS = {"Ascend910B3": (20, 1572864), "Ascend910_9391": (24, 1572864), "Ascend950PR_9589": (32, 2031616)}
"""SoC -> cores and bits of vector buffer, as the compiler's own description of the chip has them."""

STEPS = {
    "Ascend910B3": r"\bhivm\.hir\.\w+",
    "Ascend910_9391": r"\bhivm\.hir\.\w+",
    "Ascend950PR_9589": r"\bintr\.hivm\.v\w+",
}
"""What the chip's vector unit does. On the 950 it is written as intrinsics, on the others as calls of a library."""

UNLOWERED = re.compile(r"\b(?:tt|linalg|hfusion|tensor|bufferization)\.(?!tensor_kind|divisibility)[a-z_]+\b")


@pytest.mark.parametrize("soc", CHIPS)
@pytest.mark.parametrize("name", sources(ROWS))
def test_lowers_to_hivm(name: str, soc: str, tmp_path: Path) -> None:
    kernel, types, constants = sources(ROWS)[name]
    made = hivm(linalg(kernel, types, constants, soc), soc, tmp_path)
    cores, buffer = CHIPS[soc]
    assert f'"AI_CORE_COUNT", {cores} ' in made
    assert f'"UB_SIZE", {buffer} ' in made
    if "950" in soc:  # for the others this version of the compiler takes the name out, for the sake of older hivmc
        assert f'hacc.target = #hacc.target<"{soc}">' in made
    assert re.search(rf"func\.func @{kernel.__name__}\b.*hacc\.entry", made)
    assert "hivm.module_core_type<AIV>" in made
    assert len(re.findall(STEPS[soc], made)) > 20
    assert not UNLOWERED.findall(made)


@pytest.mark.parametrize("soc", ["Ascend910B9", "Ascend310P3", "cuda"])
def test_another_chip_is_refused(soc: str, tmp_path: Path) -> None:
    with pytest.raises(NotLoweredError, match="Cannot find option named"):
        hivm(linalg(*sources(ROWS)["dequantise"], "Ascend910B3"), soc, tmp_path)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """All rows of a block at once: the reason for strips."""
    with pytest.raises(NotLoweredError, match="ub overflow"):
        hivm(linalg(*sources(128)["quantise"], "Ascend910B3"), "Ascend910B3", tmp_path)


def test_what_is_no_kernel_is_refused(tmp_path: Path) -> None:
    text = linalg(*sources(ROWS)["quantise"], "Ascend910B3")
    with pytest.raises(NotLoweredError, match=r"no\.such"):
        hivm(text.replace("arith.muli", "no.such", 1), "Ascend910B3", tmp_path)
