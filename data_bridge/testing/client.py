"""A test client that really streams, and a reader of event streams.

httpx's own ASGI transport collects the whole body before it returns a response, so that a stream
without end hangs it. This one runs the application beside the test and hands on headers and
chunks as they are sent.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import ApplicationFailed

try:
    import httpx
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "data_bridge.testing needs httpx: pip install 'data-bridge[testing]'"
    ) from error

__all__ = [
    "Comment",
    "Event",
    "EventDecoder",
    "EventStream",
    "Mark",
    "StreamingTransport",
    "events",
    "streaming_client",
]

Message = MutableMapping[str, Any]
ASGIApp = Callable[..., Any]


# -- the transport ------------------------------------------------------------------------------


class StreamingTransport(httpx.AsyncBaseTransport):
    """Runs an ASGI application in this event loop and streams its responses.

    A response is there as soon as the application has sent its headers, and its chunks as they
    come; up to ``buffer`` bytes wait for the reader, then ``send`` does. When the response is
    closed the application receives ``http.disconnect``; it has ``grace`` seconds to end before
    it is cancelled, and an application that survives that too is an `ApplicationFailed`. No task
    is left behind. httpx's read timeout is honoured, so that a silent stream fails a test.

    What the application raises is raised here, in the call, while reading or on closing; with
    ``raise_app_exceptions=False`` it is what a real client sees: a 500, or a body that breaks off
    (``httpx.RemoteProtocolError``). ``state`` is the lifespan's state, ``client`` the address
    that the application sees. As uvicorn does, sending after a disconnect does nothing.
    https://asgi.readthedocs.io/en/latest/specs/www.html
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        state: MutableMapping[str, Any] | None = None,
        root_path: str = "",
        client: tuple[str, int] = ("127.0.0.1", 50000),
        raise_app_exceptions: bool = True,
        buffer: int = 64 * 1024,
        grace: float = 5.0,
    ) -> None:
        self.app = app
        self.state = state
        self.root_path = root_path
        self.client = client
        self.raise_app_exceptions = raise_app_exceptions
        self.buffer = buffer
        self.grace = grace
        self.open: set[_Exchange] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        exchange = _Exchange(self, request)
        self.open.add(exchange)
        try:
            await exchange.started()
        except BaseException:
            await exchange.aclose(abandon=True)
            raise
        return httpx.Response(
            exchange.status,
            headers=exchange.headers,
            stream=exchange,
            extensions={"http_version": b"HTTP/1.1"},
        )

    async def aclose(self) -> None:
        for exchange in list(self.open):
            await exchange.aclose()

    def scope(self, request: httpx.Request) -> dict[str, Any]:
        """The ASGI connection scope of one request."""
        url = request.url
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": url.scheme,
            "path": url.path,  # unescaped by httpx
            "raw_path": url.raw_path.partition(b"?")[0],
            "query_string": url.query,
            "root_path": self.root_path,
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "client": self.client,
            "server": (url.host, url.port or {"https": 443}.get(url.scheme, 80)),
            "extensions": {},
        }
        if self.state is not None:
            scope["state"] = dict(self.state)
        return scope


