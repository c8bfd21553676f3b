"""Reinforcement from verified answers: the policy's own replies, in groups to one question, set against each other.

A *generation* of replies serves `every` updates. Each virtual shard draws its own, in one batch, as a function of
(weights, seed, generation, shard), and they are on disk before the first update (`records`). What a shard adds to an
update then depends on its record and on what all shards count together, so that neither the number of workers nor a
restart changes a bit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from ottava.engine.evaluate import well_formed
from ottava.engine.logprobs import log_probs
from ottava.engine.rollout import LENGTH, STOP, Engine, InProcess, Rollouts, Sampling
from ottava.errors import CheckpointError, DataError
from ottava.models.chat import Chat
from ottava.models.lora import merged
from ottava.tasks import Problem
from ottava.tasks.base import Task
from ottava.tasks.verify import grade
from ottava.trainer import groups, losses, mismatch, records, routing
from ottava.trainer.advantages import advantages, overlong, without_truncated
from ottava.trainer.curriculum import ASKED, Curriculum, facts_of
from ottava.trainer.groups import Groups
from ottava.trainer.guard import Alarm
from ottava.trainer.losses import Rows, Scale, correct, policy_loss
from ottava.trainer.mismatch import Floor, Gap, Said
from ottava.trainer.objective import Objective
from ottava.trainer.records import Record, Usable
from ottava.trainer.rl_spec import ReinforceSpec
from ottava.trainer.schedule import rng

PROMPTS = 41  # the random stream that chooses the questions
_NO_FLOOR = Floor(math.inf, math.inf, 0.0)  # of what is measured without a gate
SPREAD = 2.0
"""How far right is above wrong where DAPO's punishment for length goes down to -1: 1 and -1 there, 1 and 0 here."""
CANONICAL = 2  # questions of the shard by which numerics classes are told apart


@dataclass(frozen=True)
class Place:
    """Where a run's rollouts are kept. pool: where it draws now; check: raises where this worker may write nothing any
    more; replay: whoever drew them, they are learnt from, and none are drawn."""

    folder: Path
    epoch: int
    run: str
    pool: str
    usable: Usable
    check: Callable[[], None] = lambda: None
    replay: bool = False


@dataclass(frozen=True)
class _Worth:
    """What a minibatch is worth, told by all shards' rewards together. By shard, values: [groups, replies], the
    advantages; flat: [groups]."""

    values: Mapping[int, Tensor]
    flat: Mapping[int, Tensor]
    scale: Scale


@dataclass
class _Generation:
    """What is known of the present one. records: those that were needed here; facts: of every shard; worth: of the
    minibatches so far."""

    number: int = -1
    records: dict[int, Record] = field(default_factory=dict)
    facts: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    worth: dict[int, _Worth] = field(default_factory=dict)


