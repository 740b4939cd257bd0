"""Every pattern of the guide to streaming works as a user would write it."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from bson import ObjectId

from data_bridge import Document, ResumeToken
from data_bridge.api import App, EventSourceResponse, Header, ServerSentEvent
from data_bridge.testing import Event, events, streaming_client

AUTOMATIC = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    "connection": "keep-alive",
    "x-accel-buffering": "no",
}


class GuideOrder(Document):
    status: str
    total: float

    class Settings:
        collection = "orders"


def streaming(generate: Callable[[], AsyncIterator[Any]], **options: Any) -> App:
    """An application whose ``/events`` streams what the generator function yields."""
    app = App()

    @app.get("/events")
    async def stream() -> EventSourceResponse:
        return EventSourceResponse(generate(), **options)

    return app


async def received(app: App, number: int | None = None, **request: Any) -> list[Event]:
    """The first events of ``/events``; all of them if no number is given."""
    found = []
    async with streaming_client(app) as client, client.stream("GET", "/events", **request) as r:
        assert r.status_code == 200
        async for event in events(r):
            found.append(event)
            if len(found) == number:
                break
    return found


# -- the two classes ----------------------------------------------------------------------------


def test_the_constructors_take_what_the_guide_says() -> None:
    event = inspect.signature(ServerSentEvent).parameters
    assert [(p.name, p.default) for p in event.values()] == [
        ("data", inspect.Parameter.empty),
        ("event", None),
        ("id", None),
        ("retry", None),
    ]
    response = list(inspect.signature(EventSourceResponse).parameters.values())[:3]
    assert [(p.name, p.default) for p in response] == [
        ("content", inspect.Parameter.empty),
        ("status_code", 200),
        ("headers", None),
    ]


async def test_the_four_headers_are_set_by_themselves() -> None:
    async def generate() -> AsyncIterator[ServerSentEvent]:
        yield ServerSentEvent(data="test")

    async with streaming_client(streaming(generate)) as client:
        response = await client.get("/events")
    assert dict(response.headers) == AUTOMATIC
    assert response.content == b"data: test\n\n"


async def test_custom_headers_are_added_and_override_the_automatic_ones() -> None:
    async def generate() -> AsyncIterator[ServerSentEvent]:
        yield ServerSentEvent(data="test")

    headers = {
        "Access-Control-Allow-Origin": "*",
        "X-Custom-Header": "value",
        "CACHE-control": "no-store",
    }
    async with streaming_client(streaming(generate, headers=headers)) as client:
        response = await client.get("/events")
    assert dict(response.headers) == AUTOMATIC | {
        "access-control-allow-origin": "*",
        "x-custom-header": "value",
        "cache-control": "no-store",
    }


async def test_a_response_can_be_iterated_without_a_server() -> None:
    async def generate() -> AsyncIterator[ServerSentEvent]:
        for i in range(3):
            yield ServerSentEvent(data=f"Event {i}")

    response = EventSourceResponse(generate())
    assert [frame async for frame in response] == [
        b"data: Event 0\n\n",
        b"data: Event 1\n\n",
        b"data: Event 2\n\n",
    ]


async def test_an_iteration_that_is_given_up_closes_the_generator() -> None:
    closed = asyncio.Event()

    async def generate() -> AsyncIterator[ServerSentEvent]:
        try:
            while True:
                yield ServerSentEvent(data="x")
        finally:
            closed.set()

    frames = aiter(EventSourceResponse(generate()))
    assert await anext(frames) == b"data: x\n\n"
    await frames.aclose()  # type: ignore[attr-defined]
    assert closed.is_set()


# -- the patterns -------------------------------------------------------------------------------


async def test_quick_start() -> None:
    async def generate() -> AsyncIterator[ServerSentEvent]:
        for i in range(10):
            yield ServerSentEvent(data=f"Event {i}")

    assert [e.data for e in await received(streaming(generate))] == [
        f"Event {i}" for i in range(10)
    ]


async def test_events_of_several_types_from_a_queue() -> None:
    queue: asyncio.Queue[tuple[str, str, str]] = asyncio.Queue()

    async def generate() -> AsyncIterator[ServerSentEvent]:
        while True:
            message, kind, number = await queue.get()
            yield ServerSentEvent(data=message, event=kind, id=number)

    queue.put_nowait(("saved", "info", "1"))
    queue.put_nowait(("disk\nfull", "error", "2"))
    assert await received(streaming(generate), 2) == [
        Event("saved", "info", "1"),
        Event("disk\nfull", "error", "2"),
    ]


async def test_a_counter_reaches_the_client_number_by_number() -> None:
    turn = asyncio.Semaphore(0)

    async def generate() -> AsyncIterator[ServerSentEvent]:
        for i in range(100):
            await turn.acquire()
            yield ServerSentEvent(data=str(i), event="count", id=str(i))

    async with (
        streaming_client(streaming(generate)) as client,
        client.stream("GET", "/events") as response,
    ):
        counted = events(response)
        for i in range(5):
            turn.release()
            assert await anext(counted) == Event(str(i), "count", str(i))


async def test_progress_of_a_task_and_its_completion() -> None:
    app = App()

    @app.get("/progress/{task_id}")
    async def task_progress(task_id: str):  # type: ignore[no-untyped-def]
        async def generate() -> AsyncIterator[ServerSentEvent]:
            for step in range(3):
                yield ServerSentEvent(
                    data=json.dumps({"percent": step * 50, "message": task_id}),
                    event="progress",
                    id=str(step),
                )
                await asyncio.sleep(0)
            yield ServerSentEvent(data=json.dumps({"status": "complete"}), event="done")

        return EventSourceResponse(generate())

    async with (
        streaming_client(app) as client,
        client.stream("GET", "/progress/import-7") as response,
    ):
        found = [e async for e in events(response)]
    assert [e.event for e in found] == ["progress"] * 3 + ["done"]
    assert json.loads(found[2].data) == {"percent": 100, "message": "import-7"}
    assert found[3] == Event('{"status": "complete"}', "done", "2")


async def test_log_lines_of_a_service() -> None:
    app = App()

    async def follow(service: str) -> AsyncIterator[str]:
        for number in itertools.count():
            yield f"{service} says {number}"

    @app.get("/logs/{service}")
    async def stream_logs(service: str):  # type: ignore[no-untyped-def]
        async def generate() -> AsyncIterator[ServerSentEvent]:
            async for log_line in follow(service):
                yield ServerSentEvent(data=log_line, event="log", id=str(int(time.time() * 1000)))

        return EventSourceResponse(generate())

    async with streaming_client(app) as client, client.stream("GET", "/logs/web") as response:
        lines = events(response)
        for number in range(1000):
            assert (await anext(lines)).data == f"web says {number}"


async def test_heartbeats_between_events() -> None:
    pending = ["a", None, "b", None]

    async def generate() -> AsyncIterator[ServerSentEvent]:
        for found in pending:
            if found is not None:
                yield ServerSentEvent(data=found, event="tick")
            else:
                yield ServerSentEvent(data="", event="heartbeat")

    assert [(e.event, e.data) for e in await received(streaming(generate))] == [
        ("tick", "a"),
        ("heartbeat", ""),
        ("tick", "b"),
        ("heartbeat", ""),
    ]


async def test_an_error_that_the_generator_handles_is_an_event_and_the_end() -> None:
    async def generate() -> AsyncIterator[ServerSentEvent]:
        try:
            yield ServerSentEvent(data="1")
            raise RuntimeError("no data")
        except Exception as e:
            yield ServerSentEvent(data=json.dumps({"error": str(e)}), event="error")

    assert await received(streaming(generate)) == [
        Event("1"),
        Event('{"error": "no data"}', "error"),
    ]


async def test_a_client_that_leaves_cancels_the_generator_where_it_waits() -> None:
    happened: list[str] = []

    async def generate() -> AsyncIterator[ServerSentEvent]:
        try:
            while True:
                yield ServerSentEvent(data="ping")
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # cleaning up may wait
            happened.append("cancelled")
            raise
        finally:
            happened.append("finally")

    await received(streaming(generate), 1)
    assert happened == ["cancelled", "finally"]


async def test_context_managers_are_closed_when_the_client_leaves() -> None:
    open_connections = 0

    @asynccontextmanager
    async def connection() -> AsyncIterator[str]:
        nonlocal open_connections
        open_connections += 1
        try:
            yield "connection"
        finally:
            await asyncio.sleep(0)
            open_connections -= 1

    async def generate() -> AsyncIterator[ServerSentEvent]:
        async with connection() as conn:
            yield ServerSentEvent(data=conn)
            await asyncio.Event().wait()

    async with streaming_client(streaming(generate)) as client:
        async with client.stream("GET", "/events") as response:
            assert (await anext(events(response))).data == "connection"
            assert open_connections == 1
        assert open_connections == 0


async def test_a_retry_interval_reaches_the_client() -> None:
    async def generate() -> AsyncIterator[ServerSentEvent]:
        yield ServerSentEvent(data="data", retry=5000)

    assert await received(streaming(generate)) == [Event("data", retry=5000)]


async def test_a_stream_goes_on_after_the_last_event_id() -> None:
    app = App()

    @app.get("/events")
    async def stream(last_event_id: str = Header(None, alias="Last-Event-ID")):  # type: ignore[no-untyped-def]
        async def generate() -> AsyncIterator[ServerSentEvent]:
            start_from = int(last_event_id) if last_event_id else 0
            for i in range(start_from, 1000):
                yield ServerSentEvent(data=f"Event {i}", id=str(i))

        return EventSourceResponse(generate())

    assert (await received(app, 1))[0] == Event("Event 0", id="0")
    found = await received(app, headers={"Last-Event-ID": "997"})
    assert [e.data for e in found] == ["Event 997", "Event 998", "Event 999"]


# -- the database -------------------------------------------------------------------------------


@pytest.fixture
def orders(database: Any) -> App:
    """The live updates of the guide, as they stand there."""
    app = App(database=database)

    @app.get("/orders/live")
    async def live_orders():  # type: ignore[no-untyped-def]
        async def generate():  # type: ignore[no-untyped-def]
            # Watch for changes in MongoDB
            async for change in GuideOrder.watch():
                yield ServerSentEvent(
                    data=json.dumps(
                        {
                            "operation": change.operation,
                            "order_id": str(change.document_id),
                            "data": change.document,
                        }
                    ),
                    event="order_update",
                    id=str(change.timestamp),
                )

        return EventSourceResponse(generate())

    return app


async def watched(app: App, number: int = 1) -> None:
    """Return when the naive generators have attached: they start when they are iterated."""
    async with asyncio.timeout(20):
        while True:
            feeds = list(app.bridge._feeds.values())
            if feeds and feeds[0].log is not None and len(feeds[0].log._waiting) >= number:
                return
            await asyncio.sleep(0.005)


async def test_live_database_updates(orders: App) -> None:
    async with streaming_client(orders) as client, client.stream("GET", "/orders/live") as response:
        assert response.headers["content-type"] == "text/event-stream"
        changes = events(response)
        await watched(orders)

        order = await GuideOrder(status="open", total=2.5).insert()
        event = await anext(changes)
        assert event.event == "order_update"
        assert json.loads(event.data) == {
            "operation": "insert",
            "order_id": str(order.id),
            "data": {"id": str(order.id), "status": "open", "total": 2.5},
        }

        await order.update({"$set": {"status": "paid"}})
        data = json.loads((await anext(changes)).data)
        assert (data["operation"], data["data"]["status"]) == ("update", "paid")

        await order.delete()
        data = json.loads((await anext(changes)).data)
        assert data == {"operation": "delete", "order_id": str(order.id), "data": None}


async def test_the_timestamp_that_is_the_event_id_is_a_position_to_resume_from(
    orders: App,
) -> None:
    async with streaming_client(orders) as client, client.stream("GET", "/orders/live") as response:
        await watched(orders)
        first = await GuideOrder(status="1", total=1).insert()
        second = await GuideOrder(status="2", total=2).insert()
        changes = events(response)
        id = (await anext(changes)).id
        assert id.startswith("Timestamp(")
        assert ResumeToken.parse(id).is_time
        async with GuideOrder.watch(resume_after=id) as again:
            found = [(await anext(again)).document_id for _ in range(2)]
        assert found == [first.id, second.id]  # a time starts before what happened at it


async def test_a_hundred_clients_of_the_naive_handler_share_one_cursor(orders: App) -> None:
    async with streaming_client(orders) as client:

        async def one() -> list[str]:
            async with client.stream("GET", "/orders/live") as response:
                changes = events(response)
                return [json.loads((await anext(changes)).data)["order_id"] for _ in range(20)]

        async with asyncio.TaskGroup() as group:
            clients = [group.create_task(one()) for _ in range(100)]
            await watched(orders, 100)
            assert len(orders.bridge._feeds) == 1
            ids = [ObjectId() for _ in range(20)]
            await GuideOrder.insert_many([GuideOrder(id=id, status="open", total=1) for id in ids])
        assert [c.result() for c in clients] == [[str(id) for id in ids]] * 100


# -- clients ------------------------------------------------------------------------------------


async def test_a_plain_http_client_reads_line_by_line(
    serve: Callable[..., Any],
) -> None:
    async def generate() -> AsyncIterator[ServerSentEvent]:
        for i in range(10):
            yield ServerSentEvent(data=f"Event {i}")

    server = await serve(streaming(generate), lifespan="off")
    found = []
    async with httpx.AsyncClient() as client:
        async with client.stream("GET", f"{server.url}/events") as response:
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    found.append(line[5:].strip())
    assert found == [f"Event {i}" for i in range(10)]


@pytest.fixture
def app() -> App:
    """What the fixture ``test_client`` is a client of."""

    async def generate() -> AsyncIterator[ServerSentEvent]:
        await asyncio.sleep(0.3)  # longer than headers wait for a first event
        while True:
            yield ServerSentEvent(data="x")
            await asyncio.sleep(0.01)

    return streaming(generate)


async def test_the_test_client_streams_and_the_first_line_is_data(
    test_client: httpx.AsyncClient,
) -> None:
    async with test_client.stream("GET", "/events") as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream"
        lines = []
        async for line in response.aiter_lines():
            lines.append(line)
            if line == "":
                break
        assert lines[0].startswith("data:")
