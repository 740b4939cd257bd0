"""StandIn: what is run in the name of a task that waits."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
import uvloop
from bson import Timestamp

from data_bridge import Document, ResumeToken, log
from data_bridge.api import EventSourceResponse
from data_bridge.errors import BridgeClosed
from data_bridge.log import Limits, Log
from data_bridge.source import Entry
from data_bridge.stand_in import StandIn
from data_bridge.stream import ChangeStream, Wishes

whose: ContextVar[str] = ContextVar("whose", default="nobody's")


class Waiter:
    """A task that waits with a stand-in, which runs what the test wants."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.task = asyncio.create_task(self._wait())
        self.stand_in: StandIn | None = None

    async def _wait(self) -> None:
        whose.set("the task's")
        self.stand_in = StandIn(self.task, self._step)
        await self.stand_in

    def _step(self) -> None:
        assert self.stand_in is not None
        self.stand_in.run(self.next())

    async def act(self, coroutine: Callable[[], Any]) -> None:
        """Have it run in the next turn of the loop."""
        while self.stand_in is None:
            await asyncio.sleep(0)
        self.next = coroutine
        self.stand_in.call()
        await asyncio.sleep(0)
        await asyncio.sleep(0)


@pytest.fixture
async def waiter() -> Any:
    waiter = Waiter()
    yield waiter
    waiter.task.cancel()
    await asyncio.wait({waiter.task})


async def test_it_is_the_tasks_own_in_every_respect_and_the_task_sleeps_on(waiter: Waiter) -> None:
    async def step() -> None:
        waiter.found.append((asyncio.current_task(), whose.get()))
        whose.set("changed")

    await waiter.act(step)
    await waiter.act(step)
    assert waiter.found == [(waiter.task, "the task's"), (waiter.task, "changed")]
    assert not waiter.task.done()
    assert whose.get() == "nobody's"


async def test_what_has_to_wait_is_finished_by_the_task_in_the_same_context(
    waiter: Waiter,
) -> None:
    goes_on = asyncio.Event()

    async def step() -> None:
        token = whose.set("for a while")
        for _ in range(3):
            await asyncio.sleep(0)
        await goes_on.wait()
        waiter.found.append((asyncio.current_task(), whose.get()))
        whose.reset(token)  # fails in any other context

    await waiter.act(step)
    assert not waiter.found
    goes_on.set()
    await waiter.task
    assert waiter.found == [(waiter.task, "for a while")]


@pytest.mark.parametrize("early", [True, False])
async def test_a_cancellation_is_for_what_the_task_has_to_finish(
    waiter: Waiter, early: bool
) -> None:
    async def step() -> None:
        try:
            if early:  # while the task is only about to wake up
                asyncio.get_running_loop().call_soon(waiter.task.cancel)
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            waiter.found.append("cancelled")
            raise

    await waiter.act(step)
    waiter.task.cancel()
    await asyncio.wait({waiter.task})
    assert waiter.found == ["cancelled"]
    assert waiter.task.cancelled()


@pytest.mark.parametrize("waits", [True, False])
async def test_what_it_raises_is_raised_where_the_task_waits(waiter: Waiter, waits: bool) -> None:
    async def step() -> None:
        if waits:
            await asyncio.sleep(0)
        raise LookupError("what it was looking for")

    await waiter.act(step)
    with pytest.raises(LookupError, match="what it was looking for"):
        await waiter.task


async def test_deadlines_of_asyncio_and_anyio_hold_inside(waiter: Waiter) -> None:
    async def step() -> None:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            waiter.found.append("asyncio")
        with anyio.move_on_after(0.01):
            await anyio.sleep_forever()
        waiter.found.append("anyio")

    await waiter.act(step)
    await waiter.task
    assert waiter.found == ["asyncio", "anyio"]
    assert waiter.task.cancelling() == 0


