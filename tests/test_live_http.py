"""Live queries over HTTP: their bytes, and who gets to see what; on both drivers, a real server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from bson import ObjectId
from fastapi import FastAPI
from live_queries import PATIENCE, Mongo, eventually
from pydantic import BaseModel, Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route

import data_bridge
from data_bridge import Document, Limits, LiveEvent, Model, merge
from data_bridge.api import App, EventSourceResponse, close_streams
from data_bridge.errors import (
    AuthenticationFailed,
    HandlerInvalid,
    InvalidFilter,
    ModelInvalid,
)
from data_bridge.testing import streaming_client

if TYPE_CHECKING:
    import httpx

pytestmark = pytest.mark.timeout(90)


class Order(Document):
    status: str = "open"
    total: float = 0
    tenant: str = "a"

    class Settings:
        collection = "http_orders"


class Imaged(Document):
    status: str = "open"
    total: float = 0
    tenant: str = "a"

    class Settings:
        collection = "http_imaged"
        pre_images = True


OPEN = {"status": "open"}
KEEP_ALIVE = 0.4


@pytest.fixture
def raw(mongo: Mongo, database_name: str) -> Callable[[Any], Any]:
    return lambda model: mongo[database_name][model.Settings.collection]


class Wire:
    """The frames of a response as they are on the wire."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._chunks = response.aiter_raw()
        self._rest = b""
        self.frames: list[bytes] = []

    async def frame(self) -> bytes:
        """The next frame that is no comment."""
        async with asyncio.timeout(PATIENCE):
            while True:
                while b"\n\n" not in self._rest:
                    self._rest += await anext(self._chunks)
                frame, _, self._rest = self._rest.partition(b"\n\n")
                frame = frame.replace(b":\n", b"")
                if frame:
                    self.frames.append(frame)
                    return frame

    async def event(self) -> tuple[str, Any, str | None]:
        """The next event: its name, its data, and its id if it has one."""
        while not (frame := (await self.frame()).decode()).startswith("event: "):
            pass
        fields = dict(line.split(": ", 1) for line in frame.split("\n"))
        return fields["event"], json.loads(fields["data"]), fields.get("id")

    async def names(self, number: int) -> list[str]:
        return [(await self.event())[0] for _ in range(number)]

    async def until(self, name: str) -> tuple[str, Any, str | None]:
        while (event := await self.event())[0] != name:
            pass
        return event

    async def end(self) -> bytes:
        """What is left of a response that ends."""
        async with asyncio.timeout(PATIENCE):
            return self._rest + b"".join([chunk async for chunk in self._chunks])


@asynccontextmanager
async def wire(app: Any, path: str, **options: Any) -> AsyncIterator[Wire]:
    async with streaming_client(app) as client, client.stream("GET", path, **options) as response:
        assert response.status_code == 200, await response.aread()
        yield Wire(response)


async def answer(app: Any, path: str, **options: Any) -> tuple[int, Any]:
    """The status of a response that does not stream, and its body."""
    async with streaming_client(app) as client:
        response = await client.get(path, **options)
        return response.status_code, response.text


def live(app: App, path: str, model: Any, **options: Any) -> App:
    app.live(path, model, **options)
    return app


# -- the bytes ----------------------------------------------------------------------------------


def as_app_live(database: Any) -> Any:
    return live(App(database=database), "/live", Imaged, filter=OPEN)


def as_starlette(database: Any) -> Any:
    async def endpoint(request: Request) -> EventSourceResponse:
        return EventSourceResponse(Imaged.live(OPEN))

    return Starlette(routes=[Route("/live", endpoint)], lifespan=data_bridge.lifespan(database))


def as_fastapi(database: Any) -> Any:
    app = FastAPI(lifespan=data_bridge.lifespan(database))

    @app.get("/live", response_model=None)
    async def endpoint() -> EventSourceResponse:
        return EventSourceResponse(Imaged.live(OPEN))

    return app


def as_handler(database: Any) -> Any:
    app = App(database=database)

    @app.get("/live")
    async def endpoint() -> EventSourceResponse:
        return EventSourceResponse(Imaged.live(OPEN))

    return app


