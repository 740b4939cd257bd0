"""Connection: one response on its way to one client, from its headers to its last byte."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qs

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ..errors import (
    BridgeClosed,
    InvalidResumeToken,
    ResumeHistoryLost,
    ServerUnreachable,
    SnapshotTooLarge,
    TooManyCursors,
)
from ..shutdown import track, untrack
from ..stand_in import StandIn
from ..token import ResumeToken
from .direct import direct

if TYPE_CHECKING:
    from .sse import EventSourceResponse

__all__ = ["Connection", "Frames"]

_log = logging.getLogger("data_bridge")

# A comment line without a blank line after it: no parser takes it for an event.
_KEEP_ALIVE = b":\n"
# How long a client may take for the end of its response, in seconds.
_LAST_SEND = 1.0

# Responses that cannot have a body: https://www.rfc-editor.org/rfc/rfc9110#section-6.4.1
_NO_BODY = (204, 205, 304)

# Only a wait for news may be interrupted for a keep-alive, and only a send can hang.
_OPENING, _WAITING, _SENDING = 0, 1, 2


class Frames(Protocol):
    """What a response can send as it is: a ``ChangeStream``, a live query, a generator's events."""

    resumable: bool  # whether ``Last-Event-ID`` is a position of its own, or the handler's business

    @property
    def resume_token(self) -> ResumeToken | None:
        """Where a client that has everything so far may resume; ``None``: nowhere."""

    @property
    def pending(self) -> bool:
        """Whether ``take`` has something to look at right now."""

    @property
    def has_all(self) -> bool:
        """Whether nothing is pending, and nothing but ``wait`` is left to do."""

    def start_after(self, position: ResumeToken) -> None:
        """Start at the position that a client sent; before ``open``."""

    async def open(self) -> None:
        """Be ready: whatever changes from here on will be delivered.

        What this raises can still become an error response.
        """

    def take(self, encoder: Any) -> bytes:
        """Whole frames of what is pending, some or all, as one piece; empty if nothing matched."""

    async def wait(self, stand_in: StandIn | None = None) -> None:
        """Wait until something is pending. May be cancelled and called again without a loss.

        With a stand-in it may wait until that wakes, which acts on whatever comes meanwhile.

        Raises:
            ResumeHistoryLost: ``restart`` goes on from now, after the client was told.
            StopAsyncIteration: that was all.
        """

    async def restart(self) -> None:
        """Go on from now."""

    def stalled(self) -> None:
        """Have it counted that the client was cut off because it took nothing."""

    async def aclose(self) -> None:
        """Let go of everything; also if it was never opened."""


