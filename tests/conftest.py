"""What the tests stand on: a real replica set, both drivers, real servers and a real browser."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import pytest_asyncio
from pymongo import AsyncMongoClient, MongoClient

from data_bridge.embedded import ReplicaSet, free_port

if TYPE_CHECKING:
    import uvicorn
    from playwright.async_api import Browser, Page

    from data_bridge.bridge import Bridge

ROOT = Path(__file__).parent.parent
DRIVERS = ("motor", "pymongo")


# -- the database -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def replica_set() -> Iterator[ReplicaSet]:
    """One node, shared by all tests of a worker. A test that breaks its server starts its own."""
    with ReplicaSet(parameters={"enableTestCommands": "1"}) as replica_set:
        yield replica_set


@pytest.fixture(scope="session")
def mongo(replica_set: ReplicaSet) -> Iterator[MongoClient[dict[str, Any]]]:
    """A plain client beside what is tested: to write behind its back, and to look at the truth."""
    with MongoClient[dict[str, Any]](replica_set.uri) as client:
        yield client


@pytest.fixture
def database_name(mongo: MongoClient[dict[str, Any]]) -> Iterator[str]:
    """A database of this test's own, dropped after it."""
    name = f"test_{uuid.uuid4().hex[:16]}"
    yield name
    mongo.drop_database(name)


@pytest.fixture
def database_uri(replica_set: ReplicaSet, database_name: str) -> str:
    return replica_set.database_uri(database_name)


@pytest.fixture(params=DRIVERS)
def driver_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.asynccontextmanager
async def opened(driver_name: str, uri: str, **options: Any) -> AsyncIterator[Any]:
    """A client of the named driver, closed again."""
    if driver_name == "motor":
        from motor.motor_asyncio import AsyncIOMotorClient

        motor: Any = AsyncIOMotorClient(uri, **options)
        try:
            yield motor
        finally:
            motor.close()
    else:
        async with AsyncMongoClient[dict[str, Any]](uri, **options) as client:
            yield client


@pytest.fixture
async def client(driver_name: str, replica_set: ReplicaSet) -> AsyncIterator[Any]:
    """The application's own client, of either driver."""
    async with opened(driver_name, replica_set.uri) as client:
        yield client


@pytest.fixture
async def database(client: Any, database_name: str) -> Any:
    """The application's own database object, of either driver."""
    return client[database_name]


@pytest.fixture(autouse=True)
def models_of_one_application(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bridge prepares every model of its process; here not those of the other test modules."""
    from data_bridge import bridge

    declared, mine = bridge._declared, request.module.__name__

    def declared_here(base: Any) -> list[Any]:
        return [
            m
            for m in declared(base)
            if m.__module__ == mine or not m.__module__.startswith("test_")
        ]

    monkeypatch.setattr(bridge, "_declared", declared_here)


@pytest.fixture
async def bridge(database: Any) -> AsyncIterator[Bridge]:
    """An open bridge, once on each driver, for every model of the running test."""
    import data_bridge

    async with data_bridge.connect(database) as bridge:
        yield bridge


# -- servers ------------------------------------------------------------------------------------


def free_socket() -> socket.socket:
    """A bound socket: its port cannot be taken by another worker in the meantime."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", 0))
    return bound


@dataclass
class Served:
    """An application served by uvicorn in a thread of this process."""

    url: str
    port: int
    server: uvicorn.Server


@contextlib.asynccontextmanager
async def served(app: Any, **config: Any) -> AsyncIterator[Served]:
    """Serve *app* over real sockets, in a thread with an event loop of its own.

    The thread keeps uvicorn away from this process' signals, and a test that blocks its own loop
    does not block the server.
    """
    import uvicorn

    from data_bridge.shutdown import close_streams

    bound = free_socket()
    port = bound.getsockname()[1]
    options = {"log_level": "warning", "timeout_graceful_shutdown": 5, "lifespan": "on", **config}
    server = uvicorn.Server(uvicorn.Config(app, **options))
    failure: list[BaseException | None] = []

    def run() -> None:
        try:
            server.run(sockets=[bound])
        except (Exception, SystemExit) as error:  # SystemExit: the lifespan's startup failed
            failure.append(error)
        else:
            failure.append(None)

    thread = threading.Thread(target=run, name=f"uvicorn-{port}", daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the application did not start") from failure[0]
            await asyncio.sleep(0.005)
        yield Served(f"http://127.0.0.1:{port}", port, server)
    finally:
        close_streams()  # uvicorn waits for them, and no signal reaches a thread
        server.should_exit = True
        await asyncio.to_thread(thread.join, 20)
        bound.close()
        assert not thread.is_alive(), "uvicorn did not end"


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Any]]:
    """``server = await serve(app)``: served until the test ends; ``server.url`` is its address."""
    async with contextlib.AsyncExitStack() as stack:

        async def serve(app: Any, **config: Any) -> Served:
            return await stack.enter_async_context(served(app, **config))

        yield serve


@dataclass
class Spawned:
    """A ``python -m uvicorn`` process: what a deployment runs, and what a test may kill."""

    target: str
    port: int
    env: Mapping[str, str]
    app_dir: Path
    arguments: tuple[str, ...]
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start (again, on the same port) and wait until it accepts connections."""
        command = [sys.executable, "-m", "uvicorn", self.target, "--app-dir", str(self.app_dir)]
        command += ["--port", str(self.port), "--log-level", "warning", *self.arguments]
        path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": path, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.close()
                    await writer.wait_closed()
                    return
                assert self.process.poll() is None, self.log.read_text(errors="replace")
                await asyncio.sleep(0.02)

    async def kill(self) -> None:
        """SIGKILL: connections are cut in the middle."""
        if self.process is not None:
            self.process.kill()
            await self.wait()

    async def terminate(self, timeout: float = 20) -> int:
        """SIGTERM, and the exit code."""
        assert self.process is not None
        self.process.terminate()
        return await self.wait(timeout)

    async def wait(self, timeout: float = 20) -> int:
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, timeout)


@pytest.fixture
async def spawn(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """``server = await spawn("module:app", env={…}, app_dir=…)``: a process of its own."""
    spawned: list[Spawned] = []

    async def spawn(
        target: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        app_dir: Path = ROOT,
        port: int | None = None,
    ) -> Spawned:
        port = port or free_port()
        log = tmp_path / f"uvicorn-{len(spawned)}.log"
        server = Spawned(target, port, env or {}, app_dir, arguments, log)
        spawned.append(server)
        await server.start()
        return server

    yield spawn
    for server in spawned:
        await server.kill()


# -- the browser --------------------------------------------------------------------------------

CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def unavailable(reason: str) -> NoReturn:
    """In CI nothing is skipped: there it is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


# Starting Playwright and Chromium takes longer than most tests of a page do, and both belong to an
# event loop: the tests of a module share one, and each test has pages of its own.


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """A real, headless Chromium, for modules whose tests run in the module's event loop."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        unavailable("no Chromium: install the package 'chromium' or name one in CHROMIUM")
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=list(CHROMIUM_FLAGS))
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser) -> AsyncIterator[Page]:
    """A new page; an exception that its scripts do not catch fails the test."""
    page = await browser.new_page()  # in a context of its own: no cookie of another test
    uncaught: list[str] = []
    page.on("pageerror", lambda error: uncaught.append(str(error)))
    yield page
    await page.close()
    assert not uncaught, f"uncaught in the page: {uncaught}"
