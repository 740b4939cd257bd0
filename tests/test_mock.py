"""What a database without a server promises to the tests of an application."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId, Timestamp
from live_queries import viewing
from pydantic import BaseModel
from pymongo import AsyncMongoClient, DeleteOne, InsertOne, UpdateMany

from data_bridge import Change, ChangeStream, Document, Limits, ResumeToken, connect, merge
from data_bridge.api import App, EventSourceResponse
from data_bridge.embedded import ReplicaSet
from data_bridge.errors import (
    InvalidPipeline,
    InvalidResumeToken,
    OperationFailed,
    ResumeHistoryLost,
    WatchUnsupported,
)
from data_bridge.testing import events, mock_database, streaming_client


class Order(Document):
    status: str = "open"
    total: int = 0
    placed: datetime | None = None

    class Settings:
        collection = "orders"


class Imaged(Document):
    status: str = "open"
    total: int = 0

    class Settings:
        collection = "imaged"
        pre_images = True


class Summary(BaseModel):
    status: str


MODELS = (Order, Imaged)
OPEN = {"status": "open"}
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def database() -> AsyncIterator[Any]:
    """An open one, of which nothing is left behind."""
    before, threads = asyncio.all_tasks(), threading.active_count()
    database = mock_database("shop")
    async with connect(database, documents=MODELS):
        yield database
    assert asyncio.all_tasks() <= before | {asyncio.current_task()}
    assert threading.active_count() <= threads  # those of a test before may have ended meanwhile


async def taken(changes: ChangeStream[Any], number: int) -> list[Change[Any]]:
    async with asyncio.timeout(10):
        return [await anext(changes) for _ in range(number)]


async def operations(changes: ChangeStream[Any], number: int) -> list[str]:
    return [change.operation for change in await taken(changes, number)]


async def silent(changes: ChangeStream[Any]) -> bool:
    try:
        await asyncio.wait_for(anext(changes), 0.3)
    except TimeoutError:
        return True
    return False


# -- watch() ------------------------------------------------------------------------------------


async def test_every_write_of_a_document_is_seen(database: Any) -> None:
    async with Order.watch() as changes:
        order = await Order(total=1).insert()
        await order.update({"$set": {"total": 2}})
        order.total = 3
        await order.replace()
        order.total = 4
        await order.save()
        await order.delete()
        await Order.insert_many([Order(total=5), Order(total=6)])
        await Order.update_many({}, {"$set": {"status": "paid"}})
        await Order.delete_many({})
        await order.save()

        seen = await taken(changes, 12)

    assert [change.operation for change in seen] == (
        ["insert", "update", "replace", "replace", "delete"]
        + ["insert"] * 2
        + ["update"] * 2
        + ["delete"] * 2
        + ["insert"]
    )
    assert {change.document_id for change in seen[:5]} == {order.id}
    assert [c.full_document.total for c in seen if c.full_document] == [1, 2, 3, 4, 5, 6, 5, 6, 4]
    assert seen[1].update_description is not None
    assert seen[1].update_description.updated_fields == {"total": 2}
    assert seen[4].full_document is None


async def test_a_write_that_changes_nothing_is_no_change(database: Any) -> None:
    order = await Order().insert()
    async with Order.watch() as changes:
        await order.update({"$set": {"status": "open"}})
        await Order.update_many({"status": "lost"}, {"$set": {"status": "found"}})
        assert await silent(changes)


async def test_what_of_a_failed_write_was_done_is_seen(database: Any) -> None:
    one = Order()
    async with Order.watch() as changes:
        with pytest.raises(OperationFailed):
            await Order.insert_many([one, one])
        assert await operations(changes, 1) == ["insert"]
        assert await silent(changes)


async def test_writes_around_the_models_are_seen_whichever_way_they_go(database: Any) -> None:
    async with Order.watch() as changes:
        await database.orders.insert_one({"_id": 1})
        await database.client["shop"]["orders"].insert_one({"_id": 2})
        assert [c.document_id for c in await taken(changes, 2)] == [1, 2]
        database.delegate.orders.insert_one({"_id": 3})  # mongomock's own: nobody tells
        database.delegate.orders.delete_one({"_id": 1})
        assert await operations(changes, 2) == ["delete", "insert"]


async def test_documents_that_expire_are_seen_to_go(database: Any) -> None:
    await database.orders.create_index("placed", expireAfterSeconds=0)
    async with Order.watch() as changes:
        await Order(placed=datetime.now(UTC) + timedelta(seconds=0.3)).insert()
        assert await operations(changes, 2) == ["insert", "delete"]


async def test_another_collection_and_another_database_are_not_seen(database: Any) -> None:
    async with Order.watch() as changes:
        await Imaged().insert()
        await database.client["other"].orders.insert_one({"_id": 1})
        assert await silent(changes)


async def test_a_dropped_collection_is_told_of_and_watched_on(database: Any) -> None:
    async with Order.watch() as changes:
        await Order().insert()
        await Order.collection.drop()
        await Order.collection.drop()  # is none any more
        await Order().insert()
        assert await operations(changes, 4) == ["insert", "drop", "invalidate", "insert"]
        await database.client.drop_database("shop")
        assert await operations(changes, 2) == ["drop", "invalidate"]
        await Order().insert()
        assert await operations(changes, 1) == ["insert"]


async def test_images_are_those_that_the_collection_keeps(database: Any) -> None:
    image = "whenAvailable"
    async with Imaged.watch() as imaged, Order.watch(full_document_before_change=image) as plain:
        for model in MODELS:
            document = await model(total=1).insert()
            await document.update({"$set": {"total": 2}})
        update = (await taken(imaged, 2))[1]
        assert update.full_document_before_change is not None
        assert update.full_document is not None
        assert (update.full_document_before_change.total, update.full_document.total) == (1, 2)
        assert (await taken(plain, 2))[1].full_document_before_change is None

    async with Order.watch(full_document_before_change="required") as changes:
        await Order.delete_many({})
        with pytest.raises(InvalidPipeline, match="keeps no pre- and post-images"):
            await anext(changes)


async def test_a_pipeline_may_match_and_include_fields(database: Any) -> None:
    since = datetime(2024, 5, 1, tzinfo=UTC)
    match = {"$match": {"fullDocument.placed": {"$gte": since}}}
    project = {"$project": {"operationType": 1, "documentKey": 1, "fullDocument.total": 1}}
    async with Order.watch(pipeline=[match, project]) as changes:
        await Order(placed=datetime(2024, 4, 1, tzinfo=UTC)).insert()
        late = await Order(placed=datetime(2024, 6, 1, tzinfo=UTC), total=7).insert()
        (change,) = await taken(changes, 1)
    assert change.document_id == late.id
    assert change.raw["fullDocument"] == {"total": 7}
    assert change.raw.keys() == {"_id", "operationType", "documentKey", "fullDocument"}


async def test_one_database_serves_several_event_loops() -> None:
    database = mock_database("shop")

    async def elsewhere() -> None:
        async with connect(database, documents=MODELS):
            await Order().insert()

    async with connect(database, documents=MODELS), Order.watch() as changes:
        await asyncio.to_thread(asyncio.run, elsewhere())
        assert await operations(changes, 1) == ["insert"]


# -- positions ----------------------------------------------------------------------------------


async def test_a_token_and_a_timestamp_resume(database: Any) -> None:
    async with Order.watch() as changes:
        await Order.insert_many([Order(total=n) for n in range(5)])
        seen = await taken(changes, 5)
    tokens = [change.resume_token for change in seen]
    assert tokens == sorted(tokens) and len(set(tokens)) == 5
    assert all(ResumeToken.parse(str(token)) == token for token in tokens)
    for position, first in ((tokens[2], 3), (str(tokens[2]), 3), (seen[2].timestamp, 2)):
        async with Order.watch(resume_after=position) as again:
            totals = [c.full_document.total for c in await taken(again, 5 - first)]
            assert totals == list(range(first, 5))
            assert await silent(again)


async def test_a_position_outlives_the_bridge_as_it_does_the_process() -> None:
    database = mock_database("shop")
    async with connect(database, documents=MODELS):
        async with Order.watch() as changes:
            await Order(total=1).insert()
            (seen,) = await taken(changes, 1)
            await Order(total=2).insert()
    async with connect(database, documents=MODELS, limits=Limits(log_entries=1)):
        async with Order.watch(resume_after=seen.resume_token) as changes:
            for total in (3, 4):
                await Order(total=total).insert()
            assert [c.full_document.total for c in await taken(changes, 3)] == [2, 3, 4]


async def test_a_drop_can_be_resumed_after(database: Any) -> None:
    async with Order.watch() as changes:
        await Order().insert()
        await Order.collection.drop()
        await Order().insert()
        _, drop, invalidate, _ = await taken(changes, 4)
    for change, rest in ((drop, ["invalidate", "insert"]), (invalidate, ["insert"])):
        async with Order.watch(resume_after=change.resume_token) as again:
            assert await operations(again, len(rest)) == rest


async def test_a_position_that_the_history_has_lost_says_so() -> None:
    database = mock_database("shop", history=2)
    async with connect(database, documents=MODELS):
        async with Order.watch() as changes:
            await Order().insert()
            (first,) = await taken(changes, 1)
        await Order.insert_many([Order(), Order()])
        async with Order.watch(resume_after=first.resume_token) as changes:
            assert await operations(changes, 2) == ["insert", "insert"]
    async with connect(database, documents=MODELS):  # which has no log of its own yet
        await Order().insert()
        for lost in (first.resume_token, Timestamp(1_000_000_000, 1)):
            with pytest.raises(ResumeHistoryLost):
                async with Order.watch(resume_after=lost):
                    pass


async def test_a_position_in_the_future_is_refused(database: Any) -> None:
    with pytest.raises(InvalidResumeToken, match="future"):
        async with Order.watch(resume_after=Timestamp(2**32 - 1, 1)):
            pass


# -- over HTTP ----------------------------------------------------------------------------------


def shop(database: Any) -> App:
    app = App(database=database)

    @app.get("/orders")
    async def orders() -> EventSourceResponse:
        return EventSourceResponse(Order.watch())

    app.live("/orders/live", Order, filter=lambda request: OPEN)
    return app


async def test_a_client_gets_events_and_resumes_with_the_last_id() -> None:
    async with streaming_client(shop(mock_database("shop"))) as client:
        async with client.stream("GET", "/orders") as response:
            stream = events(response)
            opening = await anext(stream.everything())
            order = await Order(total=1).insert()
            event = await anext(stream)
            assert event.event == "insert"
            assert json.loads(event.data)["document"]["total"] == 1
        await order.update({"$set": {"total": 2}})
        await order.delete()
        for id, seen in ((opening.id, "insert"), (event.id, "update")):
            headers = {"Last-Event-ID": id}
            async with client.stream("GET", "/orders", headers=headers) as response:
                stream = events(response)
                assert (await anext(stream)).event == seen


async def test_a_client_that_was_away_for_too_long_is_reset() -> None:
    database = mock_database("shop", history=1)
    async with connect(database, documents=MODELS), Order.watch() as changes:
        await Order().insert()
        (change,) = await taken(changes, 1)
        await Order.insert_many([Order(), Order()])
    async with streaming_client(shop(database)) as client:
        headers = {"Last-Event-ID": str(change.resume_token)}
        async with client.stream("GET", "/orders", headers=headers) as response:
            assert (await anext(events(response))).event == "reset"


async def test_a_live_query_over_http() -> None:
    async with streaming_client(shop(mock_database("shop"))) as client:
        async with client.stream("GET", "/orders/live") as response:
            stream = events(response)
            assert [(await anext(stream)).event for _ in range(2)] == ["snapshot", "ready"]
            await Order(total=7).insert()
            event = await anext(stream)
            assert event.event == "insert"
            assert json.loads(event.data)["document"]["total"] == 7


# -- live() -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS, ids=["without images", "with images"])
async def test_a_live_query_shows_what_matches_and_what_comes_and_goes(
    database: Any, model: type[Order]
) -> None:
    await model.insert_many([model(total=1), model(total=2, status="paid")])
    async with viewing(model.live(OPEN)) as viewer:
        assert viewer.values("total") == [1]
        one, two = await model.find(sort="total")
        await two.update({"$set": {"status": "open"}})
        await one.update({"$set": {"status": "paid"}})
        await two.update({"$set": {"total": 5}})
        await model(total=3, status="paid").insert()
        await model(total=4).insert()
        await two.delete()
        assert await viewer.take(5) == ["enter", "leave", "update", "insert", "delete"]
        assert viewer.values("total") == [4]


async def test_a_window_keeps_its_order_and_its_size(database: Any) -> None:
    await Order.insert_many([Order(total=n) for n in range(50)])
    async with viewing(Order.live(sort="-total", limit=3)) as viewer:
        assert viewer.values("total") == [47, 48, 49]
        await Order(total=100).insert()
        await viewer.see(lambda rows: {r["total"] for r in rows.values()} == {100, 49, 48})
        await Order.delete_many({"total": {"$gte": 30}})
        await viewer.see(lambda rows: {r["total"] for r in rows.values()} == {29, 28, 27})


async def test_a_view_shows_its_fields_only(database: Any) -> None:
    await Order(total=1).insert()
    async with viewing(Order.live(view=Summary)) as viewer:
        await Order(total=2).insert()
        event = await viewer.next()
        assert [row.keys() for row in viewer.rows.values()] == [{"_id", "status"}] * 2
        assert event.document == {"status": "open"}


async def test_several_collections_are_merged(database: Any) -> None:
    async with viewing(merge(Order.live(view=Summary), Imaged.live(OPEN))) as viewer:
        order = await Order().insert()
        imaged = await Imaged().insert()
        await order.delete()
        await imaged.update({"$set": {"status": "paid"}})
        assert await viewer.take(4) == ["insert", "insert", "delete", "leave"]


async def test_a_live_query_survives_a_drop(database: Any) -> None:
    for model in MODELS:
        await model(total=1).insert()
        async with viewing(model.live(OPEN)) as viewer:
            await model.collection.drop()
            await viewer.until("reset")
            await viewer.until("ready")
            document = await model(total=2).insert()
            await document.update({"$set": {"total": 3}})
            await viewer.see(lambda _, viewer=viewer: viewer.values("total") == [3])  # type: ignore[misc]


async def test_a_filter_that_only_a_server_evaluates_is_left_to_mongomock(database: Any) -> None:
    order = await Order(total=11).insert()
    async with viewing(Order.live({"$expr": {"$gt": ["$total", 10]}})) as viewer:
        for total, seen in ((12, "update"), (9, "leave"), (11, "enter")):
            await order.update({"$set": {"total": total}})
            assert await viewer.take(1) == [seen]


# -- what it cannot do --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pipeline": [{"$addFields": {"a": 1}}]}, r"not \$addFields"),
        ({"pipeline": [{"$project": {"fullDocument": 0}}]}, r"not \$project"),
        ({"pipeline": [{"$match": {"$where": "true"}}]}, r"cannot evaluate the \$match"),
        ({"show_expanded_events": True}, "no expanded events"),
    ],
)
async def test_what_it_cannot_watch_is_named(
    database: Any, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(WatchUnsupported, match=named):
        async with Order.watch(**options):
            pass


async def test_a_filter_that_mongomock_cannot_evaluate_is_named(database: Any) -> None:
    with pytest.raises(WatchUnsupported, match=r"cannot evaluate the filter .*\$text"):
        async with Order.live({"$text": {"$search": "tea"}}):
            pass
    await Order().insert()
    async with viewing(Order.live({"$expr": {"$gt": ["$total", 10]}})) as viewer:
        await database.orders.insert_one({"status": "open"})  # mongomock trips over it
        with pytest.raises(WatchUnsupported, match=r"cannot evaluate the filter .*\$expr"):
            await viewer.next()


async def test_transactions_are_mongomocks_to_refuse(database: Any) -> None:
    with pytest.raises(NotImplementedError, match="does not support sessions"):
        database.client.start_session()
    with pytest.raises(OperationFailed, match="does not handle sessions"):
        await Order().insert(session=object())


def test_a_history_has_at_least_one_change() -> None:
    with pytest.raises(ValueError, match="history"):
        mock_database(history=0)


def test_nothing_of_it_is_imported_before_it_is_asked_for() -> None:
    script = (
        "import sys, data_bridge.testing.plugin, data_bridge.testing, data_bridge.bridge;"
        "assert not {'mongomock', 'mongomock_motor', 'httpx'} & sys.modules.keys();"
        "from data_bridge.testing import mock_database;"
        "assert 'mongomock_motor' in sys.modules and 'httpx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


async def test_a_bulk_write_shows_what_came_of_it(database: Any) -> None:
    await database.orders.insert_many([{"_id": 1}, {"_id": 2}])
    async with Order.watch() as changes:
        await database.orders.bulk_write(
            [InsertOne({"_id": 3}), UpdateMany({}, {"$set": {"total": 1}}), DeleteOne({"_id": 2})]
        )
        seen = [(change.operation, change.document_id) for change in await taken(changes, 3)]
        assert seen == [("delete", 2), ("update", 1), ("insert", 3)]
        assert await silent(changes)


async def test_what_the_documentation_shows_works() -> None:
    text = (Path(__file__).parent.parent / "docs" / "testing.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(snippet, "docs/testing.md", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        await test()


# -- as a server does ---------------------------------------------------------------------------


async def written(collection: Any) -> AsyncIterator[int]:
    """Each kind of write, and how many changes it brings."""
    write = collection
    await write.insert_one({"nested": {"x": 1, "y": [1, 2]}, "tags": ["a"], "_id": 1})
    yield 1
    await write.update_one({"_id": 1}, {"$set": {"status": "b"}})
    yield 1
    await write.update_one({"_id": 1}, {"$set": {"nested.x": 2.5}, "$unset": {"status": 1}})
    yield 1
    await write.update_one({"_id": 1}, {"$push": {"tags": "b"}})
    yield 1
    await write.update_one({"_id": 1}, {"$pull": {"tags": "a"}})
    yield 1
    await write.update_one({"_id": 1}, {"$set": {"new": [1, {"a": 1}]}})
    yield 1
    await write.replace_one({"_id": 1}, {"status": "c"})
    yield 1
    await write.find_one_and_update({"_id": 1}, {"$inc": {"total": 1}})
    yield 1
    await write.find_one_and_replace({"_id": 1}, {"total": 3})
    yield 1
    await write.update_one({"_id": "two"}, {"$set": {"total": 1}}, upsert=True)
    yield 1
    await write.replace_one({"_id": ObjectId(b"a" * 12)}, {"total": 1}, upsert=True)
    yield 1
    await write.insert_many([{"_id": 4}, {"_id": 5, "placed": datetime(2024, 1, 1, tzinfo=UTC)}])
    yield 2
    await write.update_many({"_id": {"$in": [4, 5]}}, {"$set": {"status": None}})
    yield 2
    await write.delete_one({"_id": 1})
    yield 1
    await write.find_one_and_delete({"_id": 4})
    yield 1
    await write.delete_many({"total": 1})
    yield 2
    await write.rename("elsewhere")
    yield 2
    await write.insert_one({"_id": 9})
    yield 1
    await write.drop()
    yield 2


async def raw_changes(database: Any, model: type[Document], **options: Any) -> list[dict[str, Any]]:
    """The change events of each kind of write, without what is different each time."""
    found: list[dict[str, Any]] = []
    async with connect(database, documents=MODELS), model.watch(**options) as changes:
        async for number in written(model.collection):
            for change in await taken(changes, number):
                raw = {k: v for k, v in change.raw.items() if k not in ("_id", "clusterTime")}
                assert isinstance(raw.pop("wallTime"), datetime)
                for name in {"ns", "to"} & raw.keys():
                    assert raw[name].pop("db") == database.name
                found.append(raw)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"model": Order},
        {"model": Imaged},
        {"model": Order, "full_document": "default"},
        {"model": Order, "full_document_before_change": "whenAvailable"},
        {"model": Imaged, "full_document": "whenAvailable"},
    ],
    ids=str,
)
async def test_changes_are_those_of_a_server(
    replica_set: ReplicaSet, database_name: str, options: dict[str, Any]
) -> None:
    mocked = await raw_changes(mock_database("shop"), **options)
    async with AsyncMongoClient[dict[str, Any]](replica_set.uri) as client:
        real = await raw_changes(client[database_name], **options)
    assert mocked == real
    assert [repr(m) for m in mocked if "to" not in m] == [repr(r) for r in real if "to" not in r]


async def frames(database: Any) -> list[tuple[str, str]]:
    """What browsers are sent while documents change."""
    found: list[tuple[str, str]] = []
    app = App(database=database, documents=MODELS)
    for model in MODELS:
        app.live(f"/{model.__name__}", model, filter=lambda request: OPEN)
    app.live("/window", Order, sort="-total", limit=2)
    app.live("/view", Order, view=Summary)

    @app.get("/changes")
    async def changes() -> EventSourceResponse:
        return EventSourceResponse(Order.watch())

    async with streaming_client(app) as client:
        for model in MODELS:
            await model(id=ObjectId(b"a" * 12), total=1).insert()
        for path in ("/Order", "/Imaged", "/window", "/changes", "/view"):
            model = Imaged if path == "/Imaged" else Order
            number = len(found)
            async with client.stream("GET", path) as response:
                stream = events(response)

                async def seen(until: str, stream: Any = stream) -> None:
                    async with asyncio.timeout(10):
                        async for event in stream:
                            found.append((event.event, event.data))
                            if event.event == until:
                                break

                if path == "/changes":
                    await anext(stream.everything())
                else:
                    await seen("ready")
                document = model(id=ObjectId(b"b" * 12), total=2)
                await document.insert()
                await seen("insert")
                await document.update({"$set": {"total": 3}})
                await seen("update")
                document.total = 4
                await document.replace()
                await seen("replace")
                await document.delete()
                await seen("delete")
            assert len(found) > number + 3
    return found


async def test_what_browsers_are_sent_is_the_same(
    replica_set: ReplicaSet, database_name: str
) -> None:
    mocked = await frames(mock_database("shop"))
    assert mocked == await frames(replica_set.database_uri(database_name))
