"""Saving a generation beside the training loop: the loop pays for one copy in memory, a thread does the rest.

One spare buffer of the state's size is filled by `submit` and written by the thread. While it is being written a
further request is skipped, not kept: to keep it would take a second buffer of that size, the per-step snapshots
already hold the newer state against the death of a process, and a disk that is slower than the requests
serves best by finishing what it has begun. A step that must be on disk is submitted with `wait`.

A save that fails is an outcome, not an exception: training goes on, what was half written is gone, and the next
request is tried like the first. Hashing, copying and writing run without the interpreter's lock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ottava.checkpoint.safetensors import plan_of
from ottava.errors import OttavaError, ResourceError
from ottava.trainer import generations
from ottava.trainer.generations import At, Generation, Rejected

STATE = "state.safetensors"
"""The file of a generation that holds the whole state."""


@dataclass(frozen=True)
class Outcome:
    """What became of one save. saved: the generation, or None where `error` says why not.

    With a generation an error speaks of the cleaning up afterwards. removed: old generations that went; rejected:
    those that were found not to be as they were written; seconds: from the request to the end.
    """

    step: int
    saved: Generation | None
    error: OttavaError | None
    removed: tuple[Path, ...]
    rejected: tuple[Rejected, ...]
    seconds: float


@dataclass(frozen=True)
class _Job:
    step: int
    state: str | None
    extra: Mapping[str, Any]
    pinned: frozenset[int]
    begun: float


class Saver:
    """Writes generations of one run and epoch in a thread of its own, and prunes after each. Used by one thread."""

    def __init__(self, root: Path, *, run: str, epoch: int, keep: int = 3, at: At = lambda _: None):
        """keep: as `prune`; at: as `write`, called in the thread."""
        self._root, self._run, self._epoch, self._keep, self._at = root, run, epoch, keep, at
        self._spare: dict[str, Tensor] = {}
        self._job: _Job | None = None
        self._closed = False
        self._done: deque[Outcome] = deque()
        self._turn = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="saver", daemon=True)
        self._thread.start()

    def submit(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        *,
        state: str | None = None,
        extra: Mapping[str, Any] | None = None,
        pinned: frozenset[int] = frozenset(),
        wait: bool = False,
    ) -> bool:
        """Copy a state, to be saved as `state.safetensors` of a generation. True where it was taken.

        False: skipped, as the last one is still being written (with `wait`, that is waited for instead), or as there
        is no memory for a copy, of which `poll` tells.
        tensors: may change as soon as this returns; state: the state's digest; extra: JSON, for the manifest;
        pinned: steps whose generations are not pruned afterwards.
        """
        assert not self._closed, "submitted to a closed saver"
        begun = time.monotonic()
        with self._turn:
            if self._job is not None and not wait:
                return False
            self._turn.wait_for(lambda: self._job is None)
        try:
            self._copy(tensors)
        except (MemoryError, RuntimeError) as fault:  # torch raises the latter where there is no memory
            self._spare = {}
            error = ResourceError("no memory for the copy of the state that is saved", fix="leave a state's size free")
            error.__cause__ = fault
            self._done.append(Outcome(step, None, error, (), (), time.monotonic() - begun))
            return False
        with self._turn:
            self._job = _Job(step, state, dict(extra or {}), pinned, begun)
            self._turn.notify_all()
        return True

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        if plan_of(self._spare) != plan_of(tensors):
            self._spare = {}  # the old goes before the new is made
            self._spare = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self._spare[name].copy_(tensor)

    def poll(self) -> list[Outcome]:
        """What has ended since the last call, in order. Never waits."""
        found = []
        while self._done:
            found.append(self._done.popleft())
        return found

    def close(self, wait: bool = True) -> None:
        """End the thread after the save in flight. wait: until that is on disk; `poll` then tells of it.

        Without `wait` a process that ends cuts the save short, which leaves a scratch folder for the next `sweep`.
        """
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        if wait:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._job is not None or self._closed)
                job = self._job
            if job is None:
                return
            outcome = self._save(job)
            with self._turn:
                self._done.append(outcome)
                self._job = None
                self._turn.notify_all()

    def _save(self, job: _Job) -> Outcome:
        saved, error = None, None
        removed: list[Path] = []
        rejected: list[Rejected] = []
        try:
            generations.sweep(self._root)  # before there is asked for room
            saved = generations.write(
                self._root, {STATE: self._spare}, step=job.step, run=self._run, epoch=self._epoch, state=job.state,
                extra=job.extra, at=self._at,
            )  # fmt: skip
            removed, rejected = generations.prune(self._root, self._run, self._keep, job.pinned, self._at)
        except OttavaError as told:
            error = told
        except Exception as fault:  # a fault of this program must not end the run either, nor go unseen
            error = ResourceError(f"saving failed: {type(fault).__name__}: {fault}", where=self._root)
            error.__cause__ = fault
        seconds = time.monotonic() - job.begun
        return Outcome(job.step, saved, error, tuple(removed), tuple(rejected), seconds)
