"""Certificates: what is signed is what is checked, and nothing else passes."""

from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ottava.cli import app
from ottava.errors import ArtifactError, CheckpointError, OttavaError, Verdict
from ottava.verify import certificate
from ottava.verify.certificate import FIELDS, Certificate, check, layout_of, new_key, read, sign, write
from ottava.verify.weights import compare
from tests.attacks import folders
from tests.attacks.folders import LAYOUTS, save, written

DIGEST = "0" * 60 + "beef"
IDENTICAL = {"verdict": "identical", "digest_a": DIGEST, "digest_b": DIGEST, "tensors": 3, "first_bad": None}


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("key") / "key.pem"
    return path, new_key(path)


@pytest.fixture
def good(key: tuple[Path, str]) -> Certificate:
    return sign(IDENTICAL, key[0], model="tiny")


# Keys.


def test_a_new_key_is_its_owners_alone_and_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    public = new_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_bytes()
    assert text.startswith(b"-----BEGIN PRIVATE KEY-----")
    loaded = load_pem_private_key(text, None)
    assert isinstance(loaded, Ed25519PrivateKey)
    assert loaded.public_key().public_bytes_raw().hex() == public
    with pytest.raises(ArtifactError, match="never overwritten"):
        new_key(path)
    (tmp_path / "other.pem.pub").write_text("taken")
    with pytest.raises(ArtifactError, match="never overwritten"):
        new_key(tmp_path / "other.pem")
    (tmp_path / "link.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="never overwritten"):
        new_key(tmp_path / "link.pem")
    assert path.read_bytes() == text
    assert not (tmp_path / "other.pem").exists()
    assert not (tmp_path / "elsewhere").exists()
    assert new_key(tmp_path / "second.pem") != public


def test_a_key_in_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OttavaError, match="no such file"):
        new_key(tmp_path / "nowhere" / "key.pem")


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_a_key_without_a_name(name: str) -> None:
    with pytest.raises(ArtifactError, match="ottava keygen FILE"):
        new_key(name)


def commands(text: str) -> list[str]:
    """The command and options that a message names, as the command line's own help lists them."""
    [line] = [line for line in text.splitlines() if "ottava " in line]
    words = line.split("ottava ")[1].split()
    shown = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert shown.exit_code == 0
    assert all(word in shown.output for word in words if word.startswith("--"))
    return words


def test_what_is_advised_exists(tmp_path: Path) -> None:
    (tmp_path / "junk").write_text("{}")
    with pytest.raises(ArtifactError) as caught:
        read(tmp_path / "junk")
    assert commands(caught.value.render()) == ["verify", "A", "B", "--certificate", "FILE", "--key", "KEY"]
    with pytest.raises(ArtifactError) as caught:
        sign(IDENTICAL, tmp_path / "junk")
    assert commands(caught.value.render()) == ["keygen", "FILE"]


def other_keys() -> dict[str, bytes]:
    rsa, ours = generate_private_key(65537, 2048), Ed25519PrivateKey.generate()
    pem, pkcs8 = Encoding.PEM, PrivateFormat.PKCS8
    return {
        "rsa": rsa.private_bytes(pem, pkcs8, NoEncryption()),
        "encrypted": ours.private_bytes(pem, pkcs8, BestAvailableEncryption(b"secret")),
        "public": ours.public_key().public_bytes(pem, PublicFormat.SubjectPublicKeyInfo),
        "text": b"not a key",
        "empty": b"",
        "huge": b"-----BEGIN PRIVATE KEY-----\n" + b"A" * 200_000,
    }


def test_keys_that_are_none(tmp_path: Path, good: Certificate) -> None:
    for name, data in other_keys().items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ArtifactError) as caught:
            sign(IDENTICAL, tmp_path / name)
        assert "secret" not in caught.value.render()
        if name != "public":
            with pytest.raises(ArtifactError):
                check(good, DIGEST, [tmp_path / name])
    for missing in (tmp_path / "missing", tmp_path):
        with pytest.raises(ArtifactError):
            sign(IDENTICAL, missing)
        with pytest.raises(ArtifactError):
            check(good, DIGEST, [missing])


def test_nothing_of_a_private_key_is_in_a_certificate_or_a_message(key: tuple[Path, str], good: Certificate) -> None:
    lines = key[0].read_text().splitlines()[1:-1]
    secret = base64.b64decode("".join(lines))[-32:]
    text = json.dumps(good)
    assert secret.hex() not in text
    assert base64.b64encode(secret).decode() not in text


# What is signed.


