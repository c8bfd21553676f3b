"""What a store holds goes out in every format and comes back; what contradicts it is refused as a whole."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ottava.errors import DataError
from ottava.labels import commands, exchange, questions, studio
from ottava.labels.exchange import Dump, Entry
from ottava.labels.questions import Item
from ottava.labels.store import Decision, Refusal, Store, Vote

from .label_stores import ANSWERS, ITEMS, make

NAMES = {"jsonl": "x.jsonl", "parquet": "x.parquet", "hf": "folder", "labelstudio": "x.json", "argilla": "x.json"}
WHOLE = ("jsonl", "parquet", "hf")
"""Formats that keep undos, decisions and certificates too."""
EXAMPLES = Path(__file__).parent / "label_examples"

TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=20).filter(
    str.strip
)
MOMENTS = st.none() | st.integers(0, 4_102_444_800_000)


@st.composite
def items(draw: st.DrawFn, name: str) -> Item:
    kind = draw(st.sampled_from(questions.KINDS))
    content: dict[str, Any] = {key: draw(TEXTS) for key in questions.NEEDED[kind]}
    if kind == "steps":
        content["steps"] = draw(st.lists(TEXTS, min_size=1, max_size=4))
    classes = tuple(draw(st.lists(TEXTS, min_size=2, max_size=5, unique=True))) if kind == "choice" else ()
    item = Item(name, kind, content, classes, draw(st.just("") | TEXTS))
    opinions = draw(st.dictionaries(st.sampled_from(["verifier", "judge"]), answers(item), max_size=1))
    return replace(item, gold=draw(st.none() | answers(item)), opinions=opinions)


def answers(item: Item) -> st.SearchStrategy[Any]:
    if item.kind == "text":
        return TEXTS
    if item.kind == "steps":
        size = len(item.content["steps"])
        return st.lists(st.sampled_from(["right", "wrong", None]), min_size=size, max_size=size).filter(any)
    return st.sampled_from(item.answers())


@st.composite
def dumps(draw: st.DrawFn) -> Dump:
    """A store's content: each person votes, skips or takes it back, on each item."""
    entries, uid = [], 0
    for number in range(draw(st.integers(1, 3))):
        item = draw(items(f"item {number}"))
        votes: list[Vote] = []
        for who in draw(st.lists(st.sampled_from(["ann", "bob", "ж. 王"]), unique=True)):
            uid += 1
            kind = draw(st.sampled_from(["vote", "vote", "skip", "undone"]))
            row = Vote(
                f"uid-{uid}", item.id, who, None if kind == "skip" else draw(answers(item)),
                "skip" if kind == "skip" else "vote", None, draw(MOMENTS), draw(st.none() | st.integers(0, 86_400_000)),
                draw(st.sampled_from([None, 1, 2])), draw(st.booleans()),
            )  # fmt: skip
            votes.append(row)
            if kind == "undone":
                votes.append(replace(row, uid=f"undo-{uid}", answer=None, kind="undo", undoes=row.uid))
        decisions = ()
        if draw(st.booleans()):
            uids = tuple(vote.uid for vote in votes)
            error = draw(st.none() | st.floats(0, 1))
            decisions = (
                Decision(f"d-{number}", item.id, draw(answers(item)), "fusion", "ann", error, uids, 5, None, 1),
            )
        entries.append(Entry(item, tuple(votes), decisions))
    return Dump(
        {1: "Be fair.", 2: draw(TEXTS.filter(lambda text: text != "Be fair."))}, ({"bound": 0.02},), tuple(entries)
    )


def plain(content: Dump, whole: bool = True) -> Any:
    """What must come back. Label Studio and Argilla have no place for what was taken back, nor for decisions."""
    entries = []
    for entry in content.entries:
        kept = entry if whole else Entry(entry.item, tuple(entry.live()))
        made = exchange.to_plain(kept)
        for row in made["votes"] + made["decisions"]:  # the order of objects' keys says nothing
            row.pop("guideline") if row.get("guideline") is None else None
        entries.append(made)
    return content.guidelines, list(content.certificates), entries


