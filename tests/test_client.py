"""The streaming test client, its fixture, and the reader of event streams."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from data_bridge.errors import ApplicationFailed
from data_bridge.testing import (
    Comment,
    Event,
    EventDecoder,
    Mark,
    StreamingTransport,
    events,
    streaming_client,
)

pytest_plugins = ["pytester"]

# -- applications -------------------------------------------------------------------------------


def application(endpoint: Any, **options: Any) -> Starlette:
    return Starlette(routes=[Route("/", endpoint, methods=["GET", "POST"])], **options)


def streaming(generator: Any) -> Starlette:
    async def endpoint(request: Request) -> Response:
        return StreamingResponse(generator(), media_type="text/event-stream")

    return application(endpoint)


def tasks() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


@contextlib.asynccontextmanager
async def no_task_is_left() -> AsyncIterator[None]:
    before = tasks()
    yield
    assert tasks() <= before


# -- streaming ----------------------------------------------------------------------------------


async def test_the_headers_are_there_before_the_body() -> None:
    go_on = asyncio.Event()

    async def generate() -> AsyncIterator[str]:
        await go_on.wait()
        yield "done"

    async with (
        no_task_is_left(),
        streaming_client(streaming(generate)) as client,
        client.stream("GET", "/") as response,
    ):
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        go_on.set()
        assert [chunk async for chunk in response.aiter_text()] == ["done"]


async def test_chunks_come_one_by_one_while_the_application_goes_on() -> None:
    turn = asyncio.Semaphore(0)

    async def generate() -> AsyncIterator[str]:
        for number in range(3):
            await turn.acquire()
            yield str(number)

    async with (
        streaming_client(streaming(generate)) as client,
        client.stream("GET", "/") as response,
    ):
        chunks = response.aiter_text()
        for number in range(3):
            turn.release()
            assert await anext(chunks) == str(number)
        assert await anext(chunks, None) is None


async def test_an_infinite_stream_is_closed_and_its_generator_cancelled_and_cleaned_up() -> None:
    what_happened = []

    async def generate() -> AsyncIterator[str]:
        try:
            yield "data: 1\n\n"
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            what_happened.append("cancelled")
            raise
        finally:
            what_happened.append("finally")

    async with no_task_is_left(), streaming_client(streaming(generate)) as client:
        async with client.stream("GET", "/") as response:
            assert await anext(response.aiter_lines()) == "data: 1"
            assert what_happened == []
        assert what_happened == ["cancelled", "finally"]


async def test_a_stream_that_never_waits_is_closed_too() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x" * 1024, "more_body": True})

    transport = StreamingTransport(app, grace=0.01)
    async with (
        no_task_is_left(),
        httpx.AsyncClient(transport=transport, base_url="http://testserver") as client,
        client.stream("GET", "/") as response,
    ):
        assert await anext(response.aiter_bytes())


async def test_an_application_waits_while_its_reader_does_not_read() -> None:
    sent = 0

    async def generate() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield bytes(1024)

    async with (
        streaming_client(streaming(generate)) as client,
        client.stream("GET", "/") as response,
    ):
        for _ in range(1000):
            await asyncio.sleep(0)
        assert sent <= 66  # 64 KiB wait, and the chunk that found no room
        chunks = response.aiter_bytes()
        for _ in range(200):
            await anext(chunks)
        assert 200 <= sent <= 267


async def test_two_streams_are_open_at_once_on_one_client() -> None:
    queues = {"/a": asyncio.Queue[str](), "/b": asyncio.Queue[str]()}

    async def endpoint(request: Request) -> Response:
        queue = queues[request.url.path]

        async def generate() -> AsyncIterator[str]:
            while True:
                yield await queue.get()

        return StreamingResponse(generate())

    app = Starlette(routes=[Route("/a", endpoint), Route("/b", endpoint)])
    async with (
        no_task_is_left(),
        streaming_client(app) as client,
        client.stream("GET", "/a") as a,
        client.stream("GET", "/b") as b,
    ):
        chunks_a, chunks_b = a.aiter_text(), b.aiter_text()
        for number in range(3):
            queues["/b"].put_nowait(f"b{number}")
            queues["/a"].put_nowait(f"a{number}")
            assert await anext(chunks_a) == f"a{number}"
            assert await anext(chunks_b) == f"b{number}"


async def test_closing_the_client_closes_a_stream_that_was_left_open() -> None:
    ended = []

    async def generate() -> AsyncIterator[str]:
        try:
            yield "x"
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async with no_task_is_left():
        async with streaming_client(streaming(generate)) as client:
            await client.send(client.build_request("GET", "/"), stream=True)
            assert ended == []
        assert ended == [True]


async def test_a_read_beside_a_close_ends_with_an_error_and_does_not_hang() -> None:
    async def generate() -> AsyncIterator[str]:
        yield "x"
        await asyncio.Event().wait()

    async with streaming_client(streaming(generate)) as client:
        response = await client.send(client.build_request("GET", "/"), stream=True)
        chunks = response.aiter_text()
        await anext(chunks)
        reading = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0)
        await response.aclose()
        with pytest.raises(httpx.TransportError):
            await reading


async def test_a_silent_stream_times_out_as_the_request_says() -> None:
    async def generate() -> AsyncIterator[str]:
        yield "x"
        await asyncio.Event().wait()

    async with no_task_is_left(), streaming_client(streaming(generate)) as client:
        with pytest.raises(httpx.ReadTimeout, match=r"sent nothing for 0\.01 s"):
            async with client.stream("GET", "/", timeout=0.01) as response:
                await response.aread()


async def test_a_call_that_is_cancelled_before_the_headers_leaves_no_task() -> None:
    called = asyncio.Event()

    async def endpoint(request: Request) -> Response:
        called.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with no_task_is_left(), streaming_client(application(endpoint)) as client:
        call = asyncio.create_task(client.get("/"))
        await called.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_an_application_that_ignores_the_disconnect_is_cancelled() -> None:
    ended = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    transport = StreamingTransport(app, grace=0.01)
    async with no_task_is_left(), httpx.AsyncClient(transport=transport) as client:
        async with client.stream("GET", "http://testserver/"):
            pass
        assert ended == [True]


async def test_an_application_that_survives_its_cancellation_is_an_error() -> None:
    stop = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not stop.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await stop.wait()

    async with httpx.AsyncClient(transport=StreamingTransport(app, grace=0.01)) as client:
        with pytest.raises(ApplicationFailed, match="goes on after a disconnect"):
            async with client.stream("GET", "http://testserver/"):
                pass
        stop.set()


async def test_a_background_task_is_finished_when_the_call_returns() -> None:
    done = []

    async def later() -> None:
        await asyncio.sleep(0)
        done.append(True)

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("ok", background=BackgroundTask(later))

    async with streaming_client(application(endpoint)) as client:
        assert (await client.get("/")).text == "ok"
        assert done == [True]


# -- requests -----------------------------------------------------------------------------------


async def test_the_application_sees_what_a_server_would_show_it() -> None:
    seen: dict[str, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            scope["state"]["pool"] = "open"
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        seen.update(scope)
        await PlainTextResponse("ok")(scope, receive, send)

    async with streaming_client(app) as client:
        await client.get(
            "/caf%C3%A9/a%2Fb", params={"q": "ü"}, headers=[(b"X-Name", "Ärger".encode())]
        )
    assert seen["type"] == "http"
    assert seen["asgi"]["version"] == "3.0"
    assert seen["http_version"] == "1.1"
    assert seen["method"] == "GET"
    assert seen["scheme"] == "http"
    assert seen["path"] == "/café/a/b"
    assert seen["raw_path"] == b"/caf%C3%A9/a%2Fb"
    assert seen["query_string"] == b"q=%C3%BC"
    assert seen["root_path"] == ""
    assert seen["server"] == ("testserver", 80)
    assert seen["client"][0] == "127.0.0.1"
    assert seen["extensions"] == {}
    assert seen["state"] == {"pool": "open"}
    headers = dict(seen["headers"])
    assert headers[b"host"] == b"testserver"
    assert headers[b"x-name"] == "Ärger".encode()


async def test_each_request_has_its_own_copy_of_the_state() -> None:
    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, Any]]:
        yield {"seen": 0}

    async def endpoint(request: Request) -> Response:
        request.state.seen += 1
        return PlainTextResponse(str(request.state.seen))

    async with streaming_client(application(endpoint, lifespan=lifespan)) as client:
        assert [(await client.get("/")).text for _ in range(2)] == ["1", "1"]


async def test_a_path_that_is_escaped_twice_is_unescaped_once() -> None:
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(request.path_params["name"])

    app = Starlette(routes=[Route("/{name}", endpoint)])
    async with streaming_client(app) as client:
        assert (await client.get("/100%2525")).text == "100%25"


async def test_a_body_arrives_whole_and_in_chunks() -> None:
    received = []

    async def endpoint(request: Request) -> Response:
        received.append([chunk async for chunk in request.stream() if chunk])
        return PlainTextResponse("ok")

    async def chunks() -> AsyncIterator[bytes]:
        yield b"one"
        yield b"two"

    async with streaming_client(application(endpoint)) as client:
        await client.post("/", content=b"whole")
        await client.post("/", content=chunks())
        await client.post("/")
    assert received == [[b"whole"], [b"one", b"two"], []]


async def test_an_application_may_answer_while_it_still_receives() -> None:
    question: asyncio.Queue[bytes] = asyncio.Queue()

    async def chunks() -> AsyncIterator[bytes]:
        while chunk := await question.get():
            yield chunk

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (message := await receive()).get("more_body"):
            body = message["body"].upper()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async with (
        httpx.AsyncClient(transport=StreamingTransport(app)) as client,
        client.stream("POST", "http://testserver/", content=chunks()) as response,
    ):
        answers = response.aiter_bytes()
        for text in (b"a", b"b"):
            question.put_nowait(text)
            assert await anext(answers) == text.upper()
        question.put_nowait(b"")
        assert await anext(answers, None) is None


async def test_a_response_to_head_has_headers_and_no_body() -> None:
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("five!")

    async with streaming_client(application(endpoint)) as client:
        response = await client.head("/")
    assert response.headers["content-length"] == "5"
    assert response.content == b""


async def test_a_header_of_a_megabyte_reaches_the_application() -> None:
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(str(len(request.headers["last-event-id"])))

    async with streaming_client(application(endpoint)) as client:
        response = await client.get("/", headers={"Last-Event-ID": "x" * 1024 * 1024})
    assert response.text == str(1024 * 1024)


async def test_after_the_response_receive_reports_the_disconnect() -> None:
    after: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("ok")(scope, receive, send)
        after.append((await receive())["type"])

    async with httpx.AsyncClient(transport=StreamingTransport(app)) as client:
        await client.get("http://testserver/")
    assert after == ["http.disconnect"]


# -- what goes wrong ----------------------------------------------------------------------------


class Broken(Exception):
    pass


async def test_an_exception_before_the_headers_is_raised_by_the_call() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise Broken

    async with no_task_is_left(), httpx.AsyncClient(transport=StreamingTransport(app)) as client:
        with pytest.raises(Broken):
            await client.get("http://testserver/")


async def test_an_exception_in_the_body_is_raised_by_the_reader() -> None:
    async def generate() -> AsyncIterator[str]:
        yield "x"
        raise Broken

    async with no_task_is_left(), streaming_client(streaming(generate)) as client:
        with pytest.raises(Broken):
            async with client.stream("GET", "/") as response:
                chunks = response.aiter_text()
                assert await anext(chunks) == "x"
                await anext(chunks)


async def test_an_exception_while_it_is_closed_is_raised_on_closing() -> None:
    async def generate() -> AsyncIterator[str]:
        try:
            yield "x"
            await asyncio.Event().wait()
        finally:
            raise Broken

    async with no_task_is_left(), streaming_client(streaming(generate)) as client:
        response = await client.send(client.build_request("GET", "/"), stream=True)
        with pytest.raises(Broken):
            await response.aclose()


async def test_on_demand_exceptions_look_as_they_do_to_a_real_client() -> None:
    async def before(scope: Any, receive: Any, send: Any) -> None:
        raise Broken

    async def within(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise Broken

    def client_of(app: Any) -> httpx.AsyncClient:
        transport = StreamingTransport(app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://testserver")

    async with client_of(before) as client:
        assert (await client.get("/")).status_code == 500
    async with client_of(within) as client:
        with pytest.raises(httpx.RemoteProtocolError, match="in the middle of the body"):
            await client.get("/")


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "ended without a response"),
        ([{"type": "http.response.body", "body": b"x"}], "before it started a response"),
        ([{"type": "http.response.start", "status": 200}] * 2, "started its response twice"),
        (
            [{"type": "http.response.start", "status": 200}]
            + [{"type": "http.response.body", "body": b"x"}] * 2,
            "after the end of its response",
        ),
    ],
)
async def test_an_application_that_breaks_the_protocol_is_an_error(
    messages: list[dict[str, Any]], error: str
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    async with httpx.AsyncClient(transport=StreamingTransport(app)) as client:
        with pytest.raises(ApplicationFailed, match=error):
            await client.get("http://testserver/")


# -- the lifespan -------------------------------------------------------------------------------


async def test_the_lifespan_is_open_around_the_client() -> None:
    log = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        log.append("open")
        yield
        log.append("closed")

    async def generate() -> AsyncIterator[str]:
        try:
            yield "x"
            await asyncio.Event().wait()
        finally:
            log.append("stream closed")

    app = streaming(generate)
    app.router.lifespan_context = lifespan
    async with streaming_client(app) as client:
        assert log == ["open"]
        await client.send(client.build_request("GET", "/"), stream=True)
    assert log == ["open", "stream closed", "closed"]


async def test_a_startup_that_fails_raises_its_own_error() -> None:
    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        raise Broken("no database")
        yield

    async with no_task_is_left():
        with pytest.raises(Broken, match="no database"):
            async with streaming_client(Starlette(lifespan=lifespan)):
                pass


async def test_a_shutdown_that_fails_raises_its_own_error() -> None:
    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        raise Broken

    async with no_task_is_left():
        with pytest.raises(Broken):
            async with streaming_client(Starlette(lifespan=lifespan)):
                pass


async def test_a_startup_that_only_reports_its_failure_is_an_error_with_its_message() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    with pytest.raises(ApplicationFailed, match="could not start: no database"):
        async with streaming_client(app):
            pass


async def test_a_startup_that_hangs_is_an_error_and_leaves_no_task() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async with no_task_is_left():
        with pytest.raises(ApplicationFailed, match=r"did not start in 0\.01 s"):
            async with streaming_client(app, lifespan_timeout=0.01):
                pass


async def test_an_application_without_a_lifespan_works() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await PlainTextResponse("ok")(scope, receive, send)

    async with no_task_is_left(), streaming_client(app) as client:
        assert (await client.get("/")).text == "ok"


# -- the reader: the examples of the specification ----------------------------------------------
# https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation


def decoded(stream: bytes) -> list[Event | Mark | Comment]:
    return EventDecoder().feed(stream)


def test_example_stock_ticker() -> None:
    assert decoded(b"data: YHOO\ndata: +2\ndata: 10\n\n") == [Event("YHOO\n+2\n10")]


def test_example_four_blocks() -> None:
    decoder = EventDecoder()
    found = decoder.feed(
        b": test stream\n"
        b"\n"
        b"data: first event\n"
        b"id: 1\n"
        b"\n"
        b"data:second event\n"
        b"id\n"
        b"\n"
        b"data:  third event\n"
    )
    # The third event is never fired: the blank line at its end is missing.
    assert found == [
        Comment("test stream"),
        Event("first event", id="1"),
        Event("second event", id=""),
    ]
    assert decoder.last_event_id == ""


def test_example_two_empty_events_and_one_discarded() -> None:
    assert decoded(b"data\n\ndata\ndata\n\ndata:") == [Event(""), Event("\n")]


def test_example_a_space_after_the_colon_is_ignored() -> None:
    assert decoded(b"data:test\n\ndata: test\n\n") == [Event("test"), Event("test")]


def test_example_named_events() -> None:
    assert decoded(
        b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\nevent: add\ndata: 113411\n\n"
    ) == [Event("73857293", "add"), Event("2153", "remove"), Event("113411", "add")]


def test_only_the_first_space_is_ignored() -> None:
    assert decoded(b"data:  x \n\n") == [Event(" x ")]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_a_line_ends_with_lf_with_cr_and_with_both(end: bytes) -> None:
    stream = end.join([b"data: a", b"data: b", b"", b"data: c", b"", b""])
    assert decoded(stream) == [Event("a\nb"), Event("c")]


def test_a_cr_at_the_end_of_a_chunk_ends_its_line_at_once() -> None:
    decoder = EventDecoder()
    assert decoder.feed(b"data: a\r\r") == [Event("a")]
    assert decoder.feed(b"\ndata: b\n\n") == [Event("b")]


def test_other_separators_of_unicode_end_no_line() -> None:
    text = "a\u0085b\u2028c\u2029d\x0be\x0cf\x1cg"
    assert decoded(f"data: {text}\n\n".encode()) == [Event(text)]


def test_one_byte_order_mark_at_the_start_is_ignored() -> None:
    bom = b"\xef\xbb\xbf"
    assert decoded(bom + b"data: a\n\n") == [Event("a")]
    assert decoded(b"data: a\n\n" + bom + b"data: b\n\n") == [Event("a"), Mark("")]
    assert decoded(bom + bom + b"data: a\n\n") == [Mark("")]


def test_bytes_that_are_no_utf_8_become_replacement_characters() -> None:
    assert decoded(b"data: \xff\xc3\n\n") == [Event("\ufffd\ufffd")]


def test_an_id_persists_until_another_one() -> None:
    assert decoded(b"id: 1\ndata: a\n\ndata: b\n\nid: 2\ndata: c\n\n") == [
        Event("a", id="1"),
        Event("b", id="1"),
        Event("c", id="2"),
    ]


def test_an_id_without_data_counts_and_fires_nothing() -> None:
    decoder = EventDecoder()
    assert decoder.feed(b"id: 7\n\n") == [Mark("7")]
    assert decoder.last_event_id == "7"
    assert decoder.feed(b"data: a\n\n") == [Event("a", id="7")]


def test_an_id_counts_only_once_its_block_is_complete() -> None:
    decoder = EventDecoder()
    decoder.feed(b"id: 1\ndata: a\n\nid: 2\ndata: b\n")
    assert decoder.last_event_id == "1"


def test_an_id_with_nul_is_ignored() -> None:
    assert decoded(b"id: 1\n\nid: 2\x00\ndata: a\n\n") == [Mark("1"), Event("a", id="1")]


def test_an_event_name_does_not_outlive_its_block() -> None:
    assert decoded(b"event: x\n\ndata: a\n\n") == [Mark(""), Event("a")]


def test_an_empty_event_name_is_message() -> None:
    assert decoded(b"event\ndata: a\n\n") == [Event("a", "message")]


def test_retry_is_digits_only() -> None:
    decoder = EventDecoder()
    assert decoder.feed(b"retry: 3000\n\n") == [Mark("", 3000)]
    for value in (b"x", b"-1", b"1.5", b"", b"\xd9\xa3", b"9" * 5000):
        assert decoder.feed(b"retry: " + value + b"\ndata: a\n\n") == [Event("a")]
    assert decoder.retry == 3000


def test_unknown_fields_and_other_case_are_ignored() -> None:
    assert decoded(b"Data: a\nfoo: b\n data: c\ndata: d\n\n") == [Event("d")]


def test_comments_are_comments_wherever_they_are() -> None:
    assert decoded(b":\n: a\ndata: x\n:b\n\n") == [
        Comment(""),
        Comment("a"),
        Comment("b"),
        Event("x"),
    ]


LINES = st.sampled_from(
    [b"data: a", b"data", b"data:\xc3\xa9", b"id: 1", b"id", b"event: e", b": c", b"", b"", b"x"]
)


@given(
    st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r", b"\r\n"])), max_size=12),
    st.lists(st.integers(0, 80), max_size=12),
)
def test_where_a_stream_is_cut_into_chunks_makes_no_difference(
    lines: list[tuple[bytes, bytes]], cuts: list[int]
) -> None:
    stream = b"".join(line + end for line, end in lines)
    whole, pieces = EventDecoder(), EventDecoder()
    expected = whole.feed(stream)
    places = [0, *sorted(cuts), len(stream)]
    found = [
        item
        for start, end in zip(places, places[1:], strict=False)
        for item in pieces.feed(stream[start:end])
    ]
    assert found == expected
    assert pieces.last_event_id == whole.last_event_id


# -- the reader: of responses -------------------------------------------------------------------


async def test_events_are_read_from_a_response_as_they_come() -> None:
    turn = asyncio.Semaphore(0)

    async def generate() -> AsyncIterator[str]:
        yield "retry: 500\nid: 0\n\n"
        for number in (1, 2):
            await turn.acquire()
            yield f"event: tick\nid: {number}\ndata: {number}\n\n"
        await turn.acquire()
        yield "id: 3\n\n"

    async with (
        streaming_client(streaming(generate)) as client,
        client.stream("GET", "/") as response,
    ):
        stream = events(response)
        for number in (1, 2):
            turn.release()
            assert await anext(stream) == Event(str(number), "tick", str(number))
        turn.release()
        assert [event async for event in stream] == []
        assert stream.last_event_id == "3"
        assert stream.retry == 500


async def test_everything_yields_comments_and_marks_too() -> None:
    async def generate() -> AsyncIterator[str]:
        yield ":\nid: 1\n\ndata: a\n\n: bye\n"

    async with (
        streaming_client(streaming(generate)) as client,
        client.stream("GET", "/") as response,
    ):
        found = [item async for item in events(response).everything()]
    assert found == [Comment(""), Mark("1"), Event("a", id="1"), Comment("bye")]


async def test_a_wait_for_an_event_can_be_given_up_a_hundred_times() -> None:
    go_on = asyncio.Event()

    async def generate() -> AsyncIterator[str]:
        await go_on.wait()
        yield "data: a\n\n"
        yield "data: b\n\n"

    async with (
        no_task_is_left(),
        streaming_client(streaming(generate)) as client,
        client.stream("GET", "/") as response,
    ):
        stream = events(response)
        for _ in range(100):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), 0.0001)
        go_on.set()
        assert [event.data async for event in stream] == ["a", "b"]


async def test_a_given_up_wait_leaves_nothing_when_the_response_is_closed() -> None:
    async def generate() -> AsyncIterator[str]:
        yield ":\n"
        await asyncio.Event().wait()

    async with no_task_is_left(), streaming_client(streaming(generate)) as client:
        async with client.stream("GET", "/") as response:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(events(response)), 0.001)
        await asyncio.sleep(0)


async def test_an_exception_of_the_application_comes_out_of_the_events() -> None:
    async def generate() -> AsyncIterator[str]:
        yield "data: a\n\n"
        raise Broken

    async with streaming_client(streaming(generate)) as client:
        response = await client.send(client.build_request("GET", "/"), stream=True)
        stream = events(response)
        assert (await anext(stream)).data == "a"
        with pytest.raises(Broken):
            await anext(stream)


# -- the fixture --------------------------------------------------------------------------------

# The application of the tests below; a database is not needed to stream.
SHOP = """
    import asyncio
    import pytest
    from data_bridge.api import App, EventSourceResponse, ServerSentEvent

    @pytest.fixture
    def app():
        app = App()

        @app.get("/events")
        async def events():
            async def generate():
                number = 0
                while True:
                    yield ServerSentEvent(data=f"Event {number}")
                    number += 1
                    await asyncio.sleep(0.01)
            return EventSourceResponse(generate())

        return app
