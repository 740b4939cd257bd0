"""What all benchmarks write: one place, so that their figures speak of the same documents."""

from __future__ import annotations

from typing import Any

import bson
from bson import ObjectId

DATABASE = "shop"
COLLECTION = "orders"
WRITE_CONCERN = "majority"  # delivery waits for the majority anyway, and latency counts from it


def order(seq: int) -> dict[str, Any]:
    """An order as a shop would have it, with a number of its own."""
    return {
        "_id": ObjectId(),
        "status": "placed",
        "total": 129.9,
        "customer": "Katharina Musterfrau",
        "email": "katharina.musterfrau@example.com",
        "address": "Lindenstrasse 12, 10969 Berlin, DE",
        "items": ["SKU-1042-BLUE-M", "SKU-2210-RED-L", "SKU-3300"],
        "note": "please ring twice",
        "seq": seq,
    }


def document_bytes() -> int:
    """How large such an order is in BSON."""
    return len(bson.encode(order(10_000_000)))
