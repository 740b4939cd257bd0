"""The orders dashboard, whole: a database, a server process and a real Chromium."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from bson import ObjectId
from playwright.async_api import Browser, Page, expect
from playwright.async_api import TimeoutError as NeverTrue
from pymongo import MongoClient
from pymongo.collection import Collection

from data_bridge.embedded import ReplicaSet

pytestmark = pytest.mark.asyncio(loop_scope="module")

EXAMPLE = Path(__file__).parent.parent / "examples" / "orders"

Spawn = Callable[..., Awaitable[Any]]
Orders = Collection[dict[str, Any]]


@pytest.fixture
def orders(mongo: MongoClient[dict[str, Any]], database_name: str) -> Orders:
    """The collection as another program writes it: the dashboard's models are not involved."""
    return mongo[database_name]["orders"]


@pytest_asyncio.fixture(loop_scope="module")
async def dashboard(spawn: Spawn, database_uri: str, orders: Orders) -> Any:
    """The dashboard's server process, on a database with no orders yet."""
    return await spawn("app:app", env={"DATABASE": database_uri}, app_dir=EXAMPLE)


def an_order(**fields: Any) -> dict[str, Any]:
    moment = datetime.now(UTC)
    return {
        "_id": ObjectId(),
        "customer": "Ada Moreau",
        "items": [{"name": "Kettle", "quantity": 2, "price": 58.0}],
        "total": 116.0,
        "status": "placed",
        "created": moment,
        "updated": moment,
        **fields,
    }


async def opened(page: Page, server: Any) -> None:
    await page.goto(server.url)
    await page.wait_for_function("window.orders?.status === 'live'")
    # what arrives from here on, as the page was told it
    await page.evaluate(
        """() => {
            window.seen = [];
            orders.on("change", ({operation, id, document}) =>
                seen.push([operation, id, document && document.total]));
        }"""
    )


def row(page: Page, order: dict[str, Any]) -> Any:
    return page.locator(f'tr[data-id="{order["_id"]}"]')


async def shows(page: Page, orders: Orders) -> None:
    """Returns when the page has what the database has, document by document."""
    wanted = {
        str(order["_id"]): [order["status"], order["total"], order["customer"]]
        for order in orders.find()
    }
    try:
        await page.wait_for_function(
            """(wanted) => orders.size === Object.keys(wanted).length
                && orders.documents.every(({id, status, total, customer}) =>
                    JSON.stringify(wanted[id]) === JSON.stringify([status, total, customer]))""",
            arg=wanted,
        )
    except NeverTrue:  # a better message than that of a function that stayed false
        documents = await page.evaluate("orders.documents")
        assert {o["id"]: [o["status"], o["total"], o["customer"]] for o in documents} == wanted
        raise


async def test_a_document_that_is_inserted_becomes_a_row(
    page: Page, dashboard: Any, orders: Orders
) -> None:
    before, after = an_order(customer="Bruno Costa"), an_order(customer="Chen Wei", total=4.2)
    orders.insert_one(before)
    await opened(page, dashboard)
    await expect(row(page, before)).to_contain_text("Bruno Costa")
    orders.insert_one(after)
    await expect(row(page, after)).to_contain_text("Chen Wei")
    await expect(row(page, after)).to_contain_text("€4.20")
    await expect(page.locator("#rows tr")).to_have_count(2)
    await expect(page.locator("#open")).to_have_text("2")
    await expect(page.locator("#revenue")).to_have_text("€120")


async def test_a_document_that_changes_changes_its_row(
    page: Page, dashboard: Any, orders: Orders
) -> None:
    order = an_order()
    orders.insert_one(order)
    await opened(page, dashboard)
    await expect(row(page, order)).to_contain_text("Placed")
    orders.update_one({"_id": order["_id"]}, {"$set": {"status": "paid"}})
    await expect(row(page, order)).to_contain_text("Paid")
    orders.replace_one({"_id": order["_id"]}, {**order, "status": "shipped", "total": 99.0})
    await expect(row(page, order)).to_contain_text("Shipped")
    await expect(row(page, order)).to_contain_text("€99.00")
    await expect(page.locator("#rows tr")).to_have_count(1)
    await expect(page.locator("#open")).to_have_text("0")


async def test_a_document_that_is_deleted_takes_its_row_with_it(
    page: Page, dashboard: Any, orders: Orders
) -> None:
    kept, gone = an_order(), an_order()
    orders.insert_many([kept, gone])
    await opened(page, dashboard)
    await expect(row(page, gone)).to_be_visible()
    orders.delete_one({"_id": gone["_id"]})
    await expect(row(page, gone)).to_have_count(0)
    await expect(row(page, kept)).to_be_visible()


