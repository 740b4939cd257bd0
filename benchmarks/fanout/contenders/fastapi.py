"""FastAPI's own Server-Sent Events."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from fastapi.sse import EventSourceResponse, ServerSentEvent

from . import shared
from .shared import App


def one_stream(uri: str) -> App:
    """One change stream, a queue per client, an event made once and shared."""
    queues: set[asyncio.Queue[ServerSentEvent]] = set()

    def publish(change: dict[str, Any]) -> None:
        event = ServerSentEvent(
            raw_data=shared.text(change), event=change["operationType"], id=change["_id"]["_data"]
        )
        for queue in queues:
            queue.put_nowait(event)

    app = FastAPI(lifespan=lambda app: shared.running(publish, uri))

    async def events() -> Any:
        queue: asyncio.Queue[ServerSentEvent] = asyncio.Queue()
        queues.add(queue)
        try:
            yield ServerSentEvent(comment="ready")
            while True:
                yield await queue.get()
        finally:
            queues.discard(queue)

    app.get("/events", response_class=EventSourceResponse)(events)
    return app