@pytest.mark.parametrize("form", exchange.FORMATS)
@settings(max_examples=40)
@given(content=dumps())
def test_store_to_format_to_store(form: str, content: Dump) -> None:
    """Items, votes, who, when, how long, guideline: through a store, a file and another store."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Store.write(folder / "a.db", create=True) as store:
            exchange.load(store, content, "test")
            first = exchange.dump(store)
        assert plain(first) == plain(content)
        exchange.write(first, folder / NAMES[form], form)
        found = exchange.read(folder / NAMES[form], form)
        with Store.write(folder / "b.db", create=True) as store:
            exchange.load(store, found, "file")
            second = exchange.dump(store)
            again = exchange.load(store, found, "file")
        whole = form in WHOLE
        if form == "argilla":  # which has room for one opinion
            assert all(len(entry.item.opinions) < 2 for entry in content.entries)
        assert plain(second, whole) == plain(content, whole)
        assert (again.items, again.votes, again.decisions) == (0, 0, 0)
        assert {vote.origin for entry in second.entries for vote in entry.votes} <= {"file"}


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A store with a vote on every kind of question, a decision and a certificate."""
    path = make(tmp_path / "labels.db")
    with Store.write(path) as store:
        for item, answer in ANSWERS.items():
            store.add_vote(Vote(f"uid-{item}", item, "ann", answer, at=1_700_000_000_123, ms=4321, guideline=1))
        store.add_vote(Vote("uid-skip", "r", "bob", None, "skip", at=1_700_000_000_999, ms=10, guideline=1))
        store.add_decision(Decision("d", "r", "right", "fusion", None, 0.02, ("uid-r",), 1_700_000_001_000))
        store.add_certificate({"error_upper_95": 0.03})
    return path


