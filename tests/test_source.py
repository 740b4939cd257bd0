"""What interrupts a cursor: what passes is waited for and loses nothing, what does not is said."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from pymongo import MongoClient
from watching import bridged, cursors, failpoint, ids_until, taken, until

import data_bridge
from data_bridge import ChangeStream, Document, source
from data_bridge.embedded import ReplicaSet
from data_bridge.errors import (
    EventTooLarge,
    InvalidPipeline,
    NotAReplicaSet,
    ResumeHistoryLost,
    ServerUnreachable,
)

if TYPE_CHECKING:
    from data_bridge.bridge import Bridge

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """PyMongo leaves sockets of servers that went away to the collector, which warns of them."""
    yield
    gc.collect()


AFTER_CHECKOUT = "failGetMoreAfterCursorCheckout"


class Thing(Document):
    id: Any = None

    class Settings:
        collection = "sourced_things"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a real outage takes seconds for: waits and pauses are short."""
    monkeypatch.setattr(source, "_GRACE", 0.5)
    monkeypatch.setattr(source, "_BACKOFF", (0.02, 0.5))


@pytest.fixture
def documents(mongo: MongoClient[dict[str, Any]], database_name: str) -> Any:
    return mongo[database_name][Thing.Settings.collection]


@pytest.fixture
async def changes(bridge: Bridge) -> AsyncIterator[ChangeStream[Thing]]:
    async with Thing.watch() as changes:
        yield changes


def only_source(bridge: Bridge) -> Any:
    (feed,) = bridge._feeds.values()
    return feed.source


# -- what passes --------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [6, 43, 50, 237, 262, 11601])
async def test_an_error_that_passes_loses_nothing(
    changes: ChangeStream[Thing],
    bridge: Bridge,
    mongo: MongoClient[dict[str, Any]],
    documents: Any,
    code: int,
) -> None:
    documents.insert_one({"_id": 0})
    assert await ids_until(changes, 0) == [0]
    with failpoint(mongo, AFTER_CHECKOUT, {"times": 2}, errorCode=code):
        documents.insert_many([{"_id": n} for n in range(1, 50)])
        await until(lambda: only_source(bridge).reopened)
        documents.insert_many([{"_id": n} for n in range(50, 100)])
        assert await ids_until(changes, 99) == list(range(1, 100))


async def test_a_connection_that_is_cut_loses_nothing(
    changes: ChangeStream[Thing], bridge: Bridge, mongo: MongoClient[dict[str, Any]], documents: Any
) -> None:
    options = {"failCommands": ["getMore"], "closeConnection": True}
    with failpoint(mongo, "failCommand", {"times": 2}, **options):
        documents.insert_many([{"_id": n} for n in range(10)])
        await until(lambda: only_source(bridge).reopened)
        documents.insert_many([{"_id": n} for n in range(10, 20)])
        assert await ids_until(changes, 19) == list(range(20))


async def test_a_cursor_that_is_killed_loses_nothing(
    changes: ChangeStream[Thing],
    mongo: MongoClient[dict[str, Any]],
    documents: Any,
    database_name: str,
) -> None:
    name = Thing.Settings.collection
    for number in range(3):
        found: set[int] = set()
        while not found:
            found = cursors(mongo, f"{database_name}.{name}")
            await asyncio.sleep(0.01)
        documents.database.command({"killCursors": name, "cursors": list(found)})
        documents.insert_one({"_id": number})
        assert await ids_until(changes, number) == [number]


async def test_a_server_that_cannot_be_opened_for_a_while_is_tried_again(
    changes: ChangeStream[Thing], mongo: MongoClient[dict[str, Any]], documents: Any
) -> None:
    with failpoint(mongo, "failCommand", {"times": 4}, failCommands=["aggregate"], errorCode=262):
        with failpoint(mongo, AFTER_CHECKOUT, {"times": 1}, errorCode=6):
            documents.insert_one({"_id": 1})
            assert await ids_until(changes, 1) == [1]


# -- what does not ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (286, ResumeHistoryLost),
        (280, ResumeHistoryLost),
        (136, ResumeHistoryLost),
        (10334, EventTooLarge),
    ],
)
async def test_a_position_that_is_lost_is_said_once_and_the_stream_goes_on(
    changes: ChangeStream[Thing],
    bridge: Bridge,
    mongo: MongoClient[dict[str, Any]],
    documents: Any,
    code: int,
    error: type[ResumeHistoryLost],
) -> None:
    documents.insert_one({"_id": 0})
    assert await ids_until(changes, 0) == [0]
    with failpoint(mongo, AFTER_CHECKOUT, {"times": 1}, errorCode=code):
        with pytest.raises(ResumeHistoryLost, match="iterating on goes on from now"):
            await taken(changes, 1)
    documents.insert_one({"_id": 1})
    assert await ids_until(changes, 1) == [1]
    (feed,) = bridge._feeds.values()
    assert feed.resets == 1


async def test_losses_that_repeat_do_not_make_a_busy_loop(
    changes: ChangeStream[Thing], bridge: Bridge, mongo: MongoClient[dict[str, Any]], documents: Any
) -> None:
    (feed,) = bridge._feeds.values()
    with failpoint(mongo, AFTER_CHECKOUT, "alwaysOn", errorCode=286):
        await until(lambda: feed.resets >= 3)
        before = feed.resets
        await asyncio.sleep(0.5)
        assert feed.resets - before < 20  # of hundreds that a loop without pauses would make
    await until(lambda: not feed.source._failures)
    documents.insert_one({"_id": 1})
    while True:
        try:
            assert await ids_until(changes, 1) == [1]
            break
        except ResumeHistoryLost:
            pass


