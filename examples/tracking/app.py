"""Parcels that their owners follow: everybody sees their own, and the desk sees them all.

    DATABASE=mongodb://localhost:27017/parcels uvicorn app:app

Who sees what is decided in one place each: `mine` is the filter of a customer's live query,
`PublicParcel` is all that a customer is told, and `revoking` ends the streams of whoever is
blocked. `create_app` is the whole web application; `shop` moves the parcels.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import random
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from bson import ObjectId
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

import data_bridge
from data_bridge import Document, LiveStream, Model, merge
from data_bridge.api import App, EventSourceResponse, close_streams
from data_bridge.errors import DocumentNotFound, ServerUnreachable

PAGE = Path(__file__).with_name("index.html")
SECRET = os.environ.get("SECRET") or secrets.token_hex()  # several workers need the same
COOKIE = "visitor"
DESK = "desk"


# -- what is stored -----------------------------------------------------------------------------


class Stage(StrEnum):
    PACKED = "packed"
    COLLECTED = "collected"
    TRAVELLING = "on its way"
    NEAR = "around the corner"
    DELIVERED = "delivered"


def now() -> datetime:
    return datetime.now(UTC)


class Customer(Document):
    id: str
    name: str
    allowed: bool = True

    class Settings:
        collection = "customers"
        pre_images = True


class Parcel(Document):
    customer: str
    contents: str
    stage: Stage = Stage.PACKED
    travelled: float = 0  # of the way, from 0 to 1
    courier: str
    updated: datetime = Field(default_factory=now)
    # for the desk only
    margin: float = 0
    note: str = ""

    class Settings:
        collection = "parcels"
        indexes = ("customer",)
        pre_images = True  # what leaves a query is known exactly, on any worker


class PublicParcel(Model):
    """What a customer may know of a parcel. Other fields do not even leave the database."""

    id: ObjectId
    contents: str
    stage: Stage
    travelled: float
    courier: str
    updated: datetime


# -- who is asking ------------------------------------------------------------------------------
# A signed cookie and no password: this is an example. Yours comes from your own sign-in.


def signed(who: str) -> str:
    return f"{who}.{hmac.new(SECRET.encode(), who.encode(), hashlib.sha256).hexdigest()}"


def visitor(request: Request) -> str | None:
    cookie = request.cookies.get(COOKIE, "")
    who = cookie.rpartition(".")[0]
    return who if who and hmac.compare_digest(cookie.encode(), signed(who).encode()) else None


async def mine(request: Request) -> dict[str, Any]:
    """The filter of a customer's parcels; 401 and 403 for everybody else."""
    who = visitor(request)
    if who is None:
        raise HTTPException(401, "sign in first")
    customer = await Customer.get(who)
    if customer is None or not customer.allowed:
        raise HTTPException(403, "the shop has closed this account")
    return {"customer": customer.id}


def at_the_desk(request: Request) -> None:
    who = visitor(request)
    if who != DESK:
        raise HTTPException(401 if who is None else 403, "only for the desk")


async def revoking(customers: LiveStream[Customer]) -> None:
    """End the streams of who is not allowed any more: on every worker, because each one watches."""
    async for event in customers:
        if event.operation in ("leave", "delete"):
            close_streams(owner=event.document_id)
        elif event.operation == "reset":  # nobody knows who it was meanwhile: all are asked anew
            close_streams()


# -- the application ----------------------------------------------------------------------------


class SignIn(BaseModel):
    who: str = Field(min_length=1, max_length=40)


class HandOn(BaseModel):
    customer: str


class Allowed(BaseModel):
    allowed: bool


