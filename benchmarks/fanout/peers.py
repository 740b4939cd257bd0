"""What a contender needs to run: Python packages, Node.js and what npm installs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .plan import Contender

NODE = Path(__file__).resolve().parent / "node"
_INSTALL = 120.0  # seconds


class Peers:
    """The contenders' surroundings, for one run."""

    def __init__(self, directory: Path) -> None:
        self._node = directory / "node"
        self._refusal: str | None = None

    def missing(self, contender: Contender) -> str:
        """Why a contender cannot run here; empty if it can."""
        if contender.node and (refusal := self._installed()):
            return refusal
        for module in contender.needs:
            try:
                found = importlib.util.find_spec(module)
            except ModuleNotFoundError:
                found = None
            if found is None:
                return f"needs {module.partition('.')[0]}"
        return ""

    def command(self, contender: Contender) -> list[str]:
        """What starts a contender in Node, but for the port and the URI."""
        return ["node", str(self._node / "server.mjs"), *contender.node]

    def _installed(self) -> str:
        if self._refusal is None:
            self._refusal = self._install()
        return self._refusal

    def _install(self) -> str:
        """Put the Node server and what it needs, as its lock file has it, into a directory."""
        if not (shutil.which("node") and shutil.which("npm")):
            return "needs Node.js and npm"
        self._node.mkdir()
        for name in ("package.json", "package-lock.json", "server.mjs"):
            shutil.copy(NODE / name, self._node)
        command = ["npm", "ci", "--no-audit", "--no-fund", "--loglevel=error"]
        try:
            subprocess.run(
                command, cwd=self._node, check=True, capture_output=True, timeout=_INSTALL
            )
        except (subprocess.SubprocessError, OSError) as error:
            return f"npm could not install what it needs ({type(error).__name__})"
        return ""


def node_versions() -> dict[str, str]:
    """Versions that Python's metadata does not know."""
    if not shutil.which("node"):
        return {}
    asked = subprocess.run(["node", "--version"], capture_output=True, text=True, check=False)
    dependencies: dict[str, str] = json.loads((NODE / "package.json").read_text())["dependencies"]
    named = {
        ("mongodb (npm)" if name == "mongodb" else name): v for name, v in dependencies.items()
    }
    return {"Node.js": asked.stdout.strip().lstrip("v"), **named}


@contextlib.contextmanager
def peers() -> Iterator[Peers]:
    """The surroundings, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fanout-peers-") as directory:
        yield Peers(Path(directory))
