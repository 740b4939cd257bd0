"""Handler arguments: where each comes from, what it is turned into, and what is refused."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import httpx
import pytest
from bson import Decimal128, Int64, ObjectId
from pydantic import BaseModel, Field
from starlette.requests import HTTPConnection, Request
from starlette.websockets import WebSocket

from data_bridge import Document
from data_bridge.api import App, Header, Path, Query
from data_bridge.api.params import Body
from data_bridge.errors import DataBridgeError, HandlerInvalid
from data_bridge.testing import streaming_client

if TYPE_CHECKING:
    from somewhere import Unknown  # type: ignore[import-not-found]

ID = "65a1b2c3d4e5f60718293a4b"


class Status(StrEnum):
    OPEN = "open"
    CLOSED = "closed"


class Item(BaseModel):
    name: str
    price: float = Field(gt=0)


class Order(Document):
    status: Status
    items: list[Item] = Field(default_factory=list)

    class Settings:
        collection = "orders"


class Called:
    """A handler's arguments, as it was called with them."""

    def __init__(self) -> None:
        self.app = App()
        self.values: Any = None

    def __call__(self, *values: Any) -> None:
        self.values = values if len(values) != 1 else values[0]

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        async with streaming_client(self.app) as client:
            yield client

    async def get(self, url: str, **options: Any) -> httpx.Response:
        async with self.client() as client:
            return await client.get(url, **options)

    async def post(self, url: str, **options: Any) -> httpx.Response:
        async with self.client() as client:
            return await client.post(url, **options)


@pytest.fixture
def called() -> Called:
    return Called()


# -- the path -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (str, "42", "42"),
        (int, "42", 42),
        (float, "4.5", 4.5),
        (bool, "true", True),
        (Decimal, "1.10", Decimal("1.10")),
        (UUID, "12345678123456781234567812345678", UUID("12345678123456781234567812345678")),
        (date, "2024-02-29", date(2024, 2, 29)),
        (datetime, "2024-02-29T12:00:00Z", datetime(2024, 2, 29, 12, tzinfo=UTC)),
        (Status, "open", Status.OPEN),
        (Literal["a", "b"], "b", "b"),
        (Annotated[int, Field(ge=0)], "0", 0),
        (int | str, "a", "a"),
        (ObjectId, ID, ObjectId(ID)),
        (ObjectId | None, ID, ObjectId(ID)),
        (Annotated[ObjectId, "any"], ID, ObjectId(ID)),
        (Decimal128, "1.10", Decimal128("1.10")),
        (Int64, "9007199254740993", Int64(9007199254740993)),
    ],
)
async def test_a_path_parameter_becomes_what_its_annotation_says(
    called: Called, annotation: Any, text: str, value: Any
) -> None:
    async def handler(value):  # type: ignore[no-untyped-def]
        called(value)

    handler.__annotations__["value"] = annotation
    called.app.get("/{value}")(handler)
    assert (await called.get(f"/{text}")).status_code == 200
    assert called.values == value
    assert type(called.values) is type(value)


@pytest.mark.parametrize(
    ("annotation", "text", "message"),
    [
        (int, "abc", "Input should be a valid integer, unable to parse string as an integer"),
        (int, "9" * 5000, "Unable to parse input string as an integer, exceeded maximum size"),
        (UUID, "abc", "Input should be a valid UUID"),
        (datetime, "yesterday", "Input should be a valid datetime"),
        (Status, "lost", "Input should be 'open' or 'closed'"),
        (ObjectId, "abc", "ObjectId"),
        (ObjectId, "z" * 24, "ObjectId"),
        (ObjectId, "twelve_bytes", "ObjectId"),
        (Decimal128, "many", "Decimal128"),
        (Int64, str(2**63), "Input should be less than"),
    ],
)
async def test_a_path_parameter_of_the_wrong_type_is_422_and_named(
    called: Called, annotation: Any, text: str, message: str
) -> None:
    async def handler(value):  # type: ignore[no-untyped-def]
        called(value)

    handler.__annotations__["value"] = annotation
    called.app.get("/{value}")(handler)
    response = await called.get(f"/{text}")
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json()["detail"]
    assert error["in"] == "path"
    assert error["name"] == "value"
    assert message in error["message"]
    assert error["input"] == (text if len(text) <= 100 else text[:100] + "…")
    assert called.values is None


async def test_a_convertor_of_the_path_and_an_annotation_go_together(called: Called) -> None:
    @called.app.get("/{number:int}/{rest:path}")
    async def handler(number: int, rest: str) -> None:
        called(number, rest)

    await called.get("/7/a/b")
    assert called.values == (7, "a/b")
    assert (await called.get("/x/a")).status_code == 404