"""

# Word for word the integration test of the documentation.
TEST = """
    import httpx
    import pytest

    @pytest.mark.asyncio
    async def test_sse_endpoint(test_client):
        async with test_client.stream('GET', '/events') as response:
            assert response.status_code == 200
            assert response.headers['content-type'] == 'text/event-stream'

            # Read first event
            lines = []
            async for line in response.aiter_lines():
                lines.append(line)
                if line == '':  # Empty line marks end of event
                    break

            assert lines[0].startswith('data:')
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run pytest on the tests given, in a process and a directory of its own."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(*plugins: str, mode: str = "strict", **files: str) -> pytest.RunResult:
        pytester.makeini(
            f"[pytest]\nasyncio_mode = {mode}\nasyncio_default_fixture_loop_scope = function\n"
            if "pytest_asyncio.plugin" in plugins
            else "[pytest]\n"
        )
        files = {"conftest": SHOP, **files}
        pytester.makepyfile(**{name: textwrap.dedent(text) for name, text in files.items()})
        options = [f"-p{plugin}" for plugin in (*plugins, "data_bridge.testing.plugin")]
        return pytester.run(sys.executable, "-m", "pytest", "-Werror", *options)

    return run


@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_the_fixture_streams_in_a_test_of_pytest_asyncio(run: Any, mode: str) -> None:
    run("pytest_asyncio.plugin", mode=mode, test_it=TEST).assert_outcomes(passed=1)


