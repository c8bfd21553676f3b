"""Parquet, and the folder that `datasets.load_dataset` takes: for those who train on labels, or count votes in SQL."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ottava.artifact import fsync, replacing, write_json
from ottava.errors import DataError, PlatformError, from_os_error
from ottava.labels import bound, exchange
from ottava.labels.exchange import Dump, Entry
from ottava.labels.questions import Answer, written

if TYPE_CHECKING:
    import pyarrow as pa

DATA = "data/train-00000-of-00001.parquet"
ROWS = 20_000
"""Items of one row group."""
_JSON_IN_VOTES, _JSON_IN_DECISIONS = ("answer",), ("answer",)


def to_parquet(content: Dump, path: Path) -> None:
    """One row an item. Answers are JSON in the nested columns; `label` is the newest decision as plain text."""
    pa, parquet = _arrow()
    schema = _schema(pa).with_metadata({exchange.MARK: json.dumps(exchange.header(content), ensure_ascii=False)})
    with replacing(path) as part, parquet.ParquetWriter(part, schema, compression="zstd") as writer:
        for first in range(0, max(len(content.entries), 1), ROWS):
            rows = [_row(entry) for entry in content.entries[first : first + ROWS]]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def from_parquet(path: Path) -> Dump:
    """Raises DataError where it is no such file."""
    pa, parquet = _arrow()
    try:
        table = parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"this is no Parquet file: {str(error)[:120]}", where=path) from None
    said = (table.schema.metadata or {}).get(exchange.MARK.encode())
    if said is None or not set(_schema(pa).names) <= set(table.schema.names):
        raise DataError("this Parquet file holds no votes of a store", where=path, fix="use one that export wrote")
    guidelines, certificates = exchange.parse_header(json.loads(said), str(path))
    rows = table.to_pylist()
    return Dump(guidelines, certificates, tuple(_entry(row, f"{path} row {k}") for k, row in enumerate(rows)))


def to_folder(content: Dump, folder: Path) -> None:
    """A new folder with the split `train`, a card and, where one is of exactly these labels, the certificate that
    `bound` reads. Raises DataError where something is in the way."""
    if folder.exists():
        raise DataError("something is there already", where=folder, fix="name a folder that is not there")
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        (scratch / "data").mkdir(parents=True)
        to_parquet(content, scratch / DATA)
        (scratch / "README.md").write_text(card(content, folder.name), encoding="utf-8")
        fsync(scratch / "README.md")
        certificate = _certificate(content)
        if certificate is not None:
            write_json(scratch / bound.FILE, certificate)
        os.replace(scratch, folder)
    except OSError as error:
        raise from_os_error(error, "writing the data set", folder) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _certificate(content: Dump) -> dict[str, Any] | None:
    """The newest certificate, if it is of all these labels and of none that was changed since."""
    if not content.certificates:
        return None
    newest = content.certificates[-1]
    labels = [[entry.item.id, entry.decisions[-1].answer if entry.decisions else None] for entry in content.entries]
    named = newest.get("decisions_sha256")  # one from elsewhere names none: then whoever gave it answers for it
    return newest if named in (None, bound.digest(labels)) and "error_upper_95" in newest else None


def from_folder(folder: Path) -> Dump:
    """What `to_folder` wrote."""
    if not (folder / DATA).is_file():
        raise DataError(f"there is no {DATA} in the folder", where=folder)
    return from_parquet(folder / DATA)


def card(content: Dump, name: str) -> str:
    """The data set's README.md: where its data are, what is in them, and what an audit proved of them."""
    entries = content.entries
    decided = sum(bool(entry.decisions) for entry in entries)
    votes = sum(vote.kind == "vote" for entry in entries for vote in entry.live())
    people = {vote.annotator for entry in entries for vote in entry.votes}
    size = next((text for top, text in _SIZES if len(entries) < top), "n>1M")
    lines = [
        "---", f"pretty_name: {json.dumps(name)}", f"size_categories:\n- {size}",
        f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {DATA}", "---", "", f"# {name}",
        "", f"{len(entries)} items, {decided} with a label; {votes} votes of {len(people)} people.", "",
        "`question` is what was asked, `label` what was decided (empty: nothing yet). `votes` says who said what, when "
        "(milliseconds since 1970, UTC), how long it took (`ms`), under which guideline, and whether blind; rows of "
        "the kind `undo` take back the one they name. `decisions` names the votes that each label rests on.", "",
    ]  # fmt: skip
    if content.certificates:
        shown = json.dumps(content.certificates[-1], indent=1, ensure_ascii=False)
        lines += ["## Certificate", "", *("    " + line for line in shown.splitlines()), ""]
    else:
        lines += ["## Certificate", "", "None: nothing is proven of how many labels are wrong.", ""]
    for version, text in sorted(content.guidelines.items()):
        lines += [f"## Guideline {version}", "", *("    " + line for line in text.splitlines()), ""]
    return "\n".join(lines)


