"""Those who come back with an old position: complete, each change once, with very few cursors."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from bson import Timestamp
from pymongo import MongoClient
from watching import Client, ids_until, taken, until

import data_bridge
from data_bridge import Document, Limits, ResumeToken, catch_up
from data_bridge.catch_up import Slots
from data_bridge.errors import BridgeClosed
from data_bridge.source import Entry

if TYPE_CHECKING:
    from data_bridge.bridge import Bridge


class Thing(Document):
    id: int

    class Settings:
        collection = "caught_things"


def encoder(entry: Entry) -> bytes:
    return b"%5d" % entry.raw["documentKey"]["_id"]


def written(mongo: Client, database: str, count: int) -> list[ResumeToken]:
    """Insert documents numbered from 0, and the token of each."""
    documents = mongo[database][Thing.Settings.collection]
    tokens = []
    with documents.watch(batch_size=1000) as stream:
        for start in range(0, count, 1000):
            documents.insert_many([{"_id": n} for n in range(start, min(count, start + 1000))])
        while len(tokens) < count:
            tokens.append(ResumeToken.of(stream.next()["_id"]))
    return tokens


class Counted:
    """Counts the server cursors that are open at once."""

    def __init__(self, bridge: Bridge) -> None:
        self.now = self.most = self.opened = 0
        driver: Any = bridge.driver
        self._open = driver.open
        driver.open = self.open

    async def open(self, *args: Any, **options: Any) -> Any:
        self.now += 1
        self.opened += 1
        self.most = max(self.most, self.now)
        cursor, position = await self._open(*args, **options)
        close = cursor.close

        async def closed() -> None:
            await close()
            self.now -= 1

        cursor.close = closed
        return cursor, position


async def resumed(bridge: Bridge, position: ResumeToken, expected: bytes, **options: Any) -> None:
    """Read from a position to the end as a connection does, and compare every byte."""
    stream = bridge.watch(Thing, resume_after=position, **options)
    await stream.open()
    at = 0
    while at < len(expected):
        if not stream.pending:
            await stream.wait()
        chunk = stream.take(encoder)
        assert expected.startswith(chunk, at)
        at += len(chunk)
        await asyncio.sleep(0)
    await stream.aclose()


async def test_five_thousand_tokens_at_once_share_a_few_cursors(
    database: Any, mongo: MongoClient[dict[str, Any]], database_name: str
) -> None:
    count = 5000
    tokens = await asyncio.to_thread(written, mongo, database_name, count)
    frames = b"".join(b"%5d" % n for n in range(count))
    async with data_bridge.connect(database) as bridge:
        counted = Counted(bridge)
        async with asyncio.timeout(100):
            await asyncio.gather(
                *(resumed(bridge, tokens[n], frames[5 * (n + 1) :]) for n in range(count))
            )
        # The feed's own, and one that all share, because their tokens are close together.
        assert counted.opened <= 1 + bridge.limits.catch_ups
        assert bridge._slots.free == bridge.limits.catch_ups or counted.now > 1


async def test_catch_ups_of_all_feeds_together_are_never_more_than_the_limit(
    database: Any, mongo: MongoClient[dict[str, Any]], database_name: str
) -> None:
    feeds, count = 12, 200
    tokens = await asyncio.to_thread(written, mongo, database_name, count)
    frames = b"".join(b"%5d" % n for n in range(count))
    limits = Limits(catch_ups=2)
    async with data_bridge.connect(database, limits=limits) as bridge:
        counted = Counted(bridge)
        async with asyncio.timeout(100):
            await asyncio.gather(
                *(
                    resumed(
                        bridge,
                        tokens[n],
                        frames[5 * (n + 1) :],
                        pipeline=[{"$match": {"never": {"$ne": n % feeds}}}],
                    )
                    for n in range(count)
                )
            )
        assert counted.opened >= 2 * feeds
        assert counted.most <= feeds + limits.catch_ups


async def test_new_subscribers_do_not_wait_for_a_storm(
    bridge: Bridge, mongo: MongoClient[dict[str, Any]], database_name: str
) -> None:
    tokens = await asyncio.to_thread(written, mongo, database_name, 50)
    while bridge._slots.take():
        pass
    storm = [asyncio.create_task(bridge.watch(Thing, resume_after=t).open()) for t in tokens]
    async with Thing.watch() as fresh:
        await asyncio.sleep(0)
        mongo[database_name][Thing.Settings.collection].insert_one({"_id": 100})
        assert [c.document_id for c in await taken(fresh, 1)] == [100]
        assert not any(task.done() for task in storm)
        for _ in range(bridge.limits.catch_ups):
            bridge._slots.release()
        await asyncio.wait_for(asyncio.gather(*storm), 30)


async def test_the_splice_with_the_feed_neither_loses_nor_repeats(
    database: Any, mongo: MongoClient[dict[str, Any]], database_name: str
) -> None:
    # While somebody writes, so that the place where both meet moves.
    tokens = await asyncio.to_thread(written, mongo, database_name, 300)
    documents = mongo[database_name][Thing.Settings.collection]

    def write() -> None:
        for number in range(300, 900):
            documents.insert_one({"_id": number})

    async with data_bridge.connect(database, limits=Limits(log_entries=40)) as bridge:
        writing = asyncio.create_task(asyncio.to_thread(write))
        streams = [bridge.watch(Thing, resume_after=tokens[n]) for n in range(0, 300, 50)]
        found = await asyncio.gather(*(ids_until(stream, 899) for stream in streams))
        await writing
        for number, ids in zip(range(0, 300, 50), found, strict=True):
            assert ids == list(range(number + 1, 900))


async def test_on_a_quiet_cluster_a_catch_up_ends_without_waiting_for_the_next_write(
    database: Any, mongo: MongoClient[dict[str, Any]], database_name: str
) -> None:
    tokens = await asyncio.to_thread(written, mongo, database_name, 20)
    async with data_bridge.connect(database) as bridge:
        async with bridge.watch(Thing, resume_after=tokens[5]) as stream:
            assert await ids_until(stream, 19) == list(range(6, 20))
            waiting = asyncio.create_task(anext(stream))
            (feed,) = bridge._feeds.values()
            await until(lambda: stream._log is feed.log, timeout=8)  # noops come every 10 s
            mongo[database_name][Thing.Settings.collection].insert_one({"_id": 20})
            assert (await asyncio.wait_for(waiting, 20)).document_id == 20


async def test_a_reply_larger_than_the_log_is_read_to_its_end(
    database: Any, mongo: MongoClient[dict[str, Any]], database_name: str
) -> None:
    tokens = await asyncio.to_thread(written, mongo, database_name, 900)
    limits = Limits(log_entries=10, log_bytes=20_000)
    async with data_bridge.connect(database, limits=limits) as bridge:
        async with bridge.watch(Thing, resume_after=tokens[0]) as stream:
            assert await ids_until(stream, 899) == list(range(1, 900))


async def test_a_catch_up_that_nobody_reads_gives_its_place_to_others(
    database: Any,
    mongo: MongoClient[dict[str, Any]],
    database_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catch_up, "_IDLE", 0.2)
    tokens = await asyncio.to_thread(written, mongo, database_name, 3000)
    async with data_bridge.connect(database, limits=Limits(catch_ups=1)) as bridge:
        async with bridge.watch(Thing, resume_after=tokens[0]) as lazy:
            await taken(lazy, 1)
            other = bridge.watch(Thing, resume_after=tokens[0], pipeline=[{"$match": {}}])
            assert await ids_until(other, 2999) == list(range(1, 3000))
            assert await ids_until(lazy, 2999) == list(range(2, 3000))


async def test_cancelling_who_waits_for_a_place_leaves_no_trace(
    bridge: Bridge, mongo: MongoClient[dict[str, Any]], database_name: str
) -> None:
    (token,) = await asyncio.to_thread(written, mongo, database_name, 1)
    while bridge._slots.take():
        pass
    async with Thing.watch():
        (feed,) = bridge._feeds.values()
        opening = asyncio.create_task(Thing.watch(resume_after=token).open())
        await until(lambda: bridge._slots._waiting)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        assert not bridge._slots._waiting and not feed.catch_ups._wanted


async def test_closing_ends_who_waits_for_a_place(
    database: Any, mongo: MongoClient[dict[str, Any]], database_name: str
) -> None:
    (token,) = await asyncio.to_thread(written, mongo, database_name, 1)
    async with data_bridge.connect(database) as bridge:
        while bridge._slots.take():
            pass
        opening = asyncio.create_task(bridge.watch(Thing, resume_after=token).open())
        await until(lambda: bridge._slots._waiting)
    with pytest.raises(BridgeClosed):
        await asyncio.wait_for(opening, 10)


async def test_closing_in_the_middle_gives_every_place_back(
    database: Any, mongo: MongoClient[dict[str, Any]], database_name: str
) -> None:
    tokens = await asyncio.to_thread(written, mongo, database_name, 50)
    async with data_bridge.connect(database) as bridge:
        openings = [
            asyncio.create_task(bridge.watch(Thing, resume_after=token).open()) for token in tokens
        ]
        async with asyncio.timeout(20):
            while bridge._slots.free == bridge.limits.catch_ups:
                await asyncio.sleep(0)
    await asyncio.gather(*openings, return_exceptions=True)
    assert bridge._slots.free == bridge.limits.catch_ups


async def test_a_token_that_the_server_does_not_know_spoils_only_its_own_stream(
    database: Any, mongo: MongoClient[dict[str, Any]], database_name: str
) -> None:
    tokens = await asyncio.to_thread(written, mongo, database_name, 20)
    made_up = ResumeToken(tokens[3].hex.replace("461E5F6964", "461E5F6965"))
    assert made_up != tokens[3]
    async with data_bridge.connect(database) as bridge:
        wrong = bridge.watch(Thing, resume_after=made_up)
        right = [bridge.watch(Thing, resume_after=token) for token in tokens[:-1]]
        results = await asyncio.gather(
            asyncio.wait_for(anext(wrong), 30),
            *(ids_until(stream, 19) for stream in right),
            return_exceptions=True,
        )
        for number, ids in enumerate(results[1:]):
            assert ids == list(range(number + 1, 20))


async def test_who_waits_longest_for_a_place_is_asked_first() -> None:
    slots = Slots(0)
    order: list[int] = []

    async def waiting(number: int) -> None:
        await slots.changed()
        order.append(number)

    tasks = [asyncio.create_task(waiting(n)) for n in range(100)]
    await asyncio.sleep(0)
    slots.release()
    await asyncio.gather(*tasks)
    assert order == list(range(100)) and slots.free == 1


async def test_a_time_before_the_first_change_is_a_position(
    database: Any, mongo: MongoClient[dict[str, Any]], database_name: str
) -> None:
    tokens = await asyncio.to_thread(written, mongo, database_name, 20)
    time = tokens[0].cluster_time
    async with data_bridge.connect(database) as bridge:
        for position in (time, str(Timestamp(time.time, time.inc))):
            async with bridge.watch(Thing, resume_after=position) as stream:
                assert await ids_until(stream, 19) == list(range(20))