def test_datasets_loads_the_folder(full: Path, tmp_path: Path) -> None:
    """Hugging Face's own loader is the judge."""
    datasets = pytest.importorskip("datasets")
    commands.give(full, tmp_path / "out", "hf", None)
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    rows = {row["id"]: row for row in loaded["train"]}
    assert rows["r"]["label"] == "right"
    assert rows["c"]["label"] is None
    assert [(vote["annotator"], vote["ms"], vote["kind"]) for vote in rows["r"]["votes"]] == [
        ("ann", 4321, "vote"),
        ("bob", 10, "skip"),
    ]
    assert json.loads(rows["s"]["votes"][0]["answer"]) == ANSWERS["s"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert '"error_upper_95": 0.03' in card
    assert "Judge what is written." in card


def test_a_folder_that_is_there_is_left_alone(full: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="something is there already"):
        commands.give(full, tmp_path / "out", "hf", None)
    assert not list((tmp_path / "out").iterdir())


def test_the_form_of_label_studio(full: Path, tmp_path: Path) -> None:
    """The fields that labelstud.io/guide/task_format lists, with the values that these votes mean."""
    commands.give(full, tmp_path / "tasks.json", "labelstudio", None)
    tasks = {task["data"]["ottava"]["id"]: task for task in json.loads((tmp_path / "tasks.json").read_text())}
    voted, skipped = tasks["r"]["annotations"]
    assert tasks["r"]["data"]["question"] == "What is 2 + 2?"
    assert voted["lead_time"] == 4.321
    assert voted["created_at"] == "2023-11-14T22:13:20.123Z"
    assert voted["result"][0] | {"meta": 0} == {
        "id": "verdict1", "from_name": "verdict", "to_name": "question", "type": "choices",
        "value": {"choices": ["right"]}, "origin": "manual", "meta": 0,
    }  # fmt: skip
    assert (voted["was_cancelled"], skipped["was_cancelled"], skipped["result"]) == (False, True, [])
    assert voted["completed_by"] != skipped["completed_by"]
    assert [region["from_name"] for region in tasks["s"]["annotations"][0]["result"]] == ["step_1", "step_2"]
    assert tasks["t"]["annotations"][0]["result"][0]["value"] == {"text": ["Shorter."]}


def read_example(name: str, form: str) -> list[Entry]:
    return list(exchange.read(EXAMPLES / name, form).entries)


def test_other_peoples_label_studio() -> None:
    """Tasks as its documentation shows them, without anything of ours: choices, pairwise, textarea."""
    first, second = read_example("labelstudio_choices.json", "labelstudio")
    assert (first.item.kind, first.item.classes) == ("choice", ("Negative", "Neutral", "Positive"))
    assert first.item.content["question"] == "The tool saved us a week."
    assert [(v.annotator, v.answer, v.ms, v.at) for v in first.votes] == [
        ("labelstudio-10", "Positive", 4288, 1_615_328_168_728),
        ("ruth@example.com", "Neutral", 12500, 1_615_331_768_000),
    ]
    assert first.item.opinions == {"model 1": "Positive"}
    assert [(v.kind, v.answer) for v in second.votes] == [("skip", None)]
    assert not first.votes[0].blind, "nobody knows what was shown"
    (pair,) = read_example("labelstudio_pairwise.json", "labelstudio")
    assert (pair.item.kind, pair.item.content["a"], pair.votes[0].answer) == ("pair", "Left text", "b")
    (text,) = read_example("labelstudio_textarea.json", "labelstudio")
    assert (text.item.kind, text.votes[0].answer) == ("text", "First line\nsecond line")


def test_other_peoples_argilla() -> None:
    first, second = read_example("argilla.json", "argilla")
    assert (first.item.id, first.item.kind, first.item.classes) == ("rec-1", "choice", ("ham", "spam"))
    assert [(vote.annotator[:13], vote.answer, vote.kind) for vote in first.votes] == [
        ("argilla-3f2a6", "spam", "vote"),
        ("argilla-9c1be", None, "skip"),
    ]
    assert [vote.answer for vote in second.votes] == ["ham"], "drafts are no votes"


def test_read_twice_foreign_files_are_stored_once(tmp_path: Path) -> None:
    for name, form in (("labelstudio_choices.json", "labelstudio"), ("argilla.json", "argilla")):
        content = exchange.read(EXAMPLES / name, form)
        with Store.write(tmp_path / f"{form}.db", create=True) as store:
            first = exchange.load(store, content, name)
            second = exchange.load(store, exchange.read(EXAMPLES / name, form), name)
        assert first.votes == second.known > 0
        assert (second.items, second.votes) == (0, 0)


def contradictions() -> Iterator[tuple[str, Dump]]:
    item = ITEMS[0]
    yield "another one", Dump(entries=(Entry(replace(item, content={"question": "?", "answer": "!"})),))
    yield "says something else", Dump(entries=(Entry(item, (Vote("uid-r", "r", "ann", "wrong"),)),))
    yield "has voted", Dump(entries=(Entry(item, (Vote("uid-new", "r", "ann", "wrong"),)),))
    yield "guideline 7", Dump(entries=(Entry(item, (Vote("uid-new", "r", "lea", "wrong", guideline=7),)),))
    yield "is another one", Dump(entries=(Entry(item, (), (Decision("d", "r", "wrong", "fusion"),)),))


@pytest.mark.parametrize(("said", "content"), list(contradictions()))
def test_a_contradiction_is_refused_as_a_whole(full: Path, said: str, content: Dump) -> None:
    new = Entry(Item("new", "text", {"question": "?"}), (Vote("uid-n", "new", "zoe", "yes"),))
    with Store.write(full) as store:
        before = plain(exchange.dump(store))
        with pytest.raises(Refusal, match=said) as refusal:
            exchange.load(store, replace(content, entries=(new, *content.entries)), "file.jsonl")
        assert "nothing was taken" in refusal.value.what
        assert refusal.value.where == "file.jsonl"
        assert plain(exchange.dump(store)) == before
        assert store.count("annotators") == 3


BARE = {"id": "a", "kind": "text", "content": {"question": "?"}}


def task(**region: Any) -> str:
    """A Label Studio task with one annotation of one region."""
    result = [{"from_name": "a", "type": "choices", "value": {}} | region]
    return json.dumps([{"id": 1, "data": {"text": "x"}, "annotations": [{"created_at": "soon", "result": result}]}])


BROKEN = [
    ("jsonl", "", "nothing in the file"),
    ("jsonl", '{"id": "a"', "not a line of JSON"),
    ("jsonl", "[]", "an item is a JSON object"),
    ("jsonl", "[" * 5000, "not a line of JSON"),
    ("jsonl", '{"ottava_labels": 2}', "knows 1"),
    ("jsonl", json.dumps(BARE | {"votes": [{"answer": "x"}]}), "names its annotator"),
    ("jsonl", json.dumps(BARE | {"votes": [{"when": 1}]}), "unknown field"),
    ("jsonl", json.dumps(BARE | {"votes": [{"annotator": "x", "ms": True}]}), "ms cannot be"),
    ("jsonl", json.dumps(BARE | {"source": "\ud800"}), "source must be a text"),
    ("jsonl", json.dumps(BARE | {"decisions": [{}]}), "a decision has its answer"),
    ("jsonl", json.dumps(BARE | {"decisions": [{"answer": "x"}]}), "a decision has its method"),
    ("jsonl", json.dumps(BARE | {"decisions": [{"answer": "x", "method": "m", "error": float("nan")}]}), "a share"),
    ("jsonl", json.dumps(BARE | {"decisions": [{"answer": "x", "method": "m", "error": 10**400}]}), "a share"),
    ("jsonl", json.dumps(BARE | {"decisions": [{"answer": "x", "method": "m", "votes": ["\ud800"]}]}), "by their ids"),
    ("jsonl", json.dumps({"ottava_labels": 1, "guidelines": {"9" * 5000: "x"}}), "texts by version"),
    ("labelstudio", "{}", "no list of tasks"),
    ("labelstudio", '[{"id": 1, "data": {"text": "x"}, "annotations": 3}]', "not Label Studio"),
    ("labelstudio", '[{"id": 1, "data": {"text": "x"}, "annotations": [{"result": 3}]}]', "not Label Studio"),
    ("argilla", '[{"id": "a", "fields": {"text": "x"}, "responses": 3}]', "not Argilla"),
    ("labelstudio", "nonsense", "not JSON"),
    ("labelstudio", '[{"id": 1}]', "a task is an object with data"),
    ("labelstudio", '[{"id": 1, "data": {"image": "x"}}]', "no field holds a question"),
    ("labelstudio", task(type="rectanglelabels"), "none of choices"),
    ("labelstudio", task(value={"choices": ["x", "y"]}), "several choices"),
    ("labelstudio", task(type="textarea", value={"text": "x"}), "not Label Studio"),
    ("argilla", "[1]", "a record is an object"),
    ("argilla", '[{"id": "a", "fields": {"text": "x"}, "responses": {"q": [{"value": "x"}]}}]', "not Argilla"),
    ("parquet", "PAR1 but not really PAR1", "no Parquet file"),
]


@pytest.mark.parametrize(("form", "text", "said"), BROKEN)
def test_broken_files_are_refused_and_leave_nothing(form: str, text: str, said: str, tmp_path: Path) -> None:
    path, store = tmp_path / NAMES[form], tmp_path / "labels.db"
    path.write_text(text)
    with pytest.raises(DataError, match=said) as refusal:
        commands.take(store, path, form, None)
    assert str(path) in (refusal.value.where or "")
    assert {file.name for file in tmp_path.iterdir()} <= {path.name, "labels.db.lock"}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(BARE | {"votes": [{"annotator": "\ud800", "answer": "x"}]}),
        json.dumps(BARE | {"decisions": [{"answer": "x", "method": "\ud800"}]}),
        json.dumps({"ottava_labels": 1, "guidelines": {"1": "\ud800"}}) + "\n" + json.dumps(BARE),
        json.dumps({"ottava_labels": 1, "certificates": [{"by": "\ud800"}]}) + "\n" + json.dumps(BARE),
    ],
)
def test_half_a_letter_is_refused_and_leaves_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(Refusal, match="nothing was taken"):
        commands.take(tmp_path / "labels.db", tmp_path / "x.jsonl", None, None)
    assert not (tmp_path / "labels.db").exists()