def test_the_fixture_streams_in_a_test_of_anyio(run: Any) -> None:
    test = TEST.replace("mark.asyncio", "mark.anyio")
    conftest = (
        SHOP
        + """
    @pytest.fixture
    def anyio_backend():
        return "asyncio"
    """
    )
    run("anyio.pytest_plugin", conftest=conftest, test_it=test).assert_outcomes(passed=1)
    # and where both are installed
    both = run("anyio.pytest_plugin", "pytest_asyncio.plugin", conftest=conftest, test_it=test)
    both.assert_outcomes(passed=1)


@pytest.mark.parametrize("scope", ["function", "class", "module", "package", "session"])
def test_the_fixture_is_in_the_event_loop_of_the_test(run: Any, scope: str) -> None:
    test = f"""
    import asyncio
    import pytest
    from data_bridge.api import App

    @pytest.fixture
    def app():
        app = App()

        @app.get("/loop")
        async def loop() -> int:
            return id(asyncio.get_running_loop())

        return app

    @pytest.mark.asyncio(loop_scope="{scope}")
    class TestLoop:
        async def test_first(self, test_client):
            assert (await test_client.get("/loop")).json() == id(asyncio.get_running_loop())

        async def test_second(self, test_client):
            assert (await test_client.get("/loop")).json() == id(asyncio.get_running_loop())
    """
    run("pytest_asyncio.plugin", test_it=test).assert_outcomes(passed=2)


