"""EventSourceResponse over HTTP: changes with their positions, and what becomes of a stream."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import fastapi
import httpx
import pytest
from bson import ObjectId, Timestamp
from conftest import DRIVERS, opened
from pymongo import MongoClient
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

import data_bridge
from data_bridge import Document, ResumeToken, errors
from data_bridge.api import App, EventSourceResponse, ServerSentEvent
from data_bridge.api.connection import Connection
from data_bridge.embedded import ReplicaSet
from data_bridge.log import Limits
from data_bridge.stand_in import StandIn
from data_bridge.testing import Comment, Event, EventStream, Mark, events, streaming_client


class SseOrder(Document):
    status: str
    total: float = 1.0

    class Settings:
        collection = "orders"


class SseOther(Document):
    name: str = ""

    class Settings:
        collection = "others"


def watching(database: Any = None, *, watch: Any = None, **options: Any) -> App:
    """An application whose ``/`` streams the orders."""
    app = App(database=database)

    @app.get("/")
    async def stream() -> EventSourceResponse:
        return EventSourceResponse((watch or SseOrder.watch)(), **options)

    return app


def producing(generate: Callable[[], Any], **options: Any) -> App:
    """An application whose ``/`` streams what an async iterator yields."""
    app = App()

    @app.get("/")
    async def stream() -> EventSourceResponse:
        return EventSourceResponse(generate(), **options)

    @app.get("/ping")
    async def ping() -> str:
        return "pong"

    return app


async def forever() -> AsyncIterator[ServerSentEvent]:
    yield ServerSentEvent("first")
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def streamed(app: Any, **request: Any) -> AsyncIterator[EventStream]:
    async with streaming_client(app) as client, client.stream("GET", "/", **request) as response:
        assert response.status_code == 200, await response.aread()
        yield events(response)


async def whole(stream: EventStream) -> bytes:
    return b"".join([chunk async for chunk in stream._chunks])


async def mark(stream: EventStream) -> Mark:
    """The next id without an event."""
    async for item in stream.everything():
        if isinstance(item, Mark):
            return item
    raise AssertionError("the stream has ended")


# -- changes ------------------------------------------------------------------------------------


async def test_a_stream_has_a_position_from_its_first_byte(database: Any) -> None:
    async with streaming_client(watching(database)) as client, client.stream("GET", "/") as r:
        chunks = r.aiter_raw()
        first = await anext(chunks)
        id = first.removeprefix(b"id: ").removesuffix(b"\n\n").decode()
        assert first == f"id: {id}\n\n".encode()
        assert ResumeToken.parse(id).is_high_water
        order = await SseOrder(status="open", total=2.5).insert()
        second = await anext(chunks)
        token = second.split(b"\n")[1].removeprefix(b"id: ").decode()
        assert (
            second
            == (
                f"event: insert\nid: {token}\n"
                f'data: {{"operation":"insert","id":"{order.id}",'
                f'"document":{{"id":"{order.id}","status":"open","total":2.5}}}}\n\n'
            ).encode()
        )
        assert ResumeToken.parse(token) > ResumeToken.parse(id)


async def test_each_operation_is_an_event_with_its_position_and_the_document(
    database: Any,
) -> None:
    async with streamed(watching(database)) as stream:
        await mark(stream)
        order = await SseOrder(status="open").insert()
        found = [await anext(stream)]
        await order.update({"$set": {"status": "paid"}})
        found += [await anext(stream)]  # an update comes with the document as it is by then
        order.status = "sent"
        await order.replace()
        await order.delete()
        await database["orders"].drop()
        found += [await anext(stream) for _ in range(3)]
    assert [e.event for e in found] == ["insert", "update", "replace", "delete", "drop"]
    assert [json.loads(e.data) for e in found] == [
        {"operation": o, "id": i, "document": d}
        for o, i, d in [
            ("insert", str(order.id), {"id": str(order.id), "status": "open", "total": 1.0}),
            ("update", str(order.id), {"id": str(order.id), "status": "paid", "total": 1.0}),
            ("replace", str(order.id), {"id": str(order.id), "status": "sent", "total": 1.0}),
            ("delete", str(order.id), None),
            ("drop", None, None),
        ]
    ]
    positions = [ResumeToken.parse(e.id) for e in found]
    assert positions == sorted(set(positions))


async def test_the_caller_names_the_events(database: Any) -> None:
    app = watching(database, event="order_update")
    async with streamed(app) as stream:
        await mark(stream)
        await SseOrder(status="open").insert()
        assert (await anext(stream)).event == "order_update"
    app = watching(database, event=lambda change: f"order.{change.operation}")
    async with streamed(app) as stream:
        await mark(stream)
        await SseOrder(status="open").insert()
        assert (await anext(stream)).event == "order.insert"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (lambda change: change.full_document.status, "two\nlines"),
        (lambda change: {"at": change.operation}, '{"at":"insert"}'),
        (lambda change: [Timestamp(1, 2), "\u2028"], '[{"$timestamp":{"t":1,"i":2}},"\\u2028"]'),
        (lambda change: None, "null"),
        (lambda change: "", ""),
    ],
    ids=["text", "dict", "bson", "none", "empty"],
)
async def test_the_caller_makes_the_data(database: Any, data: Any, expected: str) -> None:
    async with streamed(watching(database, data=data)) as stream:
        await mark(stream)
        await SseOrder(status="two\nlines").insert()
        event = await anext(stream)
    assert event.data == expected or json.loads(event.data) == json.loads(expected)


async def test_ids_of_the_callers_own_are_the_only_ones_and_leave_resuming_to_the_caller(
    database: Any,
) -> None:
    app = watching(database, id=lambda change: f"order-{change.document_id}", keep_alive=0.05)
    async with streamed(app) as stream:
        everything = stream.everything()
        assert await anext(everything) == Comment("")  # no position of ours in between
        order = await SseOrder(status="open").insert()
        assert (await anext(stream)).id == f"order-{order.id}"


async def test_an_id_or_a_name_that_would_add_fields_ends_the_stream(database: Any) -> None:
    for option in ({"id": lambda c: "1\ndata: forged"}, {"event": lambda c: "x\n\ndata: forged"}):
        with pytest.raises(ValueError, match="must not contain line ends"):
            async with streamed(watching(database, **option, keep_alive=0.05)) as stream:
                await anext(stream.everything())
                await SseOrder(status="open").insert()
                await anext(stream)
    with pytest.raises(ValueError, match="must not contain line ends"):
        EventSourceResponse(forever(), event="a\nb")


async def test_a_document_that_does_not_fit_its_model_fails_only_itself(
    database: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with streamed(watching(database)) as stream:
        await mark(stream)
        await database["orders"].insert_one({"_id": 1, "status": ["no", "text"]})
        await SseOrder(status="open").insert()
        wrong, right = await anext(stream), await anext(stream)
    assert wrong.event == "insert"
    assert json.loads(wrong.data) == {
        "operation": "insert",
        "id": 1,
        "document": None,
        "error": "the document does not fit its model",
    }
    assert json.loads(right.data)["document"]["status"] == "open"
    assert "SseOrder" in caplog.text


async def test_only_the_operations_asked_for_are_sent(database: Any) -> None:
    def watch() -> Any:
        return SseOrder.watch(operations="delete")

    async with streamed(watching(database, watch=watch)) as stream:
        await mark(stream)
        order = await SseOrder(status="open").insert()
        await order.delete()
        assert (await anext(stream)).event == "delete"


async def test_a_generator_may_yield_changes_as_they_are(bridge: data_bridge.Bridge) -> None:
    async def generate() -> AsyncIterator[Any]:
        async with SseOrder.watch() as changes:
            await SseOrder(status="open").insert()
            yield await anext(changes)

    app = producing(generate, event="order")
    async with streamed(app) as stream:
        event = await anext(stream)
    assert (event.event, json.loads(event.data)["operation"]) == ("order", "insert")
    assert not ResumeToken.parse(event.id).is_high_water


async def test_iterating_the_response_gives_the_frames_of_changes(
    bridge: data_bridge.Bridge,
) -> None:
    response = EventSourceResponse(SseOrder.watch(), retry=5)
    frames = aiter(response)
    assert (await anext(frames)).startswith(b"retry: 5\nid: ")
    await SseOrder.insert_many([SseOrder(status="a\nb"), SseOrder(status="c")])
    found = [await anext(frames), await anext(frames)]
    assert all(f.startswith(b"event: insert\nid: ") and f.endswith(b"}\n\n") for f in found)
    await frames.aclose()  # type: ignore[attr-defined]
    assert [f.subscribers for f in bridge._feeds.values()] in ([1], [0])


@pytest.mark.parametrize("kind", [Starlette, fastapi.FastAPI])
async def test_it_is_an_ordinary_response_of_starlette_and_of_fastapi(
    serve: Callable[..., Any],
    database_uri: str,
    database_name: str,
    mongo: MongoClient[Any],
    kind: Any,
) -> None:
    lifespan = data_bridge.lifespan(database_uri)
    if kind is Starlette:

        async def endpoint(request: Request) -> Response:
            return EventSourceResponse(SseOrder.watch())

        app: Any = Starlette(routes=[Route("/", endpoint)], lifespan=lifespan)
    else:
        app = fastapi.FastAPI(lifespan=lifespan)

        @app.get("/")
        async def stream() -> EventSourceResponse:
            return EventSourceResponse(SseOrder.watch())

    server = await serve(app)
    async with (
        httpx.AsyncClient(timeout=20) as client,
        client.stream("GET", server.url) as response,
    ):
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["transfer-encoding"] == "chunked"
        stream = events(response)
        await mark(stream)
        mongo[database_name]["orders"].insert_one({"status": "open", "total": 1.0})
        assert (await anext(stream)).event == "insert"


# -- resuming -----------------------------------------------------------------------------------


async def test_a_client_that_was_cut_before_its_first_event_misses_nothing(database: Any) -> None:
    app = watching(database)
    async with streaming_client(app) as client:
        async with client.stream("GET", "/") as response:
            start = (await mark(events(response))).id
        orders = [await SseOrder(status=str(n)).insert() for n in range(3)]
        for sent in ({"headers": {"Last-Event-ID": start}}, {"params": {"last_event_id": start}}):
            async with client.stream("GET", "/", **sent) as response:
                stream = events(response)
                found = [json.loads((await anext(stream)).data)["id"] for _ in range(3)]
                assert found == [str(o.id) for o in orders]


async def test_a_client_resumes_after_its_last_event_and_the_opening_frame_says_so(
    database: Any,
) -> None:
    app = watching(database)
    async with streaming_client(app) as client:
        async with client.stream("GET", "/") as response:
            stream = events(response)
            await mark(stream)
            orders = [await SseOrder(status=str(n)).insert() for n in range(3)]
            seen = [await anext(stream) for _ in range(2)]
        async with client.stream("GET", "/", headers={"Last-Event-ID": seen[-1].id}) as response:
            stream = events(response)
            assert (await mark(stream)).id == seen[-1].id
            assert json.loads((await anext(stream)).data)["id"] == str(orders[2].id)


async def test_the_header_counts_before_the_query_and_an_empty_one_not_at_all(
    database: Any,
) -> None:
    app = watching(database)
    async with streaming_client(app) as client:
        async with client.stream("GET", "/") as response:
            stream = events(response)
            start = (await mark(stream)).id
            await SseOrder(status="1").insert()
            later = (await anext(stream)).id
        for headers, params, expected in (
            ({"Last-Event-ID": later}, {"last_event_id": start}, later),
            ({"Last-Event-ID": ""}, {"last_event_id": start}, start),
        ):
            async with client.stream("GET", "/", headers=headers, params=params) as response:
                assert (await mark(events(response))).id == expected
        for headers in ({"Last-Event-ID": ""}, {}):
            async with client.stream(
                "GET", "/", headers=headers, params={"last_event_id": ""}
            ) as response:
                now = (await mark(events(response))).id
                assert ResumeToken.parse(now) >= ResumeToken.parse(later)


async def test_a_timestamp_is_a_position_too(database: Any) -> None:
    app = watching(database)
    async with streamed(app) as stream:
        await mark(stream)
        order = await SseOrder(status="1").insert()
        id = (await anext(stream)).id
    time = str(ResumeToken.parse(id).cluster_time)
    async with streamed(app, headers={"Last-Event-ID": time}) as stream:
        assert json.loads((await anext(stream)).data)["id"] == str(order.id)


async def test_a_stream_that_shall_not_resume_starts_from_now(database: Any) -> None:
    app = watching(database)
    async with streamed(app) as stream:
        start = (await mark(stream)).id
        await SseOrder(status="missed").insert()
        await anext(stream)
    app = watching(database, resume=False)
    async with streamed(app, headers={"Last-Event-ID": start}) as stream:
        await mark(stream)
        order = await SseOrder(status="seen").insert()
        assert json.loads((await anext(stream)).data)["id"] == str(order.id)


HIGH_WATER = "82656565650000000129295A1004" + "0" * 32 + "04"
TOKEN = (
    "826565656500000001"  # a time
    "2B022C0100296E5A1004" + "0" * 32 + "463C5F6964003C" + "61" * 4 + "00" + "0004"
)


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("x", "an event id is hexadecimal or base64url, and this is neither"),
        ("order-1", "no resume token of MongoDB|neither"),
        ("1", "neither|no resume token"),
        ("null", "no resume token of MongoDB|neither"),
        ("\xff\x00", "neither"),
        ("'; DROP TABLE orders; --", "neither"),
        ("82" + "0" * 14, "no resume token of MongoDB"),
        (TOKEN[:-2], "no resume token of MongoDB, or a part of one is missing"),
        (TOKEN[: len(TOKEN) // 4 * 2], "no resume token of MongoDB, or a part of one is missing"),
        (TOKEN + "00", "no resume token of MongoDB"),
        ("Timestamp(1, 99999999999)", "neither|two numbers below"),
        ("Timestamp(9999999999, 1)", r"two numbers below 2\*\*32"),
        ("Timestamp(4294967295, 1)", "lies in the future of the cluster"),
        ("x" * 8193, "between 1 and 8192 characters, not 8193"),
        ("82" * 512 * 1024, "between 1 and 8192 characters, not 1048576"),
    ],
    ids=lambda value: repr(value[:20]),
)
async def test_an_id_that_is_no_position_is_a_400_with_a_reason_and_nothing_is_opened(
    database: Any, id: str, message: str
) -> None:
    app = watching(database)
    async with streaming_client(app) as client:
        response = await client.get("/", headers={b"Last-Event-ID": id.encode("latin-1")})
        assert response.status_code == 400
        assert response.headers["content-type"] == "application/json"
        assert list(response.json()) == ["detail"]
        assert re.search(message, response.json()["detail"]), response.json()["detail"]
        if "future" not in message:  # the cluster alone knows its time
            assert app.bridge._feeds == {}


async def test_a_real_server_answers_an_id_of_a_megabyte_too(
    serve: Callable[..., Any], database_uri: str
) -> None:
    server = await serve(watching(database_uri), http="httptools")
    async with httpx.AsyncClient() as client:
        response = await client.get(server.url, headers={"Last-Event-ID": "8" * 1024 * 1024})
    assert (response.status_code, response.json()) == (
        400,
        {"detail": "an event id has between 1 and 8192 characters, not 1048576"},
    )


async def test_an_invalid_position_that_the_handler_gives_is_a_400_as_well(database: Any) -> None:
    async def generate() -> AsyncIterator[ServerSentEvent]:
        async for _ in SseOrder.watch(resume_after="order-1"):
            yield ServerSentEvent("never")

    async with streaming_client(watching(database, watch=generate)) as client:
        response = await client.get("/")
    assert response.status_code == 400
    assert "no resume token of MongoDB" in response.json()["detail"]


# -- a history that is lost ---------------------------------------------------------------------


def oldest(mongo: MongoClient[Any]) -> Timestamp:
    """Where the server's history begins."""
    first = mongo["local"]["oplog.rs"].find_one(sort=[("$natural", 1)])
    assert first is not None
    time = first["ts"]
    assert isinstance(time, Timestamp)
    return time


