"""Two tokenizers: what a teacher reads of a student's reply says the same, character for character, and teaches it."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from ottava.engine.generate import PAD
from ottava.engine.rollout import STOP, Rollouts
from ottava.journal import Journal
from ottava.models.chat import TINY_SPECIAL, TINY_TEMPLATE, Chat, Cut, write_tiny
from ottava.models.load import load
from ottava.recipe import Pool
from ottava.supervisor.loop import Run, replay, supervise
from ottava.tasks import chains
from ottava.trainer import crossing, records
from ottava.trainer.divergences import Chunk, alm, uld
from ottava.trainer.rl_spec import OnPolicySpec
from ottava.trainer.start import make_trainer
from ottava.trainer.supervised import Fault

from .test_grpo import World
from .test_losses import with_gradient

CUTS: tuple[Cut, ...] = get_args(Cut)
STEPS = 4


@functools.cache
def chat(cut: str) -> Chat:
    """A tiny tokenizer; `bytes`: byte-level pairs, whose tokens may be parts of a character."""
    folder = Path(tempfile.mkdtemp()) / cut
    write_tiny(folder, chains.vocabulary(), "words" if cut == "bytes" else cut)  # type: ignore[arg-type]
    if cut == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        text = ["the 12 thé naïve 漢字 漢語 a +5 2 b *3 6"] * 4
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=list(TINY_SPECIAL), initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(text, trainer)
        tokenizer.save(str(folder / "tokenizer.json"))
    return Chat.load(folder)


# The tiny tokenizers.


@pytest.mark.parametrize("cut", CUTS)
def test_a_tiny_tokenizer_writes_and_reads_every_chain(cut: str) -> None:
    rng, own = np.random.default_rng(3), chat(cut)
    for steps in range(1, 7):
        for problem in chains.sample(rng, steps, 20, "train"):
            trace = chains.trace(problem)
            for text in (problem.question, trace):
                assert own.decode(own.encode(text)) == text
            reply = own.reply(problem.answer, trace)
            assert own.split(reply, thinking=True) == (trace, problem.answer)
            assert len(own.render([{"role": "user", "content": problem.question}], True)) + len(reply) <= 128


def test_the_tiny_tokenizers_differ() -> None:
    text = "7 a +5 2"
    spelt = {cut: [chat(cut).tokenizer.id_to_token(i) for i in chat(cut).encode(text)] for cut in CUTS}
    assert spelt == {
        "words": ["7", "a", "+5", "2"], "characters": list(text), "pairs": ["7", " a +5", " 2"],
    }  # fmt: skip
    sizes = {cut: chat(cut).tokenizer.get_vocab_size() for cut in CUTS}
    assert sizes == {"words": 44, "characters": 27, "pairs": 212}


@pytest.mark.parametrize("cut", CUTS)
def test_a_word_that_no_chain_has_is_refused(cut: str) -> None:
    from ottava.errors import DataError

    with pytest.raises(DataError, match="'x'"):
        chat(cut).encode("7 x")


def test_the_files_of_the_teachers_tokenizer_are_as_they_were(tmp_path: Path) -> None:
    """The default, from its first words: no other decoder, model or order of ids."""
    write_tiny(tmp_path, ["b", "a"])
    found = json.loads((tmp_path / "tokenizer.json").read_text())
    assert found["model"]["type"] == "WordLevel"
    assert found["model"]["vocab"] == {word: i for i, word in enumerate([*TINY_SPECIAL, "b", "a"])}
    assert (found["decoder"], found["pre_tokenizer"]) == (None, {"type": "WhitespaceSplit"})
    assert (tmp_path / "chat_template.jinja").read_text() == TINY_TEMPLATE


# Alignment.

KINDS = [*CUTS, "bytes"]
Free = st.text(st.sampled_from("the 12é漢字+5 a\n"), max_size=16)


def covers(chunks: Sequence[Chunk], own: Sequence[str], its: Sequence[str]) -> str:
    """The text that the chunks cover, each one the same on both sides, in order, with no character twice or left out
    before the end."""
    text, at = "", (0, 0)
    for chunk in chunks:
        assert (chunk.student.start, chunk.teacher.start) == at
        parts = ("".join(own[chunk.student]), "".join(its[chunk.teacher]))
        assert parts[0] == parts[1] != ""
        text, at = text + parts[0], (chunk.student.stop, chunk.teacher.stop)
    return text


def spelt(own: Chat, ids: Sequence[int]) -> list[str]:
    """What each id of a reply says, control tokens by their place in a reply."""
    names = {own.think_start: "<", own.think_end: ">", own.stop: "."}
    found, run = list[str](), list[int]()
    for i in [*ids, None]:
        if i is None or i in names:
            found += crossing.pieces(own, run) + ([] if i is None else [names[i]])
            run = []
        else:
            run.append(i)
    return found


def offsets(own: Chat, text: str) -> list[str]:
    """The pieces of one text as the tokenizer's own offsets have them."""
    return crossing.written(own, text)[1]


