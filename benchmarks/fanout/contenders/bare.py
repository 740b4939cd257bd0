"""The limit: a list of ready bytes, a place in it per client, one send for all that is new."""

from __future__ import annotations

import asyncio
from typing import Any

from .shared import READY, App, frame, running


def broadcast(uri: str) -> App:
    frames: list[bytes] = []
    waiting: list[asyncio.Future[None]] = []
    joins: dict[int, bytes] = {}

    def publish(change: dict[str, Any]) -> None:
        nonlocal waiting
        frames.append(frame(change))
        joins.clear()
        awake, waiting = waiting, []
        for future in awake:
            if not future.done():
                future.set_result(None)

    async def events(send: Any) -> None:
        loop = asyncio.get_running_loop()
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        at = len(frames)
        await send({"type": "http.response.body", "body": READY, "more_body": True})
        while True:
            if at == len(frames):
                future = loop.create_future()
                waiting.append(future)
                await future
            body = joins.get(at)
            if body is None:
                body = joins[at] = b"".join(frames[at:])
            at = len(frames)
            await send({"type": "http.response.body", "body": body, "more_body": True})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            async with running(publish, uri):
                await send({"type": "lifespan.startup.complete"})
                await receive()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await events(send)

    return app
