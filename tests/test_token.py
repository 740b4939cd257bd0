"""Resume tokens as event ids: what is accepted, what is refused, and that order is position."""

from __future__ import annotations

import base64

import pytest
from bson import Binary, Timestamp

from data_bridge import ResumeToken
from data_bridge.errors import InvalidResumeToken

HIGH_WATER = "826B0512D4000000122B0229296E04"
INSERT = (
    "826B0512F30000000A2B022C0100296E5A1004AC731356530A467691DD2A9CA8FA9B80"
    "46645F696400646B0512F3FF700C981E1E42350004"
)
IN_TRANSACTION = (
    "826B0512F30000000D2B022C01002B026E5A1004AC731356530A467691DD2A9CA8FA9B80"
    "463C5F6964003C7432000004"
)
DROP = "826B0512F30000000F2B022C0100296E5A1004AC731356530A467691DD2A9CA8FA9B8004"
INVALIDATE = "826B0512F30000000F2B022C0100296F5A1004AC731356530A467691DD2A9CA8FA9B8004"
LONG_ID = (
    "826B0512F30000000A2B022C0100296E5A1004AC731356530A467691DD2A9CA8FA9B80"
    "463C5F6964003C" + "61" * 200 + "000004"
)
REAL = [HIGH_WATER, INSERT, IN_TRANSACTION, DROP, INVALIDATE, LONG_ID]


@pytest.mark.parametrize("hex", REAL)
@pytest.mark.parametrize("bits", [b"", b"\x82\xc0\x1e"])
def test_an_event_id_brings_back_the_token_it_was_made_of(hex: str, bits: bytes) -> None:
    token = ResumeToken(hex, bits)
    again = ResumeToken.parse(str(token))
    assert (again.hex, again.type_bits) == (hex, bits)
    assert again == token


def test_a_short_token_travels_as_the_hex_that_other_mongodb_tools_take() -> None:
    assert str(ResumeToken(INSERT)) == INSERT
    assert ResumeToken(INSERT).document == {"_data": INSERT}


def test_a_token_over_128_characters_travels_in_base64url() -> None:
    text = str(ResumeToken(LONG_ID))
    assert len(text) < len(LONG_ID) * 0.7
    assert base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).hex().upper() == LONG_ID


def test_lower_case_hex_is_the_same_token() -> None:
    assert ResumeToken.parse(INSERT.lower()) == ResumeToken(INSERT)


def test_a_token_in_mongodbs_own_form_is_accepted() -> None:
    token = ResumeToken.parse({"_data": INSERT, "_typeBits": Binary(b"\x40")})
    assert token.document == {"_data": INSERT, "_typeBits": Binary(b"\x40")}


@pytest.mark.parametrize("position", [Timestamp(1795494643, 10), "Timestamp(1795494643, 10)"])
def test_a_cluster_time_and_its_text_are_a_position(position: object) -> None:
    token = ResumeToken.parse(position)  # type: ignore[arg-type]
    assert token.is_time
    assert token.start == {"startAtOperationTime": Timestamp(1795494643, 10)}
    # as an id without parentheses, for which another origin would have to be asked first
    assert str(token) == "826B0512F30000000A"
    assert ResumeToken.parse(str(token)) == token


def test_a_token_starts_after_itself_even_if_it_is_an_invalidate() -> None:
    assert ResumeToken(INVALIDATE).start == {"startAfter": {"_data": INVALIDATE}}


def test_a_token_tells_its_cluster_time() -> None:
    assert ResumeToken(INSERT).cluster_time == Timestamp(0x6B0512F3, 0x0A)


def test_tokens_order_as_positions_do() -> None:
    in_order = [HIGH_WATER, LONG_ID, IN_TRANSACTION, DROP, INVALIDATE]
    tokens = [ResumeToken(t) for t in in_order]
    assert sorted(reversed(tokens)) == tokens
    assert ResumeToken.at(Timestamp(0x6B0512F3, 0x0D)) < ResumeToken(IN_TRANSACTION)
    assert ResumeToken(INSERT) < ResumeToken.at(Timestamp(0x6B0512F3, 0x0D))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "hello",
        "42",
        INSERT[:-2],
        INSERT[:-1],
        INSERT[:60],
        INSERT[:72] + "04",
        INSERT[2:],
        INSERT + "00",
        INSERT + "." + "zz",
        "82",
        "8204",
        "Timestamp(1, 2",
        "Timestamp(99999999999, 2)",
        "Timestamp(4294967296, 2)",
        "Ünïcödé",
        "82\n04",
        "%00",
        "A" * 1_000_000,
        "82" * 500_000,
        str(ResumeToken(LONG_ID))[:-5],
    ],
    ids=lambda t: f"{t[:16]!r} of {len(t)}",
)
def test_what_is_no_event_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidResumeToken):
        ResumeToken.parse(text)


@pytest.mark.parametrize("value", [42, None, b"82", {"_data": 5}, {}, ["82"]])
def test_what_is_no_position_is_refused(value: object) -> None:
    with pytest.raises(InvalidResumeToken):
        ResumeToken.parse(value)  # type: ignore[arg-type]


def test_a_refusal_does_not_repeat_what_was_sent() -> None:
    with pytest.raises(InvalidResumeToken) as refused:
        ResumeToken.parse("<script>" * 10)
    assert "script" not in str(refused.value)


def test_a_live_querys_epoch_travels_with_its_position_and_counts_in_no_comparison() -> None:
    token = ResumeToken(INSERT, epoch="a-_9")

    assert str(token) == f"{INSERT}~a-_9"
    assert ResumeToken.parse(str(token)).epoch == "a-_9"
    assert ResumeToken.parse(str(token)) == ResumeToken(INSERT)
    assert ResumeToken.parse("826B0512F30000000A~a-_9").is_time
