"""LiveStream: one subscriber of one live query, or of several over one cursor.

What ``Document.live()`` returns. First comes what matches, as of one exact moment, and then every
change after that moment. Like a ``ChangeStream`` it is a place to read from and holds no changes.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import merge as in_order
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from pydantic import BaseModel

from .document import from_document, to_jsonable
from .errors import (
    BridgeClosed,
    DocumentInvalid,
    ModelInvalid,
    ResumeHistoryLost,
    SnapshotUnavailable,
)
from .log import RESET
from .query import LiveEntry, Query, Stateless, Tracked
from .question import Question
from .remote import Remote
from .router import touches
from .snapshot import Snapshot
from .source import Scope
from .stand_in import StandIn
from .stream import ChangeStream, Stream, Wishes
from .token import ResumeToken
from .window import Ranked

if TYPE_CHECKING:
    from .bridge import Bridge
    from .feed import Feed
    from .router import Router

__all__ = ["LiveEvent", "LiveStream", "Part", "merge"]

M = TypeVar("M", bound=BaseModel)
M_co = TypeVar("M_co", bound=BaseModel, covariant=True)
N = TypeVar("N", bound=BaseModel)
P = TypeVar("P", bound=BaseModel)

_log = logging.getLogger("data_bridge")
_PAUSE = 0.02
_CHUNK = 500  # documents in one snapshot event
_token = attrgetter("token")


@dataclass(frozen=True)
class Part:
    """One query of a stream, and the model that its documents are shown as."""

    question: Question
    model: Any


@dataclass(slots=True)
class LiveEvent(Generic[M_co]):
    """One event of a live query.

    Attributes:
        operation: ``snapshot``, ``ready``, ``insert``, ``update``, ``replace``, ``delete``,
            ``enter``, ``leave`` or ``reset``.
        collection: where it happened.
        document_id: the ``_id`` of the document of a change.
        resume_token: the position after this event, if one can resume there.
        sent: of a ``snapshot``, how many documents have come so far.
        total: of a ``snapshot`` and ``ready``, how many there are.
        reason: of a ``reset``, why what came before is no base to go on from.
    """

    operation: str
    collection: str
    model: type[M_co]
    document_id: Any = None
    resume_token: ResumeToken | None = None
    sent: int = 0
    total: int = 0
    reason: str = ""
    raw: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def full_document(self) -> M_co | None:
        """The document after a change; ``None`` for ``delete`` and ``leave``.

        Raises:
            DocumentInvalid: the document does not fit the model.
        """
        if self.operation == "snapshot" or not self.raw:
            return None
        return from_document(self.model, self.raw[0])

    @property
    def document(self) -> dict[str, Any] | None:
        """``full_document`` as ``json.dumps`` takes it; ``None`` too where it does not fit."""
        found = next(iter(self._fitting(self.raw[:1])), None)
        return None if found is None or self.operation == "snapshot" else to_jsonable(found)

    @property
    def documents(self) -> list[M_co]:
        """The documents of a ``snapshot``, without those that do not fit the model."""
        return self._fitting(self.raw) if self.operation == "snapshot" else []

    def _fitting(self, documents: list[dict[str, Any]]) -> list[M_co]:
        found = []
        for document in documents:
            try:
                found.append(from_document(self.model, document))
            except DocumentInvalid as error:
                _log.warning("%s", error)
        return found


@dataclass(slots=True)
class _Place:
    """Where in the log of one of its queries a stream reads next."""

    part: Part
    query: Query
    seq: int = 0


@dataclass(slots=True)
class _Showing:
    """A snapshot on its way to one subscriber."""

    snapshots: list[tuple[Part, Snapshot]]
    index: int = 0  # of the snapshot
    chunk: int = 0
    at_ready: bool = False


class LiveStream(Stream, Generic[M_co]):
    """The documents that match, and then their changes: ``async for event in Order.live(…)``.

    Raises, from iteration and on entry:
        SnapshotTooLarge: more documents match than ``Limits.snapshot_documents``.
        InvalidFilter: the server does not take the filter.
        InvalidResumeToken: the position is from another deployment.
        ServerUnreachable: nothing answered. A stream that waits for changes goes on waiting.
    """

    def __init__(self, bridge: Bridge, scope: Scope, parts: tuple[Part, ...]) -> None:
        self.bridge = bridge
        self.scope = scope
        self.parts = parts
        # What a window shows depends on what it held before, so there is no going on elsewhere.
        self.resumable = all(part.question.limit is None for part in parts)
        # With images every position says all there is to know; without, the documents that were
        # shown may have been looked up later, and only the same feed goes on from there.
        self._exact = all(part.question.images for part in parts)
        self._start: ResumeToken | None = None
        self._feed: Feed | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._places: list[_Place] = []
        self._token: ResumeToken | None = None  # up to here all has been delivered
        self._skip = ""  # what the snapshot, or a worker that was ahead, has shown already
        self._reset = ""  # why, if that is yet to be said
        self._showing: _Showing | None = None
        # Nothing makes sense before a snapshot is read, or before the place to go on from is found.
        self._to_show = False
        self._to_find = False
        self._behind: ChangeStream[Any] | None = None
        self._events: Iterator[LiveEvent[M_co]] | None = None
        self._given: ResumeToken | None = None  # the position after the last of these
        self._news: asyncio.Future[None] | None = None
        self._seen_until = 0.0
        self._closed = False

    # -- for everybody --

    @property
    def epoch(self) -> str:
        """What a position must have to be resumed from; empty where any will do."""
        return "" if self._exact or self._feed is None else self._feed.epoch

    @property
    def resume_token(self) -> ResumeToken | None:
        """The position up to which all has been delivered; ``None`` before the snapshot has."""
        showing = self._reset or self._to_show or self._showing is not None
        if showing or not self.resumable or self._token is None:
            return None
        if self._events is not None:
            return self._given
        token = self._token
        if self._behind is not None:
            ahead = None if self._behind.pending else self._behind.resume_token
            token = max(ahead or token, token)
        elif self._places and not self._to_find and self._has_all():
            token = max(self._head(), token)
        return ResumeToken(token.hex, token.type_bits, self.epoch)

    async def __anext__(self) -> LiveEvent[M_co]:
        while True:
            if (event := self.next_event()) is not None:
                return event
            await self.wait()

    async def aclose(self) -> None:
        """Leave the queries. Iterating ends."""
        self._token = self.resume_token
        self._leave()
        if self._news is not None and not self._news.done():
            self._news.set_result(None)  # somebody still waits

    # -- for those who send many changes at once --

    def start_after(self, position: ResumeToken) -> None:
        """Go on after this position, if that is possible; before the stream is open."""
        self._start = position

    def start_fresh(self) -> None:
        """Show nothing older than the present; before the stream is open."""
        self._seen_until = asyncio.get_running_loop().time()

    async def open(self) -> None:
        """Find the place to go on from, or read what matches."""
        if self._closed:
            raise BridgeClosed("this live query was closed; call live() again")
        if self._feed is None:
            self._loop = asyncio.get_running_loop()
            self._feed = self.bridge.feed(self.scope)
            self._feed.join()
            self._to_show = self._start is None
        elif not (self._to_show or self._to_find or self._start is not None):
            return
        await self._feed.ready()
        if self._start is not None:
            await self._feed.check(self._start)
            if self._exact or self._start.epoch == self._feed.epoch:
                self._token, self._to_find = self._start, True
            else:
                self._start_over()
            self._start = None
        if self._to_find:
            await self._find()
        if self._to_show:
            await self._show()

    @property
    def pending(self) -> bool:
        """Whether ``take`` has something to look at right now."""
        if self._closed:
            return False
        if self._reset or self._showing is not None:
            return True
        if self._to_show or self._to_find:
            return False
        return self._behind.pending if self._behind is not None else self._has_entries()

    def take(self, encoder: Any) -> bytes:
        """All that is pending, or a good part of it, as one piece of bytes."""
        if self._reset:
            reason, self._reset = self._reset, ""
            return bytes(encoder.reset(reason))
        if self._showing is not None:
            return self._take_shown(self._showing, encoder)
        if self._behind is None and len(self._places) == 1 and not self._skip:
            place = self._places[0]
            log = place.query.log
            if not log.base <= place.seq < log.end:
                return b""
            place.seq, joined, last = log.join(encoder, place.seq)
            self._token = last.position
            self._to_show = last.operation == RESET
            return joined
        return b"".join([encoder(entry) for entry in self._entries()])

    @property
    def has_all(self) -> bool:
        """Whether all that there is was taken, so that nothing but ``wait`` is left to do."""
        to_do = self._reset or self._to_show or self._to_find or self._showing is not None
        return not to_do and self._behind is None and self._has_all()

    async def wait(self, stand_in: StandIn | None = None) -> None:
        """Wait until something is pending, reading a new snapshot where that has to be.

        Args:
            stand_in: what to wait with where nothing else has to be done; if it wakes, the wait
                is over.
        """
        while not self._closed:
            await self.open()
            if self.pending:
                return
            if self._behind is not None:
                try:
                    await self._behind.wait()
                except ResumeHistoryLost:
                    await self.restart()
            elif any(p.seq < p.query.log.base or p.query.log.finished for p in self._places):
                self._to_find = True
            else:
                self._raise_if_ended()
                await self._wait_for_news(stand_in)
                if stand_in is not None:
                    return
        raise StopAsyncIteration

    def _raise_if_ended(self) -> None:
        for place in self._places:
            if place.query.log.ended is not None:
                raise place.query.log.ended.with_traceback(None)  # many raise the same one

    async def restart(self) -> None:
        """Start over with what matches now, because changes were lost."""
        self._start_over()
        await self._show()

    def _start_over(self) -> None:
        self._reset, self._to_show, self._to_find = "history lost", True, False
        self.start_fresh()  # what was seen may be newer than the snapshot that others share

    async def _wait_for_news(self, stand_in: StandIn | None) -> None:
        self._news = future = stand_in or asyncio.get_running_loop().create_future()
        for place in self._places:
            place.query.log.wait(future)
        try:
            await future
        finally:
            for place in self._places:
                place.query.log.forget(future)

    # -- going on, and starting over --

    def _acquire(self) -> None:
        """Take part in a query for each question, in new ones where the old have ended."""
        assert self._feed is not None
        self._release()
        self._showing = None
        router = self._feed.live()
        for part in self.parts:
            query = _query(self.bridge, router, part.question)
            query.subscribers += 1
            self._places.append(_Place(part, query))

    def _release(self) -> None:
        places, self._places = self._places, []
        for place in places:
            _left(place.query)

    async def _find(self) -> None:
        """Find the place to go on from, or see that there is none.

        At the start; and later, when a log was given up or forgot what is to be read next.
        """
        behind, self._behind = self._behind, None
        if behind is not None:
            behind.leave()
        if self._token is not None and self.resumable:
            self._acquire()
            with suppress(ResumeHistoryLost):
                if await self._go_on(self._token):
                    self._to_find = False
                    return
        self._start_over()

    async def _go_on(self, position: ResumeToken) -> bool:
        """Read on after a position, if everything since is known or can be found out."""
        if all(place.query.covers(position) for place in self._places):
            self._seek(position)
            return True
        if not self._exact:
            return False
        assert self._feed is not None
        feed = self._feed
        behind: ChangeStream[Any] = ChangeStream(
            lambda: feed, self.parts[0].model, position, Wishes()
        )
        try:
            await behind.open()
        except BaseException:
            await behind.aclose()
            raise
        self._behind = behind
        return True

    def _seek(self, position: ResumeToken) -> None:
        self._skip = position.hex if position > self._head() else ""
        for place in self._places:
            seq = place.query.log.seek(position.hex)
            assert seq is not None
            place.seq = seq

    async def _show(self) -> None:
        """Begin to show what matches, and be ready for what changes after."""
        behind, self._behind = self._behind, None
        if behind is not None:
            behind.leave()
        self._to_show, self._events = True, None
        while True:
            self._acquire()
            snapshots: list[tuple[Part, Snapshot]] = []
            first: Snapshot | None = None
            for place in self._places:
                query = place.query
                if isinstance(query, Ranked):
                    await query.ready()
                    found = query.shown()
                else:
                    try:
                        found = await query.snapshot(
                            None if first is None else first.time, since=self._seen_until
                        )
                    except SnapshotUnavailable:  # the first one's moment: take a later one
                        await asyncio.sleep(_PAUSE)
                        break
                first = first or found
                snapshots.append((place.part, found))
            self._raise_if_ended()
            if len(snapshots) < len(self._places) or any(p.query.closed for p in self._places):
                continue  # dropped meanwhile, or just made
            assert first is not None
            if isinstance(self._places[0].query, Ranked):
                self._places[0].seq = self._places[0].query.log.end
                self._skip = ""
            elif not all(place.query.covers(first.position) for place in self._places):
                continue  # it took so long to read that the history since is gone
            else:
                self._seek(first.position)
            self._showing = _Showing(snapshots)
            self._token = first.position
            self._to_show = False
            return

    # -- what is pending --

    def _head(self) -> ResumeToken:
        """How far all of the queries have come."""
        return min(place.query.log.head for place in self._places)

    def _has_all(self) -> bool:
        late = any(place.seq < place.query.log.base for place in self._places)
        return not late and not self._has_entries()

    def _has_entries(self) -> bool:
        several = len(self._places) > 1
        for place in self._places:
            log = place.query.log
            if log.base <= place.seq < log.end and (
                not several or log.entries[place.seq - log.base].token <= self._head().hex
            ):
                return True
        return False

    def _entries(self) -> list[LiveEntry]:
        """The next changes, in the order in which they happened."""
        if self._behind is not None:
            return self._behind_entries(self._behind)
        lots: list[list[Any]] = []
        if any(place.seq < place.query.log.base for place in self._places):
            return []
        for place in self._places:
            log = place.query.log
            end = len(log.entries)
            if len(self._places) > 1:  # one that asks the server may not have come as far
                end = bisect_right(log.entries, self._head().hex, key=_token)
            lots.append(log.entries[place.seq - log.base : end])
            place.seq = max(place.seq, log.base + end)
        found = []
        for entry in in_order(*lots, key=_token) if len(lots) > 1 else lots[0]:
            if entry.token <= self._skip:
                continue
            found.append(entry)
            if entry.operation == RESET:
                self._to_show = True
                break
        if found:
            self._token = found[-1].position
            self._skip = ""
        return found

    def _behind_entries(self, behind: ChangeStream[Any]) -> list[LiveEntry]:
        found: list[LiveEntry] = []
        for entry in behind.take_entries():
            for place in self._places:
                query = place.query
                assert isinstance(query, Stateless)
                if not touches(entry, query.question.collection):
                    continue
                if (meaning := query.meaning(entry)) is not None:
                    found.append(meaning)
                    if meaning.operation == RESET:
                        self._to_show = True
                        return found
        assert behind.resume_token is not None
        self._token = position = behind.resume_token
        if behind.in_feed and all(p.query.covers(position) for p in self._places):
            self._behind = None
            behind.leave()
            self._seek(position)
        return found

    def next_event(self) -> LiveEvent[M_co] | None:
        """The next event, typed, if one is pending."""
        if self._closed:
            return None
        if self._reset:
            reason, self._reset = self._reset, ""
            part = self.parts[0]
            return LiveEvent(RESET, part.question.collection, part.model, reason=reason)
        if self._showing is not None:
            return self._next_shown(self._showing)
        if self._events is None and self.pending:
            self._given = self.resume_token
            self._events = self._typed(self._entries())
        if self._events is not None:
            if (event := next(self._events, None)) is not None:
                self._given = event.resume_token or self._given
                return event
            self._events = None
            return self.next_event()
        return None

    def _typed(self, entries: list[LiveEntry]) -> Iterator[LiveEvent[M_co]]:
        models = {part.question.collection: part.model for part in self.parts}
        first = self.parts[0].question.collection
        for entry in entries:
            # The loss of history, or of the database, is of no collection.
            one = len(self.parts) == 1 or entry.operation == RESET
            collection = first if one else entry.raw["ns"]["coll"]
            yield LiveEvent(
                entry.operation,
                collection,
                models[collection],
                entry.id,
                self._position_of(entry),
                reason=entry.reason,
                raw=[] if entry.document is None else [entry.document],
            )

    def _position_of(self, entry: LiveEntry) -> ResumeToken | None:
        if not entry.last or not self.resumable:
            return None
        position = entry.position
        return ResumeToken(position.hex, position.type_bits, self.epoch)

    # -- snapshots --

    def _take_shown(self, showing: _Showing, encoder: Any) -> bytes:
        if showing.at_ready:
            self._showing = None
            total = sum(len(s.documents) for _, s in showing.snapshots)
            return bytes(encoder.ready(self.resume_token, total))
        part, snapshot = showing.snapshots[showing.index]
        name = (encoder, showing.chunk)
        frame = snapshot.frames.get(name)
        if frame is None:
            documents, sent = _chunk(snapshot, showing.chunk)
            frame = encoder.snapshot(part, documents, sent, len(snapshot.documents))
            snapshot.frames[name] = frame
        self._advance(showing, snapshot)
        return frame

    def _next_shown(self, showing: _Showing) -> LiveEvent[M_co]:
        if showing.at_ready:
            self._showing = None
            part = self.parts[0]
            total = sum(len(s.documents) for _, s in showing.snapshots)
            return LiveEvent(
                "ready",
                part.question.collection,
                part.model,
                resume_token=self.resume_token,
                total=total,
            )
        part, snapshot = showing.snapshots[showing.index]
        documents, sent = _chunk(snapshot, showing.chunk)
        self._advance(showing, snapshot)
        return LiveEvent(
            "snapshot",
            part.question.collection,
            part.model,
            sent=sent,
            total=len(snapshot.documents),
            raw=documents,
        )

    @staticmethod
    def _advance(showing: _Showing, snapshot: Snapshot) -> None:
        showing.chunk += 1
        if showing.chunk * _CHUNK >= len(snapshot.documents):
            showing.chunk = 0
            showing.index += 1
            showing.at_ready = showing.index == len(showing.snapshots)

    # -- leaving --

    def _leave(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._events = None
        behind, self._behind = self._behind, None
        if behind is not None:
            behind.leave()
        places, self._places = self._places, []
        if self._feed is not None and self._loop is not None:
            with suppress(RuntimeError):  # the loop is gone, and the queries with it
                for place in places:
                    self._loop.call_soon_threadsafe(_left, place.query)
            self._feed.leave()

    def __del__(self) -> None:
        # `async for event in Order.live()` never closes what it iterates.
        if not getattr(self, "_closed", True):
            self._leave()

    def __repr__(self) -> str:
        names = ", ".join(part.question.collection for part in self.parts)
        return f"<LiveStream {names} at {self.resume_token}>"


def _chunk(snapshot: Snapshot, number: int) -> tuple[list[dict[str, Any]], int]:
    documents = snapshot.documents[number * _CHUNK : (number + 1) * _CHUNK]
    return documents, number * _CHUNK + len(documents)


def _left(query: Query) -> None:
    query.subscribers -= 1
    query.idle_since = asyncio.get_running_loop().time()


def _query(bridge: Bridge, router: Router, question: Question) -> Query:
    beyond = question.filter.beyond is not None

    def make() -> Query:
        kind: Callable[..., Query]
        if question.limit is not None:
            kind = Ranked
        elif beyond:
            kind = Remote
        elif question.images or not question.filter.query:
            kind = Stateless
        else:
            kind = Tracked
        return kind(bridge.driver, router, question, bridge.limits)

    return router.query(question, make, bridge.limits.cursors if beyond else None)


@overload
def merge(first: LiveStream[M], second: LiveStream[N], /) -> LiveStream[M | N]: ...


@overload
def merge(
    first: LiveStream[M], second: LiveStream[N], third: LiveStream[P], /
) -> LiveStream[M | N | P]: ...


@overload
def merge(
    first: LiveStream[Any],
    second: LiveStream[Any],
    third: LiveStream[Any],
    fourth: LiveStream[Any],
    /,
    *more: LiveStream[Any],
) -> LiveStream[Any]: ...


def merge(
    first: LiveStream[Any], second: LiveStream[Any], /, *more: LiveStream[Any]
) -> LiveStream[Any]:
    """Several live queries on one connection, over one cursor, resumed by one event id.

    Browsers allow six HTTP/1.1 connections to one host. The data of each event says in
    ``collection`` where it belongs. The snapshots are all of one moment.

    Raises:
        ModelInvalid: two are of one collection, or of two databases, or one has a limit.
    """
    streams: tuple[LiveStream[Any], ...] = (first, second, *more)
    parts = tuple(part for stream in streams for part in stream.parts)
    names = [part.question.collection for part in parts]
    if any(stream.bridge is not first.bridge for stream in streams):
        raise ModelInvalid("merge() takes live queries of one database")
    if len(set(names)) < len(names):
        raise ModelInvalid(f"merge() takes one live query of each collection, not {names}")
    if any(part.question.limit is not None for part in parts):
        raise ModelInvalid("merge() takes live queries without a limit: a window cannot resume")
    return first.bridge.merged(parts)
