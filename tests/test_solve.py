"""Schedules: the solver against brute force, the heuristic against the judge, the judge against hand-made cases."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from benchmarks.plan import instance as portfolio
from hypothesis import given, settings
from hypothesis import strategies as st

from ottava.planner import instance as instances
from ottava.planner import solver
from ottava.planner.columns import SCALE, Prices, all_columns, bound
from ottava.planner.greedy import place, warm_start
from ottava.planner.instance import Chosen, Instance, Option, Task, judge, least
from ottava.planner.place import best, earlier
from ottava.planner.sensitivity import last_end, retimed
from ottava.planner.solver import Slack, solve

needs_solver = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import ortools"], check=False, capture_output=True).returncode != 0,
    reason="the extra plan is not installed",
)


@st.composite
def small(draw: st.DrawFn, pools: int = 2) -> Instance:
    """Up to three tasks, two options each, on two pools over at most seven slots: small enough to try everything."""
    horizon = draw(st.integers(3, 7))
    tasks: list[Task] = []
    for number in range(draw(st.integers(1, 3))):
        options = tuple(
            Option(
                draw(st.integers(0, pools - 1)), draw(st.integers(1, 4)), draw(st.integers(1, 4)),
                draw(st.integers(1, 30)), draw(st.integers(0, 5)),
                draw(st.sampled_from([(), (), (), ("rule x",)])),
            )
            for _ in range(draw(st.integers(1, 2)))
        )  # fmt: skip
        after = (draw(st.integers(0, number - 1)),) if number and draw(st.booleans()) else ()
        tasks.append(
            Task(
                f"t{number}", options, draw(st.integers(0, 2)), draw(st.one_of(st.none(), st.integers(2, horizon))),
                draw(st.one_of(st.none(), st.integers(1, horizon))), draw(st.integers(0, 6)),
                draw(st.one_of(st.none(), st.integers(1, 40))), after, draw(st.sampled_from([False, False, True])),
            )
        )  # fmt: skip
    first = draw(st.integers(0, 3))
    capacity = tuple(((0, draw(st.integers(0, 5))), (first + 1, draw(st.integers(2, 6)))) for _ in range(pools))
    return Instance(tuple(tasks), capacity, horizon, draw(st.one_of(st.none(), st.integers(10, 60))))


def every(instance: Instance) -> Iterator[list[Chosen | None]]:
    """All schedules of an instance, good or bad."""
    ways = [
        [None, *(Chosen(o, s) for o in range(len(task.options)) for s in range(instance.horizon))]
        for task in instance.tasks
    ]
    for one in itertools.product(*ways):
        yield list(one)


def brute(instance: Instance) -> int | None:
    """The least objective of all schedules that break nothing; None where there is none."""
    found = [told.objective for one in every(instance) if not (told := judge(instance, one)).broken]
    return min(found, default=None)


def free_of(instance: Instance, relaxed: set[str]) -> Instance:
    """The instance without some of its constraints (rules, deadlines, the budget)."""
    tasks = []
    for task in instance.tasks:
        options = tuple(
            replace(o, breaks=tuple(b for b in o.breaks if f"rule {b}" not in relaxed)) for o in task.options
        )
        deadline = None if f"deadline {task.name}" in relaxed else task.deadline
        tasks.append(replace(task, options=options, deadline=deadline))
    return replace(instance, tasks=tuple(tasks), budget=None if "budget" in relaxed else instance.budget)


def drawn(seed: int) -> Instance:
    """As `small`, from a seed: many are solved in one process, which takes longer to start than to solve them."""
    draw = random.Random(seed)
    horizon, tasks = draw.randint(3, 7), list[Task]()
    for number in range(draw.randint(1, 3)):
        options = tuple(
            Option(
                draw.randrange(2), draw.randint(1, 4), draw.randint(1, 4), draw.randint(1, 30), draw.randint(0, 5),
                draw.choice([(), (), (), ("rule x",)]),
            )
            for _ in range(draw.randint(1, 2))
        )  # fmt: skip
        after = (draw.randrange(number),) if number and draw.random() < 0.5 else ()
        deadline = draw.choice([None, draw.randint(2, horizon)])
        due, late, drop = (
            draw.choice([None, draw.randint(1, horizon)]),
            draw.randint(0, 6),
            draw.choice([None, draw.randint(1, 40)]),
        )
        tasks.append(
            Task(f"t{number}", options, draw.randint(0, 2), deadline, due, late, drop, after, draw.random() < 0.2)
        )
    capacity = tuple(((0, draw.randint(0, 5)), (draw.randint(1, 4), draw.randint(2, 6))) for _ in range(2))
    return Instance(tuple(tasks), capacity, horizon, draw.choice([None, draw.randint(10, 60)]))


CHILD = """
import json, sys, time
from ottava.planner import columns, model, search
from ottava.planner.instance import of
told = []
search.FIRST = 2
for asked in json.load(sys.stdin):
    form, instance = asked.pop("form"), of(asked["instance"])
    model.MOST_CELLS = -1 if form == "intervals" else 10**6
    if form in ("columns", "intervals"):
        told.append(model.answer(instance, asked))
        continue
    found = search.Search(instance, columns.all_columns(instance), 0)
    found.price(60.0)
    if form == "neighbourhoods":
        found.take([None] * len(instance.tasks))
        found.improve(time.monotonic() + 60.0, 0.0)
    told.append({"bound": found.floor, "objective": found.objective, "schedule": found.schedule()})
