"""The six at their real sizes: parameters as published, memory and time that follow from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ottava.models.build import from_config
from ottava.planner import chips, students

FLEETS = Path(__file__).parent.parent / "fleets"
PUBLISHED = {  # billions, as the hub counts the safetensors of each model
    "R1-Distill-Qwen-1.5B": 1.78, "R1-Distill-Qwen-7B": 7.62, "R1-Distill-Llama-8B": 8.03,
    "R1-Distill-Qwen-14B": 14.77, "R1-Distill-Qwen-32B": 32.76, "R1-Distill-Llama-70B": 70.55,
}  # fmt: skip


@pytest.fixture(scope="module")
def work() -> students.Distillation:
    return students.load(FLEETS / "students.json")


def test_the_shapes_have_the_published_parameters(work: students.Distillation) -> None:
    assert {s.name: round(s.parameters() / 1e9, 2) for s in work.students} == PUBLISHED


def test_the_count_is_that_of_the_model_class(work: students.Distillation) -> None:
    """A small model of the same formula, built."""
    small = work.students[2].model_copy(
        update={"layers": 3, "hidden": 64, "width": 96, "heads": 4, "kv_heads": 2, "vocabulary": 50}
    )
    config = {
        "model_type": "llama", "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    assert sum(p.numel() for p in from_config(config).parameters()) == small.parameters()


def test_memory_and_time_follow(work: students.Distillation) -> None:
    rows = students.plan(work, chips.load(FLEETS / "chips.json"))
    assert len(rows) == 6 * len(work.chips)
    for row in rows:
        chip = chips.load(FLEETS / "chips.json").chips[row["chip"]]
        assert row["chips"] * chip.memory_gb.value * students.USABLE >= row["memory_gb"]
        assert row["chips"] == 1 or row["chips"] / 2 * chip.memory_gb.value * students.USABLE < row["memory_gb"]
        hours = row["hours"]
        assert (hours["mid"] is None) == row["claim"].startswith("a lower bound")
        if hours["mid"] is not None:
            assert hours["low"] < hours["mid"] < hours["high"]
    by_size = [row["hours"]["low"] * row["chips"] for row in rows if row["chip"] == "H800"]
    assert by_size == sorted(by_size)