async def test_for_a_task_that_is_about_to_wake_up_nothing_is_done(waiter: Waiter) -> None:
    async def step() -> None:
        waiter.found.append("done")

    await waiter.act(step)
    assert waiter.stand_in is not None
    waiter.task.cancel()
    waiter.stand_in.act()
    await asyncio.wait({waiter.task})
    waiter.stand_in.act()
    assert waiter.found == ["done"]


async def test_several_calls_in_one_turn_of_the_loop_are_one(waiter: Waiter) -> None:
    async def step() -> None:
        waiter.found.append("done")

    await waiter.act(step)
    assert waiter.stand_in is not None
    waiter.stand_in.call()
    waiter.stand_in.call()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert waiter.found == ["done"] * 2


# -- of the connections of a log ----------------------------------------------------------------


class Thing(Document):
    id: int

    class Settings:
        collection = "stood_for"


class OnlyLog:
    """A feed that is nothing but its log."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.log = Log(at(0), limits or Limits())
        self.number = 0

    def append(self, number: int) -> None:
        """Append so many changes at once."""
        entries = []
        for _ in range(number):
            self.number += 1
            raw = {
                "_id": at(self.number).document,
                "operationType": "insert",
                "fullDocument": {"_id": self.number},
                "documentKey": {"_id": self.number},
                "ns": {"db": "db", "coll": "stood_for"},
            }
            entries.append(Entry(raw, 100))
        self.log.append(entries, entries[-1].position)

    def join(self) -> None: ...
    def leave(self) -> None: ...

    async def attach(self, position: Any, *, running: bool = False) -> tuple[Log, int]:
        return self.log, self.log.end


def at(number: int) -> ResumeToken:
    return ResumeToken.at(Timestamp(1, number + 1))


class Client:
    """A connection to one: it notes what it is sent, and how."""

    def __init__(
        self, feed: Any, *, slow: Callable[[], bool] = lambda: False, event: Any = "e"
    ) -> None:
        self.body = b""
        self.slow = slow
        self.gone = asyncio.Event()
        self.sending = False
        self.seen: set[tuple[Any, str]] = set()
        stream: Any = ChangeStream(lambda: feed, Thing, None, Wishes())
        response = EventSourceResponse(
            stream, event=event, data=lambda change: change.document_id, keep_alive=None
        )
        scope = {"type": "http", "method": "GET", "headers": [], "query_string": b"", "path": "/"}
        self.task = asyncio.create_task(self._run(response, scope))

    async def _run(self, response: Any, scope: Any) -> None:
        whose.set(f"client {id(self)}")
        await response(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        assert not self.sending, "the one before is not finished"
        self.sending = True
        self.seen.add((asyncio.current_task(), whose.get()))
        while self.slow():
            await asyncio.sleep(0)
        self.seen.add((asyncio.current_task(), whose.get()))
        self.body += message.get("body", b"")
        self.sending = False

    @property
    def found(self) -> list[int]:
        lines = self.body.decode().splitlines()
        return [int(line[6:]) for line in lines if line.startswith("data: ")]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


async def waiting(feed: OnlyLog, number: int, **options: Any) -> list[Client]:
    """So many clients that wait for news."""
    clients = [Client(feed, **options) for _ in range(number)]
    await until(lambda: len(feed.log._stand_ins) == number)
    return clients


async def leave(clients: list[Client]) -> None:
    for client in clients:
        client.gone.set()
    await asyncio.gather(*(client.task for client in clients))


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("slowly", [0, 0.3, 0.9])
@pytest.mark.parametrize("round", [0.0, 1.0])
def test_everybody_gets_everything_once_and_in_order_however_slowly_they_take_it(
    slowly: float, round: float, loop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_ROUND", round)
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(everybody_gets_everything(slowly))


async def everybody_gets_everything(slowly: float) -> None:
    dice = random.Random(1)
    feed = OnlyLog()
    clients = await waiting(feed, 100, slow=lambda: dice.random() < slowly)
    for _ in range(50):
        feed.append(dice.randint(1, 5))
        for _ in range(dice.randint(0, 5)):
            await asyncio.sleep(0)
    everything = list(range(1, feed.number + 1))
    await until(lambda: all(len(c.found) >= feed.number for c in clients))
    for client in clients:
        assert client.found == everything
        assert client.seen == {(client.task, f"client {id(client)}")}
    await leave(clients)
    assert not feed.log._stand_ins


async def test_who_is_slow_holds_up_nobody() -> None:
    feed = OnlyLog()
    stuck = [False]
    slow, fast = Client(feed, slow=lambda: stuck[0]), Client(feed)
    await until(lambda: len(feed.log._stand_ins) == 2)
    stuck[0] = True
    for number in range(1, 101):
        feed.append(1)
        await until(lambda n=number: len(fast.found) == n)
    assert slow.found == []
    stuck[0] = False
    await until(lambda: len(slow.found) == 100)
    assert slow.found == fast.found == list(range(1, 101))
    await leave([slow, fast])


async def test_who_leaves_while_others_are_served_is_not_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log, "_ROUND", 0.0)
    feed = OnlyLog()
    clients = await waiting(feed, 100)
    feed.append(1)
    await asyncio.sleep(0)
    for client in clients[:10]:  # they come last
        assert client.found == []
        client.task.cancel()
    await asyncio.wait([c.task for c in clients[:10]])
    await until(lambda: not feed.log._due)
    assert [len(c.found) for c in clients] == [0] * 10 + [1] * 90
    await leave(clients[10:])


async def test_the_loop_gets_its_turns_while_many_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log, "_ROUND", 0.0)
    feed = OnlyLog()
    clients = await waiting(feed, 100)
    feed.append(1)
    served = []
    while feed.log._due:
        await asyncio.sleep(0)
        served.append(sum(len(c.found) for c in clients))
    assert served == [4, 20, 36, 52, 68, 84, 100]
    await leave(clients)


async def test_who_falls_out_of_the_log_in_a_round_wakes_up_to_catch_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log, "_ROUND", 0.0)
    feed = OnlyLog(Limits(log_entries=5))
    clients = await waiting(feed, 40)
    feed.append(1)
    await asyncio.sleep(0)
    feed.append(5)  # the first is dropped before the last clients had it
    attached = []

    async def attach(position: ResumeToken, *, running: bool) -> tuple[Log, int]:
        attached.append(position)
        return feed.log, feed.log.base

    monkeypatch.setattr(feed, "attach", attach)
    await until(lambda: all(c.found[-1:] == [6] for c in clients))
    assert set(attached) == {at(0)}  # where those are that had nothing yet; others went on
    await leave(clients)


async def test_what_goes_wrong_for_one_is_not_the_end_of_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    feed = OnlyLog()
    clients = await waiting(feed, 10)

    def broken() -> None:
        raise AssertionError("a bug")

    list(feed.log._stand_ins)[5]._step = broken
    for number in range(1, 4):
        feed.append(1)
        await until(lambda n=number: sum(len(c.found) for c in clients) == 9 * n)
    assert caplog.text.count("AssertionError: a bug") == 3
    await leave(clients)


async def test_the_end_of_a_feed_wakes_everybody_and_what_is_pending_comes_first() -> None:
    feed = OnlyLog()
    clients = await waiting(feed, 40)
    feed.append(3)
    feed.log.end_with(BridgeClosed("closed"))
    await asyncio.gather(*(c.task for c in clients))
    for client in clients:
        assert client.found == [1, 2, 3]
        assert client.body.endswith(b"retry: 1000\n\n")


async def test_an_error_of_the_applications_own_function_ends_the_stream_and_no_other() -> None:
    def fails(change: Any) -> str:
        raise ZeroDivisionError("no name for it")

    feed = OnlyLog()
    failing, other = Client(feed, event=fails), Client(feed)
    await until(lambda: len(feed.log._stand_ins) == 2)
    feed.append(1)
    with pytest.raises(ZeroDivisionError, match="no name for it"):
        await failing.task
    await until(lambda: other.found == [1])
    await leave([other])
