"""The messages of a stream pass by wrappers that have nothing left to do, and by nothing else."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import fastapi
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request
from starlette.routing import Mount, Route

from data_bridge.api import App, EventSourceResponse, ServerSentEvent, connection
from data_bridge.api.direct import direct


async def two() -> AsyncIterator[ServerSentEvent]:
    yield ServerSentEvent("1")
    yield ServerSentEvent("2")


async def respond(request: Request) -> EventSourceResponse:
    return EventSourceResponse(two())


def with_app(**options: Any) -> Any:
    app = App(**options)

    @app.get("/")
    async def stream() -> EventSourceResponse:
        return EventSourceResponse(two())

    return app


def with_starlette(**options: Any) -> Any:
    return Starlette(routes=[Mount("/", routes=[Route("/", respond)])], **options)


def with_fastapi(**options: Any) -> Any:
    app = fastapi.FastAPI(**options)
    app.add_api_route("/", respond)
    return app


APPLICATIONS = pytest.mark.parametrize("make", [with_app, with_starlette, with_fastapi])


class Server:
    """Where messages end up; it notes them, and the file that each was handed over from."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.files: list[str] = []

    async def send(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self.files.append(sys._getframe(1).f_code.co_filename)

    async def receive(self) -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError("a client that stays")

    async def ask(self, app: Any) -> bytes:
        """The body of ``/``."""
        scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}
        await app(scope, self.receive, self.send)
        assert self.messages[0]["type"] == "http.response.start"
        return b"".join(m["body"] for m in self.messages[1:])


class Watched:
    """Middleware that notes each message on its way to the server."""

    def __init__(self, app: Any, seen: list[Any]) -> None:
        self.app, self.seen = app, seen

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def note(message: Any) -> None:
            self.seen.append(message)
            await send(message)

        await self.app(scope, receive, note)


@APPLICATIONS
async def test_each_event_goes_to_the_server_itself_once_its_response_has_started(
    make: Callable[..., Any],
) -> None:
    server = Server()
    assert await server.ask(make()) == b"data: 1\n\ndata: 2\n\n"
    start, *others = server.files
    assert start != connection.__file__
    assert set(others) == {connection.__file__}


@APPLICATIONS
async def test_middleware_in_between_gets_every_message(make: Callable[..., Any]) -> None:
    seen: list[Any] = []
    server = Server()
    body = await server.ask(make(middleware=[Middleware(Watched, seen=seen)]))
    assert body == b"data: 1\n\ndata: 2\n\n"
    assert seen == server.messages


async def test_wrappers_beyond_a_middleware_stay_too() -> None:
    found: list[Any] = []

    async def endpoint(scope: Any, receive: Any, send: Any) -> None:
        found.append((send, direct(send)))

    server = Server()
    app = ServerErrorMiddleware(Watched(ServerErrorMiddleware(endpoint), []))
    await app({"type": "http"}, server.receive, server.send)
    [(outermost, inner)] = found
    assert inner is not outermost
    assert inner.__name__ == "note"


def counts(send: Any) -> Any:
    response_started = 0

    async def sender(message: Any) -> None:
        nonlocal response_started

        if message["type"] == "http.response.start":
            response_started += 1
        await send(message)

    return sender


def looks_at_bodies(send: Any) -> Any:
    response_started = False

    async def sender(message: Any) -> None:
        nonlocal response_started

        if message["type"] == "http.response.body":
            response_started = True
        await send(message)

    return sender


def sends_twice(send: Any) -> Any:
    response_started = False

    async def sender(message: Any) -> None:
        nonlocal response_started

        if message["type"] == "http.response.start":
            response_started = True
        await send(message)
        await send(message)

    return sender


@pytest.mark.parametrize("wrap", [counts, looks_at_bodies, sends_twice, functools.partial])
def test_a_wrapper_that_does_anything_else_stays(wrap: Callable[[Any], Any]) -> None:
    wrapped = wrap(Server().send)
    assert direct(wrapped) is wrapped
