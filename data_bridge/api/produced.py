"""Produced: the frames of what an async iterator yields, a generator's above all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from ..stand_in import StandIn
from ..token import ResumeToken

__all__ = ["Produced"]

_log = logging.getLogger("data_bridge")

# How long an iterator may think before the headers are sent without its first event, in seconds:
# until then an exception of it can still become an error response.
_GRACE = 0.1
# How far an iterator may run ahead of its connection.
_AHEAD_FRAMES = 100
_AHEAD_BYTES = 64 * 1024
# How long an iterator may clean up before it is cancelled once more, in seconds.
_PATIENCE = 5.0


class Produced:
    """Frames of what an async iterator yields.

    A task of its own runs the iterator, a little ahead of the connection: what it yields without
    waiting goes out in one piece, and cancelling it never touches a send.
    """

    __slots__ = (
        "_begun",
        "_closing",
        "_frame",
        "_frames",
        "_items",
        "_news",
        "_room",
        "_size",
        "_task",
    )

    def __init__(self, items: AsyncIterator[Any], frame: Callable[[Any], bytes]) -> None:
        self._items = items
        self._frame = frame
        self._frames: list[bytes] = []
        self._size = 0
        self._task: asyncio.Task[None] | None = None
        self._news: asyncio.Future[None] | None = None  # the connection waits for frames
        self._room: asyncio.Future[None] | None = None  # the iterator waits for the connection
        self._begun = False
        self._closing = False

    resumable = False
    resume_token: ResumeToken | None = None

    @property
    def pending(self) -> bool:
        return bool(self._frames)

    @property
    def has_all(self) -> bool:
        return not self._frames

    def start_after(self, position: ResumeToken) -> None:
        """Iterators have ids of their own; the handler reads ``Last-Event-ID`` for them."""

    async def open(self) -> None:
        self._task = asyncio.create_task(self._produce())
        grace = asyncio.timeout(_GRACE)
        try:
            async with grace:
                await self.wait()
        except StopAsyncIteration:
            pass
        except TimeoutError:
            if not grace.expired():  # the iterator's own
                raise

    def take(self, encoder: Any) -> bytes:
        frames = self._frames
        if not frames:
            return b""
        joined = frames[0] if len(frames) == 1 else b"".join(frames)
        frames.clear()
        self._size = 0
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        return joined

    async def wait(self, stand_in: StandIn | None = None) -> None:
        task = self._task
        assert task is not None
        while not self._frames:
            if task.done():
                if not task.cancelled():
                    task.result()
                raise StopAsyncIteration
            self._news = stand_in or asyncio.get_running_loop().create_future()
            try:
                await self._news
            finally:
                self._news = None
            if stand_in is not None:
                return

    async def restart(self) -> None:
        """An iterator that lost its history has ended with that."""
        assert self._task is not None
        self._task.result()

    def stalled(self) -> None:
        """No feed is known to count it for."""

    async def _produce(self) -> None:
        items, frames, frame = self._items, self._frames, self._frame
        self._begun = True
        try:
            async for item in items:
                if self._closing:
                    break
                made = frame(item)
                frames.append(made)
                self._size += len(made)
                if len(frames) == 1:  # all that are there are taken at once
                    self._tell()
                if len(frames) >= _AHEAD_FRAMES or self._size >= _AHEAD_BYTES:
                    try:
                        await self._has_room()
                    except asyncio.CancelledError:
                        await self._cancel_at_yield()
                        raise
        finally:
            await _closed(items)
            self._tell(last=True)

    async def _has_room(self) -> None:
        while len(self._frames) >= _AHEAD_FRAMES or self._size >= _AHEAD_BYTES:
            self._room = asyncio.get_running_loop().create_future()
            try:
                await self._room
            finally:
                self._room = None

    async def _cancel_at_yield(self) -> None:
        """Cut off between two events, it is told in the same way as while it waits."""
        throw = getattr(self._items, "athrow", None)
        if throw is not None:
            with suppress(asyncio.CancelledError, StopAsyncIteration):
                await throw(asyncio.CancelledError())

    def _tell(self, *, last: bool = False) -> None:
        news = self._news
        if news is None or news.done():
            return
        if isinstance(news, StandIn) and not last:
            news.call()
        else:
            news.set_result(None)

    async def aclose(self) -> None:
        self._closing = True
        task = self._task
        if task is None:  # it was never started
            await _closed(self._items)
            return
        if task.done():
            if not task.cancelled():
                task.exception()  # it was raised by wait(), or the client had left before
            return
        for _ in range(2):
            task.cancel()
            await asyncio.wait({task}, timeout=_PATIENCE)
            if task.done():
                break
        else:
            _log.error("a generator goes on after its stream has ended: %r", self._items)
            return
        if not self._begun:  # cancelled before its first step
            await _closed(self._items)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a generator failed while it cleaned up: %r", error, exc_info=error)


async def _closed(items: Any) -> None:
    close = getattr(items, "aclose", None)
    if close is not None:
        await close()
