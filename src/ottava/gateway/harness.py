"""lm-evaluation-harness against our own server: another's code asks, reads and counts.

The harness has an environment of its own (`make .venv-harness/installed`) and talks HTTP, as any client does. Its task
`ottava` is the very problems that `ottava evaluate` asks, written as a task file and a JSON Lines file, so that nothing
is fetched and both must come to the same answers. Every other name is a task of the harness's own.
Source: https://github.com/EleutherAI/lm-evaluation-harness (0.4.13).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ottava.errors import DataError, PlatformError
from ottava.models.chat import Chat
from ottava.tasks import Problem, Task
from ottava.tasks.base import row, write_lines

OWN = "ottava"
PLACE = Path(".venv-harness/bin/lm_eval")
START_S = 300.0
_NAME = "model"
_SERVE = "import json, sys; from ottava.gateway.server import serve; serve(json.loads(sys.argv[1]))"


def program() -> Path:
    """The harness: what OTTAVA_HARNESS names, else .venv-harness here, else on PATH. Raises PlatformError."""
    named = os.environ.get("OTTAVA_HARNESS")
    found = shutil.which(named or PLACE) or (None if named else shutil.which("lm_eval"))
    if found is None:
        raise PlatformError(
            "lm-evaluation-harness is not here",
            where=named or PLACE,
            fix="make .venv-harness/installed, or name its lm_eval in OTTAVA_HARNESS",
        )
    return Path(found).absolute()


def check(names: Sequence[str], task: Task) -> None:
    """Raise before the work what would be raised after it: DataError, PlatformError."""
    program()
    if not names or not all(re.fullmatch(r"[\w.:-]+", name) for name in names):
        raise DataError("these are no names of tasks", where="--harness", fix=f"{OWN}, gsm8k, ...; with commas")
    if OWN in names and not task.SAFE:
        raise DataError(
            f"the harness compares texts, and {task.NAME} needs its verifier",
            where=f"--harness {OWN}",
            fix="take a task whose answers are compared to the character, such as chains",
        )


def run(
    model: Path,
    names: Sequence[str],
    task: Task,
    problems: Sequence[Problem],
    modes: Mapping[str, int],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Serve `model` and let the harness ask it, greedily, in each mode ("thinking", "direct").

    modes: with the ids that a reply may have. rows: what our own evaluation read, by mode (`engine.measure`).
    Returns {mode: {task: {metric: value, ..., "n": questions}}}; the task `ottava` has besides `differing`: the ids of
    problems to which the harness read another answer than the rows have.
    Raises PlatformError where the server or the harness fails, with the end of what it said.
    """
    check(names, task)
    switch = Chat.load(model).thinking_key is not None
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ottava-harness-") as place, _served(model, Path(place)) as url:
        if OWN in names:
            write_task(Path(place), task, problems)
        for mode, max_new in modes.items():
            out = Path(place) / f"out-{mode}"
            _ask(Path(place), out, url, f"{_NAME}-{mode}" if switch else _NAME, names, max_new)
            found[mode] = _results(out)
            if OWN in names:
                found[mode][OWN]["differing"] = differing(rows[mode], _answers(out))
    return found


def write_task(place: Path, task: Task, problems: Sequence[Problem]) -> None:
    """The problems as a task of the harness, for its --include_path."""
    lines = (row(task.NAME, problem, prompt=task.prompt(problem)) for problem in problems)
    write_lines(place / "problems.jsonl", lines)
    config = {
        "task": OWN,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((place / "problems.jsonl").absolute())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (place / f"{OWN}.yaml").write_text(json.dumps(config, indent=1) + "\n")  # JSON is YAML


def differing(rows: Sequence[Mapping[str, Any]], answers: Mapping[str, str]) -> list[str]:
    """The ids of problems to which the harness read another answer than the rows of `measure` have."""
    return [row["id"] for row in rows if answers.get(row["id"]) != row["content"]]


@contextmanager
def _served(model: Path, place: Path) -> Iterator[str]:
    """Our server of the folder in a process of its own; its address. Raises PlatformError where it does not come up."""
    ready, log = place / "ready.json", place / "server.log"
    args = {"model": str(model.absolute()), "name": _NAME, "port": 0, "ready": str(ready), "drain_s": 5.0}
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-c", _SERVE, json.dumps(args)], stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + START_S
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise PlatformError(f"the server did not start: {_end(log.read_text(errors='replace'))}", where=model)
            time.sleep(0.05)
        yield f"http://127.0.0.1:{json.loads(ready.read_text())['port']}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ask(place: Path, out: Path, url: str, model: str, names: Sequence[str], max_new: int) -> None:
    """One run of the harness. Raises PlatformError."""
    settings = f"model={model},base_url={url}/v1/chat/completions,tokenizer_backend=none,num_concurrent=1"
    command = [str(program()), "run", "--model", "local-chat-completions", "--model_args", settings]
    command += ["--tasks", ",".join(names), "--apply_chat_template", "--log_samples", "--output_path", str(out)]
    command += ["--include_path", str(place), "--gen_kwargs", f"temperature=0,max_gen_toks={max_new}"]
    here = "127.0.0.1,localhost"
    own = {"NO_PROXY": here, "no_proxy": here, "HF_DATASETS_CACHE": str(place / "cache")}
    if set(names) == {OWN}:
        own |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)
    if done.returncode or not list(out.rglob("results_*.json")):
        raise PlatformError(
            f"lm-evaluation-harness failed: {_end(done.stderr)}",
            where=" ".join(command[:2]),
            fix="a task of its own needs its data set: is there a network? And it must be one that generates text",
        )


def _results(out: Path) -> dict[str, dict[str, Any]]:
    """{task: {metric: value, "n": questions}}, with the metrics as the harness names them."""
    (path,) = out.rglob("results_*.json")
    found = json.loads(path.read_text())
    said: dict[str, dict[str, Any]] = {}
    for name, metrics in found["results"].items():
        figures = {key: value for key, value in metrics.items() if isinstance(value, float)}
        said[name] = {**figures, "n": found.get("n-samples", {}).get(name, {}).get("effective")}
    return said


def _answers(out: Path) -> dict[str, str]:
    """What the harness read, by the problem's id."""
    (path,) = out.rglob(f"samples_{OWN}_*.jsonl")
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return {line["doc"]["id"]: line["filtered_resps"][0] for line in lines}


def _end(text: str, lines: int = 3) -> str:
    kept = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(kept[-lines:])[:600] or "it said nothing"
