"""data-bridge as its guide shows it, on both drivers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from data_bridge import Change
from data_bridge.api import App as Application
from data_bridge.api import EventSourceResponse, ServerSentEvent

from ...model import Order
from . import shared
from .shared import App


def _application(database: Any, respond: Callable[[], EventSourceResponse]) -> App:
    app = Application(database=database)

    @app.get("/events")
    async def events() -> EventSourceResponse:
        return respond()

    return app


# -- the changes themselves ---------------------------------------------------------------------


def _plain() -> EventSourceResponse:
    return EventSourceResponse(Order.watch())


def plain_pymongo(uri: str) -> App:
    return _application(shared.pymongo(uri), _plain)


def plain_motor(uri: str) -> App:
    return _application(shared.motor(uri), _plain)


# -- the changes in a shape of the application's own --------------------------------------------


def _data(change: Change[Order]) -> dict[str, Any]:
    return {"kind": change.operation, "order": change.document}


def _shaped() -> EventSourceResponse:
    changes = Order.watch(operations=["insert", "update"])
    return EventSourceResponse(changes, event="order_update", data=_data)


def shaped_pymongo(uri: str) -> App:
    return _application(shared.pymongo(uri), _shaped)


# -- a generator per client that makes its own event of every change ----------------------------


async def _generate() -> AsyncIterator[ServerSentEvent]:
    async for change in Order.watch():
        yield ServerSentEvent(
            data=json.dumps(
                {
                    "operation": change.operation,
                    "order_id": str(change.document_id),
                    "data": change.document,
                }
            ),
            event="order_update",
            id=str(change.timestamp),
        )


def _generator() -> EventSourceResponse:
    return EventSourceResponse(_generate())


def generator_pymongo(uri: str) -> App:
    return _application(shared.pymongo(uri), _generator)


def generator_motor(uri: str) -> App:
    return _application(shared.motor(uri), _generator)
