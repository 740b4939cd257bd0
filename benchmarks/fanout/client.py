"""The load client: many EventSource connections in one thread, on epoll and raw sockets.

It shares no code with any contender. Of each chunk it reads the numbers of the changes in it and
the time; whether they are the ones that had to come next is one comparison of bytes. What it costs
itself is measured and reported, because it must not be what is measured.

Talks with its parent in lines of JSON on stdin and stdout.
"""

from __future__ import annotations

import json
import resource
import select
import socket
import sys
import time
from array import array
from bisect import bisect_left
from itertools import accumulate
from typing import Any

from .marks import DIGITS, FIRST, PROBE

CHUNK = 64 * 1024  # below malloc's threshold for mmap, which would cost more than the copying
_PROBE = b"%d" % PROBE
_AT_ONCE = 64


class Subscriber:
    __slots__ = ("broken", "fd", "got", "headers", "live", "next", "sock", "tail")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.tail = b""
        self.headers = False
        self.live = False  # has seen a probe
        self.next = 0  # index in the row of the change that has to come next
        self.got = 0
        self.broken = ""


class Client:
    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.epoll.register(0, select.EPOLLIN)
        self.subscribers: dict[int, Subscriber] = {}
        self.stdin = b""
        self.total = 0
        self.expected = b""
        self.mark = b""
        self.first = 0
        self.deadline = float("inf")
        self.started = 0.0
        self.incomplete = 0
        self.finished = 0.0
        self.running = False
        self.at = array("d")
        self.low = array("l")
        self.high = array("l")
        self.cpu = 0.0

    def main(self) -> None:
        while True:
            wait = max(0.0, self.deadline - time.monotonic()) if self.running else -1
            for fd, _ in self.epoll.poll(min(wait, 3600) if wait >= 0 else None):
                if fd:
                    self.read(self.subscribers[fd])
                elif not self.command():
                    return
            if self.running and (not self.incomplete or time.monotonic() >= self.deadline):
                self.end()

    def command(self) -> bool:
        data = sys.stdin.buffer.raw.read(65536)  # type: ignore[union-attr]
        if not data:
            return False
        *lines, self.stdin = (self.stdin + data).split(b"\n")
        for line in lines:
            call = json.loads(line)
            reply = getattr(self, "do_" + call.pop("do"))(**call)
            if reply is not None:
                self.say(reply)
        return True

    @staticmethod
    def say(reply: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()

    # -- connecting --

    def do_connect(self, port: int, number: int, limit: float, mark: str) -> dict[str, Any]:
        """Open connections, some at a time, and wait for the first bytes of each."""
        self.mark = mark.encode()
        began = time.monotonic()
        request = f"GET /events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        request += "Accept: text/event-stream\r\nCache-Control: no-cache\r\n\r\n"
        waiting: set[int] = set()
        opened = 0
        while (opened < number or waiting) and time.monotonic() - began < limit:
            while opened < number and len(waiting) < _AT_ONCE:
                sock = socket.create_connection(("127.0.0.1", port), timeout=10)
                sock.sendall(request.encode())
                sock.setblocking(False)
                subscriber = Subscriber(sock)
                self.subscribers[subscriber.fd] = subscriber
                self.epoll.register(subscriber.fd, select.EPOLLIN)
                waiting.add(subscriber.fd)
                opened += 1
            for fd, _ in self.epoll.poll(0.1):
                if fd:
                    self.read(self.subscribers[fd])
                    waiting.discard(fd)
        refused = sum(1 for s in self.subscribers.values() if not s.headers)
        return {"connected": opened - refused, "seconds": time.monotonic() - began}

    def do_live(self) -> dict[str, Any]:
        """How many have seen a probe."""
        return {"live": sum(s.live for s in self.subscribers.values())}

    def do_close(self) -> dict[str, Any]:
        for subscriber in self.subscribers.values():
            subscriber.sock.close()
        self.subscribers.clear()
        return {}

    # -- a row --

    def do_row(self, first: int, number: int, limit: float) -> dict[str, Any]:
        """Expect ``number`` changes from ``first`` on, for at most ``limit`` seconds."""
        self.expected = b"".join([b"%d" % n for n in range(first, first + number)])
        self.first, self.total = first, number
        self.incomplete = len(self.subscribers)
        for subscriber in self.subscribers.values():
            subscriber.next = subscriber.got = 0
            subscriber.broken = subscriber.broken if subscriber.broken == "closed" else ""
        self.at, self.low, self.high = array("d"), array("l"), array("l")
        self.started = time.monotonic()
        self.deadline = self.started + limit
        self.running = True
        self.cpu = time.process_time()
        return {"now": self.started}

    def end(self) -> None:
        self.running = False
        self.finished = time.monotonic()
        self.say({"done": self.finished, "cpu": time.process_time() - self.cpu})

    def do_figures(self, acknowledged: str) -> dict[str, Any]:
        """The figures of the row that has ended, given when each change was acknowledged.

        ``acknowledged`` names a file of doubles, seconds of the monotonic clock.
        """
        times = array("d")
        with open(acknowledged, "rb") as file:
            times.frombytes(file.read())
        written = len(times)
        # Tenths of a millisecond, counted: millions of deliveries need no list of their own.
        counts: dict[int, int] = {}
        for at, low, high in zip(self.at, self.low, self.high, strict=True):
            for acknowledgement in times[low : min(high, written)]:
                tick = int((at - acknowledgement) * 10_000)
                counts[tick] = counts.get(tick, 0) + 1
        deliveries = sum(s.got for s in self.subscribers.values())
        ticks = sorted(counts)
        sums = list(accumulate(counts[t] for t in ticks))

        def percentile(p: float) -> float | None:
            if not sums:
                return None
            return ticks[min(len(ticks) - 1, bisect_left(sums, p * sums[-1]))] / 10

        everybody = self.subscribers.values()
        return {
            "deliveries": deliveries,
            "complete": sum(s.got == self.total and not s.broken for s in everybody),
            "broken": sorted({s.broken for s in everybody if s.broken}),
            "last": max(self.at, default=self.started),
            "chunks": len(self.at),
            "p50": percentile(0.50),
            "p99": percentile(0.99),
            "max": ticks[-1] / 10 if ticks else None,
        }

    def read(self, subscriber: Subscriber) -> None:
        try:
            data = subscriber.sock.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.broke(subscriber, "closed")
            self.epoll.unregister(subscriber.fd)
            return
        now = time.monotonic()
        mark = self.mark
        if not subscriber.headers:
            subscriber.headers = data.startswith(b"HTTP/1.1 200")
        parts = (subscriber.tail + data).split(mark)
        last = parts[-1]
        if len(parts) == 1:
            subscriber.tail = last[1 - len(mark) :]
            return
        if len(last) < DIGITS:
            subscriber.tail = mark + last
            parts.pop()
            if len(parts) == 1:
                return
        else:
            subscriber.tail = last[DIGITS:][1 - len(mark) :]
        del parts[0]
        numbers = b"".join([p[:DIGITS] for p in parts])
        if _PROBE in numbers:
            subscriber.live = True
            numbers = b"".join([p[:DIGITS] for p in parts if p[:DIGITS] != _PROBE])
        low = subscriber.next
        if numbers != self.expected[low * DIGITS : low * DIGITS + len(numbers)]:
            self.unexpected(subscriber, numbers)
            return
        if not numbers or not self.running:
            return
        high = subscriber.next = low + len(numbers) // DIGITS
        subscriber.got += high - low
        self.at.append(now)
        self.low.append(low)
        self.high.append(high)
        if high == self.total and not subscriber.broken:
            self.incomplete -= 1

    def unexpected(self, subscriber: Subscriber, numbers: bytes) -> None:
        """Not the ones that had to come: find out what, and go on after them."""
        for at in range(0, len(numbers), DIGITS):
            index = int(numbers[at : at + DIGITS]) - self.first
            if not self.running or index < 0 or index >= self.total:
                continue  # of a row before
            if index < subscriber.next:
                self.broke(subscriber, "duplicate")
                continue
            if index > subscriber.next:
                self.broke(subscriber, "gap")
            self.at.append(time.monotonic())
            self.low.append(index)
            self.high.append(index + 1)
            subscriber.next = index + 1
            subscriber.got += 1

    def broke(self, subscriber: Subscriber, how: str) -> None:
        if not subscriber.broken:
            if self.running and subscriber.got < self.total:
                self.incomplete -= 1
            subscriber.broken = how


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert len(str(FIRST)) == DIGITS
    Client().main()
