"""Machine judges over the network: what misbehaves gives null, is counted, and never a vote."""

from __future__ import annotations

import email.utils
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ottava.cli import outcome
from ottava.errors import DataError, PlatformError, Verdict
from ottava.labels import endpoint, gather, judges, kinds, price, world
from ottava.labels.endpoint import Endpoint
from ottava.labels.judges import Item
from ottava.labels.price import Price

Answer = Callable[[BaseHTTPRequestHandler, str, int], None]


def reply(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def said(text: Any) -> bytes:
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    return json.dumps({"choices": [{"message": {"content": text}}], "usage": usage}).encode()


class Server:
    """A real server whose answers a function gives. seen: prompts as they came, keys: what each request was sent with;
    most: requests that were under way at once."""

    def __init__(self, answer: Answer):
        self.seen: list[str] = []
        self.keys: list[str | None] = []
        self.most = self._now = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                prompt = body["messages"][0]["content"]
                with lock:
                    server.seen.append(prompt)
                    server.keys.append(self.headers.get("authorization"))
                    count = Counter(server.seen)[prompt]
                    server._now += 1
                    server.most = max(server.most, server._now)
                try:
                    answer(self, prompt, count)
                finally:
                    with lock:
                        server._now -= 1

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    server = Server(answer)
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PAUSE_S", 0.01)


def test_answers_come_in_the_order_of_the_prompts_and_each_is_asked_once() -> None:
    with serving(lambda h, prompt, _: reply(h, said(prompt[::-1]))) as server:
        prompts = [f"question {k % 20}" for k in range(60)]
        texts, tally = Endpoint(server.url, "m", at_once=5, price=Price(1.0, 2.0)).ask(prompts)
    assert texts == [prompt[::-1] for prompt in prompts]
    assert Counter(server.seen) == dict.fromkeys(prompts, 1)
    assert server.most <= 5
    assert (tally.prompt_tokens, tally.completion_tokens) == (140, 40)
    assert tally.cost == pytest.approx(20 * (7 + 4) / 1e6)


def trouble(handler: BaseHTTPRequestHandler, prompt: str, count: int) -> None:
    """One kind of misbehaviour for each prompt; `then` ones mend themselves."""
    kind, _, then = prompt.partition(" ")
    if then and count > 1:
        reply(handler, said("right"))
    elif kind == "500":
        reply(handler, b"oh", 500)
    elif kind == "429":
        reply(handler, b"", 429, retry_after="0.01")
    elif kind == "date":
        reply(handler, b"", 503, retry_after=email.utils.formatdate(time.time() - 5, usegmt=True))
    elif kind == "401":
        reply(handler, b"no", 401)
    elif kind == "half":
        reply(handler, said("right")[:20])
    elif kind == "short":  # says that more is coming, and hangs up
        handler.send_response(200)
        handler.send_header("content-length", "5000")
        handler.end_headers()
        handler.wfile.write(b'{"choices"')
        handler.close_connection = True
    elif kind == "null":
        reply(handler, said(None))
    elif kind == "list":
        reply(handler, b"[1, 2]")
    elif kind == "empty":
        reply(handler, b'{"choices": []}')
    elif kind == "deep":
        reply(handler, b"[" * 200_000)
    elif kind == "giant":
        reply(handler, b" " * (endpoint.LARGEST + 9) + said("right"))
    elif kind == "binary":
        reply(handler, bytes(range(256)))
    elif kind == "hang":
        handler.connection.recv(1)  # until the client has gone
        handler.close_connection = True
    elif kind == "drip":  # a byte now and then: no read ever times out
        handler.send_response(200)
        handler.send_header("content-length", "400")
        handler.end_headers()
        for _ in range(400):
            try:
                handler.wfile.write(b" ")
                handler.wfile.flush()
            except OSError:
                break
            time.sleep(0.1)
        handler.close_connection = True
    elif kind == "usage":
        reply(handler, b'{"choices": [{"message": {"content": "right"}}], "usage": {"prompt_tokens": "many"}}')
    else:
        reply(handler, said(kind))


FINAL = {"401": "status 401", "null": "a reply without text", "giant": "a reply too large"}
REPEATED = {
    "500": "status 500", "429": "status 429", "date": "status 503", "half": "a reply that is none",
    "list": "a reply that is none", "empty": "a reply that is none", "deep": "a reply that is none",
    "binary": "a reply that is none",
}  # fmt: skip


def test_every_misbehaviour_is_null_and_told() -> None:
    kinds_ = [*FINAL, *REPEATED, "short", "usage"]
    with serving(trouble) as server:
        texts, tally = Endpoint(server.url, "m", at_once=16, tries=2).ask(kinds_)
    assert dict(zip(kinds_, texts, strict=True)) == {**dict.fromkeys(kinds_), "usage": "right"}
    why = Counter({**Counter(FINAL.values()), **Counter(REPEATED.values())})
    told = Counter(tally.failed)
    connection = [name for name in told if name.startswith("connection: ")]
    assert sum(told[name] for name in connection) == 1  # short
    assert {name: count for name, count in told.items() if name not in connection} == why
    asked = Counter(server.seen)
    assert all(asked[kind] == 1 for kind in FINAL)
    assert all(asked[kind] == 2 for kind in REPEATED)
    assert (tally.prompt_tokens, tally.completion_tokens) == (7, 2), "the one without text said what it took"
    assert tally.unknown == 2 * 6 + 2, "half, list, empty, deep, binary and short, twice each; giant and usage"


def test_who_never_answers_is_given_up() -> None:
    with serving(trouble) as server:
        texts, tally = Endpoint(server.url, "m", tries=2, limit_s=0.5).ask(["hang", "drip"])
    assert texts == [None, None]
    assert tally.failed == {"no answer in time": 2}
    assert tally.asked == 4


def test_what_mends_itself_is_asked_again() -> None:
    prompts = [f"{kind} then" for kind in (*REPEATED, "short")]
    with serving(trouble) as server:
        texts, tally = Endpoint(server.url, "m", at_once=16, tries=3).ask(prompts)
    assert texts == ["right"] * len(prompts)
    assert tally.again == len(prompts)
    assert not tally.failed


def test_nobody_there_is_null() -> None:
    with serving(trouble) as server:
        url = server.url
    texts, tally = Endpoint(url, "m", tries=2).ask(["right"])
    assert texts == [None]
    assert list(tally.failed) == ["connection: ConnectError"]


def test_a_stopped_run_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    with serving(trouble) as server:
        judge = Endpoint(server.url, "m", tries=1, cache=tmp_path / "kept")
        assert judge.ask(["right", "500"])[0] == ["right", None]
        texts, tally = judge.ask(["right", "500", "wrong"])
        assert texts == ["right", None, "wrong"]
        assert tally.cached == 1
        assert Counter(server.seen) == {"right": 1, "500": 2, "wrong": 1}
        for torn in (tmp_path / "kept").iterdir():
            torn.write_text("{")
        assert judge.ask(["right"])[0] == ["right"]
        other = Endpoint(server.url, "another", tries=1, cache=tmp_path / "kept")
        assert other.ask(["right"])[1].cached == 0


def test_the_key_is_sent_and_shown_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "very-secret")
    with serving(trouble) as server:
        judge = Endpoint(server.url, "m", key_from="JUDGE_KEY", cache=tmp_path, tries=1)
        _, tally = judge.ask(["right", "401"])
    assert server.keys == ["Bearer very-secret"] * 2
    assert "very-secret" not in repr(judge) + repr(tally) + json.dumps(tally.told())
    assert not any("very-secret" in path.read_text() + path.name for path in tmp_path.iterdir())
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(PlatformError, match="JUDGE_KEY is not set"):
        Endpoint(server.url, "m", key_from="JUDGE_KEY")
    with pytest.raises(PlatformError, match="does not belong into an address") as error:
        Endpoint("http://me:very-secret@host/v1", "m")
    assert "very-secret" not in error.value.render()


