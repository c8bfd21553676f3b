"""Whether engine and learner are the same policy: a gate before the first step, and a watch over every generation.

A policy that another one sampled for learns something else, and its curves look healthy for a while. The gate asks, in
this order, and stops at the first no:

1. digests: does the engine hold the learner's weights, tensor by tensor? A tensor that differs is named at once.
2. log-probabilities of probes: sequences of random ids, since a trained model is so sure of its own replies that a
   fault hardly moves them, and some real prompts. What rounding alone does is measured, never assumed: the *floor* is
   the distance of the learner's own forward pass, in the type that the engine computes in, from float64.
3. where weights arrived and the probes still disagree: which fault of which tensor explains what the engine says? The
   learner is scored with each of them. A tensor is named only where faults of no other one explain it.

Experts are chosen by scores, and a tie within rounding may fall the other way: such a token, and what follows it in
its sequence, is set aside and counted (`ties`). The floor says how near is a tie.
"""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode

from ottava.engine import handoff
from ottava.engine.logprobs import log_probs
from ottava.engine.rollout import Engine
from ottava.errors import CheckpointError
from ottava.fp8.spec import BLOCK
from ottava.models.published import published
from ottava.trainer.guard import Alarm
from ottava.trainer.schedule import rng

PROBES = 43  # the random stream of the probes' ids
SEQUENCES, LENGTH, FEWEST = 64, 24, 8
"""Random sequences, of so many ids; at least so many, however large the model."""
COST = 2e11
"""Products that the probes may take in float64: half a minute of one core. Larger models have fewer probes."""
AT_ONCE = 1 << 24  # logits that are held at a time
HIGH, MEAN = 8.0, 4.0
"""How far above the floor a difference is one: the largest against the floor's 99.9th percentile, and the means."""
TIE = 4.0  # how far above the 99.9th percentile of what rounding does to a router's scores a choice is sure
SCREEN = 8  # sequences on which a fault is tried first
NAMING = 1e12
"""Products that naming a tensor may take: a run must not look as if it hung. A larger model's tensor is not named."""


@dataclass(frozen=True)
class Floor:
    """What rounding does to a log-probability, in nats. high: its 99.9th percentile; tie: scores of experts nearer
    than this may be ordered otherwise."""

    mean: float
    high: float
    tie: float

    @property
    def most(self) -> float:
        """The largest difference that is none."""
        return HIGH * self.high

    @property
    def most_mean(self) -> float:
        return MEAN * self.mean

    def at(self, temperature: float) -> Floor:
        """The floor of replies that were drawn below temperature 1, which widens what rounding does."""
        wider = max(1.0, 1 / temperature)
        return Floor(self.mean * wider, self.high * wider, self.tie)


@dataclass(frozen=True)
class Gap:
    """Differences between engine and learner over `count` tokens, without the ties. beyond: how many are too large or
    no number."""

    count: int
    total: float
    largest: float
    beyond: int
    ties: int

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)

    def within(self, floor: Floor) -> bool:
        return not self.beyond and self.mean <= floor.most_mean


@dataclass(frozen=True)
class Said:
    """A model's log-probabilities [N, L - 1] of the ids after the first, and margin [N, L - 1]: how near to a tie the
    choice of experts was, up to and with the id before. mine: bool [N, L - 1], inside the sequence."""

    logprobs: Tensor
    margin: Tensor
    mine: Tensor


def gap(engine: Tensor, said: Said, floor: Floor) -> Gap:
    """The engine's log-probabilities [N, L - 1] against the learner's."""
    clear = said.mine & (said.margin > floor.tie)
    apart = (engine.double() - said.logprobs.double()).abs()[clear]
    finite = apart[apart.isfinite()]
    return Gap(
        len(apart),
        float(finite.sum()),
        float(finite.max()) if len(finite) else 0.0,
        int((~(apart <= floor.most)).sum()),
        int((said.mine & ~clear).sum()),
    )


