"""From nothing to a certificate: 300 answers of a model, what machines say of them, and five people.

    python examples/labels.py runs/labels

Makes a store, serves its queue, answers as the people would in their browsers, and goes on to a data set that training
may ask for its bound. Every command is printed; with people of your own only `answer` is another one. **Programs stand
in for the people here**: 92 in 100 of their answers are right. No network; about a minute.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

OTTAVA = str(Path(sys.executable).with_name("ottava"))
TARGET = "0.1"  # at most one label in ten is wrong, with 95% confidence
PEOPLE = ("ada", "bao", "chi", "dev", "eve")
RIGHT = 0.92


def items(count: int) -> list[dict[str, Any]]:
    """Sums with an answer each, one in seven wrong; a verifier that knows six in ten, and two judges."""
    draw, made = random.Random(0), []
    for k in range(count):
        a, b = draw.randrange(100, 1000), draw.randrange(100, 1000)
        right = draw.random() > 1 / 7
        truth, other = ("right", "wrong") if right else ("wrong", "right")
        opinions = {"verifier": truth} if draw.random() < 0.6 else {}
        opinions |= {judge: truth if draw.random() < 0.85 else other for judge in ("judge-a", "judge-b")}
        content = {"question": f"What is {a} + {b}?", "answer": str(a + b + (0 if right else 10))}
        made.append({"id": f"q{k}", "kind": "right_wrong", "content": content, "opinions": opinions})
    return made


def truth(content: dict[str, str]) -> str:
    a, b = content["question"].removeprefix("What is ").removesuffix("?").split(" + ")
    return "right" if int(a) + int(b) == int(content["answer"]) else "wrong"


def answer(port: int, name: str, key: str) -> int:
    """Ask and answer over HTTP until every run has ended; how many answers."""
    draw, version, votes = random.Random(name), 0, 0
    line = HTTPConnection("127.0.0.1", port)

    def post(path: str, body: dict[str, Any]) -> Any:
        line.request("POST", path, json.dumps(body), {"Authorization": f"Bearer {key}"})
        return json.loads(line.getresponse().read())

    while True:
        said = post("/api/next", {"want": 1, "guideline": version})
        version = said.get("guideline", {}).get("version", version)
        runs = said["progress"]["runs"]  # none before the first look at the store
        if runs and all(run["phase"] == "done" for run in runs):
            return votes
        if not said["questions"]:
            time.sleep(0.2)
        for question in said["questions"]:
            label = truth(question["content"])
            if draw.random() > RIGHT:
                label = "wrong" if label == "right" else "right"
            vote = {"uid": f"{name}-{votes:06}", "item": question["item"], "kind": "vote", "answer": label}
            post("/api/votes", {"votes": [vote | {"ms": 1500, "guideline": version}]})
            votes += 1


def run(*command: str) -> str:
    """One command of Ottava, printed with what it says."""
    print("$ ottava", *command, flush=True)
    said = subprocess.run([OTTAVA, *command], check=True, stdout=subprocess.PIPE, text=True).stdout
    print(said, end="", flush=True)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder to make")
    out = parser.parse_args().out
    out.mkdir(parents=True)
    store = str(out / "votes.db")
    (out / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items(300)))
    (out / "guide.txt").write_text("Right means that the sum is right, to the last digit.")

    run("label", "import", store, str(out / "items.jsonl"), "--guideline", str(out / "guide.txt"))
    keys = {name: run("label", "key", store, name).strip() for name in PEOPLE}
    serve = ("label", "serve", store, "--target-error", TARGET, "--port", "0")
    print("$ ottava", *serve, flush=True)
    with tempfile.TemporaryFile("w+") as said:
        server = subprocess.Popen([OTTAVA, *serve], stderr=said)
        try:
            port = _port(server, said)
            with ThreadPoolExecutor(len(PEOPLE)) as pool:
                votes = sum(pool.map(lambda name: answer(port, name, keys[name]), PEOPLE))
        finally:
            server.terminate()
            server.wait()
            said.seek(0)
            print(said.read(), end="", flush=True)
    print(f"(five programs gave {votes} answers over HTTP)")

    run("label", "certify", store)
    run("label", "export", store, str(out / "data"), "--format", "hf")
    run("label", "require", str(out / "data"), "--max-error", TARGET)


def _port(server: subprocess.Popen[bytes], said: Any) -> int:
    """The port that the server says it listens on."""
    while server.poll() is None:
        said.seek(0)
        for line in said.read().splitlines():
            if "http://127.0.0.1:" in line:
                return int(line.split("http://127.0.0.1:")[1].split()[0])
        time.sleep(0.1)
    raise SystemExit("the server has ended")


if __name__ == "__main__":
    main()