class _Exchange(httpx.AsyncByteStream):
    """One request, its application's task, and the response's body."""

    def __init__(self, transport: StreamingTransport, request: httpx.Request) -> None:
        self._transport = transport
        self._method = request.method
        self._read_timeout: float | None = request.extensions.get("timeout", {}).get("read")
        assert isinstance(request.stream, httpx.AsyncByteStream)
        self._request_body: AsyncIterator[bytes] | None = aiter(request.stream)

        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._chunks: deque[bytes] = deque()
        self._pending = 0
        self._complete = False
        self._gone = asyncio.Event()  # the response is complete, or its reader has left
        self._room = asyncio.Event()
        self._news = asyncio.Event()
        self._told = False  # the application's exception was raised already
        self._task = asyncio.create_task(self._run(transport.scope(request)))
        self._task.add_done_callback(lambda task: self._news.set())

    async def _run(self, scope: dict[str, Any]) -> None:
        await self._transport.app(scope, self._receive, self._send)

    # what the application calls

    async def _receive(self) -> Message:
        if self._request_body is not None and not self._gone.is_set():
            try:
                chunk = await anext(self._request_body)
            except StopAsyncIteration:
                self._request_body = None
                return {"type": "http.request", "body": b"", "more_body": False}
            return {"type": "http.request", "body": chunk, "more_body": True}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._gone.is_set():
            if self._complete and message["type"] == "http.response.body":
                raise ApplicationFailed("the application sent a body after the end of its response")
            await asyncio.sleep(0)  # one that never waits for anything else must not keep the loop
            return
        if message["type"] == "http.response.start":
            if self.status:
                raise ApplicationFailed("the application started its response twice")
            self.status = message["status"]
            self.headers = [(bytes(k), bytes(v)) for k, v in message.get("headers", ())]
        elif message["type"] == "http.response.body":
            if not self.status:
                raise ApplicationFailed("the application sent a body before it started a response")
            await self._take(message)
        self._news.set()

    async def _take(self, message: Message) -> None:
        while self._pending >= self._transport.buffer and not self._gone.is_set():
            self._room.clear()
            await self._room.wait()
        chunk = bytes(message.get("body", b""))
        if chunk and self._method != "HEAD":
            self._chunks.append(chunk)
            self._pending += len(chunk)
        if not message.get("more_body", False):
            self._complete = True
            self._gone.set()

    # what httpx calls

    async def started(self) -> None:
        """Wait for the headers. Raises what the application raised before it sent any."""
        while not self.status:
            if self._task.done():
                self._raise_apps()
                if self._transport.raise_app_exceptions:
                    raise ApplicationFailed("the application ended without a response")
                self.status, self._complete = 500, True
                return
            await self._wait_for_news()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            while self._chunks:
                chunk = self._chunks.popleft()
                self._pending -= len(chunk)
                self._room.set()
                yield chunk
            if self._complete:
                return
            if self._task.done():
                self._raise_apps()
                raise httpx.RemoteProtocolError("the application ended in the middle of the body")
            if self._gone.is_set():
                raise httpx.ReadError("the response was closed while it was read")
            await self._wait_for_news()

    async def aclose(self, *, abandon: bool = False) -> None:
        """Tell the application that the reader has left, and see it end."""
        self._gone.set()
        self._room.set()
        self._news.set()
        try:
            await asyncio.wait({self._task}, timeout=0 if abandon else self._transport.grace)
            for _ in range(3):
                if self._task.done():
                    break
                self._task.cancel()
                await asyncio.wait({self._task}, timeout=self._transport.grace)
        except asyncio.CancelledError:
            self._task.cancel()
            raise
        finally:
            self._transport.open.discard(self)
        if not self._task.done():
            raise ApplicationFailed("the application goes on after a disconnect and a cancellation")
        if abandon:
            self._told = True
        self._raise_apps()

    async def _wait_for_news(self) -> None:
        self._news.clear()
        try:
            async with asyncio.timeout(self._read_timeout):
                await self._news.wait()
        except TimeoutError as error:
            raise httpx.ReadTimeout(
                f"the application sent nothing for {self._read_timeout} s"
            ) from error

    def _raise_apps(self) -> None:
        error = None if self._task.cancelled() else self._task.exception()
        if error is not None and self._transport.raise_app_exceptions and not self._told:
            self._told = True
            raise error


# -- the lifespan -------------------------------------------------------------------------------


