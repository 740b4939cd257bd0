"""Feed: a bounded log of changes that any number of subscribers read by position.

One feed has one server cursor. It appends each change once and never waits for a subscriber: a
subscriber is a number, the place in the log that it reads next. Whoever is too far behind for the
log is served by a catch-up, a second cursor that reads from an older token until it meets the log.
MongoDB's oplog is the history; the log here is only its cache.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pymongo.errors import PyMongoError

from . import journal
from .catch_up import CatchUps, Slots
from .document import keep_images
from .errors import (
    BridgeClosed,
    DataBridgeError,
    InvalidResumeToken,
    ResumeHistoryLost,
    ServerUnreachable,
    translated,
)
from .log import Limits, Log, reset_entry
from .lookup import Lookups
from .router import Router
from .source import Batch, Entry, Scope, Source
from .token import ResumeToken

if TYPE_CHECKING:
    from .driver import Driver

__all__ = ["Feed"]

# How far a position may lie ahead of the cluster's time, in seconds.
_AHEAD = 1


class Feed:
    """The changes of one scope, from one server cursor, for everybody who watches it."""

    def __init__(
        self,
        driver: Driver,
        scope: Scope,
        limits: Limits,
        slots: Slots,
        closed: Callable[[Feed], None],
    ) -> None:
        self.scope = scope
        self.log: Log | None = None
        self.subscribers = 0
        self.resets = 0
        # Positions of live queries without images are good for this feed only; others may have
        # looked up later states of the documents.
        self.epoch = secrets.token_urlsafe(3)
        self.slow_readers = 0  # subscribers that were closed because they took nothing
        self.name = f"{driver.name}.{scope}"
        self.router: Router | None = None  # for live queries, told of everything appended
        self._driver = driver
        self.limits = limits
        self._closed = closed
        self._loop = asyncio.get_running_loop()
        self.source = Source(driver, scope, timeout=limits.timeout)
        self.catch_ups = CatchUps(driver, scope, limits, slots, self._floor)
        self._lost: ResumeHistoryLost | None = None
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._linger: asyncio.TimerHandle | None = None
        self._ending = False
        self.task = asyncio.create_task(self._run(), name=f"data-bridge feed {scope}")

    # -- subscribers --

    def join(self) -> None:
        """One subscriber more; the feed stays open while there is any."""
        self.subscribers += 1
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None

    def leave(self) -> None:
        """One subscriber less; may be called from any thread, as finalisers are."""
        with suppress(RuntimeError):  # the loop is gone, and the feed with it
            self._loop.call_soon_threadsafe(self._left)

    def _left(self) -> None:
        self.subscribers -= 1
        if not self.subscribers and self._linger is None:
            self._linger = self._loop.call_later(self.limits.linger, self._end)

    async def attach(
        self, position: ResumeToken | None, *, running: bool = False
    ) -> tuple[Log, int]:
        """The log and the sequence number where reading on from a position begins.

        Args:
            running: the position is one that this feed gave out. It is right, and if the server is
                away, that is something to wait for.

        Raises:
            ResumeHistoryLost: the server no longer has what followed the position.
            InvalidResumeToken: the server does not know it, or it lies in the future.
            ServerUnreachable: the feed could not be opened in time.
        """
        log = await self.ready()
        if position is None:
            return log, log.end
        if not running:
            await self.check(position)
        seq = log.seek(position.hex)
        if seq is not None:
            return log, seq
        return await self.catch_ups.attach(position, patient=running)

    async def ready(self) -> Log:
        """Wait until the cursor is open.

        Raises:
            ServerUnreachable: it could not be opened in time.
            DataBridgeError: it never will be.
        """
        if self.log is None:
            try:
                async with asyncio.timeout(self.limits.timeout):
                    await asyncio.shield(self._ready)
            except TimeoutError as error:
                raise ServerUnreachable(
                    f"cannot watch {self.name}: no MongoDB server answered "
                    f"within {self.limits.timeout:g} s. Check that the replica set has a primary."
                ) from error
        assert self.log is not None
        if self.log.ended is not None:
            raise self.log.ended.with_traceback(None)  # many raise the same one
        return self.log

    async def check(self, position: ResumeToken) -> None:
        """Refuse a position that lies in the future, where nothing would ever follow it.

        Raises:
            InvalidResumeToken: it does.
        """
        assert self.log is not None
        if position <= self.log.head:
            return
        # Another worker may be ahead of this one by a moment; nothing is ahead of the cluster.
        try:
            reply = await self._driver.command({"ping": 1}, timeout=self.limits.timeout)
        except Exception as error:
            raise translated(error, f"watch {self.name}") from error
        now = reply.get("$clusterTime", {}).get("clusterTime")
        # A cursor that opens starts one tick after the present.
        if now is not None and position.cluster_time.time > now.time + _AHEAD:
            raise InvalidResumeToken(
                "this resume position lies in the future of the cluster; it is from another "
                "deployment, or made up. Connect without it to start from now."
            )

    def live(self) -> Router:
        """What hands the changes to live queries. Only once the feed is ready.

        Raises:
            DataBridgeError: the feed has ended.
        """
        assert self.log is not None
        if self.log.ended is not None:
            raise self.log.ended
        if self.router is None:
            self.router = Router(self)
            if self.scope.full_document == "updateLookup":
                self.source.lookups = Lookups(self._driver, self.limits.timeout)
        return self.router

    async def keep_images(self, collection: str) -> None:
        """Have a collection keep the images that live queries rely on."""
        try:
            await keep_images(self._driver.database, collection)
        except (PyMongoError, TimeoutError, OSError) as error:
            # Those who see it reset will ask for it again.
            logging.getLogger("data_bridge").warning(
                "cannot have %s keep images: %r", collection, error
            )

    # -- the server --

    async def _run(self) -> None:
        error: DataBridgeError = _bridge_closed()
        try:
            while not self._ending:  # PyMongo has been seen to swallow a cancellation
                try:
                    await self.source.read(self._append)
                except ResumeHistoryLost as lost:
                    self._lost = lost
        except DataBridgeError as fatal:
            error = fatal
            self._journal(logging.ERROR, "failed", reason=fatal)
        finally:
            self._end_with(error)
            if self.router is not None:
                await self.router.close()
            await self.catch_ups.close()
            await self.source.close()
            self._journal(logging.INFO, "closed")

    def _append(self, batch: Batch) -> None:
        if self.log is None:
            self.log = Log(batch.head, self.limits)
            self._ready.set_result(None)
            self._lost = None
            self._journal(logging.INFO, "opened")
        elif self._lost is not None:
            self.resets += 1
            self._add([reset_entry(batch.head)], batch.head)
            self._journal(logging.WARNING, "reset", reason=self._lost)
            self._lost = None
        self._add(batch.entries, batch.head)

    def _add(self, entries: list[Entry], head: ResumeToken) -> None:
        assert self.log is not None
        before = self.log.head
        self.log.append(entries, head)
        if entries and self.router is not None:
            self.router.route(entries, before)

    def _floor(self) -> str:
        assert self.log is not None
        return self.log.floor

    def _journal(self, level: int, event: str, **fields: Any) -> None:
        position = self.log.head if self.log is not None else None
        journal.log(level, self.name, event, position, **fields)

    # -- the end --

    def _end(self) -> None:
        # Out of sight first: whoever comes from here on needs a new feed.
        self._closed(self)
        if self._linger is not None:
            self._linger.cancel()
        if not self._ending:  # a second cancellation would cut the cleaning up short
            self._ending = True
            self.task.cancel()

    def _end_with(self, error: DataBridgeError) -> None:
        self._ending = True
        self._closed(self)
        if self.log is not None:
            self.log.end_with(error)
        if self.router is not None:
            self.router.end_with(error)
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # nobody may be waiting

    async def close(self) -> None:
        """End the feed and everybody's streams of it."""
        self._end()
        await asyncio.wait([self.task])
        if not self._ready.done():  # the task never got to its first step
            self._end_with(_bridge_closed())


def _bridge_closed() -> BridgeClosed:
    return BridgeClosed("the bridge was closed")
