"""Mock: a mongomock-motor database whose changes can be watched, for tests without a server.

    database = mock_database("shop")
    async with connect(database):
        ...  # Order.watch() and Order.live() work

mongomock keeps no log and changes its documents in place. So after each write the collection is
compared with what it was before, and the difference is written to a log of this module's own.
"""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import mongomock.filtering
import mongomock.helpers
import mongomock_motor
from bson import CodecOptions, Timestamp, decode, encode
from bson.binary import UuidRepresentation
from pymongo.errors import OperationFailure, PyMongoError

from ..driver import AWAIT_MS, CODEC, Cursor, MockDriver, Reply
from ..errors import WatchUnsupported
from ..token import ResumeToken

__all__ = ["mock_database"]

# Their stubs say that they are Motor's own classes, which they only stand in for.
_motor: Any = mongomock_motor
_matches: Any = mongomock.filtering.filter_applies
_naive: Any = mongomock.helpers.patch_datetime_awareness_in_document

# mongomock compares dates without a zone.
_NAIVE: CodecOptions[dict[str, Any]] = CodecOptions(uuid_representation=UuidRepresentation.STANDARD)
_POLL = 0.1  # seconds between two looks for what nobody told of
# What a write does to documents that were there and stay: nothing, or an operation.
_WRITES = {
    "bulk_write": "update",
    "delete_many": None,
    "delete_one": None,
    "find_one_and_delete": None,
    "find_one_and_replace": "replace",
    "find_one_and_update": "update",
    "insert_many": None,
    "insert_one": None,
    "replace_one": "replace",
    "update_many": "update",
    "update_one": "update",
}
_UUID = "00000000000040008000000000000000"  # tokens have that of the collection, and no use for it
_Documents = dict[Hashable, bytes]


def mock_database(name: str = "test", *, history: int = 10_000) -> Any:
    """An empty mongomock-motor database whose changes can be watched through data-bridge.

    Hand it to ``connect()``, ``lifespan()`` or ``App(database=…)``. It lives in memory, starts
    neither thread nor task, and may be used from several event loops.

    The changes are those that a replica set would tell of, with these differences:

    - What one call changed is found out afterwards: of a ``bulk_write`` one change for each
      document, deletes first, and a replacement in it counts as an update.
    - ``update_description`` names the fields that differ, however the update was phrased.
    - ``full_document`` of an update is the document just after it, even if it was deleted since.
    - Writes that go around mongomock-motor (``database.delegate``, documents that expire) are seen
      as soon as somebody reads, or a tenth of a second later, several of them as one change.

    What it cannot do raises: transactions, expanded events, pipelines with other stages than
    ``$match`` and an including ``$project``, and filters that mongomock cannot evaluate.

    Args:
        name: the database's name.
        history: how many changes can be resumed. Older positions are lost, as on a server whose
            oplog has rolled; ``history=1`` is how a test gets to see that.

    Raises:
        ValueError: the history is shorter than one change.
    """
    if history < 1:
        raise ValueError(f"history is a number of changes from 1 on, not {history!r}")
    return _Client(history)[name]


