"""App: routes, results, errors, the database over the lifespan, and streams."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any
from uuid import UUID

import pytest
from bson import Binary, Decimal128, Int64, ObjectId, Timestamp
from pydantic import BaseModel, ConfigDict, Field
from starlette.endpoints import HTTPEndpoint
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from data_bridge import Document, Limits, errors
from data_bridge.api import App, EventSourceResponse, Header, ServerSentEvent
from data_bridge.testing import events, streaming_client

ID = "65a1b2c3d4e5f60718293a4b"


class Item(BaseModel):
    name: str
    at: datetime = datetime(2024, 2, 29, tzinfo=UTC)


class AppOrder(Document):
    status: str
    total: float = 0.0
    price: Decimal | None = None

    class Settings:
        collection = "orders"


def returning(result: Any, **options: Any) -> App:
    app = App()

    @app.get("/", **options)
    async def handler() -> Any:
        return result

    return app


async def answer(app: App, method: str = "GET", url: str = "/", **options: Any) -> Any:
    async with streaming_client(app) as client:
        return await client.request(method, url, **options)


# -- routes -------------------------------------------------------------------------------------


async def test_each_method_has_its_decorator_and_the_function_stays_itself() -> None:
    app = App()

    @app.get("/")
    async def read() -> str:
        return "get"

    @app.post("/", status_code=201)
    async def create() -> str:
        return "post"

    @app.put("/")
    def replace() -> str:
        return "put"

    @app.patch("/")
    async def change() -> str:
        return "patch"

    @app.delete("/", status_code=204)
    async def remove() -> None: ...

    assert await read() == "get"
    assert replace() == "put"
    async with streaming_client(app) as client:
        assert (await client.get("/")).json() == "get"
        created = await client.post("/")
        assert (created.status_code, created.json()) == (201, "post")
        assert (await client.put("/")).json() == "put"
        assert (await client.patch("/")).json() == "patch"
        removed = await client.delete("/")
        assert (removed.status_code, removed.content) == (204, b"")
        head = await client.head("/")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == "5"


async def test_a_route_has_its_functions_name_or_the_one_given() -> None:
    app = App()

    @app.get("/orders/{order_id}")
    async def order(order_id: str) -> None: ...

    @app.get("/named/{x}", name="other")
    async def named(x: str) -> None: ...

    assert app.url_path_for("order", order_id="7") == "/orders/7"
    assert app.url_path_for("other", x="7") == "/named/7"


async def test_a_plain_function_runs_in_a_thread_and_an_async_one_in_the_loop() -> None:
    app = App()

    @app.get("/plain")
    def plain(n: int) -> list[int]:
        return [n, threading.get_ident()]

    @app.get("/async")
    async def in_loop() -> int:
        return threading.get_ident()

    async with streaming_client(app) as client:
        n, ident = (await client.get("/plain?n=1")).json()
        assert n == 1
        assert ident != threading.get_ident()
        assert (await client.get("/async")).json() == threading.get_ident()


async def test_everything_of_starlette_works_beside_it() -> None:
    async def plain(request: Request) -> Response:
        return PlainTextResponse("plain")

    class Endpoint(HTTPEndpoint):
        async def get(self, request: Request) -> Response:
            return PlainTextResponse("class")

    inner = App()

    @inner.get("/{x}")
    async def mounted(x: int) -> int:
        return x

    app = App(
        routes=[Route("/plain", plain), Mount("/inner", inner)],
        middleware=[Middleware(CORSMiddleware, allow_origins=["*"])],
    )
    app.add_route("/class", Endpoint)  # type: ignore[arg-type]
    async with streaming_client(app) as client:
        response = await client.get("/plain", headers={"Origin": "http://a"})
        assert response.text == "plain"
        assert response.headers["access-control-allow-origin"] == "*"
        assert (await client.get("/class")).text == "class"
        assert (await client.get("/inner/7")).json() == 7
        assert (await client.get("/inner/x")).status_code == 422


async def test_not_found_and_not_allowed_are_json() -> None:
    async with streaming_client(returning(1)) as client:
        response = await client.get("/nowhere")
        assert (response.status_code, response.json()) == (404, {"detail": "Not Found"})
        response = await client.post("/")
        assert (response.status_code, response.json()) == (405, {"detail": "Method Not Allowed"})
        assert "GET" in response.headers["allow"]


def test_a_class_and_a_generator_are_refused_as_handlers_when_they_are_declared() -> None:
    app = App()

    class Endpoint(HTTPEndpoint):
        pass

    async def stream() -> AsyncIterator[ServerSentEvent]:
        yield ServerSentEvent("x")

    def numbers() -> Iterator[int]:
        yield 1

    with pytest.raises(errors.HandlerInvalid, match=r"Endpoint of GET /a is a class.*add_route"):
        app.get("/a")(Endpoint)
    with pytest.raises(errors.HandlerInvalid, match=r"stream of GET /b is a generator function"):
        app.get("/b")(stream)
    with pytest.raises(errors.HandlerInvalid, match=r"return EventSourceResponse\(generate\(\)\)"):
        app.get("/c")(numbers)
    assert app.routes == []


# -- results ------------------------------------------------------------------------------------


@dataclass
class Point:
    x: int
    y: int


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (None, None),
        ("text", "text"),
        (7, 7),
        (1.5, 1.5),
        (True, True),
        ([], []),
        ({"a": [1, None]}, {"a": [1, None]}),
        ((1, 2), [1, 2]),
        (Item(name="x"), {"name": "x", "at": "2024-02-29T00:00:00Z"}),
        ([Item(name="x")], [{"name": "x", "at": "2024-02-29T00:00:00Z"}]),
        ({"item": Item(name="x")}, {"item": {"name": "x", "at": "2024-02-29T00:00:00Z"}}),
        (Point(1, 2), {"x": 1, "y": 2}),
        (ObjectId(ID), ID),
        ({"_id": ObjectId(ID)}, {"_id": ID}),
        ({ObjectId(ID): 1}, {ID: 1}),
        (datetime(2024, 2, 29, tzinfo=UTC), "2024-02-29T00:00:00Z"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Decimal("1.10"), "1.10"),
        ([Decimal128("1.10"), Int64(5)], ["1.10", 5]),
        ({"at": Timestamp(1, 2)}, {"at": {"$timestamp": {"t": 1, "i": 2}}}),
        ([b"\xff\x00", Binary(b"\x01")], ["_wA=", "AQ=="]),
        ([float("nan"), float("inf")], [None, None]),
        ("\u2028é\x00", "\u2028é\x00"),
    ],
)
async def test_a_result_becomes_json(result: Any, expected: Any) -> None:
    response = await answer(returning(result))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == expected


async def test_a_document_is_as_it_serialises_itself() -> None:
    order = AppOrder(id=ObjectId(ID), status="open", price=Decimal("1.10"))
    expected = {"id": ID, "status": "open", "total": 0.0, "price": "1.10"}
    assert (await answer(returning(order))).json() == expected
    assert (await answer(returning([order]))).json() == [expected]
    assert (await answer(returning({"order": order}))).json() == {"order": expected}


async def test_a_models_own_wish_for_aliases_counts() -> None:
    class Plain(BaseModel):
        name: str = Field("x", alias="theName")

    class Aliased(Plain):
        model_config = ConfigDict(serialize_by_alias=True)

    result = [Plain(), Aliased()]
    assert (await answer(returning(result))).json() == [{"name": "x"}, {"theName": "x"}]


async def test_a_response_passes_through_untouched() -> None:
    result = PlainTextResponse("as is", 202, {"X-Mine": "1"})
    response = await answer(returning(result, status_code=201))
    assert (response.status_code, response.text) == (202, "as is")
    assert response.headers["x-mine"] == "1"


async def test_nothing_is_null_unless_the_status_says_no_content() -> None:
    response = await answer(returning(None))
    assert (response.status_code, response.content) == (200, b"null")
    response = await answer(returning(None, status_code=204))
    assert (response.status_code, response.content) == (204, b"")
    assert "content-type" not in response.headers


class Unknown:
    pass


async def _coroutine() -> None: ...


async def _events() -> AsyncIterator[ServerSentEvent]:
    yield ServerSentEvent("x")


def _circle() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


WRONG: list[tuple[str, Callable[[], Any], str]] = [
    ("async generator", _events, "async_generator: wrap it in EventSourceResponse(...)"),
    ("event", lambda: ServerSentEvent("x"), "return EventSourceResponse(generate())"),
    ("coroutine", _coroutine, "coroutine: it has to be awaited"),
    ("future", asyncio.Future, "Future: it has to be awaited"),
    ("generator", lambda: (x for x in "ab"), "generator: return a list, or stream"),
    ("exception", lambda: HTTPException(404), "HTTPException: raise it instead"),
    ("bytes", lambda: b"x", "bytes: wrap it in Response(...)"),
    ("object", Unknown, "test_app.Unknown: it has no JSON form"),
    ("object inside", lambda: {"a": [Unknown()]}, "a test_app.Unknown has no JSON form"),
    ("class", lambda: Unknown, "builtins.type: it has no JSON form"),
    ("circle", _circle, "Circular reference"),
    ("half a surrogate pair", lambda: "\ud800", "surrogates not allowed"),
]


@pytest.mark.parametrize(("result", "remedy"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
async def test_a_wrong_result_is_500_and_the_log_names_handler_and_remedy(
    result: Callable[[], Any], remedy: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = App()

    @app.get("/orders")
    async def orders() -> Any:
        return result()

    response = await answer(app, url="/orders")
    assert response.status_code == 500
    assert response.json() == {"detail": "Internal Server Error"}
    (record,) = [r for r in caplog.records if r.name == "data_bridge.api"]
    assert record.levelno == logging.ERROR
    message = record.getMessage()
    assert message.startswith("handler test_app.test_a_wrong_result_is_500")
    assert ".orders of GET /orders returned " in message
    assert remedy in message


async def test_a_change_stream_is_a_wrong_result_too(
    database: Any, caplog: pytest.LogCaptureFixture
) -> None:
    app = App(database=database)

    @app.get("/")
    async def live() -> Any:
        return AppOrder.watch()

    assert (await answer(app)).status_code == 500
    assert "ChangeStream: wrap it in EventSourceResponse(...)" in caplog.text


async def test_a_result_that_a_status_without_a_body_cannot_carry_is_500(
    caplog: pytest.LogCaptureFixture,
) -> None:
    response = await answer(returning({"a": 1}, status_code=204))
    assert response.status_code == 500
    assert "a 204 response has no body; return None" in caplog.text


async def test_while_debugging_a_wrong_result_is_raised() -> None:
    app = returning(Unknown())
    app.debug = True
    with pytest.raises(errors.ResultInvalid, match="has no JSON form"):
        await answer(app)


# -- errors -------------------------------------------------------------------------------------


def raising(error: BaseException, **options: Any) -> App:
    app = App(**options)

    @app.get("/")
    async def handler() -> None:
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "status", "detail"),
    [
        (errors.InvalidResumeToken("no token"), 400, "no token"),
        (errors.DocumentNotFound("no order"), 404, "no order"),
        (errors.DuplicateKey("it exists"), 409, "it exists"),
        (
            errors.ServerUnreachable("nothing at 10.0.0.1"),
            503,
            "The database does not answer at the moment",
        ),
        (HTTPException(418, "teapot", {"X-Mine": "1"}), 418, "teapot"),
    ],
)
async def test_an_exception_that_a_client_can_act_on_has_its_status(
    error: Exception, status: int, detail: str
) -> None:
    response = await answer(raising(error))
    assert response.status_code == status
    assert response.json() == {"detail": detail}
    assert response.headers.get("x-mine") == ("1" if status == 418 else None)
    assert response.headers.get("retry-after") == ("3" if status == 503 else None)


async def test_a_browser_that_opens_a_stream_while_the_database_is_away_comes_again() -> None:
    error = errors.ServerUnreachable("away")
    response = await answer(raising(error), headers={"Accept": "text/event-stream"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream"
    assert response.content == b"retry: 3000\n\n"


@pytest.mark.parametrize("error", [errors.InvalidFilter("$where"), RuntimeError("secret")])
async def test_any_other_exception_is_a_500_without_internals_and_reaches_the_server(
    error: Exception,
) -> None:
    app = raising(error)
    with pytest.raises(type(error)):
        await answer(app)
    async with streaming_client(app, raise_app_exceptions=False) as client:
        response = await client.get("/")
    assert (response.status_code, response.text) == (500, "Internal Server Error")


async def test_the_users_own_exception_handlers_come_first() -> None:
    async def mine(request: Request, error: Exception) -> Response:
        return JSONResponse({"mine": type(error).__name__}, 499)

    handlers = {errors.DuplicateKey: mine, 422: mine, 404: mine}
    app = raising(errors.DuplicateKey("x"), exception_handlers=handlers)

    @app.get("/number")
    async def number(n: int) -> None: ...

    async with streaming_client(app) as client:
        assert (await client.get("/")).json() == {"mine": "DuplicateKey"}
        assert (await client.get("/number")).json() == {"mine": "RequestInvalid"}
        assert (await client.get("/nowhere")).json() == {"mine": "HTTPException"}


async def test_a_client_that_leaves_while_it_sends_its_body_is_no_error() -> None:
    app = App()

    @app.post("/")
    async def handler(item: Item) -> None: ...

    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
    await app({**scope, "root_path": "", "http_version": "1.1"}, receive, send)
    assert sent[0]["status"] == 400


# -- the lifespan -------------------------------------------------------------------------------


async def test_the_bridge_is_open_over_the_lifespan_and_around_the_users_own(
    database: Any,
) -> None:
    log: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: App) -> AsyncIterator[dict[str, Any]]:
        await AppOrder(status="open").insert()
        log.append(f"{await AppOrder.count()} order")
        yield {"mine": "state"}
        log.append(f"{await AppOrder.count()} orders")

    app = App(database=database, lifespan=lifespan)

    @app.post("/orders", status_code=201)
    async def create(order: AppOrder, request: Request) -> AppOrder:
        assert request.app.state.bridge is request.app.bridge is request.state.bridge
        assert request.state.mine == "state"
        await order.insert()
        return order

    @app.get("/orders/{order_id}")
    async def read(order_id: ObjectId) -> AppOrder:
        order = await AppOrder.get(order_id)
        if order is None:
            raise HTTPException(404, "no such order")
        return order

    @app.get("/orders")
    async def read_all(status: str | None = None) -> list[AppOrder]:
        return await AppOrder.find({"status": status} if status else {})

    async with streaming_client(app) as client:
        created = await client.post("/orders", json={"status": "new", "price": "1.10"})
        assert created.status_code == 201
        order = created.json()
        assert order["price"] == "1.10"
        assert (await client.get(f"/orders/{order['id']}")).json() == order
        assert (await client.get(f"/orders/{ID}")).status_code == 404
        assert (await client.get("/orders/abc")).status_code == 422
        assert (await client.get("/orders?status=new")).json() == [order]
        assert len((await client.get("/orders")).json()) == 2
    assert log == ["1 order", "2 orders"]
    with pytest.raises(errors.NotBound, match="it is not open"):
        _ = app.bridge
    assert not hasattr(app.state, "bridge")


async def test_a_database_is_a_uri_too(database_uri: str) -> None:
    app = App(database_uri, documents=[AppOrder])

    @app.get("/")
    async def count() -> int:
        return await AppOrder.count()

    assert (await answer(app)).json() == 0


async def test_an_application_without_a_database_has_no_bridge() -> None:
    app = App()
    async with streaming_client(app):
        with pytest.raises(errors.NotBound, match="was given none"):
            _ = app.bridge


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
async def test_a_database_that_is_not_there_is_told_at_startup() -> None:
    app = App("mongodb://127.0.0.1:1/shop?serverSelectionTimeoutMS=100")
    with pytest.raises(errors.ServerUnreachable):
        async with streaming_client(app):
            pass
    # PyMongo forgets the socket that it was connecting; here it may, in another test it may not.
    gc.collect()


async def test_a_lifespan_may_be_a_bare_generator_function() -> None:
    log = []

    async def lifespan(app: App) -> AsyncIterator[None]:
        log.append("open")
        yield
        log.append("closed")

    async with streaming_client(App(lifespan=lifespan)):  # type: ignore[arg-type]
        assert log == ["open"]
    assert log == ["open", "closed"]


# -- streams ------------------------------------------------------------------------------------


async def test_the_quick_start_streams() -> None:
    app = App()

    @app.get("/events")
    async def stream_events():  # type: ignore[no-untyped-def]
        async def generate() -> AsyncIterator[ServerSentEvent]:
            for i in range(10):
                yield ServerSentEvent(data=f"Event {i}")

        return EventSourceResponse(generate())

    async with (
        streaming_client(app) as client,
        client.stream("GET", "/events") as response,
    ):
        assert response.headers["content-type"] == "text/event-stream"
        assert [e.data async for e in events(response)] == [f"Event {i}" for i in range(10)]


async def test_a_stream_resumes_by_the_last_event_id() -> None:
    app = App()

    @app.get("/events")
    async def numbers(last_event_id: str = Header(None, alias="Last-Event-ID")):  # type: ignore[no-untyped-def]
        async def generate() -> AsyncIterator[ServerSentEvent]:
            start_from = int(last_event_id) if last_event_id else 0
            for i in range(start_from, 5):
                yield ServerSentEvent(data=f"Event {i}", id=str(i))

        return EventSourceResponse(generate())

    async with streaming_client(app) as client:
        async with client.stream("GET", "/events") as response:
            assert [e.id async for e in events(response)] == ["0", "1", "2", "3", "4"]
        headers = {"Last-Event-ID": "3"}
        async with client.stream("GET", "/events", headers=headers) as response:
            assert [e.id async for e in events(response)] == ["3", "4"]


async def test_two_clients_stream_at_once_and_each_is_cleaned_up_when_it_leaves() -> None:
    app = App()
    waiting: dict[str, asyncio.Queue[str]] = {"a": asyncio.Queue(), "b": asyncio.Queue()}
    ended: list[str] = []

    @app.get("/{name}")
    async def stream(name: str) -> Response:
        async def generate() -> AsyncIterator[ServerSentEvent]:
            try:
                while True:
                    yield ServerSentEvent(await waiting[name].get())
            except asyncio.CancelledError:
                ended.append(f"{name} cancelled")
                raise
            finally:
                ended.append(f"{name} ended")

        return EventSourceResponse(generate())

    async with streaming_client(app) as client:
        async with client.stream("GET", "/a") as a, client.stream("GET", "/b") as b:
            events_a, events_b = events(a), events(b)
            for text in ("1", "2"):
                waiting["b"].put_nowait(text)
                waiting["a"].put_nowait(text)
                assert (await anext(events_a)).data == text
                assert (await anext(events_b)).data == text
            await b.aclose()
            assert ended == ["b cancelled", "b ended"]
            waiting["a"].put_nowait("3")
            assert (await anext(events_a)).data == "3"
        assert ended == ["b cancelled", "b ended", "a cancelled", "a ended"]


async def test_any_streaming_response_of_starlette_passes_through() -> None:
    app = App()

    @app.get("/")
    def plain() -> Response:
        return StreamingResponse(iter(["a", "b"]))

    assert (await answer(app)).text == "ab"


async def test_changes_reach_a_client_through_the_naive_handler(database: Any) -> None:
    app = App(database=database)
    watching = asyncio.Event()

    @app.get("/orders/live")
    async def live_orders():  # type: ignore[no-untyped-def]
        async def generate() -> AsyncIterator[ServerSentEvent]:
            async with AppOrder.watch() as changes:
                watching.set()
                async for change in changes:
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

    async with (
        streaming_client(app) as client,
        client.stream("GET", "/orders/live") as response,
    ):
        await watching.wait()
        order = await AppOrder(status="open", total=2.5).insert()
        event = await anext(events(response))
        assert event.event == "order_update"
        assert event.id
        data = json.loads(event.data)
        assert data["operation"] == "insert"
        assert data["order_id"] == str(order.id)
        assert data["data"]["status"] == "open"


async def test_a_handler_with_annotated_arguments_streams() -> None:
    app = App()

    @app.get("/")
    async def stream(n: int, last_event_id: Annotated[int | None, Header()] = None) -> Response:
        async def generate() -> AsyncIterator[ServerSentEvent]:
            for number in range((last_event_id or 0) + 1, n + 1):
                yield ServerSentEvent(str(number), id=str(number))

        return EventSourceResponse(generate())

    async with streaming_client(app) as client:
        headers = {"Last-Event-ID": "2"}
        async with client.stream("GET", "/?n=3", headers=headers) as response:
            assert [e.data async for e in events(response)] == ["3"]
        assert (await client.get("/?n=x", headers={"Last-Event-ID": "y"})).status_code == 422


async def test_an_application_with_a_live_query_serves_the_browser_module() -> None:
    app = App()
    app.live("/orders/live", AppOrder)
    app.live("/orders/open", AppOrder, filter={"status": "open"})

    response = await answer(app, url="/data-bridge/live.js")

    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/javascript")
    assert "export function live(" in response.text
    assert (await answer(app, url="/data-bridge/live.d.ts")).status_code == 200
    assert (await answer(app, url="/data-bridge/nothing.js")).status_code == 404


async def test_the_limits_are_those_of_its_bridge(database: Any) -> None:
    app = App(database=database, documents=[], limits=Limits(window=7))
    async with streaming_client(app):
        assert app.bridge.limits.window == 7
