"""The command ``data-bridge``: a demo, a change stream in the terminal, and a check-up.

data-bridge demo                              a shop, a dashboard, a database: nothing to set up
data-bridge demo tracking                     parcels that their owners follow, signed in
data-bridge tail mongodb://…/shop.orders      every change, as a line of JSON
data-bridge doctor mongodb://…/shop           whether changes can be watched there, or why not
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import importlib.util
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from bson import json_util
from pydantic import ConfigDict
from pymongo import AsyncMongoClient
from pymongo.errors import (
    ConfigurationError,
    ConnectionFailure,
    InvalidURI,
    OperationFailure,
    PyMongoError,
)

from .bridge import connect
from .document import Document
from .errors import DataBridgeError

if TYPE_CHECKING:
    from .change import Change

__all__ = ["main"]

EXAMPLES = {"orders": "dashboard", "tracking": "parcels"}  # and what their pages show
PORTS_TO_TRY = 50
OPLOG_MB = 512  # of the demo's database: it may run for days, and its disk use stays bounded


class _Refused(Exception):
    """What the user asked for cannot be done; the message is for them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 130 interrupted.

    Raises:
        SystemExit: ``--help``, ``--version`` or wrong usage (2).
    """
    options = _parser().parse_args(arguments)
    with _signals():
        try:
            return int(options.run(options))
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # `data-bridge tail … | head -n 1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (DataBridgeError, _Refused) as error:
            print(f"data-bridge: {error}", file=sys.stderr)
            return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="data-bridge", description="Live updates from MongoDB over Server-Sent Events."
    )
    parser.add_argument("--version", action="version", version=f"data-bridge {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")

    demo = commands.add_parser(
        "demo",
        help="a shop that writes orders, and a live page of them",
        description="Starts a MongoDB replica set, a shop that writes orders and a dashboard that "
        "shows them live. Ctrl-C ends all of it and leaves nothing behind.",
    )
    demo.add_argument(
        "example",
        nargs="?",
        choices=EXAMPLES,
        default="orders",
        help="a dashboard of orders, or parcels that their owners follow (%(default)s)",
    )
    demo.add_argument(
        "--uri",
        default=os.environ.get("DATA_BRIDGE_URI") or None,
        help="use this database instead of starting one (default: $DATA_BRIDGE_URI)",
    )
    demo.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    demo.add_argument(
        "--port",
        type=_port,
        default=8000,
        help="port to listen on, or the next free one after it; 0: any (%(default)s)",
    )
    demo.add_argument(
        "--rate",
        type=_rate,
        default=2.0,
        help="orders, or moves, per second; 0: the shop stays closed (%(default)s)",
    )
    demo.set_defaults(run=_demo)

    tail = commands.add_parser(
        "tail",
        help="print the changes to a collection as they happen",
        description="Prints one line of JSON (MongoDB Extended JSON, relaxed) for each change.",
    )
    tail.add_argument("target", metavar="URI/db.collection", help="mongodb://host/shop.orders?…")
    tail.add_argument(
        "--resume-after",
        metavar="POSITION",
        help="start after this resume token, event id or timestamp instead of now",
    )
    tail.add_argument("--sse", action="store_true", help="print what a browser would be sent")
    tail.add_argument("-n", "--limit", type=int, metavar="N", help="end after N changes")
    tail.set_defaults(run=lambda options: asyncio.run(_interruptible(_tail(options))))

    doctor = commands.add_parser(
        "doctor",
        help="check whether changes can be watched in a database, and say what to do if not",
        description="Checks a database step by step; the exit code is 1 if a check failed.",
    )
    doctor.add_argument("uri", metavar="URI", help="mongodb://host/shop?…")
    doctor.set_defaults(run=lambda options: asyncio.run(_interruptible(_doctor(options))))
    return parser


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, not {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1
    if not 0 <= rate <= 10_000:
        raise argparse.ArgumentTypeError(f"a rate is a number from 0 to 10000, not {text!r}")
    return rate


def _version() -> str:
    try:
        return metadata.version("data-bridge")
    except metadata.PackageNotFoundError:
        return "(from a checkout)"


def _say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM unwind the stack once; a second one ends the process where it is.

    That leaves nothing behind either: an embedded server has a watchdog.
    """
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            os._exit(128 + number)
        stopping = True
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _interruptible(command: Coroutine[Any, Any, int]) -> int:
    """Run a command until a signal cancels it; a second one ends the process where it is.

    In an event loop a handler that raises would raise in whatever task is running.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    stopping = False

    def stop(number: int) -> None:
        nonlocal stopping
        if stopping:
            os._exit(128 + number)
        stopping = True
        task.cancel()

    with contextlib.suppress(NotImplementedError):  # on Windows, where the raising ones stay
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
    try:
        return await command
    except asyncio.CancelledError:
        if not stopping:
            raise
        return 130
    finally:
        with contextlib.suppress(NotImplementedError):
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


# -- demo ---------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    try:
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise _Refused("the demo needs a web server: pip install 'data-bridge[demo]'") from error
    shop = _example(options.example)
    try:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(_listen(options.host, options.port))
            if options.uri is None:
                from .embedded import ReplicaSet

                _say("Starting a MongoDB replica set …")
                replica_set = stack.enter_context(ReplicaSet(oplog_mb=OPLOG_MB))
                uri = replica_set.database_uri("shop")
            else:
                uri = _with_database(options.uri, "shop")
            asyncio.run(_serve(shop, uri, options, listener))
    except KeyboardInterrupt:
        _say("\nStopped.")  # the way in which a demo ends
    return 0


def _example(which: str) -> ModuleType:
    """An example application: inside an installed package, beside it in a checkout."""
    here = Path(__file__).parent
    for examples in (here / "examples", here.parent / "examples"):
        path = examples / which / "app.py"
        if path.is_file():
            break
    else:
        raise _Refused(f"the application examples/{which} is missing from this installation")
    name = f"data_bridge_examples_{which}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # models look their annotations up there
    spec.loader.exec_module(module)
    return module


def _listen(host: str, port: int) -> socket.socket:
    """A socket on *port*, or on the next free one."""
    last = min(port + PORTS_TO_TRY, 65535) if port else 0
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in range(port, last + 1):
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(128)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise _Refused(f"cannot listen on {host}:{candidate}: {error.strerror}") from error
            continue
        if candidate != port:
            _say(f"Port {port} is taken: using {candidate}.")
        return listener
    raise _Refused(f"the ports {port} to {last} of {host} are all taken: choose one with --port")


async def _serve(
    shop: ModuleType, uri: str, options: argparse.Namespace, listener: socket.socket
) -> None:
    import uvicorn

    async with connect(uri):  # whatever is wrong with the database is said here, in one line
        pass
    config = uvicorn.Config(
        shop.create_app(uri),
        log_level="warning",
        lifespan="on",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    port = listener.getsockname()[1]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(options.host, options.host)
    address = f"http://{shown}:{port}"

    async def announce() -> None:
        while not server.started:  # noqa: ASYNC110  uvicorn has no event for it
            await asyncio.sleep(0.02)
        _say(f"\n  {f'The {EXAMPLES[options.example]}:':<18}{address}")
        _say(f"  From a terminal:  {shop.try_it(address)}")
        _say(f"  The database:     {_without_password(uri)}\n")
        _say("Ctrl-C stops everything.")

    async def open_shop() -> None:
        try:
            await shop.shop(uri, options.rate)
        except BaseException:
            server.should_exit = True
            raise

    tasks = [asyncio.create_task(announce())]
    if options.rate:
        tasks.append(asyncio.create_task(open_shop()))
    try:
        await server.serve(sockets=[listener])
    except SystemExit as error:  # its lifespan failed, and uvicorn has said why
        raise _Refused("the demo's application did not start") from error
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


_PLACES = re.compile(
    r"(?P<hosts>mongodb(?:\+srv)?://[^/?]*)(?:/(?P<name>[^?]*))?(?P<options>\?.*)?", re.DOTALL
)


def _parts(uri: str) -> tuple[str, str, str]:
    """A connection string as scheme with hosts, path, and options with their question mark.

    https://www.mongodb.com/docs/manual/reference/connection-string/
    """
    found = _PLACES.fullmatch(uri)
    if found is None:
        raise _Refused(
            "that is no MongoDB connection string; one looks like "
            "mongodb://user:password@host:27017/database"
        )
    return found["hosts"], found["name"] or "", found["options"] or ""


def _with_database(uri: str, name: str) -> str:
    """The connection string, with a default database if it names none."""
    hosts, named, options = _parts(uri)
    return f"{hosts}/{named or name}{options}"


def _without_password(uri: str) -> str:
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", uri)


# -- tail ---------------------------------------------------------------------------------------


def _model(name: str) -> type[Document]:
    """A model that takes every document of a collection as it is."""

    class AnyDocument(Document):
        model_config = ConfigDict(extra="allow")
        id: Any = None

        class Settings:
            collection = name

    return AnyDocument


async def _tail(options: argparse.Namespace) -> int:
    hosts, path, query = _parts(options.target)
    database, _, collection = unquote(path).partition(".")
    if not database or not collection:
        raise _Refused(
            "which collection? Put it after the database: mongodb://host:27017/shop.orders"
        )
    model = _model(collection)
    left = options.limit
    async with (
        connect(f"{hosts}/{path.partition('.')[0]}{query}"),
        model.watch(resume_after=options.resume_after) as changes,
    ):
        where = "now" if options.resume_after is None else "the given position"
        print(f"watching {database}.{collection} from {where}", file=sys.stderr, flush=True)
        async for text in _frames(changes) if options.sse else _lines(changes):
            sys.stdout.write(text)
            sys.stdout.flush()
            if left is not None and (left := left - 1) <= 0:
                break
    return 0


async def _lines(changes: AsyncIterator[Change[Any]]) -> AsyncIterator[str]:
    async for change in changes:
        line: dict[str, Any] = {
            "operation": change.operation,
            "id": change.document_id,
            "document": change.raw.get("fullDocument"),
        }
        if "updateDescription" in change.raw:
            line["update_description"] = change.raw["updateDescription"]
        line["timestamp"] = str(change.timestamp)
        line["resume_token"] = str(change.resume_token)
        yield _json(line) + "\n"


async def _frames(changes: AsyncIterator[Change[Any]]) -> AsyncIterator[str]:
    from .api import EventSourceResponse, ServerSentEvent

    async def events() -> AsyncIterator[ServerSentEvent]:
        async for change in changes:
            data = {
                "operation": change.operation,
                "id": change.document_id,
                "document": change.raw.get("fullDocument"),
            }
            token = str(change.resume_token)
            yield ServerSentEvent(data=_json(data), event=str(change.operation), id=token)

    async for frame in EventSourceResponse(events()):
        yield frame.decode() if isinstance(frame, bytes) else str(frame)


def _json(value: Any) -> str:
    """https://www.mongodb.com/docs/manual/reference/mongodb-extended-json/"""
    return json_util.dumps(value, json_options=json_util.RELAXED_JSON_OPTIONS)


