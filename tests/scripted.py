"""A web server whose every byte the test decides: what a proxy, a crash or an old server does."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

HERE = Path(__file__).parent
STATIC = HERE.parent / "data_bridge" / "static"
TYPES = {".html": "text/html", ".js": "text/javascript"}


def frame(event: str | None = None, data: Any = None, *, id: str | None = None) -> bytes:
    lines = [f"{name}: {value}" for name, value in (("event", event), ("id", id)) if value]
    if data is not None:
        lines.append(f"data: {json.dumps(data)}")
    return ("\n".join(lines) + "\n\n").encode()


def snapshot(*documents: dict[str, Any], sent: int, total: int, **more: Any) -> bytes:
    return frame("snapshot", {"documents": documents, "sent": sent, "total": total, **more})


def change(
    operation: str, id: Any, document: Any = None, *, position: str | None, **more: Any
) -> bytes:
    data = {"operation": operation, "id": id, "document": document, **more}
    return frame(operation, data, id=position)


class Request:
    """One request for something that is no file: the test answers it."""

    def __init__(
        self,
        path: str,
        headers: dict[str, str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        url = urlsplit(path)
        self.path = url.path
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.headers = headers
        self._reader = reader
        self._writer = writer
        self.answered = asyncio.Event()

    async def stream(self, *frames: bytes) -> None:
        self._writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        await self.send(b"retry: 20\n\n", *frames)

    async def send(self, *frames: bytes) -> None:
        self._writer.write(b"".join(frames))
        await self._writer.drain()

    async def answer(self, status: int, content_type: str = "text/plain", body: str = "") -> None:
        content = body.encode()
        head = f"HTTP/1.1 {status} Scripted\r\nContent-Type: {content_type}\r\n"
        length = "" if status == 204 else f"Content-Length: {len(content)}\r\n"
        await self.send(f"{head}{length}Connection: close\r\n\r\n".encode(), content)
        self.cut()

    def cut(self) -> None:
        self._writer.close()
        self.answered.set()

    async def disconnected(self) -> None:
        """Returns when the browser has gone."""
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(1024):
                pass


class ScriptedServer:
    """Serves the browser module and the test pages; every other request waits for the test."""

    def __init__(self) -> None:
        self._requests: asyncio.Queue[Request] = asyncio.Queue()
        self._server: asyncio.Server | None = None
        self._open: set[Request] = set()
        self.port = 0
        self.scripts: dict[str, str] = {}  # more files, by their path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """As a killed process: nobody listens, and every connection is cut."""
        assert self._server is not None
        self._server.close()
        for request in list(self._open):
            request.cut()
        await self._server.wait_closed()

    async def request(self) -> Request:
        """The next request that the browser has made."""
        return await asyncio.wait_for(self._requests.get(), 20)

    def no_request(self) -> bool:
        return self._requests.empty()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            return
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])
        }
        request = Request(head[0].split()[1], headers, reader, writer)
        self._open.add(request)
        try:
            file = self._file(request.path)
            if request.path in self.scripts:
                await request.answer(200, "text/javascript", self.scripts[request.path])
            elif file is not None:
                await request.answer(200, TYPES[file.suffix], file.read_text("utf-8"))
            elif request.path == "/favicon.ico":
                await request.answer(404)
            else:
                self._requests.put_nowait(request)
                await request.answered.wait()
        except ConnectionError:
            pass
        finally:
            self._open.discard(request)
            writer.close()

    @staticmethod
    def _file(path: str) -> Path | None:
        folder = STATIC if path.startswith("/data-bridge/") else HERE / "pages"
        file = folder / Path(path).name
        return file if file.suffix in TYPES and file.is_file() else None


@contextlib.asynccontextmanager
async def scripted_server() -> AsyncIterator[ScriptedServer]:
    server = ScriptedServer()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