async def test_a_row_flashes_only_when_it_changes(
    page: Page, dashboard: Any, orders: Orders
) -> None:
    first, second = an_order(), an_order()
    orders.insert_many([first, second])
    await opened(page, dashboard)
    await expect(page.locator("#rows tr")).to_have_count(2)
    await expect(page.locator("tr.flash")).to_have_count(0)
    orders.update_one({"_id": first["_id"]}, {"$set": {"status": "paid"}})
    await expect(page.locator("tr.flash")).to_have_count(1)
    assert await row(page, first).get_attribute("class") == "flash"


async def test_the_buttons_write_and_the_stream_brings_back_what_was_written(
    page: Page, dashboard: Any, orders: Orders
) -> None:
    await opened(page, dashboard)
    await page.get_by_role("button", name="Place an order").click()
    rows = page.locator("#rows tr")
    await expect(rows).to_contain_text(["Espresso beans"])
    await rows.get_by_text("Mark paid").click()
    await expect(rows).to_contain_text(["Paid"])
    await rows.get_by_text("Cancel").click()
    await expect(rows).to_contain_text(["Cancelled"])
    assert [order["status"] for order in orders.find()] == ["cancelled"]
    await rows.get_by_text("Remove").click()
    await expect(rows).to_contain_text(["No orders yet"])
    assert orders.count_documents({}) == 0


async def test_names_from_the_database_are_text_and_never_markup(
    page: Page, dashboard: Any, orders: Orders
) -> None:
    order = an_order(customer="<img src=x onerror=alert(1)>")
    orders.insert_one(order)
    await opened(page, dashboard)
    await expect(row(page, order)).to_contain_text("<img src=x")
    assert await page.locator("#rows img").count() == 0


async def test_the_page_asks_no_other_host_for_anything(page: Page, dashboard: Any) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await opened(page, dashboard)
    assert all(url.startswith((dashboard.url, "data:")) for url in asked)


async def test_after_the_server_was_killed_the_page_resumes_and_sees_each_change_once(
    page: Page, dashboard: Any, orders: Orders
) -> None:
    dice = random.Random(7)
    rows = [an_order(total=float(n)) for n in range(40)]
    orders.insert_many(rows)
    await opened(page, dashboard)
    expected: Counter[tuple[str, str]] = Counter()
    total = 1000.0

    def write(times: int) -> None:
        # Each write has a total of its own, so that no two changes look the same.
        nonlocal total
        for _ in range(times):
            total += 1
            kind = dice.choice(("insert", "update", "update", "delete"))
            if kind == "insert" or len(rows) < 5:
                rows.append(an_order(total=total))
                orders.insert_one(rows[-1])
                expected["insert", str(rows[-1]["_id"])] += 1
            elif kind == "update":
                order = dice.choice(rows)
                orders.update_one({"_id": order["_id"]}, {"$set": {"total": total}})
                expected["update", str(order["_id"])] += 1
            else:
                order = rows.pop(dice.randrange(len(rows)))
                orders.delete_one({"_id": order["_id"]})
                expected["delete", str(order["_id"])] += 1

    for round in range(2):
        write(60)  # on its way while the server dies
        await dashboard.kill()
        await expect(page.locator("#state")).to_contain_text("Reconnecting")
        write(60)  # while it is dead
        await dashboard.start()
        write(60)  # while the page may be back, or not
        await shows(page, orders)
        resumed = "resumed once" if round == 0 else "resumed 2 times"
        await expect(page.locator("#state")).to_contain_text(resumed)
    seen = await page.evaluate("seen")
    assert Counter((operation, id) for operation, id, _ in seen) == expected
    totals = [total for operation, _, total in seen if operation == "insert"]
    assert totals == sorted(totals)


async def test_two_tabs_show_the_same(
    page: Page, browser: Browser, dashboard: Any, orders: Orders
) -> None:
    second = await browser.new_page()
    for tab in (page, second):
        await opened(tab, dashboard)
    orders.insert_many([an_order(total=float(n)) for n in range(30)])
    orders.delete_many({"total": {"$lt": 10}})
    for tab in (page, second):
        await shows(tab, orders)


async def test_a_terminated_server_lets_go_of_its_pages_at_once(
    page: Page, dashboard: Any, orders: Orders
) -> None:
    await opened(page, dashboard)
    assert await dashboard.terminate(timeout=5) in (0, -15)
    await expect(page.locator("#state")).to_contain_text("Reconnecting")
    await dashboard.start()
    orders.insert_one(an_order())
    await shows(page, orders)