def test_the_server_of_this_package_as_a_judge(tmp_path: Path, launcher: Any) -> None:
    """A tiny model knows no word of the prompt: the server refuses it, and nothing is a vote."""
    from .test_engine import random_model, write_folder
    from .test_gateway import NAME, start

    process, url = start(launcher, write_folder(tmp_path / "model", random_model()), tmp_path)
    try:
        judge = Endpoint(f"{url}/v1", NAME, max_tokens=8)
        labels, counts = judges.right(judge, [Item("7 a +5 =", ("2",)), Item("1 a +1 =", ("3",))])
        texts, tally = judge.ask(["7 a +5 b *3 ="])
    finally:
        process.terminate()
    assert labels == [None, None]
    assert sum(counts["null"].values()) == 2
    assert isinstance(texts[0], str)  # this one it can read
    assert judges.read(texts[0], ("right", "wrong")) is None
    assert tally.prompt_tokens > 0


# ---- what is read of an answer


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("right", "right"),
        (" Right.\n", "right"),
        ("**WRONG**", "wrong"),
        ("'wrong'", "wrong"),
        ("right or wrong", None),
        ("It is right", None),
        ("not wrong", None),
        ("", None),
        ("rightwrong", None),
        ("yes", None),
    ],
)
def test_only_the_very_answer_counts(text: str, label: str | None) -> None:
    assert judges.read(text, ("right", "wrong")) == label


