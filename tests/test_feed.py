"""One feed for everybody: its cursor, its bounds, and every place at which one can attach."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from bson import Timestamp
from pymongo import MongoClient
from pymongo.errors import OperationFailure
from watching import bridged, cursors, ids_until, taken, until

import data_bridge
from data_bridge import ChangeStream, Document, Limits, ResumeToken
from data_bridge.embedded import ReplicaSet
from data_bridge.errors import BridgeClosed, InvalidResumeToken, ResumeHistoryLost
from data_bridge.log import Log
from data_bridge.source import Entry

if TYPE_CHECKING:
    from data_bridge.bridge import Bridge
    from data_bridge.feed import Feed


class Thing(Document):
    id: int

    class Settings:
        collection = "fed_things"


@pytest.fixture
def documents(mongo: MongoClient[dict[str, Any]], database_name: str) -> Any:
    return mongo[database_name][Thing.Settings.collection]


@pytest.fixture
def namespace(database_name: str) -> str:
    return f"{database_name}.{Thing.Settings.collection}"


def feed_of(bridge: Bridge) -> Feed:
    (feed,) = bridge._feeds.values()
    return feed


async def caught(feed: Feed, position: ResumeToken) -> None:
    """The feed has read up to a position."""
    await until(lambda: feed.log is not None and feed.log.head >= position)


# -- one cursor ---------------------------------------------------------------------------------


async def test_all_subscribers_share_one_server_cursor(
    bridge: Bridge, mongo: MongoClient[dict[str, Any]], namespace: str, documents: Any
) -> None:
    assert not cursors(mongo, namespace)
    streams = [Thing.watch(filter={"_id": {"$gte": n % 2}}) for n in range(100)]
    await asyncio.gather(*(stream.open() for stream in streams))
    assert len(cursors(mongo, namespace)) == 1
    documents.insert_one({"_id": 1})
    for stream in streams:
        assert [c.document_id for c in await taken(stream, 1)] == [1]
    assert len(cursors(mongo, namespace)) == 1
    assert feed_of(bridge).subscribers == 100


async def test_the_cursor_is_closed_some_time_after_the_last_subscriber_left(
    database: Any, mongo: MongoClient[dict[str, Any]], namespace: str
) -> None:
    async with data_bridge.connect(database, limits=Limits(linger=0.3)) as bridge:
        async with Thing.watch(), Thing.watch():
            feed = feed_of(bridge)
        await until(lambda: not bridge._feeds)
        await until(feed.task.done)
        await until(lambda: not cursors(mongo, namespace))


async def test_who_comes_back_in_time_finds_the_feed_and_its_history(
    bridge: Bridge, documents: Any
) -> None:
    async with Thing.watch() as changes:
        position = changes.resume_token
        feed = feed_of(bridge)
        documents.insert_one({"_id": 1})
        await taken(changes, 1)
    await until(lambda: feed.subscribers == 0)
    async with Thing.watch(resume_after=position) as again:
        assert feed_of(bridge) is feed
        assert [c.document_id for c in await taken(again, 1)] == [1]
    assert feed.catch_ups.opened == 0


async def test_who_comes_while_a_feed_closes_gets_a_new_one(database: Any, documents: Any) -> None:
    async with data_bridge.connect(database, limits=Limits(linger=0)) as bridge:
        for number in range(10):
            async with Thing.watch() as changes:
                first = feed_of(bridge)
            while first in bridge._feeds.values():
                await asyncio.sleep(0)
            assert not first.task.done()
            async with Thing.watch() as changes:
                documents.insert_one({"_id": number})
                assert [c.document_id for c in await taken(changes, 1)] == [number]


async def test_a_stream_that_is_only_forgotten_leaves_the_feed(bridge: Bridge) -> None:
    stream: ChangeStream[Any] | None = Thing.watch()
    assert stream is not None
    await stream.open()
    feed = feed_of(bridge)
    assert feed.subscribers == 1
    stream = None
    await until(lambda: feed.subscribers == 0)


async def test_a_stream_that_failed_on_entry_leaves_the_feed(bridge: Bridge) -> None:
    async with Thing.watch():
        for _ in range(3):
            with pytest.raises(InvalidResumeToken):
                async with Thing.watch(resume_after=Timestamp(2**32 - 1, 1)):
                    pass
        await until(lambda: feed_of(bridge).subscribers == 1)


async def test_closing_the_bridge_ends_its_streams_after_what_is_pending(
    database: Any, documents: Any
) -> None:
    async with data_bridge.connect(database) as bridge:
        reading, waiting = Thing.watch(), Thing.watch()
        await reading.open()
        await waiting.open()
        wait = asyncio.create_task(anext(waiting))
        documents.insert_one({"_id": 1})
        assert (await asyncio.wait_for(wait, 20)).document_id == 1
        wait = asyncio.create_task(anext(waiting))
        await asyncio.sleep(0)
    with pytest.raises(BridgeClosed, match="the bridge was closed"):
        await wait
    assert (await anext(reading)).document_id == 1
    for _ in range(2):
        with pytest.raises(BridgeClosed):
            await anext(reading)
    with pytest.raises(BridgeClosed):
        await bridge.watch(Thing).open()


async def test_a_feed_closed_before_its_first_step_ends_who_waits_for_it(database: Any) -> None:
    async with data_bridge.connect(database):
        stream = Thing.watch()
        opening = asyncio.create_task(stream.open())
        await asyncio.sleep(0)
    with pytest.raises(BridgeClosed):
        await asyncio.wait_for(opening, 5)


async def test_an_error_that_many_get_does_not_grow_with_them(database: Any) -> None:
    async with data_bridge.connect(database):
        stream = Thing.watch()
        await stream.open()

    def depth(error: BaseException) -> int:
        traceback, found = error.__traceback__, 0
        while traceback is not None:
            traceback, found = traceback.tb_next, found + 1
        return found

    depths = []
    for _ in range(10):
        with pytest.raises(BridgeClosed) as ended:
            await anext(stream)
        depths.append(depth(ended.value))
    assert len(set(depths[1:])) == 1


# -- bounds -------------------------------------------------------------------------------------


async def test_the_ring_is_bounded_in_entries(database: Any, documents: Any) -> None:
    async with data_bridge.connect(database, limits=Limits(log_entries=50)) as bridge:
        async with Thing.watch() as changes:
            documents.insert_many([{"_id": n} for n in range(500)])
            assert await ids_until(changes, 499) == list(range(500))
            log = feed_of(bridge).log
            assert log is not None and len(log.entries) == 50 and log.end == 500


@pytest.mark.parametrize("size", [100, 30_000, 3_000_000])
async def test_the_ring_is_bounded_in_bytes_whatever_the_documents_size(
    database: Any, documents: Any, size: int
) -> None:
    limits = Limits(log_bytes=200_000)
    count = min(300, 6_000_000 // size)
    async with data_bridge.connect(database, limits=limits) as bridge:
        async with Thing.watch() as changes, Thing.watch(operations="delete"):
            for number in range(count):
                documents.insert_one({"_id": number, "text": "x" * size})
            assert await ids_until(changes, count - 1) == list(range(count))
            log = feed_of(bridge).log
            assert log is not None
            assert log.bytes == sum(entry.cost for entry in log.entries)
            # The newest is kept whatever its size, because somebody is about to read it.
            assert log.bytes <= limits.log_bytes or len(log.entries) == 1


def entry(number: int, size: int = 100) -> Entry:
    token = f"82{number:08X}000000012B022C0100296E5A1004" + "0" * 32 + "46645F696400290004"
    return Entry({"_id": {"_data": token}, "operationType": "insert"}, size)


async def test_frames_count_towards_the_bytes_of_the_ring() -> None:
    log = Log(ResumeToken.at(Timestamp(0, 0)), Limits(log_bytes=100_000))
    entries = [entry(n) for n in range(50)]
    log.append(entries, entries[-1].position)
    assert len(log.entries) == 50

    frame = b"x" * 3000
    end, joined, _ = log.join(lambda _: frame, 0)
    assert (end, joined) == (50, frame * 50)
    await asyncio.sleep(0)
    assert log.bytes <= 100_000
    assert log.bytes == sum(e.cost for e in log.entries)
    assert log.base + len(log.entries) == log.end == 50
    assert log.seek(entries[0].token) is None and log.seek(entries[-1].token) == 50


async def test_joins_are_shared_and_bounded() -> None:
    log = Log(ResumeToken.at(Timestamp(0, 0)), Limits())
    entries = [entry(n) for n in range(3000)]
    log.append(entries, entries[-1].position)
    calls = itertools.count()

    def encoder(_: Entry) -> bytes:
        next(calls)
        return b"x" * 1000

    assert log.join(encoder, 7)[1] is log.join(encoder, 7)[1]
    for seq in range(3000):
        end, joined, last = log.join(encoder, seq)
        assert last is log.entries[end - log.base - 1]
        assert len(joined) == (end - seq) * 1000 <= 264_000
    assert next(calls) == 3000  # each change is encoded once
    assert sum(len(joined) for _, joined, _ in log._joins.values()) < 8 * 1024 * 1024
    log.append([entry(3000)], entry(3000).position)
    assert not log._joins


async def test_a_subscriber_that_falls_behind_the_ring_gets_all_in_order_and_once(
    database: Any, documents: Any
) -> None:
    async with data_bridge.connect(database, limits=Limits(log_entries=100)) as bridge:
        async with Thing.watch() as slow, Thing.watch() as fast:
            documents.insert_many([{"_id": n} for n in range(10)])
            assert len(await taken(slow, 5)) == 5
            documents.insert_many([{"_id": n} for n in range(10, 3000)])
            assert await ids_until(fast, 2999) == list(range(3000))
            assert await ids_until(slow, 2999) == list(range(5, 3000))
            assert feed_of(bridge).catch_ups.opened >= 1
            # … and goes on with the others.
            documents.insert_one({"_id": "more"})
            assert await ids_until(slow, "more") == ["more"]
            await until(lambda: slow._log is feed_of(bridge).log)


# -- attaching ----------------------------------------------------------------------------------


@pytest.fixture
async def history(
    bridge: Bridge, documents: Any
) -> AsyncIterator[tuple[list[int], list[ResumeToken], ResumeToken]]:
    """Ten changes in the ring, their tokens, and the position before all of them."""
    async with Thing.watch() as changes:
        start = changes.resume_token
        assert start is not None
        documents.insert_many([{"_id": n} for n in range(10)])
        found = await taken(changes, 10)
        yield [c.document_id for c in found], [c.resume_token for c in found], start
    assert feed_of(bridge).catch_ups.opened == 0


async def test_attaching_at_an_entry_goes_on_after_it(history: Any, documents: Any) -> None:
    ids, tokens, _ = history
    for at in (0, 4, 8):
        async with Thing.watch(resume_after=tokens[at]) as changes:
            assert [c.document_id for c in await taken(changes, 9 - at)] == ids[at + 1 :]
    async with Thing.watch(resume_after=tokens[-1]) as changes:
        documents.insert_one({"_id": 10})
        assert [c.document_id for c in await taken(changes, 1)] == [10]


async def test_attaching_between_entries_goes_on_after_the_gap(history: Any) -> None:
    ids, tokens, start = history
    between = ResumeToken.at(tokens[5].cluster_time)
    assert tokens[4] < between < tokens[5]
    for position, rest in ((between, ids[5:]), (start, ids)):
        async with Thing.watch(resume_after=position) as changes:
            assert [c.document_id for c in await taken(changes, len(rest))] == rest


@pytest.mark.parametrize(
    "form", [str, lambda t: t.document, lambda t: t.hex.lower(), lambda t: t], ids=range(4)
)
async def test_a_position_may_have_any_of_its_forms(history: Any, form: Any) -> None:
    ids, tokens, _ = history
    async with Thing.watch(resume_after=form(tokens[2])) as changes:
        assert [c.document_id for c in await taken(changes, 7)] == ids[3:]


async def test_a_time_is_a_position_too(history: Any) -> None:
    ids, tokens, _ = history
    for position in (tokens[3].cluster_time, str(tokens[3].cluster_time)):
        async with Thing.watch(resume_after=position) as changes:
            assert [c.document_id for c in await taken(changes, 7)] == ids[3:]


async def test_a_position_newer_than_the_feed_waits_and_skips(
    bridge: Bridge, database: Any, documents: Any
) -> None:
    async with Thing.watch() as behind:
        gate = held(feed_of(bridge))
        async with data_bridge.connect(database, documents=[Thing]) as other:
            async with other.watch(Thing) as ahead:
                documents.insert_many([{"_id": n} for n in range(5)])
                position = (await taken(ahead, 3))[-1].resume_token
        head = behind.resume_token
        assert head is not None and position > head
        async with bridge.watch(Thing, resume_after=position) as joined:
            assert joined.resume_token == position
            waiting = asyncio.create_task(anext(joined))
            await asyncio.sleep(0)
            assert joined.resume_token == position
            gate.set()
            assert (await asyncio.wait_for(waiting, 20)).document_id == 3
            assert (await taken(joined, 1))[0].document_id == 4
        assert await ids_until(behind, 4) == list(range(5))


async def test_skipping_takes_one_step_however_much_there_is(
    bridge: Bridge, database: Any, documents: Any
) -> None:
    async with Thing.watch() as behind:
        gate = held(feed_of(bridge))
        async with data_bridge.connect(database, documents=[Thing]) as other:
            async with other.watch(Thing) as ahead:
                documents.insert_many([{"_id": n} for n in range(1000)])
                position = (await taken(ahead, 900))[-1].resume_token
        async with bridge.watch(Thing, resume_after=position) as joined:
            gate.set()
            await ids_until(behind, 999)
            assert joined.take(lambda e: b"%d " % e.raw["documentKey"]["_id"]) == b"".join(
                b"%d " % n for n in range(900, 1000)
            )
            assert not joined.pending


def held(feed: Feed) -> asyncio.Event:
    """Keep the feed from reading until the event is set."""
    gate = asyncio.Event()
    source: Any = feed.source
    hand_over = source._hand_over

    async def held(*args: Any) -> None:
        await gate.wait()
        await hand_over(*args)

    source._hand_over = held
    return gate


async def test_the_opening_position_of_one_worker_is_no_future_to_another(
    database: Any, documents: Any
) -> None:
    # A cursor that opens starts one tick after the present, and nothing may happen for a while.
    async with data_bridge.connect(database, documents=[Thing]) as bridge:
        async with Thing.watch() as behind:
            gate = held(feed_of(bridge))
            documents.insert_one({"_id": 1})
            async with data_bridge.connect(database, documents=[Thing]) as other:
                async with other.watch(Thing) as ahead:
                    position = ahead.resume_token
            assert position is not None and position > (behind.resume_token or position)
            async with bridge.watch(Thing, resume_after=str(position)) as joined:
                gate.set()
                documents.insert_one({"_id": 2})
                assert [c.document_id for c in await taken(joined, 1)] == [2]


@pytest.mark.parametrize("seconds", [60, 10**9])
async def test_a_position_in_the_future_is_refused(bridge: Bridge, seconds: int) -> None:
    async with Thing.watch() as changes:
        assert changes.resume_token is not None
        time = changes.resume_token.cluster_time
    future = Timestamp(min(time.time + seconds, 2**32 - 1), 1)
    for position in (future, ResumeToken(ResumeToken.at(future).hex + "2B0229296E04")):
        with pytest.raises(InvalidResumeToken, match="lies in the future"):
            async with Thing.watch(resume_after=position):
                pass


# -- a server whose oplog rolls -----------------------------------------------------------------


@pytest.fixture(scope="module")
def rolling() -> Iterator[ReplicaSet]:
    with ReplicaSet(oplog_mb=2) as replica_set:
        yield replica_set


def roll(rolling: ReplicaSet, position: ResumeToken) -> Timestamp:
    """Write until the server has forgotten a position; the time after that."""
    with MongoClient[dict[str, Any]](rolling.uri) as client:
        filler = client["filler"]["filler"]
        for _ in range(200):
            filler.insert_many([{"text": "x" * 100_000} for _ in range(20)])
            try:
                with filler.watch(start_at_operation_time=position.cluster_time):
                    pass
            except OperationFailure as error:
                assert error.code == 286
                client.drop_database("filler")
                newest = client["local"]["oplog.rs"].find_one(sort=[("$natural", -1)])
                assert newest is not None
                return Timestamp(newest["ts"].time, newest["ts"].inc)
    raise AssertionError("the oplog did not roll")


async def test_a_position_that_is_gone_is_said_to_be(driver_name: str, rolling: ReplicaSet) -> None:
    async with bridged(driver_name, rolling.uri, f"gone_{driver_name}") as bridge:
        async with bridge.watch(Thing) as changes:
            mark = changes.resume_token  # of a quiet stream: what most clients come back with
            assert mark is not None and mark.is_high_water
            await bridge.driver.collection("fed_things").insert_one({"_id": 1})
            position = (await taken(changes, 1))[0].resume_token
    await asyncio.to_thread(roll, rolling, position)
    async with bridged(driver_name, rolling.uri, f"gone_{driver_name}") as bridge:
        with pytest.raises(ResumeHistoryLost, match="no longer has the history"):
            await taken(bridge.watch(Thing, resume_after=str(mark)), 1)
        assert bridge.stats().feeds[0].catch_ups == 1
        with pytest.raises(ResumeHistoryLost, match="no longer has the history"):
            await taken(bridge.watch(Thing, resume_after=str(position)), 1)
        # From here on it is known without asking the server.
        while bridge._slots.take():
            pass
        for known in (mark, position, position.cluster_time, str(position)):
            with pytest.raises(ResumeHistoryLost):
                async with bridge.watch(Thing, resume_after=known):
                    pass


async def test_a_slow_subscriber_whose_history_is_gone_is_told_once_and_goes_on_from_now(
    driver_name: str, rolling: ReplicaSet
) -> None:
    limits = Limits(log_entries=5)
    name = f"slow_{driver_name}"
    async with bridged(driver_name, rolling.uri, name, limits=limits) as bridge:
        documents = bridge.driver.collection("fed_things")
        async with bridge.watch(Thing) as slow, bridge.watch(Thing) as fast:
            await documents.insert_many([{"_id": n} for n in range(5)])
            assert (await taken(slow, 1))[0].document_id == 0
            assert await ids_until(fast, 4) == list(range(5))
            for number in range(5, 20):
                await documents.insert_one({"_id": number})
                assert await ids_until(fast, number) == [number]
            position = slow.resume_token
            assert position is not None
            await asyncio.to_thread(roll, rolling, position)
            with pytest.raises(ResumeHistoryLost):
                await taken(slow, 10)
            waiting = asyncio.create_task(taken(slow, 1))
            await until(lambda: slow.resume_token is not None)
            await documents.insert_one({"_id": "later"})
            assert (await waiting)[0].document_id == "later"
            assert await ids_until(fast, "later") == ["later"]


async def test_a_quiet_stream_resumes_after_the_oplog_rolled_past_its_last_change(
    driver_name: str, rolling: ReplicaSet
) -> None:
    name = f"quiet_{driver_name}"
    async with bridged(driver_name, rolling.uri, name) as bridge:
        documents = bridge.driver.collection("fed_things")
        async with bridge.watch(Thing) as changes, bridge.watch(Thing, operations="drop") as picky:
            await documents.insert_one({"_id": 1})
            last = (await taken(changes, 1))[0].resume_token
            waiting = asyncio.create_task(anext(picky))
            after = ResumeToken.at(await asyncio.to_thread(roll, rolling, last))
            await until(lambda: all((s.resume_token or last) > after for s in (changes, picky)))
            positions = [s.resume_token for s in (changes, picky)]
            waiting.cancel()
    async with bridged(driver_name, rolling.uri, name) as bridge:
        documents = bridge.driver.collection("fed_things")
        for number, position in enumerate(positions):
            async with bridge.watch(Thing, resume_after=str(position)) as again:
                await documents.insert_one({"_id": f"later {number}"})
                assert (await ids_until(again, f"later {number}"))[-1] == f"later {number}"
