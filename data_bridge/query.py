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

from .errors import DataBridgeError, OperationFailed, SnapshotTooLarge, SnapshotUnavailable
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
        self._position = None
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

    def moved(self) -> None:
        """The head is further than it was, without a change that it had to wait for."""
        self._wake()


class Query:
    """A live query, for as long as anybody is interested. A subclass says how it decides."""

    routed = True  # found by an equality in its filter

    def __init__(self, driver: Driver, router: Router, question: Question, limits: Limits) -> None:
        self.question = question
        self.images = question.images
        self.members: dict[Hashable, Any] = {}
        self.route = _route(question.filter) if self.routed else None
        self.log = QueryLog(limits, lambda: router.head)
        self.since = ""  # a collection that was dropped before is of no concern any more
        self.subscribers = 0
        self.idle_since = 0.0
        self.closed = False
        self.driver = driver
        self.limits = limits
        self.start = router.start
        self._router = router
        self._snapshot: asyncio.Task[Snapshot] | None = None
        self._next: asyncio.Task[Snapshot] | None = None
        self._snapshot_taken = 0.0
        self._snapshot_of: Timestamp | None = None
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

    async def snapshot(self, at: Timestamp | None = None, *, since: float = 0.0) -> Snapshot:
        """What matches now, or at one time; those who ask in the same moment share it.

        Args:
            at: the cluster time of the moment.
            since: the loop's time before which a snapshot is too old for who has seen more.
        """
        task = self._snapshot
        if self._next is not None and self._snapshot_taken < since:
            task = self._next
        elif task is None or self._snapshot_taken < since or not self._usable(task, at):
            if since and task is not None and not task.done():
                # Whoever comes while one is read shares the next.
                task = self._next = self.start(self._after(task))
            else:
                self._snapshot_taken, self._snapshot_of = asyncio.get_running_loop().time(), at
                task = self._snapshot = self.start(self._taken(at))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled() and self.log.ended is not None:
                raise self.log.ended from None
            raise

    async def _after(self, before: asyncio.Task[Snapshot]) -> Snapshot:
        await asyncio.wait({before})
        self._snapshot, self._next = self._next, None
        self._snapshot_taken, self._snapshot_of = asyncio.get_running_loop().time(), None
        return await self._taken(None)

    def _usable(self, task: asyncio.Task[Snapshot], at: Timestamp | None) -> bool:
        age = asyncio.get_running_loop().time() - self._snapshot_taken
        if age > self.limits.snapshot_age:
            return False
        if not task.done():
            return at is None or at == self._snapshot_of
        if task.cancelled() or task.exception() is not None:
            return False
        found = task.result()
        return self.covers(found.position) and (at is None or at == found.time)

    async def _taken(self, at: Timestamp | None) -> Snapshot:
        # Only once there is history from its moment on: a snapshot of a server that lags behind
        # the one that the feed reads is of no use.
        for _ in range(5):
            found = await self._read(at)
            if found.position.hex >= self.log.floor and self.took(found):
                return found
            await asyncio.sleep(0.05)
        if at is not None:
            raise SnapshotUnavailable(f"what happened since {at} is forgotten")
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

    def took(self, snapshot: Snapshot) -> bool:
        """A snapshot was taken, and somebody will be shown it, unless this is false."""
        return True

    def forget(self, floor: str, now: float) -> None:
        """Drop what nobody will ask for any more."""
        if self.log.entries:  # otherwise nothing happened that could be forgotten
            self.log.forget_until(floor)
        task, age = self._snapshot, now - self._snapshot_taken
        if task is not None and task.done() and age > self.limits.snapshot_age:
            self._snapshot = None


def _route(filter: Filter) -> tuple[str, tuple[Hashable, ...]] | None:
    """An equality that every match satisfies, by which the router finds the query."""
    best = min(filter.equalities, key=lambda e: (len(e[1]), e[0] != "_id"), default=None)
    return None if best is None else (best[0], best[1])


