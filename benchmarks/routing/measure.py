"""One measurement: subscribers, a writer in a process of its own, and processor time."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from pymongo import AsyncMongoClient, MongoClient, UpdateOne

from data_bridge import Document, Limits, LiveStream, connect
from data_bridge.api.live import live_encoder

from ..orders import DATABASE, WRITE_CONCERN, order

BATCH = 100  # no more than there are subscribers, so that each has one change at a time
_FIRST = 10_000_000  # no document has it yet: what changes nothing is no change
_LIMIT = 600.0  # seconds


class Order(Document):
    status: str
    total: float
    customer: str
    email: str
    address: str
    items: list[str]
    note: str
    seq: int
    tenant: int

    class Settings:
        collection = "orders"


# What each follows, and how many of the subscribers a change concerns.
WAYS: dict[str, Callable[[int, Any], dict[str, Any]]] = {
    "its own `_id`": lambda number, id: {"_id": id},
    "its own tenant": lambda number, id: {"tenant": number},
    "a filter without an equality": lambda number, id: {
        "tenant": {"$gt": number - 1, "$lt": number + 1}
    },
}
UNROUTED = "a filter without an equality"


def write(uri: str, ids: list[Any], changes: int, seed: int) -> None:
    """Change one document after the other, whoever looks."""
    with MongoClient[dict[str, Any]](uri, w=WRITE_CONCERN) as client:
        orders = client[DATABASE]["orders"]
        for start in range(0, changes, BATCH):
            numbers = range(start, min(start + BATCH, changes))
            orders.bulk_write(
                [
                    # Spread over all of them, in another order each time.
                    UpdateOne(
                        {"_id": ids[(n * 7919 + seed) % len(ids)]}, {"$set": {"seq": _FIRST + n}}
                    )
                    for n in numbers
                ],
                ordered=True,
            )


class Subscriber:
    """A live query as a connection reads it: bytes of frames, joined."""

    def __init__(self, stream: LiveStream[Any]) -> None:
        self.stream = stream
        self.received = 0

    async def open(self) -> None:
        await self.stream.open()
        self.encoder = live_encoder(self.stream)
        while self.stream.pending:
            self.stream.take(self.encoder)

    async def run(self, told: Callable[[int], None]) -> None:
        while True:
            await self.stream.wait()
            count = self.stream.take(self.encoder).count(b"event: ")
            self.received += count
            told(count)


async def measure(uri: str, way: str, subscribers: int, changes: int, seed: int) -> dict[str, Any]:
    """The processor time of a number of changes, with so many subscribers on one cursor."""
    async with AsyncMongoClient[dict[str, Any]](uri) as client:
        orders = client[DATABASE]["orders"]
        await orders.delete_many({})
        await orders.create_index("tenant")  # by which the snapshots are read
        documents = [{**order(n), "tenant": n} for n in range(subscribers)]
        await orders.insert_many(documents)
        ids = [document["_id"] for document in documents]
        async with connect(client[DATABASE], limits=Limits(log_entries=100_000)) as bridge:
            gc.collect()
            before = _memory()
            readers = [Subscriber(bridge.live(Order, WAYS[way](n, id))) for n, id in enumerate(ids)]
            for start in range(0, subscribers, 100):
                await asyncio.gather(*(r.open() for r in readers[start : start + 100]))
            assert len(bridge._feeds) == 1
            done, delivered = asyncio.Event(), 0

            def told(count: int) -> None:
                nonlocal delivered
                delivered += count
                if delivered >= changes:
                    done.set()

            tasks = [asyncio.create_task(reader.run(told)) for reader in readers]
            await asyncio.sleep(2 * 1.0)  # a snapshot is forgotten, and nothing else goes on
            gc.collect()
            memory = _memory() - before
            idle = await _idle()
            context = multiprocessing.get_context("spawn")
            writer = context.Process(target=write, args=(uri, ids, changes, seed), daemon=True)
            writer.start()
            cpu, began = time.process_time(), time.perf_counter()
            collector = Collector()
            async with asyncio.timeout(_LIMIT):
                await done.wait()
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            collector.stop()
            await asyncio.to_thread(writer.join)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert delivered == changes, f"{delivered} events of {changes} changes"
            for reader in readers:
                await reader.stream.aclose()
    return {
        "cpu": cpu - idle * seconds,
        "collector": collector.cpu,
        "idle": idle,
        "seconds": seconds,
        "memory": memory / subscribers,
    }


class Collector:
    """The processor time of Python's garbage collector, which looks at everything there is."""

    def __init__(self) -> None:
        self.cpu = self._began = 0.0
        gc.callbacks.append(self._told)

    def _told(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.process_time()
        else:
            self.cpu += time.process_time() - self._began

    def stop(self) -> None:
        gc.callbacks.remove(self._told)


async def _idle(seconds: float = 2.0) -> float:
    """Processor seconds per second with nothing to do: getMores, and looking after the queries."""
    cpu = time.process_time()
    await asyncio.sleep(seconds)
    return (time.process_time() - cpu) / seconds


def _memory() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _once(uri: str, way: str, subscribers: int, changes: int, seed: int, pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe.send(asyncio.run(measure(uri, way, subscribers, changes, seed)))


def once(*arguments: Any) -> dict[str, Any]:
    """``measure()`` in a process of its own, whose memory nobody has touched before."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_once, args=(*arguments, there))
    process.start()
    there.close()
    try:
        found: dict[str, Any] = here.recv()
    except EOFError:
        raise SystemExit(f"measuring {arguments[1:]} failed") from None
    finally:
        process.join()
    return found
