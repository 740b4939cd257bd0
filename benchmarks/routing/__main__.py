"""``python -m benchmarks.routing``: what a change costs while so many each follow their own.

Live queries in one process on one cursor: each by its own ``_id``, or by its own tenant; then the
same number of filters that nothing can be found by, so that each is asked about each change.
Measured is the processor time of the process that has them; the writer is another one.

--quick           few subscribers and changes: does everything work?
--changes N       changes per measurement (default: 5,000)
--subscribers N   so many, also several times (default: 100, 1,000 and 10,000)
--rounds N        how often each is measured (default: 3)
--out DIRECTORY   where routing.json and .md go (default: benchmarks/results, or quick/ in it)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from pymongo import MongoClient

from data_bridge.embedded import ReplicaSet

from ..environment import environment, results
from ..orders import DATABASE
from ..progress import Progress
from .measure import BATCH, UNROUTED, WAYS, once
from .report import markdown

_CHANGES, _SUBSCRIBERS, _ROUNDS = 5_000, (100, 1_000, 10_000), 3


def main() -> int:
    options = _options()
    changes = options.changes or (500 if options.quick else _CHANGES)
    subscribers = options.subscribers or ((10, 100) if options.quick else _SUBSCRIBERS)
    rounds = options.rounds or (1 if options.quick else _ROUNDS)
    steps = [(way, number) for way in WAYS for number in subscribers]
    found: dict[str, dict[int, list[dict[str, Any]]]] = {
        way: {number: [] for number in subscribers} for way in WAYS
    }
    progress = Progress(len(steps) * rounds)
    progress.show("starting a replica set")
    with contextlib.closing(progress), ReplicaSet() as replica_set:
        with MongoClient[dict[str, Any]](replica_set.uri) as mongo:
            where = environment(mongo)
            mongo[DATABASE].create_collection("orders")
        for number in range(rounds):
            for way, count in steps:
                progress.show(f"round {number + 1} of {rounds}: {count:,} follow {way}")
                # Asking each of so many about each change takes long, and says enough sooner.
                some = changes if way != UNROUTED else max(BATCH, changes * 100 // count)
                some = min(some, changes)
                found[way][count].append(
                    {"changes": some, **once(replica_set.uri, way, count, some, number)}
                )
                progress.step()
    text = "\n".join(markdown(where, found, changes, options.quick)) + "\n"
    out = results(options.out, options.quick)
    kept = {"quick": options.quick, "environment": where, "found": found}
    (out / "routing.json").write_text(json.dumps(kept, indent=1) + "\n")
    (out / "routing.md").write_text(text)
    print(text)
    print(f"{os.path.relpath(out)}/routing.md and .json")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--changes", type=int)
    parser.add_argument("--subscribers", type=int, action="append")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    # The database must be stopped however this ends.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
