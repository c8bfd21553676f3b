"""The bill of materials of a release: what the tool writes is valid, the same each time, and names what we need."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = ROOT / ".venv-sbom" / "bin" / "cyclonedx-py"  # make .venv-sbom/installed


@pytest.mark.skipif(not TOOL.exists(), reason="there is no .venv-sbom: make .venv-sbom/installed")
def test_the_bill_of_materials(tmp_path: Path) -> None:
    """Of this environment, as the Makefile has it made of the release's. The tool checks it against the schema."""
    (line,) = re.findall(r"cyclonedx-py environment \S+ (.*?) --output-file", joined(ROOT / "Makefile"))
    texts = []
    for name in ("one", "two"):
        out = tmp_path / name
        made = subprocess.run(
            [TOOL, "environment", sys.executable, *line.split(), "--output-file", out],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        texts.append(out.read_text())
    assert texts[0] == texts[1]
    bill = json.loads(texts[0])
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "ottava")
    names = {plain(component["name"]) for component in bill["components"]}
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {plain(re.split(r"[<>=!~\[]", each)[0]) for each in needed} <= names
    assert str(ROOT) not in texts[0]


def joined(makefile: Path) -> str:
    return re.sub(r"\s*\\\n\s*", " ", makefile.read_text())


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip().lower())