class Connection:
    """Sends frames to one client for as long as it stays.

    The request's own task does the sending, and while it waits for news a stand-in does it in its
    name. A second task waits for the client to leave, and a timer looks whether a keep-alive is due
    or a send hangs; both speak to the first by cancelling it, which by the contract of
    ``Frames.wait`` loses nothing.
    """

    __slots__ = (
        "_cancelled_before",
        "_cancels",
        "_encoder",
        "_ending",
        "_loop",
        "_position",
        "_quiet",
        "_receive",
        "_response",
        "_scope",
        "_seen",
        "_send",
        "_sends",
        "_stand_in",
        "_started",
        "_state",
        "_task",
        "_timer",
        "_watcher",
        "content",
    )

    def __init__(
        self,
        response: EventSourceResponse,
        content: Frames,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.content = content
        self._response = response
        self._scope = scope
        self._receive = receive
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._task = task
        self._cancelled_before = task.cancelling()
        self._watcher: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._encoder: Any = None
        self._stand_in: StandIn | None = None
        self._started = False
        self._ending: str | None = None
        self._cancels = 0  # cancellations of the task that are ours
        self._state = _OPENING
        self._sends = 0
        self._seen = 0  # sends at the last tick
        self._quiet = 0.0  # seconds without one, as far as the ticks have seen
        self._position: tuple[int, str] = (-1, "")  # the last id-only frame, and when it was sent

    @property
    def owner(self) -> Any:
        """Whose stream it is."""
        return self._response.owner

    @property
    def decided(self) -> float:
        """When it was decided that it may begin."""
        return self._response.decided

    async def run(self) -> None:
        if self._scope["method"] == "HEAD" or self._response.status_code in _NO_BODY:
            await self._start()
            await self._send({"type": "http.response.body", "body": b""})
            return
        self._watcher = self._loop.create_task(self._watch())
        try:
            if track(self):
                await self._stream()
        except StopAsyncIteration:
            pass
        except asyncio.CancelledError:
            if not self._only_ours() or self._ending is None:
                # The server, or something in between, gives up on the request.
                if self._started:
                    await self._finish()
                raise
        except (
            InvalidResumeToken,
            ResumeHistoryLost,
            ServerUnreachable,
            BridgeClosed,
            SnapshotTooLarge,
            TooManyCursors,
        ) as error:
            await self._refuse(error)
            return
        if self._ending == "stalled":
            _log.info("a client was cut off because it took nothing for a while; it can resume")
            self.content.stalled()
            await self._cut()
        elif self._ending != "left":
            await self._finish()

    # -- what is sent --

    async def _stream(self) -> None:
        content, response = self.content, self._response
        if response.resume and content.resumable and (position := _last_event_id(self._scope)):
            content.start_after(ResumeToken.parse(position))
        try:
            await content.open()
            first = response.opening(content)
        except ResumeHistoryLost:
            await content.restart()
            first = response.reset(content)
        if response.own_ids and content.resume_token is not None:
            self._position = (1, str(content.resume_token))
        encoder = self._encoder = response.encoder
        first += content.take(encoder)
        await self._start()
        await self._send_body(first)  # also if empty: servers may hold the headers back until then
        while True:
            try:
                if content.pending:
                    await asyncio.sleep(0)
                else:
                    self._stand_in = StandIn(self._task, self._act)
                    await content.wait(self._stand_in)
            except asyncio.CancelledError:
                if not self._only_ours() or self._ending is not None:
                    raise
                await self._send_body(self._keep_alive())
            except ResumeHistoryLost:
                self._state = _OPENING
                await content.restart()
                await self._send_body(response.reset(content))
            if chunk := content.take(encoder):
                await self._send_body(chunk)

    def _act(self) -> None:
        """Send what is new in the name of the task, which waits."""
        content, stand_in = self.content, self._stand_in
        assert stand_in is not None
        try:
            chunk = content.take(self._encoder)
        except Exception as error:  # what the application's own functions raise ends the stream
            stand_in.fail(error)
            return
        if chunk:
            stand_in.run(self._send_body(chunk))
        if not content.has_all:
            stand_in.wake()

    async def _send_body(self, body: bytes) -> None:
        self._sends += 1
        self._state = _SENDING
        try:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
        except OSError:  # as the specification has it for clients that left; most servers ignore it
            self._ending = "left"
            raise StopAsyncIteration from None
        self._state = _WAITING

    async def _start(self) -> None:
        self._started = True
        headers = self._response.raw_headers
        if self._scope.get("http_version", "1.1") >= "2":  # forbidden: RFC 9113, section 8.2.2
            headers = [h for h in headers if h[0] != b"connection"]
        self._state = _SENDING
        self._tick()
        await self._send(
            {
                "type": "http.response.start",
                "status": self._response.status_code,
                "headers": headers,
            }
        )
        self._send = direct(self._send)
        self._state = _WAITING

    async def _finish(self, last: bytes = b"") -> None:
        if self._ending is None:
            self._ending = "done"
        try:
            async with asyncio.timeout(_LAST_SEND):
                if not self._started:
                    await self._start()
                await self._send({"type": "http.response.body", "body": last, "more_body": False})
        except OSError as error:
            if isinstance(error, TimeoutError):
                await self._cut()

    async def _refuse(self, error: Exception) -> None:
        """End with what a client can act on; an EventSource gives up for good on 4xx and 5xx."""
        self._ending = "refused"
        if isinstance(error, InvalidResumeToken | SnapshotTooLarge) and not self._started:
            status = 400 if isinstance(error, InvalidResumeToken) else 413
            refusal = JSONResponse({"detail": str(error)}, status)
            await refusal(self._scope, self._receive, self._send)
            return
        retry = 1000 if self._response.retry is None else self._response.retry
        last = b"retry: %d\n\n" % retry
        if isinstance(error, ResumeHistoryLost | InvalidResumeToken):
            last += self._response.reset(None)
        else:
            _log.warning("a stream ends, and its client will come back: %s", error)
        await self._finish(last)

    async def _cut(self) -> None:
        """Free the connection of a client that does not read.

        A server that closes it waits for the client to read what it has buffered, for ever.
        """
        if shut_socket(self._scope.get("client"), self._scope.get("server")):
            assert self._watcher is not None
            await asyncio.wait({self._watcher}, timeout=_LAST_SEND)

    # -- beside it --

    def _tick(self) -> None:
        """Every so often: is a send hanging, is a keep-alive due?"""
        response = self._response
        limit = response.send_timeout
        keep_alive = response.keep_alive or limit
        # Twice within each of them: silence lasts between half of keep_alive and all of it.
        period = min(keep_alive, limit) / 2
        self._timer = self._loop.call_later(period, self._tick)
        if self._sends != self._seen:
            self._seen = self._sends
            self._quiet = 0.0
            return
        self._quiet += period
        if self._state == _SENDING:
            if self._quiet >= limit:
                self.end("stalled")
        elif (
            self._state == _WAITING
            and response.keep_alive
            and self._quiet >= keep_alive / 2
            and self._ending is None
        ):
            self._cancel()

    def _cancel(self) -> None:
        self._cancels += 1
        self._task.cancel()

    def _only_ours(self) -> bool:
        """Take our own cancellations of the task back; whether nobody else's came with them."""
        ours, self._cancels = self._cancels, 0
        for _ in range(ours):
            self._task.uncancel()
        return self._task.cancelling() <= self._cancelled_before

    def _keep_alive(self) -> bytes:
        """A comment; or the position of a quiet stream that has come further than its client."""
        content = self.content
        if not self._response.own_ids or (token := content.resume_token) is None:
            return _KEEP_ALIVE
        known, position = self._position, str(token)
        self._position = (self._sends + 1, position)
        if known == (self._sends, position):
            return _KEEP_ALIVE
        return b"id: %b\n\n" % position.encode()

    async def _watch(self) -> None:
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
        except Exception as error:
            if not isinstance(error, OSError):
                _log.warning("cannot see whether the client stays: %r", error, exc_info=error)
        self.end("left")

    def end(self, reason: str) -> None:
        """Make the request's task stop, whatever it waits for."""
        if self._ending is None:
            self._ending = reason
            self._cancel()

    async def close(self) -> None:
        """Leave nothing behind: no timer, no task, nothing of the content."""
        untrack(self)
        if self._ending is None:
            self._ending = "failed"
        if self._timer is not None:
            self._timer.cancel()
        watcher = self._watcher
        if watcher is not None:
            watcher.cancel()
        try:
            await self.content.aclose()
        finally:
            if watcher is not None and not watcher.done():
                await asyncio.wait({watcher})


def _last_event_id(scope: Scope) -> str:
    """Where the client wants to go on; the query is for those that cannot set the header.

    https://html.spec.whatwg.org/multipage/server-sent-events.html#the-last-event-id-header
    """
    for name, value in scope["headers"]:
        if name == b"last-event-id" and value:
            return bytes(value).decode("latin-1")
    query: bytes = scope.get("query_string", b"")
    if b"last_event_id=" not in query:
        return ""
    return parse_qs(query.decode("latin-1")).get("last_event_id", [""])[-1]


Address = tuple[str, int]
Ends = tuple[Address, int]
_seen: dict[Ends, int] = {}  # the connected sockets of this process


def shut_socket(client: Address | None, server: Address | None) -> bool:
    """Shut the connected socket of this process between two addresses; whether there was one.

    ASGI has no way to abort a connection, and a transport that is closed first waits for what it
    has buffered. Linux lists the sockets of a process; elsewhere the server's own timeout is left.
    """
    if not client or not client[1] or not server or not os.path.isdir("/proc/self/fd"):
        return False
    ends = (_plain(client), server[1])
    return _shut(_seen.get(ends), ends) or _shut(_look().get(ends), ends)


def _look() -> dict[Ends, int]:
    # Many clients may have to be cut at once, at a shutdown say: one look is enough for all.
    _seen.clear()
    _seen.update(_sockets())
    return _seen


def _shut(number: int | None, ends: Ends) -> bool:
    if number is not None:
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
            if _ends(connection) == ends:  # not another one of the same number by now
                connection.shutdown(socket.SHUT_RDWR)
                return True
    return False


def _sockets() -> Iterator[tuple[Ends, int]]:
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6):
                        yield _ends(connection), int(name)


def _ends(connection: socket.socket) -> Ends:
    return _plain(connection.getpeername()), connection.getsockname()[1]


def _plain(address: Any) -> Address:
    return address[0].removeprefix("::ffff:"), address[1]
