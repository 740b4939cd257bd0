"""Direct: the ``send`` inside wrappers that have nothing left to do once a response has started.

Starlette wraps ``send`` at least twice, to know afterwards whether a response had started. From
then on the wrappers only pass on what they get, for each event and client.
"""

from __future__ import annotations

import inspect
from typing import Any

from starlette.types import Message, Send

__all__ = ["direct"]


def _notices_the_start(send: Send) -> Send:
    """A wrapper as Starlette has them; others are compared with what it was compiled to."""
    response_started = False

    async def sender(message: Message) -> None:
        nonlocal response_started

        if message["type"] == "http.response.start":
            response_started = True
        await send(message)

    return sender


def _compiled(send: Send) -> tuple[Any, ...] | None:
    """What a function does, to the last instruction; ``None``: it is no function."""
    code = getattr(send, "__code__", None)
    if code is None:
        return None
    return (
        code.co_code,
        code.co_consts,
        code.co_names,
        code.co_varnames,
        code.co_freevars,
        code.co_exceptiontable,
    )


_PASSES_ON = _compiled(_notices_the_start(None))  # type: ignore[arg-type]  # nobody calls it


def direct(send: Send) -> Send:
    """Where the messages of a response that has started end up.

    Only what was compiled to the very instructions of the wrapper above is left out. Whatever else
    is in between, middleware or a wrapper of a Starlette to come, gets each message as before.
    """
    while _compiled(send) == _PASSES_ON:
        send = inspect.getclosurevars(send).nonlocals["send"]
    return send