def gate(
    engine: Engine,
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    came: Callable[[], nn.Module] | None = None,
) -> tuple[Floor, dict[str, Any]]:
    """Hand the learner's weights over and see that the engine is the same policy; the floor, and what to say of it.

    prompts: real ones. came: loads the model that the engine was started with, to know a stale tensor by; asked only
    where log-probabilities disagree.
    Raises Alarm `mismatch`.
    """
    handed(engine, model)
    sequences = probes(model, prompts)
    floor = measure(model, sequences, engine.dtype)
    said = learner(model, sequences)
    scores = engine.score(sequences).logprobs
    found = gap(scores, said, floor)
    if not found.within(floor):
        name = explain(model, scores, sequences, floor, came)
        raise Alarm("mismatch", f"engine and learner disagree before step 1: {_shown(found, floor)}; {name}")
    return floor, {
        "compared": found.count, "gap": found.mean, "gap_max": found.largest, "ties": found.ties,
        "floor": floor.mean, "floor_high": floor.high, "tie": floor.tie,
    }  # fmt: skip


def handed(engine: Engine, model: nn.Module) -> None:
    """Hand the learner's weights over. Raises Alarm `mismatch`, naming a tensor, where others arrive."""
    offered = handoff.offer(model)
    wrong = handoff.compare(offered, engine.take(model))
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Alarm("mismatch", f"the engine holds other weights than the learner: {_why(engine, model, wrong)}{more}")


def watch(floor: Floor, found: Gap, where: str) -> None:
    """Raises Alarm `mismatch` where a generation's replies are beyond the floor."""
    if not found.within(floor):
        raise Alarm("mismatch", f"engine and learner disagree in {where}: {_shown(found, floor)}")


