"""What a watcher of a collection is promised, on both drivers against a real server."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
from bson import ObjectId, Timestamp
from pymongo import MongoClient

import data_bridge
from data_bridge import Change, ChangeStream, Document, Operation, UpdateDescription
from data_bridge.errors import (
    BridgeClosed,
    DocumentInvalid,
    InvalidFilter,
    InvalidPipeline,
    InvalidResumeToken,
    NotBound,
)

if TYPE_CHECKING:
    from data_bridge.bridge import Bridge

pytestmark = pytest.mark.timeout(60)


class Order(Document):
    status: str = "open"
    total: float = 0

    class Settings:
        collection = "watched_orders"


class Imaged(Document):
    status: str = "open"

    class Settings:
        collection = "watched_images"
        pre_images = True


async def taken(stream: ChangeStream[Any], number: int, timeout: float = 20) -> list[Change[Any]]:
    async with asyncio.timeout(timeout):
        return [await anext(stream) for _ in range(number)]


async def operations(stream: ChangeStream[Any], last: str) -> list[str]:
    """What happens up to an operation, by name."""
    found = []
    async with asyncio.timeout(20):
        while not found or found[-1] != last:
            found.append((await anext(stream)).operation)
    return found


@pytest.fixture
def documents(mongo: MongoClient[dict[str, Any]], database_name: str) -> Any:
    """The watched collection, written to by somebody else."""
    return mongo[database_name][Order.Settings.collection]


@pytest.fixture
async def changes(bridge: Bridge) -> AsyncIterator[ChangeStream[Order]]:
    async with Order.watch() as changes:
        yield changes


# -- starting -----------------------------------------------------------------------------------


async def test_async_for_needs_no_await_and_starts_when_the_loop_does(bridge: Bridge) -> None:
    await Order(status="before").insert()
    started = asyncio.Event()
    stream = Order.watch()

    async def loop() -> list[str]:
        found = []
        started.set()
        async for change in stream:
            assert change.full_document is not None
            found.append(change.full_document.status)
            if found[-1] == "last":
                break
        return found

    looping = asyncio.create_task(loop())
    await started.wait()
    while stream.resume_token is None:  # it is open once it has a position
        await asyncio.sleep(0.005)
    for status in ("one", "two", "last"):
        await Order(status=status).insert()

    assert await asyncio.wait_for(looping, 20) == ["one", "two", "last"]


async def test_a_write_acknowledged_after_entry_is_never_missed(bridge: Bridge) -> None:
    for number in range(20):
        async with Order.watch() as changes:
            order = await Order(total=number).insert()
            (change,) = await taken(changes, 1)
        assert change.document_id == order.id


async def test_a_write_acknowledged_before_entry_is_not_delivered(bridge: Bridge) -> None:
    await Order(status="before").insert()
    async with Order.watch() as changes:
        await Order(status="after").insert()
        (change,) = await taken(changes, 1)
    assert change.full_document.status == "after"


async def test_a_stream_has_a_position_from_entry(changes: ChangeStream[Order]) -> None:
    position = changes.resume_token
    assert position is not None
    await Order(status="a").insert()
    async with Order.watch(resume_after=position) as again:
        (change,) = await taken(again, 1)
    assert change.full_document.status == "a"


async def test_the_position_of_a_quiet_stream_moves_on(
    changes: ChangeStream[Order], mongo: MongoClient[dict[str, Any]], database_name: str
) -> None:
    start = changes.resume_token
    assert start is not None
    mongo[database_name]["elsewhere"].insert_one({})
    async with asyncio.timeout(20):
        while (position := changes.resume_token) == start:
            await asyncio.sleep(0.02)
    assert position is not None and position > start


async def test_a_closed_stream_ends_and_keeps_its_position(bridge: Bridge) -> None:
    async with Order.watch() as changes:
        await Order().insert()
        (change,) = await taken(changes, 1)
    assert [c async for c in changes] == []
    assert changes.resume_token is not None and changes.resume_token >= change.resume_token
    with pytest.raises(BridgeClosed, match="this stream was closed"):
        await changes.open()
    await changes.aclose()


async def test_closing_ends_a_wait_of_another_task(changes: ChangeStream[Order]) -> None:
    waiting = asyncio.create_task(anext(changes, None))
    await asyncio.sleep(0)
    await changes.aclose()
    assert await asyncio.wait_for(waiting, 5) is None


async def test_two_tasks_on_one_stream_share_its_changes(bridge: Bridge) -> None:
    stream = Order.watch()
    waiting = [asyncio.create_task(anext(stream)) for _ in range(2)]
    while stream.resume_token is None:
        await asyncio.sleep(0.005)
    await Order.insert_many([Order(status="a"), Order(status="b")])
    found = await asyncio.wait_for(asyncio.gather(*waiting), 20)
    assert {c.full_document.status for c in found if c.full_document} == {"a", "b"}
    await stream.aclose()


async def test_cancelling_a_wait_a_hundred_times_loses_nothing(
    changes: ChangeStream[Order], documents: Any
) -> None:
    found: list[Any] = []
    cancelled = 0

    async def write() -> None:
        for number in range(60):
            await asyncio.to_thread(documents.insert_one, {"_id": number})
            await asyncio.sleep(0.02)

    writing = asyncio.create_task(write())
    while cancelled < 100 or len(found) < 60:
        try:
            found.append((await asyncio.wait_for(anext(changes), 0.02)).document_id)
        except TimeoutError:
            cancelled += 1
    await writing
    assert found == list(range(60))


# -- choosing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["delete", ["delete"], {Operation.DELETE}], ids=str)
async def test_operations_choose_what_is_delivered(bridge: Bridge, wanted: Any) -> None:
    async with Order.watch(
        operations=wanted if isinstance(wanted, str | list) else ["delete"]
    ) as c:
        order = await Order().insert()
        await order.update({"$set": {"status": "b"}})
        await order.delete()
        (change,) = await taken(c, 1)
    assert change.operation is Operation.DELETE


async def test_a_filter_is_met_by_the_document_after_the_change(bridge: Bridge) -> None:
    async with Order.watch(filter={"status": "paid", "total": {"$gte": 10}}) as changes:
        await Order.insert_many([Order(status="paid", total=5), Order(status="open", total=20)])
        order = await Order(status="open", total=10).insert()
        await order.update({"$set": {"status": "paid"}})
        await Order(status="paid", total=11).insert()
        first, second = await taken(changes, 2)
    assert (first.operation, first.document_id) == ("update", order.id)
    assert (second.operation, second.full_document.total) == ("insert", 11)


async def test_a_filter_on_the_id_follows_one_document_to_its_end(bridge: Bridge) -> None:
    order, other = await Order().insert(), await Order().insert()
    async with Order.watch(filter={"_id": order.id}) as changes:
        for each in (other, order):
            await each.update({"$set": {"status": "b"}})
            await each.delete()
        found = await taken(changes, 2)
    assert [(c.operation, c.document_id) for c in found] == [
        ("update", order.id),
        ("delete", order.id),
    ]


async def test_filters_and_operations_share_the_feed(bridge: Bridge) -> None:
    async with Order.watch(), Order.watch(filter={"status": "a"}), Order.watch(operations="drop"):
        assert len(bridge._feeds) == 1


async def test_a_pipeline_is_evaluated_by_the_server(bridge: Bridge) -> None:
    pipeline = [
        {"$match": {"fullDocument.total": {"$gt": 5}}},
        {"$addFields": {"more": "than the server sends by itself"}},
    ]
    async with Order.watch(pipeline=pipeline) as changes:
        await Order.insert_many([Order(total=1), Order(total=6)])
        (change,) = await taken(changes, 1)
    assert change.full_document.total == 6
    assert change.raw["more"] == "than the server sends by itself"


async def test_equal_pipelines_share_a_cursor(bridge: Bridge) -> None:
    def pipeline() -> list[dict[str, Any]]:
        return [
            {"$match": {"fullDocument.at": Timestamp(1, 2), "documentKey._id": ObjectId(b"a" * 12)}}
        ]

    async with Order.watch(pipeline=pipeline()), Order.watch(pipeline=pipeline()):
        assert len(bridge._feeds) == 1
        async with Order.watch(pipeline=[{"$match": {}}]):
            assert len(bridge._feeds) == 2


# -- images -------------------------------------------------------------------------------------


async def test_updates_carry_the_document_as_it_is_unless_told_otherwise(bridge: Bridge) -> None:
    order = await Order().insert()
    async with Order.watch() as looked_up, Order.watch(full_document="default") as plain:
        await order.update({"$set": {"status": "b"}, "$unset": {"total": ""}})
        (full,) = await taken(looked_up, 1)
        (bare,) = await taken(plain, 1)
    assert full.full_document.status == "b"
    assert bare.full_document is None and bare.document is None
    assert bare.update_description == UpdateDescription({"status": "b"}, ["total"], [])


async def test_images_are_those_of_the_change_where_the_collection_keeps_them(
    bridge: Bridge,
) -> None:
    async with Imaged.watch() as changes:
        order = await Imaged(status="a").insert()
        await order.update({"$set": {"status": "b"}})
        await order.update({"$set": {"status": "c"}})
        await order.delete()
        found = await taken(changes, 4)

    def status(order: Imaged | None) -> str | None:
        return order and order.status

    assert [
        (c.operation, status(c.full_document_before_change), status(c.full_document)) for c in found
    ] == [("insert", None, "a"), ("update", "a", "b"), ("update", "b", "c"), ("delete", "c", None)]


async def test_images_that_are_required_and_not_kept_end_the_stream_with_the_remedy(
    bridge: Bridge,
) -> None:
    order = await Order().insert()
    async with Order.watch(full_document="required") as changes:
        await order.update({"$set": {"status": "b"}})
        with pytest.raises(InvalidPipeline, match="Settings.pre_images = True"):
            await taken(changes, 1)


# -- every operation ----------------------------------------------------------------------------


async def test_documents_inserted_updated_replaced_and_deleted(
    changes: ChangeStream[Order], database_name: str
) -> None:
    order = await Order(status="a", total=1).insert()
    await order.update({"$set": {"status": "b"}})
    await Order(id=order.id, status="c", total=3).replace()
    await order.delete()
    inserted, updated, replaced, deleted = await taken(changes, 4)

    assert inserted.operation is Operation.INSERT
    assert inserted.full_document == Order(id=order.id, status="a", total=1)
    assert inserted.document == {"id": str(order.id), "status": "a", "total": 1.0}
    assert inserted.namespace == f"{database_name}.watched_orders"
    assert inserted.wall_time is not None and inserted.wall_time.tzinfo is not None
    assert inserted.update_description is None and inserted.full_document_before_change is None
    assert updated.operation is Operation.UPDATE
    assert updated.update_description == UpdateDescription({"status": "b"}, [], [])
    assert replaced.operation is Operation.REPLACE
    assert replaced.full_document == Order(id=order.id, status="c", total=3)
    assert deleted.operation is Operation.DELETE
    assert deleted.full_document is None
    tokens = [c.resume_token for c in (inserted, updated, replaced, deleted)]
    assert tokens == sorted(tokens) and len(set(tokens)) == 4
    assert {c.document_id for c in (inserted, updated, replaced, deleted)} == {order.id}
    assert json.dumps(inserted.document)


async def test_a_drop_invalidates_and_the_stream_goes_on(
    changes: ChangeStream[Order], documents: Any
) -> None:
    documents.insert_one({"_id": 1})
    documents.drop()
    documents.insert_one({"_id": 2})
    found = await taken(changes, 4)
    assert [c.operation for c in found] == ["insert", "drop", "invalidate", "insert"]
    assert found[1].operation is Operation.DROP and found[1].document_id is None
    assert found[3].document_id == 2
    assert found[2].resume_token.is_invalidate


async def test_a_rename_invalidates_and_the_stream_goes_on(
    changes: ChangeStream[Order], documents: Any
) -> None:
    documents.insert_one({"_id": 1})
    documents.rename("elsewhere")
    documents.insert_one({"_id": 2})
    found = await taken(changes, 4)
    assert [c.operation for c in found] == ["insert", "rename", "invalidate", "insert"]
    assert found[1].raw["to"]["coll"] == "elsewhere"


async def test_a_dropped_database_invalidates_and_the_stream_goes_on(
    changes: ChangeStream[Order], documents: Any
) -> None:
    documents.insert_one({"_id": 1})
    documents.database.client.drop_database(documents.database.name)
    documents.insert_one({"_id": 2})
    assert await operations(changes, "invalidate") == ["insert", "drop", "invalidate"]
    assert (await taken(changes, 1))[0].document_id == 2


@pytest.mark.parametrize("last", ["drop", "invalidate"])
async def test_a_stream_resumes_from_the_end_of_a_collection(
    bridge: Bridge, documents: Any, last: str
) -> None:
    async with Order.watch() as changes:
        documents.insert_one({"_id": 1})
        documents.drop()
        documents.insert_one({"_id": 2})
        found = await taken(changes, 4)
    (position,) = [c.resume_token for c in found if c.operation == last]
    rest = [c.operation for c in found if c.resume_token > position]
    async with data_bridge.connect(bridge.driver.database, documents=[Order]) as other:
        async with other.watch(Order, resume_after=str(position)) as again:
            assert [c.operation for c in await taken(again, len(rest))] == rest


async def test_expanded_events_come_when_they_are_asked_for(bridge: Bridge, documents: Any) -> None:
    async with Order.watch(show_expanded_events=True) as changes:
        documents.database.create_collection(documents.name)
        documents.create_index("status", name="by_status")
        documents.database.command({"collMod": documents.name, "validationLevel": "moderate"})
        documents.drop_index("by_status")
        documents.insert_one({})
        found = await operations(changes, "insert")
    assert found == ["create", "createIndexes", "modify", "dropIndexes", "insert"]
    assert all(isinstance(o, Operation) for o in found)


async def test_an_operation_that_nobody_knows_yet_is_delivered_by_its_name(bridge: Bridge) -> None:
    pipeline = [{"$addFields": {"operationType": "frobnicate", "news": {"from": "the future"}}}]
    async with Order.watch(pipeline=pipeline) as changes:
        await Order().insert()
        (change,) = await taken(changes, 1)
    assert change.operation == "frobnicate" and not isinstance(change.operation, Operation)
    assert change.raw["news"] == {"from": "the future"}


async def test_the_changes_of_a_transaction_come_in_order_and_each_once(
    changes: ChangeStream[Order], documents: Any
) -> None:
    documents.insert_one({"_id": "first"})
    with documents.database.client.start_session() as session, session.start_transaction():
        documents.insert_many([{"_id": n} for n in range(50)], session=session)
        documents.update_one({"_id": 0}, {"$set": {"status": "b"}}, session=session)
        documents.delete_one({"_id": 1}, session=session)
    documents.insert_one({"_id": "last"})
    found = await taken(changes, 54)
    assert [(c.operation, c.document_id) for c in found] == [
        ("insert", "first"),
        *(("insert", n) for n in range(50)),
        ("update", 0),
        ("delete", 1),
        ("insert", "last"),
    ]
    assert len({c.timestamp for c in found[1:-1]}) == 1

    # … and a token from its middle goes on after exactly that one.
    async with Order.watch(resume_after=str(found[20].resume_token)) as again:
        assert [c.document_id for c in await taken(again, 33)] == [
            c.document_id for c in found[21:]
        ]
    # A time is before all of it.
    async with Order.watch(resume_after=str(found[20].timestamp)) as again:
        assert [c.document_id for c in await taken(again, 53)] == [c.document_id for c in found[1:]]


async def test_an_aborted_transaction_is_not_seen(
    changes: ChangeStream[Order], documents: Any
) -> None:
    with documents.database.client.start_session() as session:
        session.start_transaction()
        documents.insert_one({"_id": 1}, session=session)
        session.abort_transaction()
    documents.insert_one({"_id": 2})
    assert [c.document_id for c in await taken(changes, 1)] == [2]


# -- documents that do not fit ------------------------------------------------------------------


async def test_a_document_that_does_not_fit_fails_only_its_own_full_document(
    changes: ChangeStream[Order], documents: Any, caplog: pytest.LogCaptureFixture
) -> None:
    documents.insert_one({"_id": "odd", "status": ["secret"], "total": "much"})
    documents.insert_one({"_id": ObjectId(), "status": "fits"})
    odd, fits = await taken(changes, 2)

    for _ in range(2):
        with pytest.raises(DocumentInvalid, match="Order odd") as misfit:
            _ = odd.full_document
        assert misfit.value.document_id == "odd"
    with caplog.at_level(logging.WARNING, "data_bridge"):
        assert odd.document is None and odd.document is None
    assert len(caplog.records) == 1 and "secret" not in caplog.text
    assert odd.document_id == "odd" and odd.raw["fullDocument"]["total"] == "much"
    assert fits.full_document.status == "fits"


async def test_values_that_python_cannot_hold_do_not_end_the_stream(
    changes: ChangeStream[Order], documents: Any
) -> None:
    from bson.datetime_ms import DatetimeMS
    from bson.raw_bson import RawBSONDocument

    documents.insert_one({"_id": 1, "when": DatetimeMS(2**62)})
    # {"_id": 2, "s": "\xff"}, a string that is not UTF-8
    raw = b"\x17\x00\x00\x00\x10_id\x00\x02\x00\x00\x00\x02s\x00\x02\x00\x00\x00\xff\x00\x00"
    documents.insert_one(RawBSONDocument(raw))
    documents.insert_one({"_id": 3})
    found = await taken(changes, 3)
    assert [c.document_id for c in found] == [1, 2, 3]
    assert found[1].raw["fullDocument"]["s"] == "�"


async def test_two_models_of_one_collection_each_see_their_own(bridge: Bridge) -> None:
    class Short(Document):
        status: str

        class Settings:
            collection = Order.Settings.collection

    async with Order.watch() as orders, Short.watch() as shorts:
        await Order(status="a").insert()
        (order,), (short,) = await taken(orders, 1), await taken(shorts, 1)
        assert len(bridge._feeds) == 1
    assert type(order.full_document) is Order and type(short.full_document) is Short


async def test_watchers_of_one_model_share_the_validated_document(bridge: Bridge) -> None:
    async with Order.watch() as one, Order.watch() as other:
        await Order(status="a").insert()
        assert (await taken(one, 1))[0].full_document is (await taken(other, 1))[0].full_document


# -- bad arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"operations": []}, ValueError, "operations= is empty"),
        ({"operations": ["insret"]}, ValueError, "'insret', which is none of create, "),
        ({"operations": [1]}, ValueError, "operations= has 1"),
        ({"full_document": "yes"}, ValueError, "full_document is one of default, updateLookup"),
        ({"full_document": "off"}, ValueError, "full_document is one of"),
        ({"full_document_before_change": "updateLookup"}, ValueError, "before_change is one of"),
        ({"filter": "status"}, InvalidFilter, "a filter for Order is a dict"),
        ({"filter": {"$nonsense": 1}}, InvalidFilter, "nonsense"),
        ({"filter": {"$where": "true"}}, InvalidFilter, "pipeline="),
        ({"pipeline": {"$match": {}}}, InvalidPipeline, "a list of stages"),
        ({"pipeline": ["$match"]}, InvalidPipeline, "a list of stages"),
        ({"pipeline": 3}, InvalidPipeline, "a list of stages"),
        ({"pipeline": [{"$match": {"a": 1j}}]}, InvalidPipeline, "BSON"),
        ({"resume_after": ""}, InvalidResumeToken, "between 1 and"),
        ({"resume_after": "nonsense"}, InvalidResumeToken, "no resume token"),
        ({"resume_after": 3}, InvalidResumeToken, "not <class 'int'>"),
        ({"resume_after": {"_data": 3}}, InvalidResumeToken, "looks like"),
    ],
    ids=str,
)
async def test_arguments_that_mean_nothing_are_refused_at_once(
    bridge: Bridge, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Order.watch(**options)
    assert not bridge._feeds


@pytest.mark.parametrize(
    "pipeline", [[{"$nonsense": 1}], [{"$group": {"_id": 1}}], [{"$match": {"$foo": 1}}]], ids=str
)
async def test_a_pipeline_that_the_server_refuses_is_refused_on_entry(
    bridge: Bridge, pipeline: list[dict[str, Any]]
) -> None:
    with pytest.raises(InvalidPipeline, match="the server refuses the pipeline") as refused:
        async with Order.watch(pipeline=pipeline):
            pass
    assert refused.value.__cause__ is not None
    assert not bridge._feeds


@pytest.mark.parametrize("removed", ["_id", "operationType"])
async def test_a_pipeline_may_not_remove_what_a_stream_stands_on(
    bridge: Bridge, removed: str
) -> None:
    async with Order.watch(pipeline=[{"$unset": removed}]) as changes:
        await Order().insert()
        with pytest.raises(InvalidPipeline, match=removed):
            await taken(changes, 1)
    assert not bridge._feeds


async def test_watching_needs_an_open_bridge() -> None:
    with pytest.raises(NotBound, match="Order is not connected"):
        Order.watch()
