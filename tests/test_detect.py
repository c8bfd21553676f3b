"""Detectors against made-up runs, and the fold that survives its supervisor against every cut of a journal."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ottava.supervisor import record
from ottava.supervisor.decide import RollBack, Situation, Standing
from ottava.supervisor.detect import SILENT_S, SLOW_STEPS, Watch, first_cause
from ottava.supervisor.record import Segment
from ottava.trainer import audit, guard
from ottava.trainer.faults import flip
from ottava.trainer.guard import Alarm
from ottava.trainer.spec import TrainSpec
from ottava.trainer.supervised import Spike

SPEC = TrainSpec(hang_s=60.0, hang_least_s=1.0)


def step(rank: int, t: float, number: int, seconds: float = 0.1, computed: float = 0.05) -> dict[str, Any]:
    return {"say": "step", "rank": rank, "t": t, "step": number, "seconds": seconds, "compute_s": computed}


def beat(rank: int, t: float, phase: str) -> dict[str, Any]:
    return {"say": "beat", "rank": rank, "t": t, "step": 0, "phase": phase}


def watch(world: int, steps: int, seconds: float = 0.1, slow: dict[int, float] | None = None) -> Watch:
    found = Watch(world, SPEC, 0.0)
    for number in range(steps):
        for rank in range(world):
            found.hear(step(rank, (number + 1) * seconds, number + 1, seconds, (slow or {}).get(rank, 0.05)))
    return found


def test_the_deadline_follows_the_steps() -> None:
    assert Watch(2, SPEC, 0.0).deadline() == 60.0
    assert watch(2, 4).deadline() == 60.0, "too few to know"
    assert watch(2, 20).deadline() == 1.0, "never below the least"
    assert watch(2, 20, 2.0).deadline() == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("phases", "silent", "blamed"),
    [
        (["reduce", "forward", "reduce", "reduce"], [], (1,)),  # the others wait for it
        (["reduce", "reduce", "reduce", "reduce"], [2], (2,)),  # it does not even beat
        (["reduce", "reduce", "reduce", "reduce"], [], ()),  # nobody stands out: the exchange itself
        (["forward", "forward", "forward", "forward"], [], ()),
        (["forward", "reduce", "snapshot", "reduce"], [], (0, 2)),
        (["join", "start", "join", "join"], [], (1,)),  # before the first step, too
    ],
)
def test_who_hangs(phases: list[str], silent: list[int], blamed: tuple[int, ...]) -> None:
    found = watch(4, 20)
    last = 2.0
    assert found.hung(last + 0.9) is None
    for rank, phase in enumerate(phases):
        found.hear(beat(rank, last + (0.0 if rank in silent else 2 * SILENT_S), phase))
    assert found.hung(last + 2 * SILENT_S + 0.5) == blamed


def test_a_save_or_an_evaluation_may_take_longer_than_a_step() -> None:
    found, last = watch(2, 20), 2.0
    found.hear(beat(0, last, "save"))
    found.hear(beat(1, last + 40.0, "between"))  # waits for it
    found.hear(beat(0, last + 40.0, "save"))
    assert found.hung(last + 40.0) is None, "hang_s is 60 seconds"
    assert found.hung(last + 61.0) is not None
    found.hear(beat(0, last + 45.0, "between"))
    assert found.hung(last + 45.5) is None, "the clock starts anew when it is done"
    assert found.hung(last + 46.5) is not None


def test_a_straggler_is_slow_for_long() -> None:
    assert watch(4, SLOW_STEPS, slow={2: 0.6}).stragglers() == (2,)
    assert watch(4, SLOW_STEPS - 1, slow={2: 0.6}).stragglers() == ()
    assert watch(4, SLOW_STEPS, slow={2: 0.14}).stragglers() == (), "2.8 times is not worth leaving"
    assert watch(4, SLOW_STEPS, slow={2: 0.2}).stragglers() == (), "not for long enough yet"
    assert watch(4, SLOW_STEPS, slow=dict.fromkeys(range(4), 0.6)).stragglers() == ()
    assert watch(2, SLOW_STEPS, slow={1: 0.6}).stragglers() == (1,)
    assert watch(1, SLOW_STEPS, slow={0: 0.6}).stragglers() == ()


def test_a_lost_peer_is_no_cause() -> None:
    peer, nan = {"kind": "peer", "rank": 0}, {"kind": "nan", "rank": 1}
    assert first_cause([peer, nan]) == nan
    assert first_cause([peer]) is None


# ---------------------------------------------------------------- what workers check together


def test_minority() -> None:
    assert guard.minority("aaba") == (2,)
    assert guard.minority("aabb") == ()
    assert guard.minority("ab") == ()
    assert guard.minority("aaab" + "aaaa") == (3,)


@pytest.mark.parametrize(
    ("reports", "kind", "ranks"),
    [
        ([("x", "x", "f")] * 4, None, ()),
        ([("x", "x", "f"), ("x", "y", "f")], "corrupt", (1,)),  # it contradicts itself
        ([("x", "x", "f")] * 3 + [("y", "y", "g")], "class", (3,)),  # it says that it is something else
        ([("x", "x", "f")] * 3 + [("y", "y", "f")], "corrupt", (3,)),  # it says that it is the same
        ([("x", "x", "f"), ("y", "y", "g")], "class", ()),
    ],
)
def test_another_class_is_told_apart_from_corruption(reports: Any, kind: str | None, ranks: tuple[int, ...]) -> None:
    if kind is None:
        guard.check_class(reports)
        return
    with pytest.raises(Alarm) as found:
        guard.check_class(reports)
    assert (found.value.kind, found.value.ranks) == (kind, ranks)


@given(st.lists(st.floats(0.1, 5.0), min_size=16, max_size=16), st.floats(0.0, 50.0))
def test_a_spike_is_far_above_the_median(recent: list[float], loss: float) -> None:
    middle = sorted(recent)
    high = (middle[7] + middle[8]) / 2 + 8 * max(abs(v - (middle[7] + middle[8]) / 2) for v in recent) + 2.0
    spec = Spike()
    guard.check_spike(loss, recent[:15], spec, "x")  # too few to judge by
    if loss <= min(recent) + 2.0:
        guard.check_spike(loss, recent, spec, "x")
    if loss > high:
        with pytest.raises(Alarm, match="the loss of x"):
            guard.check_spike(loss, recent, spec, "x")


def test_a_loss_above_guessing_needs_no_history() -> None:
    guard.check_spike(5.7, [], Spike(), "x", guessing=math.log(44))
    with pytest.raises(Alarm, match="guessing would give"):
        guard.check_spike(5.9, [], Spike(), "x", guessing=math.log(44))


@given(
    st.lists(st.floats(0.0, 30.0), min_size=8, max_size=40), st.integers(4, 8), st.floats(0.1, 3.0), st.floats(0.5, 9.0)
)
def test_draws_are_compared_by_the_medians_of_two_windows(
    told: list[float], window: int, nats: float, spreads: float
) -> None:
    """Against numpy; and one wild step alone never counts, whatever it is."""
    spec = Spike(nats=nats, spreads=spreads, window=window)

    def found(losses: list[float], most: float = math.inf) -> bool:
        try:
            guard.check_drawn(losses[-1], losses[:-1], spec, "x", most)
        except Alarm:
            return True
        return False

    expected = False
    if len(told) > window:
        before, now = np.array(told[-2 * window : -window]), np.array(told[-window:])
        spread = max(np.median(np.abs(part - np.median(part))) for part in (before, now))
        expected = bool(np.median(now) > np.median(before) + max(nats, spreads * spread))
    assert found(told) == expected
    calm = [1.0] * (2 * window - 1)
    assert not found([*calm, 1e6])
    assert found([*calm, 10.0], most=9.0 - nats)
    assert not found([*calm, 10.0], most=10.1 - nats)


def test_numbers_that_are_none() -> None:
    guard.check_finite([1.0, 2.0], [True, False], "x")
    for bad in (math.nan, math.inf):
        with pytest.raises(Alarm) as found:
            guard.check_finite([1.0, bad], [True, False, True], "x")
        assert found.value.ranks == (1,)
    with pytest.raises(Alarm) as found:
        guard.check_finite([math.nan], [False, False], "x")
    assert found.value.ranks == (), "all of them: it is nobody's chip"


def test_who_computes_otherwise() -> None:
    assert audit.dissenters([["a", "b"], ["a"], ["a"]]) == (0,), "it contradicts itself"
    assert audit.dissenters([["b"], ["a", "a"], ["a"], ["a"]]) == (0,)
    assert audit.dissenters([["a"], ["b"]]) == ()
    assert audit.dissenters([["a", "b"]]) == (0,)


def test_audits_are_drawn_from_the_seed_and_the_step() -> None:
    drawn = [audit.due(0.25, 3, number) for number in range(4000)]
    assert drawn == [audit.due(0.25, 3, number) for number in range(4000)]
    assert abs(sum(drawn) - 1000) < 5 * math.sqrt(4000 * 0.25 * 0.75)
    assert not any(audit.due(0.0, 3, number) for number in range(100))
    assert all(audit.due(1.0, 3, number) for number in range(100))


@given(st.integers(1, 64), st.integers(0, 100))
def test_flips_change_so_many_bits(bits: int, seed: int) -> None:
    values = torch.zeros(1000)
    flip(values, bits, seed)
    assert sum(int(word).bit_count() for word in values.view(torch.int32).tolist()) == bits


# ---------------------------------------------------------------- the record

START = Situation((Standing("a", (0, 1)), Standing("b", (0, 1))), 0, 8)


def event(name: str, **fields: Any) -> dict[str, Any]:
    return {"event": f"train.{name}", "phase": "main", **fields}


def start(epoch: int, pool: str, at: int) -> dict[str, Any]:
    return event("start", epoch=epoch, pool=pool, step=at, chips=[0, 1])


def fault(kind: str, at: int, pool: str = "a") -> dict[str, Any]:
    return event("fault", pool=pool, kind=kind, step=at, message="m", chips=[])


def steps(first: int, last: int, audited: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    return [event("step", step=n, loss=float(n), audited=n in audited) for n in range(first, last + 1)]


def test_the_record_of_a_move() -> None:
    events = [start(1, "a", 0), *steps(1, 7), fault("killed", 7), start(2, "b", 7), *steps(8, 10)]
    elsewhere = {**start(9, "a", 0), "phase": "replay"}
    now = record.fold([*events, elsewhere], "main", START)
    assert now.segments == [Segment("a", 0, 7), Segment("b", 7)]
    assert (now.epoch, now.reported, now.situation.pool.name) == (2, 10, "b")
    assert now.losses(10, 4) == [(7, 7.0), (8, 8.0), (9, 9.0), (10, 10.0)]
    assert now.usable(2, 10)
    assert now.usable(1, 7)
    assert not now.usable(1, 8), "a stale worker's step does not count"


def test_a_rollback_takes_back_what_no_audit_vouches_for() -> None:
    events = [start(1, "a", 0), *steps(1, 9, audited=(4,)), fault("gradient", 9)]
    now = record.fold(events, "main", START)
    assert now.situation.audited == 4
    assert [now.usable(1, n) for n in (4, 5, 9)] == [True, False, False]
    now = record.fold([*events, start(2, "b", 4)], "main", START)
    assert now.segments == [Segment("a", 0, 4, lost=5), Segment("b", 4)]


def test_a_rollback_behind_the_last_move() -> None:
    segments = record.after([Segment("a", 0, 7), Segment("b", 7)], "c", 3, 9)
    assert segments == [Segment("a", 0, 3, lost=6), Segment("c", 3)]


def test_after_a_stop_there_is_a_new_chance() -> None:
    events = [start(1, "a", 0), fault("killed", 0), start(2, "b", 0), fault("killed", 0, "b")]
    assert record.fold(events, "main", START).stopped
    again = record.fold([*events, start(3, "a", 0)], "main", START)
    assert not again.stopped
    assert again.situation == START


def test_after_a_stop_audits_still_vouch() -> None:
    events = [start(1, "a", 0), *steps(1, 20, audited=(15,)), fault("disk", 20), start(2, "a", 20), *steps(21, 22)]
    again = record.fold([*events, fault("gradient", 22)], "main", replace(START, restarts=3))
    assert again.usable(1, 15)
    assert not again.usable(2, 16)


def test_no_audit_vouches_for_steps_that_are_made_anew() -> None:
    """Found at step 14 of the second start, which began at 12: what was vouched for at 13 is another state."""
    events = [start(1, "a", 0), *steps(1, 20, audited=(20,)), start(2, "a", 12), *steps(13, 14), fault("gradient", 14)]
    found = record.fold(events, "main", replace(START, restarts=3))
    assert found.actions[0] == RollBack(12)
    assert found.usable(2, 12)
    assert not found.usable(2, 13)


def test_a_move_is_told_once() -> None:
    """A supervisor that died between telling of a move and the start on the new pool has told."""
    events = [start(1, "a", 0), *steps(1, 3), fault("killed", 3), event("fallback", target="b", at_step=3)]
    assert record.fold(events, "main", START).moved == ("b", 3)
    assert record.fold([*events, start(2, "b", 3)], "main", START).moved is None


def test_a_stage_that_begins_anew_forgets() -> None:
    events = [start(1, "a", 0), *steps(1, 3), {"event": "train.begin"}]
    assert record.fold(events, "main", START) == record.fold([], "main", START)
