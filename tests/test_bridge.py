"""Opening a database: every form of it, every way in which that fails, and who finds it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import DRIVERS, free_socket, opened
from pymongo import IndexModel, MongoClient
from watching import taken

import data_bridge
from data_bridge import Document, Limits, connect, lifespan, watch
from data_bridge.embedded import ReplicaSet
from data_bridge.errors import (
    AuthenticationFailed,
    BridgeClosed,
    NotAReplicaSet,
    NotBound,
    OperationFailed,
    ServerUnreachable,
    TooManyCursors,
    WatchUnsupported,
)

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """PyMongo leaves sockets of servers that went away to the collector, which warns of them."""
    yield
    gc.collect()


class Order(Document):
    status: str = "open"

    class Settings:
        collection = "bridged_orders"
        indexes = (IndexModel("status", name="by_status"),)


class Invoice(Document):
    class Settings:
        collection = "bridged_invoices"


async def works() -> None:
    """Whatever is open reads, writes and watches."""
    async with Order.watch() as changes:
        order = await Order(status="a").insert()
        assert (await taken(changes, 1))[0].document_id == order.id
    assert await Order.get(order.id) == order


# -- every form of a database -------------------------------------------------------------------


async def test_a_uri_opens_pymongos_async_client_and_closes_it_again(database_uri: str) -> None:
    async with connect(database_uri, documents=[Order]) as bridge:
        await works()
        assert bridge.driver.owned
    with pytest.raises(Exception, match="after close"):
        await bridge.driver.database.command("ping")


async def test_a_client_is_taken_at_its_default_database_and_left_open(
    driver_name: str, database_uri: str, database_name: str
) -> None:
    async with opened(driver_name, database_uri) as client:
        async with connect(client, documents=[Order]) as bridge:
            assert bridge.driver.name == database_name
            await works()
        await client.admin.command("ping")


async def test_a_database_is_taken_as_it_is(database: Any) -> None:
    async with connect(database, documents=[Order]):
        await works()


async def test_mongomock_reads_and_writes_and_says_that_it_cannot_watch() -> None:
    mongomock_motor = pytest.importorskip("mongomock_motor")
    client = mongomock_motor.AsyncMongoMockClient()
    async with connect(client["shop"], documents=[Order]) as bridge:
        order = await Order(status="a").insert()
        assert await Order.find({"status": "a"}) == [order]
        for _ in range(2):
            with pytest.raises(WatchUnsupported, match="needs a MongoDB replica set"):
                async with Order.watch():
                    pass
        with pytest.raises(WatchUnsupported):
            await anext(Order.watch())
        assert not bridge._feeds
        assert bridge.stats().feeds == ()


@pytest.mark.parametrize("source", [None, 3, b"mongodb://localhost/shop", object(), {}], ids=type)
async def test_what_is_no_database_is_a_type_error(source: Any) -> None:
    with pytest.raises(TypeError, match="a database is a MongoDB URI"):
        await connect(source).open()


async def test_indexes_are_created_at_connect(database: Any) -> None:
    async with connect(database, documents=[Order]):
        assert "by_status" in await Order.collection.index_information()
    async with connect(database, documents=[Order]):
        pass


async def test_no_documents_means_none(database: Any) -> None:
    async with connect(database, documents=[]):
        with pytest.raises(NotBound):
            Order.watch()
        assert await database.list_collection_names() == []


# -- the lifespan of an application -------------------------------------------------------------


async def test_a_lifespan_opens_a_bridge_for_any_asgi_framework(
    database_uri: str, database_name: str
) -> None:
    async with lifespan(database_uri, documents=[Order])(object()) as state:
        assert state["bridge"].driver.name == database_name
        await works()
    with pytest.raises(NotBound):
        Order.watch()


async def test_a_lifespan_that_cannot_connect_fails_the_start_with_the_remedy() -> None:
    with free_socket() as unused:
        uri = f"mongodb://127.0.0.1:{unused.getsockname()[1]}/shop"
        with pytest.raises(ServerUnreachable, match="Check that mongod runs"):
            async with lifespan(uri, limits=Limits(timeout=0.5))(object()):
                pass


# -- what cannot be opened ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def standalone() -> Iterator[ReplicaSet]:
    with ReplicaSet(replica=False) as server:
        yield server


@pytest.fixture(scope="module")
def guarded() -> Iterator[ReplicaSet]:
    with ReplicaSet(auth=("admin", "secret")) as server:
        yield server


async def refused(driver_name: str, uri: str, **limits: Any) -> BaseException:
    """What connecting raises, within seconds."""
    async with opened(driver_name, uri, serverSelectionTimeoutMS=2000) as client:
        async with asyncio.timeout(20):
            with pytest.raises(data_bridge.DataBridgeError) as error:
                async with connect(client["shop"], documents=[Order], limits=Limits(**limits)):
                    pass
    return error.value


async def test_a_standalone_server_is_refused(driver_name: str, standalone: ReplicaSet) -> None:
    error = await refused(driver_name, standalone.uri)
    assert type(error) is NotAReplicaSet and "--replSet rs0" in str(error)


async def test_wrong_credentials_are_refused(driver_name: str, guarded: ReplicaSet) -> None:
    error = await refused(driver_name, guarded.uri.replace("secret", "wrong"))
    assert type(error) is AuthenticationFailed and "authSource" in str(error)
    assert error.__cause__ is not None and "wrong" not in str(error)


async def test_no_credentials_are_refused(driver_name: str, guarded: ReplicaSet) -> None:
    uri = guarded.uri.replace("admin:secret@", "").replace("&authSource=admin", "")
    error = await refused(driver_name, uri)
    assert type(error) is AuthenticationFailed and error.__cause__ is not None


async def test_right_credentials_are_not(driver_name: str, guarded: ReplicaSet) -> None:
    async with opened(driver_name, guarded.uri) as client:
        async with connect(client["shop"], documents=[Order]):
            await works()


async def test_a_host_where_nobody_listens_is_unreachable(driver_name: str) -> None:
    with free_socket() as unused:
        uri = f"mongodb://127.0.0.1:{unused.getsockname()[1]}"
        error = await refused(driver_name, uri, timeout=1)
    assert type(error) is ServerUnreachable and "mongod runs" in str(error)
    assert error.__cause__ is not None


async def test_a_host_that_accepts_and_says_nothing_is_unreachable(driver_name: str) -> None:
    with free_socket() as silent:
        silent.listen()
        uri = f"mongodb://127.0.0.1:{silent.getsockname()[1]}"
        error = await refused(driver_name, uri, timeout=1)
    assert type(error) is ServerUnreachable


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "not a valid MongoDB URI"),
        ("localhost", "not a valid MongoDB URI|names no default database"),
        ("http://localhost/shop", "not a valid MongoDB URI"),
        ("mongodb://localhost:port/shop", "not a valid MongoDB URI"),
        ("mongodb://localhost/shop?replicaSet", "not a valid MongoDB URI"),
        ("mongodb://localhost", "names no default database"),
        ("mongodb://localhost/?replicaSet=rs0", "names no default database"),
    ],
)
async def test_a_uri_that_cannot_be_used_says_what_one_looks_like(uri: str, message: str) -> None:
    with pytest.raises(OperationFailed, match=message) as error:
        await connect(uri).open()
    assert error.value.__cause__ is not None


# -- finding the bridge -------------------------------------------------------------------------


async def test_a_model_without_a_bridge_says_how_to_open_one() -> None:
    for use in (Order.watch, lambda: watch(Order), lambda: Order.collection):
        with pytest.raises(NotBound, match='async with connect\\("mongodb://…/shop"\\)'):
            use()
    with pytest.raises(NotBound):
        await Order().insert()


def test_a_model_outside_of_an_event_loop_is_not_bound() -> None:
    with pytest.raises(NotBound):
        Order.watch()


async def test_with_two_bridges_a_model_lives_where_it_was_named(
    replica_set: ReplicaSet, database_name: str, mongo: MongoClient[dict[str, Any]]
) -> None:
    other = f"{database_name}_other"
    async with (
        connect(replica_set.database_uri(database_name), documents=[Order]) as first,
        connect(replica_set.database_uri(other)) as second,
    ):
        await Order().insert()
        await Invoice().insert()
        assert mongo[database_name][Order.Settings.collection].count_documents({}) == 1
        assert mongo[other][Invoice.Settings.collection].count_documents({}) == 1
        async with first.watch(Order) as here, second.watch(Order) as there:
            order = await Order().insert()
            assert (await taken(here, 1))[0].document_id == order.id
            assert not there.pending
    mongo.drop_database(other)


async def test_two_bridges_that_could_both_have_a_model_are_told_apart_by_naming_it(
    database_uri: str,
) -> None:
    async with connect(database_uri), connect(database_uri):
        with pytest.raises(NotBound, match=r"documents=\[Order\]"):
            Order.watch()


async def test_a_bridge_belongs_to_its_loop(database_uri: str) -> None:
    async with connect(database_uri, documents=[Order]):

        async def elsewhere() -> None:
            with pytest.raises(NotBound):
                Order.watch()

        await asyncio.to_thread(lambda: asyncio.run(elsewhere()))


async def test_a_closed_bridge_watches_no_more_and_may_be_closed_again(database: Any) -> None:
    async with connect(database, documents=[Order]) as bridge:
        pass
    await bridge.close()
    assert repr(bridge) == "<Bridge closed>"
    with pytest.raises(BridgeClosed, match="this bridge is closed"):
        await bridge.watch(Order).open()
    with pytest.raises(NotBound):
        Order.watch()


async def test_opening_again_after_closing_is_a_new_start(database: Any) -> None:
    bridge = connect(database, documents=[Order])
    for _ in range(2):
        async with bridge:
            await works()


# -- bounds -------------------------------------------------------------------------------------


async def test_pipelines_have_cursors_of_their_own_up_to_a_limit(database: Any) -> None:
    def pipeline(number: int) -> list[dict[str, Any]]:
        return [{"$match": {"fullDocument.number": number}}]

    limits = Limits(cursors=2, linger=0)
    async with connect(database, documents=[Order], limits=limits) as bridge:
        async with Order.watch(), Order.watch(pipeline=pipeline(0)):
            async with Order.watch(pipeline=pipeline(1)), Order.watch(pipeline=pipeline(1)):
                with pytest.raises(TooManyCursors, match=r"Limits\.cursors"):
                    async with Order.watch(pipeline=pipeline(2)):
                        pass
                async with Order.watch(filter={"status": "a"}):
                    pass
            while len(bridge._feeds) > 2:
                await asyncio.sleep(0.01)
            async with Order.watch(pipeline=pipeline(2)):
                pass


@pytest.mark.parametrize("name", DRIVERS)
async def test_cancelling_a_connect_leaves_nothing_open(name: str, replica_set: ReplicaSet) -> None:
    async with opened(name, replica_set.uri) as client:
        connecting = asyncio.create_task(connect(client["shop"], documents=[Order]).open())
        await asyncio.sleep(0)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        with pytest.raises(NotBound):
            Order.watch()
