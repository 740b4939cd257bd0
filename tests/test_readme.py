"""Every Python snippet of the documentation runs, in the order of its page, on a real server."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
from starlette.applications import Starlette

from data_bridge import connect
from data_bridge.testing import events, streaming_client

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HEADERS = {"X-Customer": "ada"}  # as whom the snippets' own routes are asked


def snippets(page: Path) -> Iterator[tuple[str, CodeType]]:
    """The Python blocks of a page, each at its own lines."""
    text = page.read_text("utf-8")
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        lines = text.count("\n", 0, found.start(1))
        yield (
            found[1],
            compile("\n" * lines + found[1], str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT),
        )


async def ran(page: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a page has defined, its database being the one at ``uri``."""
    module = ModuleType(f"snippets_of_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # annotations are looked up there
    monkeypatch.setattr("data_bridge.bridge.Bridge.__init__", _at(uri))
    for source, code in snippets(page):
        if not code.co_flags & inspect.CO_COROUTINE:
            exec(code, module.__dict__)
        elif "connect(" in source or "streaming_client(" in source:
            await eval(code, module.__dict__)
        else:
            async with connect(uri):
                await eval(code, module.__dict__)
    return module.__dict__


def _at(uri: str) -> Any:
    from data_bridge.bridge import Bridge

    original = Bridge.__init__

    def init(self: Bridge, source: Any, **options: Any) -> None:
        if isinstance(source, str):
            assert source in (uri, "mongodb://localhost:27017/shop")
            source = uri
        original(self, source, **options)

    return init


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
async def test_every_snippet_runs_and_what_it_defines_answers(
    page: Path, database_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asyncio.timeout(60):
        namespace = await ran(page, database_uri, monkeypatch)
        apps = [value for value in namespace.values() if isinstance(value, Starlette)]
        for app in apps:
            async with streaming_client(app, headers=HEADERS) as client:
                for route in app.routes:
                    path, methods = getattr(route, "path", ""), getattr(route, "methods", None)
                    if "{" in path or "GET" not in (methods or ()):
                        continue
                    async with client.stream("GET", path) as response:
                        assert response.status_code == 200, path
        for name, value in namespace.items():
            if name.startswith("test_") and not inspect.signature(value).parameters:
                await value()
            elif name.startswith("test_"):
                async with streaming_client(namespace["app"]) as client:
                    await value(client)


async def test_the_quick_start_does_what_it_says(
    database_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = await ran(ROOT / "README.md", database_uri, monkeypatch)
    for name in ("app", "api"):
        async with (
            asyncio.timeout(30),
            streaming_client(namespace[name]) as client,
            client.stream("GET", "/orders/live") as response,
        ):
            stream = events(response)
            while (await anext(stream)).event != "ready":
                pass
            if name == "app":
                placed = await client.post("/orders", json={"customer": "Chen"})
                assert placed.status_code == 201
                event = await anext(stream)
                assert event.event == "insert"
                assert placed.json()["id"] in event.data
    async with (
        streaming_client(namespace["app"], headers=HEADERS) as client,
        client.stream("GET", "/my/orders") as response,
    ):
        snapshot = await anext(events(response))
        assert "Ada" not in snapshot.data and "customer" not in snapshot.data
    async with streaming_client(namespace["app"]) as client:
        assert (await client.get("/my/orders")).status_code == 401


def test_every_link_leads_somewhere() -> None:
    pages = [*PAGES, *ROOT.glob("examples/*/README.md"), ROOT / "CHANGELOG.md"]
    for page in pages:
        text = page.read_text("utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            other = (page.parent / path).resolve() if path else page
            assert other.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", other.read_text("utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
                assert anchor in slugs, f"{page.name}: {target}"


def test_the_documented_limits_are_the_limits() -> None:
    from dataclasses import fields

    from data_bridge import Limits

    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+)", text, re.MULTILINE))
    stated = {name: int(value.replace(",", "")) for name, value in table.items()}
    stated["log_bytes"] *= 1024 * 1024
    assert stated == {field.name: field.default for field in fields(Limits)}
