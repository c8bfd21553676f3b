"""Streams and events against what they mean: a program in which every conflict is ordered ends as if done in turn."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from ctypes import byref, c_float, c_int, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from . import raw
from .raw import acl

STREAMS, BUFFERS, SIZE = 3, 4, 64


@dataclass(frozen=True)
class Copy:
    """Buffer `source` is copied into buffer `to` by a stream."""

    stream: int
    source: int
    to: int


programs = st.lists(
    st.builds(Copy, st.integers(0, STREAMS - 1), st.integers(0, BUFFERS - 1), st.integers(0, BUFFERS - 1)), max_size=24
)


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    raw.device(0)


def initial() -> list[np.ndarray]:
    return [np.full(SIZE, 10 + i, np.uint8) for i in range(BUFFERS)]


def in_turn(program: list[Copy]) -> list[int]:
    values = [int(buffer[0]) for buffer in initial()]
    for copy in program:
        values[copy.to] = values[copy.source]
    return values


def run(program: list[Copy], ordered: bool) -> list[int]:
    """The program on streams. ordered: each copy waits for events of whoever touched its buffers before."""
    buffers, streams = [raw.put(buffer) for buffer in initial()], [raw.stream() for _ in range(STREAMS)]
    touched: list[list[tuple[int, ctypes.c_void_p]]] = [[] for _ in range(BUFFERS)]
    events = []
    for copy in program:
        if ordered:
            for stream, event in touched[copy.source] + touched[copy.to]:
                if stream != copy.stream:
                    acl.aclrtStreamWaitEvent(streams[copy.stream], event)
        raw.copy_later(buffers[copy.to], buffers[copy.source], SIZE, streams[copy.stream])
        if ordered:
            events.append(raw.event())
            acl.aclrtRecordEvent(events[-1], streams[copy.stream])
            for index in {copy.source, copy.to}:
                touched[index].append((copy.stream, events[-1]))
    for stream in streams:
        acl.aclrtSynchronizeStream(stream)
    found = [raw.fetch(place, like) for place, like in zip(buffers, initial(), strict=True)]
    for event in events:
        acl.aclrtDestroyEvent(event)
    for stream in streams:
        acl.aclrtDestroyStream(stream)
    for place in buffers:
        acl.aclrtFree(place)
    assert all((buffer == buffer[0]).all() for buffer in found)
    return [int(buffer[0]) for buffer in found]


@settings(max_examples=60)
@given(programs)
def test_ordered_conflicts_end_as_in_turn(program: list[Copy]) -> None:
    assert run(program, ordered=True) == in_turn(program)


def test_one_stream_keeps_its_order() -> None:
    program = [Copy(0, i % BUFFERS, (i * 3 + 1) % BUFFERS) for i in range(50)]
    assert run(program, ordered=False) == in_turn(program)


RACES = """
import sys
from tests.npu import raw
from tests.npu.test_streams import Copy, in_turn, run
raw.device(0)
program = [Copy(i % 3, i % 4, (i + 1) % 4) for i in range(12)]
print(sum(run(program, ordered=False) != in_turn(program) for _ in range(20)),
      sum(run(program, ordered=True) != in_turn(program) for _ in range(20)))
