"""Several live queries as one stream, on both drivers against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from live_queries import Mongo, Viewer, cursors, profiled, viewing
from pydantic import BaseModel

import data_bridge
from data_bridge import Document, ResumeToken, merge
from data_bridge.errors import ModelInvalid
from data_bridge.log import reset_entry

if TYPE_CHECKING:
    from data_bridge.bridge import Bridge

pytestmark = pytest.mark.timeout(90)


class Order(Document):
    status: str = "open"
    total: float = 0

    class Settings:
        collection = "merged_orders"


class Customer(Document):
    id: int
    name: str = ""

    class Settings:
        collection = "merged_customers"


class Imaged(Document):
    status: str = "open"
    total: float = 0

    class Settings:
        collection = "merged_imaged"
        pre_images = True


class ImagedToo(Document):
    id: int
    name: str = ""

    class Settings:
        collection = "merged_imaged_too"
        pre_images = True


OPEN = {"status": "open"}
PAIRS = pytest.mark.parametrize(
    "models", [(Order, Customer), (Imaged, ImagedToo)], ids=["without images", "with images"]
)


@pytest.fixture
def raw(mongo: Mongo, database_name: str) -> Callable[[Any], Any]:
    return lambda model: mongo[database_name][model.Settings.collection]


@PAIRS
async def test_two_models_are_one_stream_over_one_cursor(
    bridge: Bridge, raw: Any, mongo: Mongo, database_name: str, models: Any
) -> None:
    one, two = models
    raw(one).insert_many([{"status": "open", "total": 1}, {"status": "closed"}])
    raw(two).insert_one({"_id": 1, "name": "A"})
    async with viewing(merge(one.live(OPEN), two.live())) as viewer:
        snapshots = [e for e in viewer.events if e.operation == "snapshot"]
        names = [one.Settings.collection, two.Settings.collection]
        assert [(e.collection, e.total) for e in snapshots] == [(names[0], 1), (names[1], 1)]
        assert snapshots[1].documents == [two(id=1, name="A")]
        assert viewer.events[-1].total == 2
        assert cursors(mongo, database_name) == [""]
        raw(two).update_one({"_id": 1}, {"$set": {"name": "B"}})
        raw(one).insert_one({"status": "open", "total": 2})
        raw(mongo_model).insert_one({})
        raw(two).delete_one({"_id": 1})
        raw(one).update_many({}, {"$set": {"status": "closed"}})
        told = [await viewer.next() for _ in range(5)]
        assert [(e.operation, e.collection) for e in told] == [
            ("update", names[1]),
            ("insert", names[0]),
            ("delete", names[1]),
            ("leave", names[0]),
            ("leave", names[0]),
        ]
        assert isinstance(told[0].full_document, two) and isinstance(told[1].full_document, one)
        assert viewer.rows == {}


class mongo_model:
    class Settings:
        collection = "of_no_interest"


@PAIRS
async def test_the_snapshots_are_of_one_moment(
    bridge: Bridge, raw: Any, mongo: Mongo, models: Any
) -> None:
    one, two = models
    accounts = (raw(one), raw(two))
    accounts[0].insert_one({"status": "open", "total": 100})
    accounts[1].insert_one({"_id": 1, "name": "0"})
    stop = asyncio.Event()

    def move() -> None:
        with mongo.start_session() as session:
            amount = 0
            while not stop.is_set():
                amount += 1
                with session.start_transaction():
                    accounts[0].update_one({}, {"$set": {"total": 100 - amount}}, session=session)
                    name = {"$set": {"name": str(amount)}}
                    accounts[1].update_one({}, name, session=session)

    moving = asyncio.create_task(asyncio.to_thread(move))
    try:
        for _ in range(5):
            async with viewing(merge(one.live(), two.live())) as viewer:
                rows = list(viewer.rows.values())
                assert rows[0]["total"] + int(rows[1]["name"]) == 100
    finally:
        stop.set()
        await moving


@PAIRS
async def test_changes_come_in_the_order_of_the_cluster(
    bridge: Bridge, raw: Any, models: Any
) -> None:
    one, two = models
    async with viewing(merge(one.live(OPEN), two.live())) as viewer:
        for number in range(50):
            raw(two).insert_one({"_id": number, "name": ""})
            raw(one).insert_one({"status": "open", "total": number})
        told = [await viewer.next() for _ in range(100)]
        names = [two.Settings.collection, one.Settings.collection]
        assert [e.collection for e in told] == names * 50
        tokens = [e.resume_token for e in told]
        assert tokens == sorted(tokens)  # type: ignore[type-var]


async def test_with_images_one_id_resumes_all_of_them_at_any_worker(
    bridge: Bridge, database: Any, raw: Any
) -> None:
    raw(Imaged).insert_one({"status": "open", "total": 1})
    live = merge(bridge.live(Imaged, OPEN), bridge.live(ImagedToo))
    async with viewing(live) as before:
        raw(ImagedToo).insert_one({"_id": 1, "name": "A"})
        event = await before.next()
    raw(Imaged).update_one({}, {"$set": {"status": "closed"}})
    raw(ImagedToo).update_one({}, {"$set": {"name": "B"}})
    async with data_bridge.connect(database) as another:
        again = merge(another.live(Imaged, OPEN), another.live(ImagedToo))
        again.start_after(ResumeToken.parse(str(event.resume_token)))
        after = Viewer(again)
        after.rows, after._ready = dict(before.rows), True
        assert await after.take(2) == ["leave", "update"]
        raw(ImagedToo).delete_one({})
        assert await after.take(1) == ["delete"]
        assert after.rows == {}
        await again.aclose()


async def test_without_images_one_id_resumes_all_of_them_while_the_log_lasts(
    bridge: Bridge, raw: Any
) -> None:
    raw(Order).insert_one({"status": "open", "total": 1})
    async with viewing(merge(Order.live(OPEN), Customer.live())) as before:
        raw(Customer).insert_one({"_id": 1, "name": "A"})
        event = await before.next()
    raw(Order).update_one({}, {"$set": {"status": "closed"}})
    raw(Customer).update_one({}, {"$set": {"name": "B"}})
    again = merge(Order.live(OPEN), Customer.live())
    again.start_after(ResumeToken.parse(str(event.resume_token)))
    after = Viewer(again)
    after.rows, after._ready = dict(before.rows), True
    assert await after.take(2) == ["leave", "update"]
    await again.aclose()


async def test_what_is_asked_of_the_server_is_waited_for_and_nothing_overtakes_it(
    bridge: Bridge, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, go_on = asyncio.Event(), asyncio.Event()
    real = bridge.driver.find_by_ids

    async def find_by_ids(*args: Any, **options: Any) -> Any:
        held.set()
        await go_on.wait()
        return await real(*args, **options)

    over = {"$expr": {"$gt": ["$total", 10]}}
    async with viewing(merge(Order.live(over), Customer.live())) as viewer:
        raw(Customer).insert_one({"_id": 1})
        assert await viewer.take(1) == ["insert"]
        monkeypatch.setattr(bridge.driver, "find_by_ids", find_by_ids)
        raw(Order).insert_one({"total": 11})
        raw(Customer).insert_one({"_id": 2})
        await held.wait()
        with pytest.raises(TimeoutError):
            await viewer.next(0.2)
        go_on.set()
        told = [await viewer.next() for _ in range(2)]
        assert [e.collection for e in told] == ["merged_orders", "merged_customers"]
        raw(Order).insert_one({"total": 1})
        raw(Customer).insert_one({"_id": 3})
        assert (await viewer.next()).document_id == 3


@PAIRS
async def test_a_drop_of_one_resets_all_once(bridge: Bridge, raw: Any, models: Any) -> None:
    one, two = models
    raw(one).insert_one({"status": "open"})
    raw(two).insert_one({"_id": 1})
    async with viewing(merge(one.live(OPEN), two.live())) as viewer:
        raw(one).drop()
        assert await viewer.take(4) == ["reset", "snapshot", "snapshot", "ready"]
        assert len(viewer.rows) == 1
        raw(two).insert_one({"_id": 2})
        assert await viewer.take(1) == ["insert"]


@PAIRS
async def test_the_end_of_the_database_resets_all(
    bridge: Bridge, raw: Any, mongo: Mongo, database_name: str, models: Any
) -> None:
    one, two = models
    raw(one).insert_one({"status": "open"})
    raw(two).insert_one({"_id": 1})
    async with viewing(merge(one.live(OPEN), two.live())) as viewer:
        mongo.drop_database(database_name)
        await viewer.until("reset")
        await viewer.see(lambda rows: viewer._ready and not rows)
        raw(two).insert_one({"_id": 2})
        await viewer.see(lambda rows: len(rows) == 1)


async def test_a_loss_of_history_is_of_no_collection_and_resets_all(
    bridge: Bridge, raw: Any
) -> None:
    raw(Customer).insert_one({"_id": 1})
    async with viewing(merge(Order.live(OPEN), Customer.live())) as viewer:
        feed = bridge._feeds[viewer.stream.scope]
        assert feed.log is not None
        feed._add([reset_entry(feed.log.head)], feed.log.head)
        assert await viewer.take(4) == ["reset", "snapshot", "snapshot", "ready"]
        assert viewer.events[-4].reason == "history lost"
        assert len(viewer.rows) == 1


async def test_many_who_open_at_once_share_the_snapshots(
    bridge: Bridge, raw: Any, mongo: Mongo, database_name: str
) -> None:
    raw(Order).insert_one({"status": "open"})
    raw(Customer).insert_one({"_id": 1})
    async with profiled(mongo, database_name) as snapshots:
        streams = [merge(Order.live(OPEN), Customer.live()) for _ in range(100)]
        await asyncio.gather(*(stream.open() for stream in streams))
        assert len(snapshots()) == 2
        assert len(cursors(mongo, database_name)) == 1
    await asyncio.gather(*(stream.aclose() for stream in streams))


async def test_views_keep_what_they_do_not_show_out_of_the_process(
    bridge: Bridge, raw: Any
) -> None:
    class Shown(BaseModel):
        total: float

    class Named(BaseModel):
        name: str

    async with viewing(merge(Imaged.live(OPEN, view=Shown), ImagedToo.live(view=Named))) as viewer:
        entries = []
        feed = bridge._feeds[viewer.stream.scope]
        raw(Imaged).insert_one({"status": "open", "total": 1, "secret": "x", "name": "x"})
        raw(ImagedToo).insert_one({"_id": 1, "name": "n", "secret": "x", "total": 7})
        raw(Imaged).update_one({}, {"$set": {"total": 2, "secret": "y"}})
        raw(ImagedToo).update_one({}, {"$set": {"name": "m", "secret": "y"}})
        raw(Imaged).delete_one({})
        assert await viewer.take(5) == ["insert", "insert", "update", "update", "delete"]
        entries = [e.raw for e in feed.log.entries]  # type: ignore[union-attr]
    assert not any("secret" in str(raw) for raw in entries)
    fields = [set(raw.get("fullDocument") or ()) for raw in entries]
    assert fields[0] == fields[2] == {"_id", "status", "total"}
    assert fields[1] == fields[3] == {"_id", "name"}
    assert entries[4].get("fullDocument") is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: merge(Order.live(), Order.live(OPEN)), "one live query of each collection"),
        (lambda: merge(Order.live(), Customer.live(sort="name", limit=2)), "without a limit"),
    ],
)
async def test_what_cannot_be_merged_is_refused_at_once(
    bridge: Bridge, make: Any, message: str
) -> None:
    with pytest.raises(ModelInvalid, match=message):
        make()


async def test_streams_of_different_databases_cannot_be_merged(
    bridge: Bridge, client: Any, database_name: str
) -> None:
    async with data_bridge.connect(client[f"{database_name}_other"]) as another:
        with pytest.raises(ModelInvalid, match="one database"):
            merge(bridge.live(Order), another.live(Customer))


async def test_three_and_a_merge_of_merges_are_one_stream(bridge: Bridge, raw: Any) -> None:
    live = merge(merge(Order.live(), Customer.live()), Imaged.live(OPEN))
    async with viewing(live) as viewer:
        raw(Imaged).insert_one({"status": "open"})
        raw(Customer).insert_one({"_id": 1})
        assert [(await viewer.next()).collection for _ in range(2)] == [
            "merged_imaged",
            "merged_customers",
        ]