@pytest.mark.parametrize("make", [as_app_live, as_starlette, as_fastapi, as_handler])
async def test_the_wire_is_the_same_byte_for_byte_however_it_is_served(
    database: Any, raw: Any, make: Any
) -> None:
    id, other = ObjectId(), ObjectId()
    raw(Imaged).insert_one({"_id": id, "status": "open", "total": 1.5, "tenant": "ä\u2028"})
    async with wire(make(database), "/live") as stream:
        first = await stream.frame()
        if first.startswith(b"id: "):
            first = await stream.frame()
        expected = (
            f'event: snapshot\ndata: {{"documents":[{{"id":"{id}","status":"open","total":1.5,'
            f'"tenant":"ä\\u2028"}}],"sent":1,"total":1}}'
        )
        assert first.decode() == expected
        assert re.fullmatch(rb'event: ready\nid: [^\n]+\ndata: {"total":1}', await stream.frame())
        raw(Imaged).insert_one({"_id": other, "status": "closed"})
        raw(Imaged).update_one({"_id": other}, {"$set": {"status": "open"}})
        raw(Imaged).update_one({"_id": id}, {"$set": {"total": 2}})
        raw(Imaged).update_one({"_id": id}, {"$set": {"status": "closed"}})
        raw(Imaged).delete_one({"_id": other})
        for name, of, document in (
            ("enter", other, f'{{"id":"{other}","status":"open","total":0.0,"tenant":"a"}}'),
            ("update", id, f'{{"id":"{id}","status":"open","total":2.0,"tenant":"ä\\u2028"}}'),
            ("leave", id, "null"),
            ("delete", other, "null"),
        ):
            lines = (await stream.frame()).decode().split("\n")
            data = f'{{"operation":"{name}","id":"{of}","document":{document}}}'
            assert lines[0] == f"event: {name}" and lines[2] == f"data: {data}"
            assert re.fullmatch(r"id: [0-9A-Za-z_.~-]+", lines[1])
        raw(Imaged).drop()
        assert await stream.frame() == b'event: reset\ndata: {"reason":"drop"}'
        assert await stream.frame() == b'event: snapshot\ndata: {"documents":[],"sent":0,"total":0}'


async def test_a_merge_says_of_each_document_where_it_belongs(database: Any, raw: Any) -> None:
    app = App(database=database)

    @app.get("/live")
    async def both() -> EventSourceResponse:
        return EventSourceResponse(merge(Order.live(OPEN), Imaged.live()))

    async with wire(app, "/live") as stream:
        found = [await stream.event() for _ in range(3)]
        assert [(name, data.get("collection")) for name, data, _ in found] == [
            ("snapshot", "http_orders"),
            ("snapshot", "http_imaged"),
            ("ready", None),
        ]
        raw(Order).insert_one({"status": "open"})
        raw(Imaged).insert_one({"status": "open"})
        for collection in ("http_orders", "http_imaged"):
            name, data, id = await stream.event()
            assert (name, data["collection"]) == ("insert", collection) and id


async def test_only_ids_that_a_client_may_resume_from_are_sent(database: Any, raw: Any) -> None:
    raw(Imaged).insert_many([{"total": n} for n in range(1100)])
    async with wire(live(App(database=database), "/live", Imaged), "/live") as stream:
        found = [await stream.event() for _ in range(4)]
        assert [name for name, _, _ in found] == ["snapshot"] * 3 + ["ready"]
        assert [data.get("sent") for _, data, _ in found] == [500, 1000, 1100, None]
        assert not any(b"id: " in f.split(b"\n")[0] for f in stream.frames)
        assert [id is not None for _, _, id in found] == [False, False, False, True]
    app = live(App(database=database), "/top", Imaged, sort="-total", limit=2)
    async with wire(app, "/top") as stream:
        raw(Imaged).insert_one({"total": 5000})
        await stream.until("insert")
        assert not any(b"\nid: " in frame or frame.startswith(b"id: ") for frame in stream.frames)


