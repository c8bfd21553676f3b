"""The pages show commands as they are typed; each page says first in which environment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (
    "architecture", "conversion", "engines", "format", "labels", "planning", "report", "serving", "smollm2", "training",
)  # fmt: skip
SAID = (
    "Commands on this page need the project's environment: `source .venv/bin/activate` once, or `.venv/bin/` before "
    "each of them."
)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_with_commands_says_where_they_run(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text()
    first = re.search(r"(?m)(?:^ *|`)(?:\.venv/bin/)?(?:python -m|pytest|ottava [a-z]+) ", text)
    assert first is not None
    assert SAID in text
    assert text.index(SAID) < first.start()
