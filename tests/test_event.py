"""ServerSentEvent: its fields, its bytes, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_bridge.api import ServerSentEvent
from data_bridge.api.encoder import one_line_json
from data_bridge.testing import Event, EventDecoder


def wire(data: str, **fields: Any) -> bytes:
    return ServerSentEvent(data=data, **fields).encode()


def decoded(*frames: bytes) -> list[Any]:
    return EventDecoder().feed(b"".join(frames))


# -- the bytes ----------------------------------------------------------------------------------


def test_an_event_is_its_data_and_a_blank_line() -> None:
    assert wire("Hello, World!") == b"data: Hello, World!\n\n"


def test_the_fields_come_in_one_order_with_the_data_last() -> None:
    assert wire("Status update", id="123", event="status") == (
        b"event: status\nid: 123\ndata: Status update\n\n"
    )
    assert wire("x", retry=5000, id="1", event="e") == (
        b"event: e\nid: 1\nretry: 5000\ndata: x\n\n"
    )


def test_the_arguments_may_be_given_by_position() -> None:
    assert ServerSentEvent("x", "e", "1", 5).encode() == b"event: e\nid: 1\nretry: 5\ndata: x\n\n"


def test_bytes_of_an_event_are_its_wire_form() -> None:
    assert bytes(ServerSentEvent("x")) == b"data: x\n\n"


def test_an_event_has_its_fields_as_attributes_and_cannot_be_altered() -> None:
    event = ServerSentEvent("x", event="e", id="1", retry=5)
    assert (event.data, event.event, event.id, event.retry) == ("x", "e", "1", 5)
    assert ServerSentEvent("x") == ServerSentEvent("x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.data = "y"  # type: ignore[misc]


def test_every_line_of_the_data_has_a_line_of_its_own() -> None:
    assert wire("Line 1\nLine 2\nLine 3") == b"data: Line 1\ndata: Line 2\ndata: Line 3\n\n"


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"], ids=["LF", "CR", "CRLF"])
def test_lf_cr_and_crlf_each_end_a_line_of_the_data(end: str) -> None:
    assert wire(f"a{end}b") == b"data: a\ndata: b\n\n"
    assert wire(f"a{end}") == b"data: a\ndata: \n\n"
    assert wire(f"{end}{end}") == b"data: \ndata: \ndata: \n\n"


def test_lf_before_cr_are_two_line_ends() -> None:
    assert wire("a\n\rb") == b"data: a\ndata: \ndata: b\n\n"


def test_data_cannot_add_a_field_or_an_event() -> None:
    frame = wire("x\n\nevent: forged\nid: 666\rretry: 0\r\n\r\ndata: more")
    assert decoded(frame) == [
        Event("x\n\nevent: forged\nid: 666\nretry: 0\n\ndata: more"),
    ]


def test_empty_data_is_an_event_all_the_same() -> None:
    assert wire("", event="heartbeat") == b"event: heartbeat\ndata: \n\n"
    assert decoded(wire("")) == [Event("")]


def test_leading_spaces_and_colons_survive() -> None:
    assert decoded(wire("  two"), wire(": colon")) == [Event("  two"), Event(": colon")]


def test_a_retry_of_zero_and_an_empty_id_are_sent() -> None:
    assert wire("x", retry=0, id="") == b"id: \nretry: 0\ndata: x\n\n"


# -- characters ---------------------------------------------------------------------------------


def test_text_is_utf_8() -> None:
    assert wire("žluť 🚀", event="é", id="ö") == "event: é\nid: ö\ndata: žluť 🚀\n\n".encode()


def test_half_a_surrogate_pair_becomes_a_replacement_character() -> None:
    assert wire("a\ud800b") == b"data: a\xef\xbf\xbdb\n\n"
    assert wire("\udc80", event="\udfff") == b"event: \xef\xbf\xbd\ndata: \xef\xbf\xbd\n\n"


def test_a_whole_surrogate_pair_becomes_its_character() -> None:
    assert wire("\ud83d\ude00 \ud800") == "data: 😀 \ufffd\n\n".encode()


def test_bytes_that_were_no_utf_8_do_not_break_the_stream() -> None:
    text = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert decoded(wire(text)) == [Event("caf\ufffd")]


def test_other_separators_of_unicode_stay_in_their_line() -> None:
    text = "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g"
    assert wire(text).count(b"\n") == 2
    assert decoded(wire(text)) == [Event(text)]


def test_nul_is_allowed_in_data() -> None:
    assert decoded(wire("a\0b")) == [Event("a\0b")]


@given(st.text())
@example("a\x85b\u2028c\u2029d")
def test_json_has_nothing_that_any_client_takes_for_a_line_end(text: str) -> None:
    encoded = one_line_json(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace"))
    assert len(encoded.decode().splitlines()) == 1
    assert json.loads(encoded) == text.encode("utf-8", "replace").decode()


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["event", "id"])
@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"], ids=["LF", "CR", "CRLF"])
@pytest.mark.parametrize("where", ["{}x", "x{}", "x{}data: forged"])
def test_a_line_end_in_a_field_of_one_line_is_an_error(field: str, end: str, where: str) -> None:
    value = where.format(end)
    with pytest.raises(ValueError, match=rf"{field} must not contain line ends"):
        ServerSentEvent("x", **{field: value})  # type: ignore[arg-type]


def test_nul_in_an_id_is_an_error_because_clients_ignore_such_an_id() -> None:
    with pytest.raises(ValueError, match="id must not contain line ends or NUL"):
        ServerSentEvent("x", id="a\0b")


def test_an_error_shows_no_more_than_the_beginning_of_a_long_value() -> None:
    with pytest.raises(ValueError) as caught:
        ServerSentEvent("x", id="\n" + "y" * 1_000_000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("retry", [-1, -5000])
def test_a_negative_retry_is_an_error(retry: int) -> None:
    with pytest.raises(ValueError, match="from 0 on"):
        ServerSentEvent("x", retry=retry)


@pytest.mark.parametrize("retry", [True, False, "5000", 1.5, b"1"])
def test_a_retry_that_is_no_whole_number_is_an_error(retry: Any) -> None:
    with pytest.raises(TypeError, match="whole number of milliseconds"):
        ServerSentEvent("x", retry=retry)


@pytest.mark.parametrize("data", [None, b"x", {"a": 1}, 5, ["x"]])
def test_data_that_is_no_text_is_an_error_with_the_remedy(data: Any) -> None:
    with pytest.raises(TypeError, match=r"data is text, not \w+: json.dumps\(\)"):
        ServerSentEvent(data)


@pytest.mark.parametrize("field", ["event", "id"])
@pytest.mark.parametrize("value", [5, b"x", 1.5])
def test_a_name_or_id_that_is_no_text_is_an_error_with_the_remedy(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"{field} is text, not \w+: str\(\)"):
        ServerSentEvent("x", **{field: value})


def test_data_is_required() -> None:
    with pytest.raises(TypeError):
        ServerSentEvent()  # type: ignore[call-arg]


# -- round trip ---------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"))
LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"))


@given(TEXT, LINE, LINE, st.none() | st.integers(0, 10**12))
@example("\r\n\n\r", "", "", 0)
@example(" \ufeff", "\ufeff", " ", None)
def test_a_client_reads_what_was_written(data: str, event: str, id: str, retry: int | None) -> None:
    lines = data.replace("\r\n", "\n").replace("\r", "\n")
    assert decoded(wire(data, event=event, id=id, retry=retry)) == [
        Event(lines, event or "message", id, retry)
    ]


@given(st.lists(TEXT, max_size=5), st.data())
def test_events_follow_each_other_however_the_network_cuts_them(
    texts: list[str], data: st.DataObject
) -> None:
    stream = b"".join(wire(text, id=str(n)) for n, text in enumerate(texts))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    decoder = EventDecoder()
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += decoder.feed(stream[start:end])
    assert [e.data for e in found if isinstance(e, Event)] == [
        t.replace("\r\n", "\n").replace("\r", "\n") for t in texts
    ]
    assert decoder.last_event_id == (str(len(texts) - 1) if texts else "")


@given(st.text())
def test_every_python_string_has_a_wire_form(text: str) -> None:
    frame = wire(text)
    assert frame.endswith(b"\n\n")
    frame.decode()
    assert len([e for e in decoded(frame) if isinstance(e, Event)]) == 1