@pytest.mark.parametrize("how", ["header", "query"])
async def test_a_client_goes_on_after_its_last_event_id(database: Any, raw: Any, how: str) -> None:
    def app() -> App:  # another worker each time
        return live(App(database=database), "/live", Imaged, filter=OPEN)

    def after(id: str | None) -> dict[str, Any]:
        assert id
        return (
            {"headers": {"Last-Event-ID": id}}
            if how == "header"
            else {"params": {"last_event_id": id}}
        )

    raw(Imaged).insert_one({"_id": (one := ObjectId()), "status": "open"})
    async with wire(app(), "/live") as stream:
        _, _, ready = await stream.until("ready")
        raw(Imaged).insert_one({"status": "open"})
        _, _, inserted = await stream.event()
    raw(Imaged).update_one({"_id": one}, {"$set": {"status": "closed"}})
    async with wire(app(), "/live", **after(inserted)) as stream:
        assert (await stream.event())[0] == "leave"
    async with wire(app(), "/live", **after(ready)) as stream:
        assert await stream.names(2) == ["insert", "leave"]


async def test_a_position_that_cannot_be_gone_on_from_is_told_and_a_snapshot_follows(
    database: Any, raw: Any
) -> None:
    raw(Order).insert_one({"status": "open"})
    async with wire(live(App(database=database), "/live", Order, filter=OPEN), "/live") as stream:
        _, _, id = await stream.until("ready")
    headers = {"Last-Event-ID": str(id)}
    app = live(App(database=database), "/live", Order, filter=OPEN)  # another worker
    async with wire(app, "/live", headers=headers) as stream:
        assert await stream.names(3) == ["reset", "snapshot", "ready"]
        assert stream.frames[0] == b'event: reset\ndata: {"reason":"history lost"}'
    status, body = await answer(app, "/live", headers={"Last-Event-ID": "nonsense"})
    assert status == 400 and "detail" in body


async def test_a_document_that_does_not_fit_is_left_out_or_null(
    database: Any, raw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    odd, fine = ObjectId(), ObjectId()
    raw(Imaged).insert_many([{"_id": odd, "total": "secret"}, {"_id": fine}])
    async with wire(live(App(database=database), "/live", Imaged), "/live") as stream:
        _, data, _ = await stream.until("snapshot")
        assert [d["id"] for d in data["documents"]] == [str(fine)]
        await stream.until("ready")
        raw(Imaged).update_one({"_id": odd}, {"$set": {"total": "secrets"}})
        _, data, _ = await stream.event()
        assert data["id"] == str(odd) and data["document"] is None
        assert data["error"] == "the document does not fit its model"
    assert f"Imaged {odd} in the database does not fit" in caplog.text
    assert "secret" not in caplog.text


class Point(Model):
    x: int
    y: int


@pytest.mark.parametrize(
    ("kind", "id"),
    [
        (int, 7),
        (str, "ä b"),
        (UUID, uuid4()),
        (Decimal, Decimal("1.50")),
        (datetime, datetime(2024, 1, 2, 3, 4, 5, 6000, tzinfo=UTC)),
        (datetime, datetime(2024, 1, 2, tzinfo=UTC)),
        (bytes, b"\xff\xfe\x00ab"),
        (float, float("inf")),
        (Point, Point(x=1, y=2)),
        (float, 1.0),
        (bool, True),
    ],
    ids=lambda v: getattr(v, "__name__", "") or "value",
)
async def test_the_id_of_a_change_is_the_id_of_its_document_in_json(
    database: Any, kind: Any, id: Any
) -> None:
    class Thing(Document):
        id: kind  # type: ignore[valid-type]
        n: int = 0

        class Settings:
            collection = "http_things"

    async with wire(live(App(database=database), "/live", Thing), "/live") as stream:
        await stream.until("ready")
        thing = await Thing(id=id).insert()
        _, data, _ = await stream.event()
        assert data["id"] == data["document"]["id"]
        await thing.delete()
        assert (await stream.event())[1]["id"] == data["id"]


# -- filters of the request ---------------------------------------------------------------------


def by_tenant(request: Request) -> Any:
    return {"tenant": request.query_params["tenant"]}


async def by_tenant_async(request: Request) -> Any:
    await asyncio.sleep(0)
    return {"tenant": request.query_params["tenant"]}


@pytest.mark.parametrize("filter", [by_tenant, by_tenant_async])
async def test_a_filter_may_be_a_function_of_the_request(
    database: Any, raw: Any, filter: Any
) -> None:
    raw(Order).insert_many([{"tenant": "a"}, {"tenant": "b"}, {"tenant": "b"}])
    app = live(App(database=database), "/live", Order, filter=filter)
    async with wire(app, "/live?tenant=b") as stream:
        assert (await stream.until("snapshot"))[1]["total"] == 2


def refusing(error: BaseException | type[BaseException], wait: bool) -> Any:
    def refuse(request: Request) -> Any:
        raise error

    async def refuse_later(request: Request) -> Any:
        raise error

    return refuse_later if wait else refuse


@pytest.mark.parametrize("wait", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (HTTPException(401), 401),
        (HTTPException(403, "no"), 403),
        (PermissionError, 403),
        (HTTPException(404), 404),
    ],
    ids=str,
)
async def test_a_filter_may_refuse_before_the_stream_starts(
    database: Any, mongo: Mongo, database_name: str, error: Any, status: int, wait: bool
) -> None:
    app = live(App(database=database), "/live", Order, filter=refusing(error, wait))
    assert (await answer(app, "/live"))[0] == status


