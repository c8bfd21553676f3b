"""A backend's port on a network answers to the key of its start, and to nobody else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from ottava.gateway import door, wire
from ottava.gateway.door import Address, Door

KEY = "a key of one start"


@asynccontextmanager
async def opened() -> AsyncIterator[tuple[Address, list[bytes]]]:
    """The address of a door, and the questions that came through it."""
    one, asked = Door("127.0.0.1", KEY), list[bytes]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (line := await one.question(reader, writer)) is not None:
            asked.append(line)
            writer.write(wire.line({"heard": len(line)}))
        writer.close()

    server, told = await one.listen(serve)
    async with server:
        yield Address(key=KEY, **json.loads(told)), asked


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


async def raw(address: Address, said: bytes, end: bool = False) -> bytes:
    """What is answered to these bytes, up to the end."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(said)
    if end:
        writer.write_eof()
    try:
        return await asyncio.wait_for(reader.read(), 30)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize("line", [b"{}\n", b"x" * 200_000 + b"\n"])
def test_a_question_with_the_key_is_answered(line: bytes) -> None:
    async def main() -> None:
        async with opened() as (address, asked):
            reader, writer = await address.connect()
            writer.write(address.question(line))
            await address.greeted(reader)
            assert await reader.readline() == wire.line({"heard": len(line)})
            assert asked == [line]
            writer.close()

    run(main())


@pytest.mark.parametrize("key", ["", "a key of one star", KEY + "x", "A key of one start", "é"])
def test_another_key_is_sent_away(key: str) -> None:
    async def main() -> None:
        async with opened() as (address, asked):
            head = {"authorization": f"Bearer {key}".encode()} if key else {}
            async with httpx.AsyncClient(trust_env=False) as client:  # somebody else's HTTP
                said = await client.post(f"http://{address.host}:{address.port}/", content=b"{}\n", headers=head)
            assert (said.status_code, said.json()["error"]["message"]) == (401, "401 Unauthorized")
            stranger = Address(host=address.host, port=address.port, key=key or "none")
            reader, writer = await stranger.connect()
            writer.write(stranger.question(b"{}\n"))
            with pytest.raises(ConnectionError, match="401"):
                await stranger.greeted(reader)
            writer.close()
            assert asked == []

    run(main())


AUTH = f"Authorization: Bearer {KEY}\r\n".encode()


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b"POST / HTTP/1.1\r\n" + AUTH + b"\r\n", b"HTTP/1.1 400"),
        (b"POST / HTTP/1.1\r\n" + AUTH + b"Content-Length: 999999999\r\n\r\n", b"HTTP/1.1 400"),
        (b"POST / HTTP/1.1\r\n" + AUTH + b"Content-Length: -1\r\n\r\n", b"HTTP/1.1 400"),
        (b"POST / HTTP/1.1\r\nX: y" * 4000 + b"\r\n\r\n", b""),
        (b"\0" * 100_000, b""),
        (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 401"),
    ],
)
def test_what_is_no_question_is_not_read(said: bytes, answer: bytes) -> None:
    async def main() -> None:
        async with opened() as (address, asked):
            assert (await raw(address, said)).startswith(answer)
            assert (await raw(address, said, end=True)).startswith(answer)
            assert asked == []

    run(main())


def test_half_a_question_is_none() -> None:
    async def main() -> None:
        async with opened() as (address, asked):
            await raw(address, address.question(b"a whole line\n")[:-5], end=True)
            assert asked == []

    run(main())


def test_many_who_say_nothing_do_not_keep_the_gateway_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "STRANGERS", 3)
    monkeypatch.setattr(door, "STRANGER_SECONDS", 600.0)

    async def main() -> None:
        async with opened() as (address, asked):
            silent = []
            for _ in range(4):
                silent.append(await asyncio.open_connection(address.host, address.port))
                await asyncio.sleep(0)
            assert await asyncio.wait_for(silent[0][0].read(), 30) == b""  # the fourth has closed the first
            assert not any(reader.at_eof() for reader, _ in silent[1:])
            for _ in range(10):  # whoever shows the key is let in, however many say nothing
                assert (await raw(address, address.question(b"{}\n"))).startswith(b"HTTP/1.1 200")
            assert asked == [b"{}\n"] * 10
            for _, writer in silent:
                writer.close()

    run(main())


def test_a_stranger_who_says_nothing_is_sent_away_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "STRANGER_SECONDS", 0.1)

    async def main() -> None:
        async with opened() as (address, asked):
            assert await raw(address, b"") == b""
            assert await raw(address, address.question(b"{}\n")[:20]) == b""
            assert asked == []

    run(main())


def test_a_door_without_a_key_is_none() -> None:
    with pytest.raises(ValueError, match="open to everybody"):
        Door("127.0.0.1", "")
    assert KEY not in repr(Door("127.0.0.1", KEY)) + repr(Address(key=KEY))
