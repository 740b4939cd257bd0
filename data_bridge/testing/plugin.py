"""The pytest plugin: the fixture ``test_client``.

    @pytest.fixture
    def app() -> App:
        return shop.app

    async def test_events(test_client):
        async with test_client.stream("GET", "/events") as response: ...

pytest loads this in every run of every project that has data-bridge installed, so nothing but
pytest is imported before a test asks for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import ModuleType
from typing import Any

import pytest

_LOOP_SCOPES = ("function", "class", "module", "package", "session")


@pytest.fixture
def test_client(request: pytest.FixtureRequest, app: Any) -> Any:
    """An ``httpx.AsyncClient`` that streams, for the application in your fixture ``app``.

    The application's lifespan is open meanwhile; relative URLs are below ``http://testserver``.
    It runs in the event loop of the test itself, which pytest-asyncio or anyio provides.
    """
    return request.getfixturevalue(_client_fixture(request))


def _client_fixture(request: pytest.FixtureRequest) -> str:
    """The name of the fixture for the event loop that runs this test."""
    asyncio_mark = request.node.get_closest_marker("asyncio")
    if asyncio_mark is None and "anyio_backend" in request.fixturenames:
        return "_data_bridge_client_anyio"
    if not _has_pytest_asyncio(request.config):
        pytest.fail(
            "the fixture 'test_client' needs an event loop: install pytest-asyncio, or mark the "
            "test with @pytest.mark.anyio",
            pytrace=False,
        )
    options = asyncio_mark.kwargs if asyncio_mark is not None else {}
    scope = options.get("loop_scope") or request.config.getini("asyncio_default_test_loop_scope")
    return f"_data_bridge_client_{scope}"


def _has_pytest_asyncio(config: pytest.Config) -> bool:
    # The second is its name if it is loaded with -p instead of by its entry point.
    return any(map(config.pluginmanager.hasplugin, ("asyncio", "pytest_asyncio.plugin")))


async def _client(app: Any) -> AsyncIterator[Any]:
    from .client import streaming_client

    async with streaming_client(app) as client:
        yield client


@pytest.fixture
async def _data_bridge_client_anyio(app: Any, anyio_backend: Any) -> AsyncIterator[Any]:
    async for client in _client(app):
        yield client


def _for_loop_scope(scope: Any) -> Any:
    """The same for pytest-asyncio, whose fixtures say which event loop they are in."""
    import pytest_asyncio

    @pytest_asyncio.fixture(loop_scope=scope, name=f"_data_bridge_client_{scope}")
    async def client(app: Any) -> AsyncIterator[Any]:
        async for client in _client(app):
            yield client

    return client


def pytest_configure(config: pytest.Config) -> None:
    if _has_pytest_asyncio(config):
        fixtures = ModuleType("data_bridge_asyncio")
        for scope in _LOOP_SCOPES:
            setattr(fixtures, f"client_{scope}", _for_loop_scope(scope))
        config.pluginmanager.register(fixtures, fixtures.__name__)