@pytest.mark.parametrize("filter", [lambda request: None, refusing(PermissionError(), True)])
async def test_a_filter_that_gives_nothing_refuses(database: Any, filter: Any) -> None:
    app = live(App(database=database), "/live", Order, filter=filter)
    assert (await answer(app, "/live"))[0] == 403


@pytest.mark.parametrize(
    ("filter", "error"),
    [
        (refusing(ZeroDivisionError("secret"), False), ZeroDivisionError),
        (refusing(AuthenticationFailed("of the database"), False), AuthenticationFailed),
        (lambda request: ["status"], HandlerInvalid),
        (lambda request: True, HandlerInvalid),
        (lambda request: {"$nonsense": 1}, InvalidFilter),
    ],
)
async def test_a_filter_that_fails_is_an_error_of_the_server(
    database: Any, filter: Any, error: Any
) -> None:
    app = live(App(database=database), "/live", Order, filter=filter)
    with pytest.raises(error):  # what the server logs
        await answer(app, "/live")
    async with streaming_client(app, raise_app_exceptions=False) as client:
        response = await client.get("/live")
        assert response.status_code == 500 and "secret" not in response.text


async def test_nothing_that_a_client_sends_reaches_the_database_as_a_query(
    database: Any, raw: Any, mongo: Mongo, database_name: str
) -> None:
    app = live(App(database=database), "/live", Order, filter=by_tenant)
    app.live("/all", Order)
    attacks = [
        "/live?tenant[$ne]=x&tenant=b",
        '/live?tenant={"$ne":null}',
        "/live?tenant=b&filter={}&sort=secret&limit=1&view=x",
        '/all?filter={"$where":"sleep(1)"}&$where=1&last_event_id=',
    ]
    mongo[database_name].command("profile", 2)
    async with streaming_client(app) as client:
        for path in attacks:
            async with client.stream("GET", path, headers={"X-Filter": "{}"}) as response:
                await Wire(response).until("ready")
    mongo[database_name].command("profile", 0)
    found = mongo[database_name]["system.profile"].find({"op": "query"})
    asked = [op["command"] for op in found if op["command"].get("find") == "http_orders"]
    filters = {json.dumps(command["filter"]) for command in asked}
    assert filters <= {'{"tenant": "b"}', '{"tenant": "{\\"$ne\\":null}"}', "{}"}
    assert not any("sort" in command or "projection" in command for command in asked)


# -- who may see what ---------------------------------------------------------------------------


def small(event: LiveEvent[Any], request: Request) -> bool:
    order = event.full_document
    return order is not None and order.total < int(request.query_params["below"])


