"""`ottava label clean`: a data set without repeats and without test questions, and where every line of it is from.

    data.jsonl       what stays, byte for byte but for `id` and `source`, which every line has
    removed.jsonl    what went: its line, why, and which line or test question it is
    report.json      counts, the files' digests, and how near is near
    manifest.json    the digest of each of these (as of every artifact)

`source` is the SHA-256 of the line as it was; `id`, where a line has none, is made of it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ottava import artifact
from ottava.errors import DataError, ResourceError, check_file, from_os_error
from ottava.labels import decontaminate, dedup, likeness, retold
from ottava.labels.questions import writable
from ottava.tasks.base import plain

VERSION = "2"
QUESTION = ("question", "problem", "prompt", "instruction", "query", "text")
"""Where a line's question is looked for, in this order; else in the user's turns of `messages`."""
ANSWER = ("answer", "solution", "response", "completion", "output", "trace", "chosen", "rejected", "facts")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a data set. number: from 1; digest: of its bytes; whole: question and answers; tail:
    the answers, where they are short."""

    number: int
    id: str
    digest: str
    data: dict[str, Any]
    question: str
    whole: str
    tail: str


SHORT = 80
"""Characters of an answer that is compared to the letter: the other of two words is another answer."""


def clean(data: Path, against: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write the folder `out`, which must not be there; its report. Raises DataError with file:line, ResourceError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ResourceError("there is something already", where=out, fix="name another --out, or remove it")
    lines = read(data)
    tests = [(path, line) for path in against for line in read(path)]
    whole = [likeness.shape(line.whole) for line in lines]
    repeats = {found.line: found for found in dedup.find(whole, [line.tail for line in lines])}
    left = [place for place in range(len(lines)) if place not in repeats]
    shapes = [
        whole[place] if lines[place].question == lines[place].whole else likeness.shape(lines[place].question)
        for place in left
    ]
    found = decontaminate.find(shapes, decontaminate.tests([line.question for _, line in tests]))
    matches = {left[match.line]: match for match in found}
    removed = [
        _repeat(lines, repeats[place]) if place in repeats else _contaminated(lines[place], matches[place], tests)
        for place in sorted([*repeats, *matches])
    ]
    kept = [line for place, line in enumerate(lines) if place not in repeats and place not in matches]
    report = _report(data, against, lines, kept, removed, len(tests))
    _publish(out, kept, removed, report)
    return report


def read(path: Path) -> list[Line]:
    """The lines of a data set. Raises DataError with file:line where one has no question."""
    check_file(path)
    found: list[Line] = []
    ids: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    line = _line(raw.strip(), number, f"{path}:{number}")
                    if line.id in ids:
                        what = f"the id {line.id!r} is already that of line {ids[line.id]}"
                        if "id" in line.data:
                            raise DataError(what, where=f"{path}:{number}", fix="give every line an id of its own")
                        line = replace(line, id=f"{line.id}-{number}")
                    ids[line.id] = number
                    found.append(line)
    except OSError as error:
        raise from_os_error(error, "reading a data set", path) from error
    if not found:
        raise DataError("there is no line in it", where=path)
    return found


def _line(raw: bytes, number: int, where: str) -> Line:
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"this line is not JSON: {error}", where=where) from None
    if not isinstance(data, dict):
        raise DataError("a line is one JSON object", where=where)
    if b"\\u" in raw and not writable(json.dumps(data, ensure_ascii=False)):
        raise DataError("a text holds half a letter (a lone surrogate), which no file can hold", where=where)
    digest = hashlib.sha256(raw).hexdigest()
    name = data.get("id")
    if name is not None and (not isinstance(name, str | int) or isinstance(name, bool)):
        raise DataError(f"'id' is {name!r}; it must be text or a whole number", where=where)
    question, rest = _texts(data)
    if question is None:
        raise DataError(
            f"there is no question: none of {', '.join(QUESTION)} is text, and there are no messages of a user",
            where=where,
        )
    name, said = digest[:16] if name is None else str(name), "\n".join(rest)
    tail = plain(said) if len(said) <= SHORT else ""
    return Line(number, name, digest, data, question, f"{question}\n{said}" if said else question, tail)


