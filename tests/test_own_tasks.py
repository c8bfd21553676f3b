"""A user's own task: looked at, digested, checked against what it says of itself, and whose mistakes are said."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ottava import runner, stages, tasks
from ottava.artifact import digest_of
from ottava.engine.evaluate import evaluate
from ottava.errors import DataError, RecipeError
from ottava.recipe import load_recipe
from ottava.stages import problems
from ottava.tasks import chains, content, verify
from ottava.tasks.base import generator, row, write_lines
from ottava.tasks.verify import grade
from ottava.trainer import trials
from tests.test_engine import problems as asked_chains
from tests.test_engine import scripted_student, tiny_chat
from tests.test_lora import Publishing

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(python|yaml)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
Module = Callable[..., str]


def documented() -> tuple[str, str]:
    """The module and the recipe, as docs/reasoning.md has them."""
    text = (ROOT / "docs" / "reasoning.md").read_text()
    part = text[text.index("#### A task of your own") : text.index("#### Remarks")]
    found = dict(BLOCK.findall(part))
    return found["python"], found["yaml"]


SOURCE = documented()[0]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Module]:
    """Writes the documented module with changes, under a name of its own; that name."""
    monkeypatch.syspath_prepend(tmp_path)
    verify._SHARED.close()  # another test's process knows another path

    def write(*changes: tuple[str, str], source: str = SOURCE) -> str:
        for old, new in changes:
            assert old in source, old
            source = source.replace(old, new)
        name = f"own_{abs(hash((request.node.nodeid, source)))}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    yield write
    verify._SHARED.close()


# ---- what is wrong with a module, and where


@pytest.mark.parametrize(
    ("old", "new", "line", "what"),
    [
        ("def prompt(problem):", "def prompt(problem:", "def prompt(problem:", "SyntaxError"),
        ("MAX_STEPS = 2", "MAX_STEPS = 1 / 0", "MAX_STEPS = 1 / 0", "ZeroDivisionError: division by zero"),
        ("MAX_STEPS = 2", "raise SystemExit(3)", "raise SystemExit(3)", "SystemExit: 3"),
        ("import Problem", "import Probem", "from ottava", "ImportError: cannot import name 'Probem'"),
        ("MAX_STEPS = 2", "import there_is_none", "import there", "No module named 'there_is_none'"),
        ("MAX_STEPS = 2", "MAX_STEPS = '2'", "MAX_STEPS", "MAX_STEPS of the task is '2'"),
        ("MAX_STEPS = 2", "SAFE = 1", "SAFE", "SAFE of the task is 1"),
        ("MAX_STEPS = 2", "NAME = 'mine'", "NAME", "NAME of the task is 'mine'"),
        ("def prompt(problem):", "def prompt():", "def prompt", "prompt cannot be called as a task's is"),
        ("*, fewer=False", "", "def sample", "sample cannot be called as a task's is"),
        ("def prompt(", "def promt(", '"""own:larger', "the module has no prompt"),
    ],
)
def test_a_mistake_is_told_with_its_line(
    module: Module, tmp_path: Path, old: str, new: str, line: str, what: str
) -> None:
    name = module((old, new))
    with pytest.raises(DataError) as error:
        tasks.get(f"own:{name}")
    assert what in error.value.what
    lines = (tmp_path / f"{name}.py").read_text().splitlines()
    number = next(number for number, text in enumerate(lines, 1) if text.startswith(line))
    assert error.value.where == f"{tmp_path / name}.py:{number}"
    assert error.value.fix


def test_what_a_function_raises_later_is_the_users_mistake_too(module: Module, tmp_path: Path) -> None:
    name = module(("top, found = 10**steps, {}", "return [][steps]"))
    task = tasks.get(f"own:{name}")
    with pytest.raises(DataError, match=r"sample of the task .* raised IndexError") as error:
        task.sample(None, 1, 1, "train")  # type: ignore[arg-type]
    assert str(error.value.where).startswith(f"{tmp_path / name}.py:")
    assert not hasattr(task, "check_trace")
    with pytest.raises(DataError) as none:
        tasks.get("own:larger.py")
    assert "without .py" in str(none.value.fix)


