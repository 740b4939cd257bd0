"""Where a run took place: what its figures cannot be read without."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from pymongo import MongoClient

from .orders import WRITE_CONCERN, document_bytes


def environment(mongo: MongoClient[dict[str, Any]], *packages: str) -> dict[str, Any]:
    """The machine, the versions, what is written and how; taken before the load begins."""
    versions = {"MongoDB": mongo.server_info()["version"], "Python": platform.python_version()}
    for name in ("data-bridge", "pymongo", "motor", "pydantic", *packages):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
        "load_before": round(os.getloadavg()[0], 1),
        "document_bytes": document_bytes(),
        "write_concern": WRITE_CONCERN,
    }


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def header(found: dict[str, Any]) -> str:
    """The environment as lines of a report."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    busy = found["load_before"] > found["cores"] / 2
    warning = (
        "  \n**The machine was busy with other work: these figures are rough.**" if busy else ""
    )
    return (
        f'Writes with w:"{found["write_concern"]}" to a replica set of one node, documents of '
        f"{found['document_bytes']} bytes of BSON, {found['cores']} cores for everything "
        f"({found['system']}, load {found['load_before']} before the run).  \n{versions}.{warning}"
    )


def results(chosen: Path | None, quick: bool) -> Path:
    """The directory for a report. A quick run keeps its figures away from those that are shown."""
    default = Path(__file__).resolve().parent / "results"
    out = chosen or (default / "quick" if quick else default)
    out.mkdir(parents=True, exist_ok=True)
    return out
