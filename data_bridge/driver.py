"""The only file that knows Motor from PyMongo's async API, and both from mongomock-motor.

A ``Driver`` is one database behind one of them. What differs is small: how a URI becomes a client,
and how a change stream's cursor is read. Cursors are read as raw batches, one reply of the server
at a time, because decoding a batch in one call and hopping threads once a batch is what keeps
Motor within reach of PyMongo (49,000 changes/s against 8,800 for Motor's own ``async for``).
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import pymongo
from bson import Timestamp
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.raw_bson import RawBSONDocument
from pymongo import AsyncMongoClient
from pymongo.asynchronous.command_cursor import AsyncRawBatchCommandCursor
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import ConfigurationError, InvalidURI, PyMongoError
from pymongo.read_concern import ReadConcern
from pymongo.synchronous.command_cursor import RawBatchCommandCursor

from .errors import (
    OperationFailed,
    WatchUnsupported,
    not_a_replica_set,
    translated,
)
from .token import ResumeToken

__all__ = ["Cursor", "Driver", "Reply", "open_driver"]

R = TypeVar("R")

# One odd document must not end a stream for all: dates beyond year 9999 come as DatetimeMS and
# bytes that are not UTF-8 as U+FFFD.
CODEC: CodecOptions[dict[str, Any]] = CodecOptions(
    tz_aware=True,
    uuid_representation=UuidRepresentation.STANDARD,
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
    unicode_decode_error_handler="replace",
)

_RAW: CodecOptions[Any] = CodecOptions(document_class=RawBSONDocument)
_RAW_BATCHES = (RawBatchCommandCursor, AsyncRawBatchCommandCursor)

# mongomock implements zones and nothing else of it.
_MOCK_CODEC: CodecOptions[dict[str, Any]] = CodecOptions(tz_aware=True)

_TURNS = 3

# How long the server may hold a getMore that has nothing to say, in milliseconds.
AWAIT_MS = 1000


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply of a change stream's cursor: BSON documents end to end, and the position after."""

    documents: bytes
    position: ResumeToken
    cluster_time: Timestamp | None = None  # the server's own, when it replied


class Cursor(Protocol):
    """A change stream's cursor on the server. One call at a time."""

    async def read(self, timeout: float) -> Reply | None:
        """The server's next reply, at most ``timeout`` seconds from now; ``None`` once ended."""

    async def close(self) -> None:
        """Give the cursor back, in bounded time, whatever state it is in. Never raises."""


