"""Clients that stop reading: they delay nobody, cost no memory, and lose nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import DRIVERS, ROOT, Spawned, unavailable
from pymongo import MongoClient

from data_bridge.testing import Event, EventDecoder, events

TESTS = ROOT / "tests"
PADDING = "x" * 10_000
MB = 1024 * 1024

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")


@pytest.fixture
async def start(spawn: Callable[..., Any], database_uri: str) -> AsyncIterator[Callable[..., Any]]:
    """``server = await start(DRIVER="motor")``: the orders, streamed by a process of its own."""

    async def start(**env: str) -> Spawned:
        server: Spawned = await spawn(
            "streams:app", env={"DATABASE_URI": database_uri, **env}, app_dir=TESTS
        )
        return server

    yield start


@pytest.fixture
def write(mongo: MongoClient[Any], database_name: str) -> Callable[..., Any]:
    """Insert orders with these numbers, ten kilobytes each."""

    async def write(first: int, end: int) -> None:
        def insert() -> None:
            orders = mongo[database_name]["orders"]
            for number in range(first, end, 100):
                orders.insert_many(
                    [
                        {"status": "open", "number": n, "padding": PADDING}
                        for n in range(number, min(end, number + 100))
                    ]
                )

        await asyncio.to_thread(insert)

    return write


def pid(server: Spawned) -> int:
    assert server.process is not None
    return server.process.pid


def resident(server: Spawned) -> int:
    """The memory of the process, in bytes."""
    for line in Path(f"/proc/{pid(server)}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the server is gone")


def sockets(server: Spawned) -> int:
    """How many sockets the process has open."""
    found = 0
    for name in os.listdir(f"/proc/{pid(server)}/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/{pid(server)}/fd/{name}").startswith("socket:")
    return found


def number(event: Event) -> int:
    assert event.event == "insert"
    found = json.loads(event.data)["document"]["number"]
    assert isinstance(found, int)
    return found


class Reader:
    """A client that reads all the time."""

    def __init__(self, url: str, last_event_id: str = "") -> None:
        self.numbers: list[int] = []
        self.open = asyncio.Event()
        self.resets = 0
        self._headers = {"Last-Event-ID": last_event_id}
        self._news = asyncio.Event()
        self._url = url
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with (
            httpx.AsyncClient(timeout=60) as client,
            client.stream("GET", self._url, headers=self._headers) as response,
        ):
            async for item in events(response).everything():
                self.open.set()
                if isinstance(item, Event):
                    self.numbers.append(number(item))
                    self._news.set()

    async def has(self, last: int) -> list[int]:
        """Everything up to this number."""
        async with asyncio.timeout(90):
            while not self.numbers or self.numbers[-1] < last:
                self._news.clear()
                await self._news.wait()
        return self.numbers

    async def close(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


class Stuck:
    """A client that reads the beginning of its stream, and nothing more until it is asked to."""

    def __init__(self, port: int, path: str = "/orders") -> None:
        self.connection = socket.socket()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.connection.settimeout(60)
        self.connection.connect(("127.0.0.1", port))
        self.connection.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())
        self.received = bytearray()
        begun = b"\nid: " if path == "/orders" else b"event: ready\n"
        while begun not in self.received:
            self.received += self.connection.recv(512)
        assert self.received.startswith(b"HTTP/1.1 200 OK")

    def read(self, until: bytes | None) -> None:
        """Read on until something has come, or to the end."""
        with contextlib.suppress(ConnectionError):
            while until is None or until not in self.received[-20_000:]:
                chunk = self.connection.recv(1 << 18)
                if not chunk:
                    break
                self.received += chunk

    def events(self) -> tuple[list[int], str]:
        """The numbers of all orders received, and the last event id."""
        decoder = EventDecoder()
        found = decoder.feed(unchunked(bytes(self.received.partition(b"\r\n\r\n")[2])))
        inserts = [e for e in found if isinstance(e, Event) and e.event == "insert"]
        return [number(e) for e in inserts], decoder.last_event_id

    def close(self) -> None:
        self.connection.close()


def unchunked(body: bytes) -> bytes:
    """A body out of its transfer coding "chunked", with what is there of the last chunk."""
    found = bytearray()
    at = 0
    while (end := body.find(b"\r\n", at)) > 0:
        size = int(body[at:end], 16)
        found += body[end + 2 : end + 2 + size]
        at = end + 2 + size + 2
    return bytes(found)


# -- curl ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("missed", [500, 2000], ids=["what the log has", "more than the log holds"])
async def test_a_stopped_curl_gets_everything_in_order_once_it_goes_on(
    start: Callable[..., Any],
    write: Callable[..., Any],
    tmp_path: Path,
    driver: str,
    missed: int,
) -> None:
    if shutil.which("curl") is None:
        unavailable("no curl")
    server = await start(DRIVER=driver, SEND_TIMEOUT="600")
    output = tmp_path / "curl.txt"
    with output.open("wb") as file:
        curl = subprocess.Popen(
            ["curl", "--silent", "--no-buffer", f"{server.url}/orders"], stdout=file
        )
    reader = Reader(f"{server.url}/orders")
    try:
        await reader.open.wait()
        await write(0, 10)
        await reader.has(9)
        async with asyncio.timeout(30):
            while output.read_bytes().count(b"event: insert") < 10:
                await asyncio.sleep(0.01)
        curl.send_signal(signal.SIGSTOP)
        await write(10, missed)
        # The others have it all while this one has not.
        assert await reader.has(missed - 1) == list(range(missed))
        assert output.read_bytes().count(b"event: insert") == 10
        curl.send_signal(signal.SIGCONT)
        await write(missed, missed + 10)
        async with asyncio.timeout(90):
            while output.read_bytes().count(b"event: insert") < missed + 10:
                assert curl.poll() is None
                await asyncio.sleep(0.05)
        found = [e for e in EventDecoder().feed(output.read_bytes()) if isinstance(e, Event)]
        # The last may not be whole yet.
        assert [number(e) for e in found] == list(range(missed + 10))[: len(found)]
        assert len(found) >= missed + 9
    finally:
        curl.kill()
        curl.wait()
        await reader.close()


# -- sockets that nobody reads ------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
async def test_memory_does_not_grow_with_what_clients_miss(
    start: Callable[..., Any], write: Callable[..., Any], driver: str
) -> None:
    server = await start(DRIVER=driver, SEND_TIMEOUT="600")
    reader = Reader(f"{server.url}/orders")
    await reader.open.wait()
    clients = [await asyncio.to_thread(Stuck, server.port) for _ in range(30)]
    await write(0, 1000)
    await reader.has(999)
    before = resident(server)
    await write(1000, 4000)  # 30 MB, which 30 clients miss: a queue of each would hold 900 MB
    assert await reader.has(3999) == list(range(4000))
    assert resident(server) - before < 150 * MB
    for client in clients:
        client.close()
    await reader.close()


@pytest.mark.parametrize("path", ["/orders", "/live", "/authorized"])
async def test_a_client_that_never_reads_again_is_cut_off_and_counted_and_can_resume(
    start: Callable[..., Any], write: Callable[..., Any], path: str
) -> None:
    server = await start(SEND_TIMEOUT="1")
    reader = Reader(f"{server.url}/orders")
    await reader.open.wait()
    without = sockets(server)
    client = await asyncio.to_thread(Stuck, server.port, path)
    assert sockets(server) == without + 1
    await write(0, 1000)
    assert await reader.has(999) == list(range(1000))  # that one is not delayed, nor cut
    async with asyncio.timeout(60):
        while sockets(server) > without:
            await asyncio.sleep(0.05)
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"{server.url}/slow-readers")).json() == 1

    await asyncio.to_thread(client.read, None)
    client.close()
    seen, last = client.events()
    assert len(seen) < 1000
    assert seen == list(range(len(seen)))
    if seen and path != "/authorized":  # which shows everything anew
        again = Reader(f"{server.url}{path}", last)
        assert await again.has(999) == list(range(len(seen), 1000))
        await again.close()
    await reader.close()


async def test_many_that_stop_delay_nobody_and_go_on_where_they_were(
    start: Callable[..., Any], write: Callable[..., Any]
) -> None:
    server = await start(SEND_TIMEOUT="600")
    reader = Reader(f"{server.url}/orders")
    await reader.open.wait()
    clients = [await asyncio.to_thread(Stuck, server.port) for _ in range(6)]
    await write(0, 2000)
    assert await reader.has(1999) == list(range(2000))

    async with asyncio.timeout(90):
        await asyncio.gather(*(asyncio.to_thread(c.read, b'"number":1999,') for c in clients))
    for client in clients:
        numbers, _ = client.events()
        assert numbers[:1999] == list(range(1999))  # the last need not be whole yet
        client.close()
    await reader.close()


async def test_a_client_that_reads_slowly_but_reads_is_not_cut_off(
    start: Callable[..., Any], write: Callable[..., Any]
) -> None:
    server = await start(SEND_TIMEOUT="2")
    client = await asyncio.to_thread(Stuck, server.port)

    def read_slowly() -> None:
        while b'"number":999,' not in client.received[-20_000:]:
            chunk = client.connection.recv(8192)
            assert chunk, "it was cut off"
            client.received += chunk
            time.sleep(0.002)

    async with asyncio.TaskGroup() as group:
        group.create_task(write(0, 1000))
        group.create_task(asyncio.to_thread(read_slowly))
    numbers, _ = client.events()
    assert numbers[:999] == list(range(999))
    client.close()


# -- clients that only listen -------------------------------------------------------------------


async def test_an_idle_subscriber_costs_little_more_than_its_connection(
    spawn: Callable[..., Any], start: Callable[..., Any]
) -> None:
    async def each(server: Spawned) -> float:
        """The memory of the server for each of its clients, in bytes."""
        clients = [await asyncio.to_thread(Stuck, server.port) for _ in range(100)]  # warm up
        before = resident(server)
        clients += [await asyncio.to_thread(Stuck, server.port) for _ in range(500)]
        grown = resident(server) - before
        for client in clients:
            client.close()
        return grown / 500

    bare = await each(await spawn("streams:bare", "--lifespan", "off", app_dir=TESTS))
    assert await each(await start()) < 4 * bare
