"""`ottava supervise`: any command, killed for real, with the line and without."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from ottava import journal
from ottava.errors import RecipeError, TrainingFailed
from ottava.journal import Journal
from ottava.recipe import Pool
from ottava.supervisor import command
from ottava.supervisor.command import Care, Run, supervise
from ottava.supervisor.local import LocalLauncher

TRAINER = """
import os, pathlib, signal, sys, time
from ottava.link import connect

line, steps, state = connect(), int(sys.argv[1]), pathlib.Path(os.environ["OTTAVA_STATE"])
state.mkdir(parents=True, exist_ok=True)
mine = state / f"rank{os.environ['RANK']}"
step = int(mine.read_text()) if mine.exists() else 0
line.join(step=step)
while step < steps and not line.stopping:
    time.sleep(0.02)
    step += 1
    line.check()
    if step % 2 == 0:
        mine.with_suffix(".part").write_text(str(step))
        mine.with_suffix(".part").rename(mine)
    line.step(step, loss=1.0 / step)
    fault = state / "fault"
    if os.environ["RANK"] == "0" and step == 7 and not fault.exists():
        fault.touch()
        os.kill(os.getpid(), int(sys.argv[2]))
line.bye(step)
"""


def run_of(tmp_path: Path, launcher: LocalLauncher, *words: str, code: str = TRAINER, **more: Any) -> Run:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(code))
    pools = more.pop("pools", (Pool(name="local", workers=2),))
    out = tmp_path / "run"
    return Run([sys.executable, str(script), *words], pools, out, Journal(out / "journal.jsonl"), launcher, **more)


def test_a_killed_command_goes_on_where_its_own_state_is(tmp_path: Path, launcher: LocalLauncher) -> None:
    found = supervise(run_of(tmp_path, launcher, "12", str(int(signal.SIGKILL))))
    assert found["ended"] == "finished"
    assert (found["steps"], found["starts"], found["lost_steps"]) == (12, 2, 1)  # states are kept every other step
    assert [(fault["kind"], fault["chips"]) for fault in found["faults"]] == [("killed", [0])]
    assert (tmp_path / "run" / "state" / "rank0").read_text() == "12"


def test_a_worker_may_die_as_often_as_restarts_say(tmp_path: Path, launcher: LocalLauncher) -> None:
    """The number of workers is the trainer's business: none is left out, however often it died."""
    code = """
        import os, pathlib, signal
        state = pathlib.Path(os.environ["OTTAVA_STATE"]); state.mkdir(parents=True, exist_ok=True)
        died = sorted(state.glob("died*"))
        if os.environ["RANK"] == "0" and len(died) < 3:
            (state / f"died{len(died)}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.environ["WORLD_SIZE"] == "2"
        """
    found = supervise(run_of(tmp_path, launcher, code=code))
    assert (found["ended"], found["starts"]) == ("finished", 4)
    (tmp_path / "again").mkdir()
    with pytest.raises(TrainingFailed, match="no pool is left"):
        supervise(run_of(tmp_path / "again", launcher, code=code, care=Care(restarts=2)))


def test_a_command_that_hangs_is_started_again(tmp_path: Path, launcher: LocalLauncher) -> None:
    run = run_of(tmp_path, launcher, "12", str(int(signal.SIGSTOP)), care=Care(hang_s=2.0, hang_least_s=2.0))
    found = supervise(run)
    assert found["ended"] == "finished"
    assert [(fault["kind"], fault["chips"]) for fault in found["faults"]] == [("hang", [0])]


def test_a_worker_that_hangs_says_where_it_stands(tmp_path: Path, launcher: LocalLauncher) -> None:
    """Its listening thread writes the stack, though the trainer set up no handler of its own."""
    code = TRAINER.replace("os.kill(os.getpid(), int(sys.argv[2]))", "time.sleep(600)  # waits for a lost peer")
    run = run_of(tmp_path, launcher, "12", "0", code=code, care=Care(restarts=0, hang_s=2.0, hang_least_s=2.0))
    with pytest.raises(TrainingFailed, match="no step for 2 s"):
        supervise(run)
    (bundle,) = (run.folder / "diagnosis").iterdir()
    line = code.splitlines().index("        time.sleep(600)  # waits for a lost peer") + 1
    assert f'train.py", line {line}' in (bundle / "stacks" / "rank-0.txt").read_text()


def test_a_command_without_the_line_is_watched_for_its_end(tmp_path: Path, launcher: LocalLauncher) -> None:
    code = """
        import os, pathlib, sys, time
        time.sleep(1.0)  # longer than hang_s: it never spoke, so it does not count
        mark = pathlib.Path(os.environ["OTTAVA_STATE"]); mark.mkdir(parents=True, exist_ok=True)
        mark = mark / os.environ["RANK"]
        if not mark.exists():
            mark.touch(); sys.exit("the first time fails\\n  mend: wait")
        """
    found = supervise(run_of(tmp_path, launcher, code=code, care=Care(hang_s=0.5)))
    assert found["ended"] == "finished"
    assert [fault["kind"] for fault in found["faults"]] == ["error"]
    assert found["faults"][0]["message"] == "a worker died with status 1: the first time fails"


def test_the_same_error_twice_is_a_bug_and_no_other_pool_is_burnt(tmp_path: Path, launcher: LocalLauncher) -> None:
    pools = (Pool(name="one", workers=2), Pool(name="two"))
    run = run_of(tmp_path, launcher, code="raise SystemExit('no such column')", pools=pools)
    with pytest.raises(TrainingFailed, match="no such column"):
        supervise(run)
    found = command.summary(run)
    assert (found["ended"], found["starts"], found["pools"]) == ("stopped", 2, ["one"])
    assert list((run.folder / "diagnosis").iterdir())


def test_a_pool_that_fails_too_often_is_left(tmp_path: Path, launcher: LocalLauncher) -> None:
    code = """
        import os, signal
        if os.environ["WORLD_SIZE"] == "2":
            os.kill(os.getpid(), signal.SIGKILL)
        """
    pools = (Pool(name="one", workers=2), Pool(name="two"))
    found = supervise(run_of(tmp_path, launcher, code=code, pools=pools, care=Care(restarts=0)))
    assert (found["ended"], found["pools"]) == ("finished", ["one", "two"])


def test_a_supervisor_that_was_killed_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAINER.replace("0.02", "0.1"))
    out = tmp_path / "run"
    line = [sys.executable, "-m", "ottava.cli", "supervise", "--out", str(out), "--json", "--"]
    line += [sys.executable, str(script), "30", "0"]
    first = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(e["event"] == "train.step" and e["step"] >= 5 for e in journal.read(out / "journal.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    first.wait()
    again = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert (found["ended"], found["steps"], found["starts"]) == ("finished", 30, 2)
    assert found["lost_steps"] <= 2
    third = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert third.returncode == 2
    assert "has ended here already" in third.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-command"], "there is no command 'no-such-command'"),
        (["--workers", "3", "true"], "powers of two"),
        (["--fleet", "nowhere.yaml", "true"], "nowhere.yaml"),
    ],
)
def test_what_cannot_be_run_is_refused(words: list[str], said: str, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "ottava.cli", "supervise", "--out", str(tmp_path / "run"), *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_command_is_refused(tmp_path: Path, launcher: LocalLauncher) -> None:
    run = run_of(tmp_path, launcher, code="pass")
    assert supervise(run)["ended"] == "finished"
    with pytest.raises(RecipeError, match="another command ran here"):
        supervise(Run(["true"], run.pools, run.folder, run.journal, launcher))
