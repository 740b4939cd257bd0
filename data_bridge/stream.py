"""ChangeStream: one subscriber, a position in a feed.

What ``Document.watch()`` returns. It holds no changes, only the place from which it reads next, so
that cancelling a wait loses nothing, falling behind costs nothing and leaving needs no cleaning up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from .change import Change
from .errors import BridgeClosed, InvalidFilter, ResumeHistoryLost
from .filter import Filter
from .log import RESET, Log
from .source import Entry
from .stand_in import StandIn
from .token import ResumeToken

if TYPE_CHECKING:
    from .document import Document
    from .feed import Feed

__all__ = ["ChangeStream", "Stream", "Wishes"]

D = TypeVar("D", bound="Document")
_SOME = 500  # changes that are looked at before others get a turn


@dataclass(frozen=True, slots=True)
class Wishes:
    """Which changes of a feed a subscriber asked for; decided in process, so that all share it."""

    operations: frozenset[str] | None = None
    filter: Filter | None = None

    def __post_init__(self) -> None:
        if self.filter is not None and self.filter.beyond is not None:
            raise InvalidFilter(
                f"watch() cannot evaluate this filter: {self.filter.beyond}. Have the server do "
                "it: pipeline=[{'$match': …}] on the names of a change event."
            )

    def wants(self, entry: Entry) -> bool:
        """Whether a change is one of those."""
        if self.operations is not None and entry.operation not in self.operations:
            return False
        return self.filter is None or self._matches(entry.raw, self.filter)

    @staticmethod
    def _matches(raw: dict[str, Any], filter: Filter) -> bool:
        # The document after the change or before it, whichever is known; else what names it.
        known = [d for f in ("fullDocument", "fullDocumentBeforeChange") if (d := raw.get(f))]
        if not known:
            key = raw.get("documentKey")
            if key is None:  # a drop or its like concerns every document
                return True
            known = [key]
        return any(filter.matches(document) for document in known)


class Stream:
    """Open on entry, closed on exit, iterated between the two or without them."""

    _feed: Feed | None  # once it is open

    def stalled(self) -> None:
        """Have it counted that whoever reads this was closed because they took nothing."""
        if self._feed is not None:
            self._feed.slow_readers += 1

    async def open(self) -> None:
        """Be ready, unless it is already."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """Let go of everything; iterating ends."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self