@given(st.sampled_from(KINDS), st.sampled_from(KINDS), st.integers(0, 10_000), st.integers(1, 6))
def test_a_chain_is_covered_once_by_equal_chunks(one: str, two: str, seed: int, steps: int) -> None:
    (problem,) = chains.sample(np.random.default_rng(seed), steps, 1, "train")
    student, teacher = chat(one), chat(two)
    reply = student.reply(problem.answer, chains.trace(problem))
    ids, chunks = crossing.retell(student, teacher, reply, 1000)
    assert ids == teacher.reply(problem.answer, chains.trace(problem)), "as the teacher itself would write it"
    own = spelt(student, reply)
    its = [*offsets(teacher, chains.trace(problem)), ">", *offsets(teacher, problem.answer), "."]
    assert covers(chunks, own, its) == f"{chains.trace(problem)}>{problem.answer}."
    if one == two:
        assert all(c.student == c.teacher and c.student.stop - c.student.start == 1 for c in chunks)


@given(Free)
def test_pieces_joined_are_the_text(text: str) -> None:
    own = chat("bytes")
    ids, its = crossing.written(own, text)
    assert "".join(its) == text
    assert len(ids) == len(its)
    assert "".join(crossing.pieces(own, ids)) == text


@given(Free, st.lists(st.integers(0, 255), max_size=4))
def test_characters_in_several_tokens_are_one_chunk(text: str, noise: list[int]) -> None:
    """Between a tokenizer of bytes alone and one with pairs of them; the student may write what is no text at all."""
    student, teacher = bytewise(), chat("bytes")
    raw = [student.tokenizer.token_to_id(token) for token in _letters(text.encode() + bytes(noise))]
    ids, chunks = crossing.retell(student, teacher, [*raw, student.stop], 1000)
    whole = student.decode(raw)
    own = [*crossing.pieces(student, raw), "."]
    its = [*offsets(teacher, whole), "."]
    assert len(own) == len(raw) + 1
    said = covers(chunks, own, its) if whole else ""
    assert said == (whole + "." if whole else "")
    assert ids[-1] == teacher.stop