async def test_a_path_parameter_may_have_another_name(called: Called) -> None:
    @called.app.get("/{id}")
    async def handler(order_id: Annotated[int, Path(alias="id")]) -> None:
        called(order_id)

    await called.get("/7")
    assert called.values == 7
    (error,) = (await called.get("/x")).json()["detail"]
    assert (error["in"], error["name"]) == ("path", "id")


# -- the query ----------------------------------------------------------------------------------


async def test_everything_else_comes_from_the_query(called: Called) -> None:
    @called.app.get("/")
    async def handler(limit: int, sort: str = "id", after: ObjectId | None = None) -> None:
        called(limit, sort, after)

    await called.get(f"/?limit=5&after={ID}")
    assert called.values == (5, "id", ObjectId(ID))


async def test_a_list_takes_every_value_of_a_repeated_name(called: Called) -> None:
    @called.app.get("/")
    async def handler(
        number: list[int],
        status: Annotated[set[Status] | None, Query()] = None,
        id: tuple[ObjectId, ...] = (),
    ) -> None:
        called(number, status, id)

    await called.get(f"/?number=1&number=2&status=open&id={ID}&id={ID}")
    assert called.values == ([1, 2], {Status.OPEN}, (ObjectId(ID), ObjectId(ID)))
    await called.get("/?number=1")
    assert called.values == ([1], None, ())

    response = await called.get("/?number=1&number=x")
    assert response.status_code == 422
    (error,) = response.json()["detail"]
    assert (error["name"], error["input"]) == ("number.1", "x")


async def test_a_default_that_is_a_list_is_not_shared_by_requests(called: Called) -> None:
    @called.app.get("/")
    async def handler(tag: list[str] = Query([])) -> list[str]:
        tag.append("more")
        return tag

    async with called.client() as client:
        for _ in range(2):
            assert (await client.get("/")).json() == ["more"]


async def test_query_has_a_default_and_an_alias_in_either_style(called: Called) -> None:
    @called.app.get("/")
    async def handler(
        a: int = Query(1, alias="a-b"),
        b: Annotated[int, Query(alias="b-c")] = 2,
        c: Annotated[int, Query(3)] = ...,  # type: ignore[assignment]
        d: Annotated[int, Query] = 4,
    ) -> None:
        called(a, b, c, d)

    await called.get("/")
    assert called.values == (1, 2, 3, 4)
    await called.get("/?a-b=5&b-c=6&c=7&d=8&a=9")
    assert called.values == (5, 6, 7, 8)


async def test_what_is_required_and_absent_is_422(called: Called) -> None:
    @called.app.get("/")
    async def handler(
        a: int, b: str = Query(), c: str = Header(...), d: Annotated[str, Header()] = "d"
    ) -> None:
        called(a, b, c, d)

    response = await called.get("/")
    assert response.status_code == 422
    assert response.json() == {
        "detail": [
            {"in": "query", "name": "a", "message": "Required, but absent", "input": None},
            {"in": "query", "name": "b", "message": "Required, but absent", "input": None},
            {"in": "header", "name": "c", "message": "Required, but absent", "input": None},
        ]
    }


async def test_an_argument_without_an_annotation_is_text(called: Called) -> None:
    @called.app.get("/{a}")
    async def handler(a, b, c="d"):  # type: ignore[no-untyped-def]
        called(a, b, c)

    await called.get("/1?b=2")
    assert called.values == ("1", "2", "d")


async def test_escapes_that_are_no_utf_8_do_no_harm(called: Called) -> None:
    @called.app.get("/")
    async def handler(q: str, n: int = 0) -> None:
        called(q)

    async with called.client() as client:
        assert (await client.get("/?q=%ff%fe")).status_code == 200
        assert called.values == "\ufffd\ufffd"
        assert (await client.get("/?q=%ED%A0%80")).status_code == 200  # half a surrogate pair
        response = await client.get("/?q=x&n=%ff%ED%A0%80%00")
        assert response.status_code == 422


# -- headers ------------------------------------------------------------------------------------


async def test_the_last_event_id_of_the_documentation(called: Called) -> None:
    @called.app.get("/")
    async def events(last_event_id: str = Header(None, alias="Last-Event-ID")) -> None:
        called(last_event_id)

    await called.get("/")
    assert called.values is None
    await called.get("/", headers={"last-event-id": "42"})
    assert called.values == "42"


