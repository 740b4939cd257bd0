"""Which live queries are told of a change: those that it may concern, and no others."""

from __future__ import annotations

from collections import Counter
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from bson import ObjectId
from live_queries import Mongo, Viewer, eventually, viewing

import data_bridge
from data_bridge import Document, Limits
from data_bridge.query import Query

if TYPE_CHECKING:
    from data_bridge.bridge import Bridge

pytestmark = pytest.mark.timeout(90)


class Task(Document):
    tenant: Any = None
    state: str = "open"

    class Settings:
        collection = "tasks"


class Imaged(Document):
    tenant: Any = None
    state: str = "open"

    class Settings:
        collection = "imaged_tasks"
        pre_images = True


BOTH = pytest.mark.parametrize("model", [Task, Imaged], ids=["without images", "with images"])


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How many changes each query was told of, by its filter."""
    found: Counter[Any] = Counter()
    from data_bridge import query, remote

    for kind in (query.Query, remote.Remote):
        real = kind.add

        def add(self: Query, entry: Any, real: Any = real) -> None:
            found[str(self.question.filter.query)] += 1
            real(self, entry)

        monkeypatch.setattr(kind, "add", add)
    return found


def collection(mongo: Mongo, name: str, model: Any) -> Any:
    return mongo[name][model.Settings.collection]


@BOTH
@pytest.mark.parametrize(
    ("filter", "matching"),
    [
        ({"tenant": "a"}, {"tenant": "a"}),
        ({"tenant": None}, {}),
        ({"tenant": 1}, {"tenant": 1.0}),
        ({"tenant": "a"}, {"tenant": ["b", "a"]}),
        ({"tenant.name": "a"}, {"tenant": {"name": "a"}}),
        ({"tenant.name": "a"}, {"tenant": [{"name": "b"}, {"name": ["a"]}]}),
        ({"tenant.0": "a"}, {"tenant": ["a"]}),
        ({"tenant": {"$in": ["x", "a"]}}, {"tenant": "a"}),
        ({"tenant": "a", "state": {"$in": ["open", "new"]}}, {"tenant": "a"}),
        ({"$and": [{"state": "open"}, {"tenant": {"$eq": "a"}}]}, {"tenant": "a"}),
        ({"tenant": {"$all": ["a", "b"]}}, {"tenant": ["a", "b", "c"]}),
    ],
    ids=str,
)
async def test_a_query_with_an_equality_hears_of_what_matches_and_of_nothing_else(
    bridge: Bridge,
    mongo: Mongo,
    database_name: str,
    told: Any,
    model: Any,
    filter: Any,
    matching: Any,
) -> None:
    tasks = collection(mongo, database_name, model)
    async with viewing(model.live(filter)) as viewer, viewing(model.live()) as witness:
        tasks.insert_many([{"tenant": f"t{n}", "state": "closed"} for n in range(20)])
        id = tasks.insert_one({"state": "open", **matching}).inserted_id
        assert await viewer.take(1) == ["insert"]
        tasks.update_one({"_id": id}, {"$set": {"n": 1}})
        assert await viewer.take(1) == ["update"]
        tasks.update_one({"_id": id}, {"$set": {"tenant": "elsewhere", "state": "closed"}})
        assert await viewer.take(1) == ["leave"]
        tasks.update_many({}, {"$set": {"n": 2}})
        tasks.delete_many({})
        await witness.take(21 + 2 + 21 + 21)
        witness_told, query_told = told["{}"], told[str(dict(filter))]
        assert witness_told == 21 + 2 + 21 + 21
        assert query_told == 3


@BOTH
async def test_the_id_is_preferred_and_found(
    bridge: Bridge, mongo: Mongo, database_name: str, told: Any, model: Any
) -> None:
    tasks = collection(mongo, database_name, model)
    ids = [ObjectId() for _ in range(10)]
    filters = [{"state": "open", "_id": id} for id in ids]
    tasks.insert_many([{"_id": id, "state": "open"} for id in ids])
    async with viewing(model.live(filters[3])) as viewer, viewing(model.live(filters[4])):
        assert viewer.stream._places[0].query.route[0] == "_id"
        for id in ids:
            tasks.update_one({"_id": id}, {"$set": {"n": 1}})
        tasks.delete_many({})
        assert await viewer.take(2) == ["update", "delete"]
    assert set(told.values()) == {2}


@BOTH
async def test_a_document_that_moves_between_tenants_leaves_one_and_enters_the_other(
    bridge: Bridge, mongo: Mongo, database_name: str, told: Any, model: Any
) -> None:
    tasks = collection(mongo, database_name, model)
    tasks.insert_one({"_id": (id := ObjectId()), "tenant": "a"})
    async with (
        viewing(model.live({"tenant": "a"})) as a,
        viewing(model.live({"tenant": "b"})) as b,
        viewing(model.live({"tenant": "c"})) as c,
    ):
        for _ in range(3):
            tasks.update_one({"_id": id}, {"$set": {"tenant": "b"}})
            assert await a.take(1) == ["leave"] and await b.take(1) == ["enter"]
            tasks.replace_one({"_id": id}, {"tenant": "a"})
            assert await a.take(1) == ["enter"] and await b.take(1) == ["leave"]
        tasks.delete_one({"_id": id})
        assert await a.take(1) == ["delete"]
        tasks.insert_one({"tenant": "c"})
        assert await c.take(1) == ["insert"]
    assert told["{'tenant': 'c'}"] == 1
    assert not {e.document_id for e in c.events} & {id}


@BOTH
async def test_many_tenants_each_see_their_own_and_no_more(
    bridge: Bridge, mongo: Mongo, database_name: str, told: Any, model: Any
) -> None:
    tasks = collection(mongo, database_name, model)
    lives = [model.live({"tenant": n}) for n in range(50)]
    viewers = []
    for live in lives:
        viewer = Viewer(live)
        await viewer.until("ready")
        viewers.append(viewer)
    tasks.insert_many([{"tenant": n} for n in range(50)])
    tasks.update_many({}, [{"$set": {"tenant": {"$mod": [{"$add": ["$tenant", 1]}, 50]}}}])
    for viewer in viewers:
        assert set(await viewer.take(3)) == {"insert", "leave", "enter"}
        assert len(viewer.rows) == 1
    assert sum(told.values()) == 150
    for live in lives:
        await live.aclose()


@BOTH
async def test_a_drop_is_told_to_everybody(
    bridge: Bridge, mongo: Mongo, database_name: str, model: Any
) -> None:
    tasks = collection(mongo, database_name, model)
    tasks.insert_one({"tenant": "a"})
    async with viewing(model.live({"tenant": "a"})) as a, viewing(model.live({"_id": 7})) as b:
        tasks.drop()
        assert await a.take(3) == await b.take(3) == ["reset", "snapshot", "ready"]


@BOTH
async def test_all_queries_together_keep_no_more_than_the_bound(
    database: Any, mongo: Mongo, database_name: str, model: Any
) -> None:
    tasks = collection(mongo, database_name, model)
    limits = Limits(log_bytes=200_000)
    async with data_bridge.connect(database, limits=limits) as bridge, AsyncExitStack() as stack:
        viewers = []
        for number in range(20):
            live = bridge.live(model, {"n": {"$gt": -number}})
            viewers.append(await stack.enter_async_context(viewing(live)))
        tasks.insert_many([{"n": n} for n in range(1, 201)])
        for viewer in viewers:
            await viewer.take(200)
        logs = [viewer.stream._places[0].query.log for viewer in viewers]
        await eventually(lambda: sum(log.bytes for log in logs) <= limits.log_bytes)
        tasks.insert_one({"n": 201})
        for viewer in viewers:
            assert await viewer.take(1) == ["insert"]