def test_a_certificate_says_what_was_verified(key: tuple[Path, str], tmp_path: Path) -> None:
    weights = folders.model("llama")
    a, b = (save(tmp_path / layout, written(weights, layout)) for layout in ("e8m0", "bf16"))
    result = compare(a, b, workers=1)
    (b / "conversion.json").write_text(json.dumps({"digest": "other", "label": "wrong", "kl": 9.0}))
    (a / "conversion.json").write_text(json.dumps({"digest": result["digest_a"], "label": "rounded", "kl": 0.0177}))
    made = sign(result, key[0], folders=(a, b), model="tiny-llama")
    assert made["digest"] == result["digest_a"] == result["digest_b"]
    assert {name: made[name] for name in ("tensors", "model", "stated_label", "stated_kl", "layouts")} == {
        "tensors": len(weights), "model": "tiny-llama", "stated_label": "rounded", "stated_kl": 0.0177,
        "layouts": ["e8m0", "bf16"],
    }  # fmt: skip
    assert made["software"].startswith("ottava ")
    write(tmp_path / "c.json", made)
    assert read(tmp_path / "c.json") == made
    for subject in (a, b, result["digest_a"]):
        assert check(tmp_path / "c.json", subject, [key[1]]) == made
    weights["model.norm.weight"].values[3] *= 2
    with pytest.raises(Verdict, match="other values"):
        check(made, save(tmp_path / "bad", written(weights, "deepseek")), [key[1]])
    with pytest.raises(CheckpointError):
        check(made, tmp_path / "nowhere", [key[1]])


def test_the_signature_is_ed25519_over_the_canonical_json(key: tuple[Path, str], good: Certificate) -> None:
    """A second implementation of what the documentation says is signed."""
    body = {name: good[name] for name in sorted(good) if name != "signature"}
    signed = b"ottava certificate 1\n" + json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    private = load_pem_private_key(key[0].read_bytes(), None)
    assert isinstance(private, Ed25519PrivateKey)
    assert private.sign(signed).hex() == good["signature"]


def test_a_record_that_is_no_file_is_not_waited_for(key: tuple[Path, str], tmp_path: Path) -> None:
    folder = save(tmp_path / "a", written(folders.model("llama"), "e8m0"))
    os.mkfifo(folder / "conversion.json")
    assert sign(IDENTICAL, key[0], folders=[folder])["stated_label"] is None


def test_layouts_are_named(tmp_path: Path) -> None:
    weights = folders.model("qwen3_moe")
    for layout in LAYOUTS:
        assert layout_of(save(tmp_path / layout, written(weights, layout))) == layout
    mixed = written(weights, "e8m0")
    mixed.stored |= {name: item for name, item in written(weights, "deepseek").stored.items() if "layers.1" in name}
    assert layout_of(save(tmp_path / "mixed", mixed)) == "mixed"


@pytest.mark.parametrize("change", [{"verdict": "different"}, {"digest_b": "1" * 64}, {"verdict": None}])
def test_only_identical_folders_are_certified(change: dict[str, Any], key: tuple[Path, str]) -> None:
    with pytest.raises(Verdict, match="nothing to certify"):
        sign({**IDENTICAL, **change}, key[0])


@pytest.mark.parametrize(("kl", "kept"), [(float("nan"), None), ("low", None), (True, 1.0), (2, 2.0), (None, None)])
def test_divergence_on_record(kl: Any, kept: float | None, key: tuple[Path, str], tmp_path: Path) -> None:
    folder = save(tmp_path / "m", written(folders.model("llama"), "bf16"))
    result = compare(folder, folder, workers=1)
    (folder / "conversion.json").write_text(json.dumps({"digest": result["digest_a"], "kl": kl}))
    assert sign(result, key[0], folders=(folder, folder))["stated_kl"] == kept


# What is refused.

OTHER: dict[str, Any] = {
    "digest": "1" * 64, "tensors": 4, "model": "another", "stated_label": "on-grid", "stated_kl": 0.5,
    "layouts": ["bf16"],
    "software": "ottava 99", "time": "2020-01-01T00:00:00Z", "public_key": "ab" * 32, "signature": "cd" * 64,
}  # fmt: skip


@pytest.mark.parametrize("field", sorted(OTHER))
def test_any_field_that_was_changed_breaks_the_signature(field: str, good: Certificate, key: tuple[Path, str]) -> None:
    assert set(OTHER) == set(FIELDS) - {"certificate", "algorithm"}
    with pytest.raises(Verdict, match="altered") as caught:
        check({**good, field: OTHER[field]}, DIGEST, [key[1]])
    assert caught.value.exit_code == 1
    assert "ottava verify A B --certificate" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("certificate", "ottava certificate 2"), ("algorithm", "none"), ("algorithm", "rsa"), ("algorithm", "ED25519"),
        ("digest", "0" * 63), ("digest", DIGEST.upper()), ("digest", None), ("digest", DIGEST + "\n"),
        ("tensors", -1), ("tensors", True), ("tensors", 3.0), ("tensors", 10**30), ("model", ""), ("model", "a\nb"),
        ("model", "x" * 201), ("model", "\ud800"), ("model", "\x1b[2J"), ("stated_label", 3), ("stated_kl", "0.1"),
        ("stated_kl", True),
        ("stated_kl", float("nan")), ("layouts", "e8m0"), ("layouts", ["a", "b", "c"]), ("layouts", [3]),
        ("layouts", [[]]),
        ("time", "yesterday"), ("time", "٢٠٢٠-01-01T00:00:00Z"), ("public_key", "zz" * 32), ("public_key", ""),
        ("signature", ""), ("signature", "cd" * 65), ("signature", None),
    ],
)  # fmt: skip
def test_fields_of_the_wrong_kind_are_no_certificate(field: str, value: Any, good: Certificate) -> None:
    with pytest.raises(ArtifactError, match="no certificate") as caught:
        check({**good, field: value}, DIGEST, None)
    assert caught.value.exit_code == 2