_SIZES = ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def _schema(pa: Any) -> pa.Schema:
    text, whole = pa.string(), pa.int64()
    opinion = pa.struct([("who", text), ("answer", text)])
    vote = pa.struct(
        [("uid", text), ("annotator", text), ("kind", text), ("answer", text), ("undoes", text), ("at", whole),
         ("ms", whole), ("guideline", whole), ("blind", pa.bool_())]
    )  # fmt: skip
    decision = pa.struct(
        [("uid", text), ("answer", text), ("method", text), ("annotator", text), ("error", pa.float64()),
         ("votes", pa.list_(text)), ("at", whole), ("ms", whole), ("guideline", whole)]
    )  # fmt: skip
    return pa.schema(
        [("id", text), ("question", text), ("label", text), ("kind", text), ("content", text),
         ("classes", pa.list_(text)), ("source", text), ("digest", text), ("gold", text),
         ("opinions", pa.list_(opinion)), ("votes", pa.list_(vote)), ("decisions", pa.list_(decision))]
    )  # fmt: skip


def _row(entry: Entry) -> dict[str, Any]:
    plain, item = exchange.to_plain(entry), entry.item
    label = entry.decisions[-1].answer if entry.decisions else None
    return plain | {
        "question": item.content["question"],
        "label": label if label is None or isinstance(label, str) else written(label),
        "content": json.dumps(item.content, ensure_ascii=False),
        "digest": item.digest,
        "gold": _text(item.gold),
        "opinions": [{"who": who, "answer": written(said)} for who, said in item.opinions.items()],
        "votes": [vote | {key: _text(vote[key]) for key in _JSON_IN_VOTES} for vote in plain["votes"]],
        "decisions": [one | {key: _text(one[key]) for key in _JSON_IN_DECISIONS} for one in plain["decisions"]],
    }


def _entry(row: dict[str, Any], where: str) -> Entry:
    def value(text: str | None) -> Any:
        return None if text is None else json.loads(text)

    try:
        plain = {key: row[key] for key in ("id", "kind", "classes", "source")} | {
            "content": value(row["content"]),
            "gold": value(row["gold"]),
            "opinions": {one["who"]: value(one["answer"]) for one in row["opinions"]},
            "votes": [vote | {key: value(vote[key]) for key in _JSON_IN_VOTES} for vote in row["votes"]],
            "decisions": [one | {key: value(one[key]) for key in _JSON_IN_DECISIONS} for one in row["decisions"]],
        }
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"this row is none that export wrote: {error}", where=where) from None
    entry = exchange.from_plain(plain, where)
    if entry.item.digest != row["digest"]:
        raise DataError("the item is not the one that its digest names: the file was altered", where=where)
    return entry


def _text(answer: Answer | None) -> str | None:
    return None if answer is None else written(answer)


def _arrow() -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise PlatformError("Parquet needs pyarrow", fix="pip install 'ottava[label]'") from None
    return pyarrow, parquet
