"""What is wrong with an installation for Ascend, in one message, before it ends in a message of somebody else.

Nothing here imports torch_npu: without CANN that ends in a missing library, and where torch loads it by itself in a
broken `import torch`.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from ottava.errors import PlatformError

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
LIBRARIES = ("libascendcl.so", "libhccl.so")
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

UNKNOWN = "0.0"
"""The version of a package that does not say one."""

CANN_OF = {"2.12": "9.1"}
"""The least CANN of a release of torch_npu, by major and minor version, where its release notes were read."""


def missing() -> str | None:
    """Why torch_npu cannot be imported here, or None where nothing speaks against it."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    found = mismatch(_version("torch"), _version("torch_npu"), cann(os.environ))
    if found is not None:
        return found
    absent = [name for name in LIBRARIES if not _loads(name)]
    if absent:
        return (
            f"torch_npu is installed and CANN is not: {', '.join(absent)} cannot be loaded. Install CANN and source "
            f"its set_env.sh; without CANN uninstall torch_npu, or set {AUTOLOAD}=0: else torch loads it and breaks"
        )
    return None


def broken_plugin(error: RuntimeError) -> PlatformError:
    """What to say where `import torch` itself failed, as it loads the packages that add devices to it."""
    if "torch_npu" not in str(error):
        return PlatformError(f"torch cannot be imported: {error}", fix=f"uninstall that extension, or set {AUTOLOAD}=0")
    return PlatformError(
        f"torch cannot be imported, as it loads torch_npu by itself: {missing() or error.__cause__ or error}",
        fix=f"set {AUTOLOAD}=0: what needs torch_npu here imports it by name",
    )


def mismatch(torch: str, torch_npu: str, cann: str | None) -> str | None:
    """What does not fit among versions: torch_npu is built for one release of torch, and for one line of CANN.

    cann: None where it is not known.
    """
    if UNKNOWN not in (torch, torch_npu) and _minor(torch) != _minor(torch_npu):
        return (
            f"torch_npu {torch_npu} was built for torch {_minor(torch_npu)}, and torch {torch} is installed: install "
            f"torch_npu {_minor(torch)}.*, or torch {_minor(torch_npu)}.*"
        )
    wanted = CANN_OF.get(_minor(torch_npu))
    if cann is not None and wanted is not None and _older(cann, wanted):
        return (
            f"torch_npu {torch_npu} wants CANN {wanted} or later, and CANN {cann} is installed: install CANN {wanted}"
        )
    return None


def cann(environ: Mapping[str, str]) -> str | None:
    """The version that the installation behind ASCEND_HOME_PATH (ASCEND_TOOLKIT_HOME) says it has; None without one."""
    home = environ.get("ASCEND_HOME_PATH") or environ.get("ASCEND_TOOLKIT_HOME")
    for file in sorted(Path(home).glob("**/ascend_toolkit_install.info")) if home else ():
        match = re.search(r"^version\s*=\s*(\S+)", file.read_text(errors="replace"), re.MULTILINE | re.IGNORECASE)
        if match:
            return match[1]
    return None


def group(environ: Mapping[str, str], devices: int) -> str | None:
    """What is wrong with the environment of an HCCL group, or None. devices: those that this process sees."""
    there = [name for name in LAUNCHER if environ.get(name)]
    if there and len(there) < len(LAUNCHER):
        absent = [name for name in LAUNCHER if name not in there]
        have, lack = ", ".join(there), ", ".join(absent)
        return f"the environment of the group is incomplete: {have} without {lack}; start with torchrun"
    for name in LAUNCHER if there else ():
        if name != "MASTER_ADDR" and not environ[name].isdecimal():
            return f"{name}={environ[name]} is no number: start with torchrun"
    if there and int(environ["RANK"]) >= int(environ["WORLD_SIZE"]):
        return f"RANK={environ['RANK']} is none of the {environ['WORLD_SIZE']} ranks of WORLD_SIZE: they count from 0"
    table = environ.get("RANK_TABLE_FILE")
    if table and not Path(table).is_file():
        return f"RANK_TABLE_FILE names {table}, which is no file: correct it, or unset it and let HCCL find the ranks"
    named = environ.get("HCCL_SOCKET_IFNAME", "")
    wanted = [name for name in named.split(",") if name and not name.startswith(("^", "="))]
    present = [path.name for path in Path("/sys/class/net").glob("*")]
    if wanted and present and not any(name.startswith(prefix) for prefix in wanted for name in present):
        return f"HCCL_SOCKET_IFNAME={named} names no interface of this machine: it has {', '.join(sorted(present))}"
    for name in ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT"):
        if environ.get(name) and not environ[name].isdecimal():
            return f"{name}={environ[name]} is no number of seconds"
    local = environ.get("LOCAL_WORLD_SIZE", "1")
    if environ.get("ASCEND_RT_VISIBLE_DEVICES") is None and local.isdigit() and 0 < devices < int(local):
        return f"{local} workers on this machine and {devices} NPUs: each worker of an HCCL group needs one of its own"
    return None


def _loads(name: str) -> bool:
    """Whether the dynamic linker finds a library. The process keeps it, as torch_npu would."""
    import ctypes

    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # a source tree on the path
        return UNKNOWN


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _older(version: str, wanted: str) -> bool:
    found = [int(part) for part in re.findall(r"\d+", version)[:2]]
    return bool(found) and found < [int(part) for part in wanted.split(".")]
