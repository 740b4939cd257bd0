"""``python -m benchmarks.drain``: 20,000 changes from a resume token, every way in turn.

--quick           fewer changes and one round: does everything work?
--changes N       how many changes (default: 20,000)
--rounds N        how often each way runs (default: 5)
--out DIRECTORY   where drain.json and drain.md go (default: benchmarks/results, or quick/ in it)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from pymongo import MongoClient

from data_bridge.embedded import ReplicaSet

from ..environment import environment, results
from ..orders import COLLECTION, DATABASE, WRITE_CONCERN, order
from ..processes import ROOT
from ..progress import Progress
from . import report
from .ways import WAYS

_CHANGES, _ROUNDS = 20_000, 5
_QUICK_CHANGES, _QUICK_ROUNDS = 2_000, 1
_FIRST = 10_000_000  # every number has eight digits
_LIMIT = 120.0  # seconds for one way


def main() -> int:
    options = _options()
    changes = options.changes or (_QUICK_CHANGES if options.quick else _CHANGES)
    rounds = options.rounds or (_QUICK_ROUNDS if options.quick else _ROUNDS)
    found = {"quick": options.quick, "changes": changes, **_run(changes, rounds)}
    text = "\n".join(report.markdown(found)) + "\n"
    out = results(options.out, options.quick)
    (out / "drain.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "drain.md").write_text(text)
    print(text)
    print(f"{os.path.relpath(out)}/drain.md and .json")
    return 0


def _run(changes: int, rounds: int) -> dict[str, Any]:
    names = list(WAYS)
    progress = Progress((rounds + 1) * len(names))
    progress.show("starting a replica set")
    with contextlib.closing(progress), ReplicaSet() as replica_set:
        mongo: MongoClient[dict[str, Any]] = MongoClient(replica_set.uri, w=WRITE_CONCERN)
        with mongo:
            where = environment(mongo)
            progress.show(f"writing {changes:,} orders")
            token = _write(mongo, changes)
        done = []
        for number in range(rounds + 1):
            # Another one first in each round: nobody always follows the same neighbour.
            turn = names[number % len(names) :] + names[: number % len(names)]
            found = {}
            for name in turn:
                progress.show(f"round {number} of {rounds}: {name}" if number else f"warm: {name}")
                found[name] = _drain(name, replica_set.uri, token, changes)
                progress.step()
            if number:  # the first only warms the server's cache
                done.append(found)
    return {"environment": where, "rounds": done}


def _write(mongo: MongoClient[dict[str, Any]], changes: int) -> str:
    """Write the orders; the resume token of the moment before."""
    orders = mongo[DATABASE].create_collection(COLLECTION)
    with orders.watch() as stream:
        token = stream.resume_token
        assert token is not None
    orders.insert_many([order(_FIRST + n) for n in range(changes)])
    return str(token["_data"])


def _drain(name: str, uri: str, token: str, changes: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.drain.ways", name, uri, token, str(changes)]
    ended = subprocess.run(
        command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=_LIMIT
    )
    if ended.returncode:
        raise SystemExit(f"{name} failed:\n{ended.stderr}")
    found: dict[str, float] = json.loads(ended.stdout)
    if found.pop("last") != _FIRST + changes - 1:
        raise SystemExit(f"{name} lost changes, or had some twice")
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--changes", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    # The database must be stopped however this ends.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