def _texts(data: dict[str, Any]) -> tuple[str | None, list[str]]:
    """The question, and the other texts that make a line another one."""
    rest = [text for key in ANSWER if (text := _said(data.get(key)))]
    turns = data.get("messages", data.get("conversations"))
    if isinstance(turns, list):
        by_user = [_said([turn]) for turn in turns if _role(turn) in ("user", "human")]
        others = [_said([turn]) for turn in turns if _role(turn) not in ("user", "human", "system")]
        if any(by_user):
            return "\n".join(by_user), others + rest
    for key in QUESTION:
        if text := _said(data.get(key)):
            return text, rest
    return None, rest


def _role(turn: Any) -> str:
    return str(turn.get("role", turn.get("from", ""))) if isinstance(turn, dict) else ""


def _said(value: Any) -> str:
    """The text of a value: itself, or what the turns of a list say."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        turns = [turn.get("content", turn.get("value")) for turn in value if isinstance(turn, dict)]
        return "\n".join(turn.strip() for turn in turns if isinstance(turn, str))
    return ""


def _repeat(lines: Sequence[Line], repeat: dedup.Repeat) -> dict[str, Any]:
    line, of = lines[repeat.line], lines[repeat.of]
    same = "repeat: the same bytes" if line.digest == of.digest else "repeat: another writing"
    why = same if repeat.similarity == 1 else "repeat: nearly the same"
    return _gone(line, why, {"line": of.number, "id": of.id}, 1 - repeat.similarity)


def _contaminated(line: Line, match: decontaminate.Match, tests: Sequence[tuple[Path, Line]]) -> dict[str, Any]:
    path, test = tests[match.test]
    partner = {"file": str(path), "line": test.number, "id": test.id, "question": test.question}
    why = {"writing": "another writing", "words": "other words", "numbers": "other numbers"}[match.why]
    return _gone(line, f"test question: {why}", partner, match.distance)


def _gone(line: Line, why: str, partner: dict[str, Any], distance: float) -> dict[str, Any]:
    return {
        "line": line.number,
        "id": line.id,
        "source": line.digest,
        "why": why,
        "is": partner,
        "distance": round(distance, 4),
        "question": line.question,
    }


def _report(
    data: Path,
    against: Sequence[Path],
    lines: Sequence[Line],
    kept: Sequence[Line],
    removed: Sequence[dict[str, Any]],
    tests: int,
) -> dict[str, Any]:
    return {
        "lines": len(lines),
        "kept": len(kept),
        "removed": len(removed),
        "why": dict(sorted(Counter(gone["why"] for gone in removed).items())),
        "data": {"file": str(data), "sha256": artifact.file_digest(data)},
        "against": [{"file": str(path), "sha256": artifact.file_digest(path)} for path in against],
        "test_questions": tests,
        "rules": {
            "near": dedup.NEAR,
            "same_numbers": list(decontaminate.SAME),
            "formula": decontaminate.FORMULA,
            "other_numbers": decontaminate.OTHER,
            "wordy": decontaminate.WORDY,
            "told_again": [retold.AGAIN, retold.FIRM],
        },
    }


def _publish(out: Path, kept: Sequence[Line], removed: Sequence[dict[str, Any]], report: dict[str, Any]) -> None:
    """All of it, by one rename."""
    artifact.make_folder(out.parent)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with (scratch / "data.jsonl").open("w", encoding="utf-8") as file:
            for line in kept:
                file.write(json.dumps({**line.data, "id": line.id, "source": line.digest}, ensure_ascii=False) + "\n")
        with (scratch / "removed.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(gone, ensure_ascii=False) + "\n" for gone in removed)
        artifact.write_json(scratch / "report.json", report)
        key = artifact.digest_of({"version": VERSION, "data": report["data"], "against": report["against"]})
        artifact.commit(scratch, out, stage="clean", key=key, version=VERSION, summary=report)
    except OSError as error:
        raise from_os_error(error, "writing a clean data set", out) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
