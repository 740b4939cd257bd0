"""The tracking example, whole: everybody sees their own parcels, and nobody anything else."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from bson import ObjectId
from playwright.async_api import Browser, Page, expect
from pymongo import MongoClient
from pymongo.database import Database
from starlette.exceptions import HTTPException
from starlette.requests import Request

from data_bridge import Document
from data_bridge.api import App, close_streams
from data_bridge.testing import events, streaming_client

pytestmark = pytest.mark.asyncio(loop_scope="module")

EXAMPLE = Path(__file__).parent.parent / "examples" / "tracking"
INTERNAL = ("margin", "note", "customer", "secret-note-of-the-desk", "77.77")

Spawn = Callable[..., Awaitable[Any]]


class TrackedParcel(Document):
    customer: str

    class Settings:
        collection = "parcels"


@pytest.fixture
def shop(mongo: MongoClient[dict[str, Any]], database_name: str) -> Database[dict[str, Any]]:
    return mongo[database_name]


@pytest_asyncio.fixture(loop_scope="module")
async def server(spawn: Spawn, database_uri: str, shop: Database[dict[str, Any]]) -> Any:
    shop["customers"].insert_many(
        [
            {"_id": who, "name": name, "allowed": True}
            for who, name in (("ada", "Ada Moreau"), ("bruno", "Bruno Costa"))
        ]
    )
    return await spawn("app:app", env={"DATABASE": database_uri, "SECRET": "s"}, app_dir=EXAMPLE)


def a_parcel(customer: str, contents: str) -> dict[str, Any]:
    return {
        "_id": ObjectId(),
        "customer": customer,
        "contents": contents,
        "stage": "on its way",
        "travelled": 0.5,
        "courier": "Lena",
        "updated": datetime.now(UTC),
        "margin": 77.77,
        "note": "secret-note-of-the-desk",
    }


async def signed_in(page: Page, server: Any, who: str) -> Page:
    await page.goto(server.url)
    await page.get_by_role("button", name=who).click()
    await page.wait_for_function("(window.shop ?? window.parcels).status === 'live'")
    return page


def card(page: Page, parcel: dict[str, Any]) -> Any:
    return page.locator(f'.parcel[data-id="{parcel["_id"]}"]:not(.gone)')


@pytest_asyncio.fixture(loop_scope="module")
async def another(browser: Browser) -> AsyncIterator[Callable[[], Awaitable[Page]]]:
    """Pages of other browsers: no cookie of one is another's."""
    contexts = []

    async def page() -> Page:
        contexts.append(await browser.new_context())
        return await contexts[-1].new_page()

    yield page
    for context in contexts:
        await context.close()


@contextlib.asynccontextmanager
async def client(server: Any, who: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url) as client:
        assert (await client.post("/sign-in", json={"who": who})).status_code == 204
        yield client


async def test_two_customers_see_only_their_own(
    page: Page, another: Any, server: Any, shop: Database[dict[str, Any]]
) -> None:
    hers, his = a_parcel("ada", "Kettle"), a_parcel("bruno", "Moka pot")
    shop["parcels"].insert_many([hers, his])
    ada = await signed_in(page, server, "Ada")
    bruno = await signed_in(await another(), server, "Bruno")
    await expect(card(ada, hers)).to_contain_text("50% of the way")
    await expect(card(bruno, his)).to_contain_text("Moka pot")
    shop["parcels"].update_many({}, {"$set": {"stage": "delivered", "travelled": 1.0}})
    await expect(card(ada, hers)).to_contain_text("Delivered")
    await expect(card(bruno, his)).to_contain_text("Delivered")
    for tab, other in ((ada, his), (bruno, hers)):
        assert await tab.evaluate("parcels.size") == 1
        assert await tab.locator(".parcel").count() == 1
        assert str(other["_id"]) not in await tab.content()