class Grpo(Objective):
    """problems: those that may be asked, by their steps; place: None keeps nothing, for measurements.

    engine: who draws, None for the model itself; reference: loads the model that came in, which the KL term keeps to,
    and by which the gate knows a tensor that never arrived.
    """

    columns: tuple[str, ...] = ("policy_loss", *losses.COLUMNS)
    unit = "tokens"  # which of the counts in a shard's facts a mean over an update's tokens is over

    def __init__(
        self,
        spec: ReinforceSpec,
        seed: int,
        chat: Chat,
        task: Task,
        problems: Mapping[int, Sequence[Problem]],
        place: Place | None = None,
        engine: Engine | None = None,
        reference: Callable[[], nn.Module] | None = None,
    ):
        self.spec, self.seed, self._chat, self._task, self._place = spec, seed, chat, task, place
        self._engine, self._floor = engine, _NO_FLOOR
        lengths = spec.levels or tuple(sorted(problems))
        missing = [length for length in lengths if not problems.get(length)]
        if missing:
            raise DataError(f"there are no problems of {missing[0]} steps to ask", fix="other reinforce.lengths")
        self._problems = [(length, problems[length]) for length in lengths]
        everything = [problem for _, pool in self._problems for problem in pool]
        self._curriculum = None if spec.curriculum is None else Curriculum(spec, everything, self._recorded)
        self._thinking = spec.mode == "thinking"
        how = spec.rollout
        self._sampling = Sampling(how.max_new, chat.stop_ids, how.temperature, how.top_p)
        self._policy, self._correction, self._came = spec.policy, spec.policy.correction, reference
        self._reference = reference().eval().requires_grad_(False) if spec.policy.beta and reference else None
        self._now = _Generation()

    # ------------------------------------------------------------ an objective's part

    def begins(self, step: int) -> bool:
        return self._now.number != step // self.spec.every

    def gate(self, model: nn.Module) -> Mapping[str, Any] | None:
        """What draws must be the policy that learns."""
        if self._place is None or self._place.replay:
            return None
        questions = islice(self._questions(0, 0), self.spec.rollout.prompts)
        asked = [self._task.prompt(problem) for problem in questions]
        with merged(model) as whole:
            engine = self._engine or InProcess(whole)
            floor, told = mismatch.gate(engine, whole, self._chat.prompts(asked, self._thinking), self._came)
        self._floor = floor.at(self.spec.rollout.temperature)
        return told

    def prepare(
        self, model: nn.Module, step: int, shards: range, policy: Callable[[], str]
    ) -> Mapping[str, Any] | None:
        number, first = divmod(step, self.spec.every)
        if self._now.number == number:
            return None
        self._now = _Generation(number)
        digest = policy() if first == 0 else None
        for shard in shards:
            self._now.records[shard] = self._take(model, number, shard, digest)
        return {str(shard): dict(record.facts) for shard, record in self._now.records.items()}

    def settle(self, step: int, facts: Sequence[Mapping[str, Any]]) -> None:
        self._now.facts = {int(shard): its for worker in facts for shard, its in worker.items()}
        self._now.worth.clear()
        if self._curriculum is not None:
            self._curriculum.note(self._now.number, self._now.facts)
        if self._place is not None and not self._place.replay:
            mismatch.watch(self._floor, _gap(self._now.facts.values()), f"generation {self._now.number}")

    def loss(self, model: nn.Module, step: int, number: int) -> tuple[Tensor, Tensor]:
        record, part = self._record(number), step % self.spec.every % self.spec.rollout.minibatches
        worth, first = self._worth(part), step % self.spec.every == 0
        values, flat = worth.values[number], worth.flat[number]
        return self._loss(model, record, _rows(part, self.spec), values, flat, worth.scale, first)

    def canonical(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """A few replies, every second one praised: their ids, log-probabilities and gradient are compared."""
        record = self._draw(model, 0, 0, "", CANONICAL, 0)
        praise = torch.ones(CANONICAL, self.spec.rollout.group)
        praise[:, ::2] = -1.0
        flat = torch.zeros(CANONICAL, dtype=torch.bool)
        drawn = record.rollouts.drawn()
        scale = Scale(len(drawn), int(drawn.sum()), self.spec.rollout.max_new)
        loss, columns = self._loss(model, record, torch.arange(len(drawn)), praise, flat, scale, True)
        drew = blake3(record.rollouts.replies.numpy().tobytes() + record.rollouts.logprobs.numpy().tobytes())
        mark = int(drew.hexdigest()[:6], 16)  # 24 bits: a float32 holds them
        return loss, torch.cat([columns[:-1], columns.new_tensor([mark])])

    def told(self, step: int, sums: Mapping[str, float]) -> dict[str, float]:
        counts = losses.summary(torch.tensor([sums[name] for name in losses.COLUMNS], dtype=torch.float64))
        names = ["clipped_low", "clipped_high", "ratio", "ratio_spread", "bad_advantages", "empty"]
        names += ["kl"] * (self._policy.beta > 0) + ["off_policy"] * (self._policy.off_policy_delta is not None)
        names += ["rejected"] * (self._correction is not None)
        return {
            "loss": round(sums["policy_loss"], 6),
            "generation": step // self.spec.every,
            **{name: round(counts[name], 6) for name in names},
            **self._about(),
        }

    def _about(self) -> dict[str, float]:
        """gap_bound: above it a difference between sampler and learner stops the run; absent where none is measured."""
        bound = {"gap_bound": self._floor.most} if math.isfinite(self._floor.most) else {}
        return _about(self._now.facts.values()) | bound

    def kind(self, step: int) -> Hashable:
        return None

    def balances(self, step: int) -> bool:
        """Where routers are not frozen, only between generations: replies are of one policy until their last update."""
        return (step + 1) % self.spec.every == 0

    def _worth(self, part: int) -> _Worth:
        """Of a minibatch, found at its first shard."""
        if part not in self._now.worth:
            facts = dict(sorted(self._now.facts.items()))
            chosen = [_part(torch.tensor(its["rewards"]), part, self.spec) for its in facts.values()]
            found, counts = advantages(torch.cat(chosen), self.spec.policy.scaling), [len(groups) for groups in chosen]
            tokens = sum(its[self.unit][part] for its in facts.values())
            scale = Scale(sum(groups.numel() for groups in chosen), tokens, self.spec.rollout.max_new)
            values, flat = (
                dict(zip(facts, torch.split(whole, counts), strict=True)) for whole in (found.values, found.flat)
            )
            self._now.worth[part] = _Worth(values, flat, scale)
        return self._now.worth[part]

    # ------------------------------------------------------------ records

    def _record(self, shard: int) -> Record:
        """One that was prepared here, or another worker's, which is on disk since everybody's facts are known."""
        if shard not in self._now.records:
            self._now.records[shard] = self._take(None, self._now.number, shard, None)
        return self._now.records[shard]

    def _take(self, model: nn.Module | None, number: int, shard: int, policy: str | None) -> Record:
        """The record that counts, or what is drawn now. policy: the digest of the state that is to draw it, or None
        where that state is past."""
        place, step = self._place, number * self.spec.every
        for path in () if place is None else records.found(place.folder, number, shard, place.usable, step):
            try:
                record = records.read(path, place.run)  # type: ignore[union-attr]
            except CheckpointError:
                continue
            if place.replay or policy is None or (record.policy, record.pool) == (policy, place.pool):  # type: ignore[union-attr]
                return record
        if policy is None or model is None or (place is not None and place.replay):
            raise Alarm("rollout", f"what generation {number} drew for shard {shard} is gone", step=step)
        if self._engine is not None:
            mismatch.handed(self._engine, model)
        record = self._draw(
            model, number, shard, policy, self.spec.rollout.prompts, self.spec.policy.resample, self._engine
        )
        if place is not None:
            place.check()
            records.write(records.path_of(place.folder, place.epoch, number, shard), record)
        return record

    def _recorded(self, number: int) -> dict[int, Mapping[str, Any]]:
        """What the records of a generation say. Raises Alarm where one is gone."""
        return {shard: self._take(None, number, shard, None).facts for shard in range(self.spec.virtual_shards)}

    def _questions(self, number: int, shard: int) -> Iterator[Problem]:
        """What a shard of a generation asks, one question after the other."""
        draw = rng(self.seed, PROMPTS, number, shard)
        if self._curriculum is not None:
            yield from self._curriculum.questions(draw, number)
        while True:
            _, pool = self._problems[int(draw.integers(len(self._problems)))]
            yield pool[int(draw.integers(len(pool)))]

    def _draw(
        self,
        model: nn.Module,
        number: int,
        shard: int,
        policy: str,
        wanted: int,
        rounds: int,
        engine: Engine | None = None,
    ) -> Record:
        """`wanted` groups of replies by the model as it is, with `rounds` rounds in place of those that are flat."""
        spec, group = self.spec, self.spec.rollout.group
        most = spec.rollout.prompts * group * (1 + spec.policy.resample)

        def generate(problems: Sequence[Problem], numbers: range) -> Rollouts:
            prompts = self._chat.prompts([self._task.prompt(problem) for problem in problems], self._thinking)
            repeated = [prompt for prompt in prompts for _ in range(group)]
            with merged(model) as whole:  # what samples is what would be served
                return (engine or InProcess(whole)).generate(repeated, self._sampling, self.seed, numbers)

        why: Counter[str] = Counter()
        drawn = groups.draw(
            self._questions(number, shard), generate, partial(self._reward, why),
            first=(number * spec.virtual_shards + shard) * most, wanted=wanted, group=group, rounds=rounds,
        )  # fmt: skip
        rollouts, rewards = drawn.rollouts, self._shaped(drawn)
        taught = self._taught(advantages(rewards).flat)
        old, gap = self._old(model, rollouts, taught)
        reference = None if self._reference is None else self._referred(rollouts, taught)
        facts = self._facts(drawn, rewards, taught, old) | {
            "rows": drawn.rows, "ids": drawn.ids, "scored": drawn.scored, "right": drawn.right,
            "compared": gap.count, "gap_sum": gap.total, "gap_max": gap.largest, "beyond": gap.beyond, "ties": gap.ties,
        }  # fmt: skip
        if why:
            facts["why"] = dict(sorted(why.items()))
        if self._curriculum is not None:
            facts[ASKED] = facts_of(drawn.asked)
        run, pool = ("", "") if self._place is None else (self._place.run, self._place.pool)
        questions = tuple(problem.question for problem in drawn.problems)
        step, flat = number * spec.every, rewards.reshape(-1)
        return Record(run, number, shard, step, policy, pool, rollouts, old, flat, questions, facts, reference)

    def _facts(self, drawn: Groups, rewards: Tensor, taught: Tensor, old: Tensor) -> dict[str, Any]:
        """What the other workers, and readers, must know of a shard's replies."""
        rollouts = drawn.rollouts
        scored = torch.where(rollouts.drawn() & taught[:, None], old, rollouts.logprobs)
        counted, _ = self._counted(rollouts, torch.arange(len(taught)), scored)
        return {
            "rewards": rewards.tolist(),
            "tokens": self._by_part(counted.sum(1)),
            "stopped": int((rollouts.finish == STOP).sum()),
        }

    def _by_part(self, counts: Tensor) -> list[int]:
        """The sums of each minibatch, of what is counted by row: [N]."""
        grouped = counts.view(-1, self.spec.rollout.group)
        return [int(_part(grouped, part, self.spec).sum()) for part in range(self.spec.rollout.minibatches)]

    def _old(self, model: nn.Module, rollouts: Rollouts, taught: Tensor) -> tuple[Tensor, Gap]:
        """The learner's own log-probabilities [N, T], 0 where nobody learns from a row and none was compared, and how
        far the engine's are from them. Where hardly a row teaches, others are compared: a broken engine's rewards are
        all alike."""
        drawn, old = rollouts.drawn(), torch.zeros(rollouts.replies.shape)
        margin = torch.full(old.shape, math.inf, dtype=torch.float64)
        group = self.spec.rollout.group
        first = ~taught & (torch.arange(len(taught)) % group == 0)
        few = int(taught.sum()) < self.spec.rollout.prompts
        compared = taught | first if few else taught
        for part in (taught, first) if few else (taught,):
            rows = part.nonzero()[:, 0]
            if len(rows):
                with torch.no_grad(), mismatch.margins_of(model, len(rows)) as near:
                    old[rows] = self._live(model, rollouts, rows).cpu() * drawn[rows]
                places = rollouts.prompt_lengths[rows, None] - 1 + torch.arange(old.shape[1])
                found = near(self._width(rollouts, rows) - 1)
                margin[rows] = found.gather(1, places.clamp(max=found.shape[1] - 1))
        said = Said(old, margin, drawn & compared[:, None])
        return old, mismatch.gap(rollouts.logprobs, said, self._floor)

    def _shaped(self, drawn: Groups) -> Tensor:
        """The rewards [Q, G] of verdicts: less for replies near the limit of their length, where that is asked for."""
        longest, share = self.spec.rollout.max_new, self.spec.policy.overlong
        if not share:
            return drawn.verdicts
        less = overlong(drawn.rollouts.reply_lengths, longest, round(share * longest)).view(drawn.verdicts.shape)
        return drawn.verdicts + less / SPREAD

    def _taught(self, flat: Tensor) -> Tensor:
        """Which rows go through the learner [N], from which groups are flat: those too where a KL term pulls at them,
        or where their loads count for the router."""
        group = self.spec.rollout.group
        every = self._policy.beta > 0 or self.spec.optimiser.router_bias > 0
        return (torch.ones_like(flat) if every else ~flat).repeat_interleave(group)

    def _counted(self, rollouts: Rollouts, rows: Tensor, old: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of some rows: the ids [N, T] that the loss is over, and their weights. old: of these rows."""
        mask = rollouts.drawn()[rows]
        if self.spec.policy.filter_overlong:
            mask = without_truncated(mask, rollouts.finish[rows] == LENGTH)
        if self._correction is None:
            return mask, None
        corrected = correct(self._correction, old, rollouts.logprobs[rows], mask)
        return corrected.mask, corrected.weights

    def _reward(self, why: Counter[str], problem: Problem, ids: list[int]) -> float:
        """1 for a well-formed reply of its mode with the right content, 0 for another, NaN without a verdict: its
        reason is counted in `why`."""
        if not well_formed(self._chat, ids, self._thinking):
            return 0.0
        found = grade(self._task, problem, self._chat.split(ids, self._thinking)[1])
        why.update([found.why] if found.kind == "unscorable" else [])
        return found.reward

    # ------------------------------------------------------------ tensors

    def _loss(
        self, model: nn.Module, record: Record, rows: Tensor, values: Tensor, flat: Tensor, scale: Scale, first: bool
    ) -> tuple[Tensor, Tensor]:
        """Of some of a record's rows. values: [groups, replies], their advantages; flat: [groups], teach nothing."""
        taught = self._taught(flat)
        rows, values = rows[taught], values.reshape(-1)[taught]
        device = next(model.parameters()).device
        if not len(rows):
            return torch.zeros((), device=device), torch.zeros(len(self.columns), device=device)
        live = self._live(model, record.rollouts, rows)
        mask, weights = self._counted(record.rollouts, rows, record.old[rows])
        given = {
            "mask": mask, "advantages": values, "old": None if first else record.old[rows],
            "reference": None if record.reference is None else record.reference[rows],
            "sampler": record.rollouts.logprobs[rows], "weights": weights,
        }  # fmt: skip
        moved: dict[str, Any] = {name: None if its is None else its.to(device) for name, its in given.items()}
        loss, counts = policy_loss(self._policy, live, Rows(**moved), scale)
        return loss, torch.cat([loss.detach()[None], counts])

    def _referred(self, rollouts: Rollouts, which: Tensor) -> Tensor:
        """The reference's log-probabilities [N, T] of the replies, 0 outside `which` rows [N]."""
        found = torch.zeros(rollouts.replies.shape)
        if self._reference is not None and bool(which.any()):
            with torch.no_grad():
                scored = self._live(self._reference, rollouts, which.nonzero()[:, 0], own=False)
            found[which] = scored.cpu() * rollouts.drawn()[which]
        return found

    def _live(self, model: nn.Module, rollouts: Rollouts, rows: Tensor, *, own: bool = True) -> Tensor:
        """The learner's log-probabilities [N, T] of the replies of some rows, as the sampler drew them."""
        logits = self._logits(model, rollouts, rows, own=own)
        kept = rollouts.kept_sets(logits.shape[-1]) if self.spec.policy.keep_mask else None
        inside = None if kept is None else kept[rows].to(logits.device)
        return log_probs(logits, rollouts.replies[rows].to(logits.device), self.spec.rollout.temperature, inside)

    def _logits(self, model: nn.Module, rollouts: Rollouts, rows: Tensor, *, own: bool = True) -> Tensor:
        """What a model says at each place of the replies of some rows: [N, T, V]."""
        device, policy = next(model.parameters()).device, self.spec.policy
        prompts, replies = rollouts.prompt_lengths[rows], rollouts.replies[rows]
        lengths, width = prompts + rollouts.reply_lengths[rows], self._width(rollouts, rows)
        sequences = rollouts.sequences()[rows, :width].to(device)
        body: Any = model.model
        with self._routed(model, rollouts, rows, lengths) if own and policy.keep_routing else nullcontext():
            hidden = body(input_ids=sequences[:, :-1], use_cache=False).last_hidden_state
        places = (prompts[:, None] - 1 + torch.arange(replies.shape[1])).clamp(max=width - 2).to(device)
        head: Any = model.lm_head
        picked: Tensor = head(hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])))
        return picked

    @staticmethod
    def _width(rollouts: Rollouts, rows: Tensor) -> int:
        return int((rollouts.prompt_lengths[rows] + rollouts.reply_lengths[rows]).max())

    def _routed(
        self, model: nn.Module, rollouts: Rollouts, rows: Tensor, lengths: Tensor
    ) -> AbstractContextManager[None]:
        """The model with each id going where the engine sent it; the last id of a reply was never sent."""
        if rollouts.routes is None:
            fix = "policy.keep_routing: false; or a model with experts, by an engine that tells what they were"
            raise DataError("the engine recorded no routes to keep", fix=fix)
        device, width = next(model.parameters()).device, int(lengths.max()) - 1
        inside = torch.arange(width) < lengths[:, None] - 1
        return routing.replay(model, rollouts.routes[rows, :width].to(device), inside.to(device))