def test_a_refused_file_leaves_no_guideline_behind(full: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "r", "kind": "text", "content": {"question": "another"}}))
    (tmp_path / "guide.txt").write_text("Another guideline.")
    with Store.read(full) as store:
        before = store.guideline()
    with pytest.raises(Refusal):
        commands.take(full, tmp_path / "x.jsonl", None, tmp_path / "guide.txt")
    with Store.read(full) as store:
        assert store.guideline() == before


def test_what_another_process_made_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two first imports at once: the one that is refused does not take the other's store with it."""
    store, mine = tmp_path / "labels.db", tmp_path / "mine.jsonl"
    mine.write_text(json.dumps({"id": "r", "kind": "text", "content": {"question": "another"}}))
    write = Store.write

    def late(path: Path, create: bool = False) -> Store:
        monkeypatch.setattr(Store, "write", write)
        make(path)  # between the look whether there is a store, and the lock
        return write(path, create)

    monkeypatch.setattr(Store, "write", late)
    with pytest.raises(Refusal, match="another one"):
        commands.take(store, mine, None, None)
    with Store.read(store) as opened:
        assert opened.count("items") == len(ITEMS)


def test_votes_without_ids_are_told_apart_by_their_items(tmp_path: Path) -> None:
    """Two files with the same answer in the same line are two votes; the same item in another line is the same one."""
    one, two = (json.dumps(BARE | {"id": k, "votes": [{"annotator": "ann", "answer": "x"}]}) for k in "ab")
    found = []
    for text in (one, two, f"{two}\n{one}"):
        (tmp_path / "x.jsonl").write_text(text)
        found.append(commands.take(tmp_path / "labels.db", tmp_path / "x.jsonl", None, None))
    assert [said["votes"] for said in found] == [1, 1, 0]
    assert found[2]["known votes"] == 2


