"""Keeps secrets out of what is handed to others: a diagnosis is mailed around and pasted into tickets.

Nothing here is sure to find every secret. It replaces what it knows (values of the environment's secret-looking
variables), what says of itself that it is secret (`token=...`, `Authorization: ...`, keys of known makes, private keys,
passwords in URLs) and long strings that look random. Digests in lower-case hex stay: they are evidence.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

GONE = "[redacted]"

ALLOWED = frozenset(
    (
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR",
        "CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "HCCL_CONNECT_TIMEOUT",
        "HCCL_EXEC_TIMEOUT", "HCCL_DETERMINISTIC", "TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTHONHASHSEED", "PYTHONPATH",
        "LD_LIBRARY_PATH", "LD_PRELOAD", "LANG", "TZ", "OTTAVA_EPOCH", "OTTAVA_LEASE_S", "OTTAVA_NODE",
    )
)  # fmt: skip
"""The only variables that may be shown. They change what is computed or how workers find each other."""

SHORTEST = 6
"""Values of secret-looking variables that are shorter are left alone: they are words like `true`."""

_NAME = (
    r"(?:(?:api|access|private|secret|encryption|signing|ssh|license|master)[_-]?key|secrets?|token|passw(?:or)?d|"
    r"[a-z0-9]+_pwd|passphrase|credentials?|authorization|auth|cookie)"
)
_SECRET_NAME = re.compile(rf"{_NAME}$", re.IGNORECASE)
_PATTERNS = (
    (  # a private key, even one whose beginning or end was cut off
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----[A-Za-z0-9+/=\s\\]*(?:-----END [A-Z ]*PRIVATE KEY-----)?"
            r"|(?:^[A-Za-z0-9+/=]{8,}\r?\n)+-----END [A-Z ]*PRIVATE KEY-----",
            re.MULTILINE,
        ),
        GONE,
    ),
    (re.compile(r"(\b[a-z][a-z0-9+.-]{0,20}://)[^\s/@]{1,200}@", re.IGNORECASE), rf"\1{GONE}@"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE), rf"\1 {GONE}"),
    (
        re.compile(
            r"\b(?:hf_|sk-|pk-|rk_|gh[opusr]_|github_pat_|glpat-|xox[a-z]-|npm_|pypi-|AKIA|ASIA|AIza|ya29\.|eyJ)"
            r"[\w.-]{10,}"
        ),
        GONE,
    ),
    (re.compile(rf"(--[\w-]{{0,40}}{_NAME}[ =]+)\S+", re.IGNORECASE), rf"\1{GONE}"),
    (
        re.compile(
            rf"((?<![\w.-])[\w.-]{{0,60}}{_NAME}[\"']?\s{{0,3}}[:=]\s{{0,3}})"
            r"(?:\[redacted\]|\"[^\"\n]+\"|'[^'\n]+'|[^\s\"',;&)\]}]+)",
            re.IGNORECASE,
        ),
        rf"\1{GONE}",
    ),
)
_RUN = re.compile(r"(?<![\w+/=-])[\w+/=-]{32,}")


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that may be shown, with their values redacted all the same."""
    known = secrets(environ)
    return {name: text(value, known) for name, value in sorted(environ.items()) if name in ALLOWED}


def secrets(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The values of variables whose names look secret, longest first."""
    found = {v for name, v in environ.items() if _SECRET_NAME.search(name) and len(v) >= SHORTEST}
    return tuple(sorted(found, key=lambda value: (-len(value), value)))


def text(value: str, known: tuple[str, ...] = ()) -> str:
    """`value` without secrets. known: values to be replaced wherever they stand."""
    for secret in known:
        value = value.replace(secret, GONE)
    for pattern, instead in _PATTERNS:
        value = pattern.sub(instead, value)
    return _RUN.sub(lambda found: GONE if _random(found[0]) else found[0], value)


def data(value: Any, known: tuple[str, ...] = ()) -> Any:
    """Plain JSON data without secrets: texts as `text`, and any text that stands under a secret-looking name is gone.

    Dataclasses become objects; what JSON has no form for (paths, NaN) becomes text.
    """
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if is_dataclass(value):
        return data({one.name: getattr(value, one.name) for one in fields(value)}, known)
    if isinstance(value, Mapping):
        return {text(str(name), known): _named(str(name), item, known) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [data(item, known) for item in value]
    return text(str(value), known)


def _named(name: str, value: Any, known: tuple[str, ...]) -> Any:
    return GONE if isinstance(value, str) and value and _SECRET_NAME.search(name) else data(value, known)


def _random(run: str) -> bool:
    """Whether a part of a long word or path changes between capitals, small letters and digits as chance would."""
    for part in re.split("[/=]", run):
        kinds = ["A" if c.isupper() else "a" if c.islower() else "0" for c in part if c.isalnum()]
        changes = sum(a != b for a, b in pairwise(kinds))
        symbol = part.startswith("_Z")  # of C++
        if len(part) >= 20 and not symbol and len(set(kinds)) == 3 and changes >= 0.4 * len(kinds):
            return True
    return False
