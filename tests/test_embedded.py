"""The embedded replica set: it starts, breaks and mends on request, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient
from pymongo.errors import ConnectionFailure, OperationFailure

from data_bridge import embedded
from data_bridge.embedded import JOURNAL_INTERVAL, ReplicaSet, find_mongod
from data_bridge.errors import EmbeddedServerFailed

Client = MongoClient[dict[str, Any]]


@pytest.fixture(scope="module")
def three() -> Iterator[ReplicaSet]:
    """Three nodes; every test leaves all of them running."""
    with ReplicaSet(3, fast_elections=True) as replica_set:
        yield replica_set


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


# -- starting and stopping ----------------------------------------------------------------------


def test_a_set_of_one_node_takes_writes_as_soon_as_it_has_started() -> None:
    with ReplicaSet() as replica_set, Client(replica_set.uri) as client:
        client.shop.orders.insert_one({"_id": 1})
        assert client.shop.orders.find_one() == {"_id": 1}
        assert client.admin.command("hello")["setName"] == "rs0"


def test_stopping_ends_the_server_and_removes_its_files() -> None:
    replica_set = ReplicaSet().start()
    pid, directory = replica_set.pid(), replica_set.directory
    assert directory is not None and directory.is_dir()
    replica_set.stop()
    assert not alive(pid)
    assert not directory.exists()
    replica_set.stop()  # a second time does nothing


def test_a_set_that_was_stopped_can_be_started_again() -> None:
    replica_set = ReplicaSet()
    for _ in range(2):
        with replica_set, Client(replica_set.uri) as client:
            assert client.list_database_names() == ["admin", "config", "local"]


def test_starting_twice_starts_one_server() -> None:
    with ReplicaSet() as replica_set:
        pid = replica_set.pid()
        assert replica_set.start().pid() == pid


def test_a_directory_that_was_named_is_kept_and_its_data_is_there_the_next_time(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "data"
    with ReplicaSet(directory=directory) as first, Client(first.uri) as client:
        client.shop.orders.insert_one({"_id": 1})
        ports = first.hosts
    with ReplicaSet(directory=directory) as second, Client(second.uri) as client:
        assert second.hosts != ports
        assert client.shop.orders.find_one() == {"_id": 1}


def test_a_kept_directory_with_credentials_is_opened_with_them_again(tmp_path: Path) -> None:
    for count in (1, 2):
        with ReplicaSet(directory=tmp_path, auth=("ada", "s:e/c@ret")) as kept:
            with Client(kept.uri) as client:
                client.shop.orders.insert_one({})
                assert client.shop.orders.count_documents({}) == count


def test_the_uri_names_every_node_the_set_and_the_database(three: ReplicaSet) -> None:
    hosts = ",".join(three.hosts)
    assert three.uri == f"mongodb://{hosts}/?replicaSet=rs0"
    assert three.database_uri("shop") == f"mongodb://{hosts}/shop?replicaSet=rs0"


def test_without_a_start_there_is_no_uri() -> None:
    with pytest.raises(EmbeddedServerFailed, match=r"start\(\)"):
        _ = ReplicaSet().uri


def test_servers_listen_on_the_loopback_address_only(replica_set: ReplicaSet) -> None:
    with Client(replica_set.uri) as client:
        options = client.admin.command("getCmdLineOpts")["parsed"]["net"]
    assert options["bindIp"] == "127.0.0.1"


def test_what_waits_for_the_journal_does_not_wait_long(replica_set: ReplicaSet) -> None:
    with Client(replica_set.uri) as client:
        storage = client.admin.command("getCmdLineOpts")["parsed"]["storage"]
    assert storage["journal"]["commitIntervalMs"] == JOURNAL_INTERVAL


def test_parameters_and_the_oplog_size_reach_the_server() -> None:
    with ReplicaSet(oplog_mb=3, parameters={"enableTestCommands": "1"}) as replica_set:
        with Client(replica_set.uri) as client:
            assert client.local.command("collStats", "oplog.rs")["maxSize"] == 3 << 20
            found = client.admin.command("getParameter", 1, enableTestCommands=1, syncdelay=1)
    assert found["enableTestCommands"] is True
    assert found["syncdelay"] == 1


def test_a_standalone_server_is_no_replica_set() -> None:
    with ReplicaSet(replica=False) as alone, Client(alone.uri) as client:
        client.shop.orders.insert_one({})
        with pytest.raises(OperationFailure) as caught:
            client.shop.orders.watch()
        assert caught.value.code == 40573


def test_a_set_with_credentials_refuses_whoever_has_none() -> None:
    with ReplicaSet(auth=("ada", "s:e/c@ret")) as guarded:
        with Client(guarded.uri) as client:
            client.shop.orders.insert_one({})
        with Client(f"mongodb://{guarded.hosts[0]}/?replicaSet=rs0") as client:
            with pytest.raises(OperationFailure) as caught:
                client.shop.orders.find_one()
            assert caught.value.code == 13
        assert guarded.directory is not None
        assert stat.S_IMODE((guarded.directory / "key").stat().st_mode) == 0o600


# -- breaking and mending -----------------------------------------------------------------------


def test_a_killed_node_keeps_its_port_and_what_it_acknowledged() -> None:
    with ReplicaSet() as replica_set:
        uri = replica_set.uri
        with Client(uri) as client:
            client.shop.orders.insert_one({"_id": 1})
            replica_set.kill()
            replica_set.restart()
            assert replica_set.uri == uri
            assert client.shop.orders.find_one() == {"_id": 1}


def test_a_set_that_steps_down_has_a_primary_again(three: ReplicaSet) -> None:
    before = three.wait_until_steady()
    three.step_down()
    assert eventually(lambda: three.primary not in (None, before))
    three.wait_until_steady()


def test_another_node_takes_over_from_a_killed_one(three: ReplicaSet) -> None:
    before = three.wait_until_steady()
    three.kill(before)
    assert three.wait_for_primary() != before
    three.restart(before)
    assert len([three.pid(node) for node in range(3)]) == 3
    three.wait_until_steady()


def test_a_suspended_node_answers_again_once_it_is_resumed() -> None:
    with ReplicaSet() as replica_set:
        with Client(
            replica_set.uri, serverSelectionTimeoutMS=300, connectTimeoutMS=300, socketTimeoutMS=300
        ) as client:
            replica_set.suspend()
            assert replica_set.primary is None
            with pytest.raises(ConnectionFailure):
                client.admin.command("ping")
            replica_set.resume()
            assert replica_set.wait_for_primary() == 0
            assert eventually(lambda: client.is_primary)


def test_a_suspended_node_does_not_hold_up_the_end() -> None:
    replica_set = ReplicaSet().start()
    pid = replica_set.pid()
    replica_set.suspend()
    replica_set.stop()
    assert not alive(pid)


def test_a_terminated_node_ends_by_itself() -> None:
    with ReplicaSet(parameters={"shutdownTimeoutMillisForSignaledShutdown": "100"}) as replica_set:
        pid = replica_set.pid()
        replica_set.terminate()
        assert not alive(pid)
        with pytest.raises(EmbeddedServerFailed, match="node 0 of rs0 does not run"):
            replica_set.pid()


# -- what goes wrong ----------------------------------------------------------------------------


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EmbeddedServerFailed, match=f"port {port} of 127.0.0.1 is taken"):
            ReplicaSet(port=port).start()


def test_a_free_port_that_is_taken_in_the_last_moment_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1], embedded.free_port()])
        monkeypatch.setattr(embedded, "free_port", lambda: next(ports))
        with ReplicaSet() as replica_set:
            assert replica_set.primary == 0


def test_a_server_that_does_not_start_is_quoted() -> None:
    with pytest.raises(EmbeddedServerFailed, match=r"(?s)exit code.*Unknown --setParameter 'nope'"):
        ReplicaSet(parameters={"nope": "1"}).start()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -ILL $$", "needs a processor with AVX"),
        (
            "echo 'mongod: error while loading shared libraries: libcrypto.so.3'; exit 127",
            "a system library is missing.*libcrypto",
        ),
        ("kill -SEGV $$", "ended by signal 11"),
        ("exit 7", "exit code 7.*nothing"),
    ],
)
def test_why_a_server_did_not_start_is_said_with_the_remedy(
    tmp_path: Path, script: str, reason: str
) -> None:
    mongod = executable(tmp_path / "mongod", f"#!/bin/sh\n{script}\n")
    with pytest.raises(EmbeddedServerFailed, match=f"(?s){reason}"):
        ReplicaSet(binary=mongod).start()


def test_a_failed_start_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(EmbeddedServerFailed):
        ReplicaSet(parameters={"nope": "1"}).start()
    assert list(tmp_path.iterdir()) == []


def test_mongod_is_taken_from_the_argument_then_the_environment_then_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("argument", "environment", "path"):
        (tmp_path / name).mkdir()
        executable(tmp_path / name / "mongod", "#!/bin/sh\n")
    monkeypatch.setenv("DATA_BRIDGE_MONGOD", str(tmp_path / "environment" / "mongod"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    argument = tmp_path / "argument" / "mongod"
    assert find_mongod(argument) == argument
    assert find_mongod() == tmp_path / "environment" / "mongod"
    monkeypatch.delenv("DATA_BRIDGE_MONGOD")
    assert find_mongod() == tmp_path / "path" / "mongod"


def test_a_mongod_that_was_named_and_is_missing_is_not_replaced_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATA_BRIDGE_MONGOD", "/nowhere/mongod")
    with pytest.raises(EmbeddedServerFailed, match=r"DATA_BRIDGE_MONGOD.*'/nowhere/mongod'"):
        find_mongod()


def test_where_there_is_no_mongod_the_remedy_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.delenv("DATA_BRIDGE_MONGOD", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(EmbeddedServerFailed, match=r"pip install 'data-bridge\[embedded\]'"):
        find_mongod()


# -- nothing outlives its owner -----------------------------------------------------------------

OWNER = """
import signal, sys, threading
from data_bridge.embedded import ReplicaSet
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
replica_set = ReplicaSet({nodes}, replica=False)
starter = threading.Thread(target=replica_set.start)  # a thread that ends before its servers do
starter.start()
starter.join()
{before}
print(replica_set.directory, *(replica_set.pid(i) for i in range({nodes})), flush=True)
sys.stdin.read()
"""


def owner(nodes: int = 1, before: str = "") -> tuple[subprocess.Popen[str], Path, list[int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(nodes=nodes, before=before)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert process.stdout is not None
    directory, *pids = process.stdout.readline().split()
    assert all(alive(int(pid)) for pid in pids)
    return process, Path(directory), [int(pid) for pid in pids]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_server_and_no_file_outlives_an_owner_that_was_killed(how: signal.Signals) -> None:
    process, directory, pids = owner(nodes=2 if how is signal.SIGKILL else 1)
    with process:
        process.send_signal(how)
        process.wait(20)
        assert eventually(lambda: not any(map(alive, pids)))
        assert eventually(lambda: not directory.exists())


def test_no_server_outlives_an_owner_that_forgot_to_stop_it() -> None:
    process, directory, pids = owner()
    with process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0
        assert eventually(lambda: not any(map(alive, pids)))
        assert eventually(lambda: not directory.exists())


def test_a_suspended_server_does_not_outlive_its_owner() -> None:
    process, directory, pids = owner(before="replica_set.suspend()")
    with process:
        process.kill()
        process.wait(20)
        assert eventually(lambda: not any(map(alive, pids)))
        assert eventually(lambda: not directory.exists())


def test_a_server_outlives_the_thread_that_started_it() -> None:
    replica_set = ReplicaSet()
    starter = threading.Thread(target=replica_set.start)
    starter.start()
    starter.join()
    try:
        assert replica_set.primary == 0
    finally:
        replica_set.stop()


def test_ctrl_c_in_a_terminal_does_not_reach_the_servers(replica_set: ReplicaSet) -> None:
    assert os.getsid(replica_set.pid()) != os.getsid(0)
