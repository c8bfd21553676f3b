"""Which stage runs on which pool, when, for how long and at what cost; and what the same work costs elsewhere.

Speed is measured on the pools for a moment, never looked up; where a stage goes is decided by rules
that are data in the recipe; every decision carries its reason. Later stages run where plan.json
puts them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, Field, computed_field

from ottava import recipe
from ottava.artifact import Artifact, file_digest, write_json
from ottava.context import Context
from ottava.errors import PlatformError, RecipeError
from ottava.planner import chips, cost, reach
from ottava.planner.chips import Catalogue
from ottava.planner.cost import Estimate
from ottava.planner.schedule import Job, Placement, makespan, schedule
from ottava.recipe import Fleet, Frozen, Pool

VERSION = "3"
INPUTS: tuple[str, ...] = ()
PROBE = "ottava.trainer.probe"


class Rule(Frozen):
    """Where a stage goes. The first rule that fits decides."""

    stage: Annotated[str, Field(description="the stage's name, or * for any")] = "*"
    max_parameters: Annotated[float | None, Field(description="fits only models known to be this small")] = None
    prefer: Annotated[tuple[str, ...], Field(description="vendors in order; empty: where it ends first")] = ()
    everywhere: Annotated[bool, Field(description="the stage occupies every pool")] = False
    reason: str

    def fits(self, stage: str, parameters: float | None) -> bool:
        """True where the rule speaks of this stage and of a model of this size (None: unknown)."""
        small = self.max_parameters is None or (parameters is not None and parameters <= self.max_parameters)
        return self.stage in ("*", stage) and small


RULES = (
    Rule(stage="qualify", everywhere=True, reason="every pool is checked, one after the other"),
    Rule(
        stage="train",
        max_parameters=10e9,
        prefer=("Huawei", "NVIDIA"),
        reason="small and medium models train on domestic chips first; the other pool is the fallback",
    ),
    Rule(stage="train", prefer=("NVIDIA", "Huawei"), reason="large models train where such runs are known to complete"),
    Rule(
        stage="reinforce",
        prefer=("NVIDIA", "Huawei"),
        reason="reinforcement learns where training is known to complete",
    ),
    Rule(stage="distill", prefer=("Huawei", "NVIDIA"), reason="students are small: domestic chips train them"),
    Rule(stage="serve", prefer=("Huawei", "NVIDIA"), reason="domestic chips carry the inference"),
    Rule(prefer=("NVIDIA", "Huawei"), reason="domestic chips are kept free for training and serving"),
)


class Workload(Frozen):
    """A training run to price: active parameters and tokens."""

    parameters: Annotated[float, Field(gt=0)] = 8e9
    tokens: Annotated[float, Field(gt=0)] = 160e9
    flops_per_token: Annotated[float | None, Field(description="default: 6 per parameter")] = None

    def flops(self) -> float:
        """Training FLOPs of the whole run."""
        per_token = self.flops_per_token or cost.flops_per_token(self.parameters)
        return per_token * self.tokens


def _found(name: str) -> str:
    try:
        chips.locate(name)
    except RecipeError as error:
        raise ValueError(f"{error.what}: {error.fix}") from None
    return name


def _digest(name: str) -> str | None:
    """None where the file cannot be read: the run then says so."""
    try:
        return file_digest(chips.locate(name))
    except (RecipeError, OSError):
        return None


File = Annotated[str, AfterValidator(_found)]


class Spec(recipe.Spec):
    """How to plan."""

    rules: tuple[Rule, ...] = RULES
    chips: Annotated[File, Field(description="file of chips' figures")] = "chips.json"
    reference: Annotated[File, Field(description="fleet on which the same work is priced")] = "reference"
    at_scale: Annotated[Workload | None, Field(description="a run of a size worth pricing there")] = Workload()
    reference_gflops: dict[str, float] = Field(
        {"AVX512": 155.0, "AVX2": 92.0}, description="by ISA: matmul speed of a worker where the budgets were set"
    )
    probe_s: Annotated[float, Field(gt=0, description="seconds of one speed measurement")] = 0.04

    @computed_field  # type: ignore[prop-decorator]
    @property
    def chips_sha256(self) -> str | None:
        """Part of the stage's key: other figures give another plan."""
        return _digest(self.chips)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def reference_sha256(self) -> str | None:
        """Part of the stage's key: another fleet has other prices."""
        return _digest(self.reference)


@dataclass(frozen=True)
class Part:
    """What a stage does `count` times, and the seconds of one, measured."""

    what: str
    count: float
    seconds: float


