"""Which operators torch_npu has, by its own list: level L0, read without importing it.

`operators.txt` keeps the names of the release that was read, so that a model can be held against them on any machine;
tests/npu/test_operators.py holds the file against the wheel.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

RELEASE = "2.13.0"
SCHEMAS = "npu_native_functions_by_codegen.yaml"
KEPT = Path(__file__).with_name("operators.txt")

_ENTRY = re.compile(r"^(?:- |  )(?:func: )?([A-Za-z_][\w.]*)(?:\(.*)?$", re.MULTILINE)
_FIELDS = frozenset({"func"})


def schemas() -> Path | None:
    """The file in which the installed torch_npu lists its operators; None without one."""
    spec = importlib.util.find_spec("torch_npu")
    roots = () if spec is None else spec.submodule_search_locations or ()
    return next((path for root in roots for path in Path(root).rglob(SCHEMAS)), None)


def listed(path: Path) -> set[str]:
    """The names (with their overload, `add.Tensor`) in such a file: entries are `- name` or have a `func: schema`."""
    return set(_ENTRY.findall(path.read_text())) - _FIELDS


def operators() -> set[str]:
    """The names of RELEASE that are kept here."""
    return {line for line in KEPT.read_text().splitlines() if line and not line.startswith("#")}
