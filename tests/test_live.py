"""What somebody who looks at a live query is promised, on both drivers against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from bson import ObjectId
from live_queries import Mongo, Viewer, cursors, eventually, profiled, viewing
from pydantic import BaseModel

import data_bridge
from data_bridge import Document, Limits, LiveEvent, LiveStream, ResumeToken
from data_bridge.errors import (
    BridgeClosed,
    DocumentInvalid,
    InvalidFilter,
    InvalidResumeToken,
    NotBound,
    SnapshotTooLarge,
)

if TYPE_CHECKING:
    from data_bridge.bridge import Bridge

pytestmark = pytest.mark.timeout(90)


class Order(Document):
    status: str = "open"
    total: float = 0

    class Settings:
        collection = "live_orders"


class Imaged(Document):
    status: str = "open"
    total: float = 0

    class Settings:
        collection = "live_imaged"
        pre_images = True


OPEN = {"status": "open"}
KINDS = pytest.mark.parametrize("model", [Order, Imaged], ids=["without images", "with images"])
QUERIES = pytest.mark.parametrize(
    ("model", "filter"),
    [(Order, None), (Imaged, None), (Order, OPEN), (Imaged, OPEN)],
    ids=["everything", "everything with images", "filter", "filter with images"],
)


@pytest.fixture
def raw(mongo: Mongo, database_name: str) -> Callable[[Any], Any]:
    """The collection of a model, written to by somebody else."""
    return lambda model: mongo[database_name][model.Settings.collection]


@asynccontextmanager
async def bridged(database: Any, **limits: Any) -> AsyncIterator[Bridge]:
    async with data_bridge.connect(database, limits=Limits(**limits)) as bridge:
        yield bridge


# -- what matches now ---------------------------------------------------------------------------


async def test_async_for_needs_nothing_around_it(bridge: Bridge) -> None:
    order = await Order(total=1).insert()
    found: list[LiveEvent[Order]] = []
    async for event in Order.live():
        found.append(event)
        if event.operation == "ready":
            break

    snapshot, ready = found
    assert snapshot.operation == "snapshot" and snapshot.documents == [order]
    assert (snapshot.sent, snapshot.total, ready.total) == (1, 1, 1)
    assert snapshot.full_document is None and snapshot.document is None
    assert ready.documents == [] and ready.full_document is None


async def test_a_snapshot_comes_in_pieces_that_say_how_far_they_are(bridge: Bridge) -> None:
    await Order.insert_many([Order(total=n) for n in range(1201)])
    async with viewing(Order.live(sort="total")) as viewer:
        snapshots = [e for e in viewer.events if e.operation == "snapshot"]

    assert [(e.sent, e.total, len(e.documents)) for e in snapshots] == [
        (500, 1201, 500),
        (1000, 1201, 500),
        (1201, 1201, 201),
    ]
    assert [d.total for e in snapshots for d in e.documents] == list(range(1201))


async def test_a_snapshot_of_nothing_is_one_that_is_empty(bridge: Bridge) -> None:
    async with viewing(Order.live()) as viewer:
        assert [(e.operation, e.total) for e in viewer.events] == [("snapshot", 0), ("ready", 0)]


@QUERIES
async def test_no_position_is_given_before_ready_which_gives_the_first(
    bridge: Bridge, model: Any, filter: Any
) -> None:
    await model.insert_many([model() for _ in range(501)])
    live = model.live(filter)
    assert live.resume_token is None
    async with live:
        for _ in range(2):
            event = await anext(live)
            assert event.operation == "snapshot"
            assert event.resume_token is None and live.resume_token is None
        event = await anext(live)
        assert event.operation == "ready"
        assert isinstance(event.resume_token, ResumeToken)
        assert live.resume_token == event.resume_token


async def test_typed_events_have_the_document_as_its_model_and_as_json(bridge: Bridge) -> None:
    async with viewing(Order.live()) as viewer:
        order = await Order(total=1.5).insert()
        event = await viewer.next()

    assert event.operation == "insert" and event.collection == "live_orders"
    assert event.document_id == order.id and event.full_document == order
    assert event.document == {"id": str(order.id), "status": "open", "total": 1.5}


async def test_a_view_is_what_the_documents_are_shown_as(bridge: Bridge) -> None:
    class View(BaseModel):
        total: float

    await Order(total=1).insert()
    live = Order.live(OPEN, view=View)
    async with viewing(live) as viewer:
        assert viewer.events[0].documents == [View(total=1)]
        await Order(total=2).insert()
        event = await viewer.next()
        assert event.full_document == View(total=2) and event.document == {"total": 2.0}
        assert set(event.raw[0]) == {"_id", "status", "total"}  # the filter needs the status


async def test_the_position_of_a_stream_is_that_of_the_event_given_last(
    bridge: Bridge, raw: Any
) -> None:
    async with viewing(Order.live()) as viewer:
        raw(Order).insert_many([{"total": n} for n in range(5)])
        await eventually(lambda: viewer.stream._places[0].query.log.end == 5)
        for _ in range(5):
            event = await viewer.next()
            assert viewer.stream.resume_token == event.resume_token


# -- every change after -------------------------------------------------------------------------


@KINDS
async def test_without_a_filter_every_change_is_told(bridge: Bridge, model: Any, raw: Any) -> None:
    async with viewing(model.live()) as viewer:
        first = await model(status="a").insert()
        await first.update({"$set": {"status": "b"}})
        assert await viewer.take(2) == ["insert", "update"]
        first.status = "c"
        await first.replace()
        assert await viewer.take(1) == ["replace"]
        assert viewer.values("status") == ["c"]
        await first.delete()
        assert await viewer.take(1) == ["delete"]
        assert viewer.rows == {} and viewer.events[-1].document_id == first.id


@KINDS
async def test_with_a_filter_documents_enter_and_leave(bridge: Bridge, model: Any) -> None:
    there = await model(total=1).insert()
    other = await model(status="closed", total=2).insert()
    async with viewing(model.live(OPEN)) as viewer:
        assert viewer.values("total") == [1]
        await model(total=3).insert()
        await model(status="closed", total=4).insert()
        await other.update({"$set": {"status": "open"}})
        assert await viewer.take(2) == ["insert", "enter"]
        assert viewer.values("total") == [1, 2, 3]
        await there.update({"$set": {"total": 5}})
        assert await viewer.take(1) == ["update"]
        await there.update({"$set": {"status": "closed", "total": 6}})
        leave = await viewer.next()
        assert leave.operation == "leave" and leave.document_id == there.id
        assert leave.full_document is None and leave.raw == []
        await there.update({"$set": {"total": 7}})  # nobody's business
        await there.delete()
        there.status = "open"
        await there.insert()
        await other.delete()
        assert await viewer.take(2) == ["insert", "delete"]
        other.status = "closed"
        await other.insert()
        other.status = "open"
        await other.replace()
        assert await viewer.take(1) == ["enter"]


@KINDS
async def test_a_replacement_that_does_not_match_leaves(bridge: Bridge, model: Any) -> None:
    document = await model().insert()
    async with viewing(model.live(OPEN)) as viewer:
        document.status = "closed"
        await document.replace()
        assert await viewer.take(1) == ["leave"]


@QUERIES
async def test_a_transaction_is_told_whole_and_in_order(
    bridge: Bridge, model: Any, filter: Any, mongo: Mongo, raw: Any
) -> None:
    document = await model(total=1).insert()
    async with viewing(model.live(filter)) as viewer:
        with mongo.start_session() as session, session.start_transaction():
            raw(model).insert_one({"status": "open", "total": 2}, session=session)
            raw(model).delete_one({"_id": document.id}, session=session)
        assert await viewer.take(2) == ["insert", "delete"]
        assert viewer.values("total") == [2]


async def test_changes_since_the_snapshot_was_read_are_told(bridge: Bridge) -> None:
    for number in range(20):
        async with Order.live() as live:
            await Order(total=number).insert()
            viewer = Viewer(live)
            await viewer.see(lambda rows: len(rows) == number + 1)  # noqa: B023


async def test_a_cancelled_wait_loses_nothing(bridge: Bridge) -> None:
    async with viewing(Order.live()) as viewer:
        for number in range(20):
            with contextlib.suppress(TimeoutError):
                await viewer.next(0.001)
            await Order(total=number).insert()
        await viewer.see(lambda rows: len(rows) == 20)
        assert viewer.values("total") == list(range(20))


@pytest.mark.parametrize("seconds", [0, 0.001, 0.003])
async def test_a_start_that_is_cancelled_again_and_again_still_begins_with_the_snapshot(
    bridge: Bridge, raw: Any, seconds: float
) -> None:
    await Order(total=1).insert()
    live = Order.live(OPEN)
    waits = 0
    event = None
    while event is None:
        try:
            event = await asyncio.wait_for(anext(live), seconds if waits < 20 else None)
        except TimeoutError:
            waits += 1
            raw(Order).insert_one({"status": "open", "total": waits})
    assert event.operation == "snapshot"
    await live.aclose()


# -- somebody else's snapshot and this one ------------------------------------------------------


class Held:
    """Holds what was read back, as a slow network would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str = "query") -> None:
        from data_bridge import query, window

        self.read = asyncio.Event()
        self.go_on = asyncio.Event()
        there = query if module == "query" else window
        real = there.read_snapshot

        async def read_snapshot(*args: Any, **options: Any) -> Any:
            found = await real(*args, **options)
            self.read.set()
            await self.go_on.wait()
            return found

        monkeypatch.setattr(there, "read_snapshot", read_snapshot)