# -- doctor -------------------------------------------------------------------------------------

OK, WARN, FAIL = "ok", "warn", "fail"
Finding = tuple[str, str]
Client = AsyncMongoClient[dict[str, Any]]


async def _doctor(options: argparse.Namespace) -> int:
    _, named, _ = _parts(options.uri)
    uri = _with_database(options.uri, "test")
    worst = OK

    def report(check: str, finding: Finding) -> None:
        nonlocal worst
        level, text = finding
        worst = FAIL if FAIL in (worst, level) else WARN if WARN in (worst, level) else OK
        _say(f"{level:<5} {check:<12} {text}")

    try:
        client: Client = AsyncMongoClient(
            uri, serverSelectionTimeoutMS=5000, connectTimeoutMS=5000, appname="data-bridge doctor"
        )
    except (InvalidURI, ConfigurationError, ValueError) as error:
        raise _Refused(f"that connection string cannot be used: {error}") from error
    async with client:
        try:
            hello = await client.admin.command("hello")
        except PyMongoError as error:
            report(*_no_hello(error))
            return 1
        report("reachable", (OK, f"{_host(client, hello)} answers"))
        if not named:
            report("database", (WARN, "the URI names no database; looking at 'test'. Add /name."))
        checks: list[tuple[str, Callable[[Client, dict[str, Any]], Awaitable[Finding]]]] = [
            ("credentials", _credentials),
            ("topology", _topology),
            ("version", _server_version),
            ("oplog", _oplog),
            ("pre-images", _pre_images),
        ]
        for name, check in checks:
            try:
                finding = await check(client, hello)
            except OperationFailure as error:
                finding = (
                    WARN,
                    f"not permitted to look (error {error.code}); ask an administrator",
                )
            except PyMongoError as error:
                finding = (FAIL, f"no answer ({type(error).__name__}); try again")
            report(name, finding)
    try:
        async with connect(uri), _model("data_bridge_doctor").watch():
            report("watch", (OK, "a change stream opens"))
    except DataBridgeError as error:
        report("watch", (FAIL, str(error)))
    return 1 if worst == FAIL else 0