class Driver:
    """One database, and what data-bridge asks of it."""

    can_watch = True

    def __init__(self, database: Any, *, owned: bool) -> None:
        self.database = database
        self.owned = owned
        self._second: Any = None

    @property
    def name(self) -> str:
        """The database's name."""
        return str(self.database.name)

    def collection(self, name: str) -> Any:
        """The driver's own collection object, with zoned dates and standard UUIDs."""
        return self.database.get_collection(name, codec_options=CODEC)

    async def command(
        self, command: Mapping[str, Any], *, timeout: float, session: Any = None
    ) -> dict[str, Any]:
        """Run a database command within ``timeout`` seconds; the driver's errors pass through."""
        # pymongo's own deadline ends a Motor thread too; asyncio's is for what it does not cover.
        async with asyncio.timeout(timeout + 1):
            with pymongo.timeout(timeout):
                reply: dict[str, Any] = await self.database.command(
                    command, codec_options=CODEC, session=session
                )
        return reply

    async def find_by_ids(
        self,
        collection: str,
        ids: Sequence[Any],
        *,
        filter: Mapping[str, Any] | None = None,
        projection: Mapping[str, Any] | None = None,
        timeout: float,
    ) -> list[dict[str, Any]]:
        """The documents with these ids that a filter matches, as the majority has them now."""
        query: dict[str, Any] = {"_id": {"$in": list(ids)}}
        if filter:
            query = {"$and": [query, dict(filter)]}
        command: dict[str, Any] = {"find": collection, "filter": query}
        if projection:
            command["projection"] = dict(projection)
        command |= {"readConcern": {"level": "majority"}, "batchSize": len(ids) + 1}
        found, _ = await self.find(command, timeout=timeout)
        return found

    async def find(
        self, command: Mapping[str, Any], *, timeout: float
    ) -> tuple[list[dict[str, Any]], Timestamp | None]:
        """All documents of a ``find`` command, and the moment of them if it reads a snapshot."""
        async with self.session() as session:
            reply = await self.command(command, timeout=timeout, session=session)
            cursor = reply["cursor"]
            found: list[dict[str, Any]] = cursor["firstBatch"]
            moment: Timestamp | None = cursor.get("atClusterTime")
            while cursor["id"]:
                more = {"getMore": cursor["id"], "collection": command["find"]}
                more["batchSize"] = command["batchSize"]
                reply = await self.command(more, timeout=timeout, session=session)
                cursor = reply["cursor"]
                found += cursor["nextBatch"]
        return found, moment

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Any]:
        """A session, in which several commands read from one moment."""
        started = self.database.client.start_session(causal_consistency=False)
        session = await started if inspect.isawaitable(started) else started
        async with session:
            yield session

    async def check(self, timeout: float) -> None:
        """Find out whether changes can be watched here.

        Raises:
            ServerUnreachable, AuthenticationFailed, NotAReplicaSet: each with its remedy.
        """
        try:
            hello = await self.command({"hello": 1}, timeout=timeout)
            # hello is answered to everybody; this to every user, whatever the user may read.
            await self.command(
                {"listCollections": 1, "nameOnly": True, "authorizedCollections": True},
                timeout=timeout,
            )
        except (PyMongoError, TimeoutError, OSError) as error:
            raise translated(error, f"connect to the database {self.name!r}") from error
        if "setName" not in hello and hello.get("msg") != "isdbgrid":
            raise not_a_replica_set("watch for changes")

    async def open(
        self,
        collection: str | None,
        pipeline: Sequence[Mapping[str, Any]],
        *,
        batch_size: int,
        timeout: float,
    ) -> tuple[Cursor, ResumeToken]:
        """Open a cursor on a collection, or on all of the database (``None``).

        It is ready on return, at the position returned with it.
        """
        raise NotImplementedError

    def _beside(self, client: Any) -> Any:
        """The database through a client that only cursors use, with connections of its own.

        A cursor's getMore occupies a connection for as long as it waits: thirty of them would leave
        a pool of thirty with none for the application's queries.
        """
        if self._second is None:
            # The driver does so itself for encryption; tests/test_driver.py holds it to account.
            self._second = client._duplicate(maxPoolSize=None, minPoolSize=0)
        return self._second[self.name]

    async def close(self) -> None:
        """Close the client if this package opened it."""


class PyMongoDriver(Driver):
    """PyMongo's async API."""

    async def open(
        self,
        collection: str | None,
        pipeline: Sequence[Mapping[str, Any]],
        *,
        batch_size: int,
        timeout: float,
    ) -> tuple[Cursor, ResumeToken]:
        aggregate = _aggregate(self._beside(self.database.client), collection)
        async with asyncio.timeout(timeout + 1):
            with pymongo.timeout(timeout):
                cursor = await aggregate(
                    list(pipeline), batchSize=batch_size, maxAwaitTimeMS=AWAIT_MS
                )
        return PyMongoCursor(cursor), _position(cursor)

    async def close(self) -> None:
        if self._second is not None:
            await self._second.close()
        if self.owned:
            await self.database.client.close()
        # A getMore that was cut off leaves its socket to be closed in the loop's next turns, and
        # these may be the last.
        for _ in range(_TURNS):
            await asyncio.sleep(0)