assert "highspy" not in sys.modules
json.dump(told, sys.stdout)
"""


def answers(asked: list[tuple[Instance, Slack | None, str]]) -> list[Any]:
    """The solver's answers, all from one process of its own, each in a form: columns, intervals, neighbourhoods (alone,
    from nothing), or linear (the bound of the linear program alone)."""
    questions = [
        {
            "instance": one.json(), "seconds": 60.0, "workers": 1, "hint": None, "gap": 0.0, "seed": 0, "form": form,
            "slack": None if slack is None else solver._slack_json(slack),
        }
        for one, slack, form in asked
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(questions), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def schedule_of(told: dict[str, Any]) -> list[Chosen | None]:
    return [None if one is None else Chosen(*one) for one in told["schedule"]]


@needs_solver
@pytest.mark.parametrize("form", ["columns", "intervals"])
def test_the_solver_agrees_with_brute_force(form: str) -> None:
    cases = [drawn(seed) for seed in range(80)]
    expected = [brute(case) for case in cases]
    assert any(one is None for one in expected)
    assert sum(one is not None for one in expected) > 20
    for case, best_, told in zip(cases, expected, answers([(case, None, form) for case in cases]), strict=True):
        if best_ is None:
            assert told["status"] == "infeasible"
            continue
        judged = judge(case, schedule_of(told))
        assert told["status"] == "optimal"
        assert not judged.broken
        assert judged.objective == best_ == round(told["objective"])
        assert told["bound"] <= best_ + 1e-6


@needs_solver
def test_the_fewest_relaxations_are_the_fewest() -> None:
    """Against every set of rules, deadlines and budget taken away, smallest first, each tried by brute force."""
    asked: list[tuple[Instance, Slack | None, str]] = []
    sizes: list[int | None] = []
    for seed in range(40):
        case = drawn(seed)
        tasks = tuple(replace(task, drop=None, fixed=False) for task in case.tasks)
        case = replace(case, tasks=tasks)
        names = [f"deadline {task.name}" for task in tasks if task.deadline is not None]
        names += sorted({f"rule {b}" for task in tasks for o in task.options for b in o.breaks})
        names += ["budget"] if case.budget is not None else []
        sets = (set(some) for size in range(len(names) + 1) for some in itertools.combinations(names, size))
        sizes.append(next((len(some) for some in sets if brute(free_of(case, some)) is not None), None))
        slack = Slack(
            rules={name.removeprefix("rule "): 1 for name in names if name.startswith("rule")},
            deadlines={name.removeprefix("deadline "): 1 for name in names if name.startswith("deadline")},
            pools={},
            budget=1 if case.budget is not None else None,
        )
        asked.append((case, slack, "columns"))
    assert len(set(sizes)) > 2
    for (case, _, _), fewest, told in zip(asked, sizes, answers(asked), strict=True):
        if fewest is None:
            assert told["status"] == "infeasible"
        else:
            assert len(told["relaxed"]) == fewest
            assert not judge(free_of(case, set(told["relaxed"])), schedule_of(told)).broken


@needs_solver
def test_the_bound_of_the_linear_program_is_never_above_the_best() -> None:
    cases = [case for seed in range(400) if brute(case := drawn(seed)) is not None]
    assert len(cases) > 100
    tight = 0
    for case, told in zip(cases, answers([(case, None, "linear") for case in cases]), strict=True):
        best_, floor = brute(case), told["bound"]
        assert best_ is not None
        assert floor <= best_
        tight += floor == best_
    assert tight > len(cases) / 2


@needs_solver
def test_the_bound_of_the_linear_program_by_hand() -> None:
    """Chips: two tasks want the cheap pool, which holds one. Waiting: a task is late unless the one before it hurries.
    Budget: half of the money, so half of the tasks, the others are left out."""
    ways = (Option(0, 1, 2, 10), Option(1, 1, 2, 20))
    chips = Instance((Task("a", ways), Task("b", ways)), (((0, 1),), ((0, 2),)), 2)
    slow, fast = Option(0, 1, 3, 5), Option(0, 1, 1, 10)
    after = Task("b", (Option(1, 1, 1, 1),), due=2, late=100, after=(0,))
    waits = Instance((Task("a", (slow, fast)), after), (((0, 1),), ((0, 1),)), 5)
    dear = Task("a", (Option(0, 1, 1, 10),), drop=100)
    budget = Instance((dear, dear), (((0, 2),),), 1, budget=10)
    assert [least(one) for one in (chips, waits, budget)] == [20, 6, 20]
    found = answers([(one, None, "linear") for one in (chips, waits, budget)])
    assert [told["bound"] for told in found] == [30, 11, 110]
    assert [brute(one) for one in (chips, waits, budget)] == [30, 11, 110]


@needs_solver
def test_neighbourhoods_break_nothing_and_find_the_best_of_small_cases() -> None:
    cases = [case for seed in range(800) if len((case := drawn(seed)).tasks) == 3 and brute(case) is not None]
    hits = 0
    for case, told in zip(cases, answers([(case, None, "neighbourhoods") for case in cases]), strict=True):
        if told["objective"] is not None:
            judged = judge(case, schedule_of(told))
            assert not judged.broken
            assert judged.objective == told["objective"]
            hits += judged.objective == brute(case)
    assert hits > 0.8 * len(cases) > 20


@needs_solver
def test_fourteen_jobs_are_solved_and_twice_the_same() -> None:
    """Neighbourhoods alone, columns and intervals, once with half the money. The seed decides all that these do."""
    rich = portfolio(9, 1.2, jobs=14, pools=4)
    cases = [rich, replace(rich, budget=warm_start(rich, rounds=5)[1].usd // 2)]
    for case in cases:
        forms = ("neighbourhoods", "neighbourhoods", "columns", "intervals")
        near, again, columns, intervals = answers([(case, None, form) for form in forms])
        assert near["schedule"] == again["schedule"]
        for told in (near, columns, intervals):
            judged = judge(case, schedule_of(told))
            assert (judged.broken, judged.objective) == ((), told["objective"])
        assert columns["status"] == intervals["status"] == "optimal"
        assert columns["bound"] == columns["objective"] == intervals["objective"] <= near["objective"]
        assert near["objective"] <= 1.02 * columns["objective"]


@needs_solver
def test_the_child_answers_as_the_model_does() -> None:
    case = next(one for seed in range(80) if brute(one := drawn(seed)) is not None)
    found = solve(case, seconds=20, workers=1, gap=0.0)
    assert found.status == "optimal"
    assert judge(case, found.schedule).objective == brute(case)


@settings(max_examples=150, deadline=None)
@given(small(), st.data())
def test_whatever_the_prices_no_schedule_costs_less_than_their_bound(instance: Instance, data: st.DataObject) -> None:
    """And none with a column costs less than the bound and the column's reduced cost."""
    price = st.one_of(st.just(0), st.integers(0, 20 * SCALE))
    slots = st.lists(price, min_size=instance.horizon, max_size=instance.horizon)
    prices = Prices(
        [data.draw(slots) for _ in instance.pools],
        {(n, b): data.draw(slots) for n, task in enumerate(instance.tasks) for b in task.after},
        data.draw(st.integers(0, 2 * SCALE)) if instance.budget is not None else 0,
    )
    columns = all_columns(instance)
    number = {(c.task, c.option, c.start): index for index, c in enumerate(columns)}
    known = bound(instance, columns, prices)
    for schedule in every(instance):
        told = judge(instance, schedule)
        if told.broken:
            continue
        assert known.dollars <= told.objective
        keys = [(n, c.option, c.start) if c else (n, None, instance.horizon) for n, c in enumerate(schedule)]
        taken = [number[key] for key in keys]  # every schedule is made of columns
        assert sum(columns[index].cost for index in taken) == told.objective
        assert all(known.total + known.reduced[index] <= SCALE * told.objective for index in taken)
        assert set(taken) <= set(known.within(columns, told.objective))