async def test_after_the_oplog_rolled_while_the_server_was_away_the_page_shows_fresh_rows_only(
    page: Page, spawn: Spawn
) -> None:
    with ReplicaSet(oplog_mb=2) as small, MongoClient[dict[str, Any]](small.uri) as client:
        orders = client["shop"]["orders"]
        gone, kept = an_order(customer="Gone"), an_order(customer="Kept")
        orders.insert_many([gone, kept])
        dashboard = await spawn(
            "app:app", env={"DATABASE": small.database_uri("shop")}, app_dir=EXAMPLE
        )
        await opened(page, dashboard)
        await page.evaluate(
            "window.resets = []; void orders.on('reset', (e) => resets.push(e.reason))"
        )
        orders.update_one({"_id": kept["_id"]}, {"$set": {"total": 1.0}})
        await shows(page, orders)
        await dashboard.kill()
        orders.delete_one({"_id": gone["_id"]})
        orders.update_one({"_id": kept["_id"]}, {"$set": {"total": 2.0}})
        await asyncio.to_thread(roll, client)
        fresh = an_order(customer="Fresh")
        orders.insert_one(fresh)
        await expect(row(page, gone)).to_be_visible()  # the last known, until there is better
        await dashboard.start()
        await shows(page, orders)
        await expect(row(page, gone)).to_have_count(0)
        await expect(row(page, fresh)).to_contain_text("Fresh")
        await expect(page.locator("#rows tr")).to_have_count(2)
        assert await page.evaluate("resets") == ["history lost"]
        seen = len(await page.evaluate("seen"))
        orders.delete_one({"_id": fresh["_id"]})  # and it goes on from there
        await shows(page, orders)
        assert len(await page.evaluate("seen")) == seen + 1


def roll(client: MongoClient[dict[str, Any]]) -> None:
    """Write until the oplog has forgotten all that it holds now."""
    oplog = client["local"]["oplog.rs"]
    newest = oplog.find_one(sort=[("$natural", -1)])
    padding = client["other"]["padding"]
    end = time.monotonic() + 60
    while oplog.find_one(sort=[("$natural", 1)])["ts"] <= newest["ts"]:  # type: ignore[index]
        assert time.monotonic() < end, "the oplog does not roll"
        padding.insert_many([{"padding": "x" * 500_000} for _ in range(8)])


# -- the shop and the routes ----------------------------------------------------------------------


@pytest.fixture
def example() -> Any:
    """The example as a module, for its coroutines."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        import app

        yield app
    finally:
        sys.path.remove(str(EXAMPLE))
        sys.modules.pop("app", None)


@contextlib.asynccontextmanager
async def running(coroutine: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(coroutine)
    try:
        yield
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_shop_writes_plausible_orders_and_keeps_their_number_bounded(
    example: Any, database_uri: str, orders: Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "KEPT", 60)
    statuses: set[str] = set()
    with orders.watch(max_await_time_ms=100) as changes:
        async with running(example.shop(database_uri, rate=1000)):
            deleted = 0
            while deleted < 20 or len(statuses) < 5:
                change = await asyncio.to_thread(changes.try_next)
                if change is None:
                    continue
                deleted += change["operationType"] == "delete"
                document = change.get("fullDocument") or {}
                updated = change.get("updateDescription", {}).get("updatedFields", {})
                statuses |= {s for s in (document.get("status"), updated.get("status")) if s}
            assert orders.count_documents({}) <= 61  # one was just placed, and the oldest not gone
    assert statuses == {"placed", "paid", "packed", "shipped", "cancelled"}
    for order in orders.find():
        assert order["total"] == pytest.approx(
            sum(item["price"] * item["quantity"] for item in order["items"])
        )


async def test_the_routes_answer_what_a_client_may_expect(dashboard: Any, orders: Orders) -> None:
    async with httpx.AsyncClient(base_url=dashboard.url) as client:
        item = {"name": "Kettle", "quantity": 2, "price": 58}
        created = await client.post("/orders", json={"customer": "Ada", "items": [item]})
        assert created.status_code == 201
        order = created.json()
        assert (order["status"], order["total"]) == ("placed", 116.0)
        url = f"/orders/{order['id']}"
        changed = await client.patch(url, json={"status": "paid"})
        assert (changed.status_code, changed.json()["status"]) == (200, "paid")
        assert [o["id"] for o in (await client.get("/orders?status=paid")).json()] == [order["id"]]
        assert (await client.get("/orders?status=placed")).json() == []
        assert (await client.delete(url)).status_code == 204
        assert (await client.delete(url)).status_code == 404
        refused = [
            await client.post("/orders", json={"customer": "Ada", "items": []}),
            await client.patch(url, json={"status": "eaten"}),
            await client.patch("/orders/17", json={"status": "paid"}),
            await client.get("/orders?status=eaten"),
        ]
        assert [response.status_code for response in refused] == [422] * 4
