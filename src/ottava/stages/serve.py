"""Does the converted model answer as a service? A real server, asked by the client that users have.

The folder that is served is the master itself. Both modes are asked plainly and streamed, the two must
agree, thinking must come apart from content, and a server that is told to stop must finish what it
has begun. Whether this one answer is right is told apart from whether the service works.

    answers.json          what was asked, what came back in each mode, and which checks held
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ottava import recipe, tasks
from ottava.artifact import Artifact, write_json
from ottava.errors import PlatformError
from ottava.tasks import verify
from ottava.tasks.base import problem_of, read_lines

if TYPE_CHECKING:
    from openai import OpenAI

    from ottava.context import Context, Process

VERSION = "1"
INPUTS = ("convert", "?verify", "?label")

DRAIN_S = 60.0


class Spec(recipe.Spec):
    """What to ask. With a label artifact, one of its test problems is asked instead of `question`."""

    budget_s: Annotated[float, Field(gt=0, description="wall seconds planned for this stage")] = 15.0
    question: str = "What is the capital of France?"
    expect: Annotated[str | None, Field(description="words of a right answer to `question`; told, not required")] = None
    max_tokens: Annotated[int, Field(ge=2, description="ids that a reply may have")] = 96
    thinking_tokens: Annotated[int, Field(ge=1, description="budget of thinking; then </think> is forced")] = 64
    start_s: Annotated[float, Field(gt=0, description="seconds that the server may take to start")] = 120.0


@dataclass(frozen=True)
class Answer:
    """What came back. reasoning None: the reply had none."""

    reasoning: str | None
    content: str | None
    finish: str | None


def run(spec: Spec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Start, ask in each mode, compare with the stream, stop in mid-stream. Raises PlatformError."""
    try:
        import openai
    except ImportError:
        raise PlatformError("the openai client is not installed", fix="pip install -e '.[demo]'") from None
    folder = inputs["convert"].file("model")
    problem = _problem(inputs.get("label"))
    question = problem["question"] if problem else spec.question
    ctx.progress(0.0, "starting the server")
    ready = ctx.work / "ready.json"
    ready.unlink(missing_ok=True)
    args = {"model": str(folder), "name": ctx.recipe_name, "port": 0, "ready": str(ready), "drain_s": DRAIN_S}
    process = ctx.spawn("ottava.gateway.server:serve", args)
    try:
        client = _client(f"http://127.0.0.1:{_port(process, ready, spec.start_s)}/v1")
        ctx.progress(0.5, "asking")
        switch = f"{ctx.recipe_name}-thinking" in [model.id for model in client.models.list()]
        plain, streamed = {}, True
        for thinking in (True, False) if switch else (False,):
            request = _request(spec, ctx.recipe_name, question, thinking if switch else None)
            mode = "thinking" if thinking else "direct"
            plain[mode] = _plain(client, request)
            streamed = streamed and _stream(client, request) == plain[mode]
        ctx.progress(0.9, "stopping it in mid-stream")
        drained = _drained(client, _request(spec, ctx.recipe_name, question, True if switch else None), process)
    except openai.OpenAIError as error:
        raise PlatformError(f"the server failed a request: {error}", where=process.log) from error
    finally:
        if process.alive():
            process.kill()
            process.wait(10)
    summary = _summary(folder, question, _grade(spec, problem), plain, streamed, drained)
    write_json(ctx.out / "answers.json", {**summary, "answers": {mode: asdict(a) for mode, a in plain.items()}})
    checks = (summary["thinking_ok"] in (True, None), summary["direct_ok"], streamed, drained)
    return ctx.commit(summary, verdict=all(checks))


