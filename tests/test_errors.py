"""What happens for each error that a server or a driver may raise."""

from __future__ import annotations

import pytest
from pymongo import errors as driver

from data_bridge import errors
from data_bridge.errors import Fault, fault, translated

RESUMABLE, LOST = "ResumableChangeStreamError", "NonResumableChangeStreamError"


def failure(code: int | None, *labels: str, message: str = "secret") -> driver.OperationFailure:
    return driver.OperationFailure(message, code, {"errorLabels": list(labels)})


@pytest.mark.parametrize(
    "code",
    [6, 7, 43, 50, 63, 89, 91, 133, 150, 175, 189, 234, 237, 262, 9001]
    + [10107, 11600, 11601, 11602, 13388, 13435, 13436],
)
def test_what_passes_is_reopened(code: int) -> None:
    assert fault(failure(code)) is Fault.TRANSIENT


@pytest.mark.parametrize("code", [136, 260, 280, 286])
def test_a_position_that_is_gone_is_lost_whatever_labels_come_with_it(code: int) -> None:
    assert fault(failure(code)) is Fault.LOST
    assert fault(failure(code, RESUMABLE)) is Fault.LOST
    assert type(translated(failure(code), "watch a")) is errors.ResumeHistoryLost


def test_the_labels_of_the_server_decide_for_codes_that_nobody_knows() -> None:
    assert fault(failure(999_999, RESUMABLE)) is Fault.TRANSIENT
    assert fault(failure(999_999, LOST)) is Fault.LOST
    assert fault(failure(999_999)) is Fault.FATAL
    assert fault(failure(None)) is Fault.FATAL


def test_an_event_over_16_mb_is_a_loss_of_its_own_kind() -> None:
    assert fault(failure(10334)) is Fault.TOO_LARGE
    assert type(translated(failure(10334), "watch a")) is errors.EventTooLarge
    assert issubclass(errors.EventTooLarge, errors.ResumeHistoryLost)


@pytest.mark.parametrize(
    ("code", "token", "expected", "remedy"),
    [
        (40573, False, errors.NotAReplicaSet, "--replSet"),
        (13, False, errors.AuthenticationFailed, "role"),
        (18, False, errors.AuthenticationFailed, "password"),
        (8000, False, errors.AuthenticationFailed, "authSource"),
        (47, False, errors.InvalidPipeline, "pre_images"),
        (40324, False, errors.InvalidPipeline, "error 40324"),
        (2, False, errors.InvalidPipeline, "pipeline"),
        *(
            (code, True, errors.InvalidResumeToken, "resume token")
            for code in (9, 14, 15, 40647, 40649, 50796, 50811, 50816, 50819)
        ),
        *((code, False, errors.InvalidPipeline, "pipeline") for code in (9, 14, 15, 40647)),
    ],
)
def test_what_cannot_be_helped_is_raised_with_its_remedy(
    code: int, token: bool, expected: type[Exception], remedy: str
) -> None:
    error = failure(code)
    assert fault(error) is Fault.FATAL
    ours = translated(error, "watch shop.orders", token=token)
    assert type(ours) is expected
    assert remedy in str(ours) and "shop.orders" in str(ours)
    assert "secret" not in str(ours)


def test_a_pipeline_that_takes_the_id_away_is_no_loss() -> None:
    said = "Encountered an event whose _id field … was modified by the pipeline."
    error = failure(280, LOST, message=said)
    assert fault(error) is Fault.FATAL
    assert type(translated(error, "watch a")) is errors.InvalidPipeline


@pytest.mark.parametrize(
    "error",
    [
        driver.AutoReconnect("a"),
        driver.NotPrimaryError("a"),
        driver.NetworkTimeout("a"),
        driver.ServerSelectionTimeoutError("a"),
        driver.WaitQueueTimeoutError("a"),
        driver.ExecutionTimeout("a", 50),
        ConnectionResetError(),
        TimeoutError(),
        OSError(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_server_that_is_away_is_waited_for(error: Exception) -> None:
    assert fault(error) is Fault.TRANSIENT
    ours = translated(error, "watch shop.orders")
    assert type(ours) is errors.ServerUnreachable
    assert isinstance(ours, ConnectionError)


@pytest.mark.parametrize(
    "error", [ValueError("a"), KeyError("a"), driver.InvalidOperation("a")], ids=repr
)
def test_what_nobody_expects_is_fatal(error: Exception) -> None:
    assert fault(error) is Fault.FATAL
    assert type(translated(error, "watch a")) is errors.OperationFailed


def test_writes_have_their_own_errors() -> None:
    duplicate = translated(driver.DuplicateKeyError("secret", 11000), "insert an Order")
    assert type(duplicate) is errors.DuplicateKey and duplicate.code == 11000
    assert "secret" not in str(duplicate)
    bulk = driver.BulkWriteError({"writeErrors": [{"code": 11000, "errmsg": "secret"}]})
    assert type(translated(bulk, "insert")) is errors.DuplicateKey
    other = translated(failure(121), "insert an Order")
    assert type(other) is errors.OperationFailed and other.code == 121


def test_our_own_errors_pass_through() -> None:
    ours = errors.BridgeClosed("closed")
    assert translated(ours, "watch") is ours


def test_every_exception_has_one_base_and_is_exported() -> None:
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.DataBridgeError)
