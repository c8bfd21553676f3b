"""A process that checks answers for another one, so that a verifier that hangs, dies or eats memory can be killed.

`python -m ottava.tasks.grader MEMORY_MB`: one JSON object a line in, one out, in order. {"load": task} is answered by
{"loaded": true}; {"task", "problem", "text"} by {"right": bool}; whatever is raised by {"raised": text}.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from ottava.tasks.base import get, problem_of
from ottava.tasks.own import described


def judge(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request. Never raises."""
    try:
        if "load" in request:
            get(request["load"])
            return {"loaded": True}
        verdict = get(request["task"]).check_answer(problem_of(request["problem"]), request["text"])
        if verdict is True or verdict is False:
            return {"right": verdict}
        return {"raised": f"NotABool: the verifier returned {verdict!r}"[:500]}
    except BaseException as error:  # sys.exit in a verifier is a verdict on the verifier
        return {"raised": described(error)}


def _follow(parent: int) -> None:
    """End with the process that asked. (Linux's signal for this would come when the asking *thread* ends.)"""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def main(memory_mb: int) -> None:
    """Serve until standard input ends."""
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # what a verifier prints is no reply, and what it reads no request
        os.dup2(nothing, standard)
    for line in requests:
        replies.write(json.dumps(judge(json.loads(line))) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
