"""Query: one live query of a feed, evaluated once for all who look at it.

It is told of the changes that may concern it and keeps, in a log of its own, what they mean to
somebody who sees only what matches: an insert, an update, a document that comes in or goes out.

How it knows whether a document was seen before: from the image before the change, where the
collection keeps images, and then it needs no memory at all; else by keeping account of the ids that
match, of which there is a bound.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .errors import DataBridgeError, OperationFailed, SnapshotTooLarge
from .filter import Filter
from .log import RESET, Limits, Log
from .order import key
from .question import Question
from .router import WHOLE_COLLECTION, member_key
from .snapshot import Snapshot, read_snapshot
from .source import Entry
from .token import ResumeToken

if TYPE_CHECKING:
    from bson import Timestamp

    from .driver import Driver
    from .router import Router

__all__ = ["LiveEntry", "Query", "Stateless", "Tracked"]

_log = logging.getLogger("data_bridge")

_OF_DOCUMENTS = frozenset({"insert", "update", "replace", "delete"})
# What a change of a live query takes in memory beside the change itself, in bytes.
_COST = 300
NO_IMAGE = "no image"


class LiveEntry(Entry):
    """What a change means to a live query."""

    __slots__ = ("document", "id", "last", "reason")

    def __init__(
        self,
        entry: Entry,
        operation: str,
        id: Any = None,
        document: dict[str, Any] | None = None,
        *,
        last: bool = True,
        reason: str = "",
    ) -> None:
        self.raw = entry.raw
        self.token = entry.token
        self.after = None
        self.change = None
        self.cost = _COST
        self.frames = None
        self.operation = operation
        self.id = id
        self.document = document
        self.last = last  # of those that one change brings about: from here on one can resume
        self.reason = reason


class QueryLog(Log):
    """The log of a query. Its head is as far as the changes have been handed out."""

    def __init__(self, limits: Limits, head: Callable[[], ResumeToken]) -> None:
        super().__init__(head(), limits)
        self.position = head

    @property
    def head(self) -> ResumeToken:
        return self.position()


class Query:
    """A live query, for as long as anybody is interested. A subclass says how it decides."""

    remembers = True  # and so can tell of nothing that happened before it was there
    routed = True  # found by an equality in its filter

    def __init__(self, driver: Driver, router: Router, question: Question, limits: Limits) -> None:
        self.question = question
        self.images = question.images
        self.members: dict[Hashable, Any] | None = None
        self.route = _route(question.filter) if self.routed else None
        self.log = QueryLog(limits, lambda: router.head)
        self.since = ""  # a collection that was dropped before is of no concern any more
        self.subscribers = 0
        self.idle_since = 0.0
        self.closed = False
        self.driver = driver
        self.limits = limits
        self._router = router
        self._snapshot: asyncio.Task[Snapshot] | None = None
        self._snapshot_taken = 0.0
        router.add(self)

    # -- changes --

    def add(self, entry: Entry) -> None:
        """A change that may concern this query."""
        if entry.operation in WHOLE_COLLECTION:
            if entry.token > self.since:
                self.reset(entry, "history lost" if entry.operation == RESET else entry.operation)
        elif entry.operation in _OF_DOCUMENTS:
            self.apply(entry)

    def apply(self, entry: Entry) -> None:
        """A change of a document that may concern this query."""
        raise NotImplementedError

    def tell(self, entries: list[LiveEntry]) -> None:
        """Add to the log what a change means."""
        self.log.append(entries, self.log.head)  # type: ignore[arg-type]

    def reset(self, entry: Entry, reason: str) -> None:
        """What was seen so far is no base to go on from: everybody reads a new snapshot."""
        if reason == NO_IMAGE:  # the collection was dropped, and made anew by a write
            self._router.keep_images(self.question.collection)
        self.tell([LiveEntry(entry, RESET, reason=reason)])
        self.close()
        self.log.finish()

    def fail(self, error: DataBridgeError) -> None:
        """Nobody can be served any more."""
        self.close()
        self.log.end_with(error)

    def close(self) -> None:
        """Stop being told of changes."""
        if not self.closed:
            self.closed = True
            self._router.remove(self)

    # -- snapshots --

    async def snapshot(self, at: Timestamp | None = None) -> Snapshot:
        """What matches now, or at one time; those who ask in the same moment share it."""
        if at is not None:
            found = await self._read(at)
            self.took(found)
            return found
        now = asyncio.get_running_loop().time()
        task = self._snapshot
        if (
            task is None
            or (task.done() and (task.cancelled() or task.exception() is not None))
            or (task.done() and not self.covers(task.result().position))
            or now - self._snapshot_taken > self.limits.snapshot_age
        ):
            self._snapshot_taken = now
            task = self._snapshot = asyncio.create_task(self._shared())
            task.add_done_callback(_retrieved)
        return await asyncio.shield(task)

    async def _shared(self) -> Snapshot:
        # Only once there is history from its moment on: a snapshot of a server that lags behind
        # the one that the feed reads is of no use.
        for _ in range(5):
            found = await self._read()
            if found.position.hex >= self.log.floor:
                self.took(found)
                return found
            await asyncio.sleep(0.05)
        raise OperationFailed("snapshots are older than the changes: read both from the primary")

    async def _read(self, at: Timestamp | None = None) -> Snapshot:
        question = self.question
        return await read_snapshot(
            self.driver,
            question.collection,
            question.filter.query,
            sort=dict(question.sort),
            limit=question.limit,
            projection=question.projection,
            bound=self.limits.snapshot_documents,
            timeout=self.limits.timeout,
            head=self.log.head,
            at=at,
        )

    def covers(self, position: ResumeToken) -> bool:
        """Whether this query can tell of everything after a position."""
        return position.hex >= self.log.floor

    def took(self, snapshot: Snapshot) -> None:
        """A snapshot was taken, and somebody will be shown it."""

    def forget(self, floor: str, now: float) -> None:
        """Drop what nobody will ask for any more."""
        self.log.forget_until(floor)
        task, age = self._snapshot, now - self._snapshot_taken
        if task is not None and task.done() and age > self.limits.snapshot_age:
            self._snapshot = None


def _retrieved(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # everybody who waited for it may have left


def _route(filter: Filter) -> tuple[str, tuple[Hashable, ...]] | None:
    """An equality that every match satisfies, by which the router finds the query."""
    best = min(filter.equalities, key=lambda e: (len(e[1]), e[0] != "_id"), default=None)
    return None if best is None else (best[0], best[1])


class Stateless(Query):
    """Decides from the change alone: everything matches, or the images tell."""

    remembers = False

    def apply(self, entry: Entry) -> None:
        if (found := self.meaning(entry)) is None:
            return
        if found.operation == RESET:
            self.reset(entry, found.reason)
        else:
            self.tell([found])

    def meaning(self, entry: Entry) -> LiveEntry | None:
        """What a change means to this query."""
        operation = entry.operation
        if operation not in _OF_DOCUMENTS:
            if operation not in WHOLE_COLLECTION:
                return None
            reason = "history lost" if operation == RESET else operation
            return LiveEntry(entry, RESET, reason=reason)
        raw, after = entry.raw, entry.after
        id = raw["documentKey"]["_id"]
        if after is None and operation != "delete":
            if self.images:
                return LiveEntry(entry, RESET, reason=NO_IMAGE)
            return LiveEntry(entry, operation, id)  # deleted since, which is yet to be told
        matches = self.question.filter.matches
        if not self.question.filter.query:
            return LiveEntry(entry, operation, id, after)
        was = False
        if operation != "insert":
            before = raw.get("fullDocumentBeforeChange")
            if before is None:
                return LiveEntry(entry, RESET, reason=NO_IMAGE)
            was = matches(before)
        is_ = after is not None and matches(after)
        if was and is_:
            return LiveEntry(entry, operation, id, after)
        if is_:
            return LiveEntry(entry, _appears(operation), id, after)
        return LiveEntry(entry, _disappears(operation), id) if was else None


class Tracked(Query):
    """Decides by the ids that match, of which it keeps account."""

    def __init__(self, driver: Driver, router: Router, question: Question, limits: Limits) -> None:
        super().__init__(driver, router, question, limits)
        self.members = {}
        self._before: list[Entry] | None = []  # until the first snapshot tells who matches

    def apply(self, entry: Entry) -> None:
        if self._before is not None:
            self._before.append(entry)
            return
        raw, operation, after = entry.raw, entry.operation, entry.after
        member, id = member_key(raw), raw["documentKey"]["_id"]
        if after is not None or operation == "delete":
            self.decide(entry, member, id, self._match(after), after)
        elif member in (self.members or ()):  # deleted since, which is yet to be told
            self.tell([LiveEntry(entry, operation, id)])

    def _match(self, after: Mapping[str, Any] | None) -> bool:
        return after is not None and self.question.filter.matches(after)

    def decide(
        self, entry: Entry, member: Hashable, id: Any, is_: bool, after: dict[str, Any] | None
    ) -> None:
        """Tell what it means that a document matches now, or does not."""
        assert self.members is not None
        was = member in self.members
        operation = entry.operation
        if is_ and not was:
            self.members[member] = id
            self._router.joined(self, member)
            if len(self.members) > self.limits.members:
                self.fail(_too_many(self.question.collection, self.limits.members))
                return
            operation = _appears(operation)
        elif was and not is_:
            del self.members[member]
            self._router.left(self, member)
            operation = _disappears(operation)
            after = None
        elif not is_:
            return
        self.tell([LiveEntry(entry, operation, id, after)])

    def covers(self, position: ResumeToken) -> bool:
        return self._before is None and super().covers(position)

    def took(self, snapshot: Snapshot) -> None:
        assert self.members is not None
        found = {key(document["_id"]): document["_id"] for document in snapshot.documents}
        # Whoever looks at this snapshot must hear of it when one of these goes. It may be missing
        # here, if it went since, which is in the log; or because the server looked up a later
        # state than the snapshot's, and that it went is yet to be told.
        went = {
            key(entry.id)
            for entry in self.log.entries[self._since(snapshot.position) :]
            if isinstance(entry, LiveEntry) and entry.operation in ("leave", "delete")
        }
        for member, id in found.items():
            if member not in self.members and member not in went:
                self.members[member] = id
                self._router.joined(self, member)
        before, self._before = self._before, None
        if before is not None:
            self.since = self.log.floor = max(self.log.floor, snapshot.position.hex)
        for entry in before or ():
            if entry.token > snapshot.position.hex:
                self.apply(entry)

    def _since(self, position: ResumeToken) -> int:
        seq = self.log.seek(position.hex)
        return 0 if seq is None else seq - self.log.base


def _appears(operation: str) -> str:
    return operation if operation == "insert" else "enter"


def _disappears(operation: str) -> str:
    return operation if operation == "delete" else "leave"


def _too_many(collection: str, bound: int) -> SnapshotTooLarge:
    return SnapshotTooLarge(
        f"a live query of {collection} matches more than {bound} documents. Narrow the filter, "
        "have the collection keep images (Settings.pre_images = True), or raise Limits.members."
    )


def ids_of(entries: Iterable[Entry]) -> dict[Hashable, Any]:
    """The documents that changes are about."""
    return {member_key(entry.raw): entry.raw["documentKey"]["_id"] for entry in entries}