@dataclass(frozen=True)
class Speed:
    """What was measured on a pool. gflops: its slowest worker's; parts: of the stages that are measured, by name.

    steps: those the train stage will do; tokens_per_step: of all workers; parameters: total and active; start_seconds:
    from asking for a group of workers to their first step.
    """

    gflops: float
    instruction_set: str
    parts: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    steps: int = 0
    tokens_per_step: float = 0.0
    parameters: float | None = None
    active_parameters: float = 0.0
    flops_per_token: float = 0.0
    start_seconds: float | None = None


def run(spec: Spec, inputs: Mapping[str, Artifact], ctx: Context) -> Artifact:
    """Measure, predict, place, price. Artifact: plan.json. Raises PlatformError where no pool can be used."""
    catalogue = chips.load(chips.locate(spec.chips))
    reference = recipe.load_fleet(chips.locate(spec.reference))
    stages = {name: stage for name, stage in ctx.stages.items() if name != "plan"}
    speeds, missing = _measure(spec, stages, ctx)
    plan = make(spec, stages, ctx.fleet, catalogue, speeds, missing)
    work = _train_work(speeds)
    plan["reference"] = price(reference, catalogue, {"train": work, "at_scale": spec.at_scale})
    write_json(ctx.out / "plan.json", plan)
    short = ("name", "pool", "seconds", "low", "high", "usd")
    return ctx.commit(
        {
            "makespan_s": plan["makespan_s"],
            "usd": plan["usd"],
            "over_budget": plan["over_budget"],
            "unavailable": missing,
            "stages": [{key: stage[key] for key in short} for stage in plan["stages"]],
            "reference": plan["reference"],
        }
    )


def _measure(spec: Spec, stages: Mapping[str, recipe.Spec], ctx: Context) -> tuple[dict[str, Speed], dict[str, str]]:
    """The speed of each pool whose platform is here, and why each other one is not.

    Any other failure is raised, so that nothing is published of a pool that could not be measured.
    """
    speeds: dict[str, Speed] = {}
    missing: dict[str, str] = {}
    for number, pool in enumerate(ctx.fleet.pools):
        ctx.progress(number / len(ctx.fleet.pools), f"measuring {pool.name}")
        reason = reach.missing(ctx, pool)
        if reason is None:
            speeds[pool.name] = _measure_pool(spec, stages, pool, ctx)
        else:
            missing[pool.name] = reason
            ctx.progress((number + 1) / len(ctx.fleet.pools), f"{pool.name} is left out: {reason}")
    if not speeds:
        raise PlatformError(f"no pool of the fleet {ctx.fleet.name!r} can be used: {missing}", fix="try another fleet")
    return speeds, missing


def _measure_pool(spec: Spec, stages: Mapping[str, recipe.Spec], pool: Pool, ctx: Context) -> Speed:
    """A short matmul loop, and a little of what the stages that train consist of, where there are any."""
    args = {"platform": pool.platform, "seconds": spec.probe_s, "repeats": 3}
    loops = reach.ask(ctx, pool, "ottava.platforms.probe:throughput", args)
    gflops, instruction_set = min(r["together_gflops"] for r in loops), str(loops[0]["instruction_set"])
    train = stages.get("train")
    if train is None or "start" in stages:  # what is measured are models of the recipe's shape
        return Speed(gflops, instruction_set)
    common = {"platform": pool.platform, "tests": _tests(stages), "pools": len(ctx.fleet.pools)}
    workers = min(pool.workers, getattr(train, "virtual_shards", pool.workers))  # as many as will train
    begun = time.monotonic()
    probes = reach.ask(ctx, pool, f"{PROBE}:throughput", {**common, "spec": train.model_dump(mode="json")}, workers)
    start = time.monotonic() - begun - max(r["busy_seconds"] for r in probes)
    parts = {"train": _slowest(probes, start)}
    if (students := _students(stages)) is not None:
        asked = {**common, **students, "teacher_answer_seconds": max(r["answer_seconds"] for r in probes)}
        parts["distill"] = _slowest(reach.ask(ctx, pool, f"{PROBE}:students", asked, workers), start)
    return Speed(
        gflops,
        instruction_set,
        parts=parts,
        steps=int(probes[0]["steps"]),
        tokens_per_step=probes[0]["tokens_per_step"],
        parameters=probes[0]["parameters"],
        active_parameters=probes[0]["active_parameters"],
        flops_per_token=probes[0]["flops_per_token"],
        start_seconds=start,
    )


