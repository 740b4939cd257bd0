"""The command: a demo that leaves nothing behind, changes in a terminal, and a check-up."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from data_bridge import cli
from data_bridge.embedded import ReplicaSet

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "data_bridge"]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "DATA_BRIDGE_URI"},
    "PYTHONPATH": str(ROOT),
}
Client = MongoClient[dict[str, Any]]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, run to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        env={**ENVIRONMENT, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextlib.contextmanager
def running(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command while it runs, its two outputs in one."""
    with subprocess.Popen(
        [*COMMAND, *arguments],
        env={**ENVIRONMENT, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def until(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """Read what a command prints until a line matches."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if found := re.search(pattern, line):
            return found
    raise AssertionError(f"it ended without {pattern!r}:\n{said}")


def rest(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.read()


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def processes_of(marker: str) -> list[str]:
    """Command lines of the processes that mention *marker* (in a list, to be shown on failure)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if marker in line:
                found.append(line)
    return found


# -- the command itself -------------------------------------------------------------------------


def test_the_version_is_printed() -> None:
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"data-bridge (\d+\.\d+\.\d+|\(from a checkout\))\n", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "arguments are required: command"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--port", "65536"], "a port is a number from 0 to 65535, not '65536'"),
        (["demo", "--port", "http"], "a port is a number from 0 to 65535, not 'http'"),
        (["demo", "--rate", "nan"], "a rate is a number from 0 to 10000, not 'nan'"),
        (["demo", "--rate=-1"], "a rate is a number from 0 to 10000, not '-1'"),
    ],
)
def test_wrong_usage_is_named(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("mongodb://a", "mongodb://a/shop"),
        ("mongodb://a/", "mongodb://a/shop"),
        ("mongodb://a:1,b:2/?replicaSet=r", "mongodb://a:1,b:2/shop?replicaSet=r"),
        ("mongodb://a?replicaSet=r", "mongodb://a/shop?replicaSet=r"),
        ("mongodb+srv://u:p%2F@a/mine?w=1", "mongodb+srv://u:p%2F@a/mine?w=1"),
    ],
)
def test_a_uri_without_a_database_gets_one(uri: str, expected: str) -> None:
    assert cli._with_database(uri, "shop") == expected


def test_passwords_are_not_printed() -> None:
    shown = cli._without_password("mongodb://ada:s%40cret@a:1/shop")
    assert shown == "mongodb://ada:***@a:1/shop"


# -- demo ---------------------------------------------------------------------------------------


def first_events(url: str | urllib.request.Request, count: int) -> list[str]:
    """The data of the first events of a stream."""
    found: list[str] = []
    with urllib.request.urlopen(url, timeout=30) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        for line in response:
            if line.startswith(b"data:"):
                found.append(line[5:].strip().decode())
                if len(found) == count:
                    break
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_streams_orders_and_leaves_nothing_behind(
    tmp_path: Path, how: signal.Signals
) -> None:
    with running("demo", "--port", "0", "--rate", "20", TMPDIR=str(tmp_path)) as demo:
        address = until(demo, r"dashboard: +(http://127\.0\.0\.1:\d+)$")[1]
        assert until(demo, r"curl -N (\S+)$")[1] == f"{address}/orders/live"
        (directory,) = tmp_path.glob("data-bridge-*")
        assert processes_of(str(directory))
        with urllib.request.urlopen(address, timeout=30) as page:
            assert page.headers["Content-Type"].startswith("text/html")
        with urllib.request.urlopen(f"{address}/orders/live", timeout=30):  # open while it ends
            assert all(json.loads(data) for data in first_events(f"{address}/orders/live", 3))
            demo.send_signal(how)
            said = rest(demo)
        assert demo.wait(20) == 0
    assert "Traceback" not in said
    assert "Stopped." in said
    assert processes_of(str(directory)) == []
    assert list(tmp_path.iterdir()) == []