async def test_the_last_event_id_as_annotated(called: Called) -> None:
    @called.app.get("/")
    async def events(
        last_event_id: Annotated[int | None, Header(alias="Last-Event-ID")] = None,
    ) -> None:
        called(last_event_id)

    await called.get("/")
    assert called.values is None
    await called.get("/", headers={"Last-Event-ID": "42"})
    assert called.values == 42
    response = await called.get("/", headers={"Last-Event-ID": "x"})
    assert response.status_code == 422
    (error,) = response.json()["detail"]
    assert (error["in"], error["name"], error["input"]) == ("header", "last-event-id", "x")


async def test_a_headers_name_is_the_arguments_with_dashes(called: Called) -> None:
    @called.app.get("/")
    async def handler(user_agent: Annotated[str, Header], x_tag: list[str] = Header()) -> None:
        called(user_agent, x_tag)

    await called.get("/", headers=[("User-Agent", "me"), ("X-Tag", "a"), ("x-tag", "b")])
    assert called.values == ("me", ["a", "b"])


async def test_a_header_is_utf_8_as_event_source_sends_it_or_else_latin_1(called: Called) -> None:
    @called.app.get("/")
    async def handler(last_event_id: str = Header()) -> None:
        called(last_event_id)

    await called.get("/", headers={"Last-Event-ID": "größer".encode()})
    assert called.values == "größer"
    await called.get("/", headers={"Last-Event-ID": "größer".encode("latin-1")})
    assert called.values == "größer"


async def test_a_header_of_a_megabyte_is_refused_with_a_short_answer(called: Called) -> None:
    @called.app.get("/")
    async def handler(last_event_id: int = Header(None, alias="Last-Event-ID")) -> None:
        called(last_event_id)

    response = await called.get("/", headers={"Last-Event-ID": "9" * 1024 * 1024})
    assert response.status_code == 422
    assert len(response.content) < 500


async def test_an_empty_header_is_empty_and_not_absent(called: Called) -> None:
    @called.app.get("/")
    async def handler(last_event_id: str = Header(None)) -> None:
        called(last_event_id)

    await called.get("/", headers={"Last-Event-ID": ""})
    assert called.values == ""


# -- the request --------------------------------------------------------------------------------


async def test_the_request_is_given_by_annotation_or_by_its_name(called: Called) -> None:
    @called.app.get("/a")
    async def by_annotation(connection: Request, other: HTTPConnection) -> None:
        assert connection is other
        called(connection.url.path)

    @called.app.get("/b")
    async def by_name(request):  # type: ignore[no-untyped-def]
        called(request.url.path)

    @called.app.get("/c")
    async def positional(request: Request, limit: int = 3, /) -> None:
        called(request.url.path, limit)

    await called.get("/a")
    assert called.values == "/a"
    await called.get("/b")
    assert called.values == "/b"
    await called.get("/c")
    assert called.values == ("/c", 3)


# -- the body -----------------------------------------------------------------------------------


async def test_a_model_is_the_json_body(called: Called) -> None:
    @called.app.post("/{shop}")
    async def handler(shop: str, item: Item, dry: bool = False) -> None:
        called(shop, item, dry)

    response = await called.post("/a?dry=1", json={"name": "x", "price": 2})
    assert response.status_code == 200
    assert called.values == ("a", Item(name="x", price=2.0), True)


async def test_a_document_is_the_json_body(called: Called) -> None:
    @called.app.post("/")
    async def handler(order: Order) -> None:
        called(order)

    body = {"id": ID, "status": "open", "items": [{"name": "x", "price": 1}]}
    assert (await called.post("/", json=body)).status_code == 200
    assert called.values.id == ObjectId(ID)
    assert called.values.status is Status.OPEN
    assert called.values.items == [Item(name="x", price=1)]


async def test_lists_and_dicts_and_whatever_is_marked_are_the_body_too(called: Called) -> None:
    @called.app.post("/list")
    async def a_list(items: list[Item]) -> None:
        called(items)

    @called.app.put("/dict")
    async def a_dict(values: dict[str, int]) -> None:
        called(values)

    @called.app.patch("/ids")
    async def ids(ids: Annotated[list[ObjectId], Body()]) -> None:
        called(ids)

    @called.app.delete("/text")
    async def text(text: str = Body("none")) -> None:
        called(text)

    async with called.client() as client:
        await client.post("/list", json=[{"name": "x", "price": 1}])
        assert called.values == [Item(name="x", price=1)]
        await client.put("/dict", json={"a": 1})
        assert called.values == {"a": 1}
        await client.patch("/ids", json=[ID])
        assert called.values == [ObjectId(ID)]
        await client.request("DELETE", "/text", json="a")
        assert called.values == "a"
        await client.delete("/text")
        assert called.values == "none"


