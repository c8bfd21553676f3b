"""Decontamination on test questions that others rewrote: python -m benchmarks.decontaminate.published FOLDER

FOLDER holds, under these names, what is published (none of it is part of this project):

    test.jsonl, train.jsonl      GSM8K: github.com/openai/grade-school-math, grade_school_math/data
    rephrase_gsm8k.jsonl         its test questions, rewritten by a model: github.com/lm-sys/llm-decontaminator,
                                 data/rephrase
    gsmplus_testmini.jsonl       300 of them changed in eight ways: github.com/qtli/GSM-Plus, dataset

GSM8K's training questions, written by the same people as the test questions, should stay: what is taken of them is
taken wrongly, but for a few that have the template of a test question. Thresholds were chosen on questions with even
numbers; those with odd numbers are in rows of their own. Three of GSM-Plus' ways make another problem of nearly the
same words; they are shown apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import share, show
from benchmarks.decontaminate.__main__ import Line, by_eight_words
from ottava.labels import decontaminate, likeness

OTHERS = ("adding operation", "reversing operation", "critical thinking")
HALVES = ("tuned on", "held out")


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    asked = parser.parse_args()
    tests = [one["question"] for one in _read(asked.folder / "test.jsonl")]
    rewritten = [_question(one["text"]) for one in _read(asked.folder / "rephrase_gsm8k.jsonl")]
    lines = [Line(text, f"rewritten by a model, {HALVES[k % 2]}", k) for k, text in enumerate(rewritten)]
    lines += [Line(one["question"], "training questions", None) for one in _read(asked.folder / "train.jsonl")]
    rows = measured(tests, lines)
    changed = list(_read(asked.folder / "gsmplus_testmini.jsonl"))
    tests = sorted({one["seed_question"] for one in changed})
    place = {text: k for k, text in enumerate(tests)}
    lines = []
    for one in changed:
        kind, test = one["perturbation_type"], place[one["seed_question"]]
        words = f"{kind}, another problem" if kind in OTHERS else kind
        lines.append(Line(one["question"], f"{words}, {HALVES[test % 2]}", test))
    show(rows + measured(tests, lines), asked.json)


def measured(tests: list[str], lines: list[Line]) -> list[dict[str, Any]]:
    """A row for each kind: how many are taken, and as the right question where there is one."""
    shapes = [likeness.shape(line.text) for line in lines]
    found = {match.line: match.test for match in decontaminate.find(shapes, decontaminate.tests(tests))}
    base = by_eight_words([line.text for line in lines], tests)
    rows = []
    for kind in dict.fromkeys(line.kind for line in lines):
        places = [k for k, line in enumerate(lines) if line.kind == kind]
        taken = sum(k in found and lines[k].test in (None, found[k]) for k in places)
        by_words = sum(base[k] for k in places) / len(places)
        row = share(kind, taken, len(places))
        rows.append(row | {"ours": taken / len(places), "baseline": by_words, "of": len(places), "ratio": None})
    return rows


def _read(path: Path) -> Iterable[Any]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def _question(text: str) -> str:
    return text.removeprefix("Question: ").split("\nAnswer:")[0]


if __name__ == "__main__":
    main()