def _problem(label: Artifact | None) -> dict[str, Any] | None:
    """A test problem of middle length, where there are any."""
    if label is None:
        return None
    lines = read_lines(label.file("test.jsonl"))
    return lines[len(lines) // 2]


def _port(process: Process, ready: Path, seconds: float) -> int:
    """The server's port once it listens and is healthy. Raises PlatformError where it dies or takes too long."""
    import httpx

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not process.alive():
            raise PlatformError(f"the server ended with status {process.wait(0)}", where=process.log)
        if ready.exists():
            port = int(json.loads(ready.read_text())["port"])
            httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False, timeout=10).raise_for_status()
            return port
        time.sleep(0.05)
    raise PlatformError(f"the server did not start within {seconds:.0f} seconds", where=process.log)


def _client(url: str) -> OpenAI:
    """The official client, pointed at the loopback server: no proxy, no retries that would hide a fault."""
    import openai

    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120, http_client=http)


def _request(spec: Spec, model: str, question: str, thinking: bool | None) -> dict[str, Any]:
    """Arguments of the client. thinking None: the model has no switch."""
    extra: dict[str, Any] = {}
    if thinking is True:
        extra = {"thinking": {"type": "enabled", "budget_tokens": spec.thinking_tokens}}
    elif thinking is False:
        extra = {"thinking": {"type": "disabled"}}
    messages = [{"role": "user", "content": question}]
    tokens = {"max_tokens": spec.max_tokens, "temperature": 0.0}
    return {"model": model, "messages": messages, **tokens, "extra_body": extra}


def _plain(client: OpenAI, request: Mapping[str, Any]) -> Answer:
    choice = client.chat.completions.create(**request).choices[0]
    return Answer(getattr(choice.message, "reasoning", None), choice.message.content, choice.finish_reason)


def _stream(client: OpenAI, request: Mapping[str, Any]) -> Answer:
    """The same, put together from a stream."""
    parts: dict[str, list[str]] = {"reasoning": [], "content": []}
    finish = None
    for chunk in client.chat.completions.create(**request, stream=True):
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            for name, texts in parts.items():
                if getattr(choice.delta, name, None) is not None:
                    texts.append(getattr(choice.delta, name))
    return Answer("".join(parts["reasoning"]) if parts["reasoning"] else None, "".join(parts["content"]), finish)


def _drained(client: OpenAI, request: Mapping[str, Any], process: Process) -> bool:
    """SIGTERM after the first event of a stream: does the stream finish, and the process end with status 0?

    A tiny model may have generated its whole answer by then; the gateway's tests hold it in mid-answer.
    """
    finish = None
    try:
        for number, chunk in enumerate(client.chat.completions.create(**request, stream=True)):
            if number == 0:
                process.terminate()
            for choice in chunk.choices:
                finish = choice.finish_reason or finish
    except Exception:  # whatever broke the stream, of whichever library: it did not finish
        return False
    return finish is not None and process.wait(DRAIN_S + 10) == 0


def _grade(spec: Spec, problem: Mapping[str, Any] | None) -> Callable[[str], bool] | None:
    """Whether an answer is right: by the problem's task, else by the words that are expected; None: nobody knows."""
    if problem is not None:
        return lambda content: verify.grade(tasks.get(problem["task"]), problem_of(problem), content).right
    if spec.expect is not None:
        wanted = spec.expect.casefold()
        return lambda content: wanted in content.casefold()
    return None


def _summary(
    folder: Path,
    question: str,
    right: Callable[[str], bool] | None,
    plain: Mapping[str, Answer],
    streamed: bool,
    drained: bool,
) -> dict[str, Any]:
    thinking, direct = plain.get("thinking"), plain["direct"]

    def correct(answer: Answer | None) -> bool | None:
        return None if right is None or answer is None else right(answer.content or "")

    return {
        "model_dir": str(folder),
        "example": {
            "question": question,
            "thinking": thinking and {"reasoning": thinking.reasoning, "content": thinking.content},
            "direct": {"content": direct.content},
        },
        "thinking_ok": None if thinking is None else bool(thinking.reasoning and thinking.content),
        "direct_ok": bool(direct.content) and direct.reasoning is None,
        "streamed": streamed,
        "drained": drained,
        "correct": {"thinking": correct(thinking), "direct": correct(direct)},
    }
