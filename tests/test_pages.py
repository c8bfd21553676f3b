"""The pages show commands as they are typed; each page says first in which environment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ottava import stages
from ottava.recipe import load_recipe

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (
    "architecture", "conversion", "engines", "format", "labels", "planning", "report", "serving", "smollm2", "training",
)  # fmt: skip
SAID = (
    "Commands on this page need the project's environment: `source .venv/bin/activate` once, or `.venv/bin/` before "
    "each of them."
)


def test_the_recipe_with_an_engine_of_its_own_loads(tmp_path: Path) -> None:
    snippet = next(
        s for s in re.findall(r"(?s)```yaml\n(.*?)```", (DOCS / "reasoning.md").read_text()) if "engine:" in s
    )
    (tmp_path / "engine.yaml").write_text(snippet)
    its: Any = load_recipe(tmp_path / "engine.yaml", stages.specs()).stages["reinforce"]
    assert (its.rollout.engine.layout, its.rollout.engine.dtype) == ("bf16", "bfloat16")
    assert its.rollout.engine.url == "http://127.0.0.1:8000"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_with_commands_says_where_they_run(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text()
    first = re.search(r"(?m)(?:^ *|`)(?:\.venv/bin/)?(?:python -m|pytest|ottava [a-z]+) ", text)
    assert first is not None
    assert SAID in text
    assert text.index(SAID) < first.start()
