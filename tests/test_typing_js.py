"""The types of the browser module, as TypeScript checks them: right uses and wrong ones."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import unavailable

ROOT = Path(__file__).parent.parent

RIGHT = """
interface Customer { id: string; name: string }
const plain = live("/orders/live");
const anything: unknown = plain.documents[0]?.anything;
const shop = liveAll<{ orders: Order; customers: Customer }>("/shop/live", { retry: 500 });
const dearest = shop.collection("orders", { sort: (a, b) => b.total - a.total });
const total: number | undefined = dearest.get("x")?.total;
shop.on("change", ({ collection, document }) => console.log(collection, document?.id));
shop.subscribe((connection) => connection.collection("customers").documents.map((c) => c.name));
const status: "live" | string = orders.status;
for (const [id, order] of orders) console.log(id, order.customer);
"""

WRONG = {
    "orders.documents[0].cutsomer;": "cutsomer",
    "orders.status === 'open';": "no overlap",
    "orders.documents.push(orders.documents[0]);": "push",
    "liveAll<{ orders: Order }>('/shop').collection('oders');": "oders",
    "live<Order>('/orders/live', { sort: (a, b) => a.customer });": "not assignable",
}


@pytest.fixture(scope="module")
def tsc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        unavailable("no npm to fetch TypeScript with")
    folder = tmp_path_factory.mktemp("typescript")
    flags = ["--no-save", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)]
    subprocess.run(
        [npm, "install", *flags, "typescript@5.8.3"], check=True, capture_output=True, timeout=110
    )
    return folder / "node_modules" / "typescript" / "bin" / "tsc"


def checked(tsc: Path, folder: Path, source: str) -> str:
    """What the compiler has to say."""
    documentation = (ROOT / "docs" / "browser.md").read_text("utf-8")
    [documented] = re.findall(r"^```ts\n(.*?)^```$", documentation, re.MULTILINE | re.DOTALL)
    documented = documented.replace("/data-bridge/live.js", "./live.js").replace(
        "{ live,", "{ live, liveAll,"
    )
    shutil.copy(ROOT / "data_bridge" / "static" / "live.d.ts", folder)
    (folder / "page.ts").write_text(f"{documented}\n{source}", "utf-8")
    options = ["--strict", "--noEmit", "--module", "es2022", "--target", "es2022"]
    options += ["--moduleResolution", "bundler", "--lib", "es2022,dom,dom.iterable"]
    done = subprocess.run(
        ["node", str(tsc), *options, "page.ts"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.stdout + done.stderr


def test_right_uses_pass(tsc: Path, tmp_path: Path) -> None:
    assert checked(tsc, tmp_path, RIGHT) == ""


def test_wrong_uses_are_found(tsc: Path, tmp_path: Path) -> None:
    said = checked(tsc, tmp_path, "\n".join(WRONG)).splitlines()
    for line, reason in WRONG.items():
        assert any(reason in message for message in said), f"{line}: {said}"


def test_the_types_and_the_module_have_the_same_names() -> None:
    static = ROOT / "data_bridge" / "static"
    exported = set(re.findall(r"^export function (\w+)", (static / "live.js").read_text(), re.M))
    declared = set(re.findall(r"^export function (\w+)", (static / "live.d.ts").read_text(), re.M))
    assert exported == declared == {"live", "liveAll"}
