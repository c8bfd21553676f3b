"""Collected where Huawei's Triton and compiler are installed alone (`make test-hivm`)."""

from __future__ import annotations

from importlib import metadata

try:
    collect_ignore_glob = [] if metadata.version("triton-ascend") and metadata.version("ascendnpu-ir") else ["*"]
except metadata.PackageNotFoundError:
    collect_ignore_glob = ["*"]
