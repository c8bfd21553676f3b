"""reasoning-gym's hundred generators as tasks: `gym:chain_sum`, `gym:countdown`, `gym:gsm_symbolic` and so on.

A problem's `steps` is its level, from 1: where the package has a curriculum, all its attributes at that level and no
easier; else there is one level. Options after the name fix single settings: `gym:chain_sum,max_terms=3,max_digits=1`.
`hint=false` asks the bare question, without a word on how to write the answer: small models stumble over it.

Training and test are two disjoint sets by construction, twice: a hash of the question's family decides the side, and
the two sides draw from different halves of the generators' seeds. Offline; generators that are slow (countdown) are
asked once and kept in a file.

Some scorers pass what the model wrote to Python's eval (or sympy's, which is the same). Their text must match an
alphabet first, in which nothing can be called; what does not match is wrong. Only a full score counts as right.
Source: reasoning-gym, arXiv 2505.24760.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ottava.artifact import digest_of
from ottava.document import suggest
from ottava.errors import DataError, from_os_error
from ottava.tasks.base import (
    Problem,
    Split,
    final,
    generator,
    in_test,
    plain,
    problem_of,
    read_lines,
    require,
    row,
    write_lines,
)
from ottava.tasks.jail import decode, encode

if TYPE_CHECKING:
    import numpy as np

TEST_ONE_IN = 5
BLOCK = 64  # seeds that lie together are asked together
CHUNK = 100  # problems of a kept file
WITHOUT_ANSWER = frozenset({"boxnet", "composite", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"})
"""They give no right answer with the question, so that nobody can tell whether their verifier works."""
SLOW = frozenset(
    {"advanced_geometry", "countdown", "futoshiki", "game_of_life", "game_of_life_halting", "intermediate_integration"}
    | {"jugs", "knight_swap", "polynomial_equations", "polynomial_multiplication", "puzzle24", "quantum_lock"}
    | {"simple_integration", "sokoban", "sudoku", "zebra_puzzles"}
)
"""More than 4 ms a problem (measured with 0.1.25)."""

_SUMS = r"(?!.*(\*\*|//))[\d\s+*/()-]*"
_WORDS = r"(sin|cos|tan|exp|log|ln|sqrt|asin|acos|atan|sinh|cosh|tanh|sec|csc|cot|pi|[A-Za-z])"
_FORMULA = rf"({_WORDS}(?![A-Za-z_])|\d+(\.\d+)?|[\s+*/()^,-])*"
EVALUATED = {
    "binary_matrix": r"[\d\s-]*",
    "countdown": _SUMS,
    "intermediate_integration": _FORMULA,
    "n_queens": r"[Q_\s]*",
    "polynomial_multiplication": _FORMULA,
    "puzzle24": _SUMS,
    "simple_integration": _FORMULA,
    "spiral_matrix": r"[\d\s-]*",
    "string_insertion": r"[A-Za-z]*",
}
"""Datasets whose scorer evaluates text, and what the text may be made of."""
UNREADABLE = (ValueError, TypeError, LookupError, ArithmeticError, SyntaxError)

HINT = "Write the final answer between <answer> and </answer>."


def make(rest: str) -> Gym:
    """The task `gym:<rest>`. Raises PlatformError without reasoning-gym, DataError on a name or option there is not."""
    require("reasoning_gym", "reasoning-gym", f"the task gym:{rest}")
    name, *options = rest.split(",")
    return Gym(name, dict(_option(option, rest) for option in options))


def datasets() -> list[str]:
    """The generators that can be used: all but those that give no answer. Raises PlatformError."""
    require("reasoning_gym", "reasoning-gym", "a task of the gym")
    return sorted(set(_factory().DATASETS) - WITHOUT_ANSWER)


def _factory() -> Any:
    from reasoning_gym import factory

    return factory


def _option(text: str, rest: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        read = json.loads(value)
    except ValueError:
        read = None
    if not (name and equals) or not isinstance(read, (bool, int, float, str)):
        raise DataError(
            f"{text!r} is not an option", where=f"gym:{rest}", fix="options are written gym:chain_sum,max_terms=3"
        )
    return name, read


class Gym:
    """One generator of reasoning-gym as a task."""

    SAFE = False

    def __init__(self, dataset: str, options: dict[str, Any]) -> None:
        known = _factory().DATASETS
        if dataset in WITHOUT_ANSWER and dataset in known:
            raise DataError(f"gym:{dataset} gives no answer with its questions, so that its verifier cannot be tried")
        if dataset not in known:
            raise DataError(
                f"reasoning-gym has no {dataset!r}", where=f"gym:{dataset}", fix=suggest(dataset, datasets())
            )
        self.dataset, self.options = dataset, dict(options)
        self.NAME = ",".join([f"gym:{dataset}", *(f"{name}={json.dumps(value)}" for name, value in options.items())])
        self._hint = bool(self.options.pop("hint", True))
        self._make, config = known[dataset]
        fields = {field.name for field in dataclasses.fields(config)} - {"seed", "size"}
        for name in self.options:
            if name not in fields:
                raise DataError(f"{dataset} has no option {name!r}", where=self.NAME, fix=suggest(name, sorted(fields)))
        curriculum = _factory().CURRICULA.get(dataset)
        levels = [len(attribute.levels) for attribute in curriculum().attributes.values()] if curriculum else []
        self.MAX_STEPS = max(levels, default=1)
        self._possible()

    def _possible(self) -> None:
        """Raise DataError where no level goes with the options."""
        for level in range(1, self.MAX_STEPS + 1):
            try:
                self._config(level, 0, 1)
                return
            except DataError as error:
                last = error
        raise last

    def _config(self, level: int, seed: int, size: int) -> Any:
        """The generator's settings at a level. Raises DataError where it cannot be had."""
        if not 1 <= level <= self.MAX_STEPS:
            raise DataError(f"{self.NAME} has levels 1 to {self.MAX_STEPS}, not {level}")
        config = self._level(level)
        config = dataclasses.replace(config, **self.options, seed=seed, size=size)
        try:
            if hasattr(config, "validate"):
                config.validate()
        except (AssertionError, ValueError, TypeError) as error:
            raise DataError(
                f"level {level} of {self.NAME} cannot be had: {error}", fix="choose another level, or other options"
            ) from error
        return config

    def _level(self, level: int) -> Any:
        from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode

        factory = _factory()
        if self.dataset not in factory.CURRICULA:
            return factory.DATASETS[self.dataset][1]()
        curriculum = factory.create_curriculum(self.dataset)
        curriculum.set_global_level(level - 1)
        return curriculum.generate_configuration(context=DefaultCurriculumContext(mode=RangeAttributeMode.UPPER_BOUND))

    @functools.lru_cache(maxsize=8)  # noqa: B019 (tasks live as long as the process)
    def _scorer(self, level: int) -> Any:
        return self._make(self._config(level, 0, 1))

    def sample(
        self, rng: np.random.Generator, steps: int, count: int, split: Split, *, fewer: bool = False
    ) -> list[Problem]:
        """See Task. steps: the level. Depends on the state of `rng` alone, and on the package's version."""
        find = self._kept if self.dataset in SLOW else self._drawn
        found = find(rng, steps, count, split)
        if len(found) < count and not fewer:
            raise DataError(
                f"only {len(found)} problems of {self.NAME} at level {steps} were found in the {split} split, not the "
                f"{count} asked for",
                fix="ask for fewer, or for a harder level",
            )
        return found

    def _drawn(self, rng: np.random.Generator, level: int, count: int, split: Split) -> list[Problem]:
        """Distinct problems of one side, until there are enough or a long search brings no new one."""
        found: dict[str, Problem] = {}
        barren = 0
        while len(found) < count and barren < max(2000, 20 * len(found)):
            before = len(found)
            for problem in self._block(rng, level, split):
                if len(found) < count and self.held_out(problem.question) == (split == "test"):
                    found.setdefault(self.canonical(problem.question), problem)
            barren = 0 if len(found) > before else barren + BLOCK
        return list(found.values())

    def _block(self, rng: np.random.Generator, level: int, split: Split) -> Iterator[Problem]:
        """Problems of BLOCK seeds that lie together, in the split's half of all seeds."""
        half = 1 << 31
        first = int(rng.integers(half - BLOCK)) + (half if split == "test" else 0)
        items = self._make(self._config(level, first, BLOCK))
        for index in range(BLOCK):
            item = items[index]
            facts = json.dumps(encode(_known(item["metadata"])))
            yield Problem(f"{self.NAME}-{level}-{first}+{index}", level, item["question"], item["answer"], facts)

    def _kept(self, rng: np.random.Generator, level: int, count: int, split: Split) -> list[Problem]:
        """Problems from files that were generated once: as many files as are needed, drawn from without repetition."""
        found: dict[str, Problem] = {}
        number = 0
        while len(found) < count:
            chunk = self._chunk(level, split, number)
            before = len(found)
            for problem in chunk:
                found.setdefault(self.canonical(problem.question), problem)
            if len(found) == before:
                break
            number += 1
        problems = list(found.values())
        return [problems[i] for i in rng.permutation(len(problems))[:count]]

    def _chunk(self, level: int, split: Split, number: int) -> list[Problem]:
        import importlib.metadata

        version = importlib.metadata.version("reasoning-gym")
        key = digest_of([self.NAME, version, repr(self._config(level, 0, 1)), TEST_ONE_IN, CHUNK])[:12]
        path = cache() / f"{self.dataset}-{level}-{split}-{number:03d}-{key}.jsonl"
        if not path.exists():
            problems = self._drawn(generator(0, "kept", self.NAME, level, split, number), level, CHUNK, split)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise from_os_error(error, "keeping problems of the gym (OTTAVA_CACHE names the place)") from error
            mine = path.with_name(f"{os.getpid()}-{path.name}")  # another process may write the same, byte for byte
            write_lines(mine, (row(self.NAME, problem) for problem in problems))
            os.replace(mine, path)
        return [problem_of(line) for line in read_lines(path)]

    def held_out(self, question: str) -> bool:
        """A fifth of all families."""
        return in_test(self.family(question), TEST_ONE_IN, "ottava/gym")

    def canonical(self, question: str) -> str:
        return plain(question)

    def family(self, question: str) -> str:
        """The numbers, where a problem is the same in any order of its terms or with other names; else the text."""
        text = plain(question)
        if self.dataset == "chain_sum":
            terms = re.findall(r"([+-]?)\s*(-?\d+)", text.rpartition(":")[2])
            return " ".join(sorted(f"{sign or '+'}{number}" for sign, number in terms))
        if self.dataset in ("countdown", "gsm_symbolic", "puzzle24"):
            return " ".join(sorted(re.findall(r"\d+", text)))
        return text

    def prompt(self, problem: Problem) -> str:
        return f"{problem.question.rstrip()}\n{HINT}" if self._hint else problem.question

    def check_answer(self, problem: Problem, text: str) -> bool:
        """Whether the package's own scorer gives the answer its full score."""
        answer = final(text, number=re.fullmatch(r"-?\d+(\.\d+)?", problem.answer) is not None)
        allowed = EVALUATED.get(self.dataset)
        if allowed and not re.fullmatch(allowed, answer, re.DOTALL):
            return False
        entry = {
            "question": problem.question,
            "answer": problem.answer,
            "metadata": decode(json.loads(problem.facts)),
        }
        try:
            score = float(self._scorer(problem.steps).score_answer(answer, entry))
        except UNREADABLE:  # scorers throw at text that is no answer; one that throws at right answers, `canary` finds
            return False
        return score >= 1.0


def cache() -> Path:
    """Where slow problems are kept: OTTAVA_CACHE, else the user's cache folder."""
    base = os.environ.get("OTTAVA_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "ottava" / "tasks"


def _known(value: Any) -> Any:
    """Metadata as plain data: numpy's numbers and whatever else becomes the nearest plain type, or text."""
    if isinstance(value, dict):
        return {_known(k): _known(v) for k, v in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_known(x) for x in value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if hasattr(value, "tolist"):
        return _known(value.tolist())
    return str(value)