def _host(client: Client, hello: dict[str, Any]) -> str:
    return str(hello.get("me") or ", ".join(f"{h}:{p}" for h, p in sorted(client.nodes)))


def _no_hello(error: PyMongoError) -> tuple[str, Finding]:
    if isinstance(error, OperationFailure):
        return "credentials", (
            FAIL,
            "the server refuses them. Check user, password and authSource of the URI "
            "(characters such as @ : / in them are written percent-encoded).",
        )
    if isinstance(error, ConnectionFailure):
        return "reachable", (
            FAIL,
            f"{_without_password(str(error)).partition(', Timeout')[0]}. Check host, port, "
            "firewall and TLS, that mongod runs, and that the set's members are named as this "
            "machine can resolve them.",
        )
    return "reachable", (FAIL, str(error))


async def _credentials(client: Client, hello: dict[str, Any]) -> Finding:
    status = await client.admin.command("connectionStatus")
    users = [f"{u['user']}@{u['db']}" for u in status["authInfo"]["authenticatedUsers"]]
    return OK, f"signed in as {', '.join(users)}" if users else "none in the URI"


async def _topology(client: Client, hello: dict[str, Any]) -> Finding:
    if hello.get("msg") == "isdbgrid":
        return OK, "a sharded cluster"
    if name := hello.get("setName"):
        return OK, f"replica set {name}; data-bearing members: {len(hello.get('hosts', ()))}"
    return FAIL, (
        "a standalone server has no change streams. Start mongod with --replSet rs0 and run "
        "rs.initiate() once; a set of one node is enough."
    )