async def test_a_parcel_that_is_handed_on_leaves_one_page_and_enters_another(
    page: Page, another: Any, server: Any, shop: Database[dict[str, Any]]
) -> None:
    parcel = a_parcel("ada", "Kettle")
    shop["parcels"].insert_one(parcel)
    ada = await signed_in(page, server, "Ada")
    bruno = await signed_in(await another(), server, "Bruno")
    desk = await signed_in(await another(), server, "The desk")
    await expect(card(ada, parcel)).to_be_visible()
    await expect(bruno.get_by_text("Nothing is on its way")).to_be_visible()
    row = desk.locator(f'tr[data-id="{parcel["_id"]}"]')
    await expect(row).to_contain_text("secret-note-of-the-desk")  # the desk sees all there is
    await row.get_by_label("Customer of Kettle").select_option("bruno")
    await expect(card(bruno, parcel)).to_be_visible()
    await expect(card(ada, parcel)).to_have_count(0)
    await expect(ada.get_by_text("Nothing is on its way")).to_be_visible()


async def test_the_wire_has_nothing_but_what_a_customer_may_know(
    server: Any, shop: Database[dict[str, Any]]
) -> None:
    hers, his = a_parcel("ada", "Kettle"), a_parcel("bruno", "Moka pot")
    shop["parcels"].insert_many([hers, his])
    received = b""
    async with (
        asyncio.timeout(30),
        client(server, "ada") as ada,
        ada.stream("GET", "/my/parcels") as stream,
    ):
        async for chunk in stream.aiter_bytes():
            if b"event: ready" not in received and b"event: ready" in received + chunk:
                # his appears nowhere; hers changes, goes to him, changes there, and comes back
                parcels, mine = shop["parcels"], {"_id": hers["_id"]}
                parcels.update_one({"_id": his["_id"]}, {"$set": {"travelled": 0.6}})
                parcels.update_one(mine, {"$set": {"travelled": 0.7, "note": "other-secret"}})
                parcels.update_one(mine, {"$set": {"customer": "bruno"}})
                parcels.update_one(mine, {"$set": {"travelled": 0.123}})
                parcels.update_one(mine, {"$set": {"customer": "ada", "travelled": 0.8}})
                parcels.delete_one(mine)
            received += chunk
            if b"event: delete" in received:
                break
    text = received.decode()
    assert [line[7:] for line in text.splitlines() if line.startswith("event: ")] == [
        "snapshot", "ready", "update", "leave", "enter", "delete"
    ]  # fmt: skip
    for secret in (*INTERNAL, "other-secret", "bruno", "Moka pot", "0.123", str(his["_id"])):
        assert secret not in text
    documents = [
        json.loads(line[6:])["document"]
        for line in text.splitlines()
        if line.startswith('data: {"operation"')
    ]
    fields = {"id", "contents", "stage", "travelled", "courier", "updated"}
    assert [set(document or ()) for document in documents] == [fields, set(), fields, set()]


async def test_who_is_not_signed_in_or_forges_it_gets_no_stream(server: Any) -> None:
    async with httpx.AsyncClient(base_url=server.url) as nobody:
        assert (await nobody.get("/my/parcels")).status_code == 401
        assert (await nobody.get("/desk/live")).status_code == 401
        for cookie in ("ada", "ada.", "ada." + "0" * 64, "."):
            nobody.cookies.set("visitor", cookie)
            assert (await nobody.get("/my/parcels")).status_code == 401
    async with client(server, "ada") as ada:
        assert (await ada.get("/desk/live")).status_code == 403
        answer = await ada.post("/desk/customers/bruno", json={"allowed": False})
        assert answer.status_code == 403
        answer = await ada.post(f"/desk/parcels/{ObjectId()}/customer", json={"customer": "ada"})
        assert answer.status_code == 403
    async with client(server, "stranger") as stranger:
        assert (await stranger.get("/my/parcels")).status_code == 403


