"""What the tests of live queries share: somebody who looks at one, and what the server is doing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from pymongo import MongoClient

from data_bridge.live import LiveEvent, LiveStream
from data_bridge.order import key

Mongo = MongoClient[dict[str, Any]]
PATIENCE = 30  # seconds, for what takes milliseconds on a machine that is not busy


class Viewer:
    """Applies the events of a live query, and checks that each makes sense after the last."""

    def __init__(self, stream: LiveStream[Any]) -> None:
        self.stream = stream
        self.rows: dict[Any, dict[str, Any]] = {}
        self.events: list[LiveEvent[Any]] = []
        self._ready = False

    async def next(self, timeout: float = PATIENCE) -> LiveEvent[Any]:
        async with asyncio.timeout(timeout):
            event = await anext(self.stream)
        self._apply(event)
        self.events.append(event)
        return event

    async def until(self, *operations: str) -> LiveEvent[Any]:
        """The first event with one of these operations; those before it are applied."""
        while (event := await self.next()).operation not in operations:
            pass
        return event

    async def take(self, number: int) -> list[str]:
        """The operations of so many events."""
        return [(await self.next()).operation for _ in range(number)]

    async def see(self, condition: Callable[[dict[Any, dict[str, Any]]], bool]) -> None:
        """Go on until the rows are as they should be."""
        while not condition(self.rows):
            await self.next()

    def values(self, field: str) -> list[Any]:
        return sorted(row[field] for row in self.rows.values())

    def operations(self) -> list[str]:
        return [event.operation for event in self.events]

    def _apply(self, event: LiveEvent[Any]) -> None:
        operation, row = event.operation, (event.collection, key(event.document_id))
        match operation:
            case "reset":
                self.rows.clear()
                self._ready = False
            case "snapshot":
                assert not self._ready, "a snapshot after ready"
                assert event.resume_token is None
                for document in event.raw:
                    self.rows[event.collection, key(document["_id"])] = document
            case "ready":
                assert not self._ready
                self._ready = True
            case "insert" | "enter":
                assert self._ready and row not in self.rows, f"{operation} of what was there"
                self.rows[row] = event.raw[0]
            case "update" | "replace":
                assert row in self.rows, f"{operation} of what was not there"
                if event.raw:  # it may be gone already, which is yet to be told
                    self.rows[row] = event.raw[0]
            case "delete" | "leave":
                assert not event.raw
                del self.rows[row]


@asynccontextmanager
async def viewing(stream: LiveStream[Any]) -> AsyncIterator[Viewer]:
    """A viewer that has seen what matches."""
    async with stream:
        viewer = Viewer(stream)
        await viewer.until("ready")
        yield viewer


def cursors(mongo: Mongo, database: str) -> list[str]:
    """The collections of the change streams that are open on a database; "" is all of it."""
    found = mongo.admin.aggregate(
        [
            {"$currentOp": {"idleCursors": True, "allUsers": True}},
            {"$match": {"ns": {"$regex": f"^{database}\\."}, "cursor": {"$exists": True}}},
        ]
    )
    commands = [op["cursor"].get("originatingCommand", {}) for op in found]
    names = [c.get("aggregate", "") for c in commands if "$changeStream" in str(c)]
    return sorted("" if name == 1 else name for name in names)


@asynccontextmanager
async def profiled(mongo: Mongo, database: str) -> AsyncIterator[Callable[[], list[Any]]]:
    """Within, a function that gives the snapshots that were read so far."""
    mongo[database].command("profile", 2)

    def snapshots() -> list[Any]:
        profile = mongo[database]["system.profile"]
        return list(profile.find({"op": "query", "command.readConcern.level": "snapshot"}))

    try:
        yield snapshots
    finally:
        mongo[database].command("profile", 0)


async def eventually(condition: Callable[[], Any]) -> None:
    """Wait for something that nothing tells of."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.02)