async def _server_version(client: Client, hello: dict[str, Any]) -> Finding:
    info = await client.admin.command("buildInfo")
    text, number = f"MongoDB {info['version']}", tuple(info["versionArray"][:3])
    if number < (6, 0):
        return WARN, f"{text} has no pre- and post-images; they came with 6.0"
    return OK, text


async def _oplog(client: Client, hello: dict[str, Any]) -> Finding:
    if not hello.get("setName"):
        return WARN, "only a member of a replica set can be asked; a router or standalone cannot"
    oplog = client.local["oplog.rs"]
    first = await oplog.find_one({}, {"ts": 1}, sort=[("$natural", 1)])
    last = await oplog.find_one({}, {"ts": 1}, sort=[("$natural", -1)])
    if first is None or last is None:
        return WARN, "it is empty"
    hours = (last["ts"].time - first["ts"].time) / 3600
    stats = await client.local.command("collStats", "oplog.rs")
    filled, size = stats["size"], stats["maxSize"]
    text = (
        f"reaches back {hours:.1f} hours ({size >> 20} MB, {min(100, 100 * filled // size)}% used)"
    )
    if filled < 0.9 * size:
        return OK, f"{text}; it has not had to forget anything yet"
    if hours < 24:
        return WARN, (
            f"{text}: clients that are away longer start over. Enlarge it with replSetResizeOplog."
        )
    return OK, text


async def _pre_images(client: Client, hello: dict[str, Any]) -> Finding:
    database = client.get_default_database()
    keeping: list[str] = []
    others: list[str] = []
    async for found in await database.list_collections(filter={"type": "collection"}):
        enabled = (found.get("options") or {}).get("changeStreamPreAndPostImages") or {}
        (keeping if enabled.get("enabled") else others).append(found["name"])
    total = len(keeping) + len(others)
    if not total:
        return OK, f"{database.name} has no collections yet"
    if keeping:
        return OK, f"{len(keeping)} of {total} collections keep them: {', '.join(sorted(keeping))}"
    return WARN, (
        f"none of {total} collections keeps them, so changes carry no document before the change. "
        "If you need that: Settings.pre_images = True in the model, or collMod with "
        "changeStreamPreAndPostImages: {enabled: true}."
    )
