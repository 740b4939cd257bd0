"""``python -m benchmarks.fanout``: every contender in turn against its own replica set.

--quick           a small run that shows that everything works
--only NAME …     only contenders whose key contains one of these
--rows NAME …     only these rows
--rounds N        how often what is compared with the limit runs (default: as planned)
--out DIRECTORY   where fanout.json, .md and .svg go (default: benchmarks/results, or quick/ in it)
--hold SECONDS    keep each server under load after a row for so long, its pid printed: to profile
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_bridge.embedded import ReplicaSet

from ..environment import environment, results
from ..progress import Progress
from . import report
from .load import Load
from .merge import merged
from .peers import Peers, node_versions, peers
from .plan import CONTENDERS, QUICK, ROUNDS, ROWS, Contender, Row

Chosen = list[tuple[Contender, list[Row]]]


def main() -> int:
    options = _options()
    rows = QUICK if options.quick else ROWS
    chosen = _chosen(options, rows)
    began = time.monotonic()
    everything = _run(chosen, options.hold)
    everything |= {
        "quick": options.quick,
        "seconds": round(time.monotonic() - began),
        "rows": {name: {"title": row.title, **vars(row)} for name, row in rows.items()},
    }
    out = results(options.out, options.quick)
    report.write(everything, out)
    where = os.path.relpath(out)
    print(f"{where}/fanout.md, .svg and .json, after {everything['seconds']} s")
    return 0


def _run(chosen: Chosen, hold: float) -> dict[str, Any]:
    progress = Progress(sum(len(rows) * contender.rounds for contender, rows in chosen))
    progress.show("starting a replica set")
    with (
        contextlib.closing(progress),
        tempfile.TemporaryDirectory(prefix="fanout-") as directory,
        ReplicaSet() as replica_set,
        peers() as others,
        contextlib.closing(Load(replica_set.uri, Path(directory), others, progress, hold)) as load,
    ):
        found = environment(
            load.mongo, "starlette", "uvicorn", "uvloop", "httptools", "sse-starlette", "fastapi"
        )
        found["versions"] |= node_versions()
        return {"environment": found, "contenders": _contenders(chosen, load, others, progress)}


def _contenders(
    chosen: Chosen, load: Load, others: Peers, progress: Progress
) -> dict[str, dict[str, Any]]:
    rounds: dict[str, list[dict[str, Any]]] = {contender.key: [] for contender, _ in chosen}
    left_out: dict[str, str] = {}
    for number in range(max((contender.rounds for contender, _ in chosen), default=0)):
        for contender, rows in chosen:
            if number >= contender.rounds:
                continue
            if reason := left_out.get(contender.key) or others.missing(contender):
                if contender.key not in left_out:
                    progress.line(f"{contender.title:44} left out: {reason}")
                left_out[contender.key] = reason
                progress.step(len(rows))
                continue
            rounds[contender.key].append(load.run(contender, rows))
    return {
        contender.key: {
            "title": contender.title,
            "ours": contender.ours,
            "left_out": left_out.get(contender.key),
            **merged(rounds[contender.key]),
        }
        for contender, _ in chosen
    }


def _chosen(options: argparse.Namespace, rows: dict[str, Row]) -> Chosen:
    chosen = []
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    for planned in CONTENDERS:
        contender = planned if planned.rounds == 1 else replace(planned, rounds=rounds)
        mine = [rows[name] for name in contender.rows if not options.rows or name in options.rows]
        if mine and any(part in contender.key for part in options.only):
            chosen.append((contender, mine))
    return chosen


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fanout",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME")
    parser.add_argument("--rows", nargs="+", choices=sorted(ROWS), metavar="NAME")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--hold", type=float, default=0.0)
    return parser.parse_args()


if __name__ == "__main__":
    # What runs here must end in order however it is ended: it has servers and a database.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