def roll(mongo: MongoClient[Any], past: ResumeToken) -> None:
    """Write until the server has forgotten a position."""
    padding = "x" * 100_000
    for _ in range(2000):
        mongo["elsewhere"]["padding"].insert_many([{"x": padding} for _ in range(10)])
        mongo["elsewhere"]["padding"].delete_many({})
        if oldest(mongo) > past.cluster_time:
            return
    raise AssertionError("the oplog does not roll")


async def forgotten(bridge: data_bridge.Bridge) -> None:
    """Return when the process itself remembers nothing either."""
    async with asyncio.timeout(20):
        while bridge._feeds:
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def rolling() -> Iterator[ReplicaSet]:
    """A server that forgets within seconds of writing."""
    with ReplicaSet(oplog_mb=2) as replica_set:
        yield replica_set


@pytest.mark.parametrize("driver", DRIVERS)
async def test_quiet_and_filtered_streams_keep_their_place_and_others_are_told_of_a_reset(
    serve: Callable[..., Any], rolling: ReplicaSet, driver: str
) -> None:
    name = f"rolling_{driver}"
    with MongoClient[Any](rolling.uri) as mongo:
        async with contextlib.AsyncExitStack() as stack:
            bridges: list[data_bridge.Bridge] = []

            @contextlib.asynccontextmanager
            async def lifespan(app: Any) -> AsyncIterator[None]:
                async with opened(driver, rolling.uri) as client:
                    async with data_bridge.connect(
                        client[name], limits=Limits(linger=0.01)
                    ) as bridge:
                        bridges.append(bridge)
                        yield

            app = App(lifespan=lifespan)

            @app.get("/all")
            async def all_() -> EventSourceResponse:
                return EventSourceResponse(SseOrder.watch(), keep_alive=0.2)

            @app.get("/deletes")
            async def deletes() -> EventSourceResponse:
                return EventSourceResponse(SseOrder.watch(operations="delete"), keep_alive=0.2)

            server = await serve(app)
            client = await stack.enter_async_context(httpx.AsyncClient(timeout=60))

            async with (
                client.stream("GET", f"{server.url}/all") as quiet,
                client.stream("GET", f"{server.url}/deletes") as filtered,
            ):
                streams = [events(quiet), events(filtered)]
                for stream in streams:
                    await mark(stream)
                mongo[name]["orders"].insert_one({"status": "old", "total": 1.0})
                event = await anext(streams[0])
                old = ResumeToken.parse(event.id)
                await asyncio.to_thread(roll, mongo, old)
                now = mongo.admin.command("ping")["operationTime"]
                places = []
                for stream in streams:
                    async for item in stream.everything():
                        assert isinstance(item, Mark | Comment)
                        if ResumeToken.parse(stream.last_event_id).cluster_time >= now:
                            break
                    places.append(stream.last_event_id)

            new = mongo[name]["orders"].insert_one({"status": "new", "total": 1.0}).inserted_id
            mongo[name]["orders"].delete_one({"_id": new})
            for path, place, expected in (
                ("/all", places[0], ["insert", "delete"]),
                ("/deletes", places[1], ["delete"]),
            ):
                headers = {"Last-Event-ID": place}
                await forgotten(bridges[0])
                async with client.stream("GET", server.url + path, headers=headers) as response:
                    stream = events(response)
                    found = [await anext(stream) for _ in expected]
                    assert [e.event for e in found] == expected
                    assert {json.loads(e.data)["id"] for e in found} == {str(new)}

            # Without those ids it would have been lost; and a client hears of it, and goes on.
            headers = {"Last-Event-ID": str(old)}
            await forgotten(bridges[0])
            async with client.stream("GET", f"{server.url}/all", headers=headers) as response:
                stream = events(response)
                reset = await anext(stream)
                assert (reset.event, reset.data) == ("reset", '{"reason":"history lost"}')
                assert ResumeToken.parse(reset.id).cluster_time >= now
                later = mongo[name]["orders"].insert_one({"status": "x", "total": 1.0}).inserted_id
                event = await anext(stream)
                assert (event.event, json.loads(event.data)["id"]) == ("insert", str(later))