# -- what happened ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Event:
    """One change, with the documents before and after it in BSON."""

    operation: str
    time: Timestamp
    wall_time: datetime
    namespace: dict[str, str]
    before: bytes | None = None
    after: bytes | None = None
    imaged: bool = False  # the collection keeps images
    to: dict[str, str] | None = None

    @property
    def token(self) -> str:
        at, invalidate = ResumeToken.at(self.time).hex, self.operation == "invalidate"
        return f"{at}2B022C0100296{'F' if invalidate else 'E'}5A1004{_UUID}04"

    def concerns(self, collection: str | None) -> bool:
        """Whether a cursor on a collection, or on all of the database, tells of it."""
        if collection is None or self.operation == "dropDatabase":
            return collection is None
        return collection in (self.namespace["coll"], (self.to or {}).get("coll"))

    def ends(self, collection: str | None) -> bool:
        """Whether such a cursor tells of nothing after it."""
        ending = ("dropDatabase",) if collection is None else ("drop", "rename")
        return self.operation in ending

    def document(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The change event, as the options of ``$changeStream`` want it."""
        found: dict[str, Any] = {
            "_id": {"_data": self.token},
            "operationType": self.operation,
            "clusterTime": self.time,
            "wallTime": self.wall_time,
        }
        if self.operation in ("insert", "replace"):
            found["fullDocument"] = _decoded(self.after)
        elif self.operation == "update" and "fullDocument" in options:
            lookup = options["fullDocument"] == "updateLookup"
            found["fullDocument"] = self._image(self.after, options["fullDocument"], lookup)
        if self.operation != "invalidate":
            found["ns"] = self.namespace
        if self.to is not None:
            found["to"] = self.to
        if (document := self.after or self.before) is not None:
            found["documentKey"] = {"_id": _decoded(document)["_id"]}
        if self.operation == "update":
            found["updateDescription"] = _described(_decoded(self.before), _decoded(self.after))
        if self.before is not None and options.get("fullDocumentBeforeChange", "off") != "off":
            wanted = options["fullDocumentBeforeChange"]
            found["fullDocumentBeforeChange"] = self._image(self.before, wanted)
        return found

    def _image(
        self, document: bytes | None, wanted: str, known: bool = False
    ) -> dict[str, Any] | None:
        if known or self.imaged:
            return _decoded(document)
        if wanted == "required":
            raise OperationFailure("the collection keeps no images of its documents", 47)
        return None


class _Oplog:
    """The last changes to one database, and its documents as they were after them."""

    def __init__(self, database: Any, history: int) -> None:
        self.time = Timestamp(int(time.time()), 0)  # of the last change
        self.imaged: set[str] = set()
        self._database = database  # mongomock's own
        self._history = history
        self._events: list[_Event] = []
        self._floor = ResumeToken.at(self.time).hex  # what came before it is forgotten
        self._documents: dict[str, _Documents] = {}  # of each collection that exists
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self.lock = threading.RLock()

    @property
    def position(self) -> ResumeToken:
        """The server's mark after all that has happened: the moment just before the next."""
        at = ResumeToken.at(Timestamp(self.time.time, self.time.inc + 1))
        return ResumeToken(f"{at.hex}2B0229296E04")

    def after(
        self, position: ResumeToken, collection: str | None, limit: int
    ) -> tuple[list[_Event], ResumeToken]:
        """What a cursor on a collection tells of after a position, and where it is then.

        Raises:
            OperationFailure: with code 286, if some of it is forgotten.
        """
        with self.lock:
            self.look()
            if position.hex < self._floor:
                raise OperationFailure("the oplog no longer has this position", 286)
            found: list[_Event] = []
            # From the moment itself on: a drop and the invalidate that follows share theirs.
            start = bisect_left(self._events, position.hex[:18], key=lambda e: e.token)
            for event in self._events[start:]:
                if not event.concerns(collection):
                    continue
                told = [event]
                if event.ends(collection):
                    told.append(_Event("invalidate", event.time, event.wall_time, {}))
                found += [e for e in told if e.token > position.hex]
                if len(found) >= limit or (found and event.ends(collection)):
                    return found, ResumeToken(found[-1].token)
            return found, max(position, self.position)

    def look(self) -> None:
        """Write down what was not told."""
        with self.lock:
            for name in {*self._database.list_collection_names(), *self._documents}:
                self._compare(name, "update")

    def _compare(self, name: str, operation: str | None) -> None:
        """Write down how a collection differs from what it was.

        Args:
            operation: what may have happened to the documents that are still there.
        """
        store = self._database[name]._store  # find() would copy each document
        before, now = self._documents.get(name, {}), _Documents()
        documents = list(store.documents)  # without the expired ones, which are gone after
        for key, document in zip(store._documents, documents, strict=True):
            known = operation is None and key in before
            now[key] = before[key] if known else _encoded(_in_order(document))
        if name in self._documents or store.is_created:
            self._documents[name] = now
        for key, old in before.items():
            if key not in now:
                self._add("delete", name, old)
        for key, new in now.items():
            if (old := before.get(key, b"")) != new:
                self._add((old and operation) or "insert", name, old or None, new)

    @contextmanager
    def writing(self, name: str, operation: str | None) -> Iterator[None]:
        """Within, documents of a collection are written."""
        with self.lock:
            try:
                yield
            finally:  # one that fails may have done some of it
                self._compare(name, operation)

    @contextmanager
    def dropping(self, name: str) -> Iterator[None]:
        """Within, a collection is dropped."""
        with self.lock:
            self.look()
            yield
            if self._documents.pop(name, None) is not None:
                self._add("drop", name)
            self.imaged.discard(name)

    @contextmanager
    def dropping_all(self) -> Iterator[None]:
        """Within, the database is dropped."""
        with self.lock:
            self.look()
            yield
            existed, self._documents = list(self._documents), {}
            self.imaged.clear()
            for name in existed:
                self._add("drop", name)
            if existed:
                self._add("dropDatabase")

    @contextmanager
    def renaming(self, name: str, to: str) -> Iterator[None]:
        """Within, a collection gets another name."""
        with self.lock:
            self.look()
            yield
            self._documents[to] = self._documents.pop(name)
            self.imaged.discard(to)
            if name in self.imaged:
                self.imaged.remove(name)
                self.imaged.add(to)
            self._add("rename", name, to={"db": self._database.name, "coll": to})

    def _add(
        self,
        operation: str,
        name: str | None = None,
        before: bytes | None = None,
        after: bytes | None = None,
        to: dict[str, str] | None = None,
    ) -> None:
        now = int(time.time())
        last = self.time
        self.time = Timestamp(now, 1) if now > last.time else Timestamp(last.time, last.inc + 1)
        namespace = {"db": self._database.name} | ({} if name is None else {"coll": name})
        wall_time = datetime.now(UTC)
        imaged = name in self.imaged
        self._events.append(
            _Event(operation, self.time, wall_time, namespace, before, after, imaged, to)
        )
        if len(self._events) > self._history:
            self._floor = self._events.pop(0).token
        for loop, news in self._waiting:
            with suppress(RuntimeError):  # that loop is closed
                loop.call_soon_threadsafe(news.set)

    @contextmanager
    def waiting(self) -> Iterator[asyncio.Event]:
        """Within, an event of the running loop that is set by the next change."""
        waiting = asyncio.get_running_loop(), asyncio.Event()
        with self.lock:
            self._waiting = self._waiting | {waiting}
        try:
            yield waiting[1]
        finally:
            with self.lock:
                self._waiting = self._waiting - {waiting}


# -- mongomock-motor, observed ------------------------------------------------------------------


class _Client(_motor.AsyncMongoMockClient):  # type: ignore[misc]
    def __init__(self, history: int) -> None:
        super().__init__()
        self._history = history
        self._oplogs: dict[str, _Oplog] = {}

    def get_database(self, name: str, *args: Any, **kwargs: Any) -> _Database:
        delegate = super().get_database(name, *args, **kwargs).delegate
        if name not in self._oplogs:
            self._oplogs[name] = _Oplog(delegate, self._history)
        return _Database(self, delegate, self._oplogs[name])

    async def drop_database(self, name_or_database: Any, *args: Any, **kwargs: Any) -> None:
        name = getattr(name_or_database, "name", name_or_database)
        with self[name]._oplog.dropping_all():
            await super().drop_database(name, *args, **kwargs)


class _Collection(_motor.AsyncMongoMockCollection):  # type: ignore[misc]
    async def drop(self, *args: Any, **kwargs: Any) -> None:
        with self.database._oplog.dropping(self.name):
            await super().drop(*args, **kwargs)

    async def rename(self, new_name: str, *args: Any, **kwargs: Any) -> Any:
        with self.database._oplog.renaming(self.name, new_name):
            return await super().rename(new_name, *args, **kwargs)


def _observed(name: str, operation: str | None) -> Callable[..., Any]:
    real: Any = getattr(_motor.AsyncMongoMockCollection, name)

    async def write(self: _Collection, *args: Any, **kwargs: Any) -> Any:
        with self.database._oplog.writing(self.name, operation):
            return await real(self, *args, **kwargs)  # which suspends nowhere

    write.__name__ = name
    return write


for _name, _operation in _WRITES.items():
    setattr(_Collection, _name, _observed(_name, _operation))


class _Database(_motor.AsyncMongoMockDatabase):  # type: ignore[misc]
    data_bridge_driver: type[_Driver]

    def __init__(self, client: _Client, delegate: Any, oplog: _Oplog) -> None:
        super().__init__(client, delegate)
        self._oplog = oplog

    def get_collection(self, *args: Any, **kwargs: Any) -> _Collection:
        return _Collection(self, self.delegate.get_collection(*args, **kwargs))

    async def drop_collection(self, name_or_collection: Any, *args: Any, **kwargs: Any) -> None:
        name = getattr(name_or_collection, "name", name_or_collection)
        with self._oplog.dropping(name):
            await super().drop_collection(name, *args, **kwargs)

    async def command(self, command: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(command, Mapping) and "changeStreamPreAndPostImages" in command:
            name = command.get("create") or command["collMod"]
            if command["changeStreamPreAndPostImages"]["enabled"]:
                self._oplog.imaged.add(name)
            else:
                self._oplog.imaged.discard(name)
            self.delegate._store.create_collection(name)  # unless it exists
            return {"ok": 1.0}
        reply = await super().command(command, *args, **kwargs)
        now = max(self._oplog.time, Timestamp(int(time.time()), 0))
        return {**reply, "$clusterTime": {"clusterTime": now}}


class _Unsupported(WatchUnsupported, PyMongoError):
    """What mongomock cannot evaluate. A driver's error too, for those who ask one."""

    def __init__(self, what: str, value: Any) -> None:
        super().__init__(
            f"mongomock cannot evaluate the {what} {value!r}. Test it against a real server: "
            "data_bridge.embedded.ReplicaSet starts one in under a second."
        )


# -- the driver ---------------------------------------------------------------------------------


class _Driver(MockDriver):
    """A database of ``mock_database()``."""

    can_watch = True

    @property
    def _oplog(self) -> _Oplog:
        oplog: _Oplog = self.database._oplog
        return oplog

    async def open(
        self,
        collection: str | None,
        pipeline: Sequence[Mapping[str, Any]],
        *,
        batch_size: int,
        timeout: float,
    ) -> tuple[Cursor, ResumeToken]:
        options, stages = (
            pipeline[0]["$changeStream"],
            [_stage(s, collection) for s in pipeline[1:]],
        )
        if "showExpandedEvents" in options:
            raise WatchUnsupported("mock_database() has no expanded events")
        self._oplog.look()
        start = self._oplog.position
        if "startAfter" in options:
            start = ResumeToken.of(options["startAfter"])
        elif "startAtOperationTime" in options:
            start = ResumeToken.at(options["startAtOperationTime"])
        self._oplog.after(start, collection, 1)  # raises if it is lost
        cursor = _Cursor(self._oplog, collection, options, stages, start, batch_size)
        return cursor, start

    async def find(
        self, command: Mapping[str, Any], *, timeout: float
    ) -> tuple[list[dict[str, Any]], Timestamp | None]:
        with self._oplog.lock:
            self._oplog.look()
            moment = self._oplog.time
            if command["readConcern"].get("atClusterTime", moment) != moment:
                raise OperationFailure("mock_database() reads only the present", 246)
            try:
                found = self.database.delegate[command["find"]].find(
                    command["filter"],
                    command.get("projection"),
                    sort=list(command.get("sort", {}).items()) or None,
                    limit=command.get("limit", 0),
                )
                return [_decoded(_encoded(_in_order(d))) for d in found], moment
            except PyMongoError:
                raise
            except Exception as error:  # of many kinds, for what mongomock did not think of
                raise _Unsupported("filter", command["filter"]) from error


_Database.data_bridge_driver = _Driver


class _Cursor:
    """A change stream's cursor on the log; nothing runs but while it is read."""

    def __init__(
        self,
        oplog: _Oplog,
        collection: str | None,
        options: Mapping[str, Any],
        stages: Sequence[Callable[[dict[str, Any]], dict[str, Any] | None]],
        position: ResumeToken,
        batch_size: int,
    ) -> None:
        self._oplog = oplog
        self._collection = collection
        self._options = options
        self._stages = stages
        self._position = position
        self._batch_size = batch_size
        self._ended = False

    async def read(self, timeout: float) -> Reply | None:
        if self._ended:
            return None
        until = time.monotonic() + min(timeout, AWAIT_MS / 1000)
        while True:
            with self._oplog.waiting() as news:  # from before the look, in which it may be missing
                reply = self._next()
                if reply.documents or time.monotonic() >= until:
                    return reply
                with suppress(TimeoutError):
                    async with asyncio.timeout(_POLL):
                        await news.wait()

    def _next(self) -> Reply:
        events, position = self._oplog.after(self._position, self._collection, self._batch_size)
        documents = [_encoded(d) for e in events if (d := self._staged(e)) is not None]
        self._position = position
        self._ended = bool(events) and events[-1].operation == "invalidate"
        return Reply(b"".join(documents), position, self._oplog.time)

    def _staged(self, event: _Event) -> dict[str, Any] | None:
        document: dict[str, Any] | None = event.document(self._options)
        for stage in self._stages:
            if document is not None:
                document = stage(document)
        return document

    async def close(self) -> None:
        self._ended = True


# -- the stages of a pipeline -------------------------------------------------------------------


def _stage(
    stage: Mapping[str, Any], collection: str | None
) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    """What a stage makes of a change event; ``None``: it is left out."""
    ((name, value),) = stage.items()
    if name == "$match":
        query = _naive(value)

        def matches(event: dict[str, Any]) -> bool:
            try:
                return bool(_matches(query, event))
            except Exception as error:  # of many kinds, for what mongomock did not think of
                raise _Unsupported("$match", value) from error

        matches({})
        return lambda event: event if matches(decode(_encoded(event), _NAIVE)) else None
    if name == "$project" and all(v in (1, True) for v in value.values()):
        tree = _tree(value)
        return lambda event: _picked(event, tree)
    if name == "$replaceWith" and collection is None:
        return lambda event: event  # with which merge() has the server leave out what no view shows
    raise WatchUnsupported(
        f"mock_database() knows $match and an including $project in a pipeline, not {name}. Test "
        "it against a real server: data_bridge.embedded.ReplicaSet starts one in under a second."
    )


def _tree(paths: Iterable[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {"_id": {}}
    for path in paths:
        inner = tree
        for part in path.split("."):
            inner = inner.setdefault(part, {})
    return tree


def _picked(value: Any, tree: dict[str, Any]) -> Any:
    """Some fields of a document, or of each document of an array."""
    if not tree:
        return value
    if isinstance(value, list):
        return [_picked(v, tree) for v in value if isinstance(v, (dict, list))]
    return {
        name: _picked(value[name], inner)
        for name, inner in tree.items()
        if name in value and (not inner or isinstance(value[name], (dict, list)))
    }


# -- documents ----------------------------------------------------------------------------------


def _encoded(document: Mapping[str, Any]) -> bytes:
    return encode(document, codec_options=CODEC)


def _in_order(document: dict[str, Any]) -> dict[str, Any]:
    """A document as the server stores it, with its ``_id`` first."""
    return {"_id": document["_id"]} | document


def _decoded(document: bytes | None) -> dict[str, Any]:
    assert document is not None
    return decode(document, CODEC)


def _described(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """How an update changed a document."""
    updated: dict[str, Any] = {}
    removed: list[str] = []
    _differ(before, after, "", updated, removed)
    return {"updatedFields": updated, "removedFields": removed, "truncatedArrays": []}


def _differ(
    before: dict[str, Any],
    after: dict[str, Any],
    path: str,
    updated: dict[str, Any],
    removed: list[str],
) -> None:
    removed += [path + name for name in before if name not in after]
    for name, new in after.items():
        old = before.get(name)
        if name in before and _encoded({"": old}) == _encoded({"": new}):
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            _differ(old, new, f"{path}{name}.", updated, removed)
        elif isinstance(old, list) and isinstance(new, list) and old == new[: len(old)]:
            pushed = enumerate(new[len(old) :], len(old))
            updated.update({f"{path}{name}.{index}": value for index, value in pushed})
        else:
            updated[path + name] = new
