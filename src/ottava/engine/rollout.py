"""Rollouts: replies to many prompts with what a learner must know of how they were drawn.

A shard's rollouts are a pure function of (weights, seed, rows). Two things make them so: each choice takes its number
from the host's counter, and one shard is one batch, always. Rows that have ended leave the batch inside a call, by a
rule that looks at this batch alone; rows of another call never join it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ottava.engine import bare
from ottava.engine.bare import Decoder
from ottava.engine.generate import PAD, Cached, ThinkBudget
from ottava.engine.handoff import Handoff, offer
from ottava.engine.room import lacking
from ottava.engine.sampling import Chosen, sample, uniform
from ottava.errors import DataError

LENGTH, STOP = 0, 1
"""Why a reply ended: it has max_new ids, or its last id is a stop id."""

_LEAVE_AT = (0.75, 0.5, 0.25)
"""Ended rows leave the batch when so large a part of its first rows goes on: each time costs a copy of the cache."""

_SCORED_AT_ONCE = 1 << 24
"""Logits that `score` holds at a time. Changing it changes batches, and so the last bits."""


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn.

    max_new: at most so many ids a reply. stop: ids that end it. temperature 0 is greedy. top_p below 1 draws from the
    fewest ids that hold that mass. think: a budget for prompts that end where thinking begins. Raises DataError.
    """

    max_new: int
    stop: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    think: ThinkBudget | None = None

    def __post_init__(self) -> None:
        if self.max_new < 1:
            raise DataError(f"max_new is {self.max_new}: a reply has at least one id")
        if not 0 <= self.temperature < math.inf:
            raise DataError(f"the temperature is {self.temperature}", fix="a finite number, 0 for greedy replies")
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p is {self.top_p}", fix="above 0 and at most 1")
        if self.think is not None and self.think.tokens < 0:
            raise DataError(f"the thinking budget is {self.think.tokens} ids")


@dataclass(frozen=True)
class Rollouts:
    """N replies; tensors on the host. What lies beyond a row's length is 0 or False.

    prompts: int64 [N, P], prompt_lengths: int64 [N]. replies: int64 [N, T], the stop id included, reply_lengths:
    int64 [N]. logprobs: float32 [N, T], of the distribution drawn from: after temperature, truncation and budget (at
    temperature 0: those of temperature 1). forced: bool [N, T], ids that the budget set and nobody drew: their
    log-probability is 0. finish: uint8 [N], LENGTH or STOP.
    kept: uint8 [N, T, ceil(V / 8)], the ids drawn from, as bits (`kept_sets`); None where all were.
    routes: int16 [N, P + T - 1, expert layers, k], the experts that the id at each position of `sequences()` took,
    in the order of the gate; the last id of a reply went through no layer. None without experts.
    """

    prompts: Tensor
    prompt_lengths: Tensor
    replies: Tensor
    reply_lengths: Tensor
    logprobs: Tensor
    forced: Tensor
    finish: Tensor
    kept: Tensor | None
    routes: Tensor | None

    def drawn(self) -> Tensor:
        """bool [N, T]: the ids that the policy chose; a loss is over these."""
        own = torch.arange(self.replies.shape[1]) < self.reply_lengths[:, None]
        return own & ~self.forced

    def ids(self) -> list[list[int]]:
        """The replies, each as long as it is."""
        lengths = self.reply_lengths.tolist()
        return [row[:length] for row, length in zip(self.replies.tolist(), lengths, strict=True)]

    def sequences(self) -> Tensor:
        """int64 [N, P + T]: each prompt with its reply directly behind it, then PAD."""
        whole = torch.full((len(self.prompts), self.prompts.shape[1] + self.replies.shape[1]), PAD)
        for row, (prompt, reply) in enumerate(
            zip(self.prompt_lengths.tolist(), self.reply_lengths.tolist(), strict=True)
        ):
            whole[row, :prompt] = self.prompts[row, :prompt]
            whole[row, prompt : prompt + reply] = self.replies[row, :reply]
        return whole

    def kept_sets(self, vocabulary: int) -> Tensor | None:
        """bool [N, T, V]."""
        if self.kept is None:
            return None
        return torch.from_numpy(np.unpackbits(self.kept.numpy(), axis=-1, count=vocabulary)).bool()


