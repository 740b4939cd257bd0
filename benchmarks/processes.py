"""The processes of a run: how they are started and ended, and what they use."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
_TICK = os.sysconf("SC_CLK_TCK")


class Collapsed(Exception):
    """A process did not answer in time, or is gone."""


class Child:
    """A process that answers lines of JSON, or one that just runs."""

    def __init__(self, *command: str) -> None:
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 (closed by end())
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,  # Ctrl-C is for the parent, which ends its children in order
            bufsize=0,
        )
        self.pid = self.process.pid
        self._read = b""

    def tell(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        except BrokenPipeError as error:
            raise Collapsed(f"process {self.pid} is gone") from error

    def ask(self, do: str, timeout: float = 60, **arguments: Any) -> dict[str, Any]:
        self.tell(do, **arguments)
        return self.answer(timeout)

    def answer(self, timeout: float = 60) -> dict[str, Any]:
        assert self.process.stdout is not None
        until = time.monotonic() + timeout
        while b"\n" not in self._read:
            ready, _, _ = select.select(
                [self.process.stdout], [], [], max(0.0, until - time.monotonic())
            )
            if not ready:
                raise Collapsed(f"process {self.pid} did not answer within {timeout:g} s")
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                raise Collapsed(f"process {self.pid} is gone")
            self._read += data
        line, self._read = self._read.split(b"\n", 1)
        reply: dict[str, Any] = json.loads(line)
        return reply

    @property
    def last_words(self) -> str:
        """The last line of what the process wrote to stderr."""
        file = self.said.fileno()
        said = os.pread(file, os.fstat(file).st_size, 0)  # the child has the same file position
        lines = said.decode(errors="replace").strip().splitlines()
        return lines[-1][:160] if lines else ""

    @property
    def cpu(self) -> float:
        """Seconds of processor time so far, user and system, all threads."""
        with open(f"/proc/{self.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    @property
    def rss(self) -> int:
        """Resident memory in bytes."""
        with open(f"/proc/{self.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(3)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.said):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


def python(module: str, *arguments: str) -> Child:
    """A module of the benchmarks as a process: ``python("fanout.client")``."""
    return Child(sys.executable, "-m", f"benchmarks.{module}", *arguments)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_port(child: Child, port: int, timeout: float = 30) -> None:
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if child.process.poll() is not None:
            raise Collapsed(f"the server ended: {child.last_words}")
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise Collapsed(f"nothing listens on port {port} after {timeout:g} s")
