"""sse-starlette on Starlette."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from ...orders import COLLECTION
from . import shared
from .shared import READY, App


def one_stream(uri: str) -> App:
    """One change stream, a queue per client, the same bytes in all of them."""
    queues: set[asyncio.Queue[bytes]] = set()

    def publish(change: dict[str, Any]) -> None:
        frame = shared.frame(change)
        for queue in queues:
            queue.put_nowait(frame)

    async def events(request: Request) -> EventSourceResponse:
        async def generate() -> AsyncIterator[bytes]:
            queue: asyncio.Queue[bytes] = asyncio.Queue()
            queues.add(queue)
            try:
                yield READY
                while True:
                    yield await queue.get()
            finally:
                queues.discard(queue)

        return EventSourceResponse(generate())

    routes = [Route("/events", events)]
    return Starlette(routes=routes, lifespan=lambda app: shared.running(publish, uri))


def stream_per_client(uri: str) -> App:
    """A Motor change stream for every client, as most examples have it."""
    database = shared.motor(uri)

    async def events(request: Request) -> EventSourceResponse:
        async def generate() -> AsyncIterator[Any]:
            async with database[COLLECTION].watch() as stream:
                await stream.try_next()  # Motor opens a stream when it is first read
                yield READY
                async for change in stream:
                    yield {
                        "event": change["operationType"],
                        "id": change["_id"]["_data"],
                        "data": json.dumps(shared.data(change)),
                    }

        return EventSourceResponse(generate())

    return Starlette(routes=[Route("/events", events)])
