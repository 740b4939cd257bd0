"""The first so many of an order: against a sorted list, and against the server's own order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from bson import Decimal128, ObjectId
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from live_queries import PATIENCE, Mongo, Viewer, eventually, profiled, viewing

import data_bridge
from data_bridge import Document, Limits
from data_bridge.errors import InvalidFilter, ServerUnreachable
from data_bridge.order import key
from data_bridge.window import Window, sort_key

if TYPE_CHECKING:
    from data_bridge.bridge import Bridge

pytestmark = pytest.mark.timeout(90)


class Score(Document):
    id: int
    points: int = 0
    game: str = "chess"

    class Settings:
        collection = "scores"


class Imaged(Document):
    id: int
    points: int = 0
    game: str = "chess"

    class Settings:
        collection = "imaged_scores"
        pre_images = True


BOTH = pytest.mark.parametrize("model", [Score, Imaged], ids=["without images", "with images"])
BEST = {"sort": "-points", "limit": 3}


@pytest.fixture
def raw(mongo: Mongo, database_name: str) -> Callable[[Any], Any]:
    return lambda model: mongo[database_name][model.Settings.collection]


# -- against a plain list -----------------------------------------------------------------------

_STEPS = st.lists(
    st.tuples(st.integers(0, 15), st.none() | st.integers(0, 6)), min_size=1, max_size=80
)


@settings(max_examples=300, deadline=None)
@given(steps=_STEPS, limit=st.integers(1, 4), spare=st.integers(1, 3), down=st.booleans())
def test_a_window_sees_what_a_sorted_list_begins_with(
    steps: list[tuple[int, int | None]], limit: int, spare: int, down: bool
) -> None:
    sort = [("v", -1 if down else 1)]
    members: set[Hashable] = set()
    window = Window(sort, limit, spare, members.add, members.discard)
    database: dict[int, dict[str, Any]] = {}

    def first(number: int) -> list[dict[str, Any]]:
        ordered = sorted(database.values(), key=lambda d: (-d["v"] if down else d["v"], d["_id"]))
        return ordered[:number]

    for id, value in steps:
        document = None if value is None else {"_id": id, "v": value}
        if document is None:
            database.pop(id, None)
        else:
            database[id] = document
        held = window.put(key(id), document)
        assert held is (key(id) in window.documents)
        if window.short:
            found = first(limit + spare)
            window.fill(found, complete=len(found) < limit + spare)
            assert not window.short
        assert [window.documents[m] for m in window.seen()] == first(limit)
        assert members == set(window.documents)
        assert len(window.documents) <= limit + 2 * spare


# -- against the server -------------------------------------------------------------------------

_VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([1.0, 2.5, -0.0, float("nan"), float("inf"), Decimal128("2.50")]),
    st.sampled_from(["", "a", "b", "B", "ä", "10", "9"]),
    st.sampled_from([datetime(2024, 1, 1, tzinfo=UTC), datetime(1960, 1, 1, tzinfo=UTC)]),
    st.sampled_from([ObjectId("0" * 24), ObjectId("f" * 24), b"ab", b"b"]),
)
_NESTED = st.recursive(
    _VALUES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["b", "c"]), inner, max_size=2)
    ),
    max_leaves=4,
)
_DOCUMENTS = st.lists(
    st.dictionaries(st.sampled_from(["a", "b"]), _NESTED, max_size=2), min_size=2, max_size=25
)
_SORTS = st.sampled_from(
    [
        [("a", 1)],
        [("a", -1)],
        [("a.b", 1)],
        [("a.b", -1)],
        [("a.0", 1)],
        [("b", -1), ("_id", -1)],
    ]
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(documents=_DOCUMENTS, sort=_SORTS)
@example(documents=[{"a": [[None]]}, {}, {"a": [[]]}, {"a": [[1, 2]]}], sort=[("a.0", 1)])
@example(documents=[{"a": [[None]]}, {}, {"a": [[]]}, {"a": [[1, 2]]}], sort=[("a.0", -1)])
@example(documents=[{"a": []}, {}, {"a": [[]]}, {"a": [1, [2]]}], sort=[("a", -1)])
def test_documents_are_ordered_as_the_server_orders_them(
    mongo: Mongo, database_name: str, documents: list[dict[str, Any]], sort: list[tuple[str, int]]
) -> None:
    collection = mongo[database_name]["ordered"]
    collection.delete_many({})
    collection.insert_many([{"_id": n, **document} for n, document in enumerate(documents)])
    last = [] if sort[-1][0] == "_id" else [("_id", 1)]
    theirs = list(collection.find(sort=[*sort, *last]))
    ours = sorted(theirs, key=lambda d: (*sort_key(d, sort), key(d["_id"])))
    assert [d["_id"] for d in ours] == [d["_id"] for d in theirs], theirs


# -- a live window ------------------------------------------------------------------------------


def seen(viewer: Viewer) -> list[int]:
    """The rows as a page orders them."""
    return [
        row["_id"] for row in sorted(viewer.rows.values(), key=lambda r: (-r["points"], r["_id"]))
    ]


@BOTH
async def test_a_window_shows_the_first_and_follows_them(
    bridge: Bridge, model: Any, raw: Any
) -> None:
    raw(model).insert_many([{"_id": n, "points": n * 10, "game": "chess"} for n in range(10)])
    async with viewing(model.live(**BEST)) as viewer:
        assert seen(viewer) == [9, 8, 7]
        assert [d.id for d in viewer.events[0].documents] == [9, 8, 7]
        raw(model).update_one({"_id": 0}, {"$set": {"points": 85}})
        assert await viewer.take(2) == ["leave", "enter"]
        assert seen(viewer) == [9, 0, 8]
        raw(model).update_one({"_id": 8}, {"$set": {"points": 95}})
        assert await viewer.take(1) == ["update"]
        assert seen(viewer) == [8, 9, 0]
        raw(model).insert_one({"_id": 10, "points": 100, "game": "chess"})
        assert await viewer.take(2) == ["leave", "insert"]
        raw(model).delete_one({"_id": 8})
        assert await viewer.take(2) == ["delete", "enter"]
        assert seen(viewer) == [10, 9, 0]
        raw(model).update_one({"_id": 10}, {"$set": {"points": 1}})
        assert await viewer.take(2) == ["leave", "enter"]
        assert seen(viewer) == [9, 0, 7]
        assert all(e.resume_token is None for e in viewer.events)


@BOTH
async def test_changes_outside_of_a_window_are_nobodys_business(
    bridge: Bridge, model: Any, raw: Any
) -> None:
    raw(model).insert_many([{"_id": n, "points": n, "game": "chess"} for n in range(10)])
    async with viewing(model.live({"game": "chess"}, **BEST)) as viewer:
        raw(model).update_one({"_id": 1}, {"$set": {"points": 2}})
        raw(model).insert_one({"_id": 20, "points": 99, "game": "go"})
        raw(model).delete_one({"_id": 2})
        raw(model).update_one({"_id": 9}, {"$set": {"points": 10}})
        event = await viewer.next()
        assert (event.operation, event.document_id) == ("update", 9)


@BOTH
async def test_documents_that_stop_to_match_give_their_place_to_the_next(
    bridge: Bridge, model: Any, raw: Any
) -> None:
    raw(model).insert_many([{"_id": n, "points": n, "game": "chess"} for n in range(5)])
    async with viewing(model.live({"game": "chess"}, **BEST)) as viewer:
        raw(model).update_one({"_id": 4}, {"$set": {"game": "go"}})
        assert await viewer.take(2) == ["leave", "enter"]
        assert seen(viewer) == [3, 2, 1]
        raw(model).update_one({"_id": 4}, {"$set": {"game": "chess"}})
        assert await viewer.take(2) == ["leave", "enter"]
        assert seen(viewer) == [4, 3, 2]


@BOTH
async def test_among_equals_the_id_decides(bridge: Bridge, model: Any, raw: Any) -> None:
    raw(model).insert_many([{"_id": n, "points": 1} for n in (5, 6, 7, 8)])
    async with viewing(model.live(**BEST)) as viewer:
        assert seen(viewer) == [5, 6, 7]
        raw(model).insert_one({"_id": 1, "points": 1})
        assert await viewer.take(2) == ["leave", "insert"]
        assert seen(viewer) == [1, 5, 6]


@BOTH
async def test_a_window_that_runs_short_is_read_again(
    bridge: Bridge, model: Any, raw: Any, mongo: Mongo, database_name: str
) -> None:
    raw(model).insert_many([{"_id": n, "points": n, "game": "chess"} for n in range(60)])
    async with profiled(mongo, database_name) as snapshots:
        async with viewing(model.live(**BEST)) as viewer:
            for top in range(59, 9, -1):
                raw(model).delete_one({"_id": top})
            await viewer.see(lambda rows: seen(viewer) == [9, 8, 7])
        assert 2 <= len(snapshots()) <= 6


@BOTH
async def test_a_window_that_nothing_is_left_for_runs_empty_and_fills_again(
    bridge: Bridge, model: Any, raw: Any
) -> None:
    raw(model).insert_many([{"_id": n, "points": n} for n in range(30)])
    async with viewing(model.live(**BEST)) as viewer:
        raw(model).delete_many({})
        await viewer.see(lambda rows: not rows)
        raw(model).insert_many([{"_id": n, "points": n} for n in range(5)])
        await viewer.see(lambda rows: seen(viewer) == [4, 3, 2])


@BOTH
async def test_a_window_ends_as_the_database_does_after_a_storm(
    bridge: Bridge, model: Any, raw: Any
) -> None:
    import random

    chance = random.Random(7)
    collection = raw(model)
    collection.insert_many([{"_id": n, "points": n % 7, "game": "chess"} for n in range(40)])
    async with viewing(model.live({"game": "chess"}, **BEST)) as viewer:

        def storm() -> None:
            for number in range(400):
                one = {"_id": chance.randrange(40)}
                match chance.randrange(5):
                    case 0:
                        collection.delete_one(one)
                    case 1:
                        game = chance.choice(["chess", "go"])
                        collection.update_one(one, {"$set": {"game": game}}, upsert=True)
                    case 2 | 3:
                        points = {"points": chance.randrange(50)}
                        collection.update_one(one, {"$set": points})
                    case 4:
                        document = {"points": chance.randrange(50), "game": "chess", "n": number}
                        collection.replace_one(one, document, upsert=True)

        await asyncio.to_thread(storm)
        for id in (101, 102, 103):
            collection.insert_one({"_id": id, "points": id * 10, "game": "chess"})
        await viewer.see(lambda rows: seen(viewer) == [103, 102, 101])
        collection.delete_many({"_id": {"$gt": 100}})

        def best() -> list[Any]:
            found = collection.find({"game": "chess"}, sort=[("points", -1), ("_id", 1)], limit=3)
            return [d["_id"] for d in found]

        await viewer.see(lambda rows: not any(row["_id"] > 100 for row in rows.values()))
        await viewer.see(lambda rows: seen(viewer) == best())
        assert "reset" not in viewer.operations()


@BOTH
async def test_a_window_starts_over_after_a_drop(bridge: Bridge, model: Any, raw: Any) -> None:
    raw(model).insert_many([{"_id": n, "points": n} for n in range(5)])
    async with viewing(model.live(**BEST)) as viewer:
        raw(model).drop()
        assert await viewer.take(3) == ["reset", "snapshot", "ready"]
        raw(model).insert_one({"_id": 1, "points": 1})
        assert await viewer.take(1) == ["insert"]
        assert seen(viewer) == [1]


@pytest.mark.parametrize("filter", [{"game": "chess"}, None], ids=["by value", "everything"])
async def test_what_changes_while_a_window_is_read_is_not_missed(
    bridge: Bridge, raw: Any, monkeypatch: pytest.MonkeyPatch, filter: Any
) -> None:
    from data_bridge import window

    collection = raw(Score)
    collection.insert_many([{"_id": n, "points": n, "game": "chess"} for n in range(5)])
    read, go_on = asyncio.Event(), asyncio.Event()
    real = window.read_snapshot

    async def held(*args: Any, **options: Any) -> Any:
        found = await real(*args, **options)
        read.set()
        await go_on.wait()
        return found

    monkeypatch.setattr(window, "read_snapshot", held)
    live = Score.live(filter, **BEST)
    opening = asyncio.create_task(live.open())
    await asyncio.wait_for(read.wait(), PATIENCE)
    collection.update_one({"_id": 4}, {"$set": {"game": "go", "points": -1}})
    feed = bridge._feeds[live.scope]
    await eventually(lambda: feed.log is not None and feed.log.end >= 1)
    go_on.set()
    await opening
    viewer = Viewer(live)
    await viewer.see(lambda rows: seen(viewer) == [3, 2, 1])
    await live.aclose()


async def test_equal_windows_share_one_and_its_snapshot(
    bridge: Bridge, raw: Any, mongo: Mongo, database_name: str
) -> None:
    raw(Score).insert_many([{"_id": n, "points": n} for n in range(5)])
    async with profiled(mongo, database_name) as snapshots:
        streams = [Score.live(**BEST) for _ in range(50)]
        await asyncio.gather(*(stream.open() for stream in streams))
        assert len(snapshots()) == 1
        assert len({id(stream._places[0].query) for stream in streams}) == 1
    await asyncio.gather(*(stream.aclose() for stream in streams))


async def test_a_window_that_cannot_be_read_is_an_error_for_those_who_open_it(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_bridge import window

    real = window.read_snapshot

    async def failing(*args: Any, **options: Any) -> Any:
        raise ServerUnreachable("away")

    monkeypatch.setattr(window, "read_snapshot", failing)
    live = Score.live(**BEST)
    with pytest.raises(ServerUnreachable):
        await live.open()
    await live.aclose()
    monkeypatch.setattr(window, "read_snapshot", real)
    async with viewing(Score.live(**BEST)) as viewer:
        assert viewer.rows == {}


# -- what is none -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sort": "points", "limit": 0}, "a number from 1 to 1000 .Limits.window., not 0"),
        ({"sort": "points", "limit": -1}, "a number from 1 to 1000"),
        ({"sort": "points", "limit": 1001}, "a number from 1 to 1000"),
        ({"sort": "points", "limit": 2.0}, "a number from 1 to 1000"),
        ({"sort": "points", "limit": True}, "a number from 1 to 1000"),
        ({"limit": 3}, "has a limit and no sort"),
        ({"sort": [], "limit": 3}, "has a limit and no sort"),
        ({"sort": [("points", "text")], "limit": 3}, "cannot be sorted by 'points' as 'text'"),
        ({"sort": 3}, "cannot be sorted by 3"),
        ({"filter": {"$where": "true"}, "sort": "points", "limit": 3}, r"\$where"),
    ],
    ids=str,
)
async def test_a_window_that_cannot_be_is_refused_at_once(
    bridge: Bridge, options: Any, message: str
) -> None:
    with pytest.raises(InvalidFilter, match=message):
        Score.live(**options)


async def test_the_bound_of_a_window_is_a_limit_of_the_bridge(database: Any) -> None:
    async with data_bridge.connect(database, limits=Limits(window=2)) as bridge:
        bridge.live(Score, sort="points", limit=2)
        with pytest.raises(InvalidFilter, match="1 to 2"):
            bridge.live(Score, sort="points", limit=3)