QUERY_FILTERS = pytest.mark.parametrize(
    "filter",
    [OPEN, {"status": {"$gt": "n"}}, {"$expr": {"$eq": ["$status", "open"]}}],
    ids=["by value", "everything", "by the server"],
)


@QUERY_FILTERS
async def test_what_left_while_the_first_snapshot_was_read_leaves(
    bridge: Bridge, raw: Any, monkeypatch: pytest.MonkeyPatch, filter: Any
) -> None:
    order = await Order().insert()
    held = Held(monkeypatch)
    live = Order.live(filter)
    opening = asyncio.create_task(live.open())
    await held.read.wait()
    await order.update({"$set": {"status": "closed"}})
    feed = bridge._feeds[live.scope]
    await eventually(lambda: feed.log is not None and feed.log.end >= 1)
    held.go_on.set()
    await opening

    viewer = Viewer(live)
    assert await viewer.take(3) == ["snapshot", "ready", "leave"]
    await live.aclose()


@QUERY_FILTERS
async def test_what_left_while_another_snapshot_was_read_leaves(
    bridge: Bridge, raw: Any, monkeypatch: pytest.MonkeyPatch, filter: Any
) -> None:
    order = await Order(total=1).insert()
    async with viewing(Order.live(filter)) as first:
        monkeypatch.setattr(first.stream._places[0].query, "_snapshot", None)
        held = Held(monkeypatch)
        live = Order.live(filter)
        opening = asyncio.create_task(live.open())
        await held.read.wait()
        await order.update({"$set": {"status": "closed"}})
        assert await first.take(1) == ["leave"]
        held.go_on.set()
        await opening
        viewer = Viewer(live)
        assert await viewer.take(3) == ["snapshot", "ready", "leave"]
        assert first.rows == viewer.rows == {}
        await live.aclose()


