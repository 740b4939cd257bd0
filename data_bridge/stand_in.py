"""StandIn: acts for a task that waits, without waking it.

To wake the tasks of a thousand connections for one change costs as much as what they send: each
has a future, a place in the loop's queue and a dozen suspended coroutines of frameworks, none of
them in the processor's cache. So whoever has news takes a step for each of them instead.
"""

from __future__ import annotations

import asyncio
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from typing import Any

__all__ = ["StandIn"]


class StandIn(asyncio.Future[None]):
    """A future that a task awaits, and meanwhile others call ``act()``.

    What that does for the task it does with ``run``: to the coroutine everything looks as if the
    task ran it, the current task and the context too. If it has to wait, the task wakes up and
    goes on with it. ``act()`` belongs into a callback of the loop, not into another task:
    https://docs.python.org/3/library/asyncio-extending.html#task-lifetime-support
    """

    __slots__ = ("_begun", "_called", "_context", "_runs_in", "_step", "_task", "_yielded")

    def __init__(self, task: asyncio.Task[Any], step: Callable[[], None]) -> None:
        self._runs_in = task.get_loop()
        super().__init__(loop=self._runs_in)
        self._task = task
        self._step = step
        self._context: Context | None = None
        self._begun: Coroutine[Any, Any, None] | None = None  # what the task has to finish
        self._yielded: Any = None
        self._called = False

    def add_done_callback(
        self, callback: Callable[[Any], object], /, *, context: Context | None = None
    ) -> None:
        """As of any future; a task that awaits it brings its own context."""
        self._context = context
        super().add_done_callback(callback, context=context)

    def act(self) -> None:
        """Take the step, unless the task is about to wake up and will take it itself."""
        if not self.done():
            self._step()

    def call(self) -> None:
        """Have ``act()`` called by the loop; may be called from a task."""
        if not self._called:
            self._called = True
            self._runs_in.call_soon(self._call)

    def _call(self) -> None:
        self._called = False
        self.act()

    def wake(self) -> None:
        """Let the task itself go on."""
        if not self.done():
            self.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Let the task itself go on, with an exception."""
        if not self.done():
            self.set_exception(error)

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the task's name, as far as it goes without waiting."""
        loop, task = self._runs_in, self._task
        assert self._context is not None
        _enter_task(loop, task)
        try:
            self._yielded = self._context.run(coroutine.send, None)
        except StopIteration:
            return
        except (Exception, asyncio.CancelledError) as error:
            self.fail(error)
        else:
            self._begun = coroutine
            self.wake()
        finally:
            _leave_task(loop, task)

    def __await__(self) -> Generator[Any, Any, None]:
        cancelled: BaseException | None = None
        try:
            yield from super().__await__()
        except asyncio.CancelledError as error:
            if self._begun is None:
                raise
            cancelled = error
        if self._begun is not None:
            yield from _rest(self._begun, self._yielded, cancelled)


def _rest(
    coroutine: Coroutine[Any, Any, None], yielded: Any, error: BaseException | None
) -> Generator[Any, Any, None]:
    """What is left of a coroutine that has been begun by hand; ``yielded`` is what it waits for."""
    try:
        while True:
            if error is None:
                try:
                    yield yielded
                except GeneratorExit:
                    coroutine.close()
                    raise
                except BaseException as thrown:  # every one is the coroutine's to deal with
                    error = thrown
            if error is None:
                yielded = coroutine.send(None)
            else:
                yielded = coroutine.throw(error)
                error = None
    except StopIteration:
        return