def _slowest(probes: Sequence[Mapping[str, Any]], start: float) -> tuple[Part, ...]:
    """The parts of a stage as the slowest worker measured them: it sets the pace."""
    told = [
        tuple(Part(what, count, start if seconds is None else seconds) for what, count, seconds in probe["parts"])
        for probe in probes
    ]
    return max(told, key=lambda parts: sum(part.count * part.seconds for part in parts))


def _tests(stages: Mapping[str, recipe.Spec]) -> int:
    """Problems of the test set that evaluations ask in all modes."""
    problems, label = stages.get("problems"), stages.get("label")
    if problems is not None:
        return len(getattr(problems, "levels", ())) * int(getattr(problems, "test", 0))
    return len(getattr(label, "lengths", ())) * int(getattr(label, "test_per_length", 0))


def _students(stages: Mapping[str, recipe.Spec]) -> dict[str, Any] | None:
    """How students are trained, and what their teacher is asked; None where there are none, or what is not measured is
    in it."""
    distill: Any = stages.get("distill")
    if distill is None or distill.on_policy is not None or any(student.shape is None for student in distill.students):
        return None
    specs = [distill.training(student).model_dump(mode="json") for student in distill.students]
    return {"specs": specs, "asks": distill.harvest.asks * distill.harvest.samples}


def make(
    spec: Spec,
    stages: Mapping[str, recipe.Spec],
    fleet: Fleet,
    catalogue: Catalogue,
    speeds: Mapping[str, Speed],
    missing: Mapping[str, str] = {},
) -> dict[str, Any]:
    """The plan as JSON, from what was measured. Pure. PlatformError where a stage is pinned to a missing pool."""
    parameters = next((s.parameters for s in speeds.values() if s.parameters is not None), None)
    predicted = {name: {pool: predict(spec, name, stages[name], s) for pool, s in speeds.items()} for name in stages}
    jobs: list[Job] = []
    reasons: dict[str, str] = {}
    before: tuple[str, ...] = ()
    for name, stage in stages.items():
        if stage.pool is not None and stage.pool in missing:
            raise PlatformError(f"{name} is pinned to the pool {stage.pool!r}: {missing[stage.pool]}")
        prefer, everywhere, reason = decide(spec, name, stage.pool, parameters, fleet, catalogue)
        reasons[name] = reason + "".join(f"; {pool} cannot be used" for pool in missing)
        seconds = {pool: estimate.mid or estimate.low for pool, (estimate, _) in predicted[name].items()}
        if everywhere:  # it takes as long as on the slowest pool
            slowest = max(seconds, key=seconds.__getitem__)
            seconds = dict.fromkeys(seconds, seconds[slowest])
            predicted[name] = dict.fromkeys(seconds, predicted[name][slowest])
        jobs.append(Job(name, seconds, before, prefer, everywhere))
        before = (name,)
    placements = schedule(jobs, list(speeds))
    entries = [
        _entry(p, *predicted[p.name][p.pool], reasons[p.name], [pool for pool in fleet.pools if p.occupies(pool.name)])
        for p in placements
    ]
    prices = [entry["usd"] for entry in entries]
    return {
        "fleet": fleet.name,
        "stages": entries,
        "makespan_s": round(makespan(placements), 3),
        "usd": None if None in prices else float(f"{sum(prices):.6g}"),
        "over_budget": [e["name"] for e in entries if e["low"] > stages[e["name"]].budget_s],
        "gantt": [
            {"pool": pool, "stage": p.name, "start_s": round(p.start, 3), "end_s": round(p.end, 3)}
            for pool in speeds
            for p in placements
            if p.occupies(pool)
        ],
        "measured": {pool: asdict(speed) for pool, speed in speeds.items()},
        "unavailable": dict(missing),
    }


def predict(spec: Spec, name: str, stage: recipe.Spec, speed: Speed) -> tuple[Estimate, str]:
    """A stage's wall seconds on a pool and what they rest on.

    Only stages that train are measured. What others have is a budget: a ceiling, so the low end is 0.
    """
    parts = [part for part in speed.parts.get(name, ()) if part.count]
    if parts:
        estimate = cost.measured_seconds(1, sum(part.count * part.seconds for part in parts))
        said = ", ".join(f"{part.count:,.0f} {part.what} of {1000 * part.seconds:.3g} ms" for part in parts)
        return estimate, f"measured: {said}"
    expected = spec.reference_gflops.get(speed.instruction_set)
    if expected is None:
        return cost.ceiling_seconds(stage.budget_s, 1.0), "its budget: a ceiling, not a prediction"
    slowness = expected / speed.gflops
    basis = f"its budget x {slowness:.2f}, this machine's slowness: a ceiling, not a prediction"
    return cost.ceiling_seconds(stage.budget_s, slowness), basis