def _rows(part: int, spec: ReinforceSpec) -> Tensor:
    """The rows of a minibatch: every so many groups, whole."""
    rows = torch.arange(spec.rollout.prompts * spec.rollout.group).view(spec.rollout.prompts, -1)
    return _part(rows, part, spec).reshape(-1)


def _part(groups: Tensor, part: int, spec: ReinforceSpec) -> Tensor:
    """The groups [Q, G] of a minibatch."""
    return groups[part :: spec.rollout.minibatches]


def asked(rollouts: Path, spec: ReinforceSpec) -> Iterator[tuple[int, int, int, str]]:
    """(step, shard, place in the shard's minibatch, question) of a finished run, as its records tell it; the first step
    is 1. Groups whose rewards are all alike were asked too, and taught nothing."""
    recorded = records.questions(rollouts)
    for step in range(spec.steps):
        number, update = divmod(step, spec.every)
        part = update % spec.rollout.minibatches
        for shard, questions in sorted(recorded[number].items()):
            chosen = _part(torch.arange(len(questions)), part, spec).tolist()
            yield from ((step + 1, shard, place, questions[group]) for place, group in enumerate(chosen))


def told(rollouts: Path) -> list[dict[str, Any]]:
    """What the generations of a finished run say, from its records, as `trainer.verdicts` reads it."""
    found: list[dict[str, Any]] = []
    for shards in records.facts(rollouts).values():
        why: Counter[str] = Counter()
        for its in shards.values():
            why.update(its.get("why", {}))
        found.append({**_about(shards.values()), "why": dict(why)})
    return found


