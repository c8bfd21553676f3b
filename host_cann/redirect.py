"""Hand the npu device's operators to torch's CPU kernels, as soon as torch_npu is imported.

`watch()` is called by `site/sitecustomize.py` in every interpreter under `python -m host_cann run`, so that the program
that is tested, and every process that it starts, imports torch_npu as it always does.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

LIBRARY = "HOST_CANN_LIBRARIES"  # the folder that `build` made
EXTENSION = "libhost_cann_redirect.so"

# What torch_npu is here to do itself: memory, views, copies, a scalar's way to the host.
KEPT = frozenset(
    {
        "empty.memory_format", "empty_strided", "as_strided", "view", "_reshape_alias", "unfold", "resize_",
        "set_", "set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor",
        "copy_", "_copy_from", "_copy_from_and_resize", "_local_scalar_dense",
        "record_stream", "is_pinned", "_pin_memory",
    }
)  # fmt: skip

_library: Any = None
left: tuple[str, ...] = ()
"""Operators that torch_npu has and that stay its own. Those that compute fail here."""


def watch() -> None:
    """Install the redirection at the end of the first import of torch_npu."""
    sys.meta_path.insert(0, _Finder())


def install() -> None:
    """Redirect now. torch_npu is loaded."""
    global left, _library
    import torch

    folder = Path(os.environ[LIBRARY])
    torch.ops.load_library(str(folder / EXTENSION))  # type: ignore[no-untyped-call]
    names: set[str] = set()
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        found = torch._C._dispatch_get_registrations_for_dispatch_key(key)
        names |= {name.removeprefix("aten::") for name in found if name.startswith("aten::")}
    left = tuple(torch.ops.host_cann.install(sorted(names - KEPT)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the override that is meant
        _library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        _library.impl("histc", _histc, "PrivateUse1", allow_override=True)


def _histc(values: Any, bins: int = 100, min: float = 0, max: float = 0) -> Any:
    """Of whole numbers too, which an NPU counts and torch's CPU kernel does not."""
    import torch

    return torch.histc(values.cpu().double(), bins, min, max).to(values)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds torch_npu as the others do, and has its loader followed by the redirection. Looking alone loads nothing."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch_npu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The package's own loader, and the redirection after it."""

    def __init__(self, its: importlib.abc.Loader):
        self.its = its

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.its.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # where torch_npu says that CANN's folder is not known
            self.its.exec_module(module)
        install()
