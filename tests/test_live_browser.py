"""The browser module against the real server: streams end, and no page may be stale."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Page
from pymongo import MongoClient
from starlette.responses import HTMLResponse

from data_bridge import Document, merge
from data_bridge.api import App, EventSourceResponse, close_streams

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGE = """<!doctype html><script type="module">
    import { live, liveAll } from "/data-bridge/live.js";
    window.live = live;
    window.liveAll = liveAll;
</script>"""

Serve = Callable[..., Awaitable[Any]]


class BrowserOrder(Document):
    id: int
    total: float

    class Settings:
        collection = "orders"
        pre_images = True


class BrowserCustomer(Document):
    id: str
    name: str

    class Settings:
        collection = "customers"
        pre_images = True


@pytest_asyncio.fixture(loop_scope="module")
async def shown(page: Page, serve: Serve, database_uri: str) -> Page:
    app = App(database=database_uri, documents=[BrowserOrder, BrowserCustomer])
    app.live("/top", BrowserOrder, sort="-total", limit=3, retry=100)

    @app.get("/both")
    async def both() -> EventSourceResponse:
        return EventSourceResponse(
            merge(BrowserOrder.live({"total": {"$gt": 1}}), BrowserCustomer.live()), retry=100
        )

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(PAGE)

    server = await serve(app)
    await page.goto(server.url)
    await page.wait_for_function("window.liveAll")
    return page


async def totals(page: Page, *expected: float) -> None:
    await page.wait_for_function(
        "(expected) => JSON.stringify(query.documents.map((o) => o.total)) === expected",
        arg="[" + ",".join(f"{n:g}" for n in expected) + "]",
    )


async def test_a_window_has_no_stale_rows_after_its_stream_ended(
    shown: Page, mongo: MongoClient[dict[str, Any]], database_name: str
) -> None:
    orders = mongo[database_name]["orders"]
    orders.insert_many([{"_id": n, "total": float(n)} for n in range(1, 6)])
    await shown.evaluate(
        """() => {
            window.query = live("/top", { sort: (a, b) => b.total - a.total });
            window.resets = 0;
            query.on("reset", () => (resets += 1));
        }"""
    )
    await totals(shown, 5, 4, 3)
    orders.insert_one({"_id": 9, "total": 9.0})
    await totals(shown, 9, 5, 4)
    orders.delete_one({"_id": 5})
    await totals(shown, 9, 4, 3)
    close_streams()
    await shown.wait_for_function("query.status === 'reconnecting'")
    orders.delete_one({"_id": 9})
    orders.update_one({"_id": 4}, {"$set": {"total": 0.0}})
    orders.insert_one({"_id": 7, "total": 7.0})
    await totals(shown, 7, 3, 2)
    orders.delete_one({"_id": 7})  # and it goes on from there
    await totals(shown, 3, 2, 1)
    assert await shown.evaluate("[query.lastEventId, resets]") == ["", 0]


async def test_collections_that_share_a_connection_resume_together(
    shown: Page, mongo: MongoClient[dict[str, Any]], database_name: str
) -> None:
    database = mongo[database_name]
    database["orders"].insert_many([{"_id": n, "total": float(n)} for n in range(1, 4)])
    database["customers"].insert_one({"_id": "ada", "name": "Ada"})
    await shown.evaluate(
        """() => {
            window.shop = liveAll("/both");
            window.query = shop.collection("orders", { sort: (a, b) => b.total - a.total });
            window.seen = [];
            for (const type of ["change", "ready", "reset"])
                shop.on(type, ({ type, collection }) => seen.push([type, collection ?? ""]));
        }"""
    )
    await totals(shown, 3, 2)
    close_streams()
    await shown.wait_for_function("shop.status === 'reconnecting'")
    database["orders"].update_one({"_id": 1}, {"$set": {"total": 8.0}})
    database["customers"].update_one({"_id": "ada"}, {"$set": {"name": "Ada M."}})
    database["orders"].update_one({"_id": 3}, {"$set": {"total": 0.0}})
    await totals(shown, 8, 2)
    names = "shop.collection('customers').documents.map((c) => c.name)"
    assert await shown.evaluate(names) == ["Ada M."]
    assert await shown.evaluate("seen") == [
        ["ready", ""],
        ["enter", "orders"],
        ["update", "customers"],
        ["leave", "orders"],
    ]
