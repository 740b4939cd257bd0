"""EventSourceResponse: the response that streams events.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..change import Change
from ..live import LiveStream
from ..stream import ChangeStream, Wishes
from .connection import Connection, Frames
from .encoder import ChangeEncoder, Made, Named, change_encoder, reset_frame
from .event import ServerSentEvent, check_event
from .live import Authorized, live_encoder
from .produced import Produced

__all__ = ["EventSourceResponse", "ServerSentEvent"]


_AUTOMATIC = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    "connection": "keep-alive",
    "x-accel-buffering": "no",
}


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


_HEADERS = _encoded(_AUTOMATIC)


class EventSourceResponse(Response):
    """Streams events to a client for as long as it stays.

    Args:
        content: what to send: ``Order.watch()`` or ``Order.live()``, which resume by themselves
            after the ``Last-Event-ID`` of the request, or an async iterator of
            ``ServerSentEvent`` or ``Change``. When the client goes away an iterator is cancelled
            where it waits.
        status_code: the status; anything but 200 closes a browser's EventSource for good.
        headers: more headers, or others than the automatic ones.
        background: a Starlette background task, run after the stream has ended.
        event: for changes, their event name or a function of the change; the operation if left out.
        data: for changes, a function that gives text or what becomes JSON; ``{"operation", "id",
            "document"}`` if left out.
        id: for changes, a function that gives the event id; the resume token if left out.
        resume: whether to start after the request's ``Last-Event-ID`` (or its query parameter
            ``last_event_id``, for clients that cannot set the header).
        keep_alive: seconds without an event after which a comment keeps proxies from closing the
            connection, or ``None``.
        retry: milliseconds that clients wait before they reconnect.
        send_timeout: seconds that a client may leave a send waiting before it is cut off; it
            resumes when it reads again.
        owner: whose stream it is, for ``close_streams(owner=…)``.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        content: ChangeStream[Any] | LiveStream[Any] | AsyncIterator[Any],
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        background: BackgroundTask | None = None,
        *,
        event: Named = None,
        data: Made = None,
        id: Made = None,
        resume: bool = True,
        keep_alive: float | None = 15.0,
        retry: int | None = None,
        send_timeout: float = 30.0,
        owner: Any = None,
    ) -> None:
        if not hasattr(content, "__aiter__"):
            raise TypeError(
                "EventSourceResponse sends what an async iterator yields, such as Order.watch() or "
                f"an async generator of ServerSentEvent; not {type(content).__name__}"
            )
        for name, seconds in (("keep_alive", keep_alive), ("send_timeout", send_timeout)):
            if seconds is not None and seconds <= 0:
                raise ValueError(f"{name} is a number of seconds above 0, not {seconds}")
        ServerSentEvent("", retry=retry)
        self.content: Frames = _frames(content, self._frame)
        self.status_code = status_code
        self.background = background
        self.resume = resume
        self.keep_alive = keep_alive
        self.retry = retry
        self.send_timeout = send_timeout
        self.own_ids = id is None and self.content.resumable
        self._items = content
        self._event, self._data, self._id = event, data, id
        if isinstance(event, str):
            check_event(event)
        if isinstance(content, LiveStream | Authorized) and not event is data is id is None:
            raise TypeError("event=, data= and id= are for watch(); a live query has its own")
        self.owner = owner
        self.decided = time.monotonic()
        self.body = b""
        # A list of its own: middleware adds to it. Its items are shared by all.
        self.raw_headers = (
            _encoded({**_AUTOMATIC, **_lower(headers)}) if headers else list(_HEADERS)
        )

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The frames one by one, for tests and for other transports."""
        content = self.content
        try:
            if isinstance(content, Produced):
                async for item in self._items:
                    yield self._frame(item)
                return
            await content.open()
            if first := self.opening(content):
                yield first
            encoder = self.encoder
            while True:
                while content.pending:
                    for frame in content.take(encoder).split(b"\n\n")[:-1]:
                        yield frame + b"\n\n"
                try:
                    await content.wait()
                except StopAsyncIteration:
                    return
        finally:
            await content.aclose()

    @property
    def encoder(self) -> Any:
        """What makes the frames; known once the content is open."""
        if isinstance(self.content, ChangeStream):
            return change_encoder(self.content, self._event, self._data, self._id)
        return live_encoder(self.content) if isinstance(self.content, LiveStream) else None

    def opening(self, content: Frames) -> bytes:
        """The first frame: where the stream starts, so that no cut is too early to resume from."""
        lines = b"" if self.retry is None else b"retry: %d\n" % self.retry
        if self.own_ids and content.resume_token is not None:
            lines += b"id: %b\n" % str(content.resume_token).encode()
        return lines + b"\n" if lines else b""

    def reset(self, content: Frames | None) -> bytes:
        """What a client is told when its past is gone; ``None``: it has to start anew."""
        if content is None:  # the empty id makes it forget its own
            return reset_frame("history lost", "")
        return reset_frame("history lost", content.resume_token if self.own_ids else None)

    def _frame(self, item: Any) -> bytes:
        """The frame of something that a generator yielded."""
        if isinstance(item, ServerSentEvent):
            return item.encode()
        if isinstance(item, Change):
            return ChangeEncoder(item.model, Wishes(), self._event, self._data, self._id).frame(
                item
            )
        raise TypeError(
            f"a stream yields ServerSentEvent or Change, not {type(item).__name__}: wrap it, "
            "ServerSentEvent(data=json.dumps(…))"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = Connection(self, self.content, scope, receive, send)
        try:
            await connection.run()
        finally:
            await connection.close()
        if self.background is not None:
            await self.background()


def _frames(content: Any, frame: Callable[[Any], bytes]) -> Frames:
    if isinstance(content, ChangeStream | LiveStream | Authorized):
        return content
    return Produced(content, frame)
