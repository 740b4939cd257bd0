"""Helpers of the tests that watch a real server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from conftest import opened
from pymongo import MongoClient

import data_bridge
from data_bridge import Bridge, Change, ChangeStream

Client = MongoClient[dict[str, Any]]


async def taken(stream: ChangeStream[Any], number: int, timeout: float = 30) -> list[Change[Any]]:
    """The next changes, so many of them."""
    async with asyncio.timeout(timeout):
        return [await anext(stream) for _ in range(number)]


async def ids_until(stream: ChangeStream[Any], last: Any, timeout: float = 60) -> list[Any]:
    """The ids of the documents that change, up to one of them."""
    found: list[Any] = []
    async with asyncio.timeout(timeout):
        while not found or found[-1] != last:
            found.append((await anext(stream)).document_id)
    return found


async def until(true: Callable[[], Any], timeout: float = 20) -> None:
    """Wait for something that nothing announces."""
    async with asyncio.timeout(timeout):
        while not true():
            await asyncio.sleep(0.01)


def cursors(mongo: Client, namespace: str) -> set[int]:
    """The change stream cursors that the server has open on a collection or database."""
    operations = mongo.admin.aggregate(
        [
            {"$currentOp": {"allUsers": True, "idleCursors": True}},
            {"$match": {"cursor.originatingCommand.pipeline.$changeStream": {"$exists": True}}},
            {"$match": {"ns": namespace}},
        ]
    )
    return {operation["cursor"]["cursorId"] for operation in operations}


@contextlib.contextmanager
def failpoint(mongo: Client, name: str, mode: Any, **data: Any) -> Iterator[None]:
    """The server fails on purpose: https://github.com/mongodb/mongo/wiki/The-%22failCommand%22-fail-point"""
    mongo.admin.command({"configureFailPoint": name, "mode": mode, "data": data})
    try:
        yield
    finally:
        mongo.admin.command({"configureFailPoint": name, "mode": "off"})


@contextlib.asynccontextmanager
async def bridged(
    driver_name: str, uri: str, database: str, **options: Any
) -> AsyncIterator[Bridge]:
    """A bridge on a driver's own client, for servers other than the shared one."""
    async with opened(driver_name, uri) as client:
        async with data_bridge.connect(client[database], **options) as bridge:
            yield bridge
