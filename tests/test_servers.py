"""Streams under the servers that are used, and over the versions of HTTP that they speak."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from conftest import unavailable
from pymongo import MongoClient
from test_shutdown import GUNICORN, HYPERCORN, UVICORN
from test_shutdown import run as run  # noqa: PLC0414 (a fixture)

from data_bridge.testing import Event, EventDecoder, Mark, events

SERVERS = pytest.mark.parametrize(
    "command",
    [
        (*UVICORN, "--http", "h11", "--loop", "asyncio"),
        (*UVICORN, "--http", "httptools", "--loop", "uvloop"),
        GUNICORN,
        (*HYPERCORN, "--workers", "0"),
    ],
    ids=["uvicorn h11", "uvicorn httptools", "gunicorn", "hypercorn"],
)


@SERVERS
async def test_a_stream_without_a_word_has_its_headers_at_once(
    run: Callable[..., Any], command: tuple[str, ...]
) -> None:
    server = await run(*command)
    async with httpx.AsyncClient(timeout=20) as client:
        async with client.stream("GET", f"{server.url}/quiet") as response:
            assert response.headers["content-type"] == "text/event-stream"


@SERVERS
async def test_changes_arrive_and_a_client_resumes(
    run: Callable[..., Any],
    database_uri: str,
    database_name: str,
    mongo: MongoClient[Any],
    command: tuple[str, ...],
) -> None:
    server = await run(*command, DATABASE_URI=database_uri)
    orders = mongo[database_name]["orders"]
    last = ""
    async with httpx.AsyncClient(timeout=20) as client:
        for number in range(3):
            headers = {"Last-Event-ID": last}
            async with client.stream("GET", f"{server.url}/orders", headers=headers) as response:
                stream = events(response)
                async for item in stream.everything():
                    assert isinstance(item, Mark)
                    break
                if number == 0:
                    orders.insert_many([{"status": "open", "number": n} for n in range(3)])
                event = await anext(stream)
                assert json.loads(event.data)["document"]["number"] == number
                last = event.id
        refused = await client.get(f"{server.url}/orders", headers={"Last-Event-ID": "nonsense"})
        assert refused.status_code == 400


async def lines(process: asyncio.subprocess.Process) -> AsyncIterator[bytes]:
    assert process.stdout is not None
    while line := await process.stdout.readline():
        yield line


async def test_over_http_2_a_stream_flows_and_ends_properly(
    run: Callable[..., Any], database_uri: str, database_name: str, mongo: MongoClient[Any]
) -> None:
    if shutil.which("curl") is None or "HTTP2" not in subprocess.check_output(
        ["curl", "--version"], text=True
    ):
        unavailable("no curl that speaks HTTP/2")
    server = await run(*HYPERCORN, "--workers", "0", DATABASE_URI=database_uri)
    curl = await asyncio.create_subprocess_exec(
        *("curl", "--silent", "--no-buffer", "--include", "--http2-prior-knowledge"),
        f"{server.url}/orders",
        stdout=subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        output = lines(curl)
        head = []
        async for line in output:
            if line == b"\r\n":
                break
            head.append(line.rstrip().lower())
        assert head[0] == b"http/2 200"
        assert b"content-type: text/event-stream" in head
        assert not any(line.startswith(b"connection") for line in head)

        decoder = EventDecoder()
        found: list[Any] = []
        async for line in output:
            for item in decoder.feed(line):
                found.append(item)
                if isinstance(item, Mark):
                    mongo[database_name]["orders"].insert_one({"status": "open", "number": 1})
            if found and isinstance(found[-1], Event):
                break
        assert found[-1].event == "insert"
        server.signal(signal.SIGTERM)
        assert [line async for line in output if line.strip()] == []
        assert await curl.wait() == 0  # an unfinished stream would be an error
    await server.gone()