def decide(
    spec: Spec, name: str, pinned: str | None, parameters: float | None, fleet: Fleet, catalogue: Catalogue
) -> tuple[tuple[str, ...], bool, str]:
    """(pools in order of preference, whether the stage takes every pool, the reason in words)."""
    rule = next((r for r in spec.rules if r.fits(name, parameters)), Rule(reason="no rule speaks of it"))
    vendors = {pool.name: catalogue.chip(pool.chip).vendor for pool in fleet.pools if pool.chip is not None}
    order = tuple(pool for vendor in rule.prefer for pool, made_by in vendors.items() if made_by == vendor)
    if pinned is not None:
        return (pinned, *(pool for pool in order if pool != pinned)), False, "the recipe puts it there"
    size = f" ({parameters:,.0f} parameters)" if rule.max_parameters is not None else ""
    where = "" if order or rule.everywhere else "; it ends first there"
    return order, rule.everywhere, rule.reason + size + where


def _entry(p: Placement, estimate: Estimate, basis: str, reason: str, busy: list[Pool]) -> dict[str, Any]:
    """One stage of plan.json. busy: the pools it occupies, all of which are paid for."""
    seconds = Estimate(estimate.low, p.end - p.start, estimate.high)
    costs = [_usd(seconds, pool) for pool in busy]
    return {
        "name": p.name,
        "pool": p.pool,
        "fallback": list(p.fallback),
        "start_s": round(p.start, 3),
        "end_s": round(p.end, 3),
        "seconds": round(p.end - p.start, 3),
        "low": round(estimate.low, 3),
        "high": round(estimate.high or estimate.low, 3),
        "usd": None if None in costs else float(f"{sum(c for c in costs if c is not None):.6g}"),
        "reason": reason,
        "basis": basis,
    }


def _usd(seconds: Estimate, pool: Pool) -> float | None:
    if pool.usd_per_worker_hour is None:
        return None
    price = pool.usd_per_worker_hour.value
    return cost.usd(seconds, pool.workers, Estimate(price, price, price)).mid


def _train_work(speeds: Mapping[str, Speed]) -> Workload | None:
    """The training run of this recipe, as a workload."""
    for speed in speeds.values():
        if speed.active_parameters and speed.steps and speed.tokens_per_step:
            tokens = speed.steps * speed.tokens_per_step
            return Workload(parameters=speed.active_parameters, tokens=tokens, flops_per_token=speed.flops_per_token)
    return None


def price(fleet: Fleet, catalogue: Catalogue, works: Mapping[str, Workload | None]) -> dict[str, Any]:
    """What training costs on each pool of a fleet that is not here. An extrapolation, and it says so."""
    return {
        "fleet": fleet.name,
        "works": {name: work.model_dump() | {"flops": work.flops()} for name, work in works.items() if work},
        "pools": [
            {
                "pool": pool.name,
                "chip": pool.chip,
                "workers": pool.workers,
                **{name: _price_on(pool, catalogue, work) for name, work in works.items() if work},
            }
            for pool in fleet.pools
            if pool.chip is not None
        ],
        "method": "extrapolation from published training runs; low end: nothing lost to links, memory or faults",
        "not_priced": "every stage but training: no model of serving or evaluation on these chips is good enough",
    }


def _price_on(pool: Pool, catalogue: Catalogue, work: Workload) -> dict[str, Any]:
    assert pool.chip is not None
    chip = catalogue.chip(pool.chip)
    family, rent = catalogue.family(chip), chip.rent()
    seconds = cost.reference_seconds(work.flops(), work.parameters, chip, family, pool.workers)
    mid = pool.usd_per_worker_hour.value if pool.usd_per_worker_hour else rent.mid
    usd = cost.usd(seconds, pool.workers, Estimate(min(rent.low, mid), mid, max(rent.high, mid)))
    sizes = f"published runs span {family.parameters.low:.3g} to {family.parameters.high:.3g} active parameters"
    return {
        "hours": seconds.map(lambda s: s / 3600).json(),
        "usd": usd.json(),
        "claim": f"{'lower bound only' if seconds.mid is None else 'interval'}: {sizes}",
    }