def _about(facts: Any) -> dict[str, float]:
    """What a generation's shards say together. reward: the share found right of all that have a verdict; drawn,
    drawn_ids: so many replies and ids. mixed: of the groups that are learnt from, those whose rewards differ; stopped:
    of their replies."""
    its = list(facts)
    rewards = torch.tensor([group for one in its for group in one["rewards"]])
    gap = _gap(its)
    total = {name: sum(one[name] for one in its) for name in ("rows", "ids", "scored", "right")}
    return {
        "reward": round(total["right"] / max(total["scored"], 1), 5),
        "mixed": round(1 - float(advantages(rewards).flat.float().mean()), 5),
        "drawn": total["rows"],
        "drawn_ids": total["ids"],
        "unscorable": total["rows"] - total["scored"],
        "stopped": round(sum(one["stopped"] for one in its) / rewards.numel(), 5),
        "gap": gap.mean,
        "gap_max": gap.largest,
        "ties": gap.ties,
    }


def _gap(facts: Any) -> Gap:
    """How far all shards' engine was from the learner."""
    its = list(facts)
    count, ties, beyond = (sum(one[name] for one in its) for name in ("compared", "ties", "beyond"))
    return Gap(count, sum(one["gap_sum"] for one in its), max(one["gap_max"] for one in its), beyond, ties)
