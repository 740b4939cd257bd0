"""Log: changes in order, in bounded memory, read by position.

The cache of MongoDB's oplog that everybody in the process shares. A subscriber is a sequence
number here, not a queue: falling behind costs nothing but, at some point, a catch-up.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from .errors import DataBridgeError
from .source import Entry
from .stand_in import StandIn
from .token import ResumeToken

__all__ = ["RESET", "Limits", "Log", "reset_entry"]

RESET = "reset"  # the operation of the mark that stands where history was lost
_token = attrgetter("token")
# A join that is sent in one piece; a subscriber with more pending gets several.
_JOIN_BYTES = 256 * 1024
# What the joins that are kept for others may take: everybody is at one of very few places.
_JOINS_BYTES = 16 * _JOIN_BYTES
_JOIN_OVERHEAD = 256
# For how long subscribers are served before the loop gets to its other work, in seconds, and after
# how many of them that is looked at.
_ROUND = 0.005
_TURNS = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of a bridge.

    Attributes:
        log_entries: changes that each feed keeps in memory.
        log_bytes: memory that these may take, in bytes.
        cursors: server cursors for feeds with a pipeline or options of their own.
        catch_ups: catch-up cursors open at once, for all feeds together.
        linger: seconds that a feed, or a live query, stays open after its last subscriber left.
        snapshot_documents: documents that a live query may match when it is opened.
        snapshot_age: seconds for which one snapshot serves all who open the same live query.
        members: documents of which a live query keeps account, where there are no images.
        window: documents that a live query with a limit may show.
        timeout: seconds that opening a cursor or attaching to a feed may take.
    """

    log_entries: int = 10_000
    log_bytes: int = 32 * 1024 * 1024
    cursors: int = 20
    catch_ups: int = 4
    linger: float = 5.0
    snapshot_documents: int = 10_000
    snapshot_age: float = 5.0
    members: int = 100_000
    window: int = 1000
    timeout: float = 5.0