async def test_a_closed_account_ends_its_pages_which_keep_no_connection(
    page: Page, another: Any, server: Any, shop: Database[dict[str, Any]]
) -> None:
    hers, his = a_parcel("ada", "Kettle"), a_parcel("bruno", "Moka pot")
    shop["parcels"].insert_many([hers, his])
    ada = await signed_in(page, server, "Ada")
    bruno = await signed_in(await another(), server, "Bruno")
    desk = await signed_in(await another(), server, "The desk")
    await desk.get_by_role("button", name="Close the account of Ada Moreau").click()
    await ada.wait_for_function("parcels.status === 'failed'")
    assert await ada.evaluate("parcels.error.status") == 403
    await expect(ada.get_by_text("This account is closed")).to_be_visible()
    await expect(card(ada, hers)).not_to_be_visible()
    # It asks no more, and hears no more; the other pages go on.
    asked: list[str] = []
    ada.on("request", lambda request: asked.append(request.url))
    shop["parcels"].update_many({}, {"$set": {"courier": "Kofi"}})
    await expect(card(bruno, his)).to_contain_text("Kofi")
    await ada.wait_for_timeout(1500)
    assert asked == []
    assert await ada.evaluate("parcels.get(parcels.documents[0].id).courier") == "Lena"
    # Opened again, it shows what is there now.
    await desk.get_by_role("button", name="Open the account of Ada Moreau").click()
    await expect(desk.get_by_role("button", name="Close the account of Ada")).to_be_visible()
    await ada.get_by_role("button", name="Try again").click()
    await expect(card(ada, hers)).to_contain_text("Kofi")


async def test_signing_out_ends_the_streams_of_every_tab(
    another: Any, server: Any, shop: Database[dict[str, Any]]
) -> None:
    shop["parcels"].insert_one(a_parcel("ada", "Kettle"))
    page = await signed_in(await another(), server, "Ada")
    second = await page.context.new_page()
    await second.goto(server.url)
    await second.wait_for_function("window.parcels?.status === 'live'")
    await page.get_by_role("button", name="Sign out").click()
    await expect(page.get_by_text("Who are you?")).to_be_visible()
    await second.wait_for_function("parcels.status === 'failed'")
    assert await second.evaluate("parcels.error.status") == 401
    await expect(second.get_by_text("You are signed out")).to_be_visible()


async def test_after_a_restart_the_page_goes_on_from_where_it_was(
    page: Page, server: Any, shop: Database[dict[str, Any]]
) -> None:
    parcel, gone = a_parcel("ada", "Kettle"), a_parcel("ada", "Moka pot")
    shop["parcels"].insert_many([parcel, gone])
    ada = await signed_in(page, server, "Ada")
    await ada.evaluate(
        "() => { window.seen = []; for (const type of ['change', 'reset'])"
        " parcels.on(type, (event) => seen.push(event.type)) }"
    )
    await server.kill()
    shop["parcels"].update_one({"_id": gone["_id"]}, {"$set": {"customer": "bruno"}})
    shop["parcels"].update_one({"_id": parcel["_id"]}, {"$set": {"travelled": 0.9}})
    await server.start()
    await expect(card(ada, parcel)).to_contain_text("90% of the way")
    await expect(card(ada, gone)).to_have_count(0)
    assert await ada.evaluate("seen") == ["leave", "update"]


async def test_a_permission_that_is_withdrawn_while_a_stream_opens_ends_it(
    database_uri: str,
) -> None:
    """The filter has seen the old permission, and the stream is not there yet to be closed."""
    looked, go_on = asyncio.Event(), asyncio.Event()
    allowed = True

    async def filter(request: Request) -> dict[str, Any]:
        if not allowed:
            raise HTTPException(403)
        looked.set()
        await go_on.wait()
        return {}

    app = App(database=database_uri, documents=[TrackedParcel])
    app.live("/mine", TrackedParcel, filter=filter, owner=lambda request: "ada")
    async with asyncio.timeout(30), streaming_client(app) as client:
        opening = asyncio.create_task(client.get("/mine"))
        await looked.wait()
        allowed = False
        close_streams(owner="bruno")  # somebody else's
        close_streams(owner="ada")
        go_on.set()
        response = await opening  # it would not end otherwise
        assert (response.status_code, response.content) == (200, b"")
        assert (await client.get("/mine")).status_code == 403
        allowed = True
        async with client.stream("GET", "/mine") as stream:
            assert (await anext(events(stream))).event == "snapshot"