@functools.cache
def bytewise() -> Chat:
    folder = Path(tempfile.mkdtemp())
    write_tiny(folder, ["x"])
    alphabet = [*TINY_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(TINY_SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    return Chat.load(folder)


def _letters(raw: bytes) -> list[str]:
    """The letters that byte-level tokenizers write bytes with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {b: chr(b) for b in plain} | {
        b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in plain)
    }
    return [names[b] for b in raw]


def test_reading_ends_at_what_the_teacher_cannot_write() -> None:
    """'55' is no word of the chains; neither is a sign without its digit."""
    student, teacher = chat("characters"), chat("words")
    reply = [*student.encode("7 a +5 55 b"), student.think_end or 0, *student.encode("2"), student.stop]
    ids, chunks = crossing.retell(student, teacher, reply, 1000)
    assert ids == teacher.encode("7 a +5 5")
    assert (chunks[-1].student.stop, chunks[-1].teacher.stop) == (8, 4)
    ids, chunks = crossing.retell(student, teacher, student.encode("+"), 1000)
    assert (ids, chunks) == ([], ())


def test_reading_ends_where_the_teachers_context_does() -> None:
    student, teacher = chat("pairs"), chat("characters")
    reply = student.reply("2", "7 a +5 2")
    ids, chunks = crossing.retell(student, teacher, reply, 7)
    assert teacher.decode(ids) == "7 a +5 "
    assert [(c.student.stop, c.teacher.stop) for c in chunks] == [(1, 1), (2, 6)], "the last space is in no chunk"


def test_a_control_token_that_has_no_counterpart_ends_the_reading() -> None:
    student, teacher = chat("characters"), chat("words")
    user = student.tokenizer.token_to_id("<|User|>")
    ids, chunks = crossing.retell(student, teacher, [*student.encode("7"), user, student.stop], 1000)
    assert ids == teacher.encode("7")
    assert len(chunks) == 1


# The loss of aligned chunks.


def drawn(seed: int, vocabulary: int, width: int, rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, width, vocabulary, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, vocabulary, (rows, width), generator=generator)


def some_chunks(seed: int, rows: int = 5) -> tuple[list[list[Chunk]], int, int]:
    """Random chunks without a gap, and the longest rows that they make."""
    draw = np.random.default_rng(seed)
    found, ends = [], (1, 1)
    for _ in range(rows):
        row, at = [], (0, 0)
        for own, its in draw.integers(1, 4, (int(draw.integers(1, 5)), 2)).tolist():
            row.append(Chunk(slice(at[0], at[0] + own), slice(at[1], at[1] + its)))
            at = (at[0] + own, at[1] + its)
        found.append(row)
        ends = (max(ends[0], at[0]), max(ends[1], at[1]))
    return found, *ends


def by_hand(student: Tensor, teacher: Tensor, ids: tuple[Tensor, Tensor], chunks: Any, temperature: float) -> float:
    """The aligned ULD in plain Python numbers, one probability after the other."""
    total = 0.0
    for row, its in enumerate(chunks):
        distance = 0.0
        for chunk in its:
            sides = []
            for logits, tokens, part in zip((student, teacher), ids, (chunk.student, chunk.teacher), strict=True):
                weight = 1.0
                for place in range(part.start, part.stop - 1):
                    weight *= float((logits[row, place] / temperature).softmax(0)[tokens[row, place]])
                last = (logits[row, part.stop - 1] / temperature).softmax(0).tolist()
                sides.append(sorted((weight * p for p in last), reverse=True))
            longest = max(map(len, sides))
            padded = [side + [0.0] * (longest - len(side)) for side in sides]
            distance += sum(abs(a - b) for a, b in zip(*padded, strict=True))
        total += distance / len(its) if its else 0.0
    return total / len(chunks)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_uld_is_its_definition(seed: int, temperature: float) -> None:
    chunks, own, its = some_chunks(seed)
    chunks[2] = []
    (student, ours), (teacher, theirs) = drawn(seed, 11, own), drawn(seed + 50, 7, its)
    value = uld(student, teacher, ours, theirs, chunks, 5, temperature=temperature)
    assert float(value) == pytest.approx(by_hand(student, teacher, (ours, theirs), chunks, temperature), abs=1e-12)


def trl_uld(strategy: str) -> Any:
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=1.5,
        uld_teacher_temperature=1.5, uld_skip_student_eos=False, uld_skip_teacher_eos=False,
        use_extended_uld=False, uld_token_merge_strategy=strategy, uld_use_hybrid_loss=False, beta=1.0,
    )  # fmt: skip
    return pytest.importorskip("trl.experimental.gold.gold_trainer").ULDLoss(config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_uld_equals_trl(seed: int, dtype: torch.dtype) -> None:
    """TRL's own alignment of byte offsets and its merge by the chain rule; it marks tokens, we what predicts them."""
    chunks, own, its = some_chunks(seed)
    (student, ours), (teacher, theirs) = drawn(seed, 11, own + 1), drawn(seed + 50, 15, its + 1)
    labels = [torch.full((5, own + 1), -100), torch.full((5, its + 1), -100)]
    spans = (torch.zeros(5, own + 1, 2, dtype=torch.long), torch.zeros(5, its + 1, 2, dtype=torch.long))
    for row, found in enumerate(chunks):
        for number, chunk in enumerate(found):
            for side, part in enumerate((chunk.student, chunk.teacher)):
                for place in range(part.start, part.stop):
                    labels[side][row, place + 1] = 1
                    # inside a chunk the two sides never end at one place, at its end they do
                    inner = 100 * number + (place - part.start) * 2 + side + 1
                    spans[side][row, place + 1, 1] = 100 * (number + 1) if place + 1 == part.stop else inner
    criterion = trl_uld("bayesian")
    criterion.use_extended_uld = True
    later = [torch.cat([torch.zeros(5, 1, dtype=torch.long), i], 1)[:, :-1] for i in (ours, theirs)]

    def reference(z: Tensor) -> Tensor:
        loss: Tensor = criterion(z, teacher.to(dtype), *labels, *later, *spans)
        return loss

    def mine(z: Tensor) -> Tensor:
        return uld(z, teacher.to(dtype), ours, theirs, chunks, 5, temperature=1.5)

    value, slope = with_gradient(mine, student.to(dtype))
    expected, gradient = with_gradient(reference, student.to(dtype))
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    assert abs(float(value - expected)) <= bound
    assert float((slope - gradient).abs().max()) <= bound


def test_only_the_student_gets_a_gradient_and_shards_add() -> None:
    chunks, own, its = some_chunks(4)
    (student, ours), (teacher, theirs) = drawn(4, 11, own), drawn(5, 7, its)
    student.requires_grad_()
    teacher.requires_grad_()
    whole = uld(student, teacher, ours, theirs, chunks, 5)
    whole.backward()
    assert teacher.grad is None
    inside = torch.zeros(student.shape[:2], dtype=torch.bool)
    for row, found in enumerate(chunks):
        inside[row, : found[-1].student.stop] = True
    assert student.grad is not None
    assert bool((student.grad.abs().sum(-1) > 0)[inside].all())
    assert not bool(student.grad[~inside].any())
    parts = [
        uld(student[s].detach(), teacher[s], ours[s], theirs[s], chunks[s], 5) for s in (slice(0, 2), slice(2, None))
    ]
    assert float(sum(parts)) == pytest.approx(float(whole.detach()), abs=1e-12)
    empty = uld(student, teacher, ours, theirs, [[]] * 5, 5)
    assert float(empty.detach()) == 0.0
    assert not torch.autograd.grad(empty, student)[0].any()


# On the student's own replies.


@pytest.fixture(scope="module")
def pupils(begun: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By its tokenizer: a small student that has seen some traces."""
    from ottava.trainer import snapshot
    from ottava.trainer.spec import Dense, Direct, TrainSpec
    from ottava.trainer.worker import export

    found = {}
    for cut in ("characters", "pairs"):
        folder = tmp_path_factory.mktemp(cut) / "model"
        write_tiny(folder, chains.vocabulary(), cut)  # type: ignore[arg-type]
        spec = TrainSpec(steps=60, batch=8, direct=Direct(weight=0.0), shape=Dense(family="llama", hidden=32, width=48))
        its = {"spec": spec.model_dump(mode="json"), "seed": 4, "data": str(dataset), "chat": str(folder)}
        trainer = make_trainer(its)
        while trainer.state.step < spec.steps:
            trainer.step(lambda total: total, range(2))
        snapshot.save(folder.parent / "state", trainer.state.snapshot())
        export({**its, "state": str(folder.parent / "state"), "model": str(folder), "latent": None})
        found[cut] = folder
    return found


def args(model: Path, teacher: Path, dataset: Path, folder: Path, **more: Any) -> dict[str, Any]:
    rollout = {"prompts": 4, "group": 2, "max_new": 32, "updates": 1, "minibatches": 2, "temperature": 1.0}
    spec = {"steps": STEPS, "virtual_shards": 2, "rollout": rollout, "lengths": (2, 3), **more}
    return {
        "spec": OnPolicySpec.model_validate(spec).model_dump(mode="json"), "seed": 5, "data": str(dataset),
        "chat": str(model), "objective": "on_policy", "start_model": str(model), "teacher": str(teacher),
        "rollouts": str(folder), "run": "r", "seals": [],
    }  # fmt: skip


@pytest.mark.parametrize("cut", ["characters", "pairs"])
@pytest.mark.parametrize("kind", ["uld", "alm"])
def test_workers_and_the_replay_change_nothing(
    begun: Path, pupils: dict[str, Path], dataset: Path, tmp_path: Path, kind: str, cut: str
) -> None:
    how = {"divergence": {"kind": kind}}
    ends = {World(args(pupils[cut], begun, dataset, tmp_path / str(n), **how), n).run(STEPS) for n in (1, 2)}
    files = [[path.read_bytes() for *_, path in records.listed(tmp_path / str(n))] for n in (1, 2)]
    assert files[0] == files[1]
    again = World({**args(pupils[cut], begun, dataset, tmp_path / "1", **how), "replay": True}, 2)
    ends.add(again.run(STEPS))
    assert len(ends) == 1
    assert 0 < again.report.told["covered"] < 1, "young students write words that the teacher has not"


def test_a_supervised_run_survives_and_its_replay_learns_from_the_records(
    begun: Path, pupils: dict[str, Path], dataset: Path, launcher: Any, tmp_path: Path
) -> None:
    its = args(pupils["pairs"], begun, dataset, tmp_path, divergence={"kind": "alm"}, restarts=2, checkpoint_every=2)
    spec = OnPolicySpec.model_validate(its["spec"])
    plain = {name: its[name] for name in its if name not in ("rollouts", "run", "seals")}
    pools, journal = (Pool(name="a", workers=2),), Journal(tmp_path / "j")
    main = Run("main", spec, pools, plain, tmp_path / "main", journal, launcher, tmp_path / "logs")
    final, segments = supervise(main, [Fault(at_step=2, rank=1, kind="sigkill", phase="forward")])
    assert segments[0].failures == 1
    again = Run("again", spec, pools, plain, tmp_path / "again", journal, launcher, tmp_path / "logs", learn_from=main)
    assert replay(again, segments).digest == final.digest
    assert len(records.listed(tmp_path / "main" / "rollouts")) >= 2 * 2
    assert not (tmp_path / "again" / "rollouts").exists()


@pytest.mark.parametrize("kind", ["uld", "alm"])
def test_the_loss_is_that_of_the_records(
    begun: Path, pupils: dict[str, Path], dataset: Path, tmp_path: Path, kind: str
) -> None:
    """Computed again from the files alone, one reply at a time: text by decoding, the teacher's ids by encoding."""
    whole = {"prompts": 4, "group": 2, "max_new": 32, "updates": 1}
    its = args(pupils["pairs"], begun, dataset, tmp_path, divergence={"kind": kind}, grid_from=1.0, rollout=whole)
    world = World(its, 1)
    student, teacher = load(pupils["pairs"]), load(begun)
    own, reader = Chat.load(pupils["pairs"]), Chat.load(begun)
    world.step()
    total, count, replies = 0.0, 0, 0
    for *_, path in records.listed(tmp_path):
        record = records.read(path, "r")
        for row, ids in enumerate(record.rollouts.ids()):
            prompt = reader.prompts([record.problems[row // 2]], True)[0]
            told, chunks = crossing.retell(own, reader, ids, 128)
            start = int(record.rollouts.prompt_lengths[row])
            one = record.rollouts.sequences()[row : row + 1, : start + len(ids)]
            with torch.no_grad():
                ours = student(input_ids=one).logits[:, start - 1 : -1]
                theirs = teacher(input_ids=torch.tensor([prompt + told])).logits[:, len(prompt) - 1 : -1]
            spoken = (torch.tensor([ids]), torch.tensor([told], dtype=torch.int64))
            if kind == "uld":
                total += float(uld(ours, theirs, *spoken, [chunks], 1))
            else:
                both = [
                    z.log_softmax(-1).gather(2, i[..., None])[..., 0]
                    for z, i in zip((ours, theirs), spoken, strict=True)
                ]
                total += float(alm(both[0], both[1], [chunks], 1))
            count, replies = count + len(chunks), replies + 1
    expected = total / (replies if kind == "uld" else count)
    assert world.report.told["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["uld", "alm"])
def test_a_student_comes_nearer_on_the_replies_that_it_learns_from(
    begun: Path, pupils: dict[str, Path], dataset: Path, tmp_path: Path, kind: str
) -> None:
    """The distance falls over one generation's updates, and nothing but the student moves."""
    before = {name: tensor.clone() for name, tensor in load(begun).state_dict().items()}
    its = args(
        pupils["pairs"], begun, dataset, tmp_path, steps=16, divergence={"kind": kind}, grid_from=1.0,
        rollout={"prompts": 4, "group": 2, "max_new": 32, "updates": 16, "temperature": 1.0},
        optimiser={"adam": 2e-3, "embedding": 2e-3},
    )  # fmt: skip
    world, told = World(its, 1), []
    while world.workers[0].state.step < 16:
        world.step()
        told.append(world.report.told["loss"])
    assert told[-1] < 0.8 * told[0], told
    teacher = world.workers[0].objective._teacher  # type: ignore[attr-defined]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("kind", ["uld", "alm"])
def test_a_teacher_that_is_the_student_teaches_nothing(begun: Path, dataset: Path, tmp_path: Path, kind: str) -> None:
    """One tokenizer is a special case of two."""
    world = World(args(begun, begun, dataset, tmp_path, divergence={"kind": kind}, grid_from=1.0), 1)
    world.step()
    assert abs(world.report.told["loss"]) < 1e-5
    assert world.report.told["covered"] == 1


def test_padding_is_the_padding_of_rollouts() -> None:
    reading = crossing.read(chat("words"), chat("words"), [[2, 3], [2]], [[6, 1], []], 128)
    found: Rollouts = reading.rollouts
    assert found.prompts.tolist() == [[2, 3], [2, PAD]]
    assert found.ids() == [[6, 1], []]
    assert STOP not in found.finish.tolist()