def test_the_fixture_opens_and_closes_the_lifespan(run: Any) -> None:
    test = """
    import contextlib
    import pytest
    from data_bridge.api import App

    log = []

    @pytest.fixture
    def app():
        @contextlib.asynccontextmanager
        async def lifespan(app):
            log.append("open")
            yield
            log.append("closed")
        yield App(lifespan=lifespan)
        assert log == ["open", "closed"]

    @pytest.mark.asyncio
    async def test_it(test_client):
        assert log == ["open"]
        assert str(test_client.base_url) == "http://testserver"
    """
    run("pytest_asyncio.plugin", test_it=test).assert_outcomes(passed=1)


def test_the_fixture_takes_an_application_with_parameters(run: Any) -> None:
    test = """
    import pytest
    from data_bridge.api import App

    @pytest.fixture(params=[1, 2])
    def app(request):
        app = App()
        app.get("/")(lambda: request.param)
        return app

    @pytest.mark.asyncio
    async def test_it(test_client, app):
        assert (await test_client.get("/")).json() in (1, 2)
    """
    run("pytest_asyncio.plugin", test_it=test).assert_outcomes(passed=2)


def test_without_an_event_loop_the_fixture_says_what_to_install(run: Any) -> None:
    result = run(test_it="def test_it(test_client): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*install pytest-asyncio*"])


def test_the_plugin_imports_neither_httpx_nor_starlette_before_they_are_needed(run: Any) -> None:
    test = """
    import sys

    def test_it():
        assert "data_bridge.testing.plugin" in sys.modules
        assert "httpx" not in sys.modules
        assert "data_bridge.testing.client" not in sys.modules
    """
    run(conftest="", test_it=test).assert_outcomes(passed=1)


def test_without_httpx_the_error_names_the_extra(run: Any) -> None:
    test = """
    import sys
    import pytest

    def test_it(monkeypatch):
        monkeypatch.setitem(sys.modules, "httpx", None)
        import data_bridge.testing
        with pytest.raises(ImportError, match=r"pip install 'data-bridge\\[testing\\]'"):
            data_bridge.testing.streaming_client
    """
    run(conftest="", test_it=test).assert_outcomes(passed=1)