class PyMongoCursor:
    """A raw batch cursor of PyMongo's async API."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor

    async def read(self, timeout: float) -> Reply | None:
        if not self._cursor.alive:
            return None
        async with asyncio.timeout(timeout + 1):
            with pymongo.timeout(timeout):
                found = await self._cursor.try_next()
                rest = [await self._cursor.try_next() for _ in range(_left(self._cursor))]
        return _reply(self._cursor, found, rest)

    async def close(self) -> None:
        with suppress(PyMongoError, OSError, TimeoutError):
            async with asyncio.timeout(1):
                await self._cursor.close()


class MotorDriver(Driver):
    """Motor, read through its delegate on a thread of the cursor's own.

    Motor's pool has five threads per core and a waiting getMore holds one; twenty cursors there
    would stop every query of the application.
    """

    async def open(
        self,
        collection: str | None,
        pipeline: Sequence[Mapping[str, Any]],
        *,
        batch_size: int,
        timeout: float,
    ) -> tuple[Cursor, ResumeToken]:
        database = self._beside(self.database.client.delegate)
        aggregate = _aggregate(database, collection)
        thread = _Thread()

        def opened() -> Any:
            with pymongo.timeout(timeout):
                return aggregate(list(pipeline), batchSize=batch_size, maxAwaitTimeMS=AWAIT_MS)

        try:
            async with asyncio.timeout(timeout + 1):
                cursor = await thread.run(opened)
        except BaseException:
            thread.stop()
            raise
        return MotorCursor(database, collection, cursor, thread), _position(cursor)

    async def close(self) -> None:
        if self._second is not None:
            self._second.close()
        if self.owned:
            self.database.client.close()


class MotorCursor:
    """A raw batch cursor of Motor's delegate and the thread that reads it."""

    def __init__(self, database: Any, collection: str | None, cursor: Any, thread: _Thread) -> None:
        self._database = database
        self._collection = collection or "$cmd.aggregate"  # where the server keeps such cursors
        self._cursor = cursor
        self._thread = thread

    def _read(self, timeout: float) -> Reply | None:
        if not self._cursor.alive:
            return None
        with pymongo.timeout(timeout):
            found = self._cursor.try_next()
            rest = [self._cursor.try_next() for _ in range(_left(self._cursor))]
        return _reply(self._cursor, found, rest)

    async def read(self, timeout: float) -> Reply | None:
        async with asyncio.timeout(timeout + 1):
            return await self._thread.run(self._read, timeout)

    async def close(self) -> None:
        # A thread inside a getMore comes back when the server's wait is over. Killed from outside,
        # the cursor is gone by then, and the thread ends by itself.
        busy = self._thread.busy and self._cursor.cursor_id
        thread = _Thread() if busy else self._thread
        try:
            async with asyncio.timeout(1.5):
                await thread.run(self._killed if busy else self._closed)
        except TimeoutError:
            pass
        finally:
            thread.stop()
            self._thread.stop()

    def _killed(self) -> None:
        kill = {"killCursors": self._collection, "cursors": [self._cursor.cursor_id]}
        with suppress(PyMongoError, OSError), pymongo.timeout(1):
            self._database.command(kill)

    def _closed(self) -> None:
        with suppress(PyMongoError, OSError), pymongo.timeout(1):
            self._cursor.close()


class MockDriver(Driver):
    """mongomock-motor: reads and writes, no change streams."""

    can_watch = False

    def collection(self, name: str) -> Any:
        return self.database.get_collection(name, codec_options=_MOCK_CODEC)

    async def check(self, timeout: float) -> None:
        return None

    async def open(
        self,
        collection: str | None,
        pipeline: Sequence[Mapping[str, Any]],
        *,
        batch_size: int,
        timeout: float,
    ) -> tuple[Cursor, ResumeToken]:
        raise WatchUnsupported(
            "mongomock-motor has no change streams: reads and writes work, watch() needs a "
            "MongoDB replica set (data_bridge.embedded.ReplicaSet starts one in under a second). "
            "In a test, data_bridge.testing.mock_database() stands in for one."
        )


