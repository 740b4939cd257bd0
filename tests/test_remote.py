"""Live queries whose filter only the server evaluates, on both drivers against a real server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from live_queries import Mongo, eventually, viewing
from pymongo.errors import OperationFailure

import data_bridge
from data_bridge import Document, Limits
from data_bridge.errors import InvalidFilter, OperationFailed, TooManyCursors
from data_bridge.remote import Remote

if TYPE_CHECKING:
    from data_bridge.bridge import Bridge

pytestmark = pytest.mark.timeout(90)


class Shop(Document):
    id: int
    name: str = ""
    sold: int = 0
    stock: int = 0
    place: list[float] | None = None

    class Settings:
        collection = "shops"
        indexes = [[("name", "text")]]  # noqa: RUF012


class Imaged(Document):
    id: int
    sold: int = 0
    stock: int = 0

    class Settings:
        collection = "imaged_shops"
        pre_images = True


SHORT = {"$expr": {"$lt": ["$stock", "$sold"]}}


@pytest.fixture
def shops(mongo: Mongo, database_name: str) -> Any:
    return mongo[database_name]["shops"]


@pytest.mark.parametrize(
    ("filter", "inside", "outside"),
    [
        (SHORT, {"stock": 1, "sold": 2}, {"stock": 2, "sold": 1}),
        ({"$where": "this.stock < this.sold"}, {"stock": 1, "sold": 2}, {"stock": 2, "sold": 1}),
        ({"$text": {"$search": "book"}}, {"name": "Books"}, {"name": "Bread"}),
        (
            {"place": {"$geoWithin": {"$box": [[0, 0], [2, 2]]}}},
            {"place": [1, 1]},
            {"place": [3, 3]},
        ),
        ({"stock": {"$bitsAllSet": 6}}, {"stock": 7}, {"stock": 5}),
        (
            {"$jsonSchema": {"properties": {"stock": {"minimum": 3}}}},
            {"stock": 3},
            {"stock": 2},
        ),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else str(v),
)
async def test_documents_enter_and_leave_as_the_server_has_it(
    bridge: Bridge, shops: Any, filter: Any, inside: Any, outside: Any
) -> None:
    shops.insert_many([{"_id": 1, **inside}, {"_id": 2, **outside}])
    async with viewing(Shop.live(filter)) as viewer:
        assert [row["_id"] for row in viewer.rows.values()] == [1]
        shops.update_one({"_id": 2}, {"$set": inside})
        assert await viewer.take(1) == ["enter"]
        shops.update_one({"_id": 1}, {"$set": outside})
        assert await viewer.take(1) == ["leave"]
        shops.insert_one({"_id": 3, **outside})
        shops.insert_one({"_id": 4, **inside})
        assert await viewer.take(1) == ["insert"]
        shops.replace_one({"_id": 4}, inside)
        assert await viewer.take(1) == ["replace"]
        shops.delete_one({"_id": 3})
        shops.delete_one({"_id": 4})
        assert await viewer.take(1) == ["delete"]
        assert [row["_id"] for row in viewer.rows.values()] == [2]


async def test_with_images_it_is_the_same(bridge: Bridge, mongo: Mongo, database_name: str) -> None:
    collection = mongo[database_name]["imaged_shops"]
    collection.insert_one({"_id": 1, "stock": 1, "sold": 0})
    async with viewing(Imaged.live(SHORT)) as viewer:
        collection.update_one({"_id": 1}, {"$set": {"sold": 2}})
        assert await viewer.take(1) == ["enter"]
        collection.update_one({"_id": 1}, {"$set": {"sold": 3}})
        assert await viewer.take(1) == ["update"]
        collection.drop()
        assert await viewer.take(3) == ["reset", "snapshot", "ready"]


async def test_equal_filters_share_one_query_and_its_questions(
    bridge: Bridge, shops: Any, mongo: Mongo, database_name: str
) -> None:
    async with viewing(Shop.live(SHORT)) as first, viewing(Shop.live(dict(SHORT))) as second:
        assert first.stream._places[0].query is second.stream._places[0].query
        mongo[database_name].command("profile", 2)
        shops.insert_one({"_id": 1, "stock": 0, "sold": 1})
        assert await first.take(1) == await second.take(1) == ["insert"]
        asked = mongo[database_name]["system.profile"].count_documents(
            {"op": "query", "ns": shops.full_name, "command.readConcern.level": "majority"}
        )
        mongo[database_name].command("profile", 0)
        assert asked == 1


async def test_a_filter_that_is_evaluated_in_process_asks_the_server_nothing(
    bridge: Bridge, shops: Any
) -> None:
    async with viewing(Shop.live({"stock": {"$lt": 3}})) as viewer:
        assert not isinstance(viewer.stream._places[0].query, Remote)


async def test_there_is_a_bound_on_their_number(database: Any) -> None:
    limits = Limits(cursors=2, linger=0.1)

    def sold(number: int) -> Any:
        return {"$expr": {"$gt": ["$sold", number]}}

    async with data_bridge.connect(database, limits=limits) as bridge:
        async with bridge.live(Shop, sold(1)), bridge.live(Shop, sold(2)) as second:
            async with bridge.live(Shop, sold(1)):  # shared
                pass
            third = bridge.live(Shop, sold(3))
            with pytest.raises(TooManyCursors, match=r"2 different .*Limits\.cursors"):
                await third.open()
            await third.aclose()
            async with bridge.live(Shop, {"sold": 3}):  # in process
                pass
            await second.aclose()
            (feed,) = bridge._feeds.values()
            router = feed.live()
            await eventually(lambda: router._number(beyond=True) == 1)
            async with bridge.live(Shop, sold(3)):
                pass


async def test_a_burst_is_asked_for_at_once_and_told_in_order(bridge: Bridge, shops: Any) -> None:
    async with viewing(Shop.live(SHORT)) as viewer:
        shops.insert_many([{"_id": n, "stock": 0, "sold": 1} for n in range(3000)])
        assert await viewer.take(3000) == ["insert"] * 3000
        assert [e.document_id for e in viewer.events[2:]] == list(range(3000))
        tokens = [e.resume_token for e in viewer.events[2:]]
        assert tokens == sorted(tokens)  # type: ignore[type-var]


async def test_positions_never_pass_what_the_server_was_not_yet_asked_about(
    bridge: Bridge, shops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, go_on = asyncio.Event(), asyncio.Event()
    real = bridge.driver.find_by_ids

    async def find_by_ids(*args: Any, **options: Any) -> Any:
        held.set()
        await go_on.wait()
        return await real(*args, **options)

    async with viewing(Shop.live(SHORT)) as viewer:
        position = viewer.stream.resume_token
        monkeypatch.setattr(bridge.driver, "find_by_ids", find_by_ids)
        shops.insert_one({"_id": 1, "stock": 0, "sold": 1})
        await held.wait()
        assert position is not None and viewer.stream.resume_token is not None
        before = viewer.stream.resume_token
        go_on.set()
        event = await viewer.next()
        assert event.resume_token is not None and position <= before < event.resume_token


@pytest.mark.parametrize("code", [262, 11602])  # ExceededTimeLimit, InterruptedDueToReplState
async def test_an_error_of_the_server_that_passes_is_waited_for(
    bridge: Bridge, shops: Any, mongo: Mongo, code: int
) -> None:
    async with viewing(Shop.live(SHORT)) as viewer:
        fail: dict[str, Any] = {"configureFailPoint": "failCommand"}
        # Three times: the driver tries once more by itself.
        data = {"failCommands": ["find"], "errorCode": code, "namespace": shops.full_name}
        mongo.admin.command(fail | {"mode": {"times": 3}, "data": data})
        try:
            shops.insert_one({"_id": 1, "stock": 0, "sold": 1})
            assert await viewer.take(1) == ["insert"]
        finally:
            mongo.admin.command(fail | {"mode": "off"})


async def test_an_error_of_the_server_that_does_not_pass_ends_the_query(
    bridge: Bridge, shops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(*args: Any, **options: Any) -> Any:
        raise OperationFailure("$where threw", 139)

    async with viewing(Shop.live({"$where": "this.stock.x.y == 1 || true"})) as viewer:
        monkeypatch.setattr(bridge.driver, "find_by_ids", failing)
        shops.insert_one({"_id": 1})
        with pytest.raises(OperationFailed, match="cannot read shops"):
            await viewer.next()


@pytest.mark.parametrize(
    "filter",
    [
        {"$text": {"$search": "a"}, "sold": 1, "$nor": [{"$text": {"$search": "b"}}]},
        {"$expr": {"$nonsense": 1}},
        {"place": {"$geoWithin": {"$box": 3}}},
        {"place": {"$near": [0, 0]}},
        {"$jsonSchema": {"nonsense": 1}},
        {"stock": {"$bitsAllSet": "x"}},
    ],
    ids=lambda f: next(iter(f)) + str(len(str(f))),
)
async def test_what_the_server_does_not_take_is_no_filter(bridge: Bridge, filter: Any) -> None:
    await Shop(id=1).insert()
    live = Shop.live(filter)
    with pytest.raises(InvalidFilter, match=r"does not take the filter"):
        await live.open()
    await live.aclose()


async def test_text_without_an_index_is_no_filter(bridge: Bridge) -> None:
    await Imaged(id=1).insert()
    live = Imaged.live({"$text": {"$search": "a"}})
    with pytest.raises(InvalidFilter):
        await live.open()
    await live.aclose()


async def test_a_server_that_cannot_keep_up_is_a_reset_not_a_heap(
    database: Any, mongo: Mongo, database_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shops = mongo[database_name]["shops"]
    async with data_bridge.connect(database, limits=Limits(log_entries=50)) as bridge:
        async with viewing(bridge.live(Shop, SHORT)) as viewer:
            real = bridge.driver.find_by_ids
            go_on = asyncio.Event()

            async def find_by_ids(*args: Any, **options: Any) -> Any:
                await go_on.wait()
                return await real(*args, **options)

            monkeypatch.setattr(bridge.driver, "find_by_ids", find_by_ids)
            query = viewer.stream._places[0].query
            for start in range(0, 120, 10):
                ids = range(start, start + 10)
                shops.insert_many([{"_id": n, "stock": 0, "sold": 1} for n in ids])
            await eventually(lambda: query.closed)
            go_on.set()
            await viewer.until("reset")
            await viewer.until("ready")
            await viewer.see(lambda rows: len(rows) == 120)
