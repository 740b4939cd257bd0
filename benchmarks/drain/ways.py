"""The ways to drain: ``python -m benchmarks.drain.ways NAME URI TOKEN NUMBER``, each in a process.

Each starts with an open client, reads NUMBER changes after TOKEN, and answers with the seconds and
the processor time that took and the number in the last order: a wrong one means changes were lost.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from ..orders import COLLECTION, DATABASE


@asynccontextmanager
async def _pymongo(uri: str) -> AsyncIterator[Any]:
    from pymongo import AsyncMongoClient

    async with AsyncMongoClient(uri) as client:
        await client.admin.command("ping")
        yield client[DATABASE]


@asynccontextmanager
async def _motor(uri: str) -> AsyncIterator[Any]:
    from motor.motor_asyncio import AsyncIOMotorClient

    client: Any = AsyncIOMotorClient(uri)
    await client.admin.command("ping")
    yield client[DATABASE]
    client.close()


# -- the drivers' own loops; what they see is what they make of BSON, no model, no JSON ---------


async def _loop(stream: Any, number: int) -> int:
    async for change in stream:
        number -= 1
        if not number:
            return int(change["fullDocument"]["seq"])
    return -1


async def pymongo_loop(database: Any, token: str, number: int) -> int:
    async with await database[COLLECTION].watch(resume_after={"_data": token}) as stream:
        return await _loop(stream, number)


async def motor_loop(database: Any, token: str, number: int) -> int:
    async with database[COLLECTION].watch(resume_after={"_data": token}) as stream:
        return await _loop(stream, number)


# -- data-bridge --------------------------------------------------------------------------------


async def typed(database: Any, token: str, number: int) -> int:
    """Each change's document validated as the model."""
    from ..model import Order

    async with Order.watch(resume_after=token) as changes:
        async for change in changes:
            order = change.full_document
            number -= 1
            if not number:
                return -1 if order is None else order.seq
    return -1


async def frames(database: Any, token: str, number: int) -> int:
    """Each change validated, serialised and made into the bytes of an event."""
    from data_bridge.api import EventSourceResponse

    from ..model import Order

    response: Any = EventSourceResponse(Order.watch(resume_after=token))
    async with aclosing(aiter(response)) as events:
        async for event in events:
            if event.startswith(b"event: insert\n"):
                number -= 1
                if not number:
                    return int(event.partition(b'"seq":')[2][:8])
    return -1


@asynccontextmanager
async def _bridged(opened: Any) -> AsyncIterator[Any]:
    from data_bridge import connect

    async with opened as database, connect(database):
        yield database


Way = Callable[[Any, str, int], Awaitable[int]]
WAYS: dict[str, tuple[Callable[[str], Any], Way]] = {
    "pymongo_loop": (_pymongo, pymongo_loop),
    "pymongo_typed": (lambda uri: _bridged(_pymongo(uri)), typed),
    "pymongo_frames": (lambda uri: _bridged(_pymongo(uri)), frames),
    "motor_loop": (_motor, motor_loop),
    "motor_typed": (lambda uri: _bridged(_motor(uri)), typed),
    "motor_frames": (lambda uri: _bridged(_motor(uri)), frames),
}


async def drain(name: str, uri: str, token: str, number: int) -> dict[str, Any]:
    opened, way = WAYS[name]
    async with opened(uri) as database:
        # Imports and models are an application's start, not its pace.
        if not name.endswith("_loop"):
            import data_bridge.api  # noqa: F401

            from .. import model  # noqa: F401
        cpu, began = time.process_time(), time.perf_counter()
        last = await way(database, token, number)
        return {
            "seconds": time.perf_counter() - began,
            "cpu": time.process_time() - cpu,
            "last": last,
        }


if __name__ == "__main__":
    name, uri, token, number = sys.argv[1:]
    print(json.dumps(asyncio.run(drain(name, uri, token, int(number)))))
