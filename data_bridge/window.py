"""Window: the first so many documents of an order, as other documents come and go.

It holds a few more than are seen, so that it has somebody to move up when one leaves; when it runs
short of those it is read again.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bson import DBRef

from .errors import DataBridgeError, ServerUnreachable
from .log import RESET
from .order import MISSING, Key, key
from .predicate import parts_of
from .query import NO_IMAGE, LiveEntry, Query
from .question import Question
from .router import WHOLE_COLLECTION, member_key
from .snapshot import Snapshot, read_snapshot
from .source import Entry
from .token import ResumeToken

if TYPE_CHECKING:
    from .driver import Driver
    from .log import Limits
    from .router import Router

__all__ = ["Ranked", "Window"]

_NO_ELEMENT = (4, 0)  # an empty array comes before null
_PAUSE = 0.5  # seconds before a window is read again, if the server did not answer
Row = tuple[Any, ...]


class _Descending:
    """A key that sorts the other way round."""

    __slots__ = ("key",)

    def __init__(self, key: Any) -> None:
        self.key = key

    def __lt__(self, other: _Descending) -> bool:
        return bool(other.key < self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Descending) and bool(self.key == other.key)

    __hash__ = None  # type: ignore[assignment]


def sort_key(document: dict[str, Any], sort: Sequence[tuple[str, int]]) -> Row:
    """Where a document stands in an order, as the server has it.

    Of an array the smallest element counts, or the largest where the order is descending.
    https://www.mongodb.com/docs/manual/reference/method/cursor.sort/#sort-by-an-array-field
    """
    row = []
    for path, direction in sort:
        value: Any = document.get(path, MISSING) if "." not in path else None
        if "." in path or value.__class__ is list:
            keys = _keys(document, parts_of(path))
            found = min(keys) if direction > 0 else max(keys)
        else:
            found = key(value)
        row.append(found if direction > 0 else _Descending(found))
    return tuple(row)


def _keys(value: Any, parts: Sequence[str]) -> Iterator[Key]:
    """The keys that an index on a path has for a document."""
    for index, part in enumerate(parts):
        if value.__class__ is list:
            if part.isdecimal() and part == str(int(part)) and int(part) < len(value):
                element, rest = value[int(part)], parts[index + 1 :]
                if rest:
                    yield from _keys(element, rest)
                else:
                    # An array that is found by its offset is one value, unless it is empty.
                    yield _NO_ELEMENT if element == [] else key(element)
                return
            for element in value:
                nested = isinstance(element, (dict, DBRef))
                yield from _keys(element if nested else {}, parts[index:])
            if value:
                return
        value = value.as_doc() if value.__class__ is DBRef else value
        value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
    if value.__class__ is not list:
        yield key(value)
    elif value:
        yield from map(key, value)
    else:
        yield _NO_ELEMENT


class Window:
    """Documents in order: those that are seen, and some that would be next.

    Args:
        sort: fields and directions; the ``_id`` decides between equals.
        limit: how many are seen.
        spare: how many more are held at most, twice of them until some are let go.
        joined: told of each member that is held from now on.
        left: told of each that is not any more.
    """

    def __init__(
        self,
        sort: Sequence[tuple[str, int]],
        limit: int,
        spare: int,
        joined: Callable[[Hashable], None] = lambda member: None,
        left: Callable[[Hashable], None] = lambda member: None,
    ) -> None:
        self.sort = tuple(sort)
        self.limit = limit
        self.spare = spare
        self.documents: dict[Hashable, dict[str, Any]] = {}
        self._joined, self._left = joined, left
        self._rows: list[Row] = []  # the sort key, and at the end the member
        self._row_of: dict[Hashable, Row] = {}
        self._edge: Row | None = None  # nothing is known of what comes after it; None: nothing does

    @property
    def short(self) -> bool:
        """Whether fewer are held than could be seen, and there may be more in the database."""
        return self._edge is not None and len(self._rows) < self.limit

    def seen(self) -> list[Hashable]:
        """The members that are seen, in order."""
        return [row[-1] for row in self._rows[: self.limit]]

    def fill(self, documents: list[dict[str, Any]], complete: bool) -> None:
        """Hold these, the first in order, and nothing else."""
        held = {key(d["_id"]): d for d in documents}
        for member in self.documents.keys() - held.keys():
            self._left(member)
        for member in held.keys() - self.documents.keys():
            self._joined(member)
        self.documents.clear()
        self.documents.update(held)
        self._row_of = {m: self._row(m, d) for m, d in self.documents.items()}
        self._rows = sorted(self._row_of.values())
        self._edge = None if complete or not self._rows else self._rows[-1]

    def put(self, member: Hashable, document: dict[str, Any] | None) -> bool:
        """A document as it is now, or ``None`` if it is not wanted; whether it is held now."""
        old = self._row_of.pop(member, None)
        if old is not None:
            del self._rows[bisect_left(self._rows, old)]
            self._let_go(member)
        if document is None:
            return False
        row = self._row(member, document)
        if self._edge is not None and self._edge < row:
            return False
        self._row_of[member] = row
        self.documents[member] = document
        self._joined(member)
        insort(self._rows, row)
        if len(self._rows) > self.limit + 2 * self.spare:
            for gone in self._rows[self.limit + self.spare :]:
                del self._row_of[gone[-1]]
                self._let_go(gone[-1])
            del self._rows[self.limit + self.spare :]
            self._edge = self._rows[-1]
        return member in self.documents

    def _let_go(self, member: Hashable) -> None:
        del self.documents[member]
        self._left(member)

    def _row(self, member: Hashable, document: dict[str, Any]) -> Row:
        return (*sort_key(document, self.sort), member)


class Ranked(Query):
    """A live query with an order and a limit. It shows what it holds: nobody reads a snapshot."""

    def __init__(self, driver: Driver, router: Router, question: Question, limits: Limits) -> None:
        assert question.limit is not None
        spare = max(10, question.limit)
        self.window = Window(
            question.sort,
            question.limit,
            spare,
            lambda member: router.joined(self, member),
            lambda member: router.left(self, member),
        )
        # While the window is being read; the changes since are in the feed's log.
        self._filling: asyncio.Task[None] | None = None
        self._ids: dict[Hashable, Any] = {}  # of what is seen
        super().__init__(driver, router, question, limits)
        self.members = self.window.documents
        self._filling = self.start(self._fill())

    async def ready(self) -> None:
        """Wait until there is something to show.

        Raises:
            DataBridgeError: the window cannot be read.
        """
        if self._filling is not None:
            await asyncio.shield(self._filling)
        if self.log.ended is not None:
            raise self.log.ended

    def shown(self) -> Snapshot:
        """What is seen now."""
        documents = [self.window.documents[m] for m in self.window.seen()]
        return Snapshot(documents, self.log.head)

    def add(self, entry: Entry) -> None:
        if self._filling is None or entry.operation in WHOLE_COLLECTION:
            super().add(entry)

    def apply(self, entry: Entry) -> None:
        operation, after = entry.operation, entry.after
        if operation == "delete":
            after = None
        elif after is None:
            if self.images:
                self.reset(entry, NO_IMAGE)
            return
        member = member_key(entry.raw)
        before = self.window.seen()
        matches = after is not None and self.question.filter.matches(after)
        self.window.put(member, after if matches else None)
        self._tell(entry, before, {member: entry})
        if self.window.short:
            self._filling = self.start(self._fill(entry))

    def _tell(
        self, entry: Entry, before: list[Hashable], changed: dict[Hashable, Entry | None]
    ) -> None:
        """Say how what is seen differs from what was seen before."""
        after = self.window.seen()
        was, now = set(before), set(after)
        told: list[LiveEntry] = []
        for member in before:
            if member not in now:
                cause = changed.get(member)
                gone = cause is not None and cause.operation == "delete"
                told.append(LiveEntry(entry, "delete" if gone else "leave", self._ids[member]))
        for member in after:
            cause = changed.get(member)
            document = self.window.documents[member]
            if member not in was:
                new = cause is not None and cause.operation == "insert"
                operation = "insert" if new else "enter"
            elif member in changed:
                operation = cause.operation if cause is not None else "update"
            else:
                continue
            told.append(LiveEntry(entry, operation, document["_id"], document))
        for earlier in told[:-1]:
            earlier.last = False
        self._ids = {m: self.window.documents[m]["_id"] for m in after}
        if told:
            self.tell(told)

    async def _fill(self, cause: Entry | None = None) -> None:
        window = self.window
        changes: list[Entry] | None = None
        while changes is None and not self.closed:
            try:
                snapshot = await self._read_window()
                changes = self._router.since(snapshot.position, self.question.collection)
            except ServerUnreachable as error:
                if cause is None:  # whoever is about to be shown it would rather know
                    self.fail(error)
                else:
                    await asyncio.sleep(_PAUSE)
            except DataBridgeError as error:
                self.fail(error)
        if changes is None or self.closed:
            return
        documents = snapshot.documents
        before, known = window.seen(), dict(window.documents)
        window.fill(documents, complete=len(documents) < window.limit + window.spare)
        changed = {m: None for m, d in window.documents.items() if known.get(m) != d}
        if cause is None:
            self._ids = {m: window.documents[m]["_id"] for m in window.seen()}
        else:
            self._tell(_marked(snapshot.position), before, {**changed})
        self.since = max(self.since, snapshot.position.hex)
        self._filling = None
        for entry in changes:
            self.add(entry)  # unless it has run short once more

    async def _read_window(self) -> Snapshot:
        question, wanted = self.question, self.window.limit + self.window.spare
        sort = dict(question.sort)
        sort.setdefault("_id", 1)
        return await read_snapshot(
            self.driver,
            question.collection,
            question.filter.query,
            sort=sort,
            limit=wanted,
            projection=question.projection,
            bound=wanted,
            timeout=self.limits.timeout,
            head=self.log.head,
        )


def _marked(position: ResumeToken) -> Entry:
    return Entry({"_id": position.document, "operationType": RESET}, 0)