@settings(max_examples=60, deadline=None)
@given(small())
def test_no_schedule_costs_less_than_the_least(instance: Instance) -> None:
    expected = brute(instance)
    if expected is not None:
        assert least(instance) <= expected


@settings(max_examples=60, deadline=None)
@given(small())
def test_what_the_heuristic_places_breaks_nothing_but_what_it_left_out(instance: Instance) -> None:
    schedule = place(instance, [0.0] * len(instance.tasks))
    broken = judge(instance, schedule).broken
    assert all("left out" in line for line in broken)
    told = warm_start(instance, rounds=20)[1]
    expected = brute(instance)
    if not told.broken:
        assert expected is not None
        assert told.objective >= expected


@settings(max_examples=60, deadline=None)
@given(small())
def test_earlier_breaks_nothing_and_makes_nothing_later(instance: Instance) -> None:
    for one in itertools.islice((s for s in every(instance) if not judge(instance, s).broken), 20):
        moved = earlier(instance, one)
        told = judge(instance, moved)
        assert not told.broken
        assert told.objective <= judge(instance, one).objective
        assert all(
            b is None if a is None else b is not None and b.start <= a.start for a, b in zip(one, moved, strict=True)
        )


@settings(max_examples=40, deadline=None)
@given(small())
def test_a_plan_retimed_keeps_order_and_capacity(instance: Instance) -> None:
    tasks = tuple(replace(task, deadline=None, release=0, fixed=False) for task in instance.tasks)
    capacity = tuple(((0, max(chips for _, chips in steps)),) for steps in instance.pools)
    wide = replace(instance, tasks=tasks, pools=capacity, budget=None)
    for one in itertools.islice((s for s in every(wide) if not judge(wide, s).broken), 10):
        moved = retimed(wide, one)
        assert not judge(wide, moved).broken
        assert last_end(wide, moved) <= last_end(wide, one)