@pytest.mark.parametrize(("code", "error"), [(40573, NotAReplicaSet), (47, InvalidPipeline)])
async def test_a_fatal_error_is_raised_at_once_and_not_retried(
    changes: ChangeStream[Thing],
    bridge: Bridge,
    mongo: MongoClient[dict[str, Any]],
    code: int,
    error: type[Exception],
) -> None:
    reading = only_source(bridge)
    with failpoint(mongo, AFTER_CHECKOUT, "alwaysOn", errorCode=code):
        for _ in range(2):
            with pytest.raises(error) as raised:
                await taken(changes, 1)
        assert raised.value.__cause__ is not None
    assert reading.reopened == 0 and not bridge._feeds
    async with Thing.watch():  # whoever comes later tries anew
        pass


async def test_a_fatal_error_at_opening_is_raised_on_entry(
    bridge: Bridge, mongo: MongoClient[dict[str, Any]]
) -> None:
    options = {"failCommands": ["aggregate"], "errorCode": 40573}
    with failpoint(mongo, "failCommand", "alwaysOn", **options):
        with pytest.raises(NotAReplicaSet, match="--replSet"):
            async with Thing.watch():
                pass


# -- servers that go away -----------------------------------------------------------------------


async def writing(uri: str, database: str, numbers: range) -> None:
    """Write one document after the other; each is acknowledged by a majority."""

    def write() -> None:
        with MongoClient[dict[str, Any]](uri, w="majority", serverSelectionTimeoutMS=30_000) as c:
            for number in numbers:
                c[database][Thing.Settings.collection].insert_one({"_id": number})

    await asyncio.to_thread(write)


@pytest.fixture(scope="module")
def alone() -> Iterator[ReplicaSet]:
    with ReplicaSet(fast_elections=True) as replica_set:
        yield replica_set


async def test_a_server_that_hangs_for_some_seconds_loses_nothing(
    alone: ReplicaSet, driver_name: str
) -> None:
    database = f"hangs_{driver_name}"
    async with bridged(driver_name, alone.uri, database) as bridge:
        async with bridge.watch(Thing) as changes:
            await writing(alone.uri, database, range(10))
            alone.suspend()
            try:
                await until(lambda: only_source(bridge).reopened)  # not answered in time
            finally:
                alone.resume()
            await writing(alone.uri, database, range(10, 20))
            assert await ids_until(changes, 19) == list(range(20))


async def test_a_server_that_is_restarted_on_its_port_loses_nothing(
    alone: ReplicaSet, driver_name: str
) -> None:
    database = f"restarts_{driver_name}"
    async with bridged(driver_name, alone.uri, database) as bridge:
        async with bridge.watch(Thing) as changes:
            await writing(alone.uri, database, range(10))
            waiting = asyncio.create_task(ids_until(changes, 19))
            await asyncio.to_thread(alone.kill)
            await until(lambda: only_source(bridge).reopened)
            with pytest.raises(ServerUnreachable):
                await bridge.driver.check(0.5)
            await asyncio.to_thread(alone.restart)
            await writing(alone.uri, database, range(10, 20))
            assert await waiting == list(range(20))


@pytest.fixture(scope="module")
def three() -> Iterator[ReplicaSet]:
    with ReplicaSet(3, fast_elections=True) as replica_set:
        yield replica_set


@pytest.mark.parametrize("how", ["step down", "kill"])
async def test_another_primary_takes_over_and_nothing_is_lost(
    three: ReplicaSet, driver_name: str, how: str
) -> None:
    database = f"elects_{driver_name}_{how.replace(' ', '_')}"
    async with bridged(driver_name, three.uri, database) as bridge:
        async with bridge.watch(Thing) as changes:
            await writing(three.uri, database, range(20))
            waiting = asyncio.create_task(ids_until(changes, 59))
            primary = await asyncio.to_thread(three.wait_for_primary)
            if how == "kill":
                await asyncio.to_thread(three.kill, primary)
            else:
                await asyncio.to_thread(three.step_down)
            await writing(three.uri, database, range(20, 60))
            assert await waiting == list(range(60))
            # A cursor survives that its server becomes a secondary, but not that it dies.
            assert how == "step down" or only_source(bridge).reopened
    if how == "kill":
        await asyncio.to_thread(three.restart, primary)
    await asyncio.to_thread(three.wait_until_steady)


async def test_a_server_that_is_away_when_a_stream_is_opened_is_said_in_time(
    driver_name: str,
) -> None:
    with ReplicaSet() as replica_set:
        limits = data_bridge.Limits(timeout=1)
        async with bridged(driver_name, replica_set.uri, "away", limits=limits) as bridge:
            replica_set.kill()
            stream = bridge.watch(Thing)
            with pytest.raises(ServerUnreachable, match="has a primary"):
                await asyncio.wait_for(stream.open(), 20)
            await asyncio.to_thread(replica_set.restart)
            async with asyncio.timeout(30):
                while True:
                    try:
                        await stream.open()
                        break
                    except ServerUnreachable:
                        pass
            await bridge.driver.collection(Thing.Settings.collection).insert_one({"_id": 1})
            assert await ids_until(stream, 1) == [1]
