"""`ottava chat` at a terminal: a real one (a pty), a real server, and what reached the model."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

from ottava.engine.session import Engine
from ottava.gateway.app import Gateway
from ottava.gateway.terminal import harmless

from .test_engine import Scripted, tiny_chat
from .test_gateway import NAME, QUESTION, student

ENDLESS = "1 a +1 ="  # the student answers it with 400 nines, a tenth of a second each
WORD = tiny_chat().decode([9])


@dataclass
class Asked:
    """A server, and the prompts that its model got."""

    url: str
    engine: Engine
    prompts: list[list[int]] = field(default_factory=list)


@pytest.fixture(scope="module")
def served() -> Iterator[Asked]:
    taught, seen = student(), list[list[int]]()

    def script(prompt: list[int]) -> Any:
        if prompt not in seen[-1:]:
            seen.append(prompt)
        return taught.script(prompt)

    engine = Engine(Scripted(script, delay=0.1), tiny_chat())
    server = uvicorn.Server(uvicorn.Config(Gateway(engine, NAME).app(), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Asked(f"http://127.0.0.1:{port}", engine, seen)
    server.should_exit = True
    thread.join()
    engine.close()


class Terminal:
    """The command on a pty of its own, which is its controlling terminal, so that Ctrl-C is a signal."""

    def __init__(self, *args: str):
        command = [sys.executable, "-m", "ottava.cli", "chat", *args]
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever started the tests may have it ignored
            os.execve(sys.executable, command, {**os.environ, "TERM": "xterm", "PYTHONUNBUFFERED": "1"})
        self.text = ""
        self._read = 0

    def until(self, words: str) -> str:
        """What came since the last call, up to these words."""
        deadline = time.monotonic() + 300
        while words not in self.text[self._read :]:
            assert time.monotonic() < deadline, self.text[-2000:]
            if select.select([self.fd], [], [], 1.0)[0]:
                try:
                    self.text += os.read(self.fd, 4096).decode()
                except OSError:
                    raise AssertionError(f"it ended: {self.text[-2000:]}") from None
        end = self.text.index(words, self._read) + len(words)
        found, self._read = self.text[self._read : end], end
        return found

    def type(self, line: str) -> None:
        os.write(self.fd, line.encode())

    def status(self) -> int:
        while True:
            try:
                if not os.read(self.fd, 4096):
                    break
            except OSError:  # the other side is closed
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def terminal(served: Asked) -> Iterator[Terminal]:
    made = Terminal("--url", served.url)
    made.until("> ")
    yield made
    made.close()


def prompt(thinking: bool, *turns: str) -> list[int]:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]
    return tiny_chat().render(messages, thinking)


def test_a_conversation_has_a_history_and_a_switch(served: Asked, terminal: Terminal) -> None:
    terminal.type(f"{QUESTION}\r")
    assert "6" in terminal.until("\n> ").replace(QUESTION, "")
    assert served.prompts[-1] == prompt(False, QUESTION)
    terminal.type("/think\r")
    terminal.until("thinking > ")
    terminal.type("/new\r")
    terminal.until("thinking > ")
    terminal.type(f"{QUESTION}\r")
    answer = terminal.until("thinking > ")
    assert served.prompts[-1] == prompt(True, QUESTION)
    assert "\x1b[2m" in answer  # reasoning is dim
    plain = answer.replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert "7 a +5 2 b *3 6\r\n6\r\n" in plain
    terminal.type("/direct\r")
    terminal.until("direct > ")
    terminal.type(f"{QUESTION}\r")
    terminal.until(WORD)
    assert served.prompts[-1] == prompt(False, QUESTION, "6", QUESTION)
    terminal.type("\x03")
    terminal.until("(stopped)")
    terminal.until("direct > ")
    terminal.type("/quit\r")
    assert terminal.status() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(served: Asked, terminal: Terminal) -> None:
    terminal.type(f"{ENDLESS}\r")
    terminal.until(f"{WORD} {WORD}")
    terminal.type("\x03")
    terminal.until("(stopped)")
    terminal.until("> ")
    deadline = time.monotonic() + 120
    while served.engine.load_now:  # the server was told
        assert time.monotonic() < deadline
        time.sleep(0.02)
    terminal.type("\x03")
    terminal.until("(/quit or Ctrl-D leaves)")
    terminal.until("> ")
    terminal.type("/new\r")
    terminal.until("> ")
    terminal.type(f"{QUESTION}\r")
    terminal.until("6\r\n")
    assert served.prompts[-1] == prompt(False, QUESTION)
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.status() == 0


def test_mistakes_are_said_and_forgotten(served: Asked, terminal: Terminal) -> None:
    terminal.type("/thnik\r")
    assert "/think and /direct" in terminal.until("> ")
    terminal.type("seven\r")
    assert "does not know the word 'seven'" in terminal.until("\n> ")
    terminal.type(f"{QUESTION}\r")
    terminal.until("6\r\n")
    assert served.prompts[-1] == prompt(False, QUESTION)  # without the word
    terminal.type("/quit\r")
    assert terminal.status() == 0


def test_a_question_is_piped_in(served: Asked) -> None:
    command = [sys.executable, "-m", "ottava.cli", "chat", "--url", served.url, "--thinking"]
    done = subprocess.run(command, input=f"{QUESTION}\n", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "reasoning: 7 a +5 2 b *3 6\ncontent: 6\n")
    empty = subprocess.run(command, input=" \n", capture_output=True, text=True)
    assert (empty.returncode, empty.stdout) == (2, "")
    assert "the question is empty" in empty.stderr


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert harmless("a\x1b[2Jb\x07\x9b31m\tc\n\x7fd\u200d") == "a[2Jb31m\tc\nd\u200d"
