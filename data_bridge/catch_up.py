"""CatchUp: a short-lived cursor for subscribers whose position is older than the feed's log.

It reads from the oldest of their tokens until it meets the feed's log, only as fast as somebody
wants to read, and serves everybody whose token lies on its way. A small fixed number of them run
at once, however many clients come back after a restart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from bson import Timestamp

from .errors import BridgeClosed, DataBridgeError, ResumeHistoryLost
from .log import Limits, Log
from .source import Batch, Scope, Source
from .token import ResumeToken

if TYPE_CHECKING:
    from .driver import Driver

__all__ = ["CatchUps", "Slots"]

_logger = logging.getLogger("data_bridge")

# Tokens this close together, in seconds of cluster time, are worth one cursor: reading a minute
# of changes takes less than opening cursors for each.
_NEAR = 60
# A catch-up that nobody has wanted for this long gives its place to others, in seconds.
_IDLE = 2.0


class Slots:
    """How many catch-up cursors may be open, for all feeds of a bridge together."""

    def __init__(self, number: int) -> None:
        self.free = number
        self._waiting: set[asyncio.Future[None]] = set()

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
        waiting, self._waiting = self._waiting, set()
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def changed(self) -> None:
        """Wait for the next announcement."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)


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
        self._running: dict[asyncio.Task[None], Log] = {}
        self._wanted: dict[object, ResumeToken] = {}
        self._lost = ""  # no position up to this token has a history any more
        self._closed = False

    async def attach(self, position: ResumeToken) -> tuple[Log, int]:
        """A log that has, or will have, what follows the position.

        Raises:
            ResumeHistoryLost: the server no longer has it.
        """
        me = object()
        self._wanted[me] = position
        try:
            while True:
                if position.hex <= self._lost:
                    raise lost(self._scope)
                log = self._joinable(position)
                if log is None and self._slots.take():
                    log = self._start(position)
                if log is not None:
                    seq = log.seek(position.hex)
                    assert seq is not None
                    return log, seq
                await self._slots.changed()
        finally:
            del self._wanted[me]

    def _joinable(self, position: ResumeToken) -> Log | None:
        found = [
            log
            for log in self._running.values()
            if log.floor <= position.hex
            and position.cluster_time.time - log.head.cluster_time.time <= _NEAR
        ]
        return max(found, key=lambda log: log.head, default=None)

    def _start(self, position: ResumeToken) -> Log:
        if self._closed:
            self._slots.release()
            raise BridgeClosed("the bridge was closed")
        since = ResumeToken.at(Timestamp(max(0, position.cluster_time.time - _NEAR), 0)).hex
        start = min(p for p in self._wanted.values() if since <= p.hex <= position.hex)
        log = Log(start, self._limits)
        task = asyncio.create_task(self._run(log, start), name=f"data-bridge catch-up {start}")
        self._running[task] = log
        self.opened += 1
        self._slots.announce()
        return log

    async def _run(self, log: Log, start: ResumeToken) -> None:
        source = Source(self._driver, self._scope, start=start, timeout=self._limits.timeout)

        def append(batch: Batch) -> None:
            log.append(batch.entries, batch.head)

        error: DataBridgeError = BridgeClosed("the bridge was closed")
        try:
            while log.head.hex < self._floor():
                await source.read(append)
                async with asyncio.timeout(_IDLE):
                    await log.wanted.wait()
            log.finish()
        except TimeoutError:
            log.finish()
        except DataBridgeError as fatal:
            error = fatal
            if isinstance(fatal, ResumeHistoryLost) and getattr(fatal.__cause__, "code", 0) == 286:
                self._lost = max(self._lost, log.floor)
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._running.pop(task, None)
            if not log.finished:
                log.end_with(error)
            await source.close()
            self._slots.release()
            _logger.info("catch-up on %s.%s done", self._driver.name, self._scope)

    async def close(self) -> None:
        """End all of them and the streams that they serve."""
        self._closed = True
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


def lost(scope: Scope) -> ResumeHistoryLost:
    """The error for a position that is known to be gone."""
    return ResumeHistoryLost(
        f"cannot watch {scope}: the server no longer has the history after this position. Read "
        "the present state again and watch from now."
    )
