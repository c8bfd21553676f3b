"""Users of all three endpoints at once, for locust: what each is told must be what a lone user was told.

`python -m locust -f tests/users.py`, with OTTAVA_EXPECTED naming a JSON file of {"asked": [[path, body], ...], "right":
[text, ...]} and OTTAVA_ENOUGH the answers of each kind after which it is over. Locust has an environment of its own, so
nothing of this project is imported here.
"""

import json
import os
from pathlib import Path

import gevent
from locust import FastHttpUser, constant, events, task

EXPECTED = json.loads(Path(os.environ["OTTAVA_EXPECTED"]).read_text())
ENOUGH = int(os.environ["OTTAVA_ENOUGH"])


def read(path: str, body: dict, text: str) -> str:
    """Reasoning, a bar and content, of a plain answer or of the events of a stream."""
    if not body.get("stream"):
        parts = [json.loads(text)]
    else:
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        parts = [json.loads(line) for line in lines if line != "[DONE]"]
    if path == "/v1/responses":
        items = (parts[-1]["response"] if body.get("stream") else parts[0])["output"]
        texts = {item["type"]: item["content"][0]["text"] for item in items}
        return f"{texts.get('reasoning', '')}|{texts.get('message', '')}"
    choices = [choice for part in parts for choice in part["choices"]]
    if path == "/v1/chat/completions":
        choices = [choice["delta"] if body.get("stream") else choice["message"] for choice in choices]
    key = "text" if path == "/v1/completions" else "content"
    return "|".join("".join(choice.get(part) or "" for choice in choices) for part in ("reasoning", key))


class Somebody(FastHttpUser):
    """Asks one thing after the other."""

    wait_time = constant(0)

    @task
    def ask(self) -> None:
        """Everything once, each under a name of its own."""
        for number, ((path, body), right) in enumerate(zip(EXPECTED["asked"], EXPECTED["right"], strict=True)):
            name = f"{number} {path}{' streamed' if body.get('stream') else ''}"
            with self.client.post(path, json=body, name=name, catch_response=True) as answer:
                if answer.status_code != 200:
                    answer.failure(f"{answer.status_code}: {answer.text[:200]}")
                elif (said := read(path, body, answer.text)) != right:
                    answer.failure(f"{said[:100]!r} is not {right[:100]!r}")
                else:
                    answer.success()


@events.init.add_listener
def _until_enough(environment, **_) -> None:
    def watch() -> None:
        while True:
            gevent.sleep(0.5)
            counts = [entry.num_requests for entry in environment.stats.entries.values()]
            if environment.stats.num_failures or (len(counts) == len(EXPECTED["asked"]) and min(counts) >= ENOUGH):
                environment.runner.quit()
                return

    gevent.spawn(watch)  # not from a request's listener: that would end the user who calls it
