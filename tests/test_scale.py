"""Several workers behind a proxy: clients go from one to another and neither lose nor repeat."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import DRIVERS, ROOT, Spawned, free_port
from pymongo import MongoClient
from test_packaging import accepting, nginx_conf
from test_packaging import nginx as nginx  # noqa: PLC0414 (a fixture)

from data_bridge.testing import Event, Mark, events

TESTS = ROOT / "tests"


@pytest.fixture
async def workers(
    spawn: Callable[..., Any], database_uri: str, request: pytest.FixtureRequest
) -> list[Spawned]:
    """Two processes with the same application."""
    env = {"DATABASE_URI": database_uri, "DRIVER": getattr(request, "param", "pymongo")}
    return [await spawn("streams:app", env=env, app_dir=TESTS) for _ in range(2)]


@pytest.fixture
async def proxy(nginx: str, tmp_path: Path, workers: list[Spawned]) -> AsyncIterator[str]:
    """The real proxy with the configuration that ships, in front of both."""
    port = free_port()
    path = nginx_conf(tmp_path, port, [w.port for w in workers])
    command = shlex.join([nginx, "-p", str(tmp_path), "-c", str(path), "-e", "stderr"])
    process = await asyncio.create_subprocess_shell(
        f"exec {command} -g 'daemon off;' 2> {tmp_path}/nginx.log"
    )
    try:
        async with asyncio.timeout(20):
            await accepting(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


class Browser:
    """A client that comes back after its last event, as an EventSource does."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.numbers: list[int] = []
        self.connections = 0
        self.last_event_id = ""
        self.failure = ""
        self.open = asyncio.Event()
        self.news = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    await self._connection(client)
                if self.failure:
                    self.news.set()
                    return
                await asyncio.sleep(0.05)

    async def _connection(self, client: httpx.AsyncClient) -> None:
        headers = {"Last-Event-ID": self.last_event_id} if self.last_event_id else {}
        async with client.stream("GET", f"{self.url}/orders", headers=headers) as response:
            if response.status_code != 200:
                # What ends an EventSource for good.
                self.failure = f"{response.status_code} {await response.aread()!r}"
                return
            self.connections += 1
            stream = events(response)
            # As in a browser: what an unfinished stream has not finished does not count.
            async for item in stream.everything():
                if isinstance(item, Event):
                    if item.event != "insert":
                        self.failure = f"{item}"
                        return
                    self.numbers.append(json.loads(item.data)["document"]["number"])
                    self.last_event_id = item.id
                    self.news.set()
                elif isinstance(item, Mark) and item.id:
                    self.last_event_id = item.id
                    self.open.set()

    async def has(self, last: int) -> list[int]:
        async with asyncio.timeout(60):
            while not self.failure and (not self.numbers or self.numbers[-1] < last):
                self.news.clear()
                await self.news.wait()
        assert not self.failure, self.failure
        return self.numbers

    async def close(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


class Writer:
    """Writes numbered orders all the time."""

    def __init__(self, collection: Any) -> None:
        self.written = 0
        self._collection = collection
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            batch = [{"status": "open", "number": self.written + n} for n in range(5)]
            await asyncio.to_thread(self._collection.insert_many, batch)
            self.written += 5
            await asyncio.sleep(0.01)

    async def stop(self) -> int:
        """The number after the last one."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        # A batch may have been on its way.
        found: int = await asyncio.to_thread(self._collection.count_documents, {})
        return found


@contextlib.asynccontextmanager
async def browsing(url: str, number: int) -> AsyncIterator[list[Browser]]:
    browsers = [Browser(url) for _ in range(number)]
    try:
        async with asyncio.timeout(60):
            for browser in browsers:
                await browser.open.wait()
        yield browsers
    finally:
        for browser in browsers:
            await browser.close()


@pytest.mark.parametrize("workers", DRIVERS, indirect=True)
async def test_a_rolling_restart_under_load_loses_nothing_and_repeats_nothing(
    proxy: str, workers: list[Spawned], mongo: MongoClient[Any], database_name: str
) -> None:
    async with browsing(proxy, 12) as browsers:
        writer = Writer(mongo[database_name]["orders"])
        for worker in workers:
            before = writer.written
            await worker.terminate()
            while writer.written < before + 50:  # meanwhile the other one serves everybody
                await asyncio.sleep(0.01)
            await worker.start()
        end = await writer.stop()
        for browser in browsers:
            assert await browser.has(end - 1) == list(range(end))
        assert all(b.connections >= 2 for b in browsers)  # each was on one that ended


async def test_a_worker_that_is_killed_loses_nothing_either(
    proxy: str, workers: list[Spawned], mongo: MongoClient[Any], database_name: str
) -> None:
    async with browsing(proxy, 12) as browsers:
        writer = Writer(mongo[database_name]["orders"])
        for worker in workers:
            before = writer.written
            while writer.written < before + 50:
                await asyncio.sleep(0.01)
            await worker.kill()
            await worker.start()
        end = await writer.stop()
        for browser in browsers:
            assert await browser.has(end - 1) == list(range(end))


async def test_requests_go_to_both_workers(proxy: str, workers: list[Spawned]) -> None:
    async with httpx.AsyncClient(timeout=20) as client:
        found = {(await client.get(f"{proxy}/ping")).json() for _ in range(20)}
    assert found == {w.process.pid for w in workers if w.process is not None}


# -- a worker that is behind --------------------------------------------------------------------


@pytest.fixture
def slow_getmore(mongo: MongoClient[Any]) -> Iterator[Callable[[int], None]]:
    """``slow_getmore(ms)``: cursors of the application "behind" get each reply that much later."""

    def delay(milliseconds: int) -> None:
        mode = "alwaysOn" if milliseconds else "off"
        data = {
            "failCommands": ["getMore"],
            "blockConnection": True,
            "blockTimeMS": milliseconds,
            "appName": "behind",
        }
        command = {"configureFailPoint": "failCommand", "mode": mode}
        mongo.admin.command({**command, "data": data} if milliseconds else command)

    yield delay
    delay(0)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_worker_that_is_behind_the_client_waits_and_does_not_rewind(
    spawn: Callable[..., Any],
    database_uri: str,
    database_name: str,
    mongo: MongoClient[Any],
    slow_getmore: Callable[[int], None],
    driver: str,
) -> None:
    env = {"DRIVER": driver, "KEEP_ALIVE": "60"}
    ahead = await spawn("streams:app", env={**env, "DATABASE_URI": database_uri}, app_dir=TESTS)
    behind_uri = f"{database_uri}&appName=behind"
    behind = await spawn("streams:app", env={**env, "DATABASE_URI": behind_uri}, app_dir=TESTS)
    orders = mongo[database_name]["orders"]
    async with httpx.AsyncClient(timeout=60) as client, contextlib.AsyncExitStack() as stack:

        async def stream(worker: Spawned, id: str = "") -> Any:
            headers = {"Last-Event-ID": id}
            response = await stack.enter_async_context(
                client.stream("GET", f"{worker.url}/orders", headers=headers)
            )
            assert response.status_code == 200
            opened = events(response)
            assert isinstance(await anext(opened.everything()), Mark)
            return opened

        def number(event: Event) -> int:
            assert event.event == "insert"
            return int(json.loads(event.data)["document"]["number"])

        first = await stream(ahead)
        other = await stream(behind)  # its feed is open, and from now on late
        slow_getmore(1000)
        orders.insert_many([{"status": "open", "number": n} for n in range(3)])
        seen = [await anext(first) for _ in range(3)]
        assert [number(e) for e in seen] == [0, 1, 2]
        resumed = [await stream(behind, e.id) for e in seen]
        orders.insert_one({"status": "open", "number": 3})
        slow_getmore(0)
        assert [number(await anext(other)) for _ in range(4)] == [0, 1, 2, 3]
        assert [number(await anext(resumed[0])) for _ in range(3)] == [1, 2, 3]
        assert [number(await anext(resumed[1])) for _ in range(2)] == [2, 3]
        assert number(await anext(resumed[2])) == 3
        assert number(await anext(first)) == 3
