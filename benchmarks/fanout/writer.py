"""The writer: a process of its own that writes changes at a pace, and notes each acknowledgement.

Talks with its parent in lines of JSON on stdin and stdout.
"""

from __future__ import annotations

import json
import sys
import time
from array import array
from typing import Any

from pymongo import MongoClient

from ..orders import COLLECTION, DATABASE, WRITE_CONCERN, order
from .marks import PROBE


class Writer:
    def __init__(self, uri: str) -> None:
        client: MongoClient[dict[str, Any]] = MongoClient(uri, w=WRITE_CONCERN)
        self.client = client
        self.orders = client[DATABASE][COLLECTION]

    def do_clear(self) -> dict[str, Any]:
        """An empty collection."""
        self.orders.drop()
        self.client[DATABASE].create_collection(COLLECTION)
        return {}

    def do_probe(self) -> dict[str, Any]:
        self.orders.insert_one(order(PROBE))
        return {}

    def do_write(self, first: int, number: int, rate: float | None, path: str) -> dict[str, Any]:
        """Write ``number`` orders, ``rate`` a second or all at once; the times go to a file.

        Above 50 a second they are written in steps of 10 ms, because an acknowledgement by the
        majority takes some milliseconds and the next insert must not wait for it.
        """
        documents = [order(seq) for seq in range(first, first + number)]
        acknowledged = array("d")
        began = time.monotonic()
        if rate is None:
            self.orders.insert_many(documents)
            acknowledged.extend([time.monotonic()] * number)
        else:
            step = max(0.01, 1 / rate)
            written = 0
            while written < number:
                due = min(number, int((time.monotonic() - began) * rate) + 1)
                if due > written:
                    self.orders.insert_many(documents[written:due])
                    acknowledged.extend([time.monotonic()] * (due - written))
                    written = due
                next_ = began + (int((time.monotonic() - began) / step) + 1) * step
                time.sleep(max(0.0, next_ - time.monotonic()))
        with open(path, "wb") as file:
            file.write(acknowledged.tobytes())
        return {"began": began, "ended": time.monotonic()}


def main() -> None:
    writer = Writer(sys.argv[1])
    for line in sys.stdin:
        call = json.loads(line)
        reply = getattr(writer, "do_" + call.pop("do"))(**call)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
