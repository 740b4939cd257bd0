"""The two drivers, and the few private names of theirs that data-bridge stands on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import bson
import pytest
from conftest import opened
from pymongo import AsyncMongoClient, MongoClient
from pymongo.asynchronous.command_cursor import AsyncCommandCursor
from pymongo.errors import OperationFailure
from pymongo.synchronous.command_cursor import CommandCursor
from watching import cursors, until

import data_bridge
from data_bridge import Document, ResumeToken
from data_bridge.driver import CODEC, Cursor, Driver, Reply, open_driver
from data_bridge.embedded import ReplicaSet
from data_bridge.errors import OperationFailed

NOW: list[dict[str, Any]] = [{"$changeStream": {}}]


@pytest.fixture
async def driver(database: Any) -> AsyncIterator[Driver]:
    driver = open_driver(database)
    yield driver
    await driver.close()


@pytest.fixture
def documents(mongo: MongoClient[dict[str, Any]], database_name: str) -> Any:
    return mongo[database_name]["things"]


async def opening(driver: Driver, collection: str | None = "things", **options: Any) -> Any:
    pipeline = options.pop("pipeline", NOW)
    return await driver.open(collection, pipeline, batch_size=1000, timeout=5, **options)


async def read(cursor: Cursor) -> Reply:
    """The next reply that has something in it."""
    async with asyncio.timeout(20):
        while True:
            reply = await cursor.read(5)
            assert reply is not None
            if reply.documents:
                return reply


def cursor_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name == "data-bridge-cursor"}


# -- what both do -------------------------------------------------------------------------------


@pytest.mark.parametrize("collection", ["things", None])
async def test_replies_are_whole_batches_with_the_position_after_them(
    driver: Driver, documents: Any, collection: str | None
) -> None:
    cursor, start = await opening(driver, collection)
    documents.insert_many([{"_id": n} for n in range(300)])
    reply = await read(cursor)
    changes = bson.decode_all(reply.documents, CODEC)

    assert [c["documentKey"]["_id"] for c in changes] == list(range(300))
    assert reply.position == ResumeToken.of(changes[-1]["_id"]) > start
    assert reply.cluster_time is not None
    assert reply.cluster_time >= reply.position.cluster_time
    await cursor.close()


@pytest.mark.parametrize("collection", ["things", None])
async def test_a_reply_with_nothing_in_it_still_has_a_position(
    driver: Driver, documents: Any, collection: str | None
) -> None:
    cursor, start = await opening(driver, collection)
    documents.database.client["elsewhere"]["things"].insert_one({})
    async with asyncio.timeout(20):
        while (reply := await cursor.read(5)) is not None and reply.position == start:
            pass
    assert reply is not None and reply.documents == b"" and reply.position > start
    await cursor.close()
    documents.database.client.drop_database("elsewhere")


async def test_both_drivers_give_the_same_replies(
    mongo: MongoClient[dict[str, Any]], replica_set: ReplicaSet, database_name: str
) -> None:
    documents = mongo[database_name]["things"]
    with documents.watch() as stream:
        start = stream.resume_token
    documents.insert_many([{"_id": n, "text": "ü" * n} for n in range(50)])
    pipeline = [{"$changeStream": {"startAfter": start, "fullDocument": "updateLookup"}}]
    replies = []
    for name in ("motor", "pymongo"):
        for collection in ("things", None):
            async with opened(name, replica_set.uri) as client:
                driver = open_driver(client[database_name])
                cursor, _ = await opening(driver, collection, pipeline=pipeline)
                reply = await read(cursor)
                replies.append((reply.documents, reply.position))
                await cursor.close()
                await driver.close()
    assert replies[1:] == replies[:-1]


async def test_a_cursor_that_the_server_closed_ends_after_its_last_reply(
    driver: Driver, documents: Any
) -> None:
    documents.insert_one({})
    cursor, _ = await opening(driver)
    documents.drop()
    reply = await read(cursor)
    assert [c["operationType"] for c in bson.decode_all(reply.documents)] == ["drop", "invalidate"]
    assert await cursor.read(5) is None
    assert await cursor.read(5) is None
    await cursor.close()


async def test_opening_fails_with_the_drivers_own_error(driver: Driver) -> None:
    before = cursor_threads()
    with pytest.raises(OperationFailure):
        await opening(driver, pipeline=[*NOW, {"$nonsense": 1}])
    await until(lambda: cursor_threads() <= before)


async def test_the_read_concern_of_the_client_does_not_matter(
    driver_name: str, replica_set: ReplicaSet, database_name: str
) -> None:
    async with opened(driver_name, replica_set.uri, readConcernLevel="local") as client:
        driver = open_driver(client[database_name])
        for collection in ("things", None):
            cursor, _ = await opening(driver, collection)
            await cursor.close()
        await driver.close()


# -- closing ------------------------------------------------------------------------------------


async def test_closing_while_a_getmore_waits_ends_and_leaves_nothing(
    driver: Driver, mongo: MongoClient[dict[str, Any]], database_name: str
) -> None:
    before = cursor_threads()
    cursor, _ = await opening(driver)
    reading = asyncio.create_task(cursor.read(5))
    namespace = f"{database_name}.things"
    await until(lambda: cursors(mongo, namespace))
    await asyncio.sleep(0.1)  # into the wait of the getMore
    reading.cancel()
    async with asyncio.timeout(20):
        await cursor.close()
    await until(lambda: not cursors(mongo, namespace))
    await until(lambda: cursor_threads() <= before)


async def test_closing_twice_or_after_the_server_killed_the_cursor_is_harmless(
    driver: Driver, mongo: MongoClient[dict[str, Any]], database_name: str
) -> None:
    cursor, _ = await opening(driver)
    found = cursors(mongo, f"{database_name}.things")
    mongo[database_name].command({"killCursors": "things", "cursors": list(found)})
    await cursor.close()
    await cursor.close()


async def test_closing_a_bridge_leaves_no_cursor_and_no_thread(
    database: Any, mongo: MongoClient[dict[str, Any]], database_name: str
) -> None:
    before = cursor_threads()
    streams = []
    async with data_bridge.connect(database) as bridge:
        for model in MODELS:
            streams.append(bridge.watch(model))
            await streams[-1].open()
        assert sum(len(cursors(mongo, f"{database_name}.many_{n}")) for n in range(30)) == 30
    await until(lambda: not any(cursors(mongo, f"{database_name}.many_{n}") for n in range(30)))
    await until(lambda: cursor_threads() <= before)


# -- the application's own queries --------------------------------------------------------------


def model(number: int) -> type[Document]:
    class Many(Document):
        class Settings:
            collection = f"many_{number}"

    return Many


MODELS = [model(number) for number in range(30)]


async def test_thirty_feeds_leave_the_applications_pool_and_threads_alone(
    driver_name: str, replica_set: ReplicaSet, database_name: str
) -> None:
    # Motor has five threads a core; and a pool of five is what some applications allow themselves.
    async with opened(driver_name, replica_set.uri, maxPoolSize=5) as client:
        async with data_bridge.connect(client[database_name], documents=MODELS) as bridge:
            streams = [bridge.watch(model) for model in MODELS]
            async with asyncio.timeout(30):
                await asyncio.gather(*(stream.open() for stream in streams))
            waiting = [asyncio.create_task(anext(stream)) for stream in streams]
            await asyncio.sleep(0)
            async with asyncio.timeout(20):
                for _ in range(20):
                    await client[database_name]["other"].find_one({})
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)


# -- what the drivers keep to themselves --------------------------------------------------------


def test_the_private_names_of_the_drivers_are_still_there() -> None:
    for client in (MongoClient, AsyncMongoClient):
        assert callable(client._duplicate)
    for cursor in (CommandCursor, AsyncCommandCursor):
        assert isinstance(cursor._post_batch_resume_token, property)


async def test_private_names_mean_what_they_are_taken_for(driver: Driver, documents: Any) -> None:
    cursor, start = await opening(driver, None)
    inner = cursor._cursor
    assert ResumeToken.of(inner._post_batch_resume_token) == start
    assert len(inner._data) == 0
    documents.insert_many([{"_id": n} for n in range(3)])
    await read(cursor)
    assert len(inner._data) == 0
    assert inner._session.cluster_time["clusterTime"] >= start.cluster_time
    await cursor.close()


async def test_a_server_without_positions_is_refused() -> None:
    from data_bridge.driver import _position

    class Cursor:
        _post_batch_resume_token = None

    with pytest.raises(OperationFailed, match=r"MongoDB 4\.4 or newer"):
        _position(Cursor())


async def test_the_second_client_has_the_settings_of_the_first(
    driver_name: str, replica_set: ReplicaSet, database_name: str
) -> None:
    async with opened(driver_name, replica_set.uri, appname="mine", maxPoolSize=1) as client:
        driver = open_driver(client[database_name])
        cursor, _ = await opening(driver)
        options = driver._second.options.pool_options
        assert (options.appname, options.max_pool_size) == ("mine", None)
        await cursor.close()
        await driver.close()
