"""A certificate: a small signed JSON that says two folders hold the same values, and which ones.

`verify` reads every byte, which takes time; whoever serves the model later needs its word that this was
done, and by whom. The word is an Ed25519 signature over the canonical JSON of everything else in the
certificate. A certificate is checked against the digest of the folder at hand, never against its name, and
against keys that the checker trusts: a signature alone says only that somebody signed.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from ottava import __version__
from ottava.artifact import canonical, write_json
from ottava.checkpoint.digest import values_digest
from ottava.checkpoint.layouts import Weight, weights
from ottava.errors import ArtifactError, Verdict, from_os_error

KIND = "ottava certificate 1"
"""What the document says it is; also what is put before the signed bytes, so that they are nothing else's."""

ALGORITHM = "ed25519"
HOW_TO_CERTIFY = "make one: ottava verify A B --certificate FILE --key KEY"
HOW_TO_MAKE_A_KEY = "make one: ottava keygen FILE"
LIMIT = 64 << 10
"""Bytes of a certificate or of a key file that are read at most."""

Certificate = dict[str, Any]

_HEX = re.compile(r"[0-9a-f]+")


def new_key(path: Path | str) -> str:
    """Make a private key (PEM, PKCS8, readable by its owner alone) and, beside it, `path`.pub; return the public key.

    The public key is 64 hexadecimal digits. Raises ArtifactError where one of the files exists, or path names none.
    """
    path = Path(path)
    if not path.name:
        raise ArtifactError("this names no file for the key", where=path, fix="name one: ottava keygen FILE")
    public = path.with_name(path.name + ".pub")
    key = Ed25519PrivateKey.generate()
    for file in (path, public):
        if os.path.lexists(file):
            raise ArtifactError("this file exists, and a key is never overwritten", where=file, fix="name another file")
    _create(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    _create(public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644)
    return key.public_key().public_bytes_raw().hex()


def _create(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise ArtifactError("this file exists, and a key is never overwritten", where=path) from None
    except OSError as error:
        raise from_os_error(error, "writing a key") from error


def sign(
    result: Mapping[str, Any], key_path: Path | str, *, folders: Sequence[Path | str] = (), model: str | None = None
) -> Certificate:
    """The certificate of a result of `weights.compare`.

    folders: the two that were compared: their layouts are named, and what the conversion.json with this digest says of
    label and KL is passed on as stated; nobody checked it. model: a name; by default the first folder's. Raises Verdict
    where the folders are not identical, ArtifactError where the key cannot be read.
    """
    if result.get("verdict") != "identical" or result.get("digest_a") != result.get("digest_b"):
        raise Verdict("the folders are not identical: there is nothing to certify")
    key = _private_key(Path(key_path))
    paths = [Path(folder) for folder in folders]
    record: dict[str, Any] = next(
        (found for found in map(_record, paths) if found.get("digest") == result["digest_a"]), {}
    )
    kl = record.get("kl")
    body: Certificate = {
        "certificate": KIND,
        "digest": result["digest_a"],
        "tensors": result["tensors"],
        "model": model or (paths[0].resolve().name if paths else "unnamed"),
        "stated_label": record.get("label") if isinstance(record.get("label"), str) else None,
        "stated_kl": float(kl) if isinstance(kl, int | float) and math.isfinite(kl) else None,
        "layouts": [layout_of(path) for path in paths],
        "software": f"ottava {__version__}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "algorithm": ALGORITHM,
        "public_key": key.public_key().public_bytes_raw().hex(),
    }
    out = {**body, "signature": key.sign(_signed_bytes(body)).hex()}
    _validate(out, "the new certificate")
    return out


def write(path: Path | str, certificate: Certificate) -> None:
    """Write a certificate, complete or not at all."""
    try:
        write_json(Path(path), certificate)
    except OSError as error:
        raise from_os_error(error, "writing a certificate") from error


def read(path: Path | str) -> Certificate:
    """Read a certificate; its signature is not looked at. Raises ArtifactError where it is none."""
    path = Path(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            _reject(path, f"it names {Counter(name for name, _ in pairs).most_common(1)[0][0]!r} twice")
        return dict(pairs)

    def constant(name: str) -> NoReturn:
        _reject(path, f"it holds {name}, which is no JSON")

    try:
        found = json.loads(_read_small(path).decode(), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError):
        _reject(path, "it is no JSON")
    return _validate(found, path)


def check(
    certificate: Certificate | Path | str,
    subject: Path | str,
    trusted_keys: Sequence[Path | str] | None,
    *,
    workers: int = 1,
) -> Certificate:
    """Check a certificate, and return it.

    certificate: what `read` returns, or its file. subject: a model folder as a Path (every byte of it is read), or a
    digest in hex as a str. trusted_keys: public keys, each 64 hexadecimal digits or a PEM file; None: any key will do,
    so that only accidents are found. Raises Verdict where the signature is wrong, its key is not trusted, or the digest
    is another; ArtifactError where the certificate or a key cannot be read, CheckpointError where the folder cannot.
    """
    where = "the certificate" if isinstance(certificate, dict) else Path(certificate)
    found = _validate(certificate, where) if isinstance(certificate, dict) else read(certificate)
    trusted = None if trusted_keys is None else {_public_key(key) for key in trusted_keys}
    body = {name: value for name, value in found.items() if name != "signature"}
    key = bytes.fromhex(found["public_key"])
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(bytes.fromhex(found["signature"]), _signed_bytes(body))
    except (InvalidSignature, ValueError):
        what = "the certificate was altered: its signature does not fit"
        raise Verdict(what, where=where, fix=f"fetch it again, or {HOW_TO_CERTIFY}") from None
    if trusted is not None and key not in trusted:
        what = f"the certificate is signed with a key that is not trusted: {found['public_key']}"
        raise Verdict(what, where=where, fix="trust the key, or have the model verified by somebody who is trusted")
    digest = values_digest(subject, workers) if isinstance(subject, Path) else subject
    if digest != found["digest"]:
        what = f"the certificate is for other values: {found['digest']}, here {digest}"
        raise Verdict(what, where=subject, fix="verify this folder and have a certificate of its own")
    return found


def layout_of(folder: Path) -> str:
    """The layout in which a folder's linear weights are stored; "mixed" where there are several."""
    kinds = {_layout(weight) for weight in weights(folder).values()} - {"bf16"}
    return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "bf16"


def _layout(weight: Weight) -> str:
    if weight.scale is None:
        return "bf16"
    if weight.packed:
        return "fp4"
    return {"F8_E8M0": "e8m0", "U8": "mxfp8"}.get(weight.scale.dtype, "deepseek")


def _signed_bytes(body: Certificate) -> bytes:
    return KIND.encode() + b"\n" + canonical(body)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def _is_hex(value: Any, digits: int) -> bool:
    return isinstance(value, str) and len(value) == digits and _HEX.fullmatch(value) is not None


FIELDS: dict[str, Callable[[Any], bool]] = {
    "certificate": lambda v: v == KIND,
    "digest": lambda v: _is_hex(v, 64),
    "tensors": lambda v: type(v) is int and 0 <= v < 2**53,
    "model": _is_text,
    "stated_label": lambda v: v is None or _is_text(v),
    "stated_kl": lambda v: v is None or (type(v) is float and math.isfinite(v)),
    "layouts": lambda v: isinstance(v, list) and len(v) <= 2 and all(_is_text(one) for one in v),
    "software": _is_text,
    "time": lambda v: isinstance(v, str) and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", v, re.ASCII) is not None,
    "algorithm": lambda v: v == ALGORITHM,
    "public_key": lambda v: _is_hex(v, 64),
    "signature": lambda v: _is_hex(v, 128),
}
"""The fields of a certificate, all of them, and what each may hold."""


def _validate(found: Any, where: Path | str) -> Certificate:
    if not isinstance(found, dict):
        _reject(where, "it is no mapping")
    for name in FIELDS.keys() - found.keys():
        _reject(where, f"it has no {name!r}")
    for name, value in found.items():
        if name not in FIELDS:
            _reject(where, f"it has a field that none has: {str(name)[:40]!r}")
        if not FIELDS[name](value):
            _reject(where, f"its {name!r} is {str(value)[:80]!r}")
    return dict(found)


def _reject(where: Path | str, what: str) -> NoReturn:
    raise ArtifactError(f"this is no certificate: {what}", where=where, fix=HOW_TO_CERTIFY)


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "conversion.json"
    try:
        found = json.loads(_read_small(path)) if path.is_file() else None
    except (ArtifactError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_small(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT + 1)
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror}", where=path, fix="check the path") from None
    if len(data) > LIMIT:
        raise ArtifactError(f"larger than {LIMIT} bytes", where=path, fix="name a certificate or a key")
    return data


def _private_key(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(_read_small(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ArtifactError("no Ed25519 private key in PEM without a password", where=path, fix=HOW_TO_MAKE_A_KEY)
    return key


def _public_key(key: Path | str) -> bytes:
    """The 32 bytes of a public key, given in hex or as a PEM file."""
    if _is_hex(key, 64):
        return bytes.fromhex(str(key))
    try:
        found = load_pem_public_key(_read_small(Path(key)))
    except (ValueError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, Ed25519PublicKey):
        raise ArtifactError("no Ed25519 public key in PEM", where=key, fix="name the .pub file beside the key")
    return found.public_bytes_raw()
