"""Load: one contender's server, the writer and the clients, and what is measured of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pymongo import MongoClient

from ..processes import Child, Collapsed, free_port, python, wait_for_port
from ..progress import Progress
from .marks import FIRST
from .peers import Peers
from .plan import Contender, Row
from .words import told

_WARM = 50  # connections before the first reading of a server's memory
_CONNECTING = 60.0
_LISTENING = 30.0


class Load:
    """Runs contenders, one after the other, against one replica set."""

    def __init__(
        self, uri: str, directory: Path, peers: Peers, progress: Progress, hold: float
    ) -> None:
        self.mongo: MongoClient[dict[str, Any]] = MongoClient(uri)
        self._uri = uri
        self._peers = peers
        self._progress = progress
        self._hold = hold
        self._seq = FIRST
        self._writer = python("fanout.writer", uri)
        self._acknowledged = directory / "acknowledged"

    def close(self) -> None:
        self._writer.end()
        self.mongo.close()

    def run(self, contender: Contender, rows: list[Row]) -> dict[str, Any]:
        """All rows of a contender once, in as few servers as possible."""
        result: dict[str, Any] = {"idle": {}, "rows": {}}
        left = list(rows)
        while left:
            # A server that a row was cut off in still has the rest of it to send: a new one then.
            self._serve(contender, left, result)
        return result

    def _serve(self, contender: Contender, left: list[Row], result: dict[str, Any]) -> None:
        row = left[0]
        self._clear()
        known = self._cursors()
        try:
            with self._server(contender) as (server, port), python("fanout.client") as client:
                idle = self._connect(contender, server, port, client, row.clients)
                idle["cursors"] = len(self._cursors() - known)
                result["idle"].setdefault(str(row.clients), idle)
                while left:
                    row = left[0]
                    self._progress.show(f"{contender.title}: {row.title}")
                    figures = self._row(row, server, client)
                    self._done(contender, left, result, figures)
                    if figures["cut"]:
                        return
        except Collapsed as collapse:
            self._done(contender, left, result, {"collapsed": str(collapse)})

    def _done(
        self, contender: Contender, left: list[Row], result: dict[str, Any], figures: dict[str, Any]
    ) -> None:
        row = left.pop(0)
        result["rows"][row.name] = figures
        self._progress.line(f"{contender.title:44} {row.title:34} {told(figures)}")
        self._progress.step()

    def _clear(self) -> None:
        """An empty collection, and nothing of a server before: a dead one leaves its cursors."""
        self.mongo.admin.command("killAllSessions", [])
        self._writer.ask("clear")

    @contextlib.contextmanager
    def _server(self, contender: Contender) -> Iterator[tuple[Child, int]]:
        port = free_port()
        if contender.serve is None:
            child = Child(*self._peers.command(contender), str(port), self._uri)
        else:
            child = python("fanout.serve", *contender.serve, str(port), self._uri)
        with child:
            wait_for_port(child, port)
            yield child, port

    def _connect(
        self, contender: Contender, server: Child, port: int, client: Child, number: int
    ) -> dict[str, Any]:
        """Connect everybody, read the memory that takes, and make sure that everybody listens."""
        self._progress.show(f"connecting {number:,} clients")
        warm = min(_WARM, number // 2)

        def connect(more: int) -> int:
            reply = client.ask(
                "connect",
                _CONNECTING + 10,
                port=port,
                number=more,
                limit=_CONNECTING,
                mark=contender.mark,
            )
            connected: int = reply["connected"]
            return connected

        connect(warm)
        time.sleep(0.5)
        before = server.rss
        connected = connect(number - warm)
        if connected < number - warm:
            raise Collapsed(f"{connected + warm:,} of {number:,} clients could connect")
        time.sleep(1.0)
        rss = (server.rss - before) / (number - warm) / 1024
        self._listen(client, number)
        return {"rss_kib": rss}

    def _listen(self, client: Child, number: int) -> None:
        until = time.monotonic() + _LISTENING
        live = 0
        while live < number and time.monotonic() < until:
            self._writer.ask("probe")
            asked = time.monotonic()
            while live < number and time.monotonic() - asked < 1:
                time.sleep(0.05)
                live = client.ask("live")["live"]
        if live < number:
            raise Collapsed(f"{live:,} of {number:,} clients saw a change within {_LISTENING:g} s")
        time.sleep(0.5)  # for further copies of the probe

    def _cursors(self) -> set[int]:
        """Change stream cursors on the server, waiting or reading."""
        stages: list[dict[str, Any]] = [
            {"$currentOp": {"allUsers": True, "idleCursors": True, "idleConnections": False}},
            {"$match": {"cursor.originatingCommand.pipeline.0.$changeStream": {"$exists": True}}},
            {"$group": {"_id": "$cursor.cursorId"}},
        ]
        return {found["_id"] for found in self.mongo.admin.aggregate(stages)}

    def _row(self, row: Row, server: Child, client: Child) -> dict[str, Any]:
        cpu = server.cpu
        done, written = self._write(client, row.changes, row.rate, row.limit)
        cpu = server.cpu - cpu
        figures = client.ask("figures", 120, acknowledged=str(self._acknowledged))
        cut = figures["complete"] < row.clients
        # Cut off: the rate is what arrived by then.
        seconds = (done["done"] if cut else figures["last"]) - written["began"]
        deliveries = figures["deliveries"]
        if self._hold:
            self._progress.line(f"    pid {server.pid} is under load for {self._hold:g} s")
            rate = row.rate or 1000
            self._write(client, int(rate * self._hold), rate, self._hold + 5)
        return {
            "clients": row.clients,
            "cut": cut,
            "seconds": seconds,
            "deliveries": deliveries,
            "per_second": deliveries / seconds,
            "complete": figures["complete"],
            "broken": figures["broken"],
            "p50_ms": figures["p50"],
            "p99_ms": figures["p99"],
            "cpu_us": cpu / deliveries * 1e6 if deliveries else None,
            "server_load": cpu / seconds,
            "client_load": done["cpu"] / seconds,
            # How many changes a client gets in one piece: what makes the rest cheap or dear.
            "per_piece": deliveries / figures["chunks"] if figures["chunks"] else None,
        }

    def _write(
        self, client: Child, changes: int, rate: float | None, limit: float
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        first, self._seq = self._seq, self._seq + changes
        client.ask("row", first=first, number=changes, limit=limit)
        path = str(self._acknowledged)
        self._writer.tell("write", first=first, number=changes, rate=rate, path=path)
        return client.answer(limit + 30), self._writer.answer(limit + 30)