class ChangeStream(Stream, Generic[D]):
    """The changes to a collection, from a position on, in order, each once.

    ``async for change in Order.watch()`` starts from now when the loop starts.
    ``async with Order.watch() as changes`` is ready on entry: a change acknowledged after that
    line is delivered, always. Either way ``resume_token`` says how far it has come.

    Raises, from iteration and on entry:
        ResumeHistoryLost: the server no longer has what follows the position. Iterating on goes
            on from now, if the stream was running, so read the present state first.
        InvalidResumeToken: the server does not know the position.
        ServerUnreachable: nothing answered when the stream was opened. A running stream waits.
        DataBridgeError: what else ends a stream for good.
    """

    resumable = True

    def __init__(
        self,
        feed: Callable[[], Feed],
        model: type[D],
        position: ResumeToken | None,
        wishes: Wishes,
    ) -> None:
        self.model = model
        self.wishes = wishes
        self._open_feed = feed
        self._feed: Feed | None = None
        self._log: Log | None = None
        self._seq = 0
        self._token = position  # the last thing read, or where to start
        self._skip = ""  # what a worker that was ahead has delivered already
        self._news: asyncio.Future[None] | None = None
        self._closed = False

    # -- for everybody --

    @property
    def resume_token(self) -> ResumeToken | None:
        """The position up to which all has been delivered; ``None`` before the stream is open."""
        log, token = self._log, self._token
        if log is not None and self._seq >= log.end and (token is None or log.head > token):
            return log.head
        return token

    async def __anext__(self) -> Change[D]:
        while True:
            log = self._log
            if log is not None and 0 <= (index := self._seq - log.base) < len(log.entries):
                if self._skip:
                    self._skipped(log)
                    continue
                entry = log.entries[index]
                self._seq += 1
                self._token = entry.position
                if entry.operation == RESET:
                    raise _lost_meanwhile()
                if self.wishes.wants(entry):
                    return entry.typed(self.model)
            elif log is None:
                await self.wait()
            else:
                try:
                    await self.wait()
                except ResumeHistoryLost:
                    self._token, self._log = None, None  # iterating on goes on from now
                    raise

    async def aclose(self) -> None:
        """Leave the feed. Iterating ends; the position stays readable."""
        self._token = self.resume_token
        if self._news is not None and not self._news.done():
            self._news.set_result(None)  # somebody still waits
        self.leave()

    # -- for those who send many changes at once --

    async def open(self) -> None:
        """Attach to the feed at the position that was asked for, unless done before."""
        if self._closed:
            raise BridgeClosed("this stream was closed; call watch() again")
        if self._log is None:
            if self._feed is None:
                self._feed = self._open_feed()
                self._feed.join()
            await self._attach(self._token)

    def start_after(self, position: ResumeToken) -> None:
        """Start elsewhere than was asked for; before the stream is open."""
        self._token = position

    def take(self, encoder: Callable[[Entry], bytes]) -> bytes:
        """All that is pending as one piece of bytes; empty if nothing is, or nothing matched."""
        log = self._log
        # log.end, without the price of a call: this is done for every change and subscriber.
        if log is None or not log.base <= self._seq < log.base + len(log.entries):
            return b""
        if self._skip and self._skipped(log):
            return b""
        self._seq, joined, last = log.join(encoder, self._seq)
        self._token = last.position
        return joined

    def _skipped(self, log: Log) -> bool:
        """Pass over what was delivered elsewhere; whether that was all there is."""
        seq = log.seek(self._skip)
        self._seq = self._seq if seq is None else max(self._seq, seq)
        if self._seq < log.end:
            self._skip = ""
        return bool(self._skip)

    def take_entries(self) -> list[Entry]:
        """Some of what is pending, wanted or not, and the mark where history was lost."""
        log = self._log
        if log is None or not log.base <= self._seq < log.end:
            return []
        if self._skip and self._skipped(log):
            return []
        at = self._seq - log.base
        entries = log.entries[at : at + _SOME]
        self._seq += len(entries)
        self._token = entries[-1].position
        return entries

    @property
    def in_feed(self) -> bool:
        """Whether it reads from the feed's own log, and not from one that catches up."""
        return self._feed is not None and self._log is self._feed.log

    @property
    def pending(self) -> bool:
        """Whether ``take`` has something to look at right now."""
        return self._log is not None and self._log.base <= self._seq < self._log.end

    @property
    def has_all(self) -> bool:
        """Whether all that there is was taken, so that nothing but ``wait`` is left to do."""
        return self._log is None or self._seq >= self._log.end

    async def wait(self, stand_in: StandIn | None = None) -> None:
        """Wait until something is pending, moving from log to log on the way.

        Args:
            stand_in: what to wait with where nothing else has to be done; if it wakes, the wait
                is over.

        Raises:
            StopAsyncIteration: the stream was closed.
        """
        if self._log is None and not self._closed:
            await self.open()
        while not self._closed:
            log = self._log
            assert log is not None
            if self._seq < log.base:  # too slow for this log
                await self._attach(self._token, running=True)
            elif self._seq < log.end:
                return
            elif log.finished:
                await self._attach(self.resume_token, running=True)
            elif log.ended is not None:
                if self._started_later(log):
                    await self._attach(self._token, running=True)
                else:
                    raise log.ended.with_traceback(None)  # many raise the same one
            else:
                self._news = future = log.wait(stand_in)
                try:
                    await future
                finally:
                    log.forget(future)
                if stand_in is not None:
                    return
        raise StopAsyncIteration

    def _started_later(self, log: Log) -> bool:
        # A catch-up that began before this position may be lost where this position is not.
        return (
            isinstance(log.ended, ResumeHistoryLost)
            and self._token is not None
            and self._token.floor > log.floor
        )

    async def _attach(self, position: ResumeToken | None, *, running: bool = False) -> None:
        assert self._feed is not None
        before = self._log
        log, seq = await self._feed.attach(position, running=running)
        if self._closed or self._log is not before:  # meanwhile, by another task
            return
        self._log, self._seq = log, seq
        self._token = log.head if position is None else position
        self._skip = self._token.hex if self._token > log.head else ""

    async def restart(self) -> None:
        """Go on from now, after the position was lost."""
        self._token, self._log = None, None
        await self.open()

    def leave(self) -> None:
        """Leave the feed, from wherever."""
        if not self._closed:
            self._closed = True
            self._log = None
            if self._feed is not None:
                self._feed.leave()

    def __del__(self) -> None:
        # `async for change in Order.watch()` never closes what it iterates.
        if not getattr(self, "_closed", True):
            self.leave()

    def __repr__(self) -> str:
        return f"<ChangeStream {self.model.__name__} at {self.resume_token}>"


def _lost_meanwhile() -> ResumeHistoryLost:
    return ResumeHistoryLost(
        "changes were lost: the server no longer has the history after the last position. Read "
        "the present state again; iterating on goes on from now."
    )
