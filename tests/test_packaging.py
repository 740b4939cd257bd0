"""What is shipped: the wheel, the source distribution, the containers and the proxy before them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import served, unavailable

import data_bridge
from data_bridge import cli
from data_bridge.embedded import free_port

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


# -- distributions ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, and the wheel that was built from it and not from the checkout."""
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", directory)
    return directory


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone, unpacked by pip; its dependencies are those of the running tests."""
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel)
    return target


def test_the_wheel_contains_every_file_of_the_package_and_the_examples(wheel: Path) -> None:
    expected = {
        str(path.relative_to(base))
        for base, top in ((ROOT, "data_bridge"), (ROOT, "examples"))
        for path in (base / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected = {re.sub("^examples/", "data_bridge/examples/", name) for name in expected}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected
    assert "data_bridge/py.typed" in names
    assert "data_bridge/examples/tracking/app.py" in names


def test_the_source_distribution_contains_the_tests_and_nothing_local(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "tests/conftest.py", "Makefile"} <= names
    assert not [name for name in names if re.search(r"__pycache__|\.venv|\.pyc$|\.git/", name)]


def test_the_wheel_declares_its_command_its_plugin_and_its_types(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
    text = archive.read(entry_points).decode()
    assert "data-bridge = data_bridge.cli:main" in text
    assert "data_bridge = data_bridge.testing.plugin" in text


@pytest.mark.parametrize("example", cli.EXAMPLES)
def test_the_installed_command_finds_its_example(installed: Path, example: str) -> None:
    script = (
        "from data_bridge import cli; from pathlib import Path;"
        f"print(Path(cli._example({example!r}).__file__).relative_to(Path.cwd()))"
    )
    printed = run(sys.executable, "-c", script, cwd=installed, PYTHONPATH=str(installed))
    assert printed.strip() == f"data_bridge/examples/{example}/app.py"
    version = run(installed / "bin" / "data-bridge", "--version", PYTHONPATH=str(installed))
    assert version == f"data-bridge {PROJECT['version']}\n"


OPTIONAL = ("uvicorn", "fastapi", "httpx", "pytest", "mongomock_motor", "opentelemetry", "fiftyone")


def test_the_package_needs_none_of_its_extras_to_be_imported(installed: Path) -> None:
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}));"
        "import data_bridge, data_bridge.api, data_bridge.cli, data_bridge.embedded"
    )
    run(sys.executable, "-c", script, cwd=installed, PYTHONPATH=str(installed))


@pytest.mark.timeout(300)
def test_the_wheel_installs_and_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    script = "import data_bridge, data_bridge.api; print(data_bridge.Document.__name__)"
    assert run(python, "-P", "-c", script, cwd=tmp_path) == "Document\n"
    refused = subprocess.run(
        [tmp_path / "venv" / "bin" / "data-bridge", "demo"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 1
    assert "pip install 'data-bridge[demo]'" in refused.stderr


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["version"]
    assert getattr(data_bridge, "__version__", version) == version


# -- containers ---------------------------------------------------------------------------------


def dockerfile() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, continued lines joined."""
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in lines]


def test_the_dockerfile_copies_what_exists_and_what_docker_may_see() -> None:
    allowed = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    sources = [
        source
        for instruction, rest in dockerfile()
        if instruction == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    ]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in allowed, source
    needed = {PROJECT["readme"], "pyproject.toml", *PROJECT["license-files"]}
    assert needed <= set(sources)


def test_the_dockerfile_installs_extras_that_exist() -> None:
    extras = re.findall(r"\[([a-z,]+)\]\"", (DOCKER / "Dockerfile").read_text())
    assert extras
    for extra in ",".join(extras).split(","):
        assert extra in PROJECT["optional-dependencies"]


def test_the_image_does_not_run_as_root_and_starts_a_command_that_is_understood() -> None:
    instructions = dict(dockerfile())  # the last of each kind counts
    assert instructions["USER"] == "data-bridge"
    assert json.loads(instructions["ENTRYPOINT"]) == ["data-bridge"]
    options = cli._parser().parse_args(json.loads(instructions["CMD"]))
    assert (options.host, options.port) == ("0.0.0.0", 8000)
    assert f"127.0.0.1:{options.port}/" in instructions["HEALTHCHECK"]


def test_the_images_python_is_one_that_the_package_supports() -> None:
    for instruction, rest in dockerfile():
        if instruction == "FROM":
            version = re.match(r"python:3\.(\d+)-slim\b", rest)
            assert version is not None
            assert f"Programming Language :: Python :: 3.{version[1]}" in PROJECT["classifiers"]


def test_compose_starts_each_service_after_what_it_needs() -> None:
    for name, service in SERVICES.items():
        for other, condition in service.get("depends_on", {}).items():
            assert other in SERVICES, name
            assert condition == {"condition": "service_healthy"}
            built_here = SERVICES[other].get("image") == "data-bridge-demo"
            assert built_here or "healthcheck" in SERVICES[other], other
    assert set(SERVICES["app-1"]["depends_on"]) == {"mongo"}


def test_compose_builds_from_files_that_exist_and_mounts_them() -> None:
    for name in ("app-1", "app-2"):
        context = (DOCKER / SERVICES[name]["build"]["context"]).resolve()
        assert context == ROOT
        assert (context / SERVICES[name]["build"]["dockerfile"]).is_file()
    (mount,) = SERVICES["nginx"]["volumes"]
    assert (DOCKER / mount.split(":")[0]).is_file()
    assert {volume.split(":")[0] for volume in SERVICES["mongo"]["volumes"]} == {"mongo"}
    assert "mongo" in COMPOSE["volumes"]


