"""Source: one server cursor, read in whole batches, its errors classified, reopened by itself.

https://github.com/mongodb/specifications/blob/master/source/change-streams/change-streams.md
"""

from __future__ import annotations

import asyncio
import logging
import random
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from bson import Timestamp, decode_all, json_util

from . import journal
from .change import Change
from .driver import AWAIT_MS, CODEC, Cursor, Driver, Reply
from .errors import Fault, InvalidPipeline, ResumeHistoryLost, fault, translated
from .lookup import Lookups
from .token import ResumeToken

if TYPE_CHECKING:
    from .document import Document

__all__ = ["Batch", "Entry", "Scope", "Source"]

D = TypeVar("D", bound="Document")

# A reply of 16 MB decoded in one call would hold the event loop for a tenth of a second.
_DECODE_BYTES = 256 * 1024
# Beyond the server's own wait, a reply is late after this many seconds; doubled while it stays so,
# because a reply over a thin line may just be large.
_GRACE = 4.0
_BACKOFF = (0.05, 5.0)
# What a decoded change takes in memory, from its size in BSON: the objects that Python makes of it.
_OVERHEAD = 1024
_EXPANSION = 3
# A reply has at most 16 MB, and one that has less left nothing out unless it was this close.
_FULL_BYTES = 8 * 1024 * 1024
_length = struct.Struct("<i").unpack_from


@dataclass(frozen=True)
class Scope:
    """What a cursor watches; two subscribers with equal scopes share one cursor."""

    collection: str | None  # None: the whole database
    full_document: str = "updateLookup"
    full_document_before_change: str | None = None
    show_expanded_events: bool = False
    pipeline: str = "[]"  # canonical extended JSON, so that equal pipelines are equal

    def stages(self, start: ResumeToken | None) -> list[dict[str, Any]]:
        """The aggregation pipeline of a cursor that starts at a position (``None``: now)."""
        options: dict[str, Any] = {} if start is None else start.start
        if self.full_document != "default":
            options["fullDocument"] = self.full_document
        if self.full_document_before_change is not None:
            options["fullDocumentBeforeChange"] = self.full_document_before_change
        if self.show_expanded_events:
            options["showExpandedEvents"] = True
        return [{"$changeStream": options}, *json_util.loads(self.pipeline, json_options=_JSON)]

    def __str__(self) -> str:
        return self.collection or "*"


_JSON = json_util.CANONICAL_JSON_OPTIONS.with_options(
    tz_aware=CODEC.tz_aware, uuid_representation=CODEC.uuid_representation
)


def canonical(pipeline: list[Mapping[str, Any]]) -> str:
    """A pipeline as text that is equal for equal pipelines."""
    return json_util.dumps(pipeline, json_options=_JSON)


class Entry:
    """One change in a log: decoded once, and the frames made of it so far."""

    __slots__ = ("_position", "after", "change", "cost", "frames", "operation", "raw", "token")

    def __init__(self, raw: dict[str, Any], size: int) -> None:
        self.raw = raw
        self.token: str = raw["_id"]["_data"]
        try:
            self.operation: str = raw["operationType"]
        except KeyError as error:
            raise InvalidPipeline(
                "a pipeline may not remove operationType from the events (nor _id)"
            ) from error
        # The document for live queries: in doubt, a later state than that of the change.
        self.after: dict[str, Any] | None = raw.get("fullDocument")
        self.cost = _OVERHEAD + _EXPANSION * size
        self.change: Any = None
        self._position: ResumeToken | None = None
        self.frames: dict[Any, bytes] | None = None

    @property
    def position(self) -> ResumeToken:
        """The position just after this change; made once for all who come by."""
        position = self._position
        if position is None:
            position = self._position = ResumeToken.of(self.raw["_id"])
        return position

    def typed(self, model: type[D]) -> Change[D]:
        """The change as one model sees it; the same object for everybody who asks."""
        change: Change[D] | None = self.change
        if change is None or change.model is not model:
            change = self.change = Change(self.raw, model)
        return change


@dataclass(slots=True)
class Batch:
    """What one reply brought: entries in order, and the position after all of them."""

    head: ResumeToken
    entries: list[Entry] = field(default_factory=list)