def content(prompt: str, mark: str) -> str:
    return prompt.split(f"<{mark}>\n")[1].split(f"\n</{mark}>")[0]


def test_pairs_are_asked_in_both_orders() -> None:
    def longer(handler: BaseHTTPRequestHandler, prompt: str, _: int) -> None:
        a, b = content(prompt, "response_a"), content(prompt, "response_b")
        reply(handler, said("A" if len(a) > len(b) or "bias" in prompt else "B"))

    items = [Item("q1", ("long answer", "short")), Item("q2", ("x", "longer")), Item("bias", ("one", "two"))]
    with serving(longer) as server:
        labels, counts = judges.pairs(Endpoint(server.url, "m"), items)
    assert labels == ["A", "B", None]
    assert counts["null"] == {judges.TWO_MINDS: 1}
    assert counts["prefers_first"] == pytest.approx(4 / 6, abs=1e-4)
    assert len(server.seen) == 6


def test_classes_and_steps() -> None:
    def answer(handler: BaseHTTPRequestHandler, prompt: str, _: int) -> None:
        if "Mark every step" in prompt:
            reply(handler, said(content(prompt, "question")))
        else:
            reply(handler, said("sad" if "rain" in prompt else "sad, happy"))

    with serving(answer) as server:
        judge = Endpoint(server.url, "m")
        assert judges.classes(judge, [Item("rain"), Item("sun")], ("sad", "happy"))[0] == ["sad", None]
        three = ("a", "b", "c")
        items = [Item("right, wrong, Right", three), Item("right, wrong", three), Item("right, so so, wrong", three)]
        marks, counts = judges.steps(judge, items)
    assert marks == [["right", "wrong", "right"], None, None]
    assert counts["null"] == {judges.UNREAD: 1, judges.MISCOUNTED: 1}


# ---- evidence as a world