def test_what_a_module_prints_is_no_answer_of_the_program(module: Module, capfd: pytest.CaptureFixture[str]) -> None:
    """`--json` is one object on standard output."""
    loud = "MAX_STEPS = 2\nSAFE = True\nprint('at its import')"
    name = module(
        ("MAX_STEPS = 2", loud),
        ("    top, found", "    print('as it draws')\n    top, found"),
        ("    return final(text)", "    print('as it judges')\n    return final(text)"),
    )
    task = tasks.get(f"own:{name}")
    (problem,) = task.sample(generator(0, "loud"), 1, 1, "train")
    assert grade(task, problem, problem.answer).right
    said = capfd.readouterr()
    assert said.out == ""
    assert all(f"as it {what}" in said.err for what in ("draws", "judges"))
    assert "at its import" in said.err


# ---- the content, and the keys


def test_what_a_task_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of own code every file that is imported counts, and no other; what an edit changes is the digest alone."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ours_pkg" / "deep").mkdir(parents=True)
    files = {
        "ours_pkg/__init__.py": "", "ours_pkg/deep/__init__.py": "",
        "ours_pkg/deep/task.py": "from ..parts import A\nfrom . import near\nimport ours_beside, json, numpy\n"
        'FILES = ("words.txt",)\n' + SOURCE,
        "ours_pkg/parts.py": "A = 1\n", "ours_pkg/deep/near.py": "def f():\n    import ours_late\n",
        "ours_beside.py": "", "ours_late.py": "", "ours_pkg/unused.py": "", "ours_pkg/deep/words.txt": "one two",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    told = content.of("own:ours_pkg.deep.task")
    assert told is not None
    assert set(told["files"]) == {
        "ours_pkg", "ours_pkg.deep", "ours_pkg.deep.task", "ours_pkg.parts", "ours_pkg.deep.near", "ours_beside",
        "ours_late", "file words.txt",
    }  # fmt: skip
    content.require_same(told)
    seen = {told["digest"]}
    for name in files:
        (tmp_path / name).write_text(files[name] + "\n# edited\n")
        now = content.of("own:ours_pkg.deep.task")
        assert now is not None
        assert (now["digest"] in seen) == (name == "ours_pkg/unused.py"), name
        seen.add(now["digest"])
    with pytest.raises(DataError, match=r"words\.txt"):
        content.require_same(told)


def test_a_file_of_problems_is_content_and_a_built_in_task_has_none(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("a")
    before = content.key(f"code:{path}")
    path.write_text("b")
    assert before != content.key(f"code:{path}") != {}
    assert [content.key(name) for name in ("chains", "chains:salt=x", "gym:chain_sum")] == [{}] * 3
    with pytest.raises(Exception, match="no such file"):
        content.key(f"code:{tmp_path / 'none'}")


RECIPE = "name: t\nfleet: cpu\nstages:\n  problems: {{task: '{}', levels: {}, answers: 40, test: 10}}\n"


def read(folder: Path, task: str, levels: str = "[2]") -> Any:
    (folder / "cpu.yaml").write_text("{name: cpu, pools: [{name: cpu}]}\n")
    (folder / "t.yaml").write_text(RECIPE.format(task, levels))
    return load_recipe(folder / "t.yaml", stages.specs())


def key_of(its: Any) -> str:
    walk = runner.Walk(its, Path(), None, None, None)  # type: ignore[arg-type]
    return walk._key("problems", walk._place("problems"), runner.NOT_KEYED)


def test_a_built_in_task_adds_nothing_to_the_key(tmp_path: Path) -> None:
    """Nothing is added for it: what goes into the key, written down here a second time."""
    its = read(tmp_path, "chains")
    spec = its.stages["problems"].model_dump(mode="json", exclude={"budget_s", "pool"})
    pools = [pool.model_dump(mode="json") for pool in its.fleet.pools]
    said = {"stage": "problems", "version": problems.VERSION, "seed": 0, "spec": spec, "inputs": {}, "pools": pools}
    assert key_of(its) == digest_of(said)


def test_the_key_of_a_task_follows_its_file_and_an_edit_in_between_is_not_published(tmp_path: Path) -> None:
    path, out = tmp_path / "p.jsonl", tmp_path / "run"
    line = {"question": "", "answer": "def f(x):\n    return x", "facts": {"calls": [["f", [1], 1]]}}
    lines = [json.dumps({**line, "question": f"write f number {n}", "answer": f"{n}\n"}) for n in range(200)]
    path.write_text("\n".join(lines))
    its = read(tmp_path, f"code:{path}", "[1]")
    before = key_of(its)

    def edited(spec: Any, inputs: Any, ctx: Any) -> Any:
        path.write_text("\n".join(lines[1:]))
        return ctx.commit({})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problems, "run", edited)
        with pytest.raises(DataError, match="was edited while it ran"):
            runner.run(its, out, contextlib.nullcontext, runner.Quiet())
    assert not list(out.glob("artifacts/*"))
    assert key_of(its) != before


# ---- the problems stage believes nothing


def drawn(name: str, out: Path, **more: Any) -> dict[str, Any]:
    out.mkdir()
    ctx = Publishing(out)
    spec = {"task": f"own:{name}", "levels": [2], "answers": 60, "test": 20, **more}
    problems.run(problems.Spec.model_validate(spec), {}, ctx)  # type: ignore[arg-type]
    return ctx.summary


def test_the_documented_task_is_sound(module: Module, tmp_path: Path) -> None:
    name = module()
    told = drawn(name, tmp_path / "out")
    assert (told["answers"], told["test"], told["test_duplicates_removed"]) == (60, 20, 0)
    assert "remarks" not in told
    assert json.loads((tmp_path / "out" / "task.json").read_text()) == content.of(f"own:{name}")


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("-{b}\", steps, question", "-{b}\", 1, question", "asked for problems of level 2, and gave one of level 1"),
        ("held_out(question) == (split == \"test\")", "True", "held_out says that it is of the other"),
        ("return list(found.values())", "return list(found.values())[1:]", "asked for 20 test problems"),
        ("return list(found.values())", "return [1] * count", "level 2, and gave 1"),
    ],
)  # fmt: skip
def test_a_task_that_does_not_keep_its_word_is_refused(
    module: Module, tmp_path: Path, old: str, new: str, what: str
) -> None:
    with pytest.raises(DataError, match=what):
        drawn(module((old, new)), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_verifier_that_says_yes_to_a_higher_level_alone_is_refused(module: Module, tmp_path: Path) -> None:
    name = module(("return final(text)", "return problem.steps == 2 or final(text)"))
    with pytest.raises(DataError, match=r"must not be trusted: . of 8 answers of other problems were") as error:
        drawn(name, tmp_path / "out", levels=[1, 2], answers=30, test=4)
    assert "check_answer" in str(error.value.fix)


def test_the_text_of_questions_is_compared_whatever_a_task_says(module: Module, tmp_path: Path) -> None:
    """A family that is never alike, and a split by the case of letters: one question on both sides."""
    name = module(
        ('return " ".join(sorted(word for word in plain(question).split() if word.isdigit()))', "return question"),
        ('return in_test(family(question), 5, "larger")', 'return question.startswith("WHICH")'),
        ("    return plain(question)", "    return question"),
        ('question = f"Which', 'question = ("WHICH" if split == "test" else "Which") + f"'),
        ("10**steps, {}", "5, {}"), ("top // 10", "0"), ("1000 * count", "4000"),
    )  # fmt: skip
    told = drawn(name, tmp_path / "out", answers=20, test=5)
    both = [(tmp_path / "out" / f"{side}.jsonl").read_text().splitlines() for side in ("answers", "test")]
    train, test = ({json.loads(line)["question"].casefold() for line in lines} for lines in both)
    assert not train & test
    assert told["contaminated_removed"] == 20 - told["answers"] > 0


def test_test_problems_that_are_there_twice_are_counted(module: Module, tmp_path: Path) -> None:
    name = module(
        ("    return list(found.values())", "    them = list(found.values())\n    return (them + them)[:count]"),
        ("if len(found) == count", "if len(found) == (count + 1) // 2"),
    )
    told = drawn(name, tmp_path / "out", answers=40, test=20)
    assert (told["test"], told["test_duplicates_removed"], told["duplicates_removed"]) == (10, 10, 20)
    assert told["remarks"] == ["10 of 20 test problems were there twice and were taken out: 10 are left"]


def test_levels_that_name_nothing_are_refused_when_the_recipe_is_read(module: Module, tmp_path: Path) -> None:
    assert read(tmp_path, f"own:{module()}", "[1, 2]")
    with pytest.raises(RecipeError, match="levels 1 to 2, and level 3 names nothing") as above:
        read(tmp_path, f"own:{module()}", "[2, 3]")
    column = (tmp_path / "t.yaml").read_text().splitlines()[3].index("[2, 3]") + 1
    assert above.value.where == f"{tmp_path / 't.yaml'}:4:{column}"
    none = module(("    top, found", "    if steps == 1:\n        return []\n    top, found"))
    with pytest.raises(RecipeError, match="no problem of level 1"):
        read(tmp_path, f"own:{none}", "[1, 2]")
    path = tmp_path / "p.jsonl"
    tests = {"calls": [["f", [1], 1]]}
    path.write_text(
        "\n".join(json.dumps({"question": f"q{s}", "answer": "a", "steps": s, "facts": tests}) for s in (1, 3))
    )
    with pytest.raises(RecipeError, match="no problem of level 2"):
        read(tmp_path, f"code:{path}", "[1, 2, 3]")
    path = tmp_path / "broken.jsonl"
    path.write_text('{"question": 3}')
    with pytest.raises(DataError) as line:
        read(tmp_path, f"code:{path}", "[1]")
    assert line.value.where == f"{path}:1"


# ---- grading apart


DEADLY = "import os\n" + SOURCE.replace("return final(text) == problem.answer", "os._exit(0)")


def test_a_trials_verifier_cannot_kill_the_trial(
    module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would end this very process; and what the trial asks is the task's prompt."""
    source = DEADLY.replace('f"{problem.question} Answer with the number alone."', "problem.question")
    name, asked = module(source=source), asked_chains()
    write_lines(tmp_path / "test.jsonl", (row(f"own:{name}", problem) for problem in asked))
    chat = tiny_chat()
    monkeypatch.setattr(trials.Chat, "load", lambda folder: chat)
    args = {"data": str(tmp_path), "chat": "", "task": f"own:{name}"}
    found = trials._accuracy(scripted_student(), args)
    assert found["unscorable"] == {"the verifier died": len(asked)}
    assert (found["value"], found["n"]) == (0.0, len(asked))
    sound = evaluate(scripted_student(), tiny_chat(), asked, True, partial(grade, chains))
    assert sound["correct"] == len(asked)
    assert "unscorable" not in sound, "a run with a sound verifier keeps its bytes"


# ---- the documented text, run


def ottava(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(ROOT / "src")])
    command = [sys.executable, "-m", "ottava.cli", *words]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


@pytest.mark.slow
def test_the_documented_example_runs_and_an_edit_is_tried_again(tmp_path: Path) -> None:
    source, recipe = documented()
    (tmp_path / "larger.py").write_text(source)
    (tmp_path / "larger.yaml").write_text(recipe)
    words = ("run", str(tmp_path / "larger.yaml"), "--out", str(tmp_path / "run"), "--until", "problems", "--json")
    first = ottava(tmp_path, *words)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["remarks"] == []
    (tmp_path / "larger.py").write_text(source.replace("== problem.answer", "== str(int(problem.answer))"))
    assert ottava(tmp_path, *words).returncode == 0
    made = [json.loads(path.read_text()) for path in (tmp_path / "run" / "artifacts").glob("*/manifest.json")]
    assert len({one["digest"] for one in made}) == len({one["key"] for one in made}) == 2
    (tmp_path / "larger.py").write_text(source.replace("def prompt(problem):", "def prompt(problem:"))
    broken = ottava(tmp_path, *words)
    assert (broken.returncode, broken.stdout) == (2, "")
    line = source[: source.index("def prompt")].count("\n") + 1
    assert f"{tmp_path / 'larger.py'}:{line}" in broken.stderr