@dataclass(frozen=True)
class Scores:
    """What a model says of given sequences: logprobs float32 [N, L - 1], of each id after the first; routes as above.

    What lies beyond a sequence's end is 0.
    """

    logprobs: Tensor
    routes: Tensor | None


class Engine(Protocol):
    """What draws replies: a model of this process, or an engine of its own (`remote`)."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""

    def take(self, model: nn.Module) -> Handoff:
        """Hand a learner's weights over; what the engine holds from then on, as far as it or its folder can tell."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, rows: Sequence[int] | None = None
    ) -> Rollouts: ...

    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> Scores: ...


class InProcess:
    """Rollouts by a model of this process, whose parameters are read where they are."""

    def __init__(self, model: nn.Module):
        self.take_up(model)

    def take_up(self, model: nn.Module) -> None:
        """Read this model's parameters from now on."""
        self.model = model
        config: Any = model.config
        self.vocabulary, self.context = int(config.vocab_size), int(config.max_position_embeddings)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def take(self, model: nn.Module) -> Handoff:
        """Nothing moves; the digests are of what is read from now on."""
        self.take_up(model)
        return offer(self.model)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, rows: Sequence[int] | None = None
    ) -> Rollouts:
        """One shard's replies to prompts of any lengths.

        rows: the numbers by which the replies draw their choices (default 0..N-1), each its own.
        Raises DataError for prompts or rows that cannot be; FormatError where the model's logits are not numbers.
        """
        self._check(prompts, sampling.max_new)
        if sampling.think is not None and not 0 <= sampling.think.end < self.vocabulary:
            raise DataError(f"the id {sampling.think.end} that ends thinking is not among the model's")
        numbers = range(len(prompts)) if rows is None else rows
        if len(numbers) != len(prompts) or len(set(numbers)) != len(prompts):
            raise DataError(
                f"{len(prompts)} prompts and {len(set(numbers))} different row numbers",
                fix="give each prompt a number of its own: those of one number draw the same choices",
            )
        out = _Out(prompts, sampling, np.asarray(numbers), self.device)
        with _evaluating(self.model) as decoder:
            for group in _groups(prompts, decoder.ragged):
                _generate(decoder, out, group, seed)
        return out.rollouts()

    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> Scores:
        """What generation's own code gives to sequences of ids: log-probabilities after temperature, and routes.

        Raises DataError.
        """
        self._check(sequences, 0)
        if not 0 < temperature < math.inf:
            raise DataError(f"the temperature is {temperature}", fix="a finite number above 0")
        ids, lengths = _padded(sequences)
        width = ids.shape[1]
        at_once = max(1, _SCORED_AT_ONCE // (width * self.vocabulary))
        logprobs, routes = [], []
        with _evaluating(self.model) as decoder:
            for part in torch.split(ids.to(self.device), at_once):
                decoder.start(len(part), width)
                logits = decoder.logits(part)[:, :-1].double() / temperature
                logprobs.append(logits.log_softmax(-1).gather(-1, part[:, 1:, None])[..., 0].float().cpu())
                if (taken := decoder.routes()) is not None:
                    routes.append(taken[:, :-1].short().cpu())
        inside = (torch.arange(width) < lengths[:, None])[:, 1:]
        return Scores(torch.cat(logprobs) * inside, torch.cat(routes) * inside[..., None, None] if routes else None)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _check(self, sequences: Sequence[Sequence[int]], more: int) -> None:
        """Refuse what the model cannot read; `more` ids will follow."""
        if not sequences:
            raise DataError("there is no prompt")
        for row, ids in enumerate(sequences):
            if not ids:
                raise DataError(f"row {row} is empty", fix="a prompt has at least one id")
            if min(ids) < 0 or max(ids) >= self.vocabulary:
                raise DataError(
                    f"row {row} has the id {min(ids) if min(ids) < 0 else max(ids)}",
                    fix=f"the model's ids are 0 to {self.vocabulary - 1}: does the tokenizer belong to it?",
                )
            if (wrong := lacking(more, self.context, len(ids))) is not None:
                raise DataError(f"row {row}: {wrong[0]}", fix=wrong[1])


def _generate(decoder: Decoder, out: _Out, group: list[int], seed: int) -> None:
    """Fill the rows `group` of `out`: one batch, which its ended rows leave."""
    how = out.sampling
    live = torch.tensor(group)
    logits = _read(decoder, out, live)
    done = torch.zeros(len(live), dtype=torch.bool, device=out.device)
    thinking = torch.full_like(done, how.think is not None)
    stops = torch.tensor(how.stop, dtype=torch.int64, device=out.device)
    leave = _LEAVE_AT[0] * len(live)
    part = _Part(live, 0, 0)
    for position in range(how.max_new):
        draws = uniform(seed, out.numbers[live.numpy()], position) if how.temperature else None
        chosen, forced = sample(logits, how.temperature, how.top_p, draws), None
        if how.think is not None:
            chosen, forced = _budgeted(chosen, thinking, how.think, position)
            thinking &= chosen.ids != how.think.end
        part.add(chosen, forced)
        done |= (chosen.ids[:, None] == stops).any(-1)
        going = len(live) - int(done.sum())
        if going == 0 or position + 1 == how.max_new:
            break
        ids = chosen.ids
        if going <= leave:
            out.take(part)
            rows = (~done).nonzero()[:, 0]
            decoder.select(rows)
            ids, thinking, done, live = ids[rows], thinking[rows], done[rows], live[rows.cpu()]
            leave = max((at * len(group) for at in _LEAVE_AT if at * len(group) < going), default=0)
            part = _Part(live, position + 1, position)
        logits = decoder.step(ids[:, None])
        part.read(decoder.routes())
    out.take(part)


def _read(decoder: Decoder, out: _Out, live: Tensor) -> Tensor:
    """Begin a batch: logits [B, V] after the prompts of these rows. Equal prompts, as a group's are, are read once."""
    lengths = out.prompt_lengths[live]
    prompts = out.prompts[live, : int(lengths.max())]
    numbers: dict[tuple[int, ...], int] = {}
    first: list[int] = []
    each: list[int] = []
    for row, (prompt, length) in enumerate(zip(prompts.tolist(), lengths.tolist(), strict=True)):
        number = numbers.setdefault(tuple(prompt[:length]), len(numbers))
        each.append(number)
        if number == len(first):
            first.append(row)
    lengths = lengths[first]
    even = bool((lengths == prompts.shape[1]).all())
    decoder.start(len(first), prompts.shape[1] + out.sampling.max_new - 1)
    logits = decoder.step(prompts[first].to(out.device), None if even else lengths.to(out.device))
    routes = decoder.routes()
    out.read(live, None if routes is None else routes[each])
    if len(first) < len(each):
        decoder.select(torch.tensor(each))
        logits = logits[each]
    return logits


def _budgeted(chosen: Chosen, thinking: Tensor, think: ThinkBudget, position: int) -> tuple[Chosen, Tensor | None]:
    """Force the end of thinking where the budget is spent: a choice among one id, with log-probability 0."""
    if position < think.tokens:
        return chosen, None
    ids = torch.where(thinking, think.end, chosen.ids)
    kept = chosen.kept
    if kept is not None:
        only = torch.zeros_like(kept)
        only[:, think.end] = True
        kept = torch.where(thinking[:, None], only, kept)
    return Chosen(ids, chosen.logprobs.masked_fill(thinking, 0.0), kept), thinking.clone()


class _Part:
    """What some steps of the same rows gave. begin: position of the first choice; reads: of the first id read."""

    def __init__(self, rows: Tensor, begin: int, reads: int):
        self.rows, self.begin, self.reads = rows, begin, reads
        self.ids: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        self.forced: list[Tensor] = []
        self.kept: list[Tensor] = []
        self.routes: list[Tensor] = []

    def add(self, chosen: Chosen, forced: Tensor | None) -> None:
        self.ids.append(chosen.ids)
        self.logprobs.append(chosen.logprobs)
        self.forced.append(torch.zeros_like(chosen.ids, dtype=torch.bool) if forced is None else forced)
        if chosen.kept is not None:
            self.kept.append(torch.from_numpy(np.packbits(chosen.kept.cpu().numpy(), axis=-1)))

    def read(self, routes: Tensor | None) -> None:
        if routes is not None:
            self.routes.append(routes)


class _Out:
    """The tensors of Rollouts while they fill."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        numbers: npt.NDArray[np.int64],
        device: torch.device,
    ):
        self.sampling, self.numbers, self.device = sampling, numbers, device
        self.prompts, self.prompt_lengths = _padded(prompts)
        shape = (len(prompts), sampling.max_new)
        self.replies = torch.full(shape, PAD)
        self.logprobs, self.forced = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        self.kept: Tensor | None = None
        self.routes: Tensor | None = None
        self.width = self.prompts.shape[1] + sampling.max_new - 1

    def read(self, rows: Tensor, routes: Tensor | None) -> None:
        """Take the routes of the prompts."""
        if routes is not None:
            self._route(rows[:, None], torch.arange(routes.shape[1])[None], routes)

    def take(self, part: _Part) -> None:
        """Take what a part gave."""
        if part.routes:
            positions = self.prompt_lengths[part.rows, None] + part.reads + torch.arange(len(part.routes))
            self._route(part.rows[:, None], positions, torch.cat(part.routes, 1))
        if not part.ids:
            return
        index = (part.rows[:, None], torch.arange(part.begin, part.begin + len(part.ids)))
        self.replies[index] = torch.stack(part.ids, 1).cpu()
        self.logprobs[index] = torch.stack(part.logprobs, 1).to(self.logprobs)
        self.forced[index] = torch.stack(part.forced, 1).cpu()
        if part.kept:
            if self.kept is None:
                self.kept = torch.zeros(*self.replies.shape, part.kept[0].shape[-1], dtype=torch.uint8)
            self.kept[index] = torch.stack(part.kept, 1)

    def _route(self, rows: Tensor, positions: Tensor, routes: Tensor) -> None:
        if self.routes is None:
            self.routes = torch.zeros(len(self.replies), self.width, *routes.shape[2:], dtype=torch.int16)
        self.routes[rows, positions] = routes.short().cpu()

    def rollouts(self) -> Rollouts:
        """What is beyond the ends is cleared: rows go on after their end until they leave the batch."""
        columns = torch.arange(self.replies.shape[1])
        stopped = torch.isin(self.replies, torch.tensor(self.sampling.stop, dtype=torch.int64))
        first = torch.where(stopped, columns, len(columns)).amin(-1)
        lengths = (first + 1).clamp(max=len(columns))
        width = int(lengths.max())
        own = (columns < lengths[:, None])[:, :width]
        routes = self.routes
        if routes is not None:
            read = self.prompt_lengths + lengths - 1
            routes = routes[:, : self.prompts.shape[1] + width - 1]
            routes = routes * (torch.arange(routes.shape[1]) < read[:, None])[..., None, None]
        return Rollouts(
            self.prompts,
            self.prompt_lengths,
            torch.where(own, self.replies[:, :width], PAD),
            lengths,
            self.logprobs[:, :width] * own,
            self.forced[:, :width] & own,
            stopped.any(-1).to(torch.uint8) * STOP,
            None if self.kept is None else self.kept[:, :width] * own[..., None],
            routes,
        )


def _groups(prompts: Sequence[Sequence[int]], ragged: bool) -> list[list[int]]:
    """The batches of one shard: one, or one for each length, the shortest first."""
    if ragged:
        return [list(range(len(prompts)))]
    lengths: defaultdict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        lengths[len(prompt)].append(row)
    return [rows for _, rows in sorted(lengths.items())]


def _padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """int64 [N, L] with PAD on the right, and the lengths [N]."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    ids = torch.full((len(sequences), int(lengths.max())), PAD)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return ids, lengths


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[Decoder]:
    """The model's decoder, with the model in evaluation mode. Tensors made inside are for no backward pass."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield bare.decoder(model) or Cached(model)
    finally:
        model.train(training)
