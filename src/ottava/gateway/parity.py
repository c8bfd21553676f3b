"""No backend takes work before it was held against the reference: its values, its prompts, its log-probabilities.

The reference is a folder, scored by a process of its own that ends with it; what it said is kept by the digest of its
values. A backend is asked the same once it has loaded, and again after each start. `verify.parity` judges. A backend
that was certified before, whose folder has not changed since, is asked a shorter form.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ottava import __version__
from ottava.checkpoint.digest import values_digest
from ottava.checkpoint.stream import default_workers
from ottava.engine.session import Sampling, Token
from ottava.errors import DataError, PlatformError, Verdict, check_folder
from ottava.gateway.child import Child, Lost, Patience, Place
from ottava.gateway.engines import OURS, Choice, choices
from ottava.gateway.launch import Local
from ottava.gateway.pool import places
from ottava.models.chat import Chat
from ottava.verify import parity
from ottava.verify.drift import ALTERNATIVES

Others = Sequence[Sequence[Sequence[int]]]
"""Further ids [texts][ids - 1] that the control is asked about at each place."""

KIND = "ottava parity 1"
TEXTS, FEW, FEWEST = 32, 8, 2
"""Texts where noise is compared, where bits are, and where bits are once more after a new start."""
REPLY = 112
"""Ids of a text after its prompt, as far as the reference's reply goes."""
TEMPERATURES = (1.0, 0.0, 0.7)

QUESTIONS = (
    "What is the capital of France?", "Write a haiku about rain.", "How do I boil an egg?", "Who wrote Hamlet?",
    "Explain gravity to a child.", "List three prime numbers.", "Give me a recipe for soup.", "What is 12 times 7?",
    "Why is the sky blue?", "Translate 'good morning' into Spanish.", "How does a bicycle stay upright?",
    "Write a function that adds two numbers.", "What should I pack for a week at sea?", "Tell me a story of a fox.",
    "What is the difference between weather and climate?", "How do vaccines work?",
)  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}

T = TypeVar("T")
Case = list[Any]
"""A conversation as `render` takes it: messages, thinking, and tools where there are any."""


@dataclass(frozen=True)
class Reference:
    """What the reference said. texts: ids; starts: where each reply begins; said: the reply's ids, with alternatives;
    own: its floor, alone and in company."""

    folder: Path
    digest: str
    numerics: str | None
    prompts: Mapping[str, list[int] | None]
    texts: Sequence[Sequence[int]]
    starts: Sequence[int]
    said: Sequence[Sequence[Token]]
    own: float


@dataclass(frozen=True)
class Certificate:
    """A backend that passed. reference: what it was held against; said: of the reference's texts."""

    backend: str
    folder: Path
    digest: str
    reference: Reference
    finding: parity.Finding
    said: Sequence[Sequence[Token]]
    made: str

    @property
    def bits(self) -> bool:
        return self.finding.test == "bits"