def probes(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Sequences of uniformly random ids, always the same, and as many of the prompts, no longer than these."""
    config: Any = model.config
    length = min(LENGTH, int(config.max_position_embeddings) - 1)
    cost = 2 * sum(parameter.numel() for parameter in model.parameters()) * length
    count = max(FEWEST, min(SEQUENCES, int(COST / (2 * cost))))
    random: list[list[int]] = rng(0, PROBES, 0, 0).integers(0, int(config.vocab_size), (count, length)).tolist()
    return random + [list(prompt[-length:]) for prompt in prompts if len(prompt) > 1][:count]


@torch.no_grad()
def learner(model: nn.Module, sequences: Sequence[Sequence[int]]) -> Said:
    """What the learner's own forward pass says of sequences, at temperature 1; on the host."""
    device = next(model.parameters()).device
    config: Any = model.config
    lengths = torch.tensor([len(ids) for ids in sequences])
    ids = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    width = ids.shape[1]
    logprobs, margins = [], []
    for part in torch.split(ids.to(device), max(1, AT_ONCE // (width * int(config.vocab_size)))):
        with margins_of(model, len(part)) as margin:
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
        logprobs.append(log_probs(logits, part[:, 1:]).cpu())
        margins.append(margin(width - 1))
    mine = torch.arange(1, width) < lengths[:, None]
    return Said(torch.cat(logprobs), torch.cat(margins), mine)


def measure(model: nn.Module, sequences: Sequence[Sequence[int]], dtype: torch.dtype) -> Floor:
    """The floor of a model computed in `dtype`, on these sequences."""
    own = next(model.parameters()).dtype
    narrow = learner(model if own == dtype else _copy(model, dtype), sequences)
    with _Wide():
        exact = learner(_copy(model, torch.float64), sequences)
    sides = (narrow, exact)
    tie = 0.0
    if bool(exact.margin.isfinite().any()):
        tie = TIE * _high((narrow.margin - exact.margin).abs()[exact.mine & exact.margin.isfinite()])
    clear = exact.mine & (torch.minimum(*(side.margin for side in sides)) > tie)
    if not bool(clear.any()):  # as where experts are chosen from coarse numbers, layer upon layer
        clear = exact.mine
    apart = (narrow.logprobs.double() - exact.logprobs.double()).abs()[clear]
    return Floor(float(apart.mean()) if len(apart) else 0.0, _high(apart), tie)


@contextmanager
def margins_of(model: nn.Module, rows: int) -> Iterator[Any]:
    """Watch the routers of a forward pass of so many rows; afterwards margin(width) gives [rows, width], the least
    distance to a tie at each position and those before it; infinite without experts."""
    seen: list[Tensor] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name.endswith("mlp.gate") and hasattr(module, "top_k"):
                handle = module.register_forward_hook(lambda gate, _, output: seen.append(_margin(gate, output[0])))
                stack.callback(handle.remove)

        def margin(width: int) -> Tensor:
            if not seen:
                return torch.full((rows, width), math.inf, dtype=torch.float64)
            least = torch.stack(seen).amin(0).view(rows, -1)[:, :width]
            return least.cummin(1)[0].double().cpu()

        yield margin


def _margin(gate: Any, logits: Tensor) -> Tensor:
    """[tokens]: by how much the last expert that was chosen, or the last group, was before the next."""
    bias = getattr(gate, "e_score_correction_bias", None)
    scores = logits if bias is None else logits.sigmoid() + bias
    least = torch.full_like(scores[:, 0], math.inf)
    if getattr(gate, "num_group", 1) > 1:
        grouped = scores.view(len(scores), gate.num_group, -1)
        best = grouped.topk(2, -1)[0].sum(-1)
        least = _lead(best, gate.topk_group)
        shut = torch.ones_like(best, dtype=torch.bool).scatter_(1, best.topk(gate.topk_group, -1)[1], False)
        scores = grouped.masked_fill(shut[..., None], -math.inf).flatten(1)
    return torch.minimum(least, _lead(scores, gate.top_k))


def _lead(scores: Tensor, chosen: int) -> Tensor:
    if chosen >= scores.shape[1]:
        return torch.full_like(scores[:, 0], math.inf)
    top = scores.topk(chosen + 1, -1)[0]
    return top[:, -2] - top[:, -1]


# ---- which tensor


def explain(
    model: nn.Module,
    scores: Tensor,
    sequences: Sequence[Sequence[int]],
    floor: Floor,
    came: Callable[[], nn.Module] | None = None,
) -> str:
    """The tensor whose fault explains what the engine says of the sequences, in words; or that none does."""
    trial = _copy(model, next(model.parameters()).dtype)
    views = {name: item.tensor for name, item in published(trial).items()}
    before = _before(came)
    found: dict[tuple[str, ...], str] = {}
    few = range(0, len(sequences), max(1, len(sequences) // SCREEN))
    some, those = [sequences[row] for row in few], scores[list(few)]
    most = NAMING / (sum(view.numel() for view in views.values()) * sum(map(len, some)))
    for number, (cause, changes) in enumerate(_faults(views, before)):
        if number > most:
            return "no tensor is named: the model has too many to try"
        kept = {name: views[name].clone() for name in changes}
        if all(torch.equal(kept[name], new) for name, new in changes.items()):
            continue
        for name, new in changes.items():
            views[name].copy_(new)
        width = max(map(len, some)) - 1
        fits = gap(those[:, :width], learner(trial, some), floor).within(floor)
        if fits and gap(scores, learner(trial, sequences), floor).within(floor):
            found.setdefault(tuple(changes), cause)
        for name, old in kept.items():
            views[name].copy_(old)
    least = [names for names in found if not any(set(other) < set(names) for other in found)]
    if len(least) != 1:
        return f"no tensor is named: {'more than one fault explains' if least else 'no known fault explains'} it"
    return f"{' and '.join(least[0])}: {found[least[0]]}"


def _before(came: Callable[[], nn.Module] | None) -> dict[str, Tensor]:
    """What the engine was started with; nothing where it cannot be read any more: the disagreement is what matters."""
    try:
        return {} if came is None else {name: item.tensor.detach() for name, item in published(came()).items()}
    except (CheckpointError, OSError):
        return {}


def _faults(views: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What may have happened to tensors on their way: a cause, and what they then hold."""
    for name, tensor in views.items():
        yield "zeroed tensor", {name: torch.zeros_like(tensor)}
        if name in before:
            yield "stale tensor", {name: before[name].to(tensor)}
        if tensor.dim() == 2:
            yield "transposed pack", {name: tensor.T.clone().reshape(tensor.shape)}
            yield "transposed pack", {name: tensor.reshape(tensor.shape[::-1]).T.clone()}
            for axis in (0, 1):
                for start in range(0, tensor.shape[axis], BLOCK):
                    for factor in (2.0, 0.5):
                        yield "one scale changed", {name: _scaled(tensor, axis, start, BLOCK, factor)}
        if "kv_b_proj" in name:
            for row in range(len(tensor)):
                for factor in (2.0, 0.0):
                    yield f"row {row} changed", {name: _scaled(tensor, 0, row, 1, factor)}
    yield from _swapped(views)


def _swapped(views: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Two experts in each other's place: whole, or one of their tensors."""
    layers: defaultdict[str, dict[int, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in views.items():
        match = re.fullmatch(r"(.*\.experts\.)(\d+)\.(.*)", name)
        if match is not None:
            layers[match[1]][int(match[2])][match[3]] = tensor
    for stem, experts in layers.items():
        for one, other in combinations(experts, 2):
            parts = list(experts[one])
            for chosen in ([part] for part in parts) if len(parts) > 1 else ():
                yield "experts permuted", _exchange(stem, experts, one, other, chosen)
            yield "experts permuted", _exchange(stem, experts, one, other, parts)


def _exchange(
    stem: str, experts: Mapping[int, Mapping[str, Tensor]], one: int, other: int, parts: Sequence[str]
) -> dict[str, Tensor]:
    pairs = ((one, other), (other, one))
    return {f"{stem}{to}.{part}": experts[source][part].clone() for to, source in pairs for part in parts}


def _scaled(tensor: Tensor, axis: int, start: int, count: int, factor: float) -> Tensor:
    out = tensor.clone()
    out.narrow(axis, start, min(count, out.shape[axis] - start)).mul_(factor)
    return out


# ---- helpers


class _Wide(TorchFunctionMode):
    """Where Transformers asks for float32 (norms, rotations, softmax, routers), it gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wider = [torch.float64 if value is torch.float32 else value for value in args]
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        chosen: Any = Tensor.double if func is Tensor.float else func
        return chosen(*wider, **named)


def _copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another type that tells no hook of what it computes; in float64 on the host, as not every chip has it.

    A router's bias stays wide: no published model rounds it.
    """
    made = copy.deepcopy(model)
    for module in made.modules():
        module._forward_hooks.clear()
    made = made.to("cpu", dtype) if dtype == torch.float64 else made.to(dtype)
    use: Any = getattr(made, "set_experts_implementation", None)
    if dtype == torch.float64 and use is not None:
        use("eager")
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    for name, buffer in made.named_buffers():
        if name in biases and dtype != torch.float64:
            buffer.data = biases[name].detach().clone()
    return made.requires_grad_(False)


def _high(values: Tensor) -> float:
    """The 99.9th percentile."""
    return float(np.quantile(values.double().numpy(), 0.999)) if len(values) else 0.0


def _why(engine: Engine, model: nn.Module, wrong: Sequence[str]) -> str:
    """The first tensor that differs, and how it came to where what arrived can be read."""
    received = getattr(engine, "model", None) or getattr(engine, "received", None)
    try:
        found = None if received is None else handoff.cause(model, received)
    except CheckpointError:
        found = None
    return wrong[0] if found is None else f"{found['tensor']} ({found['cause']})"


def _shown(found: Gap, floor: Floor) -> str:
    return (
        f"{found.beyond} of {found.count} tokens are more than {floor.most:.2g} nats apart, at most "
        f"{found.largest:.2g}; the mean is {found.mean:.2g}, and rounding gives {floor.mean:.2g}"
    )