"""


def test_a_missing_wait_is_seen_when_tasks_are_held_up() -> None:
    """Otherwise the tests of order prove nothing."""
    done = subprocess.run(
        [sys.executable, "-c", RACES], env={**os.environ, "HOST_CANN_JITTER_US": "2000"}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    unordered, ordered = map(int, done.stdout.split())
    assert unordered > 0
    assert ordered == 0


HOLD = ctypes.CFUNCTYPE(None, c_void_p)


def test_work_is_done_later_than_the_call_and_a_wait_means_the_record_before_it() -> None:
    """A stream that is held up: nothing behind it has happened, and events and queries say so."""
    first, second, go = raw.stream(), raw.stream(), []
    event = raw.event()

    @HOLD
    def hold(_: object) -> None:
        while not go:
            time.sleep(0.001)

    a, b = raw.put(np.full(SIZE, 1, np.uint8)), raw.put(np.full(SIZE, 2, np.uint8))
    like = np.empty(SIZE, np.uint8)
    acl.aclrtRecordEvent(event, first)
    acl.aclrtSynchronizeEvent(event)
    acl.aclrtStreamWaitEvent(second, event)  # of the record before: it is done
    acl.aclrtSynchronizeStream(second)
    acl.aclrtLaunchHostFunc(first, hold, None)
    acl.aclrtRecordEvent(event, first)
    acl.aclrtStreamWaitEvent(second, event)
    raw.copy_later(b, a, SIZE, second)
    state = c_int()
    for query, what, busy, done in (
        (acl.aclrtStreamQuery, first, 1, 0),
        (acl.aclrtStreamQuery, second, 1, 0),
        (acl.aclrtQueryEventStatus, event, 0, 1),
        (acl.aclrtQueryEventWaitStatus, event, 1, 0),
    ):
        query(what, byref(state))
        assert state.value == busy, query
        assert busy != done
    assert raw.fetch(b, like)[0] == 2
    with pytest.raises(raw.Failed, match="107020"):
        acl.aclrtSynchronizeStreamWithTimeout(second, c_int(20))
    go.append(True)
    acl.aclrtSynchronizeStream(second)
    assert raw.fetch(b, like)[0] == 1
    acl.aclrtQueryEventStatus(event, byref(state))
    assert state.value == 1


def test_time_between_events() -> None:
    stream, events, ms = raw.stream(), [raw.event(), raw.event()], c_float()
    with pytest.raises(raw.Failed, match="107006"):
        acl.aclrtEventElapsedTime(byref(ms), *events)
    for event in events:
        acl.aclrtRecordEvent(event, stream)
    acl.aclrtSynchronizeStream(stream)
    acl.aclrtEventElapsedTime(byref(ms), *events)
    assert ms.value >= 0


def test_memory_is_counted_and_copies_are_checked() -> None:
    free, total = c_size_t(), c_size_t()

    def left() -> int:
        acl.aclrtGetMemInfo(0, byref(free), byref(total))
        return free.value

    before = left()
    place = raw.allocate(1 << 20)
    assert before - left() == 1 << 20
    host = np.zeros(1 << 20, np.uint8)
    pointer = host.ctypes.data_as(c_void_p)
    for to, room, source, size, kind in (
        (place, 1 << 10, pointer, 1 << 20, raw.TO_DEVICE),  # larger than its room
        (c_void_p(place.value + 8), 1 << 20, pointer, 1 << 20, raw.TO_DEVICE),  # beyond the block
        (pointer, 8, pointer, 8, raw.TO_DEVICE),  # no memory of the device
        (pointer, 8, pointer, 8, raw.TO_HOST),
    ):
        with pytest.raises(raw.Failed, match="100000"):
            acl.aclrtMemcpy(to, c_size_t(room), source, c_size_t(size), kind)
    acl.aclrtFree(place)
    assert left() == before
    with pytest.raises(raw.Failed, match="100000"):
        acl.aclrtFree(place)
    with pytest.raises(raw.Failed, match="207001"):
        raw.allocate(total.value + 1)


def test_devices_are_those_that_are_visible() -> None:
    code = "from tests.npu.raw import acl; import ctypes; n = ctypes.c_uint32(); acl.aclrtGetDeviceCount(ctypes.byref(n)); print(n.value)"  # noqa: E501
    for visible, count in (("0,1", 2), ("3", 1), ("1,9,0", 1), ("", 0), (None, 4)):
        env = {**os.environ, "HOST_CANN_DEVICES": "4"}
        env.pop("ASCEND_RT_VISIBLE_DEVICES", None)
        if visible is not None:
            env["ASCEND_RT_VISIBLE_DEVICES"] = visible
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=Path(__file__).parents[2], capture_output=True, check=True
        )
        assert int(done.stdout) == count
    with pytest.raises(raw.Failed, match="107001"):
        acl.aclrtSetDevice(c_int(999))


def test_what_is_not_there_says_its_name(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(raw.Failed, match="100024"):
        acl.rtKernelLaunch()
    with pytest.raises(raw.Failed, match="100024"):
        acl.aclrtReserveMemAddress(None, c_size_t(1), c_size_t(1), None, c_uint32(0))
    assert "rtKernelLaunch" in capfd.readouterr().err
