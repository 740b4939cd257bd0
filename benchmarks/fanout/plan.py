"""Who runs, and what."""

from __future__ import annotations

from dataclasses import dataclass

from .marks import MARK, SPACED


@dataclass(frozen=True)
class Row:
    """One load: so many clients, so many changes, at a rate or in one insert."""

    name: str
    clients: int
    rate: float | None  # changes a second; None: one insert_many
    changes: int
    limit: float  # seconds after which what has arrived is all that counts

    @property
    def title(self) -> str:
        pace = f"one insert of {self.changes:,}" if self.rate is None else f"{self.rate:,.0f}/s"
        return f"{self.clients:,} clients × {pace}"


@dataclass(frozen=True)
class Contender:
    key: str
    title: str
    rows: tuple[str, ...]
    serve: tuple[str, str] | None = None  # a module of contenders/ and a function in it
    node: tuple[str, ...] = ()  # or arguments of node/server.mjs
    needs: tuple[str, ...] = ()
    ours: bool = False
    mark: str = MARK  # what stands before the number of a change in its events
    rounds: int = 1  # how often; the figures are the medians


ROWS = {
    row.name: row
    for row in (
        # Leaves the limit half a core: without room, a server joins changes because it must.
        Row("calm", 1000, 20, 80, 12),
        Row("busy", 1000, 500, 1500, 12),
        Row("burst", 1000, None, 2000, 12),
        Row("busy-100", 100, 500, 1000, 90),
        Row("burst-100", 100, None, 1000, 90),
    )
}
QUICK = {
    row.name: row
    for row in (
        Row("calm", 100, 20, 40, 5),
        Row("busy", 100, 500, 500, 5),
        Row("burst", 100, None, 500, 5),
        Row("busy-100", 20, 500, 200, 10),
        Row("burst-100", 20, None, 200, 10),
    )
}

MANY = ("calm", "busy", "burst")
FEW = ("busy-100", "burst-100")
# What the promises compare with the limit is measured several times, in turn with it: on a machine
# that does other things as well, one reading of each would compare two moments.
ROUNDS = 3

BARE, BARE_FEW = "bare", "bare_100"
CONTENDERS = (
    Contender(BARE, "bare ASGI broadcast (the limit)", MANY, ("bare", "broadcast"), rounds=ROUNDS),
    Contender(
        "data_bridge_pymongo",
        "data-bridge, PyMongo",
        MANY,
        ("ours", "plain_pymongo"),
        ours=True,
        rounds=ROUNDS,
    ),
    Contender(
        "data_bridge_motor",
        "data-bridge, Motor",
        MANY,
        ("ours", "plain_motor"),
        needs=("motor",),
        ours=True,
        rounds=ROUNDS,
    ),
    Contender(
        "data_bridge_shaped",
        "data-bridge, own event and data",
        MANY,
        ("ours", "shaped_pymongo"),
        ours=True,
    ),
    Contender(
        "sse_starlette_shared",
        "sse-starlette, one stream",
        MANY,
        ("sse_starlette", "one_stream"),
        needs=("sse_starlette",),
    ),
    Contender(
        "fastapi_shared",
        "FastAPI SSE, one stream",
        MANY,
        ("fastapi", "one_stream"),
        needs=("fastapi.sse",),
    ),
    Contender("better_sse_shared", "better-sse (Node), one stream", MANY, node=("shared",)),
    Contender(BARE_FEW, "bare ASGI broadcast (the limit)", FEW, ("bare", "broadcast")),
    Contender(
        "data_bridge_pymongo_100",
        "data-bridge, PyMongo",
        FEW,
        ("ours", "plain_pymongo"),
        ours=True,
    ),
    Contender(
        "data_bridge_generator_pymongo",
        "data-bridge, generator, PyMongo",
        FEW,
        ("ours", "generator_pymongo"),
        ours=True,
        mark=SPACED,
    ),
    Contender(
        "data_bridge_generator_motor",
        "data-bridge, generator, Motor",
        FEW,
        ("ours", "generator_motor"),
        needs=("motor",),
        ours=True,
        mark=SPACED,
        rounds=ROUNDS,
    ),
    Contender(
        "sse_starlette_per_client",
        "sse-starlette, Motor stream per client",
        FEW,
        ("sse_starlette", "stream_per_client"),
        needs=("sse_starlette", "motor"),
        mark=SPACED,
    ),
    Contender(
        "better_sse_per_client",
        "better-sse (Node), stream per client",
        FEW,
        node=("per-client",),
    ),
)
