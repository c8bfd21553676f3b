"""What the tests of the durable tier run in other processes, light to import, and the contents they compare with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ottava.errors import ResourceError
from ottava.trainer import generations
from ottava.trainer.generations import Generation
from ottava.trainer.saver import STATE, Outcome, Saver

RUN = "run-a"
Files = dict[str, dict[str, Tensor]]


def content(step: int, size: int = 6) -> Files:
    """The files of a step: tensors that no other step has."""
    generator = torch.Generator().manual_seed(step)
    numbers = torch.randn(size, generator=generator)
    return {
        STATE: {
            "step": torch.tensor(step),
            "weights.a": numbers,
            "bias": torch.full((2,), step % 999, dtype=torch.int16),
        },
        "other/rank0.safetensors": {"x": numbers.to(torch.bfloat16)},
    }


def make(root: Path, step: int, epoch: int = 1, *, run: str = RUN, **more: Any) -> Generation:
    return generations.write(root, content(step), step=step, run=run, epoch=epoch, state=f"digest-{step}", **more)


def holds(generation: Generation) -> bool:
    """Whether every file of a generation, as it is on disk, has the bytes of its step, and there is no other."""
    expected = content(generation.step)
    found = {name: generations.load(generation, name) for name in generation.files}
    same = [
        torch.equal(found[name][key].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
        for name, tensors in expected.items()
        for key, tensor in tensors.items()
    ]
    return all(same) and {n: set(t) for n, t in found.items()} == {n: set(t) for n, t in expected.items()}


def foreign(folder: Path, step: int) -> Path:
    """A folder as another trainer would write it."""
    (folder / "shards" / "deep").mkdir(parents=True)
    (folder / "config.json").write_text(f'{{"step": {step}}}\n')
    (folder / "shards" / "0.bin").write_bytes(bytes([step]) * 5000)
    (folder / "shards" / "deep" / "empty").write_bytes(b"")
    return folder


class Killer:
    """An `at` that kills this process at its n-th call, and tells of the calls before."""

    def __init__(self, number: int):
        self.number, self.points = number, list[str]()

    def __call__(self, point: str) -> None:
        self.points.append(point)
        if len(self.points) == self.number:
            os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(args: dict[str, Any]) -> dict[str, Any]:
    """Started by name: writes a generation, prunes, and is killed at the n-th durable operation, if there is one."""
    killer, root = Killer(args["number"]), Path(args["root"])
    make(root, args["step"], args["epoch"], at=killer)
    generations.prune(root, RUN, args["keep"], at=killer)
    return {"points": killer.points}


def seal_and_die(args: dict[str, Any]) -> dict[str, Any]:
    """Started by name: seals a folder, and is killed on the way."""
    killer = Killer(args["number"])
    generations.seal(Path(args["folder"]), Path(args["root"]), step=args["step"], run=RUN, epoch=1, at=killer)
    return {"points": killer.points}


def save_slowly(args: dict[str, Any]) -> dict[str, Any]:
    """Started by name: writes a generation, and stops before the rename until the file `go` is there."""
    root, go = Path(args["root"]), Path(args["go"])

    def at(point: str) -> None:
        if point == "rename":
            Path(args["ready"]).touch()
            while not go.exists():
                time.sleep(0.005)

    return {"path": str(make(root, args["step"], args["epoch"], at=at).path)}


# ---------------------------------------------------------------- on a disk of its own


def fill(folder: Path) -> Path:
    """Write a file until the disk is full."""
    path = folder / "ballast"
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass
    return path


def full_disk(root: Path) -> None:
    """At every point of a save the disk fills up; whatever happens, nothing partial stays, and the next save works."""
    points: list[str] = []
    make(root, 1, at=points.append)
    failed = set()
    for number, point in enumerate(points):
        step, left = 10 + number, list[int]()
        names, room = set(os.listdir(root)), os.statvfs(root).f_bfree
        calls = iter(range(len(points)))

        def at(_: str, number: int = number, left: list[int] = left, calls: Iterator[int] = calls) -> None:
            if next(calls) == number:
                fill(root)
                left.append(os.statvfs(root).f_bfree)

        error = None
        try:
            make(root, step, at=at)
        except ResourceError as told:
            error = told
        assert left == [0], (point, "the disk was not full")
        (root / "ballast").unlink()
        if error is None:
            assert set(os.listdir(root)) == names | {f"g-{step:09d}-e00001"}, point
            assert holds(generations.verify(root / f"g-{step:09d}-e00001", RUN)), point
        else:
            failed.add(point)
            assert "disk full" in error.what, error
            assert (set(os.listdir(root)), os.statvfs(root).f_bfree) == (names, room), point
        make(root, step, epoch=2)  # tried again
        generations.prune(root, RUN, keep=1)
    assert {"payload", "manifest"} <= failed, failed


def full_disk_under_a_saver(root: Path) -> None:
    """The loop is told, nothing partial stays, and the next save works once there is room."""
    big = {"x": torch.ones(1 << 19)}  # 2 MiB
    first = _saved(root, 100, big, at=lambda point: fill(root) if point == "payload" else None)
    assert first.saved is None, first
    assert first.error is not None, first
    assert "disk full" in first.error.what, first.error
    second = _saved(root, 101, big)
    (root / "ballast").unlink()
    assert isinstance(second.error, ResourceError), second
    assert "no room for a generation: it needs 3,1" in second.error.what, second.error
    third = _saved(root, 102, big)
    assert third.error is None, third
    assert third.saved is not None, third
    assert torch.equal(generations.load(third.saved, STATE)["x"], big["x"])
    assert all(name.startswith("g-") for name in os.listdir(root))


def read_only_disk(root: Path) -> None:
    """Every save is refused with a clear error, what is there can be read, and nothing is pruned."""
    before = set(os.listdir(root))
    subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
    for step in (200, 201):
        outcome = _saved(root, step, {"x": torch.ones(3)})
        assert outcome.saved is None, outcome
        assert outcome.error is not None, outcome
        assert "not allowed while writing a generation" in outcome.error.what, outcome.error
        assert str(outcome.error.where).startswith(str(root)), outcome.error
    assert set(os.listdir(root)) == before
    assert generations.newest(root, RUN)[0] is not None


def _saved(root: Path, step: int, tensors: dict[str, Tensor], **more: Any) -> Outcome:
    saver = Saver(root, run=RUN, epoch=step, keep=1, **more)
    saver.submit(step, tensors)
    saver.close()
    (outcome,) = saver.poll()
    return outcome


if __name__ == "__main__":  # in a mount namespace, on an empty disk of 6 MB
    place = Path(sys.argv[1])
    full_disk(place)
    full_disk_under_a_saver(place)
    read_only_disk(place)
    print("done")