async def test_what_came_and_went_unseen_before_a_snapshot_arrived_is_not_in_it(
    bridge: Bridge, raw: Any, monkeypatch: pytest.MonkeyPatch, mongo: Mongo, database_name: str
) -> None:
    """Looked up after it went, a document never matched; the snapshot caught it in between."""
    order = await Order(status="closed").insert()
    async with viewing(Order.live(OPEN)) as first:
        monkeypatch.setattr(first.stream._places[0].query, "_snapshot", None)
        held = Held(monkeypatch)
        live = Order.live(OPEN)
        async with slow_replies(mongo, raw(Order)):
            await Order(total=1).insert()
            assert await first.take(1) == ["insert"]
            raw(Order).update_one({"_id": order.id}, {"$set": {"status": "open"}})
            opening = asyncio.create_task(live.open())
            await held.read.wait()
            raw(Order).update_one({"_id": order.id}, {"$set": {"status": "closed"}})
        await Order(total=2).insert()
        await first.until("insert")
        held.go_on.set()
        await opening
        viewer = Viewer(live)
        await viewer.until("ready")
        await viewer.see(lambda rows: len(rows) == 2)
        assert viewer.values("total") == [1, 2]
        await live.aclose()


# -- documents that are looked up later than they changed ---------------------------------------