class Stateless(Query):
    """Decides from the change alone: everything matches, or the images tell."""

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
        self._complete = False  # until the first snapshot nobody knows who matches
        # Members that a snapshot has shown, and its position: changes up to there are yet to come.
        self._ahead: dict[Hashable, str] = {}

    def apply(self, entry: Entry) -> None:
        if not self._complete:  # took() finds it in the feed's log
            return
        raw, operation, after = entry.raw, entry.operation, entry.after
        member, id = member_key(raw), raw["documentKey"]["_id"]
        if after is not None or operation == "delete":
            self.decide(entry, member, id, self._match(after), after)
        elif member in self.members:  # deleted since, which is yet to be told
            self.tell([LiveEntry(entry, operation, id)])

    def _match(self, after: Mapping[str, Any] | None) -> bool:
        return after is not None and self.question.filter.matches(after)

    def decide(
        self, entry: Entry, member: Hashable, id: Any, is_: bool, after: dict[str, Any] | None
    ) -> None:
        """Tell what it means that a document matches now, or does not."""
        operation = entry.operation
        was = member in self.members
        if was and (ahead := self._ahead.get(member)) is not None:
            was = entry.token > ahead
            if was:
                del self._ahead[member]
        if is_ and not was:
            self._join(member, id)
            operation = _appears(operation)
        elif was and not is_:
            del self.members[member]
            self._router.left(self, member)
            operation = _disappears(operation)
            after = None
        elif not is_:
            return
        if not self.closed:
            self.tell([LiveEntry(entry, operation, id, after)])

    def _join(self, member: Hashable, id: Any) -> None:
        if member not in self.members:
            self.members[member] = id
            self._router.joined(self, member)
            if len(self.members) > self.limits.members:
                self.fail(_too_many(self.question.collection, self.limits.members))

    def covers(self, position: ResumeToken) -> bool:
        return self._complete and super().covers(position)

    def took(self, snapshot: Snapshot) -> bool:
        changes = self._router.since(snapshot.position, self.question.collection)
        if changes is None:
            return False
        ids: dict[Hashable, Any] = {key(d["_id"]): d["_id"] for d in snapshot.documents}
        if self._complete:
            self._also(snapshot, ids, changes)
        else:
            self._complete = True
            self.since = self.log.floor = max(self.log.floor, snapshot.position.hex)
            for member, id in ids.items():
                self._join(member, id)
            self.begin(snapshot.position, changes)
        return True

    def begin(self, position: ResumeToken, changes: list[Entry]) -> None:
        """It is known who matched at a position; these are the changes since."""
        for entry in changes:
            self.add(entry)

    def _also(self, snapshot: Snapshot, ids: Mapping[Hashable, Any], changes: list[Entry]) -> None:
        """Whoever looks at this snapshot must hear of it when one of these goes."""
        seq = self.log.seek(snapshot.position.hex)
        assert seq is not None
        told = {
            key(entry.id)
            for entry in self.log.entries[seq - self.log.base :]
            if isinstance(entry, LiveEntry) and entry.operation in ("leave", "delete")
        }
        head = self.log.head.hex
        decided = {
            member_key(entry.raw)
            for entry in changes
            if "documentKey" in entry.raw and entry.token <= head
        }
        went = set()
        for member, id in ids.items():
            if member in self.members:
                continue
            if member not in decided:
                self._join(member, id)
                self._ahead[member] = snapshot.position.hex
            elif member not in told:
                # The server looked up later states for its changes, in none of which it matched.
                went.add(member)
        if went:
            snapshot.documents[:] = [d for d in snapshot.documents if key(d["_id"]) not in went]

    def forget(self, floor: str, now: float) -> None:
        super().forget(floor, now)
        if self._ahead:
            head = self.log.head.hex
            self._ahead = {m: token for m, token in self._ahead.items() if token > head}


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
