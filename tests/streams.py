"""The application that the tests run under real servers, in processes of its own.

    DATABASE_URI=mongodb://… uvicorn streams:app

``SIGNALS`` names a directory in which a request to ``/late`` tells that it has begun, and in which
it waits for ``go`` before it becomes a stream.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from data_bridge import Document
from data_bridge.api import App, EventSourceResponse, ServerSentEvent


class Order(Document):
    status: str = "open"
    number: int = 0
    padding: str = ""

    class Settings:
        collection = "orders"


def database() -> Any:
    uri = os.environ.get("DATABASE_URI")
    if uri is not None and os.environ.get("DRIVER") == "motor":
        from motor.motor_asyncio import AsyncIOMotorClient

        return AsyncIOMotorClient[Any](uri).get_default_database()
    return uri


app = App(database=database())
KEEP_ALIVE = float(os.environ.get("KEEP_ALIVE", "15"))
SEND_TIMEOUT = float(os.environ.get("SEND_TIMEOUT", "30"))


@app.get("/ping")
async def ping() -> int:
    return os.getpid()


@app.get("/orders")
async def orders() -> EventSourceResponse:
    return EventSourceResponse(
        Order.watch(), keep_alive=KEEP_ALIVE, send_timeout=SEND_TIMEOUT, retry=50
    )


@app.get("/slow-readers")
async def slow_readers() -> int:
    return sum(feed.slow_readers for feed in app.bridge.stats().feeds)


app.live("/live", Order, send_timeout=SEND_TIMEOUT)
app.live("/authorized", Order, send_timeout=SEND_TIMEOUT, authorize=lambda event, request: True)


@app.get("/ticks")
async def ticks() -> EventSourceResponse:
    async def generate() -> AsyncIterator[ServerSentEvent]:
        yield ServerSentEvent("first")
        await asyncio.Event().wait()

    return EventSourceResponse(generate())


@app.get("/quiet")
async def quiet() -> EventSourceResponse:
    return EventSourceResponse(_never(), keep_alive=None)


@app.get("/late")
async def late() -> EventSourceResponse:
    directory = Path(os.environ["SIGNALS"])
    directory.joinpath("begun").touch()
    while not directory.joinpath("go").exists():
        await asyncio.sleep(0.01)
    return EventSourceResponse(Order.watch() if os.environ.get("DATABASE_URI") else _never())


async def bare(scope: Any, receive: Any, send: Any) -> None:
    """The least that a server can do for a stream, to compare with."""
    assert scope["type"] == "http"
    await receive()
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"id: 1\n\n", "more_body": True})
    while (await receive())["type"] != "http.disconnect":
        pass


async def _never() -> AsyncIterator[ServerSentEvent]:
    await asyncio.Event().wait()
    yield ServerSentEvent("never")
