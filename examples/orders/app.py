"""A live dashboard of orders: every change in the database reaches every open page.

    DATABASE=mongodb://localhost:27017/shop uvicorn app:app

`create_app` is the whole web application; `shop` writes orders, so that there is something to see.
"""

from __future__ import annotations

import asyncio
import html
import os
import random
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from bson import ObjectId
from pydantic import BaseModel, Field
from starlette.responses import HTMLResponse

import data_bridge
from data_bridge import Document
from data_bridge.api import App, EventSourceResponse
from data_bridge.errors import DocumentNotFound, ServerUnreachable

PAGE = Path(__file__).with_name("index.html")


# -- what is stored -----------------------------------------------------------------------------


class Status(StrEnum):
    PLACED = "placed"
    PAID = "paid"
    PACKED = "packed"
    SHIPPED = "shipped"
    CANCELLED = "cancelled"


class Item(BaseModel):
    name: str = Field(min_length=1, max_length=80)
    quantity: int = Field(ge=1, le=100)
    price: float = Field(ge=0, le=10_000)


def now() -> datetime:
    return datetime.now(UTC)


class Order(Document):
    customer: str
    items: list[Item]
    total: float
    status: Status = Status.PLACED
    created: datetime = Field(default_factory=now)
    updated: datetime = Field(default_factory=now)

    class Settings:
        collection = "orders"
        indexes = ("created", [("status", 1), ("created", 1)])
        pre_images = True  # so that a page resumes after a restart, on any worker


# -- what a client may send ---------------------------------------------------------------------


class NewOrder(BaseModel):
    customer: str = Field(min_length=1, max_length=80)
    items: list[Item] = Field(min_length=1, max_length=20)


class NewStatus(BaseModel):
    status: Status


# -- the application ----------------------------------------------------------------------------


def create_app(database: str, title: str = "Corner shop") -> App:
    """The dashboard of the orders in a database, given by its connection string."""
    app = App(database=database)
    page = PAGE.read_text("utf-8").replace("%title%", html.escape(title))

    @app.get("/")
    async def dashboard() -> HTMLResponse:
        return HTMLResponse(page)

    # The orders as they are now, and then every change: this is what the page shows. It comes
    # with the page's side of it, /data-bridge/live.js.
    app.live("/orders/live", Order)

    # The changes alone, for whoever keeps the state: `curl -N localhost:8000/orders/changes`
    @app.get("/orders/changes")
    async def changes() -> EventSourceResponse:
        return EventSourceResponse(Order.watch())

    @app.get("/orders")
    async def orders(status: Status | None = None, limit: int = 20) -> list[Order]:
        wanted = {} if status is None else {"status": status}
        return await Order.find(wanted, sort="-created", limit=max(1, min(limit, 100)))

    @app.post("/orders", status_code=201)
    async def place(order: NewOrder) -> Order:
        return await placed(order.customer, order.items).insert()

    @app.patch("/orders/{order_id}")
    async def advance(order_id: ObjectId, change: NewStatus) -> Order:
        order = await found(order_id)
        return await order.update({"$set": {"status": change.status, "updated": now()}})

    @app.delete("/orders/{order_id}", status_code=204)
    async def remove(order_id: ObjectId) -> None:
        await (await found(order_id)).delete()

    return app


def placed(customer: str, items: list[Item]) -> Order:
    total = round(sum(item.price * item.quantity for item in items), 2)
    return Order(customer=customer, items=items, total=total)


async def found(order_id: ObjectId) -> Order:
    order = await Order.get(order_id)
    if order is None:
        raise DocumentNotFound(f"there is no order {order_id}", order_id)  # the App answers 404
    return order


# -- a shop, so that something happens ----------------------------------------------------------

OPEN = (Status.PLACED, Status.PAID, Status.PACKED)
NEXT = {
    Status.PLACED: Status.PAID,
    Status.PAID: Status.PACKED,
    Status.PACKED: Status.SHIPPED,
}
KEPT = 400  # orders; the oldest go first
CUSTOMERS = (
    "Ada Moreau", "Amir Haddad", "Bruno Costa", "Chen Wei", "Dilan Yilmaz", "Elif Kaya",
    "Freya Lind", "Giulia Conti", "Hana Sato", "Ines Duarte", "Jonas Berg", "Kofi Mensah",
    "Lena Vogt", "Mateo Ruiz", "Nadia Petrov", "Oskar Nowak", "Priya Nair", "Rosa Jimenez",
    "Sven Dahl", "Tomas Novak", "Yara Cohen", "Zoe Laurent",
)  # fmt: skip
GOODS = (
    ("Espresso beans, 1 kg", 18.90), ("Filter papers", 3.40), ("Hand grinder", 64.00),
    ("Oat milk, 6 pack", 13.20), ("Green tea", 7.80), ("Moka pot", 34.50), ("Ceramic mug", 12.00),
    ("Dark chocolate", 4.20), ("Milk frother", 27.90), ("Cold brew bottle", 22.40),
    ("Kettle", 58.00), ("Almond biscuits", 5.60),
)  # fmt: skip


async def shop(database: str, rate: float = 2.0) -> None:
    """Place, advance, cancel and clear orders for ever; `rate` is the new orders per second."""
    async with data_bridge.connect(database, documents=[Order]):
        if not await Order.count():
            await Order.insert_many(morning(rate))
        while True:
            await asyncio.sleep(random.expovariate(4 * rate))  # each is written about four times
            try:
                await something_happens()
            except DocumentNotFound:
                pass  # somebody at a dashboard was faster
            except ServerUnreachable:
                await asyncio.sleep(1)  # the database is restarting: the shop waits


async def something_happens() -> None:
    open_orders = await Order.find({"status": {"$in": OPEN}}, sort="created", limit=60)
    if len(open_orders) < 15 or random.random() < 0.27:
        await some_order().insert()
        if await Order.count() > KEPT:
            for oldest in await Order.find(sort="created", limit=1):
                await oldest.delete()
        return
    order = random.choice(open_orders)
    may_cancel = order.status is not Status.PACKED
    status = Status.CANCELLED if may_cancel and random.random() < 0.07 else NEXT[order.status]
    await order.update({"$set": {"status": status, "updated": now()}})


def some_order() -> Order:
    goods = random.sample(GOODS, random.choice((1, 1, 1, 2, 2, 3)))
    items = [
        Item(name=name, price=price, quantity=random.choice((1, 1, 1, 2, 3)))
        for name, price in goods
    ]
    return placed(random.choice(CUSTOMERS), items)


def morning(rate: float) -> list[Order]:
    """What was sold in the three minutes before anybody looked."""
    orders: list[Order] = []
    seconds = random.expovariate(rate)
    while seconds < 180 and len(orders) < KEPT:
        order = some_order()
        order.created = order.updated = now() - timedelta(seconds=seconds)
        recent = len(orders) < 20
        order.status = random.choice(
            OPEN if recent else (Status.SHIPPED,) * 9 + (Status.CANCELLED,)
        )
        orders.append(order)
        seconds += random.expovariate(rate)
    return orders[::-1]


def try_it(address: str) -> str:
    """The orders in a terminal."""
    return f"curl -N {address}/orders/live"


app = create_app(os.environ.get("DATABASE", "mongodb://localhost:27017/shop"))
