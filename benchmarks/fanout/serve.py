"""One contender under uvicorn: ``python -m benchmarks.fanout.serve MODULE FUNCTION PORT URI``.

The same settings for all: one process, uvloop, httptools, no access log.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import resource
import sys
import threading

import uvicorn
import uvloop

from . import contenders


async def serve(module: str, function: str, port: int, uri: str) -> None:
    make = getattr(importlib.import_module(f".{module}", contenders.__name__), function)
    config = uvicorn.Config(
        make(uri),
        port=port,
        http="httptools",
        access_log=False,
        log_level="warning",
        lifespan="on",
        timeout_graceful_shutdown=1,
    )
    await uvicorn.Server(config).serve()


def end_with_parent() -> None:
    os.read(0, 1)  # returns when the parent ends, however it ends
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