async def test_a_body_may_be_left_out_where_it_has_a_default(called: Called) -> None:
    @called.app.post("/")
    async def handler(item: Item | None = None) -> None:
        called(item)

    assert (await called.post("/")).status_code == 200
    assert called.values is None


async def test_a_handler_may_read_the_raw_body_beside_its_model(called: Called) -> None:
    @called.app.post("/")
    async def handler(item: Item, request: Request) -> None:
        called(item.name, await request.body())

    await called.post("/", content=b'{"name":"x","price":1}', headers=JSON)
    assert called.values == ("x", b'{"name":"x","price":1}')


JSON = {"Content-Type": "application/json"}


def with_item(called: Called) -> None:
    @called.app.post("/{number}")
    async def handler(number: int, item: Item) -> None:
        called(number, item)


async def test_every_misfit_is_reported_at_once(called: Called) -> None:
    with_item(called)
    response = await called.post("/x", json={"price": -1})
    assert response.status_code == 422
    found = [(e["in"], e["name"], e["input"]) for e in response.json()["detail"]]
    assert found == [("path", "number", "x"), ("body", "name", None), ("body", "price", -1)]


async def test_a_misfit_deep_in_the_body_is_named_by_its_path(called: Called) -> None:
    @called.app.post("/")
    async def handler(order: Order) -> None: ...

    response = await called.post("/", json={"status": "open", "items": [{"name": [], "price": 1}]})
    assert response.status_code == 422
    (error,) = response.json()["detail"]
    assert error["name"] == "items.0.name"
    assert error["input"] is None  # only scalars are repeated


@pytest.mark.parametrize(
    "body",
    [b"{", b"no json", b"\xff\xfe", b'{"name": "\\ud800"}', b"[" * 10_000, b"\x00", b" "],
)
async def test_a_body_that_is_no_json_is_400(called: Called, body: bytes) -> None:
    with_item(called)
    response = await called.post("/1", content=body, headers=JSON)
    assert response.status_code == 400
    (error,) = response.json()["detail"]
    assert (error["in"], error["name"], error["input"]) == ("body", "item", None)
    assert error["message"].startswith("Invalid JSON: ")