async def small_async(event: LiveEvent[Any], request: Request) -> bool:
    await asyncio.sleep(0)
    return small(event, request)


@pytest.mark.parametrize("authorize", [small, small_async])
@pytest.mark.parametrize("model", [Order, Imaged], ids=["without images", "with images"])
async def test_each_client_sees_only_what_it_may_and_hears_of_nothing_else(
    database: Any, raw: Any, model: Any, authorize: Any
) -> None:
    one, two, three = (ObjectId() for _ in range(3))
    raw(model).insert_many(
        [
            {"_id": one, "total": 1, "status": "open"},
            {"_id": two, "total": 50, "status": "open"},
        ]
    )
    app = live(App(database=database), "/live", model, authorize=authorize, filter=OPEN)
    async with wire(app, "/live?below=10") as stream:
        _, data, _ = await stream.until("snapshot")
        assert [d["id"] for d in data["documents"]] == [str(one)]
        assert (data["sent"], data["total"]) == (1, 1)
        _, data, id = await stream.until("ready")
        assert data == {"total": 1} and id is None

        async def told(name: str, of: ObjectId) -> None:
            found, data, id = await stream.event()
            assert (found, data["id"], id) == (name, str(of), None)

        raw(model).update_one({"_id": two}, {"$set": {"total": 60}})
        raw(model).insert_one({"_id": three, "total": 70, "status": "open"})
        raw(model).update_one({"_id": one}, {"$set": {"total": 2}})
        await told("update", one)
        raw(model).update_one({"_id": three}, {"$set": {"total": 7}})
        await told("enter", three)
        raw(model).update_one({"_id": three}, {"$set": {"total": 70}})
        await told("leave", three)
        raw(model).update_one({"_id": three}, {"$set": {"status": "closed"}})
        raw(model).delete_one({"_id": two})
        raw(model).delete_one({"_id": three})
        raw(model).delete_one({"_id": one})
        await told("delete", one)
        sent = b"".join(stream.frames)
        assert str(two).encode() not in sent and sent.count(str(three).encode()) == 3


async def test_who_cannot_be_asked_about_a_document_does_not_see_it(
    database: Any, raw: Any
) -> None:
    def authorize(event: LiveEvent[Any], request: Request) -> bool:
        if event.full_document.status == "secret":  # type: ignore[union-attr]
            raise PermissionError
        return True

    raw(Order).insert_many([{"total": "odd"}, {"status": "secret"}, {"status": "shown"}])
    app = live(App(database=database), "/live", Order, authorize=authorize)
    async with wire(app, "/live") as stream:
        _, data, _ = await stream.until("snapshot")
        assert [d["status"] for d in data["documents"]] == ["shown"]
        await stream.until("ready")
        raw(Order).insert_one({"status": "secret"})
        raw(Order).insert_one({"total": "odd"})
        raw(Order).insert_one({"status": "fine"})
        assert (await stream.event())[1]["document"]["status"] == "fine"


async def test_a_decision_that_takes_longer_than_a_keep_alive_loses_nothing(
    database: Any, raw: Any
) -> None:
    asked = []

    async def authorize(event: LiveEvent[Any], request: Request) -> bool:
        asked.append(event.document_id)
        await asyncio.sleep(3 * KEEP_ALIVE)
        return True

    id = raw(Order).insert_one({"status": "open"}).inserted_id
    app = live(App(database=database), "/live", Order, authorize=authorize, keep_alive=KEEP_ALIVE)
    async with wire(app, "/live") as stream:
        _, data, _ = await stream.until("snapshot")
        assert data["total"] == 1
        raw(Order).update_one({"_id": id}, {"$set": {"total": 2}})
        assert (await stream.until("update"))[1]["document"]["total"] == 2
    assert asked == [id, id]


async def test_an_authorized_stream_starts_with_a_snapshot_whatever_the_client_has(
    database: Any, raw: Any
) -> None:
    app = live(App(database=database), "/live", Imaged, authorize=small)
    app.live("/plain", Imaged)
    async with wire(app, "/plain") as stream:
        _, _, id = await stream.until("ready")
    headers = {"Last-Event-ID": str(id)}
    async with wire(app, "/live?below=10", headers=headers) as stream:
        assert await stream.names(2) == ["snapshot", "ready"]


