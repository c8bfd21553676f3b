"""Decontamination: how many planted variants of test questions are found, and how much else is taken for one.

`python -m benchmarks.decontaminate --json`. The baseline is what most pipelines do: a line is contaminated where it
shares eight words in a row, lower-cased, with a test question (the whole question where it is shorter).
"""

from __future__ import annotations

import json
import random
import re
import resource
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import options, share, show
from benchmarks.decontaminate import sources, variants
from benchmarks.decontaminate.fourth_variants import FOURTH
from benchmarks.decontaminate.more_variants import MORE
from benchmarks.decontaminate.third_variants import THIRD
from ottava.labels import decontaminate, likeness
from ottava.labels.clean import clean


@dataclass(frozen=True)
class Line:
    """kind: the family of variants, or of negatives. test: the test question that it is; None: none of them."""

    text: str
    kind: str
    test: int | None


def tests() -> tuple[list[str], list[str]]:
    """The test questions, and where each is from."""
    found = [(text, "words") for text in sources.WORD_PROBLEMS]
    found += [(text, "latex") for text in sources.LATEX]
    found += [(sources.choice(*each), "choice") for each in sources.CHOICES]
    for name in sources.GYM:
        found += [(text, name) for text in sources.generated(name, 4, 1)]
    found += [(text, "chains") for text in sources.chains(20, "test")]
    return [text for text, _ in found], [source for _, source in found]


def planted(questions: list[str], origin: list[str], families: dict[str, variants.Variant], seed: int) -> list[Line]:
    """A variant of each kind of every question that it fits."""
    lines = []
    for kind, change in families.items():
        for place, (text, source) in enumerate(zip(questions, origin, strict=True)):
            rng = random.Random(f"{seed} {kind} {place}")
            natural = source in ("words", "latex", "choice")
            if not natural and kind not in (
                "typography",
                "inside a prompt",
                "inside other prompts",
                "inside prompts of other makers",
            ):
                continue  # what a generator makes has an order and words of its own
            if kind == "other numbers" and source != "words":
                continue
            changed = change(text, rng)
            if changed is not None and changed != text:
                lines.append(Line(changed, kind, place))
    return lines


def negatives(questions: list[str], seed: int) -> list[Line]:
    """Lines that are like test questions and are none."""
    rng = random.Random(f"negatives {seed}")
    lines, known = [], {" ".join(text.lower().split()) for text in questions}
    for name in sources.GYM:
        if name != "gsm_symbolic":  # its templates are word problems: with other numbers they are planted ones
            lines += [Line(text, "same generator", None) for text in sources.generated(name, 20, 1000 + seed)]
    lines += [Line(text, "same generator", None) for text in sources.chains(20, "train")]
    for place, ask in sources.OTHER_ASKS:
        body = re.split(r"(?<=[.?!]) (?=[A-Z])", sources.WORD_PROBLEMS[place])[:-1]
        lines.append(Line(" ".join([*body, ask]), "same story and numbers, other question", None))
        changed = variants.other_numbers(" ".join([*body, ask]), rng)
        lines.append(Line(str(changed), "same story, other numbers and question", None))
    for text in sources.LATEX:
        lines.append(
            Line(
                re.sub(r"\d+", lambda m: str(int(m[0]) + rng.randint(1, 4)), text), "same formula, other numbers", None
            )
        )
    lines += [Line(text, "same topic", None) for text in sources.SAME_TOPIC]
    return [line for line in lines if " ".join(line.text.lower().split()) not in known]


def by_eight_words(lines: list[str], questions: list[str]) -> list[bool]:
    """The baseline."""

    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[i : i + 8]) for i in range(max(len(words) - 7, 1))}

    forbidden = {gram for text in questions for gram in grams(text)}
    return [not forbidden.isdisjoint(grams(text)) for text in lines]


def table(
    families: dict[str, variants.Variant], label: str, seed: int, wrong: list[Any] | None = None
) -> list[dict[str, Any]]:
    """One row for each family and for all: recall with its interval, and precision of the whole."""
    questions, origin = tests()
    lines = planted(questions, origin, families, seed) + negatives(questions, seed)
    return judged(questions, lines, label, wrong)


def by_hand(name: str, label: str, wrong: list[Any] | None = None) -> list[dict[str, Any]]:
    """The same for a file of questions with one variant each, and of other problems beside them."""
    data = json.loads((Path(__file__).parent / name).read_text())
    lines = [Line(pair["variant"], pair["kind"], place) for place, pair in enumerate(data["pairs"])]
    lines += [Line(other["text"], other["kind"], None) for other in data["others"]]
    return judged([pair["question"] for pair in data["pairs"]], lines, label, wrong)