class Source:
    """Reads a scope from a position on, for as long as it is asked to.

    ``read()`` never fails for something that passes: it backs off and reopens at the last
    position. When the position itself is gone it raises once and goes on from now.
    """

    def __init__(
        self,
        driver: Driver,
        scope: Scope,
        *,
        start: ResumeToken | None = None,
        batch_size: int = 1000,
        timeout: float = 5.0,
    ) -> None:
        self.scope = scope
        self.position = start
        self.reopened = 0
        self.lookups: Lookups | None = None  # set while there are live queries without images
        self.exhausted = False  # whether the last reply held all that there was
        self.cluster_time: Timestamp | None = None  # of the server, at its last reply
        self.heard = time.monotonic()  # when that was
        self._driver = driver
        self._batch_size = batch_size
        self._timeout = timeout
        self._cursor: Cursor | None = None
        self._failures = 0
        self._interrupted: float | None = None  # since when
        self._given = start is not None  # by a client: the server has not accepted it yet
        self._name = f"{driver.name}.{scope}"
        self._reply: Reply | None = None  # what is handed over part by part
        self._parts: Iterator[list[Entry]] | None = None
        self._count = 0

    async def read(self, append: Callable[[Batch], None]) -> None:
        """Hand over the next reply, or the next part of a large one, so that others get a turn.

        The first batch is empty: it says where the cursor starts.

        Raises:
            ResumeHistoryLost: the position is gone. The next call goes on from now.
            DataBridgeError: it cannot help to try again.
        """
        cursor = self._cursor
        try:
            if cursor is None:
                append(await self._opened())
                return
            if self._parts is not None:
                await asyncio.sleep(0)
                await self._hand_over(append)
                return
            patience = AWAIT_MS / 1000 + _GRACE * 2 ** min(self._failures, 4)
            reply = await cursor.read(patience)
            if reply is not None:
                self._received(reply)
                await self._hand_over(append)
        except Exception as error:  # classified: fatal ones are raised again as ours
            await self._failed(error, opening=cursor is None)
            return
        if reply is None:  # after an invalidate, or because the server closed it
            await self._drop()
            if self._failures:
                await self._pause("the server closed the cursor")
            self._failures += 1
            return
        self._failures = 0

    def _received(self, reply: Reply) -> None:
        self.heard, self.cluster_time = time.monotonic(), reply.cluster_time or self.cluster_time
        self.exhausted = False
        self._reply, self._parts, self._count = reply, _decoded(reply.documents), 0

    async def _hand_over(self, append: Callable[[Batch], None]) -> None:
        assert self._reply is not None and self._parts is not None
        reply = self._reply
        entries = next(self._parts, None)
        if entries is not None:
            self._count += len(entries)
            if self.lookups is not None:
                await self.lookups.settle(entries)
            # The position moves with what was handed over, never ahead of it.
            self.position = ResumeToken.of(entries[-1].raw["_id"])
            append(Batch(self.position, entries))
            if len(reply.documents) > _DECODE_BYTES:
                return  # there may be more of it
        self._reply = self._parts = None
        if self.position is None or reply.position > self.position:
            self.position = reply.position
            append(Batch(self.position))
        # A reply that is full, in number or in bytes, may have left something for the next.
        self.exhausted = self._count < self._batch_size and len(reply.documents) < _FULL_BYTES
        if self.exhausted and self.lookups is not None:
            self.lookups.exhausted()

    async def _opened(self) -> Batch:
        start = self.position
        self._cursor, position = await self._driver.open(
            self.scope.collection,
            self.scope.stages(start),
            batch_size=self._batch_size,
            timeout=self._timeout,
        )
        # A cursor that starts in the past reports the present before it has read anything.
        self.position = position if start is None else start
        self._given = False
        self.heard, self.exhausted = time.monotonic(), False
        if self._interrupted is not None:
            after, self._interrupted = f"{time.monotonic() - self._interrupted:.2f} s", None
            journal.log(logging.INFO, self._name, "reopened", self.position, after=after)
        return Batch(self.position)

    async def _failed(self, error: Exception, opening: bool) -> None:
        """Deal with what a cursor raised: pause and return to have it reopened, or raise."""
        await self._drop()
        what = fault(error)
        if what is Fault.TRANSIENT:
            self._failures += 1
            await self._pause(f"{type(error).__name__}")
            return
        doing = f"watch {self._name}"
        ours = translated(error, doing, token=opening and self._given)
        if isinstance(ours, ResumeHistoryLost):
            # A token that is dead stays dead: forget it before anything else can try it.
            self.position, self._given = None, False
            if self._failures:  # nothing could be read since the last loss
                await asyncio.sleep(self._delay())
            self._failures += 1
        raise ours from error

    def _delay(self) -> float:
        low, high = _BACKOFF
        return float(min(high, low * 2 ** min(self._failures, 10)) * random.uniform(0.5, 1))

    async def _pause(self, reason: str) -> None:
        if self._interrupted is None:  # one line for an outage, however long it takes
            self._interrupted = time.monotonic()
            self.reopened += 1
            journal.log(logging.WARNING, self._name, "interrupted", self.position, reason=reason)
        await asyncio.sleep(self._delay())

    async def _drop(self) -> None:
        cursor, self._cursor = self._cursor, None
        self._reply = self._parts = None
        if cursor is not None:
            await cursor.close()

    async def close(self) -> None:
        """Give the cursor back. Never raises."""
        await self._drop()


def _decoded(documents: bytes) -> Iterator[list[Entry]]:
    """Entries of a reply, in parts that each take a few milliseconds to decode."""
    start = at = 0
    sizes: list[int] = []
    end = len(documents)
    while at < end:
        (size,) = _length(documents, at)
        sizes.append(size)
        at += size
        if at - start >= _DECODE_BYTES or at == end:
            part = documents if at - start == end else documents[start:at]
            yield [Entry(d, s) for d, s in zip(decode_all(part, CODEC), sizes, strict=True)]
            start, sizes = at, []
