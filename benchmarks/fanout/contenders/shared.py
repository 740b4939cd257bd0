"""What a hand-written application has around its library: one change stream, frames, a database."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from ...orders import COLLECTION, DATABASE

App = Callable[..., Any]
READY = b": ready\n\n"


def data(change: dict[str, Any]) -> dict[str, Any]:
    """What a change's event carries."""
    document = dict(change["fullDocument"])
    document = {"id": str(document.pop("_id")), **document}
    return {"operation": change["operationType"], "id": document["id"], "document": document}


def text(change: dict[str, Any]) -> str:
    """The same as text, as short as it can be."""
    return json.dumps(data(change), separators=(",", ":"))


def frame(change: dict[str, Any]) -> bytes:
    """The event of a change, ready to be sent."""
    return (
        f"event: {change['operationType']}\nid: {change['_id']['_data']}\ndata: {text(change)}\n\n"
    ).encode()


async def _changes(uri: str, opened: asyncio.Event) -> AsyncIterator[dict[str, Any]]:
    from pymongo import AsyncMongoClient

    client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(uri)
    async with client, await client[DATABASE][COLLECTION].watch() as stream:
        opened.set()
        async for change in stream:
            yield change


@asynccontextmanager
async def running(publish: Callable[[dict[str, Any]], None], uri: str) -> AsyncIterator[None]:
    """One change stream of PyMongo's async API, all of whose changes are published."""
    opened = asyncio.Event()

    async def run() -> None:
        async for change in _changes(uri, opened):
            publish(change)

    task = asyncio.create_task(run())
    await opened.wait()
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def motor(uri: str) -> Any:
    """The database behind Motor."""
    from motor.motor_asyncio import AsyncIOMotorClient

    return AsyncIOMotorClient(uri)[DATABASE]


def pymongo(uri: str) -> Any:
    """The database behind PyMongo's async API."""
    from pymongo import AsyncMongoClient

    return AsyncMongoClient(uri)[DATABASE]
