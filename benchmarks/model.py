"""The orders as a model; a file of its own, because the peers must not load data-bridge."""

from __future__ import annotations

from data_bridge import Document

from .orders import COLLECTION


class Order(Document):
    status: str
    total: float
    customer: str
    email: str
    address: str
    items: list[str]
    note: str
    seq: int

    class Settings:
        collection = COLLECTION