class _Lifespan:
    """Runs an application's lifespan in a task of its own, as a server does.

    https://asgi.readthedocs.io/en/latest/specs/lifespan.html
    """

    def __init__(self, app: ASGIApp, timeout: float) -> None:
        self.app = app
        self.timeout = timeout
        self.state: dict[str, Any] = {}
        self._started = False
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._from_app: asyncio.Queue[Message] = asyncio.Queue()

    async def __aenter__(self) -> dict[str, Any]:
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self.state,
        }
        self._task = asyncio.ensure_future(self.app(scope, self._to_app.get, self._from_app.put))
        self._to_app.put_nowait({"type": "lifespan.startup"})
        try:
            message = await self._next("start")
        except BaseException:
            await self._end()
            raise
        if message is not None and message["type"] == "lifespan.startup.failed":
            raise await self._failure("start", message)
        # An application that raises, or returns, at once has no lifespan and runs without one.
        self._started = message is not None
        return self.state

    async def __aexit__(self, *_: object) -> None:
        if not self._started:
            self._error()
            return
        self._to_app.put_nowait({"type": "lifespan.shutdown"})
        try:
            message = await self._next("shut down")
        except BaseException:
            await self._end()
            raise
        if message is not None and message["type"] == "lifespan.shutdown.failed":
            raise await self._failure("shut down", message)
        await self._end()
        if (error := self._error()) is not None:
            raise error

    def _error(self) -> BaseException | None:
        return None if self._task.cancelled() else self._task.exception()

    async def _next(self, doing: str) -> Message | None:
        """The application's next message; None if it ended without one."""
        getting = asyncio.ensure_future(self._from_app.get())
        try:
            await asyncio.wait(
                {getting, self._task},
                timeout=self.timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if getting.done():
                return getting.result()
            if self._task.done():
                return None
            raise ApplicationFailed(
                f"the application did not {doing} in {self.timeout} s: its lifespan hangs"
            )
        finally:
            getting.cancel()

    async def _failure(self, doing: str, message: Message) -> BaseException:
        await self._end()
        return self._error() or ApplicationFailed(
            f"the application could not {doing}: {message.get('message') or 'it does not say why'}"
        )

    async def _end(self) -> None:
        await asyncio.wait({self._task}, timeout=1.0)
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=self.timeout)


@asynccontextmanager
async def streaming_client(
    app: ASGIApp,
    *,
    base_url: str = "http://testserver",
    timeout: float | None = 30.0,
    lifespan_timeout: float = 60.0,
    raise_app_exceptions: bool = True,
    **options: Any,
) -> AsyncIterator[httpx.AsyncClient]:
    """An ``httpx.AsyncClient`` for an ASGI application, inside of the application's lifespan.

        async with streaming_client(app) as client:
            async with client.stream("GET", "/events") as response: ...

    ``timeout`` is httpx's, in seconds: how long the application may be silent (None: for ever);
    ``lifespan_timeout`` bounds its startup and its shutdown. ``options`` are httpx.AsyncClient's:
    https://www.python-httpx.org/api/#asyncclient. Raises what the application's lifespan raises,
    and `ApplicationFailed` where it gives no reason. See `StreamingTransport` for the rest.
    """
    async with _Lifespan(app, lifespan_timeout) as state:
        transport = StreamingTransport(app, state=state, raise_app_exceptions=raise_app_exceptions)
        async with httpx.AsyncClient(
            transport=transport, base_url=base_url, timeout=timeout, **options
        ) as client:
            yield client


