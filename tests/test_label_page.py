"""The queue page in a real browser: by keyboard alone, two people at once, cut off, reloaded; no vote is lost."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ottava.labels.questions import Item
from ottava.labels.store import Store

from .label_stores import ITEMS, KEYS, Server, divided, live, make, many, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with its driver: apt-get install chromium chromium-driver"
)
SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--window-size=1200,820",
)  # fmt: skip
PATIENCE = 60.0
"""Seconds until a test gives up on something that must happen."""


class Tab:
    """One person's browser, with nothing of anybody else's in it."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for switch in (*SWITCHES, f"--user-data-dir={self.folder.name}"):
            options.add_argument(switch)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))

    def close(self) -> None:
        self.driver.quit()
        self.folder.cleanup()

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus, as from a keyboard."""
        webdriver.ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def chord(self, held: str, key: str) -> None:
        webdriver.ActionChains(self.driver, duration=0).key_down(held).send_keys(key).key_up(held).perform()

    def run(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def text(self, id: str) -> str:
        return str(self.run(f"document.getElementById('{id}').textContent"))

    def until(self, script: str) -> Any:
        """What a script says, once it is true."""
        return wait(lambda: self.run(script), script)

    def enter(self, server: Server, who: str) -> None:
        """Open the page, and give the key."""
        self.driver.get(server.url)
        self.press(KEYS[who], "\ue007")
        self.until("current !== null")

    def answer(self, *keys: str) -> str:
        """Answer the question that is shown, and wait for another, or none: its item."""
        item = self.until("current && current.item")
        self.press(*keys)
        self.until(f"!current || current.item !== {json.dumps(item)}")
        return str(item)

    def saved(self) -> None:
        self.until("!cut && box().length === 0")

    def cut(self, offline: bool) -> None:
        self.driver.execute_cdp_cmd("Network.enable", {})
        conditions = {"offline": offline, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)

    def complaints(self) -> list[str]:
        """What the console says, but for connections that a test cut."""
        said = [str(entry["message"]) for entry in self.driver.get_log("browser")]
        return [message for message in said if "net::ERR_" not in message]

    def requests(self) -> list[str]:
        """Every address that the page asked for; not those of the browser's own pages, with which it begins."""
        found = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                found += [url] * (not url.startswith(("chrome://", "chrome-untrusted://")))
        return found


