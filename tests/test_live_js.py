"""The browser module in a real Chromium, against a server whose every byte is scripted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from conftest import CHROMIUM_FLAGS, unavailable
from playwright.async_api import Browser, Page
from scripted import Request, ScriptedServer, change, frame, scripted_server, snapshot

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def server() -> AsyncIterator[ScriptedServer]:
    async with scripted_server() as server:
        yield server


async def start(page: Page, server: ScriptedServer, options: str = "{}") -> Request:
    await page.goto(f"{server.url}/live.html")
    await page.wait_for_function("window.ready")
    await page.evaluate(f"start({options})")
    return await server.request()


async def becomes(page: Page, status: str) -> None:
    await page.wait_for_function("(status) => orders.status === status", arg=status)


async def at(page: Page, position: str) -> None:
    await page.wait_for_function("(id) => orders.lastEventId === id", arg=position)


async def documents(page: Page) -> list[Any]:
    found: list[Any] = await page.evaluate("orders.documents")
    return found


def order(id: Any, **fields: Any) -> dict[str, Any]:
    return {"id": id, **fields}


async def live_with(
    page: Page, server: ScriptedServer, *rows: dict[str, Any], options: str = "{}"
) -> Request:
    """A page that is live at position p0 with these rows."""
    stream = await start(page, server, options)
    await stream.stream(
        snapshot(*rows, sent=len(rows), total=len(rows)), frame("ready", {}, id="p0")
    )
    await at(page, "p0")
    await page.evaluate("new Promise(requestAnimationFrame)")  # the first render is over
    await page.evaluate("log.length = renders.length = 0")
    return stream


# -- the snapshot and its changes ------------------------------------------------------------------


async def test_documents_appear_when_their_snapshot_is_complete(
    page: Page, server: ScriptedServer
) -> None:
    stream = await start(page, server)
    assert "last-event-id" not in stream.headers
    await stream.stream(snapshot(order("a"), order("b"), sent=2, total=3))
    await page.wait_for_function("orders.sent === 2")
    assert await page.evaluate("[orders.status, orders.total, orders.size]") == ["loading", 3, 0]
    await stream.send(snapshot(order("c"), sent=3, total=3), frame("ready", {}, id="p0"))
    await becomes(page, "live")
    assert await documents(page) == [order("a"), order("b"), order("c")]
    assert await page.evaluate("orders.lastEventId") == "p0"
    assert await page.evaluate("log") == ["loading", "live"]


async def test_an_empty_snapshot_is_complete_too(page: Page, server: ScriptedServer) -> None:
    stream = await start(page, server)
    await stream.stream(frame("ready", {"total": 0}, id="p0"))
    await becomes(page, "live")
    assert await documents(page) == []


async def test_each_operation_does_what_its_name_says(page: Page, server: ScriptedServer) -> None:
    stream = await live_with(page, server, *(order(id, n=0) for id in "abcd"))
    await stream.send(
        change("insert", "e", order("e", n=1), position="p1"),
        change("update", "a", order("a", n=2), position="p2"),
        change("replace", "b", order("b", n=3), position="p3"),
        change("delete", "c", position="p4"),
        change("leave", "d", position="p5"),
        change("enter", "f", order("f", n=6), position="p6"),
    )
    await at(page, "p6")
    assert await documents(page) == [
        order("a", n=2), order("b", n=3), order("e", n=1), order("f", n=6)
    ]  # fmt: skip
    assert await page.evaluate("[orders.get('a').n, orders.has('c'), orders.size]") == [2, False, 4]
    assert await page.evaluate("[...orders.keys()].join('')") == "abef"
    assert await page.evaluate("log") == [
        'insert "e"', 'update "a"', 'replace "b"', 'delete "c"', 'leave "d"', 'enter "f"'
    ]  # fmt: skip


async def test_a_change_without_a_document_leaves_the_row_as_it_was(
    page: Page, server: ScriptedServer
) -> None:
    stream = await live_with(page, server, order("a", n=1))
    await stream.send(
        change("update", "a", None, position="p1"), change("insert", "b", None, position="p2")
    )
    await at(page, "p2")
    assert await documents(page) == [order("a", n=1)]


async def test_a_listener_is_told_what_the_document_was_before(
    page: Page, server: ScriptedServer
) -> None:
    stream = await live_with(page, server, order("a", n=1))
    await page.evaluate("window.seen = []; void orders.on('update', (event) => seen.push(event))")
    await stream.send(change("update", "a", order("a", n=2), position="p1"))
    await at(page, "p1")
    assert await page.evaluate("seen") == [
        {
            "type": "update", "operation": "update", "id": "a", "document": order("a", n=2),
            "previous": order("a", n=1), "lastEventId": "p1",
        }
    ]  # fmt: skip


async def test_ids_of_every_json_type_are_told_apart(page: Page, server: ScriptedServer) -> None:
    ids = [1, "1", True, {"region": "eu", "number": 7}, '{"number":7,"region":"eu"}']
    await live_with(page, server, *(order(id) for id in ids))
    assert await page.evaluate("orders.size") == len(ids)
    for id in ids:
        assert await page.evaluate("(id) => orders.get(id)", id) == order(id)
    assert await page.evaluate("orders.has({number: 7, region: 'eu'})")


async def test_documents_follow_the_order_asked_for(page: Page, server: ScriptedServer) -> None:
    stream = await live_with(
        page, server, order("a", n=2), order("b", n=1), options="{sort: (a, b) => b.n - a.n}"
    )
    await stream.send(
        change("insert", "c", order("c", n=3), position="p1"),
        change("update", "b", order("b", n=4), position="p2"),
    )
    await at(page, "p2")
    assert [document["id"] for document in await documents(page)] == ["b", "c", "a"]
    assert await page.evaluate("[...orders].map(([id]) => id).join('')") == "bca"


async def test_the_id_may_be_in_another_field(page: Page, server: ScriptedServer) -> None:
    stream = await start(page, server, "{key: 'number'}")
    await stream.stream(snapshot({"number": 7}, sent=1, total=1), frame("ready", {}, id="p0"))
    await stream.send(change("update", 7, {"number": 7, "paid": True}, position="p1"))
    await at(page, "p1")
    assert await documents(page) == [{"number": 7, "paid": True}]


async def test_events_of_other_types_are_handed_on(page: Page, server: ScriptedServer) -> None:
    stream = await live_with(page, server)
    await page.evaluate("window.seen = []; void orders.on('notice', ({data}) => seen.push(data))")
    await stream.send(frame("notice", {"text": "hello"}), b"event: notice\ndata: plain\n\n")
    await page.wait_for_function("seen.length === 2")
    assert await page.evaluate("seen") == [{"text": "hello"}, "plain"]


async def test_events_named_like_the_browsers_own_are_not_taken_for_them(
    page: Page, server: ScriptedServer
) -> None:
    stream = await live_with(page, server, order("a"))
    await stream.send(
        frame("error", {"detail": "x"}),
        frame("open", {"shop": "x"}),
        change("insert", "b", order("b"), position="p1"),
    )
    await at(page, "p1")
    assert await page.evaluate("orders.status") == "live"
    assert await documents(page) == [order("a"), order("b")]


async def test_a_stream_that_cannot_be_read_fails_rather_than_showing_wrong_rows(
    page: Page, server: ScriptedServer
) -> None:
    stream = await live_with(page, server, order("a"))
    await stream.send(b"event: update\nid: p1\ndata: {cut\n\n")
    await becomes(page, "failed")
    assert "cannot be read" in await page.evaluate("orders.error.message")
    await stream.disconnected()


# -- cuts and resets -------------------------------------------------------------------------------


async def test_a_cut_in_the_middle_of_a_snapshot_starts_over_with_none_of_its_first_half(
    page: Page, server: ScriptedServer
) -> None:
    first = await start(page, server)
    await first.stream(snapshot(order("deleted meanwhile"), sent=1, total=2))
    await page.wait_for_function("orders.sent === 1")
    first.cut()
    second = await server.request()
    assert "last-event-id" not in second.headers
    await second.stream(snapshot(order("a"), sent=1, total=1), frame("ready", {}, id="p0"))
    await becomes(page, "live")
    assert await documents(page) == [order("a")]


async def test_a_reconnect_resumes_from_the_last_event_and_needs_no_snapshot(
    page: Page, server: ScriptedServer
) -> None:
    first = await live_with(page, server, order("a", n=0))
    await first.send(change("update", "a", order("a", n=1), position="p1"))
    await at(page, "p1")
    first.cut()
    second = await server.request()
    assert second.headers["last-event-id"] == "p1"
    assert await page.evaluate("orders.size") == 1  # what is known stays on the page
    await second.stream(change("insert", "b", order("b"), position="p2"))
    await at(page, "p2")
    assert await documents(page) == [order("a", n=1), order("b")]
    assert await page.evaluate("log") == [
        'update "a"', "reconnecting", "live", 'insert "b"'
    ]  # fmt: skip


async def test_the_browser_resumes_from_an_id_only_frame(
    page: Page, server: ScriptedServer
) -> None:
    first = await live_with(page, server, order("a"))
    await first.send(frame(id="p9"))
    first.cut()
    second = await server.request()
    assert second.headers["last-event-id"] == "p9"
    await second.stream(change("insert", "b", order("b"), position="p10"))
    await at(page, "p10")
    assert await documents(page) == [order("a"), order("b")]


async def test_after_a_reset_the_old_rows_stay_until_the_new_ones_replace_them(
    page: Page, server: ScriptedServer
) -> None:
    stream = await live_with(page, server, order("a", n=1), order("b", n=1), order("c", n=1))
    await page.evaluate("window.before = orders.get('a')")
    await stream.send(
        frame("reset", {"reason": "history lost"}),
        snapshot(order("a", n=1), order("b", n=2), sent=2, total=3),
    )
    await page.wait_for_function("orders.sent === 2")
    assert await page.evaluate("orders.status") == "loading"
    assert [row["n"] for row in await documents(page)] == [1, 1, 1]
    await stream.send(snapshot(order("d", n=2), sent=3, total=3), frame("ready", {}, id="p5"))
    await at(page, "p5")
    assert await documents(page) == [order("a", n=1), order("b", n=2), order("d", n=2)]
    # only what differs is reported, and what does not is the same object as before
    await page.wait_for_function("renders.some((ids) => ids.length)")
    assert sorted(await page.evaluate("renders.find((ids) => ids.length)")) == ["b", "c", "d"]
    assert await page.evaluate("orders.get('a') === before")


async def test_a_cut_after_a_reset_asks_again_from_the_position_of_the_rows_that_are_shown(
    page: Page, server: ScriptedServer
) -> None:
    first = await live_with(page, server, order("a"))
    await first.send(
        frame("reset", {"reason": "history lost"}), snapshot(order("x"), sent=1, total=2)
    )
    await page.wait_for_function("orders.sent === 1")
    first.cut()
    second = await server.request()
    # without it the server might send a snapshot that is older than what the page shows
    assert second.headers["last-event-id"] == "p0"
    await second.stream(frame("reset", {"reason": "history lost"}))
    await second.send(snapshot(order("b"), sent=1, total=1), frame("ready", {}, id="p7"))
    await at(page, "p7")
    assert await documents(page) == [order("b")]


async def test_a_server_that_was_killed_and_comes_back_is_found_again(
    page: Page, server: ScriptedServer
) -> None:
    await live_with(page, server, order("a"))
    await server.stop()
    await becomes(page, "reconnecting")
    await server.start()
    stream = await server.request()
    assert stream.headers["last-event-id"] == "p0"
    await stream.stream(change("delete", "a", position="p1"))
    await at(page, "p1")
    assert await documents(page) == []


async def test_a_server_that_is_up_without_its_database_is_not_taken_for_a_live_one(
    page: Page, server: ScriptedServer
) -> None:
    first = await live_with(page, server, order("a"))
    first.cut()
    for _ in range(5):  # what a stream answers then: nothing, and the end
        empty = await server.request()
        await empty.stream()
        empty.cut()
    stream = await server.request()
    assert await page.evaluate("log") == ["reconnecting"]
    await stream.stream()
    await becomes(page, "live")  # without any change having come
    assert await page.evaluate("log") == ["reconnecting", "live"]


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_refused_page_stops_asking_and_says_why(
    page: Page, server: ScriptedServer, status: int
) -> None:
    await (await start(page, server)).answer(status)
    await (await server.request()).answer(status)  # the look at why the browser gave up
    await becomes(page, "failed")
    assert await page.evaluate("orders.error.status") == status
    await page.wait_for_timeout(100)  # five times the delay before another attempt
    assert server.no_request()
    # signed in again, say
    await page.evaluate("orders.reconnect()")
    await (await server.request()).stream(frame("ready", {}, id="p0"))
    await becomes(page, "live")
    assert await page.evaluate("orders.error") is None


async def test_a_revoked_user_keeps_no_connection(page: Page, server: ScriptedServer) -> None:
    first = await live_with(page, server, order("a"))
    first.cut()
    await (await server.request()).answer(403)
    await (await server.request()).answer(403)
    await becomes(page, "failed")
    assert await page.evaluate("log") == ["reconnecting", "failed"]


async def test_a_server_that_says_204_is_left_alone(page: Page, server: ScriptedServer) -> None:
    await (await start(page, server)).answer(204)
    await (await server.request()).answer(204)
    await becomes(page, "closed")


async def test_a_page_instead_of_a_stream_is_no_success(page: Page, server: ScriptedServer) -> None:
    await (await start(page, server)).answer(200, "text/html", "Please sign in")
    await (await server.request()).answer(200, "text/html", "Please sign in")
    await becomes(page, "failed")
    assert "text/html" in await page.evaluate("orders.error.message")


async def test_a_server_in_trouble_is_asked_again_until_it_answers(
    page: Page, server: ScriptedServer
) -> None:
    first = await live_with(page, server, order("a"))
    first.cut()
    for _ in range(2):
        request = await server.request()
        await request.answer(503)
        look = await server.request()
        assert look.query == {"last_event_id": "p0"}
        await look.answer(503)
    await page.wait_for_function("orders.error?.status === 503")
    assert await page.evaluate("orders.status") == "reconnecting"
    stream = await server.request()
    assert stream.query == {"last_event_id": "p0"}
    await stream.stream(change("insert", "b", order("b"), position="p1"))
    await at(page, "p1")
    assert await documents(page) == [order("a"), order("b")]


async def test_a_position_that_the_server_rejects_is_dropped_for_a_new_snapshot(
    page: Page, server: ScriptedServer
) -> None:
    first = await live_with(page, server, order("a"))
    first.cut()
    await (await server.request()).answer(400)
    await (await server.request()).answer(400)
    stream = await server.request()
    assert stream.query == {}
    await stream.stream(snapshot(order("b"), sent=1, total=1), frame("ready", {}, id="q0"))
    await at(page, "q0")
    assert await documents(page) == [order("b")]


# -- rendering -------------------------------------------------------------------------------------


async def test_a_thousand_changes_render_at_most_once_per_frame(
    page: Page, server: ScriptedServer
) -> None:
    stream = await live_with(page, server)
    await page.evaluate(
        """() => {
            window.frame = 0;
            window.perFrame = {};
            const count = () => { frame += 1; requestAnimationFrame(count); };
            requestAnimationFrame(count);
            orders.subscribe(() => perFrame[frame] = (perFrame[frame] ?? 0) + 1);
        }"""
    )
    for start in range(0, 1000, 100):
        await stream.send(
            *(change("insert", n, order(n), position=f"q{n}") for n in range(start, start + 100))
        )
    await at(page, "q999")
    await page.wait_for_function("renders.flat().length === 1000")
    assert await page.evaluate("Math.max(...Object.values(perFrame))") == 1
    assert await page.evaluate("renders.length < 200")


async def test_a_hidden_tab_renders_too(page: Page, server: ScriptedServer) -> None:
    stream = await live_with(page, server)
    # what a hidden tab is like: no frames
    await page.evaluate(
        """() => {
            Object.defineProperty(document, "visibilityState", { value: "hidden" });
            window.requestAnimationFrame = () => 0;
        }"""
    )
    await stream.send(change("insert", "a", order("a"), position="p1"))
    await page.wait_for_function("renders.flat().includes('a')", polling=50)


async def test_a_tab_hidden_after_it_asked_for_a_frame_renders_too(
    page: Page, server: ScriptedServer
) -> None:
    stream = await live_with(page, server)
    await page.evaluate("window.requestAnimationFrame = () => 0")
    await stream.send(change("insert", "a", order("a"), position="p1"))
    await page.wait_for_function("renders.flat().includes('a')", polling=50)


async def test_a_new_subscriber_is_called_with_everything_there_is(
    page: Page, server: ScriptedServer
) -> None:
    await live_with(page, server, order("a"), order("b"))
    ids = await page.evaluate(
        "new Promise((resolve) => orders.subscribe((_, changed) => resolve([...changed])))"
    )
    assert ids == ["a", "b"]


async def test_an_unsubscribed_function_is_not_called_again(
    page: Page, server: ScriptedServer
) -> None:
    stream = await live_with(page, server)
    await page.evaluate("window.calls = 0; orders.subscribe(() => calls += 1)()")
    await stream.send(change("insert", "a", order("a"), position="p1"))
    await page.wait_for_function("renders.flat().includes('a')")
    assert await page.evaluate("calls") == 0


async def test_a_subscriber_that_throws_does_not_stop_the_others(
    browser: Browser, server: ScriptedServer
) -> None:
    page = await browser.new_page()  # the fixture's own would fail for the errors
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(error.message))
    stream = await live_with(page, server)
    await page.evaluate(
        """() => {
            orders.on("insert", () => { throw new Error("in a listener") });
            orders.subscribe(() => { throw new Error("in a subscriber") });
            orders.subscribe((_, ids) => { window.last = [...ids] });
        }"""
    )
    await stream.send(change("insert", "a", order("a"), position="p1"))
    await page.wait_for_function("window.last?.includes('a')")
    assert set(errors) == {"in a listener", "in a subscriber"}


async def test_a_snapshot_is_the_same_object_until_something_changes(
    page: Page, server: ScriptedServer
) -> None:
    stream = await live_with(page, server, order("a"))
    await page.evaluate("window.before = orders.snapshot()")
    assert await page.evaluate("orders.snapshot() === before && Object.isFrozen(before)")
    await stream.send(change("update", "a", order("a", n=1), position="p1"))
    await at(page, "p1")
    assert await page.evaluate("orders.snapshot() !== before")
    assert await page.evaluate("orders.snapshot().version > before.version")
    await page.evaluate("window.before = orders.snapshot()")
    stream.cut()
    await becomes(page, "reconnecting")
    assert await page.evaluate("orders.snapshot() !== before")
    assert await page.evaluate("orders.documents === before.documents")


# -- leaving, sleeping and coming back -------------------------------------------------------------


async def test_close_ends_the_connection_and_keeps_the_documents(
    page: Page, server: ScriptedServer
) -> None:
    stream = await live_with(page, server, order("a"))
    await page.evaluate("orders.close()")
    await stream.disconnected()
    assert await page.evaluate("orders.status") == "closed"
    assert await documents(page) == [order("a")]
    await page.evaluate("orders.reconnect(); dispatchEvent(new Event('online'))")
    await page.wait_for_timeout(100)
    assert server.no_request()


async def test_a_page_in_the_back_forward_cache_holds_no_connection_and_resumes_after_it(
    page: Page, server: ScriptedServer
) -> None:
    stream = await live_with(page, server, order("a"))
    persisted = "new PageTransitionEvent('{}', {{persisted: true}})"
    await page.evaluate(f"void dispatchEvent({persisted.format('pagehide')})")
    await stream.disconnected()
    assert server.no_request()
    await page.evaluate(f"void dispatchEvent({persisted.format('pageshow')})")
    stream = await server.request()
    assert stream.query == {"last_event_id": "p0"}  # a new EventSource has no Last-Event-ID
    await stream.stream(change("insert", "b", order("b"), position="p1"))
    await at(page, "p1")
    assert await documents(page) == [order("a"), order("b")]


async def test_going_back_to_the_page_resumes_it(browser: Browser, server: ScriptedServer) -> None:
    again = await browser.browser_type.launch(
        executable_path=os.environ.get("CHROMIUM") or shutil.which("chromium"),
        args=CHROMIUM_FLAGS,
        ignore_default_args=["--disable-back-forward-cache"],
    )
    try:
        page = await again.new_page()
        stream = await live_with(page, server, order("a"))
        await page.goto(f"{server.url}/elsewhere.html")
        await stream.disconnected()
        await page.evaluate("history.back()")
        stream = await server.request()
        assert stream.query == {"last_event_id": "p0"}  # so it was not loaded afresh
        await stream.stream(change("insert", "b", order("b"), position="p1"))
        await at(page, "p1")
        assert await documents(page) == [order("a"), order("b")]
    finally:
        await again.close()


async def test_a_page_that_slept_reconnects_from_where_it_was(
    page: Page, server: ScriptedServer
) -> None:
    await page.clock.install()
    stream = await live_with(page, server, order("a"))
    await page.clock.fast_forward(50_000)
    assert server.no_request()
    await page.clock.fast_forward(600_000)  # timers that fire late: a closed lid
    await stream.disconnected()
    stream = await server.request()
    assert stream.query == {"last_event_id": "p0"}
    await stream.stream(change("insert", "b", order("b"), position="p1"))
    await at(page, "p1")
    assert await documents(page) == [order("a"), order("b")]


async def test_a_machine_that_is_online_again_reconnects_at_once(
    page: Page, server: ScriptedServer
) -> None:
    stream = await live_with(page, server, order("a"))
    await page.evaluate("void dispatchEvent(new Event('online'))")
    await stream.disconnected()
    assert (await server.request()).query == {"last_event_id": "p0"}


async def test_a_reset_on_a_reopened_connection_keeps_the_position_in_its_address(
    page: Page, server: ScriptedServer
) -> None:
    await live_with(page, server, order("a"))
    await page.evaluate("orders.reconnect()")
    second = await server.request()
    assert second.query == {"last_event_id": "p0"}
    await second.stream(
        frame("reset", {"reason": "history lost"}), snapshot(order("x"), sent=1, total=2)
    )
    await page.wait_for_function("orders.sent === 1")
    second.cut()
    third = await server.request()
    assert third.query == {"last_event_id": "p0"}
    await third.stream(frame("reset", {"reason": "history lost"}))
    await third.send(snapshot(order("b"), sent=1, total=1), frame("ready", {}, id="p7"))
    await at(page, "p7")
    assert await documents(page) == [order("b")]


async def test_credentials_of_another_origin_are_sent_when_asked_for(page: Page) -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(scripted_server())
        other = await stack.enter_async_context(scripted_server())
        await page.goto(f"{server.url}/live.html")
        await page.wait_for_function("window.ready")
        await page.context.add_cookies([{"name": "session", "value": "s", "url": other.url}])
        await page.evaluate(f"start({{withCredentials: true}}, '{other.url}/orders/live')")
        request = await other.request()
        assert request.headers["cookie"] == "session=s"
        assert request.headers["origin"] == server.url


# -- several collections on one connection ---------------------------------------------------------


async def start_all(page: Page, server: ScriptedServer) -> Request:
    await page.goto(f"{server.url}/live.html")
    await page.wait_for_function("window.ready")
    await page.evaluate("startAll()")
    return await server.request()


def of_orders(*rows: dict[str, Any]) -> bytes:
    return snapshot(*rows, sent=len(rows), total=len(rows), collection="orders")


def of_customers(*rows: dict[str, Any]) -> bytes:
    return snapshot(*rows, sent=len(rows), total=len(rows), collection="customers")


async def both(page: Page) -> list[Any]:
    found: list[Any] = await page.evaluate(
        "[orders.documents, shop.collection('customers').documents]"
    )
    return found


async def test_one_connection_fills_several_collections_at_one_moment(
    page: Page, server: ScriptedServer
) -> None:
    stream = await start_all(page, server)
    await stream.stream(of_orders(order("a", n=1), order("b", n=2)), of_customers(order("c")))
    await page.wait_for_function("orders.sent === 2")
    assert await both(page) == [[], []]
    await stream.send(frame("ready", {"total": 3}, id="p0"))
    await at(page, "p0")
    assert await both(page) == [[order("b", n=2), order("a", n=1)], [order("c")]]
    await page.evaluate("new Promise(requestAnimationFrame)")
    await page.evaluate("log.length = renders.length = 0")
    await stream.send(
        change("update", "c", order("c", name="Ada"), position="p1", collection="customers"),
        change("delete", "a", position="p2", collection="orders"),
    )
    await at(page, "p2")
    assert await both(page) == [[order("b", n=2)], [order("c", name="Ada")]]
    assert await page.evaluate("log") == ["customers update c", "orders delete a"]
    assert await page.evaluate("shop.collection('orders') === orders")
    await page.evaluate("new Promise(requestAnimationFrame)")
    assert await page.evaluate("renders.flat()") == ["a"]  # not what happened to the customers
    assert await page.evaluate("drawn > 0 && drawn < 6")


async def test_one_position_resumes_all_collections(page: Page, server: ScriptedServer) -> None:
    first = await start_all(page, server)
    await first.stream(of_orders(order("a", n=1)), of_customers(order("c")))
    await first.send(frame("ready", {"total": 2}, id="p0"))
    await first.send(change("insert", "d", order("d"), position="p1", collection="customers"))
    await at(page, "p1")
    first.cut()
    second = await server.request()
    assert second.headers["last-event-id"] == "p1"
    await second.stream(change("delete", "a", position="p2", collection="orders"))
    await at(page, "p2")
    assert await both(page) == [[], [order("c"), order("d")]]


async def test_a_reset_replaces_every_collection_at_once(
    page: Page, server: ScriptedServer
) -> None:
    stream = await start_all(page, server)
    await stream.stream(of_orders(order("a", n=1)), of_customers(order("c")))
    await stream.send(frame("ready", {"total": 2}, id="p0"))
    await at(page, "p0")
    await stream.send(frame("reset", {"reason": "drop"}), of_orders(order("b", n=1)))
    await page.wait_for_function("orders.status === 'loading' && orders.sent === 1")
    assert await both(page) == [[order("a", n=1)], [order("c")]]
    await stream.send(of_customers(), frame("ready", {"total": 1}, id="p1"))
    await at(page, "p1")
    assert await both(page) == [[order("b", n=1)], []]


async def test_a_collection_that_is_asked_for_late_has_what_came_before(
    page: Page, server: ScriptedServer
) -> None:
    stream = await start_all(page, server)
    await stream.stream(of_orders(), of_customers(order("d"), order("c")))
    await stream.send(frame("ready", {"total": 2}, id="p0"))
    await at(page, "p0")
    late = "shop.collection('customers', {sort: (a, b) => a.id < b.id ? -1 : 1}).documents"
    assert await page.evaluate(late) == [order("c"), order("d")]


async def test_a_merged_stream_is_not_taken_for_one_collection(
    page: Page, server: ScriptedServer
) -> None:
    stream = await start(page, server)
    await stream.stream(of_orders(order("a")))
    await becomes(page, "failed")
    assert "liveAll()" in await page.evaluate("orders.error.message")
    await stream.disconnected()


async def test_closing_one_collection_closes_the_connection_that_it_shares(
    page: Page, server: ScriptedServer
) -> None:
    stream = await start_all(page, server)
    await stream.stream(of_orders(order("a", n=1)), of_customers())
    await stream.send(frame("ready", {"total": 1}, id="p0"))
    await at(page, "p0")
    await page.evaluate("orders.close()")
    await stream.disconnected()
    assert await page.evaluate("[shop.status, orders.size]") == ["closed", 1]


# -- streams without positions: a window of a sorted live query ------------------------------------


async def test_a_window_is_replaced_by_the_snapshot_of_each_connection(
    page: Page, server: ScriptedServer
) -> None:
    stream = await start(page, server, "{sort: (a, b) => b.n - a.n}")
    await stream.stream(snapshot(order("a", n=1), order("b", n=2), sent=2, total=2))
    await stream.send(frame("ready", {"total": 2}))
    await becomes(page, "live")
    await stream.send(
        change("insert", "c", order("c", n=3), position=None),
        change("leave", "a", position=None),
    )
    await page.wait_for_function("!orders.has('a')")
    assert await documents(page) == [order("c", n=3), order("b", n=2)]
    stream.cut()
    second = await server.request()
    assert "last-event-id" not in second.headers
    assert second.query == {}
    assert await page.evaluate("orders.size") == 2  # what is known stays until there is better
    await second.stream(snapshot(order("d", n=9), order("c", n=3), sent=2, total=2))
    await page.wait_for_function("orders.sent === 2")
    second.cut()  # before it is complete
    third = await server.request()
    assert third.query == {}
    assert await documents(page) == [order("c", n=3), order("b", n=2)]
    await third.stream(snapshot(order("e", n=5), sent=1, total=1), frame("ready", {"total": 1}))
    await becomes(page, "live")
    assert await documents(page) == [order("e", n=5)]
    await page.evaluate("orders.reconnect()")
    assert (await server.request()).query == {}


# -- the React hook of the documentation -----------------------------------------------------------


@pytest.fixture(scope="session")
def react(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """React as two classic scripts (18 is the last version that has them) and the hook itself."""
    npm = shutil.which("npm")
    if npm is None:
        unavailable("no npm to fetch React with")
    folder = tmp_path_factory.mktemp("react")
    packages = ["react@18.3.1", "react-dom@18.3.1"]
    flags = ["--no-save", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)]
    subprocess.run([npm, "install", *flags, *packages], check=True, capture_output=True)
    umd = {name: folder / "node_modules" / name / "umd" for name in ("react", "react-dom")}
    documentation = (Path(__file__).parent.parent / "docs" / "browser.md").read_text("utf-8")
    [hook] = [
        block
        for block in re.findall(r"^```js\n(.*?)^```$", documentation, re.MULTILINE | re.DOTALL)
        if "export function useLive" in block
    ]
    names = "useCallback, useEffect, useState, useSyncExternalStore"
    return {
        "/react.js": (umd["react"] / "react.development.js").read_text("utf-8"),
        "/react-dom.js": (umd["react-dom"] / "react-dom.development.js").read_text("utf-8"),
        "/react-module.js": f"export const {{ {names} }} = window.React;",
        "/use-live.js": hook,
    }


async def rows_shown(page: Page, *rows: str) -> None:
    await page.wait_for_function(
        """(rows) => rows ===
            [...document.querySelectorAll("li")].map((li) => li.textContent).join()""",
        arg=",".join(rows),
    )


async def test_the_hook_renders_what_changes_and_only_that(
    page: Page, server: ScriptedServer, react: dict[str, str]
) -> None:
    server.scripts |= react
    await page.goto(f"{server.url}/react.html")
    stream = await server.request()
    await stream.stream(
        snapshot(order("a", n=1), order("b", n=1), sent=2, total=2), frame("ready", {}, id="p0")
    )
    await rows_shown(page, "a: 1", "b: 1")
    await page.wait_for_selector("[data-status=live]", state="attached")
    await page.evaluate("void (rowRenders.length = 0)")
    await stream.send(change("update", "b", order("b", n=2), position="p1"))
    await rows_shown(page, "a: 1", "b: 2")
    assert await page.evaluate("rowRenders") == ["b"]
    await page.evaluate("void (renders = 0)")
    await stream.send(
        *(change("update", "a", order("a", n=n), position=f"q{n}") for n in range(1001))
    )
    await rows_shown(page, "a: 1000", "b: 2")
    assert await page.evaluate("renders") < 100
    stream.cut()
    await page.wait_for_selector("[data-status=reconnecting]", state="attached")
    await rows_shown(page, "a: 1000", "b: 2")


async def test_the_hook_closes_what_it_opened(
    page: Page, server: ScriptedServer, react: dict[str, str]
) -> None:
    server.scripts |= react
    await page.goto(f"{server.url}/react.html")
    first = await server.request()
    await first.stream(snapshot(order("a", n=1), sent=1, total=1), frame("ready", {}, id="p0"))
    await rows_shown(page, "a: 1")
    await page.evaluate("setUrl('/others/live')")
    await rows_shown(page)  # nothing of the other query is shown as this one's
    await first.disconnected()
    second = await server.request()
    assert second.path == "/others/live"
    await second.stream(snapshot(order("z", n=1), sent=1, total=1), frame("ready", {}, id="z0"))
    await rows_shown(page, "z: 1")
    await page.evaluate("setShown(false)")
    await second.disconnected()


async def test_the_hook_works_in_strict_mode(
    page: Page, server: ScriptedServer, react: dict[str, str]
) -> None:
    server.scripts |= react
    await page.goto(f"{server.url}/react.html?strict")

    async def answer() -> None:  # mounted twice: the first request is given up, or never made
        while True:
            stream = await server.request()
            with contextlib.suppress(ConnectionError):
                await stream.stream(
                    snapshot(order("a", n=1), sent=1, total=1), frame("ready", {}, id="p0")
                )

    answering = asyncio.create_task(answer())
    await rows_shown(page, "a: 1")
    answering.cancel()
