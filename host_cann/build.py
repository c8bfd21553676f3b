"""Compile the stand-in with g++: libraries with CANN's names, and the extension that redirects operators.

They are built for the torch and torch_npu of this interpreter, and again whenever these or a source change.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from host_cann.redirect import EXTENSION

SOURCES = Path(__file__).parent / "src"
WHEEL = "2.13.0"  # the release of torch_npu whose imports were read
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-fvisibility=hidden", "-pthread")
LIBRARIES = {
    "libascendcl.so": ("device.cpp", "memory.cpp", "stream.cpp", "fault.cpp", "refuse.cpp"),
    "libhccl.so": ("hccl.cpp", "mesh.cpp", "reduce.cpp"),
    "libacl_op_compiler.so": ("compiler.cpp",),
    "libge_runner.so": (),  # linked by the wheel, whose core imports nothing from these
    "libgraph.so": (),
    "libacl_tdt_channel.so": (),
}
DOCUMENTED = (107020, 507054)
"""Codes that torch_npu's documentation has and its table has not."""


class BuildError(Exception):
    """What is missing or failed, as one message."""


def build() -> Path:
    """The folder of the libraries, compiled where it is missing. Raises BuildError."""
    target = Path(os.environ.get("HOST_CANN_BUILD", Path(__file__).parent / "_build")) / _stamp()
    if target.is_dir():
        return target
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise BuildError(f"no C++ compiler: {compiler} is not on the path; install g++ or set CXX")
    work = target.with_name(f"{target.name}.{os.getpid()}")
    work.mkdir(parents=True, exist_ok=True)
    codes = ", ".join(map(str, sorted({*wheel_codes(), *DOCUMENTED})))
    (work / "codes.inc").write_text(f"static const long WHEEL_CODES[] = {{{codes}}};\n")
    for name, sources in LIBRARIES.items():
        files = [str(SOURCES / source) for source in sources] or ["-x", "c++", os.devnull]
        runtime = [] if name == "libascendcl.so" else [f"-L{work}", "-lascendcl"]
        _compile(
            [compiler, *FLAGS, f"-I{work}", f"-Wl,-soname,{name}", *files, "-o", str(work / name), *runtime, "-lrt"]
        )
    _compile([compiler, *FLAGS, *_torch_flags(), str(SOURCES / "redirect.cpp"), "-o", str(work / EXTENSION),
              *_torch_libraries(), f"-L{work}", "-lascendcl"])  # fmt: skip
    try:
        work.rename(target)
    except OSError:  # somebody else was faster
        shutil.rmtree(work)
    return target


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"the compiler failed: {' '.join(command)}\n{done.stderr}")
    sys.stderr.write(done.stderr)


def _stamp() -> str:
    """Names what the libraries depend on."""
    versions = [version("torch"), version("torch_npu")]
    if versions[1] != WHEEL:
        raise BuildError(f"torch_npu {versions[1]} is here, and the stand-in was written for {WHEEL}")
    whole = hashlib.sha256(repr((versions, sys.version, FLAGS)).encode())
    for path in sorted(SOURCES.iterdir()):
        whole.update(path.name.encode() + path.read_bytes())
    whole.update(Path(__file__).read_bytes())
    return whole.hexdigest()[:16]


def wheel_codes() -> set[int]:
    """The numbers of the wheel's table of error codes."""
    header = _root("torch_npu") / "include/torch_npu/csrc/core/npu/NPUErrorCodes.h"
    return {int(code) for code in re.findall(r"\{(\d+),\s*\"", header.read_text())}


def version(name: str) -> str:
    """The version of an installed package. Raises BuildError where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        raise BuildError(f"{name} is not installed in {sys.prefix}; `make .venv-npu/installed` installs it") from None


def _root(name: str) -> Path:
    """A package's folder, without importing it: torch_npu cannot be imported before its libraries are there."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise BuildError(f"{name} is not installed in {sys.prefix}")
    return Path(spec.origin).parent


def _torch_flags() -> list[str]:
    torch, npu = _root("torch") / "include", _root("torch_npu") / "include"
    folders = (torch, torch / "torch/csrc/api/include", npu, npu / "third_party/acl/inc", npu / "third_party/hccl/inc")
    return [f"-isystem{folder}" for folder in folders]


def _torch_libraries() -> list[str]:
    torch, npu = _root("torch") / "lib", _root("torch_npu") / "lib"
    return [f"-L{torch}", f"-L{npu}", "-Wl,--allow-shlib-undefined", "-ltorch_npu", "-ltorch_cpu", "-lc10"]
