"""CatchUp: a short-lived cursor for subscribers whose position is older than the feed's log.

It reads from the oldest of their tokens until it meets the feed's log, only as fast as somebody
wants to read, and serves everybody whose token lies on its way. A small fixed number of them run
at once, however many clients come back after a restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from bson import Timestamp

from .errors import BridgeClosed, DataBridgeError, ResumeHistoryLost, ServerUnreachable
from .log import Limits, Log
from .source import Batch, Scope, Source
from .token import ResumeToken

if TYPE_CHECKING:
    from .driver import Driver

__all__ = ["CatchUps", "Slots"]

# Tokens this close together, in seconds of cluster time, are worth one cursor: reading a minute
# of changes takes less than opening cursors for each.
_NEAR = 60
# A catch-up that nobody has wanted for this long gives its place to others, in seconds.
_IDLE = 2.0


class Slots:
    """How many catch-up cursors may be open, for all feeds of a bridge together."""

    def __init__(self, number: int) -> None:
        self.free = number
        self._waiting: dict[asyncio.Future[None], None] = {}  # who waits longest is asked first

    def take(self) -> bool:
        """Take a slot if there is one."""
        if not self.free:
            return False
        self.free -= 1
        return True

    def release(self) -> None:
        """Give a slot back."""
        self.free += 1
        self.announce()

    def announce(self) -> None:
        """Something changed for those who wait: a slot is free, or a catch-up can be joined."""
        waiting, self._waiting = self._waiting, {}
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def changed(self) -> None:
        """Wait for the next announcement."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[future] = None
        try:
            await future
        finally:
            self._waiting.pop(future, None)


class CatchUps:
    """The catch-ups of one feed."""

    def __init__(
        self, driver: Driver, scope: Scope, limits: Limits, slots: Slots, floor: Callable[[], str]
    ) -> None:
        self.opened = 0
        self._driver = driver
        self._scope = scope
        self._limits = limits
        self._slots = slots
        self._floor = floor  # where the feed's own log begins
        self._running: dict[Log, asyncio.Event] = {}  # and whether the cursor is open
        self._tasks: set[asyncio.Task[None]] = set()
        self._wanted: dict[object, ResumeToken] = {}
        self._lost = ""  # no position up to this token has a history any more
        self._closed = False

    @property
    def running(self) -> int:
        """How many of them are open now."""
        return len(self._running)

    async def attach(self, position: ResumeToken, *, patient: bool) -> tuple[Log, int]:
        """A log that has, or will have, what follows the position; its cursor is open.

        Args:
            patient: wait for a server that is away for as long as it takes.

        Raises:
            ResumeHistoryLost: the server no longer has it.
            InvalidResumeToken: the server does not know the position.
            ServerUnreachable: the cursor could not be opened in time.
        """
        while True:
            log = await self._serving(position)
            await self._open(log, None if patient else self._limits.timeout)
            if log.ended is None:
                if (seq := log.seek(position.hex)) is not None:
                    return log, seq
            elif not (isinstance(log.ended, ResumeHistoryLost) and position.floor > log.floor):
                raise log.ended.with_traceback(None)
            # It began before this position, and that may be lost where this is not.

    async def _serving(self, position: ResumeToken) -> Log:
        me = object()
        self._wanted[me] = position
        try:
            while True:
                if self._closed:
                    raise BridgeClosed("the bridge was closed")
                if position.floor <= self._lost:
                    raise lost(self._scope)
                log = self._joinable(position)
                if log is None and self._slots.take():
                    log = self._start(position)
                if log is not None:
                    return log
                await self._slots.changed()
        finally:
            del self._wanted[me]

    def _joinable(self, position: ResumeToken) -> Log | None:
        found = [
            log
            for log in self._running
            if log.floor <= position.hex
            and position.cluster_time.time - log.head.cluster_time.time <= _NEAR
        ]
        return max(found, key=lambda log: log.head, default=None)

    def _start(self, position: ResumeToken) -> Log:
        since = ResumeToken.at(Timestamp(max(0, position.cluster_time.time - _NEAR), 0)).hex
        start = min(p for p in self._wanted.values() if since <= p.hex <= position.hex)
        log = Log(start, self._limits)
        log.wanted = asyncio.Event()
        self._running[log] = asyncio.Event()
        task = asyncio.create_task(self._run(log, start), name=f"data-bridge catch-up {start}")
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(task, log))
        self.opened += 1
        self._slots.announce()
        return log

    async def _open(self, log: Log, timeout: float | None) -> None:
        opened = self._running.get(log)
        if opened is None or opened.is_set():
            return
        try:
            async with asyncio.timeout(timeout):
                await opened.wait()
        except TimeoutError as error:
            raise ServerUnreachable(
                f"cannot watch {self._driver.name}.{self._scope}: no MongoDB server answered "
                f"within {timeout:g} s. Check that the replica set has a primary."
            ) from error

    async def _run(self, log: Log, start: ResumeToken) -> None:
        source = Source(self._driver, self._scope, start=start, timeout=self._limits.timeout)
        opened, wanted = self._running[log], log.wanted
        assert wanted is not None
        announced = start.cluster_time.time

        def append(batch: Batch) -> None:
            nonlocal announced
            opened.set()
            log.append(batch.entries, batch.head)
            if log.head.cluster_time.time - announced >= _NEAR / 4:
                announced = log.head.cluster_time.time
                self._slots.announce()  # some may wait for what comes next

        try:
            while not opened.is_set() and not self._closed:
                await source.read(append)
            while not self._closed and not self._met(log, source):
                # A reply may be larger than a log: what it brings stays until somebody has read it,
                # who would otherwise begin again for ever.
                log.kept = log.end
                await source.read(append)
                if not self._met(log, source):
                    async with asyncio.timeout(_IDLE):
                        await wanted.wait()
            if not self._closed:
                log.finish()
        except TimeoutError:
            log.finish()
        except DataBridgeError as fatal:
            if isinstance(fatal, ResumeHistoryLost) and getattr(fatal.__cause__, "code", 0) == 286:
                self._lost = max(self._lost, log.floor)
            log.end_with(fatal)
        finally:
            self._end(log)
            await source.close()

    def _met(self, log: Log, source: Source) -> bool:
        """Whether the feed's own log goes on where this one ends."""
        floor = ResumeToken(self._floor())
        if log.head >= floor:
            return True
        # A feed starts one tick after the present. On a quiet cluster nothing ever comes between.
        if source.exhausted and floor.is_time and _next(log.head, floor):
            log.append([], floor)
            return True
        return False

    def _end(self, log: Log) -> None:
        opened = self._running.pop(log, None)
        if opened is not None:
            if not log.finished and log.ended is None:
                log.end_with(BridgeClosed("the bridge was closed"))
            opened.set()

    def _ended(self, task: asyncio.Task[None], log: Log) -> None:
        self._end(log)  # of a task that was cancelled before its first step
        self._tasks.discard(task)
        self._slots.release()

    async def close(self) -> None:
        """End all of them and the streams that they serve."""
        self._closed = True
        self._slots.announce()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


def _next(one: ResumeToken, other: ResumeToken) -> bool:
    a, b = one.cluster_time, other.cluster_time
    return a.time == b.time and a.inc + 1 == b.inc


def lost(scope: Scope) -> ResumeHistoryLost:
    """The error for a position that is known to be gone."""
    return ResumeHistoryLost(
        f"cannot watch {scope}: the server no longer has the history after this position. Read "
        "the present state again and watch from now."
    )