def test_fields_missing_or_added(good: Certificate) -> None:
    for field in good:
        with pytest.raises(ArtifactError, match=f"has no '{field}'"):
            check({name: value for name, value in good.items() if name != field}, DIGEST, None)
    for extra in ("note", "Digest", "__proto__", "digest "):
        with pytest.raises(ArtifactError, match="a field that none has"):
            check({**good, extra: DIGEST}, DIGEST, None)


def test_another_key(good: Certificate, key: tuple[Path, str], tmp_path: Path) -> None:
    other = new_key(tmp_path / "other.pem")
    forged = sign(IDENTICAL, tmp_path / "other.pem", model="tiny")
    assert check(forged, DIGEST, None) == forged
    for trusted in ([key[1]], [key[0].with_name("key.pem.pub")], []):
        with pytest.raises(Verdict, match="not trusted"):
            check(forged, DIGEST, trusted)
    with pytest.raises(Verdict, match="altered"):  # their name under our signature
        check({**forged, "public_key": key[1]}, DIGEST, [key[1]])
    with pytest.raises(Verdict, match="altered"):
        check({**good, "signature": forged["signature"]}, DIGEST, [key[1]])
    assert check(good, DIGEST, [other, key[0].with_name("key.pem.pub")]) == good


def test_a_signature_of_the_same_bytes_in_another_context(key: tuple[Path, str], good: Certificate) -> None:
    """What the key signed elsewhere, without the heading, is no certificate."""
    private = load_pem_private_key(key[0].read_bytes(), None)
    assert isinstance(private, Ed25519PrivateKey)
    body = {name: value for name, value in good.items() if name != "signature"}
    with pytest.raises(Verdict, match="altered"):
        check({**good, "signature": private.sign(certificate.canonical(body)).hex()}, DIGEST, [key[1]])


def test_keys_of_small_order_sign_nothing(good: Certificate) -> None:
    """The identity as a public key accepts R = identity, S = 0 for any text in lax implementations."""
    identity = "01" + "00" * 31
    with pytest.raises(Verdict):
        check({**good, "public_key": identity, "signature": identity + "00" * 32}, "1" * 64, None)


def files() -> dict[str, Callable[[str], bytes]]:
    return {
        "empty": lambda text: b"",
        "truncated": lambda text: text[:-20].encode(),
        "binary": lambda text: bytes(range(256)),
        "utf16": lambda text: text.encode("utf-16"),
        "huge": lambda text: text.encode() + b" " * 100_000,
        "deep": lambda text: b"[" * 50_000,
        "list": lambda text: b"[" + text.encode() + b"]",
        "twice": lambda text: text.replace('"tensors": 3', '"tensors": 3, "tensors": 3').encode(),
        "nan": lambda text: text.replace('"stated_kl": null', '"stated_kl": NaN').encode(),
        "infinity": lambda text: text.replace('"stated_kl": null', '"stated_kl": 1e999').encode(),
        "long number": lambda text: text.replace('"tensors": 3', '"tensors": ' + "9" * 10_000).encode(),
        "surrogate": lambda text: text.replace('"tiny"', '"\\ud800"').encode(),
    }


@pytest.mark.parametrize("name", files())
def test_files_that_hold_no_certificate(name: str, good: Certificate, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    write(path, good)
    text = path.read_text()
    changed = files()[name](text)
    assert changed != text.encode()
    path.write_bytes(changed)
    with pytest.raises(ArtifactError) as caught:
        check(path, DIGEST, None)
    assert caught.value.exit_code == 2
    assert len(caught.value.render()) < 1000


def test_a_file_that_is_not_there(tmp_path: Path, good: Certificate) -> None:
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(ArtifactError):
            read(path)
    with pytest.raises(OttavaError):
        write(tmp_path / "nowhere" / "c.json", good)


@given(data=st.data())
def test_one_damaged_byte_never_passes(data: st.DataObject, key: tuple[Path, str], tmp_path_factory: Any) -> None:
    """Every byte of the file is signed, or changes nothing that it says."""
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    made = sign(IDENTICAL, key[0], model="tiny")
    write(path, made)
    text = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(text)
    try:
        passed = check(path, DIGEST, [key[1]])
    except (Verdict, ArtifactError):
        return
    assert passed == made