def test_compose_runs_commands_that_are_understood() -> None:
    rates = []
    for name in ("app-1", "app-2"):
        options = cli._parser().parse_args(SERVICES[name]["command"])
        assert (options.host, options.port) == ("0.0.0.0", 8000)
        rates.append(options.rate)
        uri = SERVICES[name]["environment"]["DATA_BRIDGE_URI"]
        assert uri == "mongodb://mongo:27017/shop?replicaSet=rs0"
    assert sorted(map(bool, rates)) == [False, True]  # one shop writes
    mongod = SERVICES["mongo"]["command"]
    assert mongod[mongod.index("--replSet") + 1] == "rs0"


@pytest.mark.parametrize(
    ("initiated", "primary", "code"), [(False, False, 1), (True, False, 1), (True, True, 0)]
)
def test_the_replica_set_initiates_itself_once_and_is_healthy_with_a_primary(
    initiated: bool, primary: bool, code: int
) -> None:
    node = shutil.which("node")
    if node is None:
        unavailable("no node: install nodejs")
    kind, shell, *_, script = SERVICES["mongo"]["healthcheck"]["test"]
    assert (kind, shell) == ("CMD", "mongosh")
    stand_in = f"""
        const said = [];
        const rs = {{
            status() {{ if (!{json.dumps(initiated)}) throw new Error("no replset config") }},
            initiate(config) {{ said.push(config); return {{ok: 1}} }},
        }};
        const db = {{ hello: () => ({{isWritablePrimary: {json.dumps(primary)}}}) }};
        const quit = code => console.log(JSON.stringify({{code, said}}));
    """
    result = json.loads(run(str(node), "-e", stand_in + script))
    config = {"_id": "rs0", "members": [{"_id": 0, "host": "mongo:27017"}]}
    assert result == {"code": code, "said": [] if initiated else [config]}


# -- the proxy ----------------------------------------------------------------------------------


def nginx_conf(directory: Path, port: int, workers: list[int]) -> Path:
    """docker/nginx.conf as it is, but for addresses and the places of its files."""
    text = (DOCKER / "nginx.conf").read_text()
    for name, worker in zip(("app-1", "app-2"), workers, strict=True):
        assert f"server {name}:8000 " in text
        text = text.replace(f"server {name}:8000 ", f"server 127.0.0.1:{worker} ")
    assert "listen 80;" in text
    text = text.replace("listen 80;", f"listen 127.0.0.1:{port};")
    places = "".join(
        f"    {kind}_temp_path {directory}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = text.replace("http {\n", f"http {{\n    access_log off;\n{places}", 1)
    user = "user root;\n" if os.geteuid() == 0 else ""
    path = directory / "nginx.conf"
    path.write_text(f"{user}pid {directory}/pid;\nerror_log stderr;\n{text}")
    return path


@pytest.fixture
def nginx() -> str:
    path = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if path is None:
        unavailable("no nginx: install nginx-light")
    return str(path)


def test_nginx_accepts_its_configuration(nginx: str, tmp_path: Path) -> None:
    path = nginx_conf(tmp_path, 8080, [8001, 8002])
    printed = run(nginx, "-t", "-p", tmp_path, "-c", path, "-e", "stderr")
    assert "test is successful" in printed
    assert "warn" not in printed


def test_the_proxys_upstreams_are_the_services_of_compose() -> None:
    text = (DOCKER / "nginx.conf").read_text()
    upstreams = re.findall(r"server ([\w-]+):(\d+) max_fails=0;", text)
    assert upstreams == [("app-1", "8000"), ("app-2", "8000")]
    assert {name for name, _ in upstreams} == {n for n in SERVICES if n.startswith("app-")}
    assert SERVICES["nginx"]["ports"] == ["127.0.0.1:8080:80"]


async def test_nginx_passes_each_event_on_at_once_and_the_end_back(
    nginx: str, tmp_path: Path
) -> None:
    received = asyncio.Event()
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        """Its second event waits until the first has arrived behind the proxy."""
        if scope["type"] != "http":
            return
        headers = [(b"content-type", b"text/event-stream")]
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(received.wait(), loop))
        await send({"type": "http.response.body", "body": b"data: 2\n\n", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        loop.call_soon_threadsafe(gone.set)

    port = free_port()
    async with asyncio.timeout(60), served(app, lifespan="off") as one:
        path = nginx_conf(tmp_path, port, [one.port, one.port])
        command = shlex.join([nginx, "-p", str(tmp_path), "-c", str(path), "-e", "stderr"])
        process = await asyncio.create_subprocess_shell(f"exec {command} -g 'daemon off;'")
        try:
            await accepting(port)
            async with (
                httpx.AsyncClient() as client,
                client.stream("GET", f"http://127.0.0.1:{port}/") as response,
            ):
                chunks = response.aiter_bytes()
                assert await anext(chunks) == b"data: 1\n\n"
                received.set()
                assert await anext(chunks) == b"data: 2\n\n"
            await gone.wait()
        finally:
            process.terminate()
            await process.wait()


async def accepting(port: int) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.02)
        else:
            writer.close()
            await writer.wait_closed()
            return
