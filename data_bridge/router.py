"""Router: hands each change of a feed to the live queries that it may concern, and to no other.

A query with an equality in its filter (`{"tenant": "a"}`, `{"_id": 7}`) is found by that value in
the document before and after the change, so that ten thousand pages that each follow their own
document cost what matches, not what subscribes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import DataBridgeError, TooManyCursors
from .filter import index_keys
from .log import RESET
from .order import key
from .source import Entry
from .token import ResumeToken

if TYPE_CHECKING:
    from .feed import Feed
    from .query import Query
    from .question import Question

__all__ = ["WHOLE_COLLECTION", "Router", "member_key", "touches"]

WHOLE_COLLECTION = frozenset({"drop", "rename", "dropDatabase", "invalidate", RESET})
_WHOLE_DATABASE = frozenset({"dropDatabase", "invalidate", RESET})
_SWEEP = 1.0  # seconds between two rounds that free what nobody needs any more

_PATIENCE = 1.0  # seconds that what is being read may take when the feed has ended

_NONE: frozenset[Any] = frozenset()

T = TypeVar("T")
Place = tuple[str, str]  # a collection, and a path in its documents
Member = tuple[str, Hashable]


class Router:
    """The live queries of one feed; the feed stays open while there is any."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._images = feed.scope.full_document_before_change is not None
        self._queries: dict[Question, Query] = {}
        self._everything: dict[str, set[Query]] = {}  # no equality to find them by
        self._by_value: dict[Place, dict[Hashable, set[Query]]] = {}
        self._by_member: dict[Member, set[Query]] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._repairs: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.before = self.head  # the head before the changes that are being handed out

    @property
    def head(self) -> ResumeToken:
        """The position up to which the feed has handed out everything."""
        assert self._feed.log is not None
        return self._feed.log.head

    def query(self, question: Question, make: Callable[[], Query], bounded: int | None) -> Query:
        """The query that answers a question, made if there is none.

        Raises:
            TooManyCursors: it is of a kind of which there are ``bounded`` already.
        """
        query = self._queries.get(question)
        if query is None:
            if bounded is not None and self._number(beyond=True) >= bounded:
                raise TooManyCursors(
                    f"{bounded} different filters are evaluated by the server already, each at "
                    "its own cost. Use operators that are evaluated in process, share filters, or "
                    "raise Limits.cursors."
                )
            query = self._queries[question] = make()
        return query

    def _number(self, *, beyond: bool) -> int:
        return sum(1 for q in self._queries if (q.filter.beyond is not None) is beyond)

    def __len__(self) -> int:
        return len(self._queries)

    # -- who is to be told of what --

    def add(self, query: Query) -> None:
        """Hand changes to the query from now on."""
        if not self._queries and self._sweeper is None:
            self._feed.join()
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP, self._sweep)
        self._queries[query.question] = query
        collection = query.question.collection
        if query.route is None:
            self._everything.setdefault(collection, set()).add(query)
        else:
            path, values = query.route
            index = self._by_value.setdefault((collection, path), {})
            for value in values:
                index.setdefault(value, set()).add(query)

    def remove(self, query: Query) -> None:
        """The query is no longer wanted."""
        collection = query.question.collection
        if self._queries.get(query.question) is query:
            del self._queries[query.question]
        if query.route is None:
            _take_out(self._everything, collection, query)
        else:
            path, values = query.route
            index = self._by_value[collection, path]
            for value in values:
                _take_out(index, value, query)
            if not index:
                del self._by_value[collection, path]
        for member in query.members:
            _take_out(self._by_member, (collection, member), query)

    def joined(self, query: Query, member: Hashable) -> None:
        """A document came into a query that keeps account of its members."""
        if not query.closed:
            self._by_member.setdefault((query.question.collection, member), set()).add(query)

    def left(self, query: Query, member: Hashable) -> None:
        """A document left such a query."""
        _take_out(self._by_member, (query.question.collection, member), query)

    # -- changes --

    def since(self, position: ResumeToken, collection: str) -> list[Entry] | None:
        """The changes of a collection that were handed out after a position, to whomever.

        ``None``: some of them are forgotten.
        """
        log = self._feed.log
        assert log is not None
        if (seq := log.seek(position.hex)) is None:
            return None
        entries = log.entries[seq - log.base :]
        return [e for e in entries if (e.raw.get("ns") or {}).get("coll") == collection]

    def route(self, entries: Iterable[Entry], before: ResumeToken) -> None:
        """Hand changes to the queries that they may concern."""
        self.before = before
        if self._queries:
            for entry in entries:
                for query in self._concerned(entry):
                    query.add(entry)
                self.before = entry.position

    def _concerned(self, entry: Entry) -> Iterable[Query]:
        raw = entry.raw
        if entry.operation in WHOLE_COLLECTION:
            return [q for q in self._queries.values() if touches(entry, q.question.collection)]
        collection: str = raw["ns"].get("coll", "")
        after, before = raw.get("fullDocument"), raw.get("fullDocumentBeforeChange")
        documents = [d for d in (after, before) if d is not None]
        if entry.after is not after and entry.after is not None:
            documents.append(entry.after)  # a later state, which is what will be shown
        found: set[Query] = set()
        for (of, path), index in self._by_value.items():
            if of == collection:
                for document in documents:
                    for value in index_keys(document, path):
                        found |= index.get(value, _NONE)
        if "documentKey" in raw:
            if self._by_member:
                found |= self._by_member.get((collection, member_key(raw)), _NONE)
            if self._images and before is None and entry.operation != "insert":
                # No image to tell who could see the document: everybody must be asked.
                queries = self._queries.values()
                found |= {q for q in queries if q.question.collection == collection}
        everything = self._everything.get(collection)
        return found | everything if everything else found

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something for a query, which the end of the feed waits for."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # everybody who waited for it may have left

    async def close(self) -> None:
        """Wait for what the queries are about to read: the connections are closed next."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_PATIENCE)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def keep_images(self, collection: str) -> None:
        """Have a collection keep images again."""
        if collection not in self._repairs:
            task = self._repairs[collection] = self.start(self._feed.keep_images(collection))
            task.add_done_callback(lambda _: self._repairs.pop(collection))

    def end_with(self, error: DataBridgeError) -> None:
        """The feed has ended, and so do its queries."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for query in list(self._queries.values()):
            query.fail(error)

    def _shrink(self) -> None:
        """Have the logs of all queries together take no more than one log may."""
        logs = [query.log for query in self._queries.values() if query.log.entries]
        most = self._feed.limits.log_bytes
        if sum(log.bytes for log in logs) > most:
            for log in logs:
                log.shrink(most // len(logs))

    def _sweep(self) -> None:
        assert self._feed.log is not None
        loop = asyncio.get_running_loop()
        floor, now, linger = self._feed.log.floor, loop.time(), self._feed.limits.linger
        for query in list(self._queries.values()):
            if not query.subscribers and now - query.idle_since > linger:
                query.close()
                query.log.finish()
            else:
                query.forget(floor, now)
        self._shrink()
        if self._queries:
            self._sweeper = loop.call_later(_SWEEP, self._sweep)
        else:
            self._sweeper = None
            self._feed.leave()


def touches(entry: Entry, collection: str) -> bool:
    """Whether a change is one of a collection, or of all."""
    if entry.operation in _WHOLE_DATABASE:
        return True
    names = [(entry.raw.get(field) or {}).get("coll") for field in ("ns", "to")]
    return collection in names


def member_key(raw: dict[str, Any]) -> Hashable:
    """The document of a change as a member of a query."""
    return key(raw["documentKey"]["_id"])


def _take_out(index: dict[Any, set[Query]], value: Hashable, query: Query) -> None:
    queries = index.get(value)
    if queries is not None:
        queries.discard(query)
        if not queries:
            del index[value]