def test_an_export_never_replaces_a_store(full: Path, tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(full)
    for out in (full, tmp_path / "link.jsonl"):
        with pytest.raises(DataError, match="would lose every vote"):
            commands.give(full, out, "jsonl", None)
    assert commands.give(full, tmp_path / "x.jsonl", None, None)["votes"] == len(ANSWERS)


@pytest.mark.parametrize("text", ["{", "[]", '{"a":' * 100_000])
def test_a_certificate_that_is_none_is_refused(text: str, full: Path, tmp_path: Path) -> None:
    (tmp_path / "certificate.json").write_text(text)
    with pytest.raises(DataError, match="JSON"):
        commands.give(full, tmp_path / "x.jsonl", None, tmp_path / "certificate.json")
    (tmp_path / "certificate.json").write_text('{"error_upper_95": 0.01}')
    with pytest.raises(DataError, match="no format"):
        commands.give(full, tmp_path / "x.jsonl", "excel", tmp_path / "certificate.json")
    with Store.read(full) as store:
        assert store.count("certificates") == 1


def test_a_torn_parquet_file(full: Path, tmp_path: Path) -> None:
    commands.give(full, tmp_path / "x.parquet", None, None)
    content = (tmp_path / "x.parquet").read_bytes()
    for size in (0, 3, len(content) // 2, len(content) - 1):
        (tmp_path / "torn.parquet").write_bytes(content[:size])
        with pytest.raises(DataError):
            exchange.read(tmp_path / "torn.parquet", "parquet")


def test_an_export_while_somebody_writes(full: Path, tmp_path: Path) -> None:
    with Store.write(full) as store, store.together():
        store.add_vote(Vote("uid-late", "r", "lea", "right"))
        assert commands.give(full, tmp_path / "x.jsonl", None, None)["votes"] == len(ANSWERS)


def test_trace_tells_the_whole_story(full: Path) -> None:
    with Store.write(full) as store:
        store.add_vote(Vote("uid-undo", "r", "ann", None, "undo", "uid-r"))
    found = commands.trace(full, "r")
    told = commands.told(found)
    assert [event["what"] for event in found["events"]] == ["item", "vote", "skip", "decision: fusion", "undo"]
    assert found["source"] == "sums.jsonl:1"
    for word in ("4.3 s", "guideline 1", "blind", "uid-r", "2023-11-14 22:13:20"):
        assert word in told
    with pytest.raises(Refusal, match="no item is called"):
        commands.trace(full, "nothing")


def test_labels_come_from_votes(tmp_path: Path) -> None:
    """Fusion decides classes; texts and steps are decided where people agree; what a person adjudicated stays."""
    path = make(tmp_path / "labels.db")
    with Store.write(path) as store:
        for who in ("ann", "bob"):
            for item in ("r", "c", "t", "s"):
                store.add_vote(Vote(f"{who}-{item}", item, who, ANSWERS[item] if item != "t" else f"By {who}."))
        store.add_decision(Decision("lea-c", "c", "algebra", "adjudicated", "lea"))
    assert commands.decide(path)["new decisions"] > 0
    assert commands.decide(path)["new decisions"] == 0, "nothing is said twice"
    with Store.read(path) as store:
        made = {entry.item.id: entry.decisions[-1] for entry in exchange.dump(store).entries if entry.decisions}
    assert (made["r"].answer, made["r"].method, made["r"].votes) == ("right", "fusion", ("ann-r", "bob-r"))
    assert (made["c"].answer, made["c"].method) == ("algebra", "adjudicated")
    assert (made["s"].answer, made["s"].method) == (ANSWERS["s"], "agreed")
    assert "t" not in made


ORACLE = Path(__file__).parents[1] / ".venv-exchange" / "bin" / "python"
CHECK = """
import json, sys
from argilla.records._io import JsonIO
from label_studio_sdk.label_interface import LabelInterface
from label_studio_sdk.label_interface.objects import TaskValue
tasks, records, config = sys.argv[1:4]
interface = LabelInterface(open(config).read())
out = {"annotations": [], "valid": []}
for task in json.load(open(tasks)):
    TaskValue.model_validate(task)
    for annotation in task["annotations"]:
        out["annotations"].append([annotation["completed_by"], annotation["lead_time"]])
        if not annotation["was_cancelled"]:
            out["valid"].append(interface.validate_annotation(annotation))
found = JsonIO._records_from_json(records)
JsonIO.to_json(found, sys.argv[4])
out["responses"] = [[one.question_name, one.value, one.status.value] for r in found for one in r.responses]
print(json.dumps(out))
"""


@pytest.mark.skipif(
    not ORACLE.exists(), reason="make .venv-exchange/installed: Label Studio's and Argilla's own parsers"
)
@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.kind)
def test_their_own_parsers(item: Item, tmp_path: Path) -> None:
    """Label Studio's SDK and Argilla's client read what we write, and Argilla's own writing of it comes back to us."""
    path = tmp_path / "labels.db"
    with Store.write(path, create=True) as store:
        store.add_items([replace(item, opinions={"judge": ANSWERS[item.id]})])
        store.add_vote(Vote("uid-1", item.id, "ann", ANSWERS[item.id], at=1_700_000_000_123, ms=4321))
        store.add_vote(Vote("uid-2", item.id, "bob", None, "skip", at=1_700_000_000_999, ms=10))
        content = exchange.dump(store)
    exchange.write(content, tmp_path / "tasks.json", "labelstudio")
    exchange.write(content, tmp_path / "records.json", "argilla")
    files = ["tasks.json", "records.json", "tasks.config.xml", "theirs.json"]
    command = [str(ORACLE), "-c", CHECK, *(str(tmp_path / name) for name in files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads(done.stdout.splitlines()[-1])
    assert out["annotations"] == [[1, 4.321], [2, 0.01]]
    assert out["valid"] == [True]
    assert sum(status == "discarded" for _, _, status in out["responses"]) == 1
    assert (tmp_path / "tasks.config.xml").read_text() == studio.config(item)
    assert plain(exchange.read(tmp_path / "theirs.json", "argilla"), False) == plain(content, False)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As typed: items in, a key, everything out, in again elsewhere; and a user's mistakes end with 2."""
    from ottava import cli

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["ottava", "label", *words])
        return cli.outcome(), capsys.readouterr().out

    store, lines, guide = str(tmp_path / "a.db"), tmp_path / "items.jsonl", tmp_path / "guide.txt"
    lines.write_text("\n".join(json.dumps(exchange.to_plain(Entry(item))) for item in ITEMS))
    guide.write_text("Be fair.")
    code, said = run("import", store, str(lines), "--guideline", str(guide), "--json")
    assert (code, json.loads(said)["items in all"]) == (0, 5)
    code, key = run("key", store, "ann", "--lead")
    with Store.read(Path(store)) as opened:
        assert [(known.name, known.lead) for known in opened.known()] == [("ann", True)]
        assert opened.guideline() == (1, "Be fair.")
    assert (code, len(key.strip())) == (0, 32)
    certificate = tmp_path / "certificate.json"
    certificate.write_text('{"error_upper_95": 0.03}')
    code, said = run("export", store, str(tmp_path / "x.parquet"), "--certificate", str(certificate), "--json")
    assert (code, json.loads(said)["items"]) == (0, 5)
    code, said = run("import", str(tmp_path / "b.db"), str(tmp_path / "x.parquet"), "--json")
    assert (code, json.loads(said)["items"]) == (0, 5)
    with Store.read(tmp_path / "b.db") as opened:
        assert exchange.dump(opened).certificates == ({"error_upper_95": 0.03},)
        assert opened.known() == [], "keys do not travel"
    assert run("key", store, "ann", "--end")[0] == 0
    assert run("decide", store, "--json")[0] == 0
    assert "sums.jsonl:1" in run("trace", store, "r")[1]
    for words in (
        ("import", store, str(tmp_path / "nothing.jsonl")),
        ("import", store, str(guide)),
        ("export", str(tmp_path / "nowhere.db"), str(tmp_path / "y.jsonl")),
        ("export", store, str(tmp_path / "y.jsonl"), "--format", "excel"),
        ("key", store, "nobody", "--end"),
        ("trace", store, "nothing"),
        ("decide", str(tmp_path / "nowhere.db")),
    ):
        assert run(*words)[0] == 2, words
    assert not (tmp_path / "y.jsonl").exists()


def test_fields_that_mean_nothing_here_are_told_of(tmp_path: Path) -> None:
    line = {"id": "q1", "kind": "right_wrong", "content": {"question": "?", "answer": "1"}}
    (tmp_path / "x.jsonl").write_text(json.dumps(line | {"opinion": {"judge": "right"}, "topic": "sums"}))
    (tmp_path / "y.jsonl").write_text(json.dumps(line | {"opinions": {"judge": "right"}, "gold": None}))
    told = commands.take(tmp_path / "labels.db", tmp_path / "x.jsonl", None, None)
    assert told["fields not read"] == "opinion, topic"
    assert "fields not read" not in commands.take(tmp_path / "labels.db", tmp_path / "y.jsonl", None, None)