class Log:
    """Changes in order, each with a sequence number; the oldest make room for the newest."""

    def __init__(self, start: ResumeToken, limits: Limits) -> None:
        self.entries: list[Entry] = []
        self.base = 0  # the sequence number of entries[0]
        self.floor = start.floor  # every change after this and up to head is in entries
        self.bytes = 0
        self._head = start
        self.ended: DataBridgeError | None = None
        self.finished = False
        self._limits = limits
        # Somebody has read all there is, and waits; for whoever reads only as fast as that.
        self.wanted: asyncio.Event | None = None
        self._waiting: set[asyncio.Future[None]] = set()
        self._stand_ins: dict[StandIn, None] = {}
        self._due: list[StandIn] = []  # those that have not had their turn in this round
        self._again = False  # whether another round is to follow it
        self._joins: dict[object, tuple[int, bytes, Entry]] = {}
        self._joins_bytes = 0
        self._trimming = False
        self.kept: int | None = None  # nothing from this number on makes room

    @property
    def head(self) -> ResumeToken:
        """The position up to which every change is known."""
        return self._head

    @property
    def end(self) -> int:
        """The sequence number that the next change will get."""
        return self.base + len(self.entries)

    def append(self, entries: list[Entry], head: ResumeToken) -> None:
        """Add what came after the head. A head that only moves wakes nobody."""
        self._head = head
        if not entries:
            return
        self.entries += entries
        self.bytes += sum(e.cost for e in entries)
        self._joins.clear()
        self._joins_bytes = 0
        self._trim()
        self._wake()

    def seek(self, token: str) -> int | None:
        """The sequence number of what follows a token; ``None`` if that may have been dropped."""
        if token < self.floor:
            return None
        return self.base + bisect_right(self.entries, token, key=_token)

    def join(self, encoder: Callable[[Entry], bytes], seq: int) -> tuple[int, bytes, Entry]:
        """All that is pending from ``seq`` on as one piece of bytes, where that ends, and the last.

        Subscribers at the same place share the piece; those at all share the frames.
        """
        key = (encoder, seq)
        found = self._joins.get(key)
        if found is None:
            found = self._joined(encoder, seq)
            if self._joins_bytes < _JOINS_BYTES:
                self._joins[key] = found
                self._joins_bytes += _JOIN_OVERHEAD + len(found[1])
            if self.bytes > self._limits.log_bytes and not self._trimming:
                # Frames count too. Not at once: whoever asked is about to look at these entries.
                self._trimming = True
                asyncio.get_running_loop().call_soon(self._trim)
        return found

    def _joined(self, encoder: Callable[[Entry], bytes], seq: int) -> tuple[int, bytes, Entry]:
        frames = []
        size = 0
        for index in range(seq - self.base, len(self.entries)):
            entry = self.entries[index]
            cache = entry.frames
            if cache is None:
                cache = entry.frames = {}
            frame = cache.get(encoder)
            if frame is None:
                frame = encoder(entry)
                if len(cache) < 8:  # an encoder made for each request would only fill memory
                    cache[encoder] = frame
                    entry.cost += len(frame)
                    self.bytes += len(frame)
            frames.append(frame)
            size += len(frame)
            if size >= _JOIN_BYTES:
                break
        return seq + len(frames), b"".join(frames), entry

    def wait(self, future: asyncio.Future[None] | None = None) -> asyncio.Future[None]:
        """A future for the next append, finish or end; give it back with ``forget``.

        A stand-in stays, and acts at each append; it wakes at the end.
        """
        if future is None:
            future = asyncio.get_running_loop().create_future()
        if isinstance(future, StandIn) and self.wanted is None:
            self._stand_ins[future] = None
            return future
        self._waiting.add(future)
        if self.wanted is not None:
            self.wanted.set()
        return future

    def forget(self, future: asyncio.Future[None]) -> None:
        """The future of a wait is not needed any more."""
        self._waiting.discard(future)
        self._stand_ins.pop(future, None)  # type: ignore[call-overload]

    def forget_until(self, token: str) -> None:
        """Drop what is known up to a token."""
        dropped = bisect_right(self.entries, token, key=_token)
        if dropped:
            self.bytes -= sum(e.cost for e in self.entries[:dropped])
            del self.entries[:dropped]
            self.base += dropped
        self.floor = max(self.floor, token)

    def shrink(self, most: int) -> None:
        """Drop the oldest until the others take no more than so many bytes."""
        over, number = self.bytes - most, 0
        while over > 0 and number < len(self.entries) - 1:
            over -= self.entries[number].cost
            number += 1
        if number:
            self.forget_until(self.entries[number - 1].token)

    def finish(self) -> None:
        """Nothing more will be added here: attach to the feed again, after the head."""
        self.finished = True
        self._wake()

    def end_with(self, error: DataBridgeError) -> None:
        """Nothing more will come; subscribers get the error after what is pending."""
        self.ended = error
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, set()
        if self.wanted is not None:
            self.wanted.clear()
        for future in waiting:
            if not future.done():
                future.set_result(None)
        if self.finished or self.ended is not None:
            for stand_in in self._stand_ins:
                stand_in.wake()
        elif self._due:
            self._again = True
        elif self._stand_ins:
            self._due = list(self._stand_ins)
            # Not at once: others are yet to hear of what was appended, and a task may be running.
            asyncio.get_running_loop().call_soon(self._serve)

    def _serve(self) -> None:
        """Give the stand-ins their turns, and the loop its own between them."""
        due, until = self._due, time.monotonic() + _ROUND
        try:
            while due:
                due.pop().act()
                if not len(due) % _TURNS and time.monotonic() > until:
                    break
        finally:  # whatever one of them raises, it is not the end of the others
            if due:
                asyncio.get_running_loop().call_soon(self._serve)
            elif self._again:
                self._again = False
                self._wake()

    def _trim(self) -> None:
        self._trimming = False
        # The newest stays whatever its size: somebody is about to read it.
        most = len(self.entries) - 1
        if self.kept is not None:
            most = min(most, self.kept - self.base)
        extra = max(0, min(most, len(self.entries) - self._limits.log_entries))
        bytes_ = self.bytes - sum(e.cost for e in self.entries[:extra])
        while bytes_ > self._limits.log_bytes and extra < most:
            bytes_ -= self.entries[extra].cost
            extra += 1
        if extra:
            self.floor = self.entries[extra - 1].token
            del self.entries[:extra]
            self.base += extra
            self.bytes = bytes_


def reset_entry(position: ResumeToken) -> Entry:
    """The mark in a log where history was lost; what follows starts at the position."""
    return Entry({"_id": position.document, "operationType": RESET}, 0)
