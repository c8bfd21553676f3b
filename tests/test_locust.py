"""Many users at once, as locust has them: none fails, and each is told what a lone one is told."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from ottava.supervisor.local import LocalLauncher

from .test_gateway import NAME, QUESTION, USER, load_of, start
from .test_mode_matrix import FAMILIES, folder_of

PLACE = Path(".venv-locust/bin/python")
USERS = Path(__file__).with_name("users.py")
COUNT, ENOUGH = 16, 40

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PLACE.exists(), reason="make .venv-locust/installed")]


def asked() -> list[tuple[str, dict[str, Any]]]:
    """Every endpoint, both modes, plain and streamed."""
    found: list[tuple[str, dict[str, Any]]] = []
    for path, body in (
        ("/v1/chat/completions", {"messages": USER, "max_tokens": 24}),
        ("/v1/completions", {"prompt": QUESTION, "max_tokens": 24}),
        ("/v1/responses", {"input": QUESTION, "max_output_tokens": 24}),
    ):
        for stream in (False, True):
            for effort in ("high", "none"):
                how = {"reasoning_effort": effort, "temperature": 0.7, "seed": len(found), "stream": stream}
                found.append((path, {"model": NAME, **body, **how}))
    return found


def lone(client: httpx.Client, path: str, body: dict[str, Any]) -> str:
    """Reasoning, a bar and content, of a plain answer with nobody else there."""
    answer = client.post(path, json={**body, "stream": False}).json()
    if path == "/v1/responses":
        texts = {item["type"]: item["content"][0]["text"] for item in answer["output"]}
        return f"{texts.get('reasoning', '')}|{texts.get('message', '')}"
    choice = answer["choices"][0]
    message = choice["message"] if path == "/v1/chat/completions" else {**choice, "content": choice["text"]}
    return f"{message['reasoning'] or ''}|{message['content']}"


@pytest.mark.parametrize("more", [{}, {"replicas": 2}], ids=["embedded", "replicas"])
def test_many_users_at_once(launcher: LocalLauncher, tmp_path: Path, more: dict[str, Any]) -> None:
    folder = folder_of(FAMILIES["deepseek"], tmp_path / "model")
    process, url = start(launcher, folder, tmp_path, **more)
    with httpx.Client(trust_env=False, base_url=url, timeout=300) as client:
        right = [lone(client, path, body) for path, body in asked()]
    assert len(set(right)) > 6
    (tmp_path / "expected.json").write_text(json.dumps({"asked": asked(), "right": right}))
    command = [str(PLACE), "-m", "locust", "-f", str(USERS), "--headless", "--host", url, "--users", str(COUNT)]
    command += ["--spawn-rate", str(COUNT), "--run-time", "10m", "--csv", str(tmp_path / "out"), "--only-summary"]
    own = {"OTTAVA_EXPECTED": str(tmp_path / "expected.json"), "OTTAVA_ENOUGH": str(ENOUGH)}
    done = subprocess.run(command, env={**os.environ, **own, "NO_PROXY": "127.0.0.1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    with (tmp_path / "out_stats.csv").open() as lines:
        rows = {row["Name"]: row for row in csv.DictReader(lines)}
    assert len(rows) == len(asked()) + 1
    for name, row in rows.items():
        assert int(row["Failure Count"]) == 0, name
        assert int(row["Request Count"]) >= ENOUGH, name
    assert load_of(url) == 0
    process.terminate()
    assert process.wait(60) == 0
