"""Live queries under a storm: every client's rows end equal to the database, and never go back.

Writers insert, update, replace and delete at the same time, in transactions too, and drop the
collection now and then; clients are cut in the middle of what they are sent and go on at another
worker, and workers are stopped and started. What the server did meanwhile is recorded by a change
stream of the driver's own. ``LIVE_SEEDS=100 pytest tests/test_live_property.py`` runs more of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from bson import ObjectId
from conftest import opened
from pymongo import AsyncMongoClient
from pymongo.errors import CollectionInvalid, OperationFailure

from data_bridge import Document, Limits, connect
from data_bridge.api.live import live_encoder
from data_bridge.bridge import Bridge
from data_bridge.errors import BridgeClosed
from data_bridge.testing import Event, EventDecoder
from data_bridge.token import ResumeToken

SEEDS = range(int(os.environ.get("LIVE_SEEDS", "1")))
WRITERS, CLIENTS, WRITES = 4, 6, 60
GROUPS = ("a", "b", "c")
FENCE = "fence"
CHANGES = ("insert", "update", "replace", "delete", "enter", "leave")


class Plain(Document):
    id: str
    group: str
    v: int

    class Settings:
        collection = "plain"


class Imaged(Document):
    id: str
    group: str
    v: int

    class Settings:
        collection = "imaged"
        pre_images = True


@dataclass
class Client:
    """What a browser keeps: its rows, and the last event id."""

    name: str
    rows: dict[str, tuple[str, int]] = field(default_factory=dict)
    pending: dict[str, tuple[str, int]] | None = None
    last_id: str = ""
    newest: dict[str, int] = field(default_factory=dict)  # version by id, never to be undercut
    tokens: Counter[str] = field(default_factory=Counter)
    since: str = ""  # the position of its last snapshot
    resets: int = 0
    resumes: int = 0
    done: bool = False

    def receive(self, event: Event) -> None:
        data = json.loads(event.data)
        if event.event == "snapshot":
            if self.pending is None:
                self.pending = {}
            self.pending |= {d["id"]: (d["group"], d["v"]) for d in data["documents"]}
            assert not event.id or event.id == self.last_id, "an id inside of a snapshot"
        elif event.event == "ready":
            assert self.pending is not None
            self.rows, self.pending = self.pending, None
            for id, (_, v) in self.rows.items():
                self.saw(id, v)
            self.tokens.clear()
            self.since = event.id
        elif event.event == "reset":
            assert event.id == self.last_id, "the rows are those of the id from before"
            self.resets += 1
            self.pending = None
        else:
            assert event.event in CHANGES
            self.tokens[ResumeToken.parse(event.id).hex] += 1
            id, document = data["id"], data["document"]
            if event.event in ("delete", "leave"):
                assert document is None
                self.rows.pop(id, None)
            elif document is not None:
                self.saw(id, document["v"])
                self.rows[id] = (document["group"], document["v"])
        if event.event != "snapshot":
            self.last_id = event.id
        self.done = FENCE in self.rows and self.pending is None

    def saw(self, id: str, v: int) -> None:
        assert v >= self.newest.get(id, 0), f"{self.name}: {id} went from {self.newest[id]} to {v}"
        self.newest[id] = v


class Storm:
    """One run: two workers, some writers, some clients."""

    def __init__(
        self, seed: int, model: type[Document], filter: dict[str, Any], drops: bool, uri: str
    ) -> None:
        self.random = random.Random(seed)
        self.model = model
        self.filter = filter
        self.drops = drops
        self.uri = uri
        self.workers: list[Bridge | None] = [None, None]
        self.databases: list[Any] = []
        self.versions: Counter[str] = Counter()
        self.over = False
        self.limits = Limits(
            log_entries=self.random.choice([20, 100, 10_000]),
            linger=0.2,
            snapshot_age=self.random.choice([0.01, 0.3]),
        )

    # -- workers --

    async def start(self, number: int) -> None:
        bridge = connect(self.databases[number], documents=[self.model], limits=self.limits)
        self.workers[number] = await bridge.open()

    async def restart_workers(self) -> None:
        """Until it is told to stop: a cancellation could leave a worker half closed."""
        while not self.over:
            await asyncio.sleep(self.random.uniform(0.3, 0.8))
            number = self.random.randrange(2)
            bridge, self.workers[number] = self.workers[number], None
            assert bridge is not None
            await bridge.close()
            await asyncio.sleep(self.random.uniform(0, 0.3))
            await self.start(number)

    # -- writers --

    async def write(self, number: int, mongo: AsyncMongoClient[Any], name: str) -> None:
        """A writer has its own ids, so that it knows which version comes next."""
        collection = mongo[name][self.model.Settings.collection]  # type: ignore[attr-defined]
        ids = [f"{number}-{n}" for n in range(6)]
        there: set[str] = set()
        for _ in range(WRITES):
            choice = self.random.random()
            if self.drops and number == 0 and choice < 0.02:
                await collection.drop()
                await self._recreate(mongo[name])
                there.clear()
                continue
            if choice < 0.1:
                await self._transaction(mongo, collection, ids, there)
            else:
                await self._once(collection, self.random.choice(ids), there)
            if self.random.random() < 0.3:  # else a burst
                await asyncio.sleep(self.random.uniform(0, 0.03))

    async def _recreate(self, database: Any) -> None:
        if self.model is Imaged:
            # Another writer may have been first.
            with contextlib.suppress(OperationFailure, CollectionInvalid):
                await database.create_collection(
                    "imaged", changeStreamPreAndPostImages={"enabled": True}
                )

    async def _transaction(
        self, mongo: AsyncMongoClient[Any], collection: Any, ids: list[str], there: set[str]
    ) -> None:
        chosen = self.random.sample(ids, 3)
        before = set(there)
        try:
            async with mongo.start_session() as session, await session.start_transaction():
                for id in chosen:
                    await self._once(collection, id, there, session)
        except OperationFailure:  # a drop came in between
            there.clear()
            there |= before

    async def _once(self, collection: Any, id: str, there: set[str], session: Any = None) -> None:
        self.versions[id] += 1
        document = {"_id": id, "group": self.random.choice(GROUPS), "v": self.versions[id]}
        choice = self.random.random()
        options = {} if session is None else {"session": session}
        if choice < 0.15:
            await collection.delete_one({"_id": id}, **options)
            there.discard(id)
            return
        if id in there and choice < 0.6:
            change = {"$set": {"group": document["group"], "v": document["v"]}}
            await collection.update_one({"_id": id}, change, **options)
        else:
            await collection.replace_one({"_id": id}, document, upsert=True, **options)
            there.add(id)

    # -- clients --

    async def look(self, client: Client) -> None:
        """Connect, read some, be cut, and connect again, until everything has arrived."""
        while not client.done:
            bridge = self.random.choice(self.workers)
            if bridge is None:
                await asyncio.sleep(0.01)
                continue
            stream = bridge.live(self.model, self.filter)
            if client.last_id:
                client.resumes += 1
                stream.start_after(ResumeToken.parse(client.last_id))
            client.pending = None
            decoder = EventDecoder()
            decoder.feed(f"id: {client.last_id}\n\n".encode())  # what a browser keeps
            stay = self.random.choice([1, 5, 30, 1000])
            try:
                await stream.open()
                encoder = live_encoder(stream)
                if self.random.random() < 0.1:
                    await asyncio.sleep(0.2)  # a slow one
                while stay > 0 and not client.done:
                    await asyncio.wait_for(stream.wait(), 30)
                    for event in _events(decoder, stream.take(encoder)):
                        stay -= 1
                        if stay < 0 or client.done:
                            break  # cut: the rest was sent, and never arrived
                        client.receive(event)
            except BridgeClosed:
                pass
            finally:
                await stream.aclose()
            await asyncio.sleep(self.random.choice([0, 0, 0.05, 0.3]))


def _events(decoder: EventDecoder, frames: bytes) -> list[Event]:
    return [item for item in decoder.feed(frames) if isinstance(item, Event)]


FILTERS = {
    "everything": {},
    "one group": {"group": "a"},
    "two groups": {"group": {"$in": ["a", "b"]}},
    "a comparison": {"$or": [{"group": "c"}, {"v": {"$mod": [3, 0]}}]},
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("drops", [False, True], ids=["", "drops"])
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("model", [Plain, Imaged], ids=["without images", "with images"])
async def test_every_client_ends_equal_to_the_database_and_never_goes_back(
    driver_name: str,
    model: type[Document],
    name: str,
    drops: bool,
    seed: int,
    replica_set: Any,
    database_name: str,
) -> None:
    number = sorted(FILTERS).index(name) + 10 * drops + 100 * seed
    fence = {"_id": FENCE, "group": "a", "v": 3}
    filter = FILTERS[name]
    if name == "a comparison":
        fence["group"] = "c"
    async with (
        AsyncMongoClient[dict[str, Any]](replica_set.uri) as mongo,
        opened(driver_name, replica_set.uri) as one,
        opened(driver_name, replica_set.uri) as two,
    ):
        storm = Storm(number, model, filter, drops, replica_set.uri)
        storm.databases = [one[database_name], two[database_name]]
        await storm.start(0)
        await storm.start(1)
        collection = mongo[database_name][model.Settings.collection]  # type: ignore[attr-defined]
        await collection.insert_one({"_id": str(ObjectId()), "group": "a", "v": 1})
        async with await collection.watch() as truth:
            clients = [Client(f"client {n}") for n in range(CLIENTS)]
            looking = [asyncio.create_task(storm.look(client)) for client in clients]
            restarting = asyncio.create_task(storm.restart_workers())
            try:
                async with asyncio.timeout(90):
                    async with asyncio.TaskGroup() as writers:
                        for n in range(WRITERS):
                            writers.create_task(storm.write(n, mongo, database_name))
                    await collection.insert_one(fence)
                    await asyncio.gather(*looking)
            finally:
                storm.over = True
                for task in looking:
                    task.cancel()
                await asyncio.gather(restarting, *looking, return_exceptions=True)
                for bridge in storm.workers:
                    if bridge is not None:
                        await bridge.close()
            tokens: list[str] = []
            if not drops:
                async for change in truth:
                    tokens.append(change["_id"]["_data"])
                    if change["documentKey"]["_id"] == FENCE:
                        break
        expected = {d["_id"]: (d["group"], d["v"]) async for d in collection.find(filter)}
    for client in clients:
        assert client.rows == expected, client
        assert max(client.tokens.values(), default=0) <= 1, "a change was seen twice"
        if name == "everything" and not drops and client.since:
            since = ResumeToken.parse(client.since).hex
            wanted = {token for token in tokens if token > since}
            assert set(client.tokens) == wanted, "a change was not seen, or one too many"
        if model is Imaged and not drops:
            assert client.resets == 0, "images answer every resume"