# -- views --------------------------------------------------------------------------------------


class Line(BaseModel):
    sku: str
    price: float = 0
    cost: float = 0


class Person(BaseModel):
    name: str
    email: str = ""


class Sale(Document):
    status: str = "open"
    secret: str = ""
    buyer: Person | None = None
    lines: list[Line] = Field(default_factory=list)

    class Settings:
        collection = "http_sales"
        pre_images = True


class ShownLine(BaseModel):
    sku: str


class ShownPerson(BaseModel):
    name: str


class Shown(BaseModel):
    buyer: ShownPerson | None = None
    lines: list[ShownLine] = Field(default_factory=list)


def sale(word: str) -> Sale:
    line = Line(sku=f"sku-{word}", price=1, cost=0.5)
    return Sale(
        secret=f"hidden-{word}", buyer=Person(name=word, email=f"hidden-{word}"), lines=[line]
    )


async def test_what_a_view_does_not_show_never_leaves_the_database(database: Any, raw: Any) -> None:
    app = live(App(database=database), "/live", Sale, filter=OPEN, view=Shown)
    async with streaming_client(app) as client, client.stream("GET", "/live") as response:
        stream = Wire(response)
        first = await sale("one").insert()
        await stream.until("ready")
        (feed,) = app.bridge._feeds.values()
        second = await sale("two").insert()
        await second.update({"$set": {"secret": "hidden-again"}})
        await second.update({"$set": {"buyer.name": "three"}})
        await second.update({"$set": {"status": "closed"}})
        await first.delete()
        found = [await stream.event() for _ in range(3)]
        while found[-1][0] != "leave":
            found.append(await stream.event())
        found += [await stream.event()] if found[-1][0] != "delete" else []
        shown = {
            "id": str(second.id),
            "buyer": {"name": "two"},
            "lines": [{"sku": "sku-two"}],
        }
        name, data, _ = next(f for f in found if f[1]["id"] == str(second.id))
        assert (name, data["document"]) == ("insert", shown)
        received = [entry.raw for entry in feed.log.entries]  # type: ignore[union-attr]
        snapshot = feed.live()._queries
        texts = [str(raw) for raw in received] + [f.decode() for f in stream.frames]
        texts += [str(q._snapshot.result().documents) for q in snapshot.values() if q._snapshot]
    assert received and all(raw["operationType"] for raw in received)
    for text in texts:
        assert "hidden" not in text and "price" not in text and "cost" not in text
    before = [
        raw["fullDocumentBeforeChange"] for raw in received if "fullDocumentBeforeChange" in raw
    ]
    assert before and all(set(document) == {"_id", "status"} for document in before)
    assert not any("updateDescription" in raw for raw in received)


async def test_a_view_without_an_id_gets_one_and_one_with_an_id_keeps_it(
    database: Any, raw: Any
) -> None:
    class Bare(BaseModel):
        total: float

    class WithId(Model):
        id: ObjectId
        total: float

    class Nothing(BaseModel):
        pass

    id = raw(Order).insert_one({"total": 1}).inserted_id
    for view, document in (
        (Bare, {"id": str(id), "total": 1.0}),
        (WithId, {"id": str(id), "total": 1.0}),
        (Nothing, {"id": str(id)}),
    ):
        app = live(App(database=database), "/live", Order, view=view)
        async with wire(app, "/live") as stream:
            _, data, _ = await stream.until("snapshot")
            assert data["documents"] == [document]


# -- what is wrong is said where it is declared -------------------------------------------------


class Wrong(BaseModel):
    colour: str