# -- the reader ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """An event as a browser's EventSource fires it.

    ``id`` is the last event id at that moment, be it from this event or an earlier one; ``retry``
    is the reconnection time in milliseconds if this event came with one.
    """

    data: str
    event: str = "message"
    id: str = ""
    retry: int | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """A block of fields without data: it fires nothing, and yet its id and retry count."""

    id: str
    retry: int | None = None


@dataclass(frozen=True, slots=True)
class Comment:
    """A line that starts with a colon; keep-alives are such lines."""

    text: str


class EventDecoder:
    """The WHATWG's interpretation of an event stream, without any I/O.

    ``last_event_id`` and ``retry`` (milliseconds) are what a browser would reconnect with.
    https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
    """

    def __init__(self) -> None:
        self.last_event_id = ""
        self.retry: int | None = None
        self._rest = b""
        self._after_cr = False
        self._first_line = True
        self._data: list[str] = []
        self._event = ""
        self._id = ""
        self._block_retry: int | None = None
        self._has_fields = False

    def feed(self, chunk: bytes) -> list[Event | Mark | Comment]:
        """Everything that the stream says up to the end of ``chunk``, in order."""
        # A CR ends its line at once; an LF that follows it, even in the next chunk, is part of it.
        if self._after_cr and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        if not chunk:
            return []
        self._after_cr = chunk.endswith(b"\r")
        text = self._rest + chunk
        *lines, self._rest = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        items: list[Event | Mark | Comment] = []
        for line in lines:
            if self._first_line:
                line = line.removeprefix(b"\xef\xbb\xbf")  # noqa: PLW2901
                self._first_line = False
            # No byte of a longer UTF-8 sequence is a CR or an LF, so lines decode one by one.
            item = self._line(line.decode("utf-8", "replace"))
            if item is not None:
                items.append(item)
        return items

    def _line(self, line: str) -> Event | Mark | Comment | None:
        if not line:
            return self._dispatch()
        if line.startswith(":"):
            return Comment(line[1:].removeprefix(" "))
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        self._has_fields = True
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._event = value
        elif field == "id":
            if "\0" not in value:
                self._id = value
        elif field == "retry" and value.isascii() and value.isdigit() and len(value) < 20:
            self.retry = self._block_retry = int(value)
        return None

    def _dispatch(self) -> Event | Mark | None:
        self.last_event_id = self._id
        item: Event | Mark | None = None
        if self._data:
            data = "\n".join(self._data)
            item = Event(data, self._event or "message", self._id, self._block_retry)
        elif self._has_fields:
            item = Mark(self._id, self._block_retry)
        self._data, self._event, self._block_retry, self._has_fields = [], "", None, False
        return item


class EventStream:
    """The events of a response, one after the other; see `events`."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.decoder = EventDecoder()
        self._chunks = response.aiter_bytes()
        self._items: deque[Event | Mark | Comment] = deque()
        self._reading: asyncio.Future[bytes | None] | None = None

    @property
    def last_event_id(self) -> str:
        """What a browser would send as ``Last-Event-ID`` now; ids without an event count."""
        return self.decoder.last_event_id

    @property
    def retry(self) -> int | None:
        """The reconnection time in milliseconds, if the stream has set one."""
        return self.decoder.retry

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        while not isinstance(item := await self._next(), Event):
            pass
        return item

    async def everything(self) -> AsyncIterator[Event | Mark | Comment]:
        """Events, and also the ids without an event, and the comments, as they come."""
        try:
            while True:
                yield await self._next()
        except StopAsyncIteration:
            return

    async def _next(self) -> Event | Mark | Comment:
        while not self._items:
            # The read outlives a cancelled wait: `wait_for(anext(stream), 1)` loses nothing.
            if self._reading is None:
                self._reading = asyncio.ensure_future(_chunk(self._chunks))
                self._reading.add_done_callback(_looked_at)
            chunk = await asyncio.shield(self._reading)
            self._reading = None
            if chunk is None:
                raise StopAsyncIteration
            self._items.extend(self.decoder.feed(chunk))
        return self._items.popleft()


async def _chunk(chunks: AsyncIterator[bytes]) -> bytes | None:
    return await anext(chunks, None)


def _looked_at(reading: asyncio.Future[Any]) -> None:
    if not reading.cancelled():
        reading.exception()  # a read that nobody waits for any more is no news


def events(response: httpx.Response) -> EventStream:
    """The events of a streaming response, exactly as a browser's EventSource sees them.

        async with client.stream("GET", "/events") as response:
            async for event in events(response):
                print(event.event, event.data, event.id)

    The stream keeps ``last_event_id`` and ``retry``; ``everything()`` yields ids without an event
    and comments too. A cancelled wait for an event loses nothing. What follows the last blank
    line is discarded, as the specification says.
    """
    return EventStream(response)