def test_the_demo_of_parcels_prints_how_to_follow_one_customers(
    mongo: Client, database_name: str, database_uri: str
) -> None:
    with running("demo", "tracking", "--port", "0", "--rate", "20", "--uri", database_uri) as demo:
        address = until(demo, r"parcels: +(http://127\.0\.0\.1:\d+)$")[1]
        cookie, url = until(demo, r"curl -N -b (\S+) (\S+)$").groups()
        assert url == f"{address}/my/parcels"
        request = urllib.request.Request(url, headers={"Cookie": cookie})
        ready, *_ = (json.loads(data) for data in first_events(request, 3))
        assert all("margin" not in parcel for parcel in ready["documents"])
        demo.send_signal(signal.SIGTERM)
        assert "Traceback" not in rest(demo)
        assert demo.wait(20) == 0


def test_a_demo_that_is_interrupted_while_it_starts_leaves_nothing_behind(tmp_path: Path) -> None:
    with running("demo", "--port", "0", TMPDIR=str(tmp_path)) as demo:
        until(demo, "Starting")
        demo.send_signal(signal.SIGINT)
        said = rest(demo)
        assert demo.wait(20) == 0
    assert "Traceback" not in said
    assert processes_of(str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_demo_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    with running("demo", "--port", "0", TMPDIR=str(tmp_path)) as demo:
        until(demo, "dashboard")
        demo.kill()
        demo.wait(20)
        assert eventually(lambda: processes_of(str(tmp_path)) == [])
        assert eventually(lambda: list(tmp_path.iterdir()) == [])


def test_the_demo_takes_the_next_port_and_says_so(database_uri: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with running("demo", "--uri", database_uri, "--port", str(port), "--rate", "0") as demo:
            other = int(until(demo, rf"Port {port} is taken: using (\d+)\.")[1])
            assert port < other <= port + cli.PORTS_TO_TRY
            assert until(demo, "dashboard: +(.+)")[1] == f"http://127.0.0.1:{other}"


def test_the_demo_uses_the_database_that_is_named(
    mongo: Client, database_name: str, database_uri: str, tmp_path: Path
) -> None:
    arguments = ("demo", "--port", "0", "--rate", "20")
    with running(*arguments, DATA_BRIDGE_URI=database_uri, TMPDIR=str(tmp_path)) as demo:
        until(demo, "dashboard")
        orders = mongo[database_name]["orders"]
        assert eventually(lambda: orders.count_documents({}) > 1)
        assert list(tmp_path.iterdir()) == []  # and starts none
        demo.send_signal(signal.SIGTERM)
        assert "Traceback" not in rest(demo)
        assert demo.wait(20) == 0


def test_a_demo_without_a_database_server_says_what_to_install(tmp_path: Path) -> None:
    done = run("demo", "--port", "0", DATA_BRIDGE_MONGOD=str(tmp_path / "mongod"))
    assert done.returncode == 1
    assert "data-bridge: the mongod named by DATA_BRIDGE_MONGOD cannot be run" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["demo", "--port", "0", "--uri"], ["tail"]])
def test_an_unreachable_database_is_one_line_and_no_traceback(command: list[str]) -> None:
    uri = "mongodb://127.0.0.1:1/shop.orders?serverSelectionTimeoutMS=300"
    done = run(*command, uri if command == ["tail"] else uri.replace(".orders", ""))
    assert done.returncode == 1
    assert re.fullmatch(r"data-bridge: .*no MongoDB server answered.*\n", done.stderr)


def test_all_ports_taken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "PORTS_TO_TRY", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(cli._Refused, match="are all taken: choose one with --port"):
            cli._listen("127.0.0.1", taken.getsockname()[1])


def test_an_address_that_is_not_ours_is_said() -> None:
    with pytest.raises(cli._Refused, match=r"cannot listen on 192\.0\.2\.1:0: "):
        cli._listen("192.0.2.1", 0)