def create_app(database: str) -> App:
    """The tracking of the parcels in a database, given by its connection string."""
    app = App(database=database, lifespan=lifespan)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text("utf-8"))

    # A customer's own parcels, as far as they are a customer's business.
    app.live("/my/parcels", Parcel, filter=mine, view=PublicParcel, owner=visitor, retry=500)

    # All of both collections, over one connection.
    @app.get("/desk/live")
    async def desk(request: Request) -> EventSourceResponse:
        at_the_desk(request)
        return EventSourceResponse(merge(Parcel.live(), Customer.live()), owner=DESK)

    @app.post("/desk/parcels/{parcel_id}/customer")
    async def hand_on(request: Request, parcel_id: ObjectId, to: HandOn) -> Parcel:
        at_the_desk(request)
        customer = await Customer.get(to.customer)
        parcel = await Parcel.get(parcel_id)
        if customer is None or parcel is None:
            raise DocumentNotFound("there is no such parcel or customer")
        return await parcel.update({"$set": {"customer": customer.id, "updated": now()}})

    @app.post("/desk/customers/{customer_id}")
    async def allow(request: Request, customer_id: str, change: Allowed) -> Customer:
        at_the_desk(request)
        customer = await Customer.get(customer_id)
        if customer is None:
            raise DocumentNotFound("there is no such customer", customer_id)
        return await customer.update({"$set": {"allowed": change.allowed}})

    @app.get("/customers")
    async def customers() -> list[Customer]:
        return await Customer.find(sort="name")

    @app.get("/me")
    async def me(request: Request) -> dict[str, Any]:
        who = visitor(request)
        customer = None if who in (None, DESK) else await Customer.get(who)
        return {"who": who, "name": customer.name if customer else who}

    @app.post("/sign-in")
    async def sign_in(form: SignIn) -> Response:
        response = Response(status_code=204)
        response.set_cookie(COOKIE, signed(form.who), httponly=True, samesite="lax")
        return response

    @app.post("/sign-out")
    async def sign_out(request: Request) -> Response:
        response = Response(status_code=204)
        response.delete_cookie(COOKIE)
        if who := visitor(request):
            close_streams(owner=who)  # other devices come back by themselves, this one cannot
        return response

    return app


@contextlib.asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    async with Customer.live({"allowed": True}) as customers:  # from here on none is missed
        task = asyncio.create_task(revoking(customers))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


# -- a shop, so that something moves ------------------------------------------------------------

NAMES = {"ada": "Ada Moreau", "bruno": "Bruno Costa", "chen": "Chen Wei"}
CONTENTS = (
    "Espresso beans", "Moka pot", "Kettle", "Green tea", "Two ceramic mugs", "Hand grinder",
    "Cold brew bottle", "Dark chocolate",
)  # fmt: skip
COURIERS = ("Ines", "Kofi", "Lena", "Oskar", "Priya")
NOTES = ("", "", "called twice", "pays late", "leave with the neighbour", "third complaint")
STAGES = (
    (0.05, Stage.PACKED), (0.2, Stage.COLLECTED), (0.85, Stage.TRAVELLING), (1.0, Stage.NEAR),
)  # fmt: skip
EACH = 3  # parcels that a customer waits for, about


async def shop(database: str, rate: float = 2.0) -> None:
    """Pack parcels and move them for ever; `rate` is the number of moves per second."""
    async with data_bridge.connect(database, documents=[Customer, Parcel]):
        await opened()
        while True:
            await asyncio.sleep(random.expovariate(rate))
            with contextlib.suppress(DocumentNotFound):  # delivered and gone meanwhile
                try:
                    await something_moves()
                except ServerUnreachable:
                    await asyncio.sleep(1)


async def opened() -> None:
    """The customers, and something on its way to each."""
    for who, name in NAMES.items():
        if await Customer.get(who) is None:
            await Customer(id=who, name=name).insert()
            await Parcel.insert_many([parcel(who, random.uniform(0, 0.8)) for _ in range(EACH)])


async def something_moves() -> None:
    parcels = await Parcel.find(sort="updated", limit=60)
    if len(parcels) < EACH * len(NAMES) and (not parcels or random.random() < 0.1):
        await parcel(random.choice(list(NAMES))).insert()
        return
    moved = random.choice(parcels)
    if moved.stage is Stage.DELIVERED:
        if (now() - moved.updated).total_seconds() > 20:
            await moved.delete()
        return
    travelled = min(1.0, moved.travelled + random.uniform(0.01, 0.06))
    change = {"travelled": travelled, "stage": stage(travelled), "updated": now()}
    await moved.update({"$set": change})


def stage(travelled: float) -> Stage:
    return next((s for limit, s in STAGES if travelled < limit), Stage.DELIVERED)


def parcel(customer: str, travelled: float = 0) -> Parcel:
    return Parcel(
        customer=customer,
        contents=random.choice(CONTENTS),
        stage=stage(travelled),
        travelled=travelled,
        courier=random.choice(COURIERS),
        margin=round(random.uniform(1, 20), 2),
        note=random.choice(NOTES),
    )


def try_it(address: str) -> str:
    """The parcels of one customer, in a terminal."""
    return f"curl -N -b {COOKIE}={signed('ada')} {address}/my/parcels"


app = create_app(os.environ.get("DATABASE", "mongodb://localhost:27017/parcels"))