class WrongInside(BaseModel):
    buyer: Wrong


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"view": Wrong}, ModelInvalid, "Wrong.colour shows 'colour', which Sale does not store"),
        ({"view": WrongInside}, ModelInvalid, "'buyer.colour'"),
        ({"limit": 3}, InvalidFilter, "has a limit and no sort"),
        ({"limit": 0, "sort": "status"}, InvalidFilter, "a number from 1"),
        ({"sort": 3}, InvalidFilter, "cannot be sorted"),
        ({"filter": "status"}, InvalidFilter, "is a dict"),
        ({"filter": {"$nonsense": 1}}, InvalidFilter, r"\$nonsense"),
        ({"keep_alive": 0}, ValueError, "keep_alive"),
        ({"nonsense": 0}, TypeError, "nonsense"),
        ({"event": "x"}, HandlerInvalid, "event= is for watch"),
        ({"authorize": True}, HandlerInvalid, "authorize= .* is a function"),
        ({"owner": "me"}, HandlerInvalid, "owner= .* is a function"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_route_is_said_when_it_is_declared(
    options: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        App().live("/live", Sale, **options)


def test_a_model_without_a_collection_cannot_be_declared_live() -> None:
    class Abstract(Document):
        pass

    with pytest.raises(ModelInvalid, match="has no collection"):
        App().live("/live", Abstract)


# -- the end of a stream ------------------------------------------------------------------------


async def test_a_revoked_user_is_cut_off_alone_and_refused_when_it_comes_back(
    database: Any, raw: Any
) -> None:
    revoked: set[str] = set()

    def user(request: Request) -> str:
        return request.query_params["user"]

    def filter(request: Request) -> Any:
        if user(request) in revoked:
            raise HTTPException(403)
        return OPEN

    app = live(App(database=database), "/live", Order, filter=filter, owner=user)
    async with (
        streaming_client(app) as client,
        client.stream("GET", "/live?user=eve") as eves,
        client.stream("GET", "/live?user=ann") as anns,
    ):
        eve, ann = Wire(eves), Wire(anns)
        await eve.until("ready")
        await ann.until("ready")
        revoked.add("eve")
        close_streams(owner="eve")
        assert b"event" not in await eve.end()
        assert (await client.get("/live?user=eve")).status_code == 403
        raw(Order).insert_one({"status": "open"})
        assert (await ann.event())[0] == "insert"


@pytest.mark.parametrize("make", [as_app_live, as_starlette, as_fastapi])
async def test_a_snapshot_too_large_is_a_clear_error_before_the_stream_starts(
    database: Any, raw: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw(Imaged).insert_many([{"status": "open"} for _ in range(4)])
    real = data_bridge.Bridge.__init__

    def small(self: Any, *args: Any, **options: Any) -> None:
        real(self, *args, **{**options, "limits": Limits(snapshot_documents=3)})

    monkeypatch.setattr(data_bridge.Bridge, "__init__", small)
    status, body = await answer(make(database), "/live")
    assert status == 413
    assert "more than 3 documents match" in body and "Limits.snapshot_documents" in body


async def test_a_query_that_outgrows_its_bound_ends_and_is_refused_when_it_comes_back(
    database: Any, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = data_bridge.Bridge.__init__

    def small(self: Any, *args: Any, **options: Any) -> None:
        real(self, *args, **{**options, "limits": Limits(members=2)})

    monkeypatch.setattr(data_bridge.Bridge, "__init__", small)
    app = live(App(database=database), "/live", Order, filter=OPEN)
    raw(Order).insert_many([{"status": "open"} for _ in range(2)])
    async with streaming_client(app) as client, client.stream("GET", "/live") as response:
        stream = Wire(response)
        await stream.until("ready")
        raw(Order).insert_one({"status": "open"})
        assert (await stream.end()).startswith(b"retry: ")
        again = await client.get("/live")
        assert again.status_code == 413 and "Limits.members" in again.text


# -- quiet streams, and slow readers ------------------------------------------------------------


@pytest.mark.parametrize("model", [Order, Imaged], ids=["without images", "with images"])
async def test_a_quiet_filtered_query_keeps_its_place_past_its_last_event(
    database: Any, raw: Any, model: Any
) -> None:
    app = live(App(database=database), "/live", model, filter=OPEN, keep_alive=KEEP_ALIVE)
    async with streaming_client(app) as client:
        async with client.stream("GET", "/live") as response:
            stream = Wire(response)
            _, _, ready = await stream.until("ready")
            raw(model).insert_one({"status": "open"})
            _, _, inserted = await stream.until("insert")
            marks = []
            while len(marks) < 2:
                raw(model).insert_many([{"status": "closed"} for _ in range(5)])
                frame = (await stream.frame()).decode()
                assert re.fullmatch(r"id: \S+", frame)
                marks.append(frame.removeprefix("id: "))
        raw(model).insert_one({"status": "open", "total": 7})
        ids = [data_bridge.ResumeToken.parse(str(t)) for t in (ready, inserted, *marks)]
        assert ids == sorted(ids) and len(set(ids)) == 4  # type: ignore[type-var]
        headers = {"Last-Event-ID": marks[-1]}
        async with client.stream("GET", "/live", headers=headers) as response:
            name, data, _ = await Wire(response).event()
            assert name == "insert" and data["document"]["total"] == 7


async def test_a_quiet_window_is_kept_alive_with_comments(database: Any) -> None:
    app = live(App(database=database), "/top", Order, sort="total", limit=2, keep_alive=KEEP_ALIVE)
    async with streaming_client(app) as client, client.stream("GET", "/top") as response:
        received = b""
        async with asyncio.timeout(PATIENCE):
            async for chunk in response.aiter_raw():
                received += chunk
                if received.endswith(b"\n:\n:\n"):
                    break
        assert b"id:" not in received


async def test_a_reader_that_pauses_delays_nobody_and_gets_everything_in_order(
    database_uri: str, raw: Any, serve: Any
) -> None:
    app = live(App(database=database_uri), "/live", Imaged, filter=OPEN)
    server = await serve(app)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
    writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 " in head
    await reader.readuntil(b"event: ready")
    number, text = 3000, "x" * 2000  # 6 MB: more than any buffer on the way
    for start in range(0, number, 500):
        documents = [
            {"status": "open", "total": n, "tenant": text} for n in range(start, start + 500)
        ]
        await asyncio.to_thread(raw(Imaged).insert_many, documents)
    async with asyncio.timeout(60):
        totals: list[float] = []
        buffered = b""
        while len(totals) < number:
            buffered += await reader.read(1 << 20)
            found = list(re.finditer(rb'"total":(\d+\.0),', buffered))
            totals += [float(m[1]) for m in found]
            if found:
                buffered = buffered[found[-1].end() :]
    writer.close()
    assert totals == [float(n) for n in range(number)]


async def test_sigterm_ends_live_streams_properly(
    database_uri: str, raw: Any, spawn: Any, tmp_path: Path
) -> None:
    (tmp_path / "terminated.py").write_text(
        "import os\n"
        "from data_bridge import Document\n"
        "from data_bridge.api import App\n"
        "class Order(Document):\n"
        "    status: str = 'open'\n"
        "    class Settings:\n"
        "        collection = 'http_orders'\n"
        "app = App(database=os.environ['DATABASE'])\n"
        "app.live('/live', Order, filter={'status': 'open'})\n"
    )
    env = {"DATABASE": database_uri}
    server = await spawn("terminated:app", env=env, app_dir=tmp_path)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(PATIENCE):
        await reader.readuntil(b"event: ready")
        ended = asyncio.create_task(server.terminate())
        rest = await reader.read()
        assert rest.endswith(b"0\r\n\r\n")
        assert await ended in (0, -15)
    writer.close()


async def test_nothing_is_left_of_clients_that_are_gone(database: Any, raw: Any) -> None:
    app = live(App(database=database), "/live", Order, filter=OPEN, authorize=lambda e, r: True)
    app.live("/plain", Order, filter=OPEN)
    async with streaming_client(app) as client:
        for path in ("/live", "/plain", "/live"):
            async with client.stream("GET", path) as response:
                await Wire(response).until("ready")
        (feed,) = app.bridge._feeds.values()
        (query,) = feed.live()._queries.values()
        await eventually(lambda: query.subscribers == 0)
