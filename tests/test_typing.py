"""What type checkers infer of the package: a live query of orders is one of orders."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, unavailable

pytestmark = pytest.mark.timeout(180)

MODELS = """
from pydantic import BaseModel
from data_bridge import Change, Document, LiveEvent, LiveStream, merge

class Order(Document):
    status: str
    total: float
    class Settings:
        collection = "orders"

class Customer(Document):
    name: str
    class Settings:
        collection = "customers"

class Third(Document):
    name: str
    class Settings:
        collection = "thirds"

class View(BaseModel):
    total: float
"""

INFERRED = {
    "Order.live()": "LiveStream[Order]",
    "Order.live({'status': 'open'}, sort='-total', limit=3)": "LiveStream[Order]",
    "Order.live(view=View)": "LiveStream[View]",
    "Order.live({'status': 'open'}, view=View)": "LiveStream[View]",
    "merge(Order.live(), Customer.live())": "LiveStream[Order | Customer]",
    "merge(Order.live(view=View), Customer.live())": "LiveStream[View | Customer]",
    "merge(Order.live(), Customer.live(), Third.live())": "LiveStream[Order | Customer | Third]",
    "Order.watch()": "ChangeStream[Order]",
    "change.full_document": "Order | None",
    "change.full_document_before_change": "Order | None",
    "event.full_document": "Order | None",
    "event.documents": "list[Order]",
    "event.documents[0].total": "float",
    "event.operation": "str",
    "either.full_document": "Order | Customer | None",
    "entered": "LiveStream[View]",
}

LOOPS = """
async def look(change: Change[Order]) -> None:
    event = [event async for event in Order.live()][0]
    either = await anext(merge(Order.live(), Customer.live()))
    async with Order.live(view=View) as entered:
        pass
"""

WRONG = {
    "Order.live('open')": "argument",
    "Order.live(view=int)": "int",
    "Order.live(limit='3')": "limit",
    "merge(Order.live())": "argument",
    "event.full_document.total": "None",
    "event.documents[0].colour": "colour",
}


def source(expressions: list[str], reveal: bool) -> str:
    lines = [f"    reveal_type({e})" if reveal else f"    {e}" for e in expressions]
    return MODELS + LOOPS + "\n".join(lines) + "\n"


def checked(checker: str, path: Path) -> list[tuple[int, str]]:
    """What a checker says, by line."""
    if checker == "mypy":
        command = [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull]
        command += ["--cache-dir", str(path.parent / "cache"), str(path)]
        pattern = r":(\d+): (?:note|error): (.*)"
    else:
        beside = Path(sys.executable).with_name("pyright")
        found = str(beside) if beside.exists() else shutil.which("pyright")
        if found is None:
            unavailable("no pyright: install the package 'pyright', which needs node")
        command = [found, "--pythonpath", sys.executable, str(path)]
        pattern = r":(\d+):\d+ - (?:information|error): (.*)"
    env = {**os.environ, "MYPYPATH": str(ROOT), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=150
    )
    said = [(int(m[1]), m[2]) for m in re.finditer(pattern, ended.stdout)]
    assert said, ended.stdout + ended.stderr
    return said


def plain(text: str) -> str:
    """A type as one spells it: without modules and quotes."""
    text = re.sub(r"\b(?:\w+\.)+(?=\w)", "", text)
    return re.sub(r"Union\[([^][]*)\]", lambda m: m[1].replace(", ", " | "), text)


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_checkers_infer_the_model_of_a_stream(checker: str, tmp_path: Path) -> None:
    path = tmp_path / "inferred.py"
    text = source(list(INFERRED), reveal=True)
    path.write_text(text)
    first = text.count("\n", 0, text.index("reveal_type")) + 1
    said = dict(checked(checker, path))
    found = {
        expression: plain(said.get(first + number, "nothing"))
        for number, expression in enumerate(INFERRED)
    }
    for expression, wanted in INFERRED.items():
        assert re.search(rf'(is|Revealed type is) "{re.escape(wanted)}"', found[expression]), (
            f"{expression} is {found[expression]}, not {wanted}"
        )
    assert set(said) <= set(range(first, first + len(INFERRED))), said


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_checkers_find_what_is_wrong(checker: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    text = source(list(WRONG), reveal=False)
    path.write_text(text)
    first = text.count("\n") - len(WRONG) + 1
    said = checked(checker, path)
    for number, (expression, hint) in enumerate(WRONG.items()):
        about = " ".join(message for line, message in said if line == first + number)
        assert hint.lower() in about.lower(), f"{expression}: {about!r}"
