"""The end of a server: every open stream is finished properly, and the process goes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import DRIVERS, ROOT, free_port, served
from mongomock_motor import AsyncMongoMockClient

import data_bridge
from data_bridge.api import App, EventSourceResponse, ServerSentEvent, close_streams
from data_bridge.shutdown import guard
from data_bridge.testing import events

TESTS = ROOT / "tests"
# Far more than the two seconds that it may take, for a busy machine; a hang takes longer.
SOON = 10


@pytest.fixture(autouse=True)
def files() -> None:
    """Room for a thousand connections."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192), most))


# -- clients ------------------------------------------------------------------------------------


class Client:
    """One connection that reads a stream to its very last byte."""

    def __init__(self, port: int, path: str, first: bytes) -> None:
        self.port = port
        self.path = path
        self.first = first  # what it has begun with
        self.body = bytearray()
        self.open = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(f"GET {self.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in head.split(b"\r\n")[0], head
            with contextlib.suppress(ConnectionError):
                while chunk := await reader.read(65536):
                    self.body += chunk
                    if self.first in self.body:
                        self.open.set()
                    if self.finished:
                        break
        finally:
            writer.close()

    @property
    def finished(self) -> bool:
        """Whether the response has ended as one does, not just broken off."""
        return self.body.endswith(b"\r\n0\r\n\r\n") or bytes(self.body) == b"0\r\n\r\n"


async def connected(port: int, number: int, *paths: str) -> list[Client]:
    """So many clients with open streams."""
    clients = []
    for n in range(number):
        path = paths[n % len(paths)]
        clients.append(Client(port, path, b"data: first" if path == "/ticks" else b"id: "))
        if n % 100 == 99:  # a listen queue is not endless
            await all_open(clients)
    await all_open(clients)
    return clients


async def all_open(clients: list[Client]) -> None:
    async with asyncio.timeout(60):
        for client in clients:
            waiting = asyncio.ensure_future(client.open.wait())
            await asyncio.wait({waiting, client.task}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                waiting.cancel()
                client.task.result()
                raise AssertionError(f"a stream has ended: {client.body!r}")


async def all_finished(clients: list[Client]) -> None:
    async with asyncio.timeout(SOON):
        await asyncio.gather(*(c.task for c in clients))
    assert sum(c.finished for c in clients) == len(clients)


# -- servers ------------------------------------------------------------------------------------


class Running:
    """A server in a process group of its own."""

    def __init__(self, command: list[str], port: int, env: dict[str, str], log: Path) -> None:
        self.port = port
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=TESTS,
                env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def up(self) -> None:
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(httpx.TransportError):
                    async with httpx.AsyncClient() as client:
                        await client.get(f"{self.url}/ping")
                        return
                assert self.process.poll() is None, self.log.read_text()
                await asyncio.sleep(0.02)

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    async def gone(self) -> float:
        """Wait for the end of the process; how long that took, in seconds."""
        began = time.monotonic()
        await asyncio.to_thread(self.process.wait, SOON)
        return time.monotonic() - began

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """``server = await run("uvicorn", "streams:app", "--port", "{port}", DATABASE_URI=…)``."""
    running: list[Running] = []

    async def run(*command: str, **env: str) -> Running:
        port = free_port()
        log = tmp_path / f"server-{len(running)}.log"
        filled = [argument.format(port=port) for argument in command]
        server = Running(filled, port, {"SIGNALS": str(tmp_path), **env}, log)
        running.append(server)
        await server.up()
        return server

    yield run
    for server in running:
        server.kill()


UVICORN = ("uvicorn", "streams:app", "--port", "{port}", "--log-level", "warning")
GUNICORN = (
    *("gunicorn", "streams:app", "--bind", "127.0.0.1:{port}", "--log-level", "warning"),
    *("--worker-class", "uvicorn_worker.UvicornWorker"),
)
HYPERCORN = ("hypercorn", "streams:app", "--bind", "127.0.0.1:{port}", "--log-level", "warning")


# -- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
async def test_sigterm_finishes_a_thousand_streams_and_the_process_ends(
    run: Callable[..., Any], database_uri: str, driver: str
) -> None:
    server = await run(*UVICORN, DATABASE_URI=database_uri, DRIVER=driver)
    clients = await connected(server.port, 1000, "/orders")
    server.signal(signal.SIGTERM)
    await all_finished(clients)
    await server.gone()
    assert server.process.returncode in (0, -signal.SIGTERM), server.log.read_text()
    assert "Traceback" not in server.log.read_text()[:2000]


@pytest.mark.parametrize(
    "command",
    [
        (*UVICORN, "--http", "h11", "--loop", "asyncio"),
        (*UVICORN, "--loop", "uvloop"),
        (*UVICORN, "--workers", "2"),
        GUNICORN,
        (*GUNICORN, "--workers", "2"),
        (*HYPERCORN, "--workers", "0"),
        (*HYPERCORN, "--workers", "0", "--worker-class", "uvloop"),
        # It tells its workers nothing, and cancels what they do after a grace period.
        (*HYPERCORN, "--graceful-timeout", "1"),
    ],
    ids=[
        "uvicorn h11",
        "uvicorn uvloop",
        "uvicorn two workers",
        "gunicorn",
        "gunicorn two workers",
        "hypercorn",
        "hypercorn uvloop",
        "hypercorn with a worker process",
    ],
)
async def test_sigterm_finishes_every_stream_under_each_server(
    run: Callable[..., Any], database_uri: str, command: tuple[str, ...]
) -> None:
    server = await run(*command, DATABASE_URI=database_uri)
    clients = await connected(server.port, 200, "/orders", "/ticks")
    server.signal(signal.SIGTERM)
    await all_finished(clients)
    await server.gone()
    assert "/data_bridge/" not in server.log.read_text()  # in no traceback


@pytest.mark.parametrize("command", [UVICORN, GUNICORN], ids=["uvicorn", "gunicorn"])
async def test_ctrl_c_finishes_every_stream(
    run: Callable[..., Any], database_uri: str, command: tuple[str, ...]
) -> None:
    server = await run(*command, DATABASE_URI=database_uri)
    clients = await connected(server.port, 20, "/orders", "/ticks")
    server.signal(signal.SIGINT, group=True)
    await all_finished(clients)
    await server.gone()


async def test_ctrl_c_twice_ends_a_server_that_a_stream_does_not_let_go(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    server = await run(*UVICORN)
    clients = await connected(server.port, 5, "/ticks")
    # uvicorn waits for this request, and the request for no signal
    waiting = asyncio.create_task(asyncio.to_thread(httpx.get, f"{server.url}/late", timeout=SOON))
    async with asyncio.timeout(20):
        while not tmp_path.joinpath("begun").exists():
            await asyncio.sleep(0.01)
    server.signal(signal.SIGINT, group=True)
    await all_finished(clients)
    assert server.process.poll() is None
    server.signal(signal.SIGINT, group=True)
    await server.gone()
    with contextlib.suppress(httpx.TransportError):
        assert (await waiting).status_code == 500


@pytest.mark.parametrize("others", [0, 5])
async def test_a_request_that_becomes_a_stream_during_the_shutdown_ends_at_once(
    run: Callable[..., Any], tmp_path: Path, others: int
) -> None:
    server = await run(*UVICORN)
    clients = await connected(server.port, others, "/ticks")
    late = Client(server.port, "/late", b"never")
    async with asyncio.timeout(20):
        while not tmp_path.joinpath("begun").exists():
            await asyncio.sleep(0.01)
    server.signal(signal.SIGTERM)
    await all_finished(clients)
    tmp_path.joinpath("go").touch()
    await all_finished([late])
    assert late.body == b"0\r\n\r\n"
    await server.gone()


async def test_the_lifespan_for_other_frameworks_watches_for_the_signal_as_app_does() -> None:
    def servers_own(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, servers_own)
    try:
        async with data_bridge.lifespan(AsyncMongoMockClient()["shop"])(None):
            assert signal.getsignal(signal.SIGTERM) is not servers_own
        assert signal.getsignal(signal.SIGTERM) is servers_own
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_a_client_that_does_not_read_does_not_hold_up_the_end(
    run: Callable[..., Any], database_uri: str, mongo: Any, database_name: str
) -> None:
    server = await run(*UVICORN, DATABASE_URI=database_uri)
    clients = await connected(server.port, 3, "/orders")
    stuck = []
    for _ in range(100):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(b"GET /orders HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await asyncio.to_thread(connection.recv, 1024)
        stuck.append(connection)
    padding = "x" * 100_000
    for _ in range(8):
        mongo[database_name]["orders"].insert_many([{"padding": padding} for _ in range(10)])
    async with asyncio.timeout(60):  # until the others have it all
        while any(len(c.body) < 80 * len(padding) for c in clients):
            await asyncio.sleep(0.05)
    server.signal(signal.SIGTERM)
    await all_finished(clients)
    await server.gone()
    for connection in stuck:
        connection.close()


# -- in one process -----------------------------------------------------------------------------


def endless() -> App:
    app = App()

    @app.get("/")
    async def stream() -> EventSourceResponse:
        async def generate() -> AsyncIterator[ServerSentEvent]:
            yield ServerSentEvent("first")
            await asyncio.Event().wait()

        return EventSourceResponse(generate())

    return app


async def test_a_server_in_a_thread_is_ended_by_closing_the_streams_twice_over() -> None:
    for _ in range(2):
        async with httpx.AsyncClient(timeout=SOON) as client, contextlib.AsyncExitStack() as stack:
            server = await stack.enter_async_context(served(endless(), log_level="error"))
            response = await stack.enter_async_context(client.stream("GET", server.url))
            stream = events(response)
            assert (await anext(stream)).data == "first"
            await asyncio.to_thread(close_streams)
            assert await anext(stream, None) is None  # an end, not an error
            server.server.should_exit = True


async def test_two_servers_in_one_process_end_on_their_own() -> None:
    async with (
        served(endless()) as first,
        httpx.AsyncClient(timeout=SOON) as client,
    ):
        async with served(endless()) as second:
            async with (
                client.stream("GET", first.url) as a,
                client.stream("GET", second.url) as b,
            ):
                one, other = events(a), events(b)
                assert (await anext(one)).data == (await anext(other)).data == "first"
                close_streams()
                assert await anext(one, None) is None
                assert await anext(other, None) is None


async def test_streams_that_begin_right_after_closing_end_too() -> None:
    async with served(endless()) as server, httpx.AsyncClient(timeout=SOON) as client:
        async with client.stream("GET", server.url) as response:
            await anext(events(response))
            close_streams()
            late = await client.get(server.url)
    assert (late.status_code, late.content) == (200, b"")


TWICE = """
    import asyncio, signal, os, threading, urllib.request
    import uvicorn
    from data_bridge.api import App, EventSourceResponse, ServerSentEvent

    app = App()

    @app.get("/")
    async def stream():
        async def generate():
            yield ServerSentEvent("first")
            await asyncio.Event().wait()
        return EventSourceResponse(generate())

    def client(port):
        while True:
            try:
                response = urllib.request.urlopen(f"http://127.0.0.1:{port}/")
            except OSError:
                continue
            break
        assert response.readline() == b"data: first\\n"
        os.kill(os.getpid(), signal.SIGINT)
        assert response.read() == b"\\n"  # to the end, and the end is proper
        ended.append(port)

    ended = []
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    for port in PORTS:
        thread = threading.Thread(target=client, args=[port])
        thread.start()
        try:
            uvicorn.run(app, port=port, log_level="warning")
        except KeyboardInterrupt:
            pass
        thread.join()
    assert ended == PORTS
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    print("both ended")
"""


async def test_uvicorn_runs_twice_in_one_process_and_the_handlers_are_as_before(
    tmp_path: Path,
) -> None:
    script = tmp_path / "twice.py"
    ports = f"PORTS = [{free_port()}, {free_port()}]\n"
    script.write_text(ports + textwrap.dedent(TWICE))
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "both ended\n"), done.stderr


async def test_handlers_of_others_stay_in_place_and_are_called() -> None:
    called: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with guard():
            assert signal.getsignal(signal.SIGTERM) is not mine
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0)
        assert called == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is mine
        with guard():
            later = signal.signal(signal.SIGTERM, lambda number, frame: None)
            assert later is not mine
            newest = signal.getsignal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is newest
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_a_default_handler_is_left_alone() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with guard():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
