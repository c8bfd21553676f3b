"""The durable tier: killed anywhere, a save leaves the last generation or the new; altered anywhere, it is refused."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ottava.artifact import MANIFEST, digest_of
from ottava.checkpoint import safetensors
from ottava.errors import CheckpointError, ResourceError
from ottava.trainer import envelope, generations
from ottava.trainer.generations import Generation, newest, prune, seal, sweep, verify
from ottava.trainer.saver import STATE

from .durable import RUN, content, foreign, holds, make

REPOSITORY = Path(__file__).parents[1]


def refused(folder: Path, run: str | None = RUN) -> str:
    """The cause for which a folder is refused. Fails where it is not."""
    with pytest.raises(CheckpointError) as caught:
        verify(folder, run)
    assert caught.value.cause
    assert caught.value.where
    assert caught.value.fix
    return caught.value.cause


def resign(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a manifest as somebody would who knows how its digest is made."""
    data = json.loads((folder / MANIFEST).read_text())
    edit(data)
    data["digest"] = digest_of({k: v for k, v in data.items() if k != "digest"})
    (folder / MANIFEST).write_bytes(envelope.render(data))


def sound(root: Path) -> list[int]:
    """The steps of what verifies, the newest first."""
    found = []
    for step, _, path in generations.listed(root):
        try:
            verify(path, RUN)
        except CheckpointError:
            continue
        found.append(step)
    return found


# ---------------------------------------------------------------- a generation


def test_round_trip(tmp_path: Path) -> None:
    """Made of two files, found again, with everything its writer said, in the very bytes."""
    extra = {"loss": 1.5, "norm": math.nan, "pools": ["a", "b"], 3: None}
    made = make(tmp_path / "new" / "root", 7, 2, extra=extra)
    found, rejected = newest(tmp_path / "new" / "root", RUN)
    assert found is not None
    assert not rejected
    assert found.path.name == "g-000000007-e00002"
    assert (found.step, found.epoch, found.run, found.state) == (7, 2, RUN, "digest-7")
    assert repr(found.extra) == repr({"loss": 1.5, "norm": math.nan, "pools": ["a", "b"], "3": None})
    assert repr(found.manifest) == repr(made.manifest)
    assert holds(found)
    assert sorted(p.name for p in found.path.rglob("*") if p.is_file()) == [MANIFEST, "rank0.safetensors", STATE]
    with pytest.raises(CheckpointError, match="no such file"):
        generations.load(found, "none.safetensors")


