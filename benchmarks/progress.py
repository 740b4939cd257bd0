"""A bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time

_WIDTH = 30


class Progress:
    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0
        self._began = time.monotonic()
        self._tty = sys.stderr.isatty()
        self._now = ""

    def show(self, now: str) -> None:
        """What is being done."""
        self._now = now
        if self._tty:
            filled = int(_WIDTH * self._done / max(1, self._steps))
            bar = "━" * filled + "╌" * (_WIDTH - filled)
            minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
            line = f"{bar} {self._done}/{self._steps} {minutes}:{seconds:02} {now}"
            self._erase()
            sys.stderr.write(line[: shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()

    def line(self, text: str) -> None:
        """A result, above the bar."""
        self._erase()
        print(text, flush=True)
        self.show(self._now)

    def step(self, number: int = 1) -> None:
        """So many steps are done."""
        self._done += number
        self.show(self._now)

    def close(self) -> None:
        """Leave no bar behind."""
        self._erase()

    def _erase(self) -> None:
        if self._tty:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
