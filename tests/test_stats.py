"""The figures of a running bridge: as objects, as OpenTelemetry metrics, and as lines in a log."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from pymongo import MongoClient
from watching import failpoint, ids_until, taken, until

import data_bridge
from data_bridge import Document, Limits
from data_bridge.errors import ResumeHistoryLost
from data_bridge.metrics import instrument
from data_bridge.stats import FeedStats

if TYPE_CHECKING:
    from data_bridge.bridge import Bridge

AFTER_CHECKOUT = "failGetMoreAfterCursorCheckout"


class Thing(Document):
    id: Any = None

    class Settings:
        collection = "counted_things"


@pytest.fixture
def documents(mongo: MongoClient[dict[str, Any]], database_name: str) -> Any:
    return mongo[database_name][Thing.Settings.collection]


def only(bridge: Bridge) -> FeedStats:
    (stats,) = bridge.stats().feeds
    return stats


async def test_a_bridge_that_nobody_watches_has_no_feeds(bridge: Bridge) -> None:
    assert bridge.stats().feeds == () and bridge.stats().subscribers == 0


async def test_a_feed_counts_what_it_holds_and_who_reads_it(
    bridge: Bridge, documents: Any, database_name: str
) -> None:
    async with Thing.watch() as one, Thing.watch():
        documents.insert_many([{"_id": n} for n in range(10)])
        found = await taken(one, 10)
        stats = only(bridge)
        assert stats.name == f"{database_name}.counted_things" and not stats.own
        assert stats.subscribers == bridge.stats().subscribers == 2
        assert stats.position is not None and stats.position >= found[-1].resume_token
        assert stats.log_entries == 10 and stats.log_bytes > 10 * 1024
        assert stats.lag is not None and stats.lag >= 0
        assert (stats.catching_up, stats.catch_ups, stats.resets, stats.reopened) == (0, 0, 0, 0)
        await until(lambda: only(bridge).lag == 0)


async def test_a_feed_that_still_opens_has_no_position(bridge: Bridge) -> None:
    stream = Thing.watch()
    opening = asyncio.create_task(stream.open())
    await asyncio.sleep(0)
    stats = only(bridge)
    assert (stats.position, stats.lag, stats.log_entries) == (None, None, 0)
    await opening
    await stream.aclose()


async def test_lag_grows_with_the_silence_of_the_server(bridge: Bridge) -> None:
    async with Thing.watch():
        (feed,) = bridge._feeds.values()
        feed.source.heard -= 100
        lag = only(bridge).lag
        assert lag is not None and 90 < lag < 110


async def test_lag_is_how_far_the_cluster_is_ahead_by_its_own_clock(bridge: Bridge) -> None:
    from bson import Timestamp

    async with Thing.watch():
        (feed,) = bridge._feeds.values()
        assert feed.log is not None
        feed.source.cluster_time = Timestamp(feed.log.head.cluster_time.time + 7, 0)
        assert 7 <= (only(bridge).lag or 0) < 30


async def test_catch_ups_resets_interruptions_and_slow_readers_are_counted(
    database: Any, mongo: MongoClient[dict[str, Any]], documents: Any
) -> None:
    async with data_bridge.connect(database, limits=Limits(log_entries=5)) as bridge:
        async with Thing.watch() as one, Thing.watch() as other:
            documents.insert_many([{"_id": n} for n in range(100)])
            assert await ids_until(one, 99) == await ids_until(other, 99) == list(range(100))
            assert only(bridge).catch_ups >= 1
            await until(lambda: only(bridge).catching_up == 0)
            with failpoint(mongo, AFTER_CHECKOUT, {"times": 1}, errorCode=286):
                with pytest.raises(ResumeHistoryLost):
                    await taken(one, 1)
            with failpoint(mongo, AFTER_CHECKOUT, {"times": 1}, errorCode=6):
                await until(lambda: only(bridge).reopened == 1)
            other.stalled()
            stats = only(bridge)
            assert (stats.resets, stats.reopened, stats.slow_readers) == (1, 1, 1)


async def test_stats_may_be_asked_for_from_another_thread(bridge: Bridge) -> None:
    async with Thing.watch():
        assert (await asyncio.to_thread(bridge.stats)).subscribers == 1


# -- OpenTelemetry ------------------------------------------------------------------------------


async def test_the_same_figures_are_metrics(
    bridge: Bridge, documents: Any, database_name: str
) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    instrument(bridge, provider.get_meter("test"))
    pipelines: list[Any] = [[{"$match": {"a": n}}] for n in range(2)]
    async with Thing.watch() as changes, Thing.watch(pipeline=pipelines[0]):
        async with Thing.watch(pipeline=pipelines[1]):
            documents.insert_one({"_id": 1})
            await taken(changes, 1)
            found = await asyncio.to_thread(points, reader)
    name = f"{database_name}.counted_things"
    assert found["data_bridge.feed.subscribers"] == {(name, False): 1, (name, True): 2}
    assert found["data_bridge.feed.log.entries"] == {(name, False): 1, (name, True): 0}
    assert found["data_bridge.feed.log.size"][name, False] > 1024
    assert found["data_bridge.feed.lag"][name, False] >= 0
    for ever in ("catch_ups", "reopened", "resets", "slow_readers"):
        assert found[f"data_bridge.feed.{ever}"] == {(name, False): 0, (name, True): 0}
    assert found["data_bridge.feed.catch_ups.open"] == {(name, False): 0, (name, True): 0}
    provider.shutdown()


def points(reader: InMemoryMetricReader) -> dict[str, dict[tuple[str, bool], float]]:
    assert threading.current_thread() is not threading.main_thread()
    data: Any = reader.get_metrics_data()
    found: dict[str, dict[tuple[str, bool], float]] = {}
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        for point in metric.data.data_points:
            key = point.attributes["data_bridge.feed"], point.attributes["data_bridge.feed.own"]
            found.setdefault(metric.name, {})[key] = point.value
    return found


# -- the log ------------------------------------------------------------------------------------


async def test_each_turn_of_a_feed_is_one_structured_line_and_no_event_is(
    database: Any,
    mongo: MongoClient[dict[str, Any]],
    documents: Any,
    database_name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "data_bridge")
    async with data_bridge.connect(database, documents=[Thing]):
        async with Thing.watch() as changes:
            documents.insert_many([{"_id": n} for n in range(100)])
            await ids_until(changes, 99)
            with failpoint(mongo, AFTER_CHECKOUT, {"times": 1}, errorCode=6):
                await until(lambda: "interrupted" in caplog.text)
                documents.insert_one({"_id": 100})
                await ids_until(changes, 100)
            with failpoint(mongo, AFTER_CHECKOUT, {"times": 1}, errorCode=286):
                with pytest.raises(ResumeHistoryLost):
                    await taken(changes, 1)
    records: list[Any] = [r for r in caplog.records if hasattr(r, "data_bridge_event")]
    assert [r.data_bridge_event for r in records] == [
        "opened",
        "interrupted",
        "reopened",
        "reset",
        "closed",
    ]
    assert {r.data_bridge_feed for r in records} == {f"{database_name}.counted_things"}
    assert all(r.data_bridge_position for r in records)
    assert records[0].getMessage() == f"feed {database_name}.counted_things opened"
    assert "reason=" in records[1].getMessage() and "after=" in records[2].getMessage()
    assert records[0].filename == "feed.py"