def hard(wrong: list[Any] | None = None) -> list[dict[str, Any]]:
    """Written by hand to be hard: variants of test questions, and other problems that look like one."""
    pairs, others = (
        [json.loads(line) for line in (Path(__file__).parent / name).read_text().splitlines()]
        for name in ("hard_pairs.jsonl", "look_alikes.jsonl")
    )
    variants = [Line(pair["variant"], pair["kind"], place) for place, pair in enumerate(pairs)]
    rows = judged([pair["question"] for pair in pairs], variants, "hard", wrong)
    alike = [Line(other["text"], other["kind"], None) for other in others]
    everything = [Line(other["text"], "all look-alikes", None) for other in others]
    tests = [other["near"] for other in others]
    return rows + judged(tests, alike, "hard", wrong) + judged(tests, everything, "hard")


def judged(questions: list[str], lines: list[Line], label: str, wrong: list[Any] | None = None) -> list[dict[str, Any]]:
    """Rows for lines of which it is known whether they are test questions."""
    shapes = [likeness.shape(line.text) for line in lines]
    found = {m.line: m for m in decontaminate.find(shapes, decontaminate.tests(questions))}
    base = by_eight_words([line.text for line in lines], questions)
    hits: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for place, line in enumerate(lines):
        ours = place in found if line.test is None else _same(found, place, line, questions)
        hits[line.kind].append((ours, base[place]))
        if wrong is not None and ours != (line.test is not None):
            wrong.append((line, found.get(place), None if line.test is None else questions[line.test]))
    rows = []
    kinds = {line.kind: line.test is not None for line in lines}
    for kind, positive in kinds.items():
        rows.append(_row(f"{label}: {'found' if positive else 'taken wrongly'}: {kind}", hits[kind]))
    good = [pair for kind, positive in kinds.items() if positive for pair in hits[kind]]
    bad = [pair for kind, positive in kinds.items() if not positive for pair in hits[kind]]
    if not good:
        return rows
    rows.append(_row(f"{label}: recall", good))
    taken, base_taken = (sum(pair[side] for pair in good + bad) for side in (0, 1))
    right, base_right = (sum(pair[side] for pair in good) for side in (0, 1))
    precision = share(f"{label}: precision", right, taken)
    rows.append({**precision, "ours": right / taken, "baseline": base_right / max(base_taken, 1), "of": taken})
    return rows


def _same(found: dict[int, Any], place: int, line: Line, questions: list[str]) -> bool:
    """Found, and as the right question."""
    return place in found and questions[found[place].test] == questions[line.test or 0]


def _row(name: str, pairs: list[tuple[bool, bool]]) -> dict[str, Any]:
    ours, base = (sum(pair[side] for pair in pairs) for side in (0, 1))
    row = share(name, ours, len(pairs))
    return {**row, "ours": ours / len(pairs), "baseline": base / len(pairs), "of": len(pairs)}


def main() -> None:
    asked = options(__doc__ or "", seed=1, show=0, tuned=0)
    wrong: list[Any] = []
    rows = table(variants.TUNED | MORE | THIRD | FOURTH, "tuned on", asked.seed, wrong)
    rows += by_hand("by_hand.json", "tuned on, by hand", wrong)
    rows += hard(wrong)
    for line, match, test in wrong[: asked.show]:
        print(f"--- {line.kind}\n{line.text}\n  test: {test}\n  {match}", file=sys.stderr)
    for row in rows:
        row["ratio"] = row["ours"] / row["baseline"] if row["baseline"] else float("inf") if row["ours"] else 1.0
    show(
        [{k: (v if v != float("inf") else None) for k, v in row.items()} for row in rows],
        asked.json,
        **({} if asked.tuned else {"speed": _speed()}),
    )


MANY = (
    "chain_sum", "word_sorting", "leg_counting", "products", "gsm_symbolic", "family_relationships",
    "calendar_arithmetic", "simple_equations", "number_sorting", "fraction_simplification",
)  # fmt: skip


def _speed() -> dict[str, Any]:
    """`ottava label clean` on 100,000 lines of generators against 600 test questions, once."""
    lines = [text for name in MANY for text in sources.generated(name, 10_000, 50_000)]
    held = [text for name in sources.GYM for text in sources.generated(name, 25, 1)]
    with tempfile.TemporaryDirectory() as folder:
        data, test = Path(folder, "data.jsonl"), Path(folder, "test.jsonl")
        for path, texts in ((data, lines), (test, held)):
            path.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
        begun, cpu = time.perf_counter(), time.process_time()
        report = clean(data, [test], Path(folder, "out"))
        took = {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"lines": len(lines), **took, "peak_gb": peak, "why": report["why"]}


if __name__ == "__main__":
    main()
