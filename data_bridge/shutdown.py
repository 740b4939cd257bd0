"""Shutdown: ending open streams when the server is told to stop.

Servers wait for their connections before they run the lifespan's shutdown, and a stream waits for
ever, so the signal itself has to end the streams. The handler here stands in front of the server's
own while streams are open, and calls it; nothing of the server is patched.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Protocol

__all__ = ["close_streams", "guard", "track", "untrack"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Requests that were under way when the signal came may turn into streams for so long, in seconds.
_AFTER_SIGNAL = 60.0
# A server that is stopped by other means accepts connections for a moment more.
_AFTER_CALL = 1.0
# For so long, in seconds, a request may take from deciding who it is for to becoming a stream.
_DECIDING = 60.0


class Stream(Protocol):
    """Something that can be told to end."""

    @property
    def owner(self) -> Any: ...

    @property
    def decided(self) -> float:
        """When it was decided that it may begin, on the monotonic clock."""

    def end(self, reason: str) -> None: ...


class _Streams:
    """The open streams of one event loop."""

    __slots__ = ("closing", "guarded", "loop", "open", "revoked")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.open: set[Stream] = set()
        self.closing = 0.0  # streams that begin before this time end at once
        self.guarded = 0
        self.revoked: list[tuple[float, Any]] = []  # when, and whose streams were ended

    def close(self) -> None:
        for stream in list(self.open):
            stream.end("shutdown")

    def revoke(self, owner: object, when: float) -> None:
        self.revoked = [one for one in self.revoked if one[0] > when - _DECIDING]
        self.revoked.append((when, owner))
        for stream in list(self.open):
            if stream.owner == owner:
                stream.end("revoked")

    def may_begin(self, stream: Stream) -> bool:
        # What was decided before a revocation, by then unfinished, was decided on old permissions.
        if any(stream.decided <= when and stream.owner == owner for when, owner in self.revoked):
            return False
        return time.monotonic() >= self.closing


# A plain dict, because a signal may interrupt any line of Python and only copying one is atomic.
_loops: dict[asyncio.AbstractEventLoop, _Streams] = {}


def track(stream: Stream) -> bool:
    """Have ``stream.end("shutdown")`` called in this loop when the process is told to stop.

    Returns whether the stream may begin: not, if the process is stopping already, or if its owner's
    streams were ended since it was decided upon.
    """
    loop = asyncio.get_running_loop()
    streams = _loops.get(loop) or _register(loop)
    if _in_main_thread():
        _handlers.stand_in_front()
    streams.open.add(stream)
    return streams.may_begin(stream)


def untrack(stream: Stream) -> None:
    """The stream has ended."""
    streams = _loops.get(asyncio.get_running_loop())
    if streams is not None:
        streams.open.discard(stream)
        if not streams.open and not streams.guarded and _in_main_thread():
            _handlers.step_aside()


def _register(loop: asyncio.AbstractEventLoop) -> _Streams:
    for other in list(_loops):
        if other.is_closed():
            _loops.pop(other, None)
    streams = _loops[loop] = _Streams(loop)
    return streams


def close_streams(*, owner: Any = None) -> None:
    """End every open stream of this process, each response properly finished.

    With ``owner`` only those of one user, whose permissions have changed: a browser connects again,
    and the handler decides anew; so it does for a request that is only on its way to a stream.
    Every worker process has to be told.

    Signals do this by themselves. Call it, from any thread, before stopping a server that runs in
    a thread or is stopped by other means: uvicorn's ``should_exit`` waits for open connections.
    Streams that begin within the next second end at once, so that none slips in between.
    """
    if owner is None:
        _close_all(_AFTER_CALL)
        return
    when = time.monotonic()
    for streams in list(_loops.values()):
        with suppress(RuntimeError):
            streams.loop.call_soon_threadsafe(streams.revoke, owner, when)


def _close_all(closing: float) -> None:
    until = time.monotonic() + closing
    for streams in list(_loops.values()):
        streams.closing = max(streams.closing, until)
        with suppress(RuntimeError):  # the loop is closed, and its streams with it
            streams.loop.call_soon_threadsafe(streams.close)


@contextmanager
def guard() -> Iterator[None]:
    """Watch for the signals for as long as an application runs.

    Streams do this too while there are any. What this adds are requests that are still on their
    way to becoming a stream when the signal comes and no other is open.
    """
    if not _in_main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    streams = _loops.get(loop) or _register(loop)
    streams.guarded += 1
    _handlers.stand_in_front()
    try:
        yield
    finally:
        streams.guarded -= 1
        if not streams.guarded and not streams.open:
            _handlers.step_aside()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class _Handlers:
    """Our handlers of the signals, in front of whatever was there."""

    def __init__(self) -> None:
        self._installed: dict[signal.Signals, _Handler] = {}

    def stand_in_front(self) -> None:
        for number in _SIGNALS:
            before = signal.getsignal(number)
            # Nobody's, or not one of Python's: then there is no server to stand in front of.
            if isinstance(before, _Handler) or not callable(before):
                continue
            handler = self._installed[number] = _Handler(before)
            signal.signal(number, handler)

    def step_aside(self) -> None:
        for number, handler in self._installed.items():
            # Somebody else's may stand in front by now, and call ours: let it.
            current: object = signal.getsignal(number)
            if current is handler:
                signal.signal(number, handler.before)
        self._installed.clear()


class _Handler:
    def __init__(self, before: Callable[[int, FrameType | None], Any]) -> None:
        self.before = before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            _close_all(_AFTER_SIGNAL)
        finally:
            self.before(number, frame)


_handlers = _Handlers()
