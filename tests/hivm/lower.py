"""Lowers Triton kernels for Ascend chips with Huawei's published compilers, as far as these go.

triton-ascend makes linalg of a kernel, ascendnpu-ir's bishengir-compile makes HIVM of that and looks for hivmc, which
is in neither package. A kernel counts as lowered where HIVM was written and the compiler then says that it cannot find
hivmc. Whether hivmc would take that HIVM, and whether a chip would compute the right bits with it, is not shown.
"""

from __future__ import annotations

import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OPTIONS = ("enable-hfusion-compile", "enable-hivm-compile", "enable-triton-kernel-compile")
CLOSED = re.compile(r"\[ERROR\] Cannot find hivmc(-a5)? under \$PATH")


class NotLoweredError(Exception):
    """The compiler refused: what it said."""


def linalg(kernel: Any, types: dict[str, str], constants: dict[str, int], soc: str) -> str:
    """A kernel as triton-ascend gives it to the compiler of `soc`."""
    from triton._C.libtriton import ir
    from triton.backends.ascend.compiler import AscendBackend, make_ttir, ttir_to_linalg
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("npu", soc, 0)
    backend = AscendBackend(target)
    options = backend.parse_options({"enable_fp_fusion": False, "compile_on_910_95": "950" in soc})
    context = ir.context()
    ir.load_dialects(context)
    signature = {arg: types.get(arg, "i32") for arg in kernel.arg_names if arg not in constants}
    module = ASTSource(kernel, signature, constants).make_ir(options, backend.get_codegen_implementation(), {}, context)
    metadata = {"target": target, **options.__dict__}
    lowered: str = ttir_to_linalg(make_ttir(module, metadata, options), metadata, options, named_ops=True)
    return re.sub(r', mix_mode\s*=\s*"[^"]*"', "", lowered)  # as triton-ascend does before it calls the compiler


def hivm(text: str, soc: str, folder: Path) -> str:
    """HIVM of a linalg module for `soc`. Raises NotLoweredError unless it was written and hivmc then missed."""
    package = find_spec("ascendnpuir")
    assert package is not None
    assert package.origin is not None
    tools = Path(package.origin).parent / "bin"
    (folder / "kernel.mlir").write_text(text)
    flags = [f"--{name}=true" for name in OPTIONS]
    command = [tools / "bishengir-compile", "kernel.mlir", f"--target={soc}", *flags, f"--save-temps={folder}"]
    done = subprocess.run(
        [*command, "-o", "kernel"],
        cwd=folder,
        env={"PATH": f"{tools}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout + done.stderr
    made = folder / "module.hivm.opt.mlir"
    if not made.is_file() or not CLOSED.search(said):
        raise NotLoweredError(said)
    return made.read_text()
