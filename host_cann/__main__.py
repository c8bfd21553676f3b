"""`python -m host_cann build` compiles; `python -m host_cann run -- COMMAND` runs a command on the stand-in.

The command and what it starts find the libraries (LD_LIBRARY_PATH) and the redirection (PYTHONPATH). What can be set:
HOST_CANN_SOC (the chip's name), HOST_CANN_DEVICES, HOST_CANN_MEMORY_MB, HOST_CANN_FAULTS (src/fault.cpp),
HOST_CANN_JITTER_US (every task of a stream is held up by up to so long, to find missing waits).
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from host_cann.build import BuildError, build
from host_cann.redirect import LIBRARY

USAGE = "usage: python -m host_cann build | run -- COMMAND [ARGUMENT...]"


def environment(folder: Path) -> dict[str, str]:
    """What a process needs to find the stand-in, beside what this one has."""
    here = Path(__file__).parent
    return {
        LIBRARY: str(folder),
        "LD_LIBRARY_PATH": _joined(str(folder), "LD_LIBRARY_PATH"),
        "PYTHONPATH": _joined(f"{here / 'site'}{os.pathsep}{here.parent}", "PYTHONPATH"),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # torch_npu is imported by who uses it
    }


def _joined(first: str, variable: str) -> str:
    return os.pathsep.join(filter(None, (first, os.environ.get(variable))))


def faults_problem(folder: Path) -> str | None:
    """What is wrong with HOST_CANN_FAULTS, by the stand-in's own reading, which it does again at every call."""
    if "HOST_CANN_FAULTS" not in os.environ:
        return None
    names = ("libascendcl.so", "libhccl.so", "libacl_op_compiler.so")  # the first before those that link it
    runtime, *_ = [ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in names]
    ask = runtime.host_cann_faults_problem
    ask.restype = ctypes.c_char_p
    found: bytes | None = ask()
    return None if found is None else found.decode()


def main(words: list[str]) -> int:
    """Exit status: 2 for a wrong command line, faults that could not be planted, or where nothing can be built."""
    if words[:1] not in (["build"], ["run"]) or (words[0] == "run" and len(words) < 3):
        print(USAGE, file=sys.stderr)
        return 2
    try:
        folder = build()
    except BuildError as error:
        print(f"host_cann: {error}", file=sys.stderr)
        return 2
    if words[0] == "build":
        print(folder)
        return 0
    wrong = faults_problem(folder)
    if wrong is not None:
        print(wrong, file=sys.stderr)
        return 2
    command = words[2:] if words[1] == "--" else words[1:]
    os.environ.update(environment(folder))
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