@asynccontextmanager
async def slow_replies(mongo: Mongo, collection: Any) -> AsyncIterator[None]:
    """Within, the server takes its time before it looks for changes: they come many at once."""
    fail: dict[str, Any] = {"configureFailPoint": "failCommand"}
    data = {
        "failCommands": ["getMore"],
        "blockConnection": True,
        "blockTimeMS": 700,
        "namespace": collection.full_name,
    }
    mongo.admin.command(fail | {"mode": "alwaysOn", "data": data})
    try:
        yield
    finally:
        mongo.admin.command(fail | {"mode": "off"})


async def test_no_change_shows_an_older_document_than_one_before_it(
    bridge: Bridge, raw: Any, mongo: Mongo
) -> None:
    order = await Order(total=1).insert()
    async with viewing(Order.live()) as everything, viewing(Order.live(OPEN)) as filtered:
        async with slow_replies(mongo, raw(Order)):
            await Order(total=-1).insert()
            assert await everything.take(1) == await filtered.take(1) == ["insert"]
            one = {"_id": order.id}
            raw(Order).update_one(one, {"$set": {"total": 2}})
            raw(Order).replace_one(one, {"status": "open", "total": 3})
            raw(Order).update_one(one, {"$set": {"total": 4}})
            raw(Order).delete_one(one)
            raw(Order).insert_one(one | {"status": "open", "total": 5})
            raw(Order).replace_one(one, {"status": "open", "total": 6})
        for viewer in (everything, filtered):
            await viewer.see(lambda rows: any(row["total"] == 6 for row in rows.values()))
            raw(Order).update_one(one, {"$inc": {"total": 1}})
            await viewer.see(lambda rows: any(row["total"] > 6 for row in rows.values()))
            shown = [
                e.raw[0]["total"] for e in viewer.events if e.document_id == order.id and e.raw
            ]
            assert shown == sorted(shown)


@pytest.mark.parametrize("filter", [None, OPEN], ids=["everything", "filter"])
async def test_a_document_that_was_deleted_before_it_was_looked_up_goes(
    bridge: Bridge, raw: Any, mongo: Mongo, filter: Any
) -> None:
    order = await Order(total=1).insert()
    never = await Order(status="closed").insert()
    async with viewing(Order.live(filter)) as viewer:
        async with slow_replies(mongo, raw(Order)):
            await Order(total=-1).insert()
            assert await viewer.take(1) == ["insert"]
            raw(Order).update_one({"_id": order.id}, {"$set": {"total": 2}})
            raw(Order).update_one({"_id": never.id}, {"$set": {"status": "open"}})
            raw(Order).delete_many({"_id": {"$in": [order.id, never.id]}})
        await viewer.until("delete")
        await Order(total=7).insert()
        await viewer.until("insert")
        assert viewer.values("total") == [-1, 7]
    told = {e.document_id for e in viewer.events if e.document_id is not None}
    assert (never.id in told) is (filter is None)