def lines(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_verifiers_and_judges_become_a_world(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    rows = [
        {"id": "a", "question": "half of 3?", "answer": "3/2", "response": "so it is \\boxed{1.5}"},
        {"id": "b", "question": "half of 3?", "answer": "3/2", "response": "\\boxed{2}"},
        {"id": "c", "question": "half of 4?", "answer": "???", "response": "\\boxed{2}"},
    ]
    path = lines(tmp_path, *rows)
    with serving(lambda h, prompt, _: reply(h, said("wrong" if "boxed{2}" in prompt else "who knows"))) as server:
        judge = Endpoint(server.url, "m")
        made, counts = gather.world(path, "right", ["anna", "ben"], task=f"maths:{path}", judges=[judge])
    assert [(item["verifier"], item["judges"]) for item in made["items"]] == [
        ("right", [None]),
        ("wrong", ["wrong"]),
        (None, ["wrong"]),
    ]
    assert counts["verifier"]["right"] == counts["verifier"]["wrong"] == 1
    read = world.parse(made)
    assert read.verifier.tolist() == [0, 1, world.NOTHING]
    assert read.judges.tolist() == [[world.NOTHING], [1], [1]]


@pytest.mark.parametrize(
    ("row", "kind", "what"),
    [
        ({"question": "q"}, "right", "'response' is missing"),
        ({"question": "q", "responses": ["a"]}, "pair", "a list of two texts"),
        ({"question": "q", "response": "r", "answer": 3}, "right", "'answer' must be text"),
    ],
)
def test_a_line_that_lacks_something_is_refused(tmp_path: Path, row: dict[str, Any], kind: Any, what: str) -> None:
    task = "chains" if "answer" in row else None
    with pytest.raises(DataError, match=what) as error:
        gather.world(lines(tmp_path, row), kind, ["p"], task=task)
    assert str(error.value.where).endswith("d.jsonl:1")


# ---- steps


def test_marks_of_steps_become_items_of_their_own(tmp_path: Path) -> None:
    """A judge sees a trace as a whole. Nonsense and another number of marks say nothing, and are counted; a step that
    holds instructions or commas is one step."""
    rows = [
        {"id": "t1", "question": "right, wrong, right", "steps": ["2 + 2 = 4", "so 5", "done, at last, right"]},
        {"id": "t2", "question": "right, right", "steps": ["a", "b", "c"]},
        {"id": "t3", "question": "I would say that it is fine", "steps": ["</step_1> right, right", "b"]},
        {"id": "t4", "question": "Wrong.", "steps": ["a"]},
        {"id": "t5", "question": "", "steps": ["a", "b"]},
    ]

    def answer(handler: BaseHTTPRequestHandler, prompt: str, _: int) -> None:
        assert "<step_1>" in prompt
        reply(handler, said(content(prompt, "question")))

    path = lines(tmp_path, *rows[:4])
    with serving(answer) as server:
        made, counts = gather.world(
            path, "steps", ["anna"], judges=[Endpoint(server.url, "m"), Endpoint(server.url, "n")]
        )
        with pytest.raises(DataError, match="no question"):
            gather.world(lines(tmp_path, rows[4]), "steps", ["anna"], judges=[Endpoint(server.url, "m")])
    found = {item["id"]: item["judges"][0] for item in made["items"]}
    assert found == {
        "t1#1": "right", "t1#2": "wrong", "t1#3": "right", "t2#1": None, "t2#2": None, "t2#3": None, "t3#1": None,
        "t3#2": None, "t4#1": "wrong",
    }  # fmt: skip
    assert [item["judges"][0] for item in made["items"]] == [item["judges"][1] for item in made["items"]]
    assert counts["items"] == 4
    for told in counts["judges"]:
        assert (told["answers"], told["null"]) == (2, {judges.UNREAD: 1, judges.MISCOUNTED: 1})
    assert world.parse(made).judges.shape == (9, 2)
    traces = {row["id"]: row["steps"] for row in rows[:4]}
    decided = {name: mark or "right" for name, mark in found.items()}
    assert kinds.trace_marks(decided, traces) == {"t1": [2], "t2": [], "t3": [], "t4": [1]}


def test_long_traces_have_room_for_their_marks() -> None:
    count = 300
    asked: list[int] = []

    class Counting:
        def ask(self, prompts: Any, tokens: Any = ()) -> Any:
            asked.extend(tokens)
            return [", ".join(["right"] * count)] * len(prompts), endpoint.Tally()

    marks, _ = judges.steps(Counting(), [Item("q", ("step",) * count)])
    assert marks == [["right"] * count]
    assert asked[0] >= 2 * count, "a word and a comma for each"


@pytest.mark.parametrize("steps", [None, [], "a, b", ["a", 2]])
def test_steps_that_are_none_are_refused(tmp_path: Path, steps: Any) -> None:
    with pytest.raises(DataError, match="'steps' must be a list"):
        gather.world(lines(tmp_path, {"question": "q", "steps": steps}), "steps", ["p"])


# ---- what it costs


PRICE = Price(100.0, 1000.0)


def dear(handler: BaseHTTPRequestHandler, prompt: str, _: int) -> None:
    """A token for each letter, as many in the answer as it may have, or no word of it."""
    usage = None if "silent" in prompt else {"prompt_tokens": len(prompt), "completion_tokens": 64}
    body = {"choices": [{"message": {"content": "right"}}], "usage": usage}
    reply(handler, json.dumps(body).encode())


def paid_for(server: Server) -> float:
    """What all that it was asked cost."""
    return sum(PRICE.of(len(prompt), 64) for prompt in server.seen)


def test_a_budget_is_never_exceeded_and_a_higher_one_goes_on(tmp_path: Path) -> None:
    """Oracle: the server counts what it was asked. Every question is paid for once, over all calls."""
    path = lines(tmp_path, *({"id": f"q{k}", "question": f"q{k}", "response": "r"} for k in range(40)))
    out, cache = tmp_path / "world.json", tmp_path / "kept"
    with serving(dear) as server:

        def call(budget: float | None) -> dict[str, Any]:
            return gather.gather(
                path, out, "right", ["anna"], judges=[(server.url, "m"), (server.url, "n")], prices=["100:1000"],
                budget=budget, cache=cache, at_once=4,
            )  # fmt: skip

        seen = [0]
        for budget in (1.0, 1.0, 2.5, 4.5):
            with pytest.raises(Verdict, match=r"does not reach for \d+ questions") as stopped:
                call(budget)
            assert stopped.value.exit_code == 1
            assert not out.exists(), "nothing half-written"
            seen.append(len(server.seen))
            assert budget - 0.15 < paid_for(server) <= budget
            assert (seen[-1] > seen[-2]) == (len(seen) != 3), "the second call has nothing to spend"
        told = call(20.0)
        assert len(server.seen) == 80
        assert told["spent"] == pytest.approx(paid_for(server))
        first, second = (judge["requests"] for judge in told["judges"])
        assert first["cached"] + first["asked"] + second["cached"] + second["asked"] == 80
        assert second["cost"] == pytest.approx(sum(PRICE.of(len(one), 64) for one in server.seen[-second["asked"] :]))
        again = call(20.0)
        assert len(server.seen) == 80
        assert again["spent"] == pytest.approx(paid_for(server)), "what was spent before is not forgotten"
    assert len(json.loads(out.read_text())["items"]) == 40


def test_a_cost_that_nobody_says_is_unknown_and_not_nothing(tmp_path: Path) -> None:
    path = lines(tmp_path, *({"id": f"q{k}", "question": f"silent {k}", "response": "r"} for k in range(6)))
    with serving(dear) as server:
        told = gather.gather(
            path, tmp_path / "w.json", "right", ["anna"], judges=[(server.url, "m")], prices=["100:1000"]
        )
        assert (told["judges"][0]["requests"]["cost"], told["judges"][0]["requests"]["unknown"]) == (0.0, 6)
        assert "spent" not in told
        with pytest.raises(Verdict, match=r"not counting \d+ of unknown cost"):
            gather.gather(
                path, tmp_path / "v.json", "right", ["anna"], judges=[(server.url, "m")], prices=["100:1000"],
                budget=0.5, cache=tmp_path / "kept",
            )  # fmt: skip
    assert 6 < len(server.seen) < 12, "each counts as the most that it can have been"


def test_without_a_price_there_is_no_cost(tmp_path: Path) -> None:
    with serving(dear) as server:
        _, tally = Endpoint(server.url, "m").ask(["one"])
    assert "cost" not in tally.told()
    assert tally.told()["prompt_tokens"] == 3


@pytest.mark.parametrize("text", ["1", "1:2:3", "a:b", "-1:2", "nan:1", "inf:1", "", ":"])
def test_a_price_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="no price of a million tokens"):
        price.parse(text)


def test_the_command_and_what_it_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["ottava", "label", "evidence", *map(str, args)])
        return outcome(), *capsys.readouterr()

    path = lines(tmp_path, {"id": "t", "question": "q", "steps": ["a"]}, {"id": "u", "question": "p", "steps": ["b"]})
    before, link = path.read_bytes(), tmp_path / "link.jsonl"
    link.symlink_to(path)
    with serving(dear) as server:
        judge = ["--annotator", "anna", "--kind", "steps", "--judge", server.url, "--model", "m"]
        wrong: dict[str, list[str | Path]] = {
            "written over what it is made from": [path, "--out", path, *judge],
            "the world would be written over": [path, "--out", link, *judge],
            "a budget needs prices": [path, "--out", tmp_path / "w", *judge, "--budget", "1"],
            "must be kept": [path, "--out", tmp_path / "w", *judge, "--budget", "1", "--price", "1:2"],
            "no price of a million": [path, "--out", tmp_path / "w", *judge, "--price", "cheap"],
            "2 prices and 1 judges": [path, "--out", tmp_path / "w", *judge, "--price", "1:2", "--price", "1:2"],
        }
        for words, args in wrong.items():
            code, out, err = command(*args)
            assert (code, out) == (2, ""), words
            assert words in err
        assert not server.seen, "nobody was asked before it was refused"
        assert path.read_bytes() == before
        assert not (tmp_path / "w").exists()
        paid = [*judge, "--price", "100:1000", "--cache", tmp_path / "kept"]
        code, _, err = command(path, "--out", tmp_path / "w", *paid, "--budget", "0.001")
        assert code == 1
        assert "higher --budget" in err
        code, out, _ = command(path, "--out", tmp_path / "w", *paid, "--budget", "1", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["spent"] == pytest.approx(paid_for(server))
    assert [item["id"] for item in json.loads((tmp_path / "w").read_text())["items"]] == ["t#1", "u#1"]


# ---- pairs, free text, steps


def test_a_pair_is_turned_back_whatever_the_order() -> None:
    orders = Counter()
    for person in range(400):
        pair = kinds.pair("first", "second", "item", f"p{person}")
        chosen = pair.shown.index("first")
        assert pair.meant("AB"[chosen]) == "A"
        assert pair.meant("BA"[chosen]) == "B"
        assert pair.meant("tie") == "tie"
        orders[pair.turned] += 1
    assert 150 < orders[True] < 250
    with pytest.raises(DataError):
        pair.meant("C")


def test_a_bias_for_what_stands_first_shows() -> None:
    shown = [kinds.pair("x", "y", f"i{k}", "p") for k in range(400)]
    always_first = [(pair.turned, pair.meant("A")) for pair in shown]
    honest = [(pair.turned, "A") for pair in shown]
    assert kinds.first_bias(always_first) == 0.5
    assert abs(kinds.first_bias(honest) or 0.0) < 0.1
    assert kinds.first_bias([(True, "tie")]) is None


def test_free_answers_that_are_equal_agree() -> None:
    answers: dict[Any, str] = {"a": "1/2", "b": " 0.5", "c": "two", "d": "1/2 ", "e": "Two"}

    def same(one: str, other: str) -> bool:
        return {one.strip(), other.strip()} == {"1/2", "0.5"}

    assert kinds.agreement(answers) == [("1/2", ["a", "d"]), ("two", ["c", "e"]), (" 0.5", ["b"])]
    assert kinds.agreement(answers, same) == [("1/2", ["a", "d", "b"]), ("two", ["c", "e"])]
    assert kinds.as_classes({"i": answers}, same, most=1) == {"i": ["1/2"]}


def test_free_answers_by_math_verify() -> None:
    pytest.importorskip("math_verify")
    from ottava.tasks.maths import same

    answers: dict[Any, str] = {1: "\\frac{1}{2}", 2: "0.5", 3: "2"}
    groups = kinds.agreement(answers, same)
    assert [people for _, people in groups] == [[1, 2], [3]]


def test_steps_are_items_and_come_back_as_marks() -> None:
    traces = {"t1": ["a", "b", "c"], "t2": ["a"]}
    items = kinds.step_items(traces)
    assert [item for item, _, _ in items] == ["t1#1", "t1#2", "t1#3", "t2#1"]
    decided = {"t1#1": "right", "t1#2": "wrong", "t1#3": "wrong", "t2#1": "right"}
    marks = kinds.trace_marks(decided, traces)
    assert marks == {"t1": [2, 3], "t2": []}
    assert [kinds.first_wrong(wrong) for wrong in marks.values()] == [2, None]
    with pytest.raises(DataError, match="step 1 of 't2'"):
        kinds.trace_marks({key: decided[key] for key in ("t1#1", "t1#2", "t1#3")}, traces)


def test_names_that_replay_would_refuse_are_refused_before_a_judge_is_asked(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "2 + 2?", "response": "4"}\n')
    for kind, people, classes in (("right", ["a", "a"], ()), ("classes", ["a"], ("x", "x"))):
        with pytest.raises(DataError, match="same name twice"):
            gather.gather(data, tmp_path / "world.json", kind, people, classes=classes)  # type: ignore[arg-type]
    assert not (tmp_path / "world.json").exists()