def test_the_judge_by_hand() -> None:
    two = Option(0, 2, 2, 10, 1)
    tasks = (Task("a", (two,), due=1, late=7), Task("b", (two,), after=(0,), drop=99))
    instance = Instance(tasks, (((0, 2),),), 4, budget=19)
    told = judge(instance, [Chosen(0, 0), Chosen(0, 2)])
    assert (told.usd, told.penalty, told.lateness, told.dropped, told.objective) == (20, 2, 7, 0, 29)
    assert told.broken == ("the budget is exceeded",)
    assert judge(instance, [Chosen(0, 0), None]).objective == 10 + 1 + 7 + 99
    assert judge(instance, [Chosen(0, 0), Chosen(0, 1)]).broken == (
        "b does not wait for a", "pool 0 has too few chips", "the budget is exceeded",
    )  # fmt: skip
    assert judge(instance, [None, None]).broken == ("a is left out",)


def test_a_circle_is_named() -> None:
    one = Option(0, 1, 1, 1)
    instance = Instance((Task("a", (one,), after=(1,)), Task("b", (one,), after=(0,))), (((0, 1),),), 2)
    with pytest.raises(ValueError, match="a -> b -> a"):
        instances.after_all(instance)


def test_what_is_the_best_for_certain_needs_no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ottava.planner.place.solve", lambda *args, **more: pytest.fail("the solver was asked"))
    instance = Instance((Task("a", (Option(0, 1, 1, 5),)),), (((0, 1),),), 2)
    begun, told = warm_start(instance, rounds=1)
    assert best(instance, begun, told, 1.0, 1).status == "optimal"


def test_json_gives_the_same_instance() -> None:
    instance = Instance((Task("a", (Option(0, 1, 1, 5, 2, ("x",)),), drop=3, after=()),), (((0, 1), (2, 4)),), 5, 7)
    assert instances.of(json.loads(json.dumps(instance.json()))) == instance
