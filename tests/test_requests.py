"""Bad requests over a real socket: named ones, and those that schemathesis makes of the server's own document."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from ottava.checkpoint import safetensors
from ottava.models.build import from_config
from ottava.models.published import published, stored
from ottava.supervisor.local import LocalLauncher

from . import conform
from .attacks.requests import BODIES, ENDPOINTS, RAW, Bad
from .test_chat import byte_folder
from .test_engine import CONFIG
from .test_gateway import load_of, start

CASES = [
    pytest.param(path, bad, id=f"{name} at {path}")
    for name, bad in BODIES.items()
    for path in (bad.only or ENDPOINTS)
]  # fmt: skip


def any_text_folder(folder: Path) -> Path:
    """A random model that can be asked any text, in bytes, with a thinking switch; its replies have 96 ids at most."""
    byte_folder(folder)
    config = {**CONFIG, "vocab_size": 320, "max_position_embeddings": 96, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["DeepseekV3ForCausalLM"]}))
    model = from_config(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0 if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5)
            parameter.copy_(parameter.bfloat16())
    safetensors.write(folder / "model.safetensors", [(name, stored(item)) for name, item in published(model).items()])
    return folder


@pytest.fixture(scope="module")
def url(launcher: LocalLauncher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    place = tmp_path_factory.mktemp("attacked")
    process, address = start(launcher, any_text_folder(place / "model"), place)
    yield address
    assert process.alive()
    assert load_of(address) == 0
    process.terminate()
    assert process.wait(60) == 0
    assert "Traceback" not in process.log.read_text()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(
        trust_env=False, base_url=url, timeout=300, event_hooks={"response": [conform.plain_hook]}
    ) as made:
        yield made


def good_body(path: str) -> dict[str, Any]:
    field, value = ENDPOINTS[path]
    return {field: value}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_what_the_bad_requests_are_made_of_is_good(client: httpx.Client, path: str) -> None:
    assert client.post(path, json=good_body(path)).status_code == 200


@pytest.mark.parametrize(("path", "bad"), CASES)
def test_a_bad_body_is_refused_and_the_server_goes_on(client: httpx.Client, path: str, bad: Bad) -> None:
    made = bad.make(good_body(path))
    content = made if isinstance(made, bytes) else json.dumps(made).encode()
    answer = client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code in bad.right, answer.text[:300]
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert len(answer.content) < 2048  # what was sent does not come back
    assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("name", RAW)
def test_bad_messages_are_refused_and_the_server_goes_on(client: httpx.Client, url: str, name: str) -> None:
    message, right = RAW[name]
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(message)
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 ")
    assert int(answer.split()[1]) in right, answer[:300]
    assert client.get("/health").json() == {"status": "ok"}


def test_text_that_looks_like_a_template_is_text(client: httpx.Client) -> None:
    for text in ("{{ 7*7 }}", "{% for x in y %}", "{{ messages.__class__ }}", "${7*7}", "<%= 1 %>"):
        asked = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
        plain = {"messages": [{"role": "user", "content": "x" * len(text)}], "max_tokens": 1}
        one, other = (client.post("/v1/chat/completions", json=body).json() for body in (asked, plain))
        assert one["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]  # a byte is a token here


CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method"
)


def schemathesis(url: str, place: Path, phases: str, *, examples: int, seed: int, least: int) -> None:
    """Run it, and raise with what it found, or where it made fewer than `least` requests.

    A request that fits the schema may still be refused, as where the context is too short for it or fields contradict
    each other; so `positive_data_acceptance` is not among the checks.
    """
    program = Path(sys.executable).with_name("schemathesis")
    assert program.exists() or shutil.which("schemathesis")
    command = [str(program), "run", f"{url}/openapi.json", "--checks", CHECKS, "--max-examples", str(examples)]
    command += ["--phases", phases, "--seed", str(seed), "--generation-database", "none"]
    command += ["--no-color", "--request-timeout", "300", "--suppress-health-check", "all"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    cases = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert cases is not None, done.stdout[-3000:]
    assert int(cases[1]) == int(cases[2]) >= least


def test_schemathesis_finds_nothing(url: str, tmp_path: Path) -> None:
    schemathesis(url, tmp_path, "fuzzing", examples=20, seed=1, least=40)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 5))
def test_schemathesis_finds_nothing_in_many_examples(url: str, tmp_path: Path, seed: int) -> None:
    schemathesis(url, tmp_path, "coverage,fuzzing", examples=150, seed=seed, least=1000)