async def test_documents_that_do_not_fit_are_left_out_and_the_log_says_which(
    bridge: Bridge, raw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fits = await Order(total=1).insert()
    odd = ObjectId()
    raw(Order).insert_one({"_id": odd, "status": "open", "total": "much"})
    async with viewing(Order.live(OPEN)) as viewer:
        snapshot = viewer.events[0]
        with caplog.at_level(logging.WARNING, "data_bridge"):
            assert snapshot.documents == [fits] and snapshot.total == 2
        assert f"Order {odd} in the database does not fit" in caplog.text
        raw(Order).update_one({"_id": odd}, {"$set": {"total": "more"}})
        event = await viewer.next()
        assert event.operation == "update" and event.document is None
        with pytest.raises(DocumentInvalid, match=f"Order {odd}"):
            _ = event.full_document
        raw(Order).update_one({"_id": odd}, {"$set": {"total": 2}})
        assert (await viewer.next()).full_document == Order(id=odd, status="open", total=2)


# -- going on after a position ------------------------------------------------------------------


def resumed(live: LiveStream[Any], before: Viewer) -> Viewer:
    """Somebody who goes on with what they have, as a browser does."""
    position = before.stream.resume_token
    assert position is not None
    live.start_after(ResumeToken.parse(str(position)))
    viewer = Viewer(live)
    viewer.rows, viewer._ready = dict(before.rows), True
    return viewer


async def missed_changes(model: Any, raw: Any, there: Any, other: Any) -> None:
    raw(model).update_one({"_id": there.id}, {"$set": {"total": 10}})
    raw(model).insert_one({"status": "open", "total": 11})
    raw(model).insert_one({"status": "closed", "total": 12})
    raw(model).update_one({"_id": other.id}, {"$set": {"status": "open"}})
    raw(model).update_one({"_id": there.id}, {"$set": {"status": "closed"}})
    raw(model).delete_one({"_id": other.id})


@pytest.mark.parametrize("filter", [None, OPEN], ids=["everything", "filter"])
async def test_with_images_any_worker_goes_on_with_exactly_what_was_missed(
    bridge: Bridge, database: Any, raw: Any, filter: Any
) -> None:
    there, other = await Imaged(total=1).insert(), await Imaged(status="closed", total=2).insert()
    async with viewing(bridge.live(Imaged, filter)) as before:
        pass
    await missed_changes(Imaged, raw, there, other)
    async with bridged(database) as another:
        after = resumed(another.live(Imaged, filter), before)
        raw(Imaged).insert_one({"_id": "last", "status": "open", "total": 13})
        await after.see(lambda rows: any(row["total"] == 13 for row in rows.values()))
        told = after.operations()
        await after.stream.aclose()
    if filter is None:
        assert told == ["update", "insert", "insert", "update", "update", "delete", "insert"]
    else:
        assert told == ["update", "insert", "enter", "leave", "delete", "insert"]
        assert after.values("total") == [11, 13]


async def test_with_images_a_query_that_catches_up_joins_those_that_have(
    bridge: Bridge, database: Any, raw: Any, mongo: Mongo, database_name: str
) -> None:
    async with viewing(bridge.live(Imaged, OPEN)) as before:
        pass
    async with bridged(database) as another, another.live(Imaged, OPEN) as present:
        raw(Imaged).insert_many([{"status": "open", "total": n} for n in range(2000)])
        after = resumed(another.live(Imaged, OPEN), before)
        await after.see(lambda rows: len(rows) == 2000)
        raw(Imaged).insert_one({"status": "open", "total": 2000})
        await after.see(lambda rows: len(rows) == 2001)
        assert set(after.operations()) == {"insert"}
        await eventually(lambda: after.stream._behind is None or not after.stream.pending)
        raw(Imaged).insert_one({"status": "open", "total": 2001})
        await after.see(lambda rows: len(rows) == 2002)
        assert after.stream._behind is None
        assert after.stream._places[0].query is present._places[0].query
        await after.stream.aclose()


@pytest.mark.parametrize(
    "filter", [None, OPEN, {"$expr": {"$eq": ["$status", "open"]}}], ids=["all", "filter", "server"]
)
async def test_without_images_the_same_worker_goes_on_while_its_log_lasts(
    bridge: Bridge, raw: Any, filter: Any
) -> None:
    there, other = await Order(total=1).insert(), await Order(status="closed", total=2).insert()
    async with viewing(Order.live(filter)) as before:
        pass
    await missed_changes(Order, raw, there, other)
    after = resumed(Order.live(filter), before)
    raw(Order).insert_one({"_id": "last", "status": "open", "total": 13})
    await after.see(lambda rows: any(row["total"] == 13 for row in rows.values()))
    assert not {"reset", "snapshot", "ready"} & set(after.operations())
    assert after.values("total") == ([10, 11, 12, 13] if filter is None else [11, 13])
    await after.stream.aclose()


@pytest.mark.parametrize("filter", [None, OPEN], ids=["everything", "filter"])
async def test_without_images_another_worker_does_not_guess(
    bridge: Bridge, database: Any, raw: Any, filter: Any
) -> None:
    there, other = await Order(total=1).insert(), await Order(status="closed", total=2).insert()
    async with viewing(bridge.live(Order, filter)) as before:
        pass
    await missed_changes(Order, raw, there, other)
    async with bridged(database) as another:
        after = resumed(another.live(Order, filter), before)
        assert await after.take(3) == ["reset", "snapshot", "ready"]
        assert after.events[0].reason == "history lost"
        assert after.values("total") == ([10, 11, 12] if filter is None else [11])
        await after.stream.aclose()


async def test_without_images_what_the_log_forgot_is_not_guessed(database: Any, raw: Any) -> None:
    async with bridged(database, log_entries=10) as bridge:
        async with viewing(bridge.live(Order, OPEN)) as before:
            async with viewing(bridge.live(Order, OPEN)) as present:
                await before.stream.aclose()
                raw(Order).insert_many([{"status": "open", "total": n} for n in range(30)])
                await present.see(lambda rows: len(rows) == 30)
            after = resumed(bridge.live(Order, OPEN), before)
            assert await after.take(3) == ["reset", "snapshot", "ready"]
            assert len(after.rows) == 30
            await after.stream.aclose()


@QUERIES
async def test_a_viewer_that_is_too_slow_for_the_log_misses_nothing(
    database: Any, raw: Any, model: Any, filter: Any
) -> None:
    async with bridged(database, log_entries=10) as bridge:
        async with viewing(bridge.live(model, filter)) as slow:
            async with viewing(bridge.live(model, filter)) as fast:
                for batch in range(5):
                    documents = [{"status": "open", "total": batch} for _ in range(20)]
                    raw(model).insert_many(documents)
                    await fast.see(lambda rows: len(rows) == 20 * (batch + 1))  # noqa: B023
                await slow.see(lambda rows: len(rows) == 100)
                assert slow.rows == fast.rows
                assert ("reset" in slow.operations()) is (model is Order)


async def test_a_position_in_the_future_is_refused(bridge: Bridge) -> None:
    live = Order.live()
    live.start_after(ResumeToken.parse("Timestamp(4294967290, 1)"))
    with pytest.raises(InvalidResumeToken, match="future"):
        await live.open()
    await live.aclose()


# -- starting over ------------------------------------------------------------------------------


@QUERIES
async def test_a_drop_resets_once_and_then_goes_on(
    bridge: Bridge, raw: Any, model: Any, filter: Any
) -> None:
    await model(total=1).insert()
    async with viewing(model.live(filter)) as viewer:
        raw(model).drop()
        assert await viewer.take(3) == ["reset", "snapshot", "ready"]
        assert viewer.events[-3].reason == "drop" and viewer.rows == {}
        for number in range(3):
            raw(model).insert_one({"status": "open", "total": number})
            assert await viewer.take(1) == ["insert"]
        assert viewer.values("total") == [0, 1, 2]


@QUERIES
async def test_a_rename_resets_and_shows_what_is_there_now(
    bridge: Bridge, raw: Any, model: Any, filter: Any
) -> None:
    collection = raw(model)
    collection.insert_one({"status": "open", "total": 1})
    async with viewing(model.live(filter)) as viewer:
        collection.rename(f"{collection.name}_old")
        await viewer.until("reset")
        await viewer.until("ready")
        assert viewer.rows == {}
        new = collection.database[f"{collection.name}_new"]
        new.insert_one({"status": "open", "total": 2})
        collection.insert_one({"status": "open", "total": 3})
        await viewer.until("insert")
        new.rename(collection.name, dropTarget=True)
        await viewer.until("reset")
        await viewer.until("ready")
        assert viewer.values("total") == [2]


@QUERIES
async def test_the_end_of_the_database_resets(
    bridge: Bridge, raw: Any, mongo: Mongo, database_name: str, model: Any, filter: Any
) -> None:
    raw(model).insert_one({"status": "open", "total": 1})
    async with viewing(model.live(filter)) as viewer:
        mongo.drop_database(database_name)
        await viewer.until("reset")
        await viewer.until("ready")
        assert viewer.rows == {}
        raw(model).insert_one({"status": "open", "total": 2})
        await viewer.see(lambda rows: len(rows) == 1)


@QUERIES
async def test_a_collection_need_not_exist(
    bridge: Bridge, raw: Any, model: Any, filter: Any
) -> None:
    raw(model).drop()
    async with viewing(model.live(filter)) as viewer:
        assert viewer.rows == {}
        raw(model).insert_one({"status": "open", "total": 1})
        await viewer.see(lambda rows: len(rows) == 1)
        raw(model).update_one({}, {"$set": {"total": 2}})
        await viewer.see(lambda rows: [r["total"] for r in rows.values()] == [2])


@pytest.mark.parametrize("filter", [None, OPEN], ids=["everything", "filter"])
async def test_where_images_are_missing_it_resets_and_has_them_kept_again(
    bridge: Bridge, raw: Any, filter: Any
) -> None:
    collection = raw(Imaged)

    def keeping() -> bool:
        images = collection.options().get("changeStreamPreAndPostImages", {})
        return bool(images.get("enabled"))

    collection.insert_one({"status": "open", "total": 1})
    async with viewing(Imaged.live(filter)) as viewer:
        off = {"changeStreamPreAndPostImages": {"enabled": False}}
        collection.database.command({"collMod": collection.name, **off})
        collection.update_one({}, {"$set": {"total": 2}})
        assert (await viewer.until("reset")).reason == "no image"
        await viewer.until("ready")
        assert viewer.values("total") == [2]
        await eventually(keeping)
        collection.update_one({}, {"$set": {"total": 3}})
        await viewer.until("update")
        collection.update_one({}, {"$set": {"status": "closed"}})
        assert await viewer.take(1) == ["update" if filter is None else "leave"]


# -- what many share ----------------------------------------------------------------------------


async def test_a_thousand_who_open_at_once_share_one_query_and_one_snapshot(
    bridge: Bridge, mongo: Mongo, database_name: str
) -> None:
    await Order.insert_many([Order(total=n) for n in range(10)])
    async with profiled(mongo, database_name) as snapshots:
        streams = [Order.live({"status": "open"}) for _ in range(1000)]
        await asyncio.gather(*(stream.open() for stream in streams))
        assert len(snapshots()) == 1
    assert len({id(stream._places[0].query) for stream in streams}) == 1
    assert len(cursors(mongo, database_name)) == 1
    await asyncio.gather(*(stream.aclose() for stream in streams))


async def test_a_snapshot_serves_those_who_come_later_with_the_changes_since(
    bridge: Bridge, mongo: Mongo, database_name: str
) -> None:
    await Order(total=1).insert()
    async with profiled(mongo, database_name) as snapshots:
        async with viewing(Order.live(OPEN)) as first:
            await Order(total=2).insert()
            await first.until("insert")
            async with viewing(Order.live(OPEN)) as second:
                assert second.values("total") == [1]
                assert await second.take(1) == ["insert"]
                assert first.rows == second.rows
        assert len(snapshots()) == 1


@pytest.mark.parametrize("limits", [{"log_entries": 3}, {"snapshot_age": 0.0}], ids=str)
@QUERIES
async def test_a_snapshot_is_read_anew_when_it_is_old_or_the_log_forgot_what_followed(
    database: Any, mongo: Mongo, database_name: str, limits: Any, raw: Any, model: Any, filter: Any
) -> None:
    async with bridged(database, **limits) as bridge, profiled(mongo, database_name) as snapshots:
        async with viewing(bridge.live(model, filter)) as first:
            for number in range(10):
                raw(model).insert_one({"status": "open", "total": number})
                await first.until("insert")
            async with viewing(bridge.live(model, filter)) as second:
                assert second.rows == first.rows
        assert len(snapshots()) == 2


async def test_filters_that_are_the_same_are_one_query_and_others_are_not(bridge: Bridge) -> None:
    same = [Order.live(f) for f in ({"status": "a", "total": 1}, {"total": 1.0, "status": "a"})]
    other = Order.live({"status": "a"})
    for live in (*same, other):
        await live.open()
    one, two, three = (live._places[0].query for live in (*same, other))
    assert one is not three
    assert len(bridge._feeds[other.scope].live()) in (2, 3)
    del one, two, three
    for live in (*same, other):
        await live.aclose()


# -- bounds -------------------------------------------------------------------------------------


@QUERIES
async def test_a_snapshot_too_large_is_an_error_that_names_the_bound(
    database: Any, raw: Any, model: Any, filter: Any
) -> None:
    raw(model).insert_many([{"status": "open"} for _ in range(4)])
    async with bridged(database, snapshot_documents=3) as bridge:
        live = bridge.live(model, filter)
        with pytest.raises(SnapshotTooLarge, match=r"more than 3 .*Limits\.snapshot_documents"):
            await live.open()
        raw(model).delete_one({})
        async with viewing(bridge.live(model, filter)) as viewer:
            assert len(viewer.rows) == 3
        await live.aclose()


async def test_too_many_members_are_an_error_that_names_the_bound(database: Any, raw: Any) -> None:
    raw(Order).insert_many([{"status": "open", "total": n} for n in range(3)])
    async with bridged(database, members=3) as bridge:
        async with viewing(bridge.live(Order, OPEN)) as viewer:
            raw(Order).insert_one({"status": "open"})
            with pytest.raises(SnapshotTooLarge, match=r"more than 3 .*Limits\.members"):
                await viewer.next()
        with pytest.raises(SnapshotTooLarge, match=r"Limits\.members"):
            await bridge.live(Order, OPEN).open()
        async with viewing(bridge.live(Order)) as viewer:  # keeps no account
            assert len(viewer.rows) == 4


# -- the end ------------------------------------------------------------------------------------


async def test_without_subscribers_queries_and_cursors_are_given_back(
    database: Any, mongo: Mongo, database_name: str
) -> None:
    async with bridged(database, linger=0.1) as bridge:
        lives = [bridge.live(Order, {"total": n % 3}) for n in range(9)]
        for live in lives:
            await live.open()
        (feed,) = bridge._feeds.values()
        router = feed.live()
        assert len(router) == 3 and len(cursors(mongo, database_name)) == 1
        for live in lives:
            await live.aclose()
        await eventually(lambda: not router._queries)
        assert router._everything == router._by_value == router._by_member == {}
        await eventually(lambda: cursors(mongo, database_name) == [])
        assert bridge._feeds == {}


async def test_a_loop_that_is_left_gives_everything_back(
    database: Any, mongo: Mongo, database_name: str
) -> None:
    async with bridged(database, linger=0.1) as bridge:

        async def look() -> None:
            async for _ in bridge.live(Order, OPEN):
                break

        await look()
        gc.collect()
        await eventually(lambda: bridge._feeds == {})
        await eventually(lambda: cursors(mongo, database_name) == [])


async def test_a_query_that_is_opened_again_within_the_linger_is_the_same(
    bridge: Bridge,
) -> None:
    async with viewing(Order.live(OPEN)) as first:
        query = first.stream._places[0].query
    async with viewing(Order.live(OPEN)) as second:
        assert second.stream._places[0].query is query


async def test_closing_ends_the_iteration_also_of_somebody_who_waits(bridge: Bridge) -> None:
    live = Order.live()
    looking = asyncio.create_task(_operations(live))
    await eventually(lambda: live.resume_token is not None)
    await live.aclose()
    assert await asyncio.wait_for(looking, 20) == ["snapshot", "ready"]
    assert live.resume_token is not None
    with pytest.raises(BridgeClosed, match="call live"):
        await live.open()
    with pytest.raises(StopAsyncIteration):
        await anext(live)


async def _operations(live: LiveStream[Any]) -> list[str]:
    return [event.operation async for event in live]


async def test_a_bridge_that_closes_ends_its_live_queries(database: Any) -> None:
    async with bridged(database) as bridge:
        live = bridge.live(Order, OPEN)
        looking = asyncio.create_task(_operations(live))
        await eventually(lambda: live.resume_token is not None)
    with pytest.raises(BridgeClosed):
        await asyncio.wait_for(looking, 20)


def test_without_a_bridge_it_says_what_to_do() -> None:
    with pytest.raises(NotBound, match="connect"):
        Order.live()


@pytest.mark.parametrize(
    "filter", ["status", {"$nonsense": 1}, {"status": {"$in": 3}}, {"a": 1j}], ids=str
)
async def test_what_is_no_filter_is_refused_at_once(bridge: Bridge, filter: Any) -> None:
    with pytest.raises(InvalidFilter):
        Order.live(filter)