def test_a_second_signal_ends_the_command_at_once() -> None:
    script = """
import signal, sys, time
from data_bridge import cli
with cli._signals():
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("unwinding", flush=True)
        time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "unwinding\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


# -- tail ---------------------------------------------------------------------------------------


def tailed(database_uri: str, collection: str = "orders") -> str:
    return database_uri.replace("?", f".{collection}?")


def test_tail_prints_each_change_as_a_line_of_json(
    mongo: Client, database_name: str, database_uri: str
) -> None:
    orders = mongo[database_name]["orders"]
    with running("tail", tailed(database_uri), "-n", "3") as tail:
        until(tail, f"watching {database_name}.orders from now")
        orders.insert_one({"_id": 1, "status": "open", "total": 4.5})
        orders.update_one({"_id": 1}, {"$set": {"status": "paid"}})
        orders.delete_one({"_id": 1})
        lines = [json.loads(line) for line in rest(tail).splitlines()]
        assert tail.wait(20) == 0
    assert [(line["operation"], line["id"]) for line in lines] == [
        ("insert", 1),
        ("update", 1),
        ("delete", 1),
    ]
    assert lines[0]["document"] == {"_id": 1, "status": "open", "total": 4.5}
    assert lines[1]["update_description"]["updatedFields"] == {"status": "paid"}
    assert lines[2]["document"] is None


def test_tail_goes_on_after_a_position(
    mongo: Client, database_name: str, database_uri: str
) -> None:
    orders = mongo[database_name]["orders"]
    with running("tail", tailed(database_uri), "-n", "1") as tail:
        until(tail, "watching")
        orders.insert_many([{"_id": i} for i in range(3)])
        (line,) = rest(tail).splitlines()
    for position in ("resume_token", "timestamp"):
        after = json.loads(line)[position]
        expected = [1, 2] if position == "resume_token" else [0, 1]
        done = run("tail", tailed(database_uri), "-n", "2", "--resume-after", after)
        assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == expected


def test_tail_prints_what_a_browser_would_be_sent(
    mongo: Client, database_name: str, database_uri: str
) -> None:
    orders = mongo[database_name]["orders"]
    with running("tail", tailed(database_uri), "--sse", "-n", "1") as tail:
        until(tail, "watching")
        orders.insert_one({"_id": 1})
        frame = rest(tail)
    assert frame.endswith("\n\n")
    fields = dict(line.split(": ", 1) for line in frame.split("\n") if line)
    assert fields["event"] == "insert"
    assert fields["id"]
    assert json.loads(fields["data"]) == {"operation": "insert", "id": 1, "document": {"_id": 1}}


def test_tail_ends_on_ctrl_c_without_a_traceback(database_uri: str) -> None:
    with running("tail", tailed(database_uri)) as tail:
        until(tail, "watching")
        tail.send_signal(signal.SIGINT)
        assert rest(tail) == ""
        assert tail.wait(20) == 130


def test_tail_ends_quietly_when_nobody_reads(
    mongo: Client, database_name: str, database_uri: str
) -> None:
    with subprocess.Popen(
        [*COMMAND, "tail", tailed(database_uri)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as tail:
        assert tail.stdout is not None
        assert tail.stderr is not None
        assert "watching" in tail.stderr.readline()
        tail.stdout.close()
        mongo[database_name]["orders"].insert_one({})
        assert tail.stderr.read() == ""
        assert tail.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["tail", "mongodb://127.0.0.1/shop"], "which collection?"),
        (["tail", "shop.orders"], "that is no MongoDB connection string"),
        (["doctor", "127.0.0.1:27017"], "that is no MongoDB connection string"),
    ],
)
def test_a_target_that_cannot_be_watched_is_said(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 1
    assert reason in capsys.readouterr().err


def test_a_resume_position_that_is_none_is_said(database_uri: str) -> None:
    done = run("tail", tailed(database_uri), "--resume-after", "yesterday")
    assert done.returncode == 1
    assert done.stderr.startswith("data-bridge: ")
    assert "Traceback" not in done.stderr


# -- doctor -------------------------------------------------------------------------------------


def findings(text: str) -> dict[str, tuple[str, str]]:
    lines = [line.split(maxsplit=2) for line in text.splitlines()]
    return {check: (level, rest) for level, check, rest in lines}


def test_the_doctor_finds_a_replica_set_well(
    mongo: Client, database_name: str, database_uri: str
) -> None:
    mongo[database_name].create_collection("orders", changeStreamPreAndPostImages={"enabled": True})
    mongo[database_name].create_collection("plain")
    done = run("doctor", database_uri)
    found = findings(done.stdout)
    assert done.returncode == 0
    assert list(found) == [
        "reachable",
        "credentials",
        "topology",
        "version",
        "oplog",
        "pre-images",
        "watch",
    ]
    assert found["topology"] == ("ok", "replica set rs0; data-bearing members: 1")
    assert found["oplog"][0] == "ok"
    assert "hours" in found["oplog"][1]
    assert found["pre-images"] == ("ok", "1 of 2 collections keep them: orders")
    assert found["watch"] == ("ok", "a change stream opens")


def test_the_doctor_says_how_to_get_pre_images(
    mongo: Client, database_name: str, database_uri: str
) -> None:
    mongo[database_name].create_collection("orders")
    done = run("doctor", database_uri)
    assert done.returncode == 0
    level, text = findings(done.stdout)["pre-images"]
    assert level == "warn"
    assert "collMod" in text


def test_the_doctor_says_that_the_oplog_is_short() -> None:
    with ReplicaSet(oplog_mb=2) as replica_set, Client(replica_set.uri) as client:
        numbers = iter(range(10_000))

        def full() -> bool:
            next(numbers)
            client.shop.orders.insert_many([{"filling": "x" * 50_000} for _ in range(20)])
            stats = client.local.command("collStats", "oplog.rs")
            return bool(stats["size"] > 0.95 * stats["maxSize"])

        assert eventually(full)
        done = run("doctor", replica_set.database_uri("shop"))
    assert done.returncode == 0
    level, text = findings(done.stdout)["oplog"]
    assert level == "warn"
    assert "replSetResizeOplog" in text


def test_the_doctor_finds_a_standalone_server_unfit() -> None:
    with ReplicaSet(replica=False) as alone:
        done = run("doctor", alone.database_uri("shop"))
    assert done.returncode == 1
    found = findings(done.stdout)
    assert found["topology"][0] == "fail"
    assert "--replSet" in found["topology"][1]
    assert found["watch"][0] == "fail"


def test_the_doctor_finds_nobody_there() -> None:
    done = run("doctor", "mongodb://ada:secret@127.0.0.1:1/shop?connectTimeoutMS=300")
    assert done.returncode == 1
    assert list(findings(done.stdout)) == ["reachable"]
    assert findings(done.stdout)["reachable"][0] == "fail"
    assert "secret" not in done.stdout


@pytest.fixture(scope="module")
def guarded() -> Iterator[ReplicaSet]:
    """A set that asks for credentials, with a user who may do little."""
    with ReplicaSet(auth=("ada", "right")) as replica_set, Client(replica_set.uri) as client:
        client.shop.command({"createUser": "bob", "pwd": "b", "roles": []})
        client.shop.command({"createUser": "eve", "pwd": "e", "roles": ["read"]})
        yield replica_set


def signed_in(replica_set: ReplicaSet, user: str) -> str:
    return f"mongodb://{user}@{replica_set.hosts[0]}/shop?replicaSet=rs0"


def test_the_doctor_finds_wrong_credentials(guarded: ReplicaSet) -> None:
    done = run("doctor", signed_in(guarded, "bob:wrong"))
    assert done.returncode == 1
    level, text = findings(done.stdout)["credentials"]
    assert level == "fail"
    assert "authSource" in text


def test_the_doctor_finds_a_missing_role(guarded: ReplicaSet) -> None:
    done = run("doctor", signed_in(guarded, "bob:b"))
    found = findings(done.stdout)
    assert done.returncode == 1
    assert found["credentials"] == ("ok", "signed in as bob@shop")
    assert found["watch"][0] == "fail"
    assert "role" in found["watch"][1]


def test_the_doctor_needs_no_administrator(guarded: ReplicaSet) -> None:
    done = run("doctor", signed_in(guarded, "eve:e"))
    found = findings(done.stdout)
    assert done.returncode == 0
    assert found["oplog"][0] == "warn"
    assert "not permitted" in found["oplog"][1]
    assert found["watch"] == ("ok", "a change stream opens")


def test_wrong_credentials_are_one_line_in_tail(guarded: ReplicaSet) -> None:
    done = run("tail", signed_in(guarded, "bob:wrong").replace("shop", "shop.orders"))
    assert done.returncode == 1
    assert re.fullmatch(r"data-bridge: .*refused the credentials.*\n", done.stderr)


def test_every_option_is_explained() -> None:
    def missing(parser: argparse.ArgumentParser) -> Iterator[str]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for choice in action.choices.values():
                    yield from missing(choice)
            elif not action.help:
                yield f"{parser.prog} {action.dest}"

    assert list(missing(cli._parser())) == []
