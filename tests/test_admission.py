"""Who is let in, how much of it, and for how long: keys, limits, deadlines, slow and silent clients."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from ottava.engine.session import Engine
from ottava.errors import DataError
from ottava.gateway import patience
from ottava.gateway.app import Gateway
from ottava.gateway.keys import VARIABLE, Keys, Turnstile
from ottava.gateway.schema import ApiError
from ottava.gateway.server import _Server, serve

from .test_engine import tiny_chat
from .test_gateway import NAME, URL, USER, post, session, student

KEY = "sk-a-long-secret-of-somebody"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def keys_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keys"
    path.write_text(text)
    return path


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{'x' * 16},{'y' * 20}")
    keys = Keys.read(keys_file(tmp_path, f"# who\nann {digest(KEY)}\n\nbob {digest('b')}  # his\n"))
    assert set(keys.digests) == {"ann", "bob", "environment-1", "environment-2"}
    assert VARIABLE not in __import__("os").environ  # a backend must not inherit them
    assert keys.owner(f"Bearer {KEY}") == keys.owner(f"bearer  {KEY}") == "ann"
    assert keys.owner(f"Bearer {'y' * 20}") == "environment-2"
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        KEY,
        f"Basic {KEY}",
        f"Bearer {KEY}x",
        f"Bearer {digest(KEY)}",
        "Bearer \udcff",
    ):
        with pytest.raises(ApiError) as caught:
            keys.owner(wrong)
        assert caught.value.status == 401
        assert KEY not in caught.value.message
    assert Keys().owner(None) == "anybody"


@pytest.mark.parametrize(
    "text", ["ann", "ann xyz", f"ann {digest(KEY)} more", f"a {digest('1')}\na {digest('2')}", "", "# none"]
)
def test_what_is_no_file_of_keys_is_said(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError) as caught:
        Keys.read(keys_file(tmp_path, text))
    assert caught.value.fix
    assert "xyz" not in caught.value.render()  # it may be a key


def test_a_short_key_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "secret")
    with pytest.raises(DataError) as caught:
        Keys.read(None)
    assert "secret" not in caught.value.render()


def test_limits_of_one_owner() -> None:
    now = [0.0]
    gate = Turnstile(at_once=2, a_minute=6, clock=lambda: now[0])
    gate.enter("a")
    gate.enter("a")
    with pytest.raises(ApiError) as caught:
        gate.enter("a")
    assert (caught.value.status, caught.value.retry) == (429, 1)
    gate.enter("b")  # nobody else's limit
    for _ in range(4):
        gate.leave("a")
        gate.enter("a")
    gate.leave("a")
    with pytest.raises(ApiError, match="6 requests a minute") as caught:
        gate.enter("a")
    assert caught.value.retry == 10  # one comes back every ten seconds
    now[0] = 9.9
    with pytest.raises(ApiError) as caught:
        gate.enter("a")
    assert caught.value.retry == 1
    now[0] = 10.0
    gate.enter("a")


def test_every_path_but_health_wants_the_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(student(), tiny_chat())
    keys = Keys.read(keys_file(tmp_path, f"ann {digest(KEY)}"))
    gateway = Gateway(engine, NAME, keys=keys, turnstile=Turnstile(at_once=1, a_minute=3))

    async def work(client: httpx.AsyncClient) -> None:
        paths = [("POST", URL), ("GET", "/v1/models"), ("GET", "/metrics")]
        for method, path in paths:
            refused = await client.request(method, path, json={"messages": USER} if method == "POST" else None)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert refused.json()["error"]["type"] == "authentication_error"
        assert (await client.get("/health")).status_code == 200
        client.headers["authorization"] = f"Bearer {KEY}"
        body = {"messages": USER}
        codes = sorted([(await client.post(URL, json=body)).status_code for _ in range(3)])
        assert codes == [200, 200, 200]
        late = await client.post(URL, json=body)
        assert (late.status_code, late.json()["error"]["type"]) == (429, "rate_limit_error")
        assert 1 <= int(late.headers["retry-after"]) <= 20
        assert (await client.get("/v1/models")).status_code == 200
        assert KEY not in (await client.get("/metrics")).text

    session(gateway, work)
    assert (gateway.running, gateway.turnstile._inside) == (0, {})
    assert KEY not in caplog.text
    engine.close()


def test_more_than_allowed_at_once() -> None:
    engine = Engine(student(delay=0.02), tiny_chat())
    gateway = Gateway(engine, NAME, turnstile=Turnstile(at_once=2))

    async def work(client: httpx.AsyncClient) -> list[int]:
        answers = await asyncio.gather(*(client.post(URL, json={"messages": USER, "stream": n < 2}) for n in range(4)))
        return sorted(answer.status_code for answer in answers)

    assert session(gateway, work) == [200, 200, 429, 429]
    assert gateway.turnstile._inside == {}
    engine.close()


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_has_a_deadline(stream: bool) -> None:
    model = student(delay=0.01)
    engine = Engine(model, tiny_chat())
    gateway = Gateway(engine, NAME, deadline_s=0.2)
    body = {"messages": [{"role": "user", "content": "1 a +1 ="}], "max_tokens": 400, "stream": stream}
    response = post(gateway, body)
    error = json.loads(response.text.split("data: ")[-1])["error"]
    assert (response.status_code, error["code"]) == (200 if stream else 504, "deadline")
    deadline = time.monotonic() + 60
    while engine.load_now:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert model.steps < 100
    engine.close()


def test_slow_and_silent_clients_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that trickles in, none at all, one too many; a good client is served meanwhile."""
    monkeypatch.setattr(patience, "HEADER_SECONDS", 1.0)
    monkeypatch.setattr("ottava.gateway.app.BODY_SECONDS", 1.0)
    engine = Engine(student(), tiny_chat())
    gateway = Gateway(engine, NAME)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = _Server(gateway, listener, {"port": port})

    async def ends(first: bytes, drip: bytes) -> tuple[float, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began, said = time.monotonic(), b""
        writer.write(first)
        while True:
            try:
                async with asyncio.timeout(0.2):
                    got = await reader.read(4096)
            except TimeoutError:
                writer.write(drip)
                assert time.monotonic() - began < 30
                continue
            except ConnectionError:
                got = b""
            said += got
            if not got:
                writer.close()
                return time.monotonic() - began, said

    async def main() -> Any:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        body = json.dumps({"messages": USER}).encode()
        head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        whole = head.encode() + b"\r\n" + body
        slow = [
            ends(b"", b""),
            ends(b"POST ", b"x"),
            ends(head.encode(), b"X-A: b\r\n"),
            ends(head.encode() + b"\r\n", b" "),
            ends(whole, b"GET /he"[:1]),  # the header of the second request trickles in
        ]
        results = await asyncio.gather(*slow)
        async with httpx.AsyncClient(trust_env=False) as client:
            good = await client.post(f"http://127.0.0.1:{port}{URL}", json={"messages": USER}, timeout=60)
            patience_limit = patience.CONNECTIONS
            patience.CONNECTIONS = 1
            crowded = await asyncio.open_connection("127.0.0.1", port)
            assert await asyncio.wait_for(crowded[0].read(), 10) == b""
            patience.CONNECTIONS = patience_limit
        server.handle_exit(15, None)
        await serving
        return results, good

    results, good = asyncio.run(main())
    assert good.status_code == 200
    assert all(seconds < 20 for seconds, _ in results)
    assert [said for _, said in results[:3]] == [b"", b"", b""]
    assert b" 408 " in results[3][1]
    assert b" 200 " in results[4][1]
    engine.close()


def test_white_space_around_the_environments_keys_is_no_part_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{'x' * 16}, {'y' * 20}\n")
    keys = Keys.read(None)
    assert {keys.owner(f"Bearer {key}") for key in ("x" * 16, "y" * 20)} == {"environment-1", "environment-2"}


@pytest.mark.parametrize(
    ("change", "where"),
    [({"host": ""}, "--host"), ({"policy": "nearest"}, "--policy"), ({"reference": "other"}, "--reference")],
)
def test_an_option_is_refused_also_where_one_engine_would_not_use_it(
    change: dict[str, Any], where: str, tmp_path: Path
) -> None:
    """An empty host would be every address of the machine; a misspelt policy was taken without a word."""
    with pytest.raises(DataError) as caught:
        serve({"model": str(tmp_path), "port": 0, **change})
    assert caught.value.where == where