class _Thread:
    """One daemon thread that runs calls in turn, so that no exit ever waits for a server."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.busy = False
        threading.Thread(target=self._main, name="data-bridge-cursor", daemon=True).start()

    async def run(self, function: Callable[..., R], *args: Any) -> R:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        def call() -> None:
            result, error = None, None
            try:
                result = function(*args)
            except Exception as raised:  # handed to the awaiting task, all of them
                error = raised
            finally:
                self.busy = False
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(settle, result, error)

        self.busy = True
        self._calls.put(call)
        return await future

    def stop(self) -> None:
        self._calls.put(None)

    def _main(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


def _aggregate(database: Any, collection: str | None) -> Any:
    # The server refuses change streams with any other read concern, and a client may have set one.
    concern = ReadConcern("majority")
    if collection is None:  # which has no raw batches; its documents are raw one by one
        return database.with_options(codec_options=_RAW, read_concern=concern).aggregate
    return database.get_collection(
        collection, codec_options=CODEC, read_concern=concern
    ).aggregate_raw_batches


def _left(cursor: Any) -> int:
    """How many documents of a reply are still to be taken from a cursor that is not of batches."""
    return 0 if isinstance(cursor, _RAW_BATCHES) else len(cursor._data)


def _position(cursor: Any) -> ResumeToken:
    # The drivers keep postBatchResumeToken to themselves outside watch(), and watch() gives away
    # batches and retries on its own terms; tests/test_driver.py holds this name to account.
    token = cursor._post_batch_resume_token
    if token is None:
        raise OperationFailed(
            "this server sends no postBatchResumeToken; data-bridge needs MongoDB 4.4 or newer"
        )
    return ResumeToken.of(token)


def _reply(cursor: Any, found: Any, rest: list[Any]) -> Reply:
    if isinstance(found, RawBSONDocument):
        found = b"".join(d.raw for d in (found, *rest))
    session = cursor._session
    time = None if session is None else (session.cluster_time or {}).get("clusterTime")
    return Reply(found or b"", _position(cursor), time)


def open_driver(source: Any) -> Driver:
    """The driver for a URI, a client or a database.

    Raises:
        OperationFailed: the URI is not valid or names no database.
        TypeError: the source is none of these.
    """
    if isinstance(source, str):
        return PyMongoDriver(_database_of_uri(source), owned=True)
    if isinstance(source, AsyncMongoClient):
        return PyMongoDriver(source[_default_name(source)], owned=False)
    if isinstance(source, AsyncDatabase):
        return PyMongoDriver(source, owned=False)
    # mongomock-motor's classes pass for Motor's, so they are asked first.
    if any(base.__module__.startswith("mongomock_motor") for base in type(source).__mro__):
        mock = source if hasattr(source, "get_collection") else source[_default_name(source)]
        # One of data_bridge.testing brings a driver that can watch.
        kind: type[Driver] = getattr(type(mock), "data_bridge_driver", MockDriver)
        return kind(mock, owned=False)
    if (motor := sys.modules.get("motor.motor_asyncio")) is not None:
        if isinstance(source, motor.AsyncIOMotorClient):
            return MotorDriver(source[_default_name(source)], owned=False)
        if isinstance(source, motor.AsyncIOMotorDatabase):
            return MotorDriver(source, owned=False)
    raise TypeError(
        "a database is a MongoDB URI, a Motor client or database, a PyMongo AsyncMongoClient or "
        f"AsyncDatabase, or one of mongomock-motor; not {type(source).__module__}."
        f"{type(source).__qualname__}"
    )


def _default_name(client: Any) -> str:
    try:
        return str(client.get_default_database().name)
    except ConfigurationError as error:
        raise OperationFailed(
            "this client names no default database: hand in client['shop'] instead, or end the "
            "client's URI with /shop"
        ) from error


def _database_of_uri(uri: str) -> AsyncDatabase[dict[str, Any]]:
    # parse_uri would resolve mongodb+srv twice; the client alone does it once, when it is made.
    options: dict[str, Any] = {}
    if "serverselectiontimeoutms" not in uri.lower():
        options["serverSelectionTimeoutMS"] = 5000
    try:
        client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(uri, **options)
    except (InvalidURI, ConfigurationError, ValueError, TypeError) as error:
        raise OperationFailed(
            "this is not a valid MongoDB URI; one looks like mongodb://host:27017/database"
        ) from error
    return client[_default_name(client)]
