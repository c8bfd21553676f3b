"""Artifacts: complete or not at all, and every altered byte is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ottava import artifact
from ottava.artifact import Artifact, commit, digest_of, load
from ottava.errors import ArtifactError, ResourceError


def make(folder: Path, name: str = "a", **files: bytes) -> Artifact:
    scratch = folder / "scratch"
    (scratch / "sub").mkdir(parents=True)
    for file, data in {"one": b"1", "sub/two": b"22", **files}.items():
        (scratch / file).write_bytes(data)
    return commit(scratch, folder / name, stage="label", key="k", summary={"x": 1})


def test_round_trip(tmp_path: Path) -> None:
    made = make(tmp_path)
    found = load(made.path)
    assert found.manifest == made.manifest
    assert found.digest == made.digest
    assert found.summary == {"x": 1}
    assert found.file("sub/two").read_bytes() == b"22"
    assert found.file("sub").is_dir()
    with pytest.raises(ArtifactError, match="has no 'three'"):
        found.file("three")


def test_digest_depends_on_content_alone(tmp_path: Path) -> None:
    first, second = make(tmp_path, "a"), make(tmp_path, "b")
    assert first.digest == second.digest
    assert make(tmp_path, "c", three=b"3").digest != first.digest


@settings(deadline=None, max_examples=30)
@given(where=st.sampled_from(["one", "sub/two"]), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, where: str, bit: int) -> None:
    made = make(tmp_path_factory.mktemp("x"))
    path = made.path / where
    data = bytearray(path.read_bytes())
    data[0] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="altered"):
        load(made.path)


def test_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = make(Path())
    (made.path / "one").unlink()
    with pytest.raises(ArtifactError) as missing:
        load(made.path)
    assert missing.value.render() == (
        "error: a file of the artifact is missing\n  where: a/one\n"
        "  mend:  delete a and run again: the stage will be redone"
    )
    manifest = json.loads((made.path / "manifest.json").read_text())
    manifest["files"]["one"]["bytes"] = 2
    (made.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="does not match its own digest"):
        load(made.path)
    (made.path / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load(made.path)
    (made.path / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="no manifest"):
        load(made.path)


def test_a_full_disk_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(artifact, "fsync", full)
    with pytest.raises(ResourceError, match="disk full while publishing a"):
        make(tmp_path)
    assert not (tmp_path / "a").exists()


@given(st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=5))
def test_digest_ignores_the_order_of_keys(data: dict[str, object]) -> None:
    assert digest_of(data) == digest_of(dict(reversed(data.items())))