async def test_a_generator_whose_history_is_lost_ends_and_its_client_starts_anew(
    rolling: ReplicaSet,
) -> None:
    past = Timestamp(1_000_000_000, 1)
    # A server that has forgotten nothing yet resumes from any time.
    with MongoClient[Any](rolling.uri) as mongo:
        await asyncio.to_thread(roll, mongo, ResumeToken.at(oldest(mongo)))

    async def generate() -> AsyncIterator[Any]:
        async for change in SseOrder.watch(resume_after=past):
            yield change

    app = watching(rolling.database_uri("generators"), watch=generate)
    async with streamed(app) as stream:
        assert [e async for e in stream] == [Event('{"reason":"history lost"}', "reset", "")]
        assert (stream.retry, stream.last_event_id) == (1000, "")


# -- content that the test decides --------------------------------------------------------------


def at(seconds: int, increment: int = 1) -> str:
    """The event id of a cluster time."""
    return str(ResumeToken.at(Timestamp(seconds, increment)))


class Scripted:
    """Frames of which the test decides each.

    It waits with the stand-in that it is given, as most do, or ``alone``.
    """

    resumable = True

    def __init__(self, token: str = "Timestamp(1, 1)", *, alone: bool = False) -> None:
        self.alone = alone
        self.resume_token: ResumeToken | None = ResumeToken.parse(token)
        self.frames: list[bytes] = []
        self.news: asyncio.Future[None] | None = None
        self.error: BaseException | None = None
        self.calls: list[str] = []
        self.opening: asyncio.Event | None = None  # what open() waits for
        self.restarting: asyncio.Event | None = None
        self.waiting = asyncio.Event()

    def __aiter__(self) -> Any:
        raise NotImplementedError

    @property
    def pending(self) -> bool:
        return bool(self.frames)

    @property
    def has_all(self) -> bool:
        return not self.frames

    def start_after(self, position: ResumeToken) -> None:
        self.calls.append(f"start_after {position}")

    async def open(self) -> None:
        self.calls.append("open")
        if self.opening is not None:
            await self.opening.wait()
        if self.error is not None:
            raise self.error

    def take(self, encoder: Any) -> bytes:
        joined = b"".join(self.frames)
        self.frames.clear()
        return joined

    async def wait(self, stand_in: StandIn | None = None) -> None:
        if self.alone:
            stand_in = None
        while not self.frames:
            if self.error is not None:
                error, self.error = self.error, None
                raise error
            self.news = stand_in or asyncio.get_running_loop().create_future()
            self.waiting.set()
            try:
                await self.news
            finally:
                self.waiting.clear()
                self.news = None
            if stand_in is not None:
                return

    async def restart(self) -> None:
        self.calls.append("restart")
        if self.restarting is not None:
            await self.restarting.wait()

    def stalled(self) -> None:
        self.calls.append("stalled")

    async def aclose(self) -> None:
        self.calls.append("aclose")

    # what the test does

    def put(self, frame: bytes) -> None:
        self.frames.append(frame)
        if isinstance(self.news, StandIn):
            self.news.call()
        else:
            self._wake()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self._wake()

    def _wake(self) -> None:
        if self.news is not None and not self.news.done():
            self.news.set_result(None)