def test_the_manifest_has_the_hash_of_what_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that stores other bytes than it was given is found out, though no error was reported."""
    whole = safetensors.write

    def lossy(path: Path, *args: Any) -> None:
        whole(path, *args)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(safetensors, "write", lossy)
    assert refused(make(tmp_path, 1).path) == "altered file"


def test_a_generation_is_never_written_twice(tmp_path: Path) -> None:
    make(tmp_path, 5)
    before = (tmp_path / "g-000000005-e00001" / MANIFEST).read_bytes()
    for attempt in (lambda: make(tmp_path, 5, at=_never), lambda: _sealed(tmp_path, 5, at=_never)):
        with pytest.raises(CheckpointError, match="never overwritten") as caught:
            attempt()
        assert caught.value.cause == "already there"

    def appear(point: str) -> None:  # another writer is faster
        if point == "rename":
            make(tmp_path, 6)

    with pytest.raises(CheckpointError, match="never overwritten"):
        make(tmp_path, 6, at=appear)
    assert (tmp_path / "g-000000005-e00001" / MANIFEST).read_bytes() == before
    assert sound(tmp_path) == [6, 5]
    assert sorted(os.listdir(tmp_path)) == ["g-000000005-e00001", "g-000000006-e00001", "other"]


def _sealed(root: Path, step: int, **more: Any) -> Generation:
    if not (root / "other").exists():
        foreign(root / "other", step)
    return seal(root / "other", root, step=step, run=RUN, epoch=1, **more)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", ".", "", "a//b", "a/", "./a", MANIFEST, "a\nb", "a\0"])
def test_unsound_names_are_never_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        generations.write(tmp_path, {name: {"x": torch.ones(1)}}, step=1, run=RUN, epoch=1)
    assert caught.value.cause == "unsafe name"
    assert not os.listdir(tmp_path)


def test_everything_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power may go at the rename: by then every file and folder is on disk as it will be read."""
    flushed: dict[int, bytes] = {}
    flush, rename = os.fsync, os.rename
    renamed: list[Path] = []

    def record(descriptor: int) -> None:
        flush(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        its = "\n".join(sorted(os.listdir(path))).encode() if path.is_dir() else path.read_bytes()
        flushed[os.fstat(descriptor).st_ino] = its

    def check(source: Path, target: Path) -> None:
        for path in (source, *source.rglob("*")):
            its = "\n".join(sorted(os.listdir(path))).encode() if path.is_dir() else path.read_bytes()
            assert flushed[path.stat().st_ino] == its, path
        rename(source, target)
        renamed.append(target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", check)
    for step, its in ((1, make), (2, _sealed)):
        made = its(tmp_path, step)
        assert renamed.pop() == made.path
        assert made.path.name.encode() in flushed[tmp_path.stat().st_ino]  # and then the name itself


# ---------------------------------------------------------------- killed


@pytest.mark.parametrize(("before", "broken", "keep"), [(0, 0, 1), (1, 0, 3), (4, 0, 3), (4, 1, 2)])
def test_killed_at_every_durable_operation(launcher: Any, tmp_path: Path, before: int, broken: int, keep: int) -> None:
    """A real process dies before each operation of save and prune: the last one or the new one is there, whole.

    Four histories: the first save of all; one older; as many as are kept and one more; the newest of them broken.
    The root is not made anew in between, so the next save meets what the last kill left.
    """
    root, step = tmp_path / "root", 0
    for step in range(before):
        make(root, step)
    for path in sorted(root.glob("g-*"))[before - broken :]:
        (path / STATE).write_bytes(b"")
    seen: list[str] = []
    for number in itertools.count(1):
        step, held = step + 1, sound(root)
        args = {"root": str(root), "step": step, "epoch": number, "keep": keep, "number": number}
        process = launcher.spawn("tests.durable:save_and_die", args, pool=None, logs=tmp_path / "logs")
        status = process.wait()
        there = sound(root)
        assert there in (held, [step, *held][: len(there)]), (number, there)
        assert len(there) >= min(keep, len(held)), "pruned too many"
        found, rejected = newest(root, RUN)
        assert (found.step if found else None) == max(there, default=None)
        assert all(generation.cause == "truncated file" for generation in rejected), "a torn one has a name"
        assert len(rejected) <= broken
        assert found is None or holds(found)
        if status == 0:
            seen = process.result()["points"]
            break
        assert status == -9
    made = ["payload", "fsync:payload"] * 2 + ["manifest", "fsync:manifest", "fsync:folder", "rename", "fsync:root"]
    assert seen[:9] == made
    assert set(seen[9:]) <= {"trash", "remove"}
    assert sound(root)[0] == step
    prune(root, RUN, keep)
    assert len(sound(root)) == min(keep, step + 1)
    assert all(name.startswith("g-") for name in os.listdir(root)), "something unfinished was left"


def test_killed_while_sealing(launcher: Any, tmp_path: Path) -> None:
    """Another trainer's folder is where it was, whole, and can be sealed again; or it is the generation."""
    root, folder = tmp_path / "root", tmp_path / "foreign"
    untouched = {p.relative_to(folder): p.read_bytes() for p in foreign(folder, 3).rglob("*") if p.is_file()}
    seen: set[str] = set()
    for number in itertools.count(1):
        args = {"root": str(root), "folder": str(folder), "step": 3, "number": number}
        process = launcher.spawn("tests.durable:seal_and_die", args, pool=None, logs=tmp_path / "logs")
        status = process.wait()
        where = folder if folder.exists() else root / "g-000000003-e00001"
        files = {p.relative_to(where): p.read_bytes() for p in where.rglob("*") if p.is_file()}
        manifest = files.pop(Path(MANIFEST), None)
        assert files == untouched
        assert manifest is not None or folder.exists()
        found, rejected = newest(root, RUN)
        assert (found is not None) == (not folder.exists())
        assert not rejected
        if found is not None:
            shutil.move(found.path, folder)  # once more, now with an old manifest in it
        if status == 0:
            seen = set(process.result()["points"])
            break
    assert seen == {"fsync:payload", "manifest", "fsync:manifest", "fsync:folder", "rename", "fsync:root"}
    generation = seal(folder, root, step=3, run=RUN, epoch=1, extra={"by": "another"})
    assert verify(generation.path, RUN).files.keys() == {"config.json", "shards/0.bin", "shards/deep/empty"}
    sweep(root)
    assert os.listdir(root) == [generation.path.name]


def test_a_living_writer_is_left_alone(launcher: Any, tmp_path: Path) -> None:
    """Whoever cleans up, of an older epoch or a newer: a save in progress goes on; that of a dead process goes."""
    root, ready, go = tmp_path / "root", tmp_path / "ready", tmp_path / "go"
    for step in (1, 2):
        make(root, step)
    args = {"root": str(root), "step": 3, "epoch": 7, "ready": str(ready), "go": str(go)}
    writers = [launcher.spawn("tests.durable:save_slowly", args, pool=None, logs=tmp_path / "logs")]
    writers += [launcher.spawn("tests.durable:save_slowly", {**args, "epoch": 8}, pool=None, logs=tmp_path / "logs")]
    try:
        while len(list(root.glob(".tmp-*/g-*/" + MANIFEST))) < 2:
            assert all(writer.alive() for writer in writers)
        prune(root, RUN, keep=1)
        assert len(list(root.glob(".tmp-*"))) == 2
        writers[1].kill()
        writers[1].wait()
        prune(root, RUN, keep=1)
        assert [path.name[:23] for path in root.glob(".tmp-*")] == [".tmp-g-000000003-e00007"]
    finally:
        go.touch()
    assert Path(writers[0].result()["path"]) == root / "g-000000003-e00007"
    found, _ = newest(root, RUN)
    assert found is not None
    assert found.epoch == 7
    assert holds(found)


def test_half_removed_folders_go_with_the_next_prune(tmp_path: Path) -> None:
    make(tmp_path, 1)
    half = tmp_path / ".trash-g-000000000-e00001-0123abcd"
    half.mkdir()
    (half / STATE).write_bytes(b"x")
    for name in (".tmp-somebody's", ".trash-somebody's", "g-1-e1", "g-000000001-e00001.bak"):
        (tmp_path / name).mkdir()
    assert sweep(tmp_path) == [half]
    assert len(os.listdir(tmp_path)) == 5


@pytest.mark.parametrize("number", [5, 28, 30, 12])
def test_refused_at_every_durable_operation(tmp_path: Path, number: int) -> None:
    """EIO, ENOSPC, EROFS and ENOMEM before each: a clear error, nothing partial, and the step can be saved then."""
    points: list[str] = []
    make(tmp_path, 0, at=points.append)
    for index, point in enumerate(points):
        there = set(os.listdir(tmp_path))
        calls = itertools.count()

        def refuse(_: str, index: int = index, calls: Iterator[int] = calls) -> None:
            if next(calls) == index:
                raise OSError(number, os.strerror(number))

        with pytest.raises(ResourceError, match="while writing a generation") as caught:
            make(tmp_path, index + 1, at=refuse)
        assert caught.value.where == str(tmp_path)
        if point != "fsync:root":  # by then it has its name
            assert set(os.listdir(tmp_path)) == there
            make(tmp_path, index + 1)
        assert sound(tmp_path)[0] == index + 1


def test_disks_that_are_full_or_read_only(tmp_path: Path) -> None:
    """On a real file system of 6 MB in a mount namespace: `tests/durable.py` says what is checked."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=6m tmpfs {disk}"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-Urm", "sh", "-c", mount]).returncode:
        pytest.skip("no mount namespace can be made here")
    command = f"{mount} && exec {sys.executable} -m tests.durable {disk}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])}
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", command], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "done\n", done.stderr


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = os.statvfs(tmp_path)
    values = list(disk)
    values[4] = (2 << 20) // disk.f_frsize  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(values))
    make(tmp_path, 1)
    with pytest.raises(
        ResourceError, match=r"needs 3,1\d\d,\d\d\d bytes, and 2,097,152 are free\n  where: .*\n  mend:"
    ):
        generations.write(tmp_path, {STATE: {"x": torch.zeros(1 << 19)}}, step=2, run=RUN, epoch=1, at=_never)


def _never(point: str) -> None:
    raise AssertionError(point)


# ---------------------------------------------------------------- altered


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two generations, which tests leave as they found it."""
    root = tmp_path_factory.mktemp("whole")
    make(root, 1)
    make(root, 2, extra={"note": "é", "loss": 0.5})
    return root


@pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_every_single_bit_matters(whole: Path, bits: int) -> None:
    """One bit, or all, of every byte of every file. Without verification those of the data load, silently wrong."""
    folder = whole / "g-000000002-e00001"
    flips = silent = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        for position, number in itertools.product(range(len(data)), range(bits)):
            bit = (position * 5 + number) % 8
            altered = bytearray(data)
            altered[position] ^= 1 << bit
            path.write_bytes(altered)
            cause = refused(folder)
            expected = {"altered manifest", "unknown version"} if path.name == MANIFEST else {"altered file"}
            assert cause in expected, (path, position, bit)
            flips += 1
            if path.name == STATE and number == 0 and position >= len(data) - 36:
                silent += set(safetensors.entries(path)) == set(content(2)[STATE])
        path.write_bytes(data)
    assert flips > 800 * bits
    assert silent == 36  # the data's bytes: the format itself notices nothing
    assert holds(verify(folder, RUN))


@settings(max_examples=60)
@given(data=st.data())
def test_cut_grown_and_rewritten_files_are_refused(whole: Path, data: st.DataObject) -> None:
    folder = whole / "g-000000002-e00001"
    path = folder / data.draw(st.sampled_from([STATE, "other/rank0.safetensors", MANIFEST]))
    before = path.read_bytes()
    kind = data.draw(st.sampled_from(["cut", "grown", "zeros", "several"]))
    if kind == "cut":
        after = before[: data.draw(st.integers(0, len(before) - 1))]
    elif kind == "grown":
        after = before + data.draw(st.binary(min_size=1, max_size=9))
    elif kind == "zeros":  # as a file is after a crash on some systems: its size, not its bytes
        after = bytes(len(before))
    else:
        changed = bytearray(before)
        places = st.tuples(st.integers(0, len(before) - 1), st.integers(1, 255))
        for position, value in data.draw(st.dictionaries(*[places.map(lambda p: p[0]), st.integers(1, 255)])).items():
            changed[position] ^= value
        after = bytes(changed)
    path.write_bytes(after)
    try:
        if after == before:
            verify(folder, RUN)
        else:
            cause = refused(folder)
            payload = "truncated file" if kind == "cut" else "altered file"
            assert cause == ("altered manifest" if path.name == MANIFEST else payload) or cause == "unknown version"
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", [STATE, "other/rank0.safetensors", MANIFEST])
def test_files_of_two_generations_are_not_mixed(whole: Path, tmp_path: Path, name: str) -> None:
    """Every file is sound, and was written by this run: it only belongs elsewhere."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    first, second = (tmp_path / f"g-00000000{step}-e00001" for step in (1, 2))
    (first / name).rename(tmp_path / "x")
    (second / name).rename(first / name)
    (tmp_path / "x").rename(second / name)
    cause = "lying name" if name == MANIFEST else "altered file"
    assert (refused(first), refused(second)) == (cause, cause)
    assert newest(tmp_path, RUN)[0] is None


@pytest.mark.parametrize("key", sorted(envelope.KEYS))
def test_every_key_of_the_manifest_is_signed(whole: Path, tmp_path: Path, key: str) -> None:
    folder = Path(shutil.copytree(whole / "g-000000001-e00001", tmp_path / "g-000000001-e00001"))
    data = json.loads((folder / MANIFEST).read_text())
    for value in (None, 9, "x", {}, [], True, 1e300):
        if value != data[key]:
            (folder / MANIFEST).write_bytes(envelope.render({**data, key: value}))
            expected = {"altered manifest"} | ({"unknown version"} if key == "version" else set())
            assert refused(folder) in expected
    (folder / MANIFEST).write_bytes(envelope.render({k: v for k, v in data.items() if k != key}))
    assert refused(folder) == "altered manifest"


def _swap_for_link(folder: Path) -> None:
    (folder / STATE).rename(folder.parent / "elsewhere")
    (folder / STATE).symlink_to(folder.parent / "elsewhere")


def _link_folder(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def _named(name: str) -> Callable[[Path], None]:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop(STATE)

    return lambda folder: resign(folder, edit)


def _field(**values: Any) -> Callable[[Path], None]:
    return lambda folder: resign(folder, lambda manifest: manifest.update(values))


def _pipe(folder: Path) -> None:
    (folder / STATE).unlink()
    os.mkfifo(folder / STATE)


def _text(text: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / MANIFEST).write_bytes(text)


STRUCTURE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "folder gone": ("missing folder", shutil.rmtree),
    "folder a link": ("symlink", _link_folder),
    "folder a file": ("not a folder", lambda f: (shutil.rmtree(f), f.touch())),
    "manifest gone": ("missing manifest", lambda f: (f / MANIFEST).unlink()),
    "manifest a folder": ("not a regular file", lambda f: ((f / MANIFEST).unlink(), (f / MANIFEST).mkdir())),
    "manifest empty": ("altered manifest", _text(b"")),
    "manifest no JSON": ("altered manifest", _text(b"{")),
    "manifest no mapping": ("altered manifest", _text(b"[]")),
    "manifest deep": ("altered manifest", _text(b"[" * 100_000)),
    "manifest a huge number": ("altered manifest", _text(b'{"step": 1' + b"0" * 5000 + b"}")),
    "manifest not UTF-8": ("altered manifest", _text(b"\xff\xfe")),
    "manifest of half a character": ("altered manifest", _text(b'{"version": 1, "run": "\\ud800"}')),
    "manifest written otherwise": ("altered manifest", lambda f: _text(json.dumps(_read(f)).encode())(f)),
    "manifest of tomorrow": ("unknown version", _field(version=2)),
    "file gone": ("missing file", lambda f: (f / STATE).unlink()),
    "file more": ("extra file", lambda f: (f / "other" / "x").touch()),
    "file a link": ("symlink", _swap_for_link),
    "file a pipe": ("not a regular file", _pipe),
    "file a folder": ("missing file", lambda f: ((f / STATE).unlink(), (f / STATE).mkdir())),
    "another link": ("symlink", lambda f: (f / "latest").symlink_to(STATE)),
    "another run": ("other run", _field(run="run-b")),
    "step by the manifest": ("lying name", _field(step=2)),
    "epoch by the manifest": ("lying name", _field(epoch=2)),
    "step a truth value": ("altered manifest", _field(step=True)),
    "step below zero": ("altered manifest", _field(step=-1)),
    "name upwards": ("unsafe name", _named("../elsewhere")),
    "name from the root": ("unsafe name", _named("/etc/passwd")),
    "name through a folder": ("unsafe name", _named("other/../" + STATE)),
    "name of the manifest": ("unsafe name", _named(MANIFEST)),
    "name with a zero": ("unsafe name", _named("a\0b")),
}


def _read(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_text())


@pytest.mark.parametrize("fault", STRUCTURE)
def test_every_fault_has_its_cause(whole: Path, tmp_path: Path, fault: str) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "root"))
    folder = root / "g-000000001-e00001"
    cause, plant = STRUCTURE[fault]
    plant(folder)
    assert refused(folder) == cause
    found, _ = newest(root, RUN)  # the newer one is good, and the older is nobody's concern
    assert found is not None
    assert found.step == 2


@pytest.mark.parametrize("name", ["g-000000002-e00001", "g-000000001-e00002", "g-0000000001-e00001", "copy"])
def test_a_renamed_folder_lies(whole: Path, tmp_path: Path, name: str) -> None:
    assert refused(Path(shutil.copytree(whole / "g-000000001-e00001", tmp_path / name))) == "lying name"


def test_a_disk_that_does_not_give_the_bytes(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(envelope, "hash_file", broken)
    assert refused(whole / "g-000000001-e00001") == "unreadable"
    found, rejected = newest(whole, RUN)
    assert found is None
    assert [item.cause for item in rejected] == ["unreadable", "unreadable"]
    assert "Input/output error (" in rejected[0].what


def test_what_becomes_a_pipe_or_a_link_is_not_waited_for(tmp_path: Path) -> None:
    """Between the listing and the reading."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="no regular file"):
        envelope.hash_file(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(__file__)
    with pytest.raises(OSError, match="symbolic links"):
        envelope.hash_file(tmp_path / "link")


def test_what_is_altered_after_verifying_is_not_loaded(whole: Path, tmp_path: Path) -> None:
    generation = verify(Path(shutil.copytree(whole / "g-000000001-e00001", tmp_path / "g-000000001-e00001")), RUN)
    path = generation.path / STATE
    data = bytearray(path.read_bytes())
    for position in (len(data) - 1, data.index(b'"format"') + 2):  # a value; the header, where it means nothing
        data[position] ^= 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="not those that were written"):
            generations.load(generation, STATE)
        data[position] ^= 1


def test_what_is_not_sealed(tmp_path: Path) -> None:
    for number, (cause, plant) in enumerate(
        {
            "symlink": lambda f: (f / "latest").symlink_to("config.json"),
            "not a regular file": lambda f: os.mkfifo(f / "pipe"),
            "unsafe name": lambda f: (f / MANIFEST).write_text("{}"),
            "missing file": lambda f: (shutil.rmtree(f), f.mkdir()),
            "missing folder": shutil.rmtree,
        }.items()
    ):
        folder = foreign(tmp_path / str(number), 1)
        plant(folder)
        with pytest.raises(CheckpointError) as caught:
            seal(folder, tmp_path / "root", step=1, run=RUN, epoch=1)
        assert caught.value.cause == cause
        assert not os.listdir(tmp_path / "root")
    elsewhere = Path("/dev/shm")
    if elsewhere.is_dir() and elsewhere.stat().st_dev != tmp_path.stat().st_dev:
        with pytest.raises(CheckpointError, match="lies on another disk"):
            seal(foreign(tmp_path / "x", 1), elsewhere, step=1, run=RUN, epoch=1)


# ---------------------------------------------------------------- newest and prune


def test_walking_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step before epoch; broken ones are passed over and told of; where the newest is good nothing else is read."""
    assert newest(tmp_path / "none", RUN) == (None, [])
    for step, epoch in ((3, 9), (20, 1), (20, 2), (1_000_000_000, 1)):
        make(tmp_path, step, epoch)
    read: list[Path] = []
    hash_file = envelope.hash_file
    monkeypatch.setattr(envelope, "hash_file", lambda path: (read.append(path), hash_file(path))[1])
    found, rejected = newest(tmp_path, RUN)
    assert found is not None
    assert (found.step, rejected) == (1_000_000_000, [])
    assert {path.parents[len(path.relative_to(found.path).parts) - 1] for path in read} == {found.path}

    shutil.rmtree(found.path / "other")
    found, rejected = newest(tmp_path, RUN, usable=lambda generation: generation.epoch != 2)
    assert found is not None
    assert (found.step, found.epoch) == (20, 1)
    assert [(item.step, item.epoch, item.cause) for item in rejected] == [
        (1_000_000_000, 1, "missing file"),
        (20, 2, "not usable"),
    ]
    assert "other/rank0.safetensors)" in rejected[0].what
    assert newest(tmp_path, RUN, usable=lambda _: False)[0] is None


def test_another_runs_folder_is_refused_loudly(tmp_path: Path) -> None:
    for step in (1, 2):
        make(tmp_path, step, run="run-b")
    with pytest.raises(CheckpointError, match=r"none of the 2 generations here is of the run 'run-a'.*'run-b'") as e:
        newest(tmp_path, RUN)
    assert e.value.cause == "other run"
    make(tmp_path, 0)
    found, rejected = newest(tmp_path, RUN)
    assert found is not None
    assert found.step == 0
    assert {item.cause for item in rejected} == {"other run"}
    (found.path / MANIFEST).unlink()
    assert newest(tmp_path, RUN)[0] is None


MEMBERS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 2), st.sampled_from(["good", "good", "broken", "torn", "other"])),
    unique_by=lambda member: member[:2],
    max_size=7,
)


@example([(s, 0, kind) for s, kind in enumerate(["good", "other", "torn", "broken", "good", "good"])], 2, frozenset())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(MEMBERS, st.integers(1, 3), st.frozensets(st.integers(0, 6), max_size=2))
def test_prune_against_a_model(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[int, int, str]], keep: int, pinned: frozenset[int]
) -> None:
    root = tmp_path_factory.mktemp("prune")
    for step, epoch, kind in members:
        made = make(root, step, epoch, run="run-b" if kind == "other" else RUN)
        if kind in ("broken", "torn"):
            (made.path / (STATE if kind == "broken" else MANIFEST)).unlink()
    ordered = sorted(members, reverse=True)
    good = [member for member in ordered if member[2] == "good"]
    last = good[keep - 1] if len(good) >= keep else (-1, -1, "")
    stays = {m[:2] for m in members if m[:2] >= last[:2] or m[2] == "other" or m[0] in pinned}
    removed, rejected = prune(root, RUN, keep, pinned)
    assert {(step, epoch) for step, epoch, _ in generations.listed(root)} == stays
    assert {path.name for path in removed} == {envelope.folder_name(*m[:2]) for m in members if m[:2] not in stays}
    assert [(r.step, r.epoch) for r in rejected] == [m[:2] for m in ordered if m[:2] > last[:2] and m[2] != "good"]
    assert all(name.startswith("g-") for name in os.listdir(root))
    assert prune(root, RUN, keep, pinned)[0] == []


def test_a_removal_that_is_cut_short_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(3):
        make(tmp_path, step)

    def cut_short(folder: Path) -> None:
        (folder / STATE).unlink()
        raise OSError(5, "Input/output error", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut_short)
        with pytest.raises(ResourceError, match="removing an old generation"):
            prune(tmp_path, RUN, keep=1)
    assert sound(tmp_path) == [step for step, *_ in generations.listed(tmp_path)] == [2, 1]
    prune(tmp_path, RUN, keep=1)
    assert os.listdir(tmp_path) == ["g-000000002-e00001"]


def test_prune_leaves_what_it_does_not_know(tmp_path: Path) -> None:
    """A later program's generations, and links that somebody made."""
    for step in range(6):
        make(tmp_path, step)
    _field(version=2)(tmp_path / "g-000000000-e00001")
    _link_folder(tmp_path / "g-000000001-e00001")
    removed, _ = prune(tmp_path, RUN, keep=2)
    assert [path.name for path in removed] == ["g-000000002-e00001", "g-000000003-e00001"]
    assert (tmp_path / "g-000000001-e00001" / STATE).exists()