@dataclass
class Parity:
    """The check of backends. folder: the reference; other_values: a folder of other values may serve as well, and is
    then held against a reference of its own."""

    folder: Path
    other_values: bool = False
    patience: Patience = field(default_factory=Patience)
    threads: int | None = None
    certificates: dict[str, Certificate] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    _once: dict[tuple[Any, ...], asyncio.Task[Any]] = field(default_factory=dict)
    _passed: dict[str, str] = field(default_factory=dict)

    async def __call__(self, child: Child) -> None:
        """Certify a backend that has loaded. Raises Verdict where it differs, Lost where it dies."""
        name = child.place.name
        try:
            async with asyncio.timeout(self.patience.load):
                self.certificates[name] = await self._certify(child)
            self.refused.pop(name, None)
        except TimeoutError:
            raise Lost(f"it was not certified within {self.patience.load:g} seconds") from None
        except Verdict as error:
            self.certificates.pop(name, None)
            self.refused[name] = error.what
            raise

    async def _certify(self, child: Child) -> Certificate:
        folder, name = child.place.folder, child.place.name
        state = _state(folder)
        digest, wanted = await self.values(folder)
        reference = await self.reference(self.folder if digest == wanted else folder)
        cases = conversations(Chat.load(self.folder))
        asked = await child.ask(op="render", conversations=list(cases.values()))
        prompts = reference.prompts if digest == wanted else (await self.reference(self.folder)).prompts
        if (wrong := parity.prompts_differ(prompts, dict(zip(cases, asked["ids"], strict=True)))) is not None:
            raise Verdict(wrong, where=folder, fix="give it the reference's template and tokenizer")
        if child.numerics is not None and child.numerics == reference.numerics and reference.own == 0.0:
            count = FEWEST if self._passed.get(name) == state else FEW
            texts, control = reference.texts[:count], None
        else:
            reference = await self.reference(reference.folder, TEXTS)
            texts, control = reference.texts, await self.floor(reference)
        said = await _scored(child, texts, reference.starts, child.slots)
        if control is None:
            finding = parity.same_bits(_logprobs(reference.said[: len(texts)]), _logprobs(said))
            if finding.why is None and (wrong := await _chooses_otherwise(child, reference)) is not None:
                raise Verdict(wrong, where=folder, fix="its log-probabilities are right: look at its sampling")
        else:
            finding = parity.within_noise(_logprobs(reference.said), _logprobs(said), control)
        if finding.why is not None:
            raise Verdict(finding.why, where=folder, fix="it computes something else: see docs/serving.md, Parity")
        self._passed[name] = state
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return Certificate(name, folder, digest, reference, finding, said, made)

    async def values(self, folder: Path) -> tuple[str, str]:
        """The digests of a folder and of the reference. Raises Verdict where they may not differ and do."""
        digest, wanted = await self.digest(folder), await self.digest(self.folder)
        if digest != wanted and not self.other_values:
            what = f"its folder holds other values: digest {digest[:16]}, the reference {wanted[:16]}"
            raise Verdict(what, where=folder, fix=f"see where: ottava verify {self.folder} {folder}")
        return digest, wanted

    async def digest(self, folder: Path) -> str:
        """The digest of a folder's values, read again once its files have changed."""
        found = asyncio.to_thread(values_digest, folder, default_workers())
        return await self._shared(("digest", _state(folder)), found)

    async def reference(self, folder: Path, count: int = FEW) -> Reference:
        """What the folder's own process says of its first `count` texts."""
        digest = await self.digest(folder)
        return await self._shared(("reference", digest, count), self._refer(folder, digest, count))

    async def _refer(self, folder: Path, digest: str, count: int) -> Reference:
        cases = conversations(Chat.load(folder))
        async with self.fresh(folder, count) as child:
            asked = await child.ask(op="render", conversations=list(cases.values()))
            prompts = dict(zip(cases, asked["ids"], strict=True))
            opened = _prompts(prompts, count)
            jobs = [_reply(child, ids, number) for number, ids in enumerate(opened)]
            texts = [ids + reply for ids, reply in zip(opened, await asyncio.gather(*jobs), strict=True)]
            starts = [len(ids) for ids in opened]
            said = await _scored(child, texts, starts, count)
            alone = _logprobs(await _scored(child, texts[:FEWEST], starts, 1))
        own = max(abs(a - b) for x, y in zip(alone, _logprobs(said), strict=False) for a, b in zip(x, y, strict=True))
        return Reference(folder, digest, child.numerics, prompts, texts, starts, said, own)

    @asynccontextmanager
    async def fresh(
        self, folder: Path, slots: int = 1, name: str = "reference", engine: Choice = OURS
    ) -> AsyncIterator[Child]:
        """A process of its own that has loaded the folder just now, and ends with the block."""
        launcher, place = Local(), Place(name, folder, engine=engine)
        child = Child(place, slots, launcher, self.patience, lambda: None, None, self.threads)
        try:
            async with child.running():
                yield child
        finally:
            await launcher.close()

    async def floor(self, reference: Reference) -> parity.Scores:
        """The control's log-probabilities of a reference's replies."""
        asked = self.control(reference.folder, reference.texts)
        rows = await self._shared(("control", reference.digest, len(reference.texts)), asked)
        return [[own for own, *_ in row[start - 1 :]] for row, start in zip(rows, reference.starts, strict=True)]

    async def control(
        self, folder: Path, texts: Sequence[Sequence[int]], others: Others = ()
    ) -> list[list[list[float]]]:
        """What another implementation of a folder says of texts, see `verify.control.scores`. Raises PlatformError."""
        command = (sys.executable, "-m", "ottava.verify.control", str(folder))
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        try:
            said, _ = await process.communicate(json.dumps({"texts": texts, "others": others}).encode())
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode != 0:
            raise PlatformError("the control that measures the noise floor failed", where=folder)
        return json.loads(said)  # type: ignore[no-any-return]

    async def _shared(self, key: tuple[Any, ...], work: Coroutine[Any, Any, T]) -> T:
        """One task for all who ask; what failed is tried again by the next."""
        task = self._once.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._once[key] = asyncio.create_task(work)
        else:
            work.close()
        return await asyncio.shield(task)  # type: ignore[no-any-return]

    async def close(self) -> None:
        """End what is still being asked."""
        tasks = [task for task in self._once.values() if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def report(self) -> dict[str, Any]:
        """{"parity", "reference", "software", "backends": a row for each that passed or was refused}."""
        rows = [
            {
                "backend": one.backend,
                "folder": str(one.folder),
                "digest": one.digest,
                "numerics_of_reference": one.reference.numerics,
                "prompts": {"cases": len(one.reference.prompts), "equal": True},
                "tokens": sum(map(len, one.said)),
                "made": one.made,
                **parity.plain(one.finding),
            }
            for one in self.certificates.values()
        ]
        rows += [{"backend": name, "passed": False, "why": why} for name, why in self.refused.items()]
        return {"parity": KIND, "reference": str(self.folder), "software": f"ottava {__version__}", "backends": rows}


def conversations(chat: Chat) -> dict[str, Case]:
    """Both modes, single-turn, with a system message, multi-turn and with tools, in words that the model knows."""
    asked = questions(chat)
    user = [{"role": "user", "content": text} for text in asked]
    said = {"role": "assistant", "content": asked[1]}
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Paris"}'}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    turns: dict[str, Case] = {f"question {n}": [[one]] for n, one in enumerate(user)}
    turns["a system message"] = [[{"role": "system", "content": asked[2]}, user[0]]]
    turns["several turns"] = [[user[0], said, user[2]]]
    turns["a tool's answer"] = [[user[0], called, {"role": "tool", "tool_call_id": "call_1", "content": asked[3]}]]
    cases = {}
    for mode, thinking in (("direct", False), ("thinking", True)):
        for name, (messages,) in turns.items():
            cases[f"{mode}, {name}"] = [messages, thinking]
        cases[f"{mode}, tools"] = [[user[0]], thinking, [TOOL]]
    return cases


def questions(chat: Chat) -> list[str]:
    """QUESTIONS, or as many lines of the words that a small vocabulary knows."""
    try:
        for text in QUESTIONS:
            chat.encode(text)
        return list(QUESTIONS)
    except DataError:
        known = sorted(set(chat.tokenizer.get_vocab(with_added_tokens=False)) - set(chat.control))
        words = [word for word in known if _knows(chat, word)] or known[:1]
        return [" ".join(words[(n * 7 + i * 3) % len(words)] for i in range(6)) for n in range(len(QUESTIONS))]


def _knows(chat: Chat, word: str) -> bool:
    try:
        return bool(word.strip()) and bool(chat.encode(word))
    except DataError:
        return False


def _prompts(prompts: Mapping[str, list[int] | None], count: int) -> list[list[int]]:
    """The prompts with which `count` texts begin: single questions, the modes in turn."""
    rows = [
        [ids for case, ids in prompts.items() if case.startswith(f"{mode}, question") and ids is not None]
        for mode in ("direct", "thinking")
    ]
    found = [ids for pair in zip(*rows, strict=True) for ids in pair] if all(rows) else [*rows[0], *rows[1]]
    if not found:
        raise DataError("the reference's template renders no prompt at all")
    return [list(found[number % len(found)]) for number in range(count)]


async def _reply(child: Child, ids: Sequence[int], number: int) -> list[int]:
    """What the reference says, at one of TEMPERATURES."""
    room = max(1, min(REPLY, child.context - len(ids)))
    how = Sampling(room, temperature=TEMPERATURES[number % len(TEMPERATURES)], seed=number)
    return [token.id async for token in child.generate(ids, how, [])]


async def _chooses_otherwise(child: Child, reference: Reference) -> str | None:
    """Whether it says to the same questions, with the same seeds, other ids than the reference did."""
    for number in range(min(FEWEST, len(reference.texts))):
        text, start = reference.texts[number], reference.starts[number]
        if await _reply(child, text[:start], number) != list(text[start:]):
            return f"it chooses other ids than the reference, at temperature {TEMPERATURES[number]:g} and the same seed"
    return None


async def _scored(
    child: Child, texts: Sequence[Sequence[int]], starts: Sequence[int], at_once: int
) -> list[list[Token]]:
    """The ids of the replies, weighed: the prompt is read as a prompt, as when it serves."""
    room = asyncio.Semaphore(at_once)

    async def one(text: Sequence[int], start: int) -> list[Token]:
        async with room:
            return await child.forced(text, start, ALTERNATIVES)

    return list(await asyncio.gather(*(one(*pair) for pair in zip(texts, starts, strict=False))))


def _logprobs(said: Sequence[Sequence[Token]]) -> list[list[float]]:
    return [[token.logprob for token in row] for row in said]


def _state(folder: Path) -> str:
    """Names, sizes and times of a folder's files: what changes when its content does. Raises CheckpointError."""
    check_folder(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    found = [(path.name, stat.st_size, stat.st_mtime_ns) for path in files for stat in [path.stat()]]
    return json.dumps([str(folder.resolve()), found])


def certify(
    folders: Sequence[Path],
    reference: Path | None = None,
    *,
    other_values: bool = False,
    engines: Sequence[str] = (),
    vllm_python: str | None = None,
) -> dict[str, Any]:
    """Check each folder once, without serving. The reference is the first unless given. See `Parity.report`.

    engines, vllm_python: what loads each folder, see `engines.choices`. Raises OttavaError.
    """
    wanted = places(folders, 1, chosen=choices(engines, folders, vllm_python))
    judge = Parity(reference or folders[0], other_values)
    check_folder(judge.folder)

    async def main() -> dict[str, Any]:
        try:
            for place in wanted:
                try:
                    await judge.values(place.folder)
                    async with judge.fresh(place.folder, FEW, place.name, place.engine) as child:
                        await judge(child)
                except Verdict as error:
                    judge.refused[place.name] = error.what
        finally:
            await judge.close()
        return judge.report()

    return asyncio.run(main())


def text(report: Mapping[str, Any]) -> str:
    """A report for people: a line for each backend."""
    lines = [f"reference  {report['reference']}"]
    for row in report["backends"]:
        if not row["passed"]:
            lines.append(f"{row['backend']:10} refused: {row['why']}")
        elif row["test"] == "bits":
            lines.append(f"{row['backend']:10} the reference's bits, in {row['tokens']} log-probabilities")
        else:
            found = row["positions"]["all"]
            said = f"{found['ratio']:.3g} of the noise floor (99% bound {found['upper']:.3g})"
            lines.append(f"{row['backend']:10} log-probabilities within {said}, {row['tokens']} of them")
    return "\n".join(lines)
