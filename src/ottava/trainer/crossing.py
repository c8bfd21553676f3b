"""A student's replies as a teacher with another tokenizer reads them.

Ids mean nothing across two tokenizers; text does. A reply is its text and its control ids (</think>, the end), which
both sides have under names of their own. The teacher's own tokenizer writes that text again, and where the tokens of
either side end in it tells which of them cover the same characters (`divergences.align`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ottava.engine.generate import PAD
from ottava.engine.rollout import Rollouts
from ottava.models.chat import Chat, Detokeniser
from ottava.trainer.divergences import Chunk, align


@dataclass(frozen=True)
class Reading:
    """rollouts: the replies of N rows in the teacher's ids, as far as it can read them; nobody drew those, so all but
    prompts, replies and lengths is empty. chunks: of each row, the ids of both sides that cover the same text."""

    rollouts: Rollouts
    chunks: tuple[tuple[Chunk, ...], ...]


def read(
    student: Chat,
    teacher: Chat,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    context: int,
) -> Reading:
    """prompts: in the teacher's ids; replies: in the student's; context: ids that the teacher can read in all."""
    told = [
        retell(student, teacher, reply, context - len(prompt)) for prompt, reply in zip(prompts, replies, strict=True)
    ]
    asked, prompt_lengths = _padded(prompts)
    theirs, lengths = _padded([ids for ids, _ in told])
    nothing = torch.zeros(theirs.shape)
    rollouts = Rollouts(
        asked, prompt_lengths, theirs, lengths, nothing, nothing.bool(), lengths.to(torch.uint8) * 0, None, None
    )
    return Reading(rollouts, tuple(chunks for _, chunks in told))


def retell(student: Chat, teacher: Chat, reply: Sequence[int], room: int) -> tuple[list[int], tuple[Chunk, ...]]:
    """One reply in the teacher's ids, at most `room` of them, and which ids of both cover the same text.

    A control id is a chunk of its own. Reading ends at one that the teacher has not, and at text that its vocabulary
    cannot write: what follows is in no chunk.
    """
    same = {student.think_start: teacher.think_start, student.think_end: teacher.think_end}
    same |= dict.fromkeys(student.stop_ids, teacher.stop)
    silent = {*student.control.values(), *same}
    theirs: list[int] = []
    chunks: list[Chunk] = []
    at, whole = 0, True
    for control, group in itertools.groupby(reply, silent.__contains__):
        own = list(group)
        if control:
            found = list(itertools.takewhile(lambda i: i is not None, map(same.get, own)))
            whole, ids = len(found) == len(own), [i for i in found if i is not None]
            parts = [Chunk(slice(i, i + 1), slice(i, i + 1)) for i in range(len(ids))]
        else:
            ids, parts, whole = _rewritten(pieces(student, own), teacher)
        chunks += [_shifted(part, at, len(theirs)) for part in parts]
        theirs += ids
        at += len(own)
        if not whole:
            break
    return theirs[:room], tuple(chunk for chunk in chunks if chunk.teacher.stop <= room)


def pieces(chat: Chat, ids: Sequence[int]) -> list[str]:
    """What each id adds to the text; nothing where a character is still to be completed. Joined, they are the text."""
    text = Detokeniser(chat)
    found = [text.add(i) for i in ids]
    return [*found[:-1], found[-1] + text.end()] if found else []


def written(chat: Chat, text: str) -> tuple[list[int], list[str]]:
    """The ids that a tokenizer writes a text with, and what each covers of it. Raises where it cannot write it.

    White space that belongs to no token counts to the one behind it, or to the last; of tokens that share a character
    the last one has it. So joined, the pieces are the text, and an empty text alone has none.
    """
    encoding = chat.tokenizer.encode(text, add_special_tokens=False)
    if not encoding.ids:
        return [], []
    begins = [begin for begin, _ in encoding.offsets[1:]]
    ends = [min(end, begin) for (_, end), begin in zip(encoding.offsets, begins, strict=False)]
    cuts = [0, *itertools.accumulate(ends, max), len(text)]
    return list(encoding.ids), [text[a:b] for a, b in itertools.pairwise(cuts)]


def _rewritten(own: Sequence[str], teacher: Chat) -> tuple[list[int], list[Chunk], bool]:
    """The text of the student's pieces in the teacher's ids, their chunks, and whether that is all of it."""
    for end in range(len(own), 0, -1):
        try:
            ids, theirs = written(teacher, "".join(own[:end]))
        except Exception:  # the library raises bare Exception for a word that it has no token for
            continue
        return ids, _aligned(own[:end], theirs), end == len(own)
    return [], [], False


def _aligned(own: Sequence[str], theirs: Sequence[str]) -> list[Chunk]:
    """The chunks that hold a character; ids before the end of their first character are part of the chunk it is in."""
    found: list[Chunk] = []
    begin = (0, 0)
    for chunk in align([piece.encode() for piece in own], [piece.encode() for piece in theirs]):
        if any(own[begin[0] : chunk.student.stop]):
            found.append(Chunk(slice(begin[0], chunk.student.stop), slice(begin[1], chunk.teacher.stop)))
            begin = (chunk.student.stop, chunk.teacher.stop)
    return found


def _shifted(chunk: Chunk, student: int, teacher: int) -> Chunk:
    own, its = chunk.student, chunk.teacher
    return Chunk(slice(own.start + student, own.stop + student), slice(its.start + teacher, its.stop + teacher))


def _padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """int64 [N, L] with PAD on the right, and the lengths [N]."""
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    return pad_sequence(rows, batch_first=True, padding_value=PAD), torch.tensor([len(ids) for ids in sequences])