class Exchange:
    """A response that is called as a server calls it, with everything it sends."""

    def __init__(
        self,
        content: Any,
        *,
        method: str = "GET",
        scope: dict[str, Any] | None = None,
        wrap: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        self.content = content
        self.response = EventSourceResponse(content, **options)
        if isinstance(content, Scripted):
            self.response.content, self.response.own_ids = content, "id" not in options
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self.news = asyncio.Condition()
        self.hang: asyncio.Event | None = None
        self.broken: Exception | None = None
        self.scope = {
            "type": "http",
            "method": method,
            "http_version": "1.1",
            "headers": [],
            "query_string": b"",
            "path": "/",
            **(scope or {}),
        }
        app: Any = self.response if wrap is None else wrap(self.response)
        self.task = asyncio.create_task(app(self.scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if self.hang is not None:
            await self.hang.wait()
        if self.broken is not None:
            raise self.broken
        self.sent.append(message)
        async with self.news:
            self.news.notify_all()

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def bodies(self) -> list[bytes]:
        return [m["body"] for m in self.sent[1:]]

    @property
    def finished(self) -> bool:
        return bool(self.sent) and self.sent[-1].get("more_body") is False

    async def until(self, number: int) -> None:
        """Wait for so many bodies."""
        async with asyncio.timeout(20), self.news:
            await self.news.wait_for(lambda: len(self.bodies) >= number)

    async def ended(self) -> None:
        async with asyncio.timeout(20):
            await self.task


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Connection]:
    """Every connection that is made, to have their timer tick by hand."""
    made: list[Connection] = []
    before = Connection.__init__

    def init(self: Connection, *arguments: Any) -> None:
        before(self, *arguments)
        made.append(self)

    monkeypatch.setattr(Connection, "__init__", init)
    return made


SLOWLY: Any = {"keep_alive": 1000.0, "send_timeout": 1000.0}  # the test ticks


# -- keep-alive ---------------------------------------------------------------------------------


async def test_a_silent_stream_is_kept_alive_with_comments(serve: Callable[..., Any]) -> None:
    server = await serve(producing(forever, keep_alive=0.05), lifespan="off")
    async with (
        httpx.AsyncClient() as client,
        client.stream("GET", server.url) as response,
    ):
        chunks = response.aiter_raw()
        assert await anext(chunks) == b"data: first\n\n"
        for _ in range(5):
            assert await anext(chunks) == b":\n"


async def test_a_comment_comes_only_when_there_was_nothing_since_the_last_tick(
    connections: list[Connection],
) -> None:
    content = Scripted()
    content.resume_token = None
    exchange = Exchange(content, **SLOWLY)
    await exchange.until(1)
    (connection,) = connections
    for number in range(5):
        content.put(b"data: x\n\n")
        await exchange.until(2 + number)
        await content.waiting.wait()
        connection._tick()
        await asyncio.sleep(0)
    connection._tick()
    await exchange.until(7)
    assert exchange.bodies == [b"", *[b"data: x\n\n"] * 5, b":\n"]
    exchange.gone.set()
    await exchange.ended()


async def test_a_position_that_moved_on_is_sent_once_and_a_comment_from_then_on(
    connections: list[Connection],
) -> None:
    content = Scripted("Timestamp(1, 1)")
    exchange = Exchange(content, **SLOWLY)

    async def quiet() -> None:
        await content.waiting.wait()
        sent = len(exchange.bodies)
        connections[0]._tick()  # sees what was sent before
        connections[0]._tick()
        await exchange.until(sent + 1)

    await exchange.until(1)
    await quiet()
    content.resume_token = ResumeToken.parse("Timestamp(2, 1)")
    await quiet()
    await quiet()
    assert exchange.bodies == [
        f"id: {at(1)}\n\n".encode(),
        b":\n",
        f"id: {at(2)}\n\n".encode(),
        b":\n",
    ]
    exchange.gone.set()
    await exchange.ended()


async def test_without_a_keep_alive_a_silent_stream_stays_silent(
    connections: list[Connection],
) -> None:
    content = Scripted()
    exchange = Exchange(content, keep_alive=None, send_timeout=1000.0)
    await exchange.until(1)
    await content.waiting.wait()
    for _ in range(10):
        connections[0]._tick()
        await asyncio.sleep(0)
    assert exchange.bodies == [f"id: {at(1)}\n\n".encode()]
    exchange.gone.set()
    await exchange.ended()


async def test_the_retry_interval_is_in_the_first_frame() -> None:
    exchange = Exchange(Scripted(), retry=2500)
    await exchange.until(1)
    assert exchange.bodies == [f"retry: 2500\nid: {at(1)}\n\n".encode()]
    exchange.gone.set()
    await exchange.ended()
    async with streamed(producing(forever, retry=2500)) as stream:
        assert (await anext(stream)).data == "first"
        assert stream.retry == 2500


@pytest.mark.parametrize("name", ["keep_alive", "send_timeout"])
@pytest.mark.parametrize("seconds", [0, -1])
def test_an_interval_that_would_make_a_busy_loop_is_an_error(name: str, seconds: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is a number of seconds above 0"):
        EventSourceResponse(forever(), **{name: seconds})


@pytest.mark.parametrize("retry", [-1, True, "5"])
def test_a_retry_that_is_none_is_an_error(retry: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="retry is a"):
        EventSourceResponse(forever(), retry=retry)


# -- interruptions ------------------------------------------------------------------------------


async def test_a_comment_that_is_due_while_the_stream_starts_anew_does_not_end_it(
    connections: list[Connection],
) -> None:
    content = Scripted()
    exchange = Exchange(content, **SLOWLY)
    await exchange.until(1)
    content.restarting = asyncio.Event()
    content.fail(errors.ResumeHistoryLost("gone"))
    while "restart" not in content.calls:
        await asyncio.sleep(0)
    connections[0]._tick()
    connections[0]._tick()
    await asyncio.sleep(0)
    content.restarting.set()
    await exchange.until(2)
    assert exchange.bodies[1] == (
        f'event: reset\nid: {at(1)}\ndata: {{"reason":"history lost"}}\n\n'.encode()
    )
    content.put(b"data: on\n\n")
    await exchange.until(3)
    exchange.gone.set()
    await exchange.ended()
    assert exchange.task.cancelling() == 0


async def test_a_comment_that_is_due_when_the_stream_is_to_end_is_no_failure(
    connections: list[Connection],
) -> None:
    content = Scripted()
    exchange = Exchange(content, **SLOWLY)
    await exchange.until(1)
    await content.waiting.wait()
    connections[0]._tick()
    connections[0]._tick()
    connections[0].end("shutdown")
    await exchange.ended()
    assert exchange.finished
    assert exchange.task.cancelling() == 0
    assert content.calls == ["open", "aclose"]


async def test_a_cancellation_from_outside_is_obeyed_even_with_a_comment_due(
    connections: list[Connection],
) -> None:
    content = Scripted()
    exchange = Exchange(content, **SLOWLY)
    await exchange.until(1)
    await content.waiting.wait()
    connections[0]._tick()
    connections[0]._tick()
    exchange.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.ended()
    assert exchange.finished
    assert content.calls == ["open", "aclose"]


async def test_a_deadline_around_the_response_ends_it_properly() -> None:
    def wrap(response: Any) -> Any:
        async def app(*arguments: Any) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await response(*arguments)

        return app

    content = Scripted()
    exchange = Exchange(content, wrap=wrap)
    await exchange.ended()
    assert exchange.finished
    assert exchange.task.cancelling() == 0


async def test_what_is_pending_when_a_comment_is_due_is_sent_all_the_same(
    connections: list[Connection],
) -> None:
    content = Scripted()
    content.resume_token = None
    exchange = Exchange(content, **SLOWLY)
    await exchange.until(1)
    await content.waiting.wait()
    connections[0]._tick()
    connections[0]._tick()
    content.put(b"data: x\n\n")
    await exchange.until(3)
    assert exchange.bodies[1:] == [b":\n", b"data: x\n\n"]
    exchange.gone.set()
    await exchange.ended()


async def test_a_client_that_leaves_while_the_stream_opens_leaves_nothing() -> None:
    content = Scripted()
    content.opening = asyncio.Event()
    exchange = Exchange(content)
    await asyncio.sleep(0)
    exchange.gone.set()
    await exchange.ended()
    assert exchange.sent == []
    assert content.calls == ["open", "aclose"]
    assert exchange.task.cancelling() == 0


async def test_a_send_that_says_the_client_has_left_is_the_end_without_an_error() -> None:
    content = Scripted()
    exchange = Exchange(content)
    await exchange.until(1)
    exchange.broken = OSError("gone")
    content.put(b"data: x\n\n")
    await exchange.ended()
    assert content.calls == ["open", "aclose"]


async def test_any_other_failure_of_a_send_is_the_servers_to_see() -> None:
    content = Scripted()
    exchange = Exchange(content)
    await exchange.until(1)
    exchange.broken = RuntimeError("a bug of the server")
    content.put(b"data: x\n\n")
    with pytest.raises(RuntimeError, match="a bug of the server"):
        await exchange.ended()
    assert content.calls == ["open", "aclose"]


async def test_a_refusal_is_finished_even_if_the_server_reports_the_end_meanwhile() -> None:
    content = Scripted()
    content.error = errors.InvalidResumeToken("no")
    exchange = Exchange(content)
    exchange.hang = asyncio.Event()
    while "open" not in content.calls:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    exchange.gone.set()
    for _ in range(5):
        await asyncio.sleep(0)
    exchange.hang.set()
    await exchange.ended()
    assert exchange.status == 400
    assert exchange.task.cancelling() == 0


async def test_a_history_that_is_lost_on_the_way_is_a_reset_and_the_stream_goes_on() -> None:
    content = Scripted("Timestamp(9, 9)")
    exchange = Exchange(content)
    await exchange.until(1)
    content.fail(errors.ResumeHistoryLost("gone"))
    await exchange.until(2)
    content.put(b"data: x\n\n")
    await exchange.until(3)
    assert exchange.bodies[1:] == [
        f'event: reset\nid: {at(9, 9)}\ndata: {{"reason":"history lost"}}\n\n'.encode(),
        b"data: x\n\n",
    ]
    exchange.gone.set()
    await exchange.ended()


@pytest.mark.parametrize(
    "error",
    [
        errors.ServerUnreachable("secret"),
        errors.BridgeClosed("secret"),
        errors.TooManyCursors("secret"),
    ],
    ids=lambda e: type(e).__name__,
)
async def test_what_passes_ends_a_stream_so_that_its_client_comes_back(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    content = Scripted()
    content.error = error
    exchange = Exchange(content)
    await exchange.ended()
    assert (exchange.status, exchange.bodies) == (200, [b"retry: 1000\n\n"])
    assert exchange.finished
    content = Scripted()
    exchange = Exchange(content, retry=7)
    await exchange.until(1)
    content.fail(error)
    await exchange.ended()
    assert exchange.bodies[1:] == [b"retry: 7\n\n"]
    assert exchange.finished
    assert "secret" in caplog.text


async def test_an_id_that_proves_wrong_after_the_headers_is_taken_from_the_client() -> None:
    content = Scripted()
    exchange = Exchange(content)
    await exchange.until(1)
    content.fail(errors.InvalidResumeToken("wrong"))
    await exchange.ended()
    assert exchange.bodies[-1] == (
        b'retry: 1000\n\nevent: reset\nid: \ndata: {"reason":"history lost"}\n\n'
    )


async def test_an_unexpected_error_cuts_the_stream_and_reaches_the_server() -> None:
    content = Scripted()
    exchange = Exchange(content)
    await exchange.until(1)
    content.fail(errors.OperationFailed("bad", 1))
    with pytest.raises(errors.OperationFailed):
        await exchange.ended()
    assert not exchange.finished
    assert content.calls == ["open", "aclose"]


# -- answers that are no stream -----------------------------------------------------------------


async def test_head_answers_the_headers_and_ends(database: Any) -> None:
    app = watching(database)
    async with streaming_client(app) as client:
        response = await client.head("/")
        assert (response.status_code, response.content) == (200, b"")
        assert response.headers["content-type"] == "text/event-stream"
        assert app.bridge._feeds == {}


async def test_head_on_a_real_server_ends_and_closes_what_it_was_given(
    serve: Callable[..., Any],
) -> None:
    closed = []

    class Content:
        def __aiter__(self) -> Any:
            return self

        async def __anext__(self) -> Any:
            raise AssertionError("nobody reads it")

        async def aclose(self) -> None:
            closed.append(True)

    server = await serve(producing(Content), lifespan="off")
    async with httpx.AsyncClient(timeout=10) as client:
        response = await client.head(server.url)
    assert (response.status_code, response.content) == (200, b"")
    assert closed == [True]


@pytest.mark.parametrize("status", [204, 304])
async def test_a_status_without_a_body_has_none_and_nothing_is_opened(
    serve: Callable[..., Any], status: int
) -> None:
    server = await serve(producing(forever, status_code=status), lifespan="off")
    async with httpx.AsyncClient(timeout=10) as client:
        for _ in range(2):  # on the same connection
            response = await client.get(server.url)
            assert (response.status_code, response.content) == (status, b"")
    content = Scripted()
    exchange = Exchange(content, status_code=status)
    await exchange.ended()
    assert (exchange.bodies, content.calls) == ([b""], ["aclose"])


async def test_any_other_status_is_the_callers_and_streams() -> None:
    async def generate() -> AsyncIterator[ServerSentEvent]:
        yield ServerSentEvent("closed for good", event="error")

    async with streaming_client(producing(generate, status_code=403)) as client:
        response = await client.get("/")
    assert response.status_code == 403
    assert response.headers["content-type"] == "text/event-stream"
    assert response.content == b"event: error\ndata: closed for good\n\n"


@pytest.mark.parametrize("content", [None, "text", b"x", [], {"a": 1}, iter(())])
def test_content_that_is_no_async_iterator_is_an_error_with_the_remedy(content: Any) -> None:
    with pytest.raises(TypeError, match=r"an async iterator yields, such as Order\.watch\(\)"):
        EventSourceResponse(content)


def test_a_generator_function_that_was_not_called_is_an_error() -> None:
    with pytest.raises(TypeError, match="async iterator"):
        EventSourceResponse(forever)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["2", "2.0", "3"])
async def test_over_http_2_there_is_no_connection_header(version: str) -> None:
    exchange = Exchange(Scripted(), scope={"http_version": version})
    await exchange.until(1)
    assert [n for n, _ in exchange.sent[0]["headers"]] == [
        b"content-type",
        b"cache-control",
        b"x-accel-buffering",
    ]
    exchange.gone.set()
    await exchange.ended()
    for old in ("1.0", "1.1"):
        exchange = Exchange(Scripted(), scope={"http_version": old})
        await exchange.until(1)
        assert (b"connection", b"keep-alive") in exchange.sent[0]["headers"]
        exchange.gone.set()
        await exchange.ended()


# -- errors of handlers and generators ----------------------------------------------------------


async def not_yet() -> AsyncIterator[ServerSentEvent]:
    raise LookupError("before the first byte")
    yield


async def own_timeout() -> AsyncIterator[ServerSentEvent]:
    async with asyncio.timeout(0.01):
        await asyncio.Event().wait()
    yield ServerSentEvent("never")


async def wrong_from_the_start() -> AsyncIterator[Any]:
    yield {"data": "x"}


@pytest.mark.parametrize(
    ("generate", "error"),
    [(not_yet, LookupError), (own_timeout, TimeoutError), (wrong_from_the_start, TypeError)],
)
async def test_an_error_before_the_first_byte_is_a_proper_error_response(
    serve: Callable[..., Any],
    generate: Any,
    error: type[Exception],
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = await serve(producing(generate), lifespan="off")
    async with httpx.AsyncClient(timeout=10) as client:
        response = await client.get(server.url)
    async with httpx.AsyncClient(timeout=10) as client:  # the server closes the old connection
        assert (await client.get(f"{server.url}/ping")).json() == "pong"
    assert response.status_code == 500
    assert response.headers["content-type"] != "text/event-stream"
    assert "before the first byte" not in response.text
    assert error.__name__ in capsys.readouterr().err
    with pytest.raises(error):
        async with streamed(producing(generate)):
            pass


async def test_an_error_of_the_handler_is_a_proper_error_response(
    serve: Callable[..., Any],
) -> None:
    app = App()

    @app.get("/")
    async def handler() -> EventSourceResponse:
        content = forever()
        EventSourceResponse(content)  # made, and never sent
        raise LookupError("no")

    server = await serve(app, lifespan="off")
    async with httpx.AsyncClient(timeout=10) as client:
        response = await client.get(server.url)
    assert response.status_code == 500


async def test_an_error_on_the_way_breaks_the_response_off_so_that_the_client_comes_back(
    serve: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    async def generate() -> AsyncIterator[ServerSentEvent]:
        yield ServerSentEvent("first")
        await asyncio.sleep(0)
        raise LookupError("in the middle")

    server = await serve(producing(generate), lifespan="off")
    found = []
    async with httpx.AsyncClient(timeout=10) as client:
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            async with client.stream("GET", server.url) as response:
                async for event in events(response):
                    found.append(event.data)
    assert found in (["first"], [])
    assert "in the middle" in capsys.readouterr().err


async def test_the_wrong_thing_after_an_event_is_an_error_that_names_the_remedy() -> None:
    cleaned = []

    async def generate() -> AsyncIterator[Any]:
        try:
            yield ServerSentEvent("first")
            await asyncio.sleep(0.2)
            yield "text"
        finally:
            cleaned.append(True)

    with pytest.raises(TypeError, match=r"yields ServerSentEvent or Change, not str: wrap it"):
        async with streamed(producing(generate)) as stream:
            assert (await anext(stream)).data == "first"
            await anext(stream)
    assert cleaned == [True]


@pytest.fixture
def collected() -> Iterator[None]:
    """PyMongo forgets the socket that it was connecting; here it may, later it may not."""
    yield
    gc.collect()


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_database_that_is_away_when_a_stream_opens_is_no_503(
    driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    with ReplicaSet() as replica_set:
        async with opened(driver, replica_set.uri, serverSelectionTimeoutMS=500) as client:
            async with data_bridge.connect(client["shop"], limits=Limits(timeout=0.5)):
                await asyncio.to_thread(replica_set.kill)
                app = producing(SseOrder.watch)
                async with streaming_client(app) as http:
                    response = await http.get("/", headers={"Accept": "text/event-stream"})
    assert (response.status_code, response.content) == (200, b"retry: 1000\n\n")
    assert response.headers["content-type"] == "text/event-stream"
    assert "its client will come back" in caplog.text


# -- clients that leave -------------------------------------------------------------------------


class Witness:
    """Generators that tell what happens to them, in the server's own thread."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.ended = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    def end(self) -> None:
        self.happened.append("finally")
        self.loop.call_soon_threadsafe(self.ended.set)

    async def waits(self) -> AsyncIterator[ServerSentEvent]:
        try:
            yield ServerSentEvent("first")
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.happened.append("cancelled")
            raise
        finally:
            self.end()

    async def never_waits(self) -> AsyncIterator[ServerSentEvent]:
        try:
            while True:
                yield ServerSentEvent("first")
        except asyncio.CancelledError:
            self.happened.append("cancelled")
            raise
        finally:
            self.end()

    async def waits_before_its_first_event(self) -> AsyncIterator[ServerSentEvent]:
        try:
            await asyncio.Event().wait()
            yield ServerSentEvent("never")
        except asyncio.CancelledError:
            self.happened.append("cancelled")
            raise
        finally:
            self.end()

    async def is_stubborn(self) -> AsyncIterator[ServerSentEvent]:
        try:
            while True:
                yield ServerSentEvent("first")
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
                    continue
                self.happened.append("cancelled")
        finally:
            self.end()


@pytest.mark.parametrize(
    "name", ["waits", "never_waits", "waits_before_its_first_event", "is_stubborn"]
)
async def test_a_client_that_leaves_cancels_the_generator_and_runs_its_finally(
    serve: Callable[..., Any], name: str
) -> None:
    witness = Witness()
    server = await serve(producing(getattr(witness, name)), lifespan="off")
    async with httpx.AsyncClient(timeout=20) as client:
        async with client.stream("GET", server.url) as response:
            if name != "waits_before_its_first_event":
                await anext(events(response))
    async with asyncio.timeout(20):
        await witness.ended.wait()
    assert witness.happened == ["cancelled", "finally"]


async def test_a_client_that_leaves_before_anything_was_asked_of_an_iterator_closes_it() -> None:
    class Content:
        closed = False

        def __aiter__(self) -> Any:
            return self

        async def __anext__(self) -> Any:
            await asyncio.Event().wait()

        async def aclose(self) -> None:
            self.closed = True

    content = Content()
    exchange = Exchange(content)
    exchange.gone.set()
    await exchange.ended()
    assert content.closed
    never_called = Content()
    response = EventSourceResponse(never_called)
    await response.content.aclose()
    assert never_called.closed


async def test_an_error_while_a_generator_cleans_up_is_logged_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def generate() -> AsyncIterator[ServerSentEvent]:
        try:
            yield ServerSentEvent("first")
            await asyncio.Event().wait()
        finally:
            raise LookupError("while cleaning up")

    async with streamed(producing(generate)) as stream:
        await anext(stream)
    assert "a generator failed while it cleaned up" in caplog.text
    assert "Traceback" in caplog.text


async def test_a_subscriber_that_leaves_is_one_less(database: Any) -> None:
    app = watching(database)
    async with streaming_client(app) as client:
        async with client.stream("GET", "/") as response:
            await mark(events(response))
            (feed,) = app.bridge._feeds.values()
            assert feed.subscribers == 1
        await asyncio.sleep(0)
        assert feed.subscribers == 0


@pytest.mark.parametrize("leaves", [False, True], ids=["it ends", "its client leaves"])
async def test_a_background_task_runs_after_the_stream(leaves: bool) -> None:
    happened: list[str] = []

    async def generate() -> AsyncIterator[ServerSentEvent]:
        try:
            yield ServerSentEvent("first")
            if leaves:
                await asyncio.Event().wait()
        finally:
            happened.append("stream")

    async def after() -> None:
        await asyncio.sleep(0)
        happened.append("background")

    async with streamed(producing(generate, background=BackgroundTask(after))) as stream:
        await anext(stream)
        if not leaves:
            assert await anext(stream, None) is None
    assert happened == ["stream", "background"]


async def test_no_task_and_no_timer_outlives_its_stream(connections: list[Connection]) -> None:
    before = asyncio.all_tasks()
    exchanges = [Exchange(forever(), **SLOWLY) for _ in range(20)]
    for exchange in exchanges:
        await exchange.until(1)
        exchange.gone.set()
        await exchange.ended()
    assert asyncio.all_tasks() == before
    assert all(c._timer is not None and c._timer.cancelled() for c in connections)


# -- beside others ------------------------------------------------------------------------------


async def test_a_generator_that_never_waits_does_not_keep_others_from_their_turn(
    serve: Callable[..., Any],
) -> None:
    async def flood() -> AsyncIterator[ServerSentEvent]:
        while True:
            yield ServerSentEvent("x" * 1000)

    server = await serve(producing(flood), lifespan="off")
    curl = subprocess.Popen(
        ["curl", "--silent", "--no-buffer", "--output", "/dev/null", server.url],
    )
    try:
        async with httpx.AsyncClient(timeout=20) as client:
            async with client.stream("GET", server.url) as response:
                await anext(events(response))
                for _ in range(20):
                    assert (await client.get(f"{server.url}/ping")).json() == "pong"
        assert curl.poll() is None
    finally:
        curl.kill()
        curl.wait()


class PassThrough(BaseHTTPMiddleware):
    async def dispatch(
        self, request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = await call_next(request)
        response.headers["x-passed"] = "through"
        return response


async def test_middleware_of_starlette_in_front_streams_and_sees_clients_leave(
    serve: Callable[..., Any],
) -> None:
    witness = Witness()

    async def endpoint(request: Request) -> Response:
        return EventSourceResponse(witness.waits(), keep_alive=0.05)

    middleware = [Middleware(GZipMiddleware, minimum_size=1), Middleware(PassThrough)]
    app = Starlette(
        routes=[Route("/", endpoint), Route("/plain", lambda r: PlainTextResponse("x" * 1000))],
        middleware=middleware,
    )
    server = await serve(app, lifespan="off")
    async with httpx.AsyncClient(timeout=20) as client:
        plain = await client.get(f"{server.url}/plain")
        assert plain.headers["content-encoding"] == "gzip"
        async with client.stream("GET", server.url) as response:
            assert response.headers["x-passed"] == "through"
            assert "content-encoding" not in response.headers
            everything = events(response).everything()
            assert await anext(everything) == Event("first")
            for _ in range(3):
                assert await anext(everything) == Comment("")
    async with asyncio.timeout(20):
        await witness.ended.wait()
    assert witness.happened == ["cancelled", "finally"]


async def test_changes_pass_through_middleware_and_resume(
    serve: Callable[..., Any], database_uri: str, mongo: MongoClient[Any], database_name: str
) -> None:
    app = App(database_uri, middleware=[Middleware(GZipMiddleware), Middleware(PassThrough)])

    @app.get("/")
    async def stream() -> EventSourceResponse:
        return EventSourceResponse(SseOrder.watch())

    server = await serve(app)
    async with httpx.AsyncClient(timeout=20) as client:
        async with client.stream("GET", server.url) as response:
            stream = events(response)
            start = (await mark(stream)).id
            ids = [ObjectId() for _ in range(100)]
            mongo[database_name]["orders"].insert_many(
                [{"_id": id, "status": "open", "total": 1.0} for id in ids]
            )
            found = [json.loads((await anext(stream)).data)["id"] for _ in ids]
            assert found == [str(id) for id in ids]
        async with client.stream("GET", server.url, headers={"Last-Event-ID": start}) as response:
            stream = events(response)
            found = [json.loads((await anext(stream)).data)["id"] for _ in ids]
            assert found == [str(id) for id in ids]


async def test_a_connection_is_used_again_after_a_stream_that_ended(
    serve: Callable[..., Any],
) -> None:
    async def two() -> AsyncIterator[ServerSentEvent]:
        yield ServerSentEvent("1")
        yield ServerSentEvent("2")

    server = await serve(producing(two), lifespan="off")
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        for _ in range(2):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                received += await asyncio.to_thread(connection.recv, 65536)
            assert b"data: 1\n\ndata: 2\n\n" in received


async def test_frames_are_logged_nowhere_but_what_ends_a_stream_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, logger="data_bridge")
    content = Scripted()
    exchange = Exchange(content)
    await exchange.until(1)
    for _ in range(10):
        content.put(b"data: x\n\n")
        await asyncio.sleep(0)
    exchange.gone.set()
    await exchange.ended()
    assert caplog.records == []