async def test_an_absent_body_is_422(called: Called) -> None:
    with_item(called)
    response = await called.post("/1", headers=JSON)
    assert response.status_code == 422
    assert response.json()["detail"] == [
        {"in": "body", "name": "item", "message": "Required, but absent", "input": None}
    ]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_a_body_of_another_type_is_415_and_says_what_to_send(
    called: Called, kind: str | None
) -> None:
    with_item(called)
    headers = {} if kind is None else {"Content-Type": kind}
    response = await called.post("/1", content=b"{}", headers=headers)
    assert response.status_code == 415
    assert "Content-Type: application/json" in response.json()["detail"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/ld+json"])
async def test_json_has_many_media_types(called: Called, kind: str) -> None:
    with_item(called)
    content = b'{"name":"x","price":1}'
    response = await called.post("/1", content=content, headers={"Content-Type": kind})
    assert response.status_code == 200


async def test_a_body_over_the_bound_is_413_whether_it_is_announced_or_not() -> None:
    app = App(max_body=100)

    @app.post("/")
    async def handler(item: dict[str, str]) -> int:
        return len(item["a"])

    async def chunks() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 10

    async with streaming_client(app) as client:
        assert (await client.post("/", json={"a": "x" * 92})).json() == 92
        announced = await client.post("/", json={"a": "x" * 93})
        assert announced.status_code == 413
        assert announced.json() == {"detail": "The body is larger than 100 bytes"}
        assert (await client.post("/", content=chunks(), headers=JSON)).status_code == 413
        lying = {**JSON, "Content-Length": "5"}
        assert (await client.post("/", content=chunks(), headers=lying)).status_code == 413


async def test_a_body_that_a_handler_reads_itself_has_no_bound_from_here() -> None:
    app = App(max_body=1)

    @app.post("/")
    async def handler(request: Request) -> int:
        return len(await request.body())

    async with streaming_client(app) as client:
        assert (await client.post("/", content=b"12345")).json() == 5


# -- what is refused when it is declared --------------------------------------------------------


def refusal(path: str, handler: Any, method: str = "get") -> str:
    app = App()
    with pytest.raises(HandlerInvalid) as caught:
        getattr(app, method)(path)(handler)
    assert isinstance(caught.value, DataBridgeError)
    assert app.routes == []
    return str(caught.value)


def test_arguments_with_stars_are_refused_by_name() -> None:
    async def handler(*values: str) -> None: ...

    message = refusal("/a", handler)
    assert "handler test_params.test_arguments_with_stars_are_refused_by_name.handler" in message
    assert "of GET /a: argument 'values' is *values" in message

    async def other(**options: str) -> None: ...

    assert "argument 'options' is **options" in refusal("/a", other)


def test_a_type_that_pydantic_does_not_know_is_refused_by_name() -> None:
    class Thing:
        pass

    async def handler(thing: Thing) -> None: ...

    handler.__annotations__["thing"] = Thing
    message = refusal("/a", handler)
    assert "argument 'thing' has the type" in message
    assert "which pydantic cannot validate" in message


def test_an_annotation_that_does_not_exist_at_run_time_is_refused_by_name() -> None:
    async def handler(a: int, thing: Unknown) -> None: ...

    message = refusal("/a", handler)
    assert "argument 'thing' has the annotation 'Unknown', which cannot be evaluated" in message
    assert "out of `if TYPE_CHECKING`" in message


async def test_a_return_annotation_need_not_exist_at_run_time(called: Called) -> None:
    @called.app.get("/")
    async def handler(a: int = 1) -> Unknown:
        called(a)

    await called.get("/")
    assert called.values == 1


async def test_a_string_annotation_may_name_what_is_local_to_the_declaration(
    called: Called,
) -> None:
    class Local(BaseModel):
        name: str

    @called.app.post("/")
    async def handler(local: Local, more: Annotated[list[Status] | None, Query()] = None) -> None:
        called(local.name, more)

    assert handler.__annotations__["local"] == "Local"
    await called.post("/?more=open", json={"name": "x"})
    assert called.values == ("x", [Status.OPEN])


def test_a_body_is_refused_where_the_method_has_none() -> None:
    async def handler(item: Item) -> None: ...

    assert "argument 'item' is the request's body, and this method has none" in refusal(
        "/", handler
    )


def test_two_bodies_are_refused() -> None:
    async def handler(one: Item, two: Item) -> None: ...

    assert "argument 'two' is the request's body, and so is 'one'" in refusal("/", handler, "post")


def test_a_model_is_refused_in_path_query_and_header() -> None:
    async def path(item: Item) -> None: ...

    async def query(item: Item = Query()) -> None: ...

    async def header(item: dict[str, str] = Header()) -> None: ...

    assert "is from the path, which is text" in refusal("/{item}", path, "post")
    assert "is from the query, which is text" in refusal("/", query, "post")
    assert "is from the header, which is text" in refusal("/", header, "post")


def test_a_path_parameter_that_the_path_has_not_is_refused() -> None:
    async def handler(order: Annotated[str, Path()]) -> None: ...

    assert "argument 'order' is from the path, which has no {order}" in refusal("/{id}", handler)


def test_an_argument_has_one_source() -> None:
    async def handler(a: Annotated[str, Header()] = Query()) -> None: ...

    assert "argument 'a' is given more than one source" in refusal("/", handler)


@pytest.mark.parametrize("name", ["a b", "a:b", "ä", "", "a\n"])
def test_what_cannot_be_a_headers_name_is_refused(name: str) -> None:
    async def handler(a: str = Header(alias=name)) -> None: ...

    if name:
        assert "for a header's name" in refusal("/", handler)
    else:
        App().get("/")(handler)  # an empty alias is none


def test_a_web_socket_is_refused() -> None:
    async def handler(socket: WebSocket) -> None: ...

    assert "argument 'socket' is a WebSocket" in refusal("/", handler)


# -- what else can be a handler -----------------------------------------------------------------


async def test_methods_partials_and_callables_are_handlers(called: Called) -> None:
    class Shop:
        async def order(self, number: int) -> None:
            called("method", number)

        async def __call__(self, number: int) -> None:
            called("callable", number)

    async def function(word: str, number: int) -> None:
        called(word, number)

    def wrapped(handler: Any) -> Any:
        @functools.wraps(handler)
        async def wrapper(**arguments: Any) -> Any:
            return await handler(**arguments)

        return wrapper

    called.app.get("/method/{number}")(Shop().order)
    called.app.get("/callable/{number}")(Shop())
    called.app.get("/partial/{number}")(functools.partial(function, "partial"))
    called.app.get("/wrapped/{number}")(wrapped(Shop().order))
    async with called.client() as client:
        for kind in ("method", "callable", "partial"):
            assert (await client.get(f"/{kind}/7")).status_code == 200
            assert called.values == (kind, 7)
        await client.get("/wrapped/8")
        assert called.values == ("method", 8)