def wait(look: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def browsers() -> Iterator[list[Tab]]:
    tabs: list[Tab] = []
    yield tabs
    for one in tabs:
        one.close()


@pytest.fixture
def tabs(browsers: list[Tab]) -> Iterator[Callable[[int], Tab]]:
    """Browsers by number, empty at the beginning of each test, and without complaints at its end."""
    used = set()

    def get(number: int) -> Tab:
        while len(browsers) <= number:
            browsers.append(Tab())
        used.add(number)
        return browsers[number]

    yield get
    for number in used:
        one = browsers[number]
        one.cut(False)
        assert one.complaints() == []
        one.run("localStorage.clear(), sessionStorage.clear()")
        one.driver.get("about:blank")
        one.driver.get_log("performance")


@pytest.fixture
def tab(tabs: Callable[[int], Tab]) -> Tab:
    return tabs(0)


def served(tmp_path: Path, items: Any, *options: str) -> Any:
    return serving(make(tmp_path / "labels.db", items), *options)


def test_every_kind_by_keyboard(tab: Tab, tmp_path: Path) -> None:
    """What is pressed is what is stored, with who, how long and which guideline; a swapped pair is told right."""
    with served(tmp_path, ITEMS) as server:
        tab.enter(server, "ann")
        expected: dict[str, Any] = {}
        for _ in ITEMS:
            question = tab.until("current && !document.getElementById('card').hidden && current")
            kind, item = question["kind"], question["item"]
            if kind == "text":
                tab.press("Short & <b>plain</b>: x² < 1")
                tab.chord("\ue009", "\ue007")
                expected[item] = "Short & <b>plain</b>: x² < 1"
            elif kind == "steps":
                tab.press("1", "2")
                tab.press("\ue007")
                expected[item] = ["right", "wrong", None]
            elif kind == "pair":
                shown = tab.run("[...document.querySelectorAll('.pair .text')].map((one) => one.textContent)")
                tab.press("2")
                expected[item] = {question["content"]["a"]: "a", question["content"]["b"]: "b"}[shown[1]]
            elif kind == "choice":
                tab.press("\ue014", "\ue014", "\ue007")  # right, right, Enter
                expected[item] = "geometry"
            else:
                tab.press("2")
                expected[item] = "wrong"
            tab.until(f"!current || current.item !== {json.dumps(item)}")
        tab.saved()
        wait(lambda: "Nothing to ask" in tab.text("emptyTitle"), "the end of the queue")
        assert {item: answer for item, _, answer in live(server.store)} == expected
        with Store.read(server.store) as store:
            rows = store.db.execute("SELECT ms, guideline, blind, at, stored FROM votes").fetchall()
        for ms, guideline, blind, at, stored in rows:
            assert 0 <= ms < PATIENCE * 1000
            assert (guideline, blind) == (1, 1)
            assert abs(stored - at) < PATIENCE * 1000


def test_undo_takes_back_and_asks_again(tab: Tab, tmp_path: Path) -> None:
    with served(tmp_path, many(6)) as server:
        tab.enter(server, "ann")
        first, second = tab.answer("1"), tab.answer("1")
        tab.press("u")
        tab.until(f"current && current.item === {json.dumps(second)}")
        assert tab.run("document.querySelector('.chosen').dataset.answer") == "right", "what was said before is marked"
        assert tab.answer("2") == second
        tab.press("u", "u")  # what is taken back twice is the one before
        tab.until(f"current && current.item === {json.dumps(first)}")
        assert tab.answer("s") == first
        tab.saved()
        assert live(server.store) == []
        with Store.read(server.store) as store:
            assert store.count("votes") == 7  # right, right, undo, wrong, undo, undo, skip


def test_two_people_at_once(tabs: Callable[[int], Tab], tmp_path: Path) -> None:
    """Nobody is asked what another is at; both finish, and the forecast counts down."""
    with served(tmp_path, many(12)) as server:
        one, two = tabs(0), tabs(1)
        one.enter(server, "ann")
        two.enter(server, "bob")
        at = [set(tab.run("[current, ...ready].map((q) => q.item)")) for tab in (one, two)]
        assert not at[0] & at[1]
        answered = [[tab.answer("1") for _ in range(3)] for tab in (one, two)]
        for tab in (one, two):
            tab.saved()
        found = live(server.store)
        assert {(item, who) for item, who, _ in found} == {
            (item, who) for who, items in zip(("ann", "bob"), answered, strict=True) for item in items
        }
        assert "3 by you" in wait(lambda: "3 by you" in one.text("far") and one.text("far"), "the count")


def test_a_cut_line_loses_nothing(tab: Tab, tmp_path: Path) -> None:
    with served(tmp_path, many(30)) as server:
        tab.enter(server, "ann")
        tab.until("ready.length >= 4")
        tab.cut(True)
        items = [tab.answer("1") for _ in range(4)]
        tab.until("cut")
        assert "kept here" in tab.text("line")
        assert live(server.store) == []
        tab.cut(False)
        tab.saved()
        assert [item for item, _, _ in live(server.store)] == items


def test_a_server_that_dies_loses_nothing(tab: Tab, tmp_path: Path) -> None:
    """Killed in mid-work and started again: what was said meanwhile, an undo too, arrives once and in order."""
    with served(tmp_path, many(30)) as server:
        tab.enter(server, "ann")
        before = tab.answer("1")
        tab.saved()
        tab.until("ready.length >= 4")
        server.stop(signal.SIGKILL)
        items = [tab.answer("2"), tab.answer("1")]
        tab.press("u")
        tab.until(f"current && current.item === {json.dumps(items[1])}")
        tab.answer("2")
        tab.until("cut")
        server.start()
        tab.saved()
        assert live(server.store) == [(before, "ann", "right"), *((item, "ann", "wrong") for item in items)]


def test_a_reload_keeps_what_waits(tab: Tab, tmp_path: Path) -> None:
    """Votes that could not be sent outlive the page; another person at the same browser does not send them."""
    with served(tmp_path, many(30)) as server:
        tab.enter(server, "ann")
        tab.until("ready.length >= 4")
        tab.run("window.fetch = () => Promise.reject(new Error('cut'))")
        items = [tab.answer("1"), tab.answer("2")]
        tab.until("cut")
        tab.run("sessionStorage.clear()")
        tab.enter(server, "bob")
        tab.saved()
        assert live(server.store) == []
        tab.run("sessionStorage.clear()")
        tab.enter(server, "ann")
        tab.saved()
        assert live(server.store) == [(items[0], "ann", "right"), (items[1], "ann", "wrong")]
        asked = tab.run("[current, ...ready].map((q) => q.item)")
        assert not set(asked) & set(items)


def test_an_answer_that_was_lost_on_the_way_back(tab: Tab, tmp_path: Path) -> None:
    """The server stored the vote, and the page did not hear so: it is sent again, and stored once."""
    with served(tmp_path, many(8)) as server:
        tab.enter(server, "ann")
        tab.run(
            "window.real = window.fetch, window.lost = 0, window.fetch = async (path, options) => {"
            " const answer = await window.real(path, options);"
            " if (path === '/api/votes' && window.lost++ < 2) throw new Error('lost'); return answer; }"
        )
        item = tab.answer("1")
        tab.until("window.lost >= 3")
        tab.saved()
        assert live(server.store) == [(item, "ann", "right")]


def test_what_the_server_refuses_is_told_and_kept(tab: Tab, tmp_path: Path) -> None:
    with served(tmp_path, many(3)) as server:
        tab.enter(server, "ann")
        item = tab.run("current.item")
        server.vote("ann", item, "wrong", "uid-elsewhere")
        tab.answer("1")
        wait(lambda: "has voted" in tab.text("said"), "the refusal")
        assert tab.run("Object.keys(localStorage).filter((name) => name.startsWith('ottava.refused.')).length") == 1
        tab.saved()
        assert live(server.store) == [(item, "ann", "wrong")]


def test_nothing_leaves_the_origin_and_questions_stay_text(tab: Tab, tmp_path: Path) -> None:
    evil = (
        '<img src="http://192.0.2.1/x.png" onerror="window.struck=1"><script>window.struck=1</script> ∑ x² \\frac{1}{2}'
    )
    items = [Item(f"e{k}", "right_wrong", {"question": evil, "answer": evil}) for k in range(3)]
    with served(tmp_path, items) as server:
        tab.enter(server, "ann")
        assert tab.text("asked") == evil
        for _ in items:
            tab.answer("1")
        tab.saved()
        assert tab.run("window.struck") is None
        assert {url.split("/")[2] for url in tab.requests() if not url.startswith("data:")} == {
            f"127.0.0.1:{server.port}"
        }
        blocked = tab.driver.execute_async_script(
            "const done = arguments[0]; fetch('http://localhost:1/').then(() => done('sent'), () => done('blocked'))"
        )
        assert blocked == "blocked"
        assert any("Content Security Policy" in said for said in tab.complaints())


def test_by_tab_and_enter_alone(tab: Tab, tmp_path: Path) -> None:
    """Everything can be reached with Tab, has a name, and shows where the focus is."""
    with served(tmp_path, many(4)) as server:
        tab.enter(server, "ann")
        seen = []
        for _ in range(12):
            tab.press("\ue004")
            seen.append(tab.run("document.activeElement.textContent.trim().replace(/\\s+/g, ' ')"))
            if tab.run("document.activeElement.tagName") == "BUTTON":
                assert tab.run("getComputedStyle(document.activeElement).outlineStyle") != "none"
        for name in ("1Right", "2Wrong", "s skip", "? guideline"):
            assert name in seen, seen
        while tab.run("document.activeElement.dataset.answer") != "wrong":
            tab.press("\ue004")
        item = tab.answer("\ue007")
        tab.saved()
        assert live(server.store) == [(item, "ann", "wrong")]
        tab.press("?")
        assert tab.until("document.getElementById('guideline').open")
        assert tab.text("guidelineText") == "Judge what is written."
        tab.press("1")  # no key answers behind the guideline
        tab.press("\ue00c")
        tab.until("!document.getElementById('guideline').open")
        assert len(live(server.store)) == 1
        unnamed = tab.run(
            "[...document.querySelectorAll('button, input, textarea, dialog, [role=progressbar]')].filter((one) =>"
            " !(one.textContent.trim() || one.getAttribute('aria-label') || one.labels?.length)).length"
        )
        assert unnamed == 0


def test_a_wrong_key_is_told(tab: Tab, tmp_path: Path) -> None:
    with served(tmp_path, many(2)) as server:
        tab.driver.get(server.url)
        tab.press("not-a-key", "\ue007")
        wait(lambda: "No such key" in tab.text("wrong"), "the refusal")
        assert "401" in " ".join(tab.complaints())
        tab.press(KEYS["ann"], "\ue007")
        tab.until("current !== null")


def test_adjudication(tab: Tab, tmp_path: Path) -> None:
    """Who may, sees how often each answer was given, and by nobody's name; the decision is stored."""
    path = divided(tmp_path / "labels.db")
    with serving(path) as server:
        tab.driver.get(server.url)
        tab.press(KEYS["lea"], "\ue007")
        tab.until("!document.getElementById('adjudicate').hidden")
        tab.press("c")
        tab.until("adjudicating && current && current.item === 'q7'")
        assert "2 × Right" in tab.text("shown")
        assert "p1" not in tab.text("card")
        tab.press("2")
        tab.saved()
        wait(lambda: "No conflicts" in tab.text("said"), "the end of the conflicts")
    with Store.read(path) as store:
        assert store.db.execute("SELECT answer, method FROM decisions").fetchall() == [('"wrong"', "adjudicated")]


def test_a_run_asks_blindly_and_says_how_far_it_is(tab: Tab, tmp_path: Path) -> None:
    """The audit's questions look like all others: nothing that a machine said is in the page or in an answer to it."""
    items = [
        Item(f"b{k}", "right_wrong", {"question": f"{k}?"}, opinions={"verifier": "right", "secret-judge": "wrong"})
        for k in range(30)
    ]
    with served(tmp_path, items, "target=0.2") as server:
        tab.enter(server, "ann")
        for _ in range(6):
            tab.answer("1")
        tab.saved()
        whole = tab.run(
            "document.documentElement.outerHTML + JSON.stringify([current, ready, Object.entries(localStorage)])"
        )
        assert "secret-judge" not in whole
        assert "verifier" not in whole
        assert tab.run("$('hint').hidden")
        tab.until("$('far').textContent.includes('to be certified: 20.0%')")
        tab.until("/\\d+ to \\d+ votes to go/.test($('far').textContent)")
        with Store.read(server.store) as store:
            assert {row[0] for row in store.db.execute("SELECT blind FROM votes")} == {1}
        first = tab.answer("1")
        tab.answer("1")
        tab.saved()
        tab.press("u", "u")  # the last answer goes back, the one before it has been built upon
        wait(lambda: "cannot be taken back" in tab.text("said"), "the refusal")
        tab.saved()
        assert first in {item for item, *_ in live(server.store)}
