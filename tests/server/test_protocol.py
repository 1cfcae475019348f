"""The words of streamgen.v1: what is a message, what is a frame, and that everything else is refused with a type."""

import json
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgen_infer import protocol as p
from tests.server.fuzzed import HEADER


def test_a_frame_survives_the_wire() -> None:
    message = p.pack_frame(HEADER, b"abc")
    header, payload = p.unpack_frame(message)
    assert (header, bytes(payload)) == (HEADER, b"abc")


def test_the_header_is_what_the_document_says(repository: Path) -> None:
    """Every row of the table in docs/protocol.md, read as a program in another language would."""
    text = (repository / "docs" / "protocol.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \|", text, re.MULTILINE)
    formats = {"4 bytes": "4s", "u8": "B", "u16": "H", "u32": "I", "f32": "f", "f64": "d"}
    message, values = p.pack_frame(HEADER, b"abc"), {}
    end = 0
    for offset, kinds, name in rows:
        assert int(offset) == end
        code = "<" + "".join(formats[kind] for kind in kinds.strip().split(", "))
        values[name.strip()] = struct.unpack_from(code, message, int(offset))
        end += struct.calcsize(code)
    assert end == p.HEADER_BYTES == values["header bytes"][0] == len(message) - 3
    assert values["magic"] == (b"SGFR",)
    assert values["frame"] == (2**32 - 1,)
    assert values["deadline"] == (1.5,)
    assert values["dropped"] == (3,)
    assert values["width, height"] == (64, 48)
    assert values["byte length"] == (3,)


def test_the_document_names_every_message_and_code(repository: Path) -> None:
    text = (repository / "docs" / "protocol.md").read_text()
    schema = json.dumps([p.CLIENT.json_schema(), p.SERVER.json_schema()])
    for name in re.findall(r'"const": "([a-z]+\.[a-z._]+|error)"', schema):
        assert f"`{name}`" in text, name
    for code, close in p.CLOSE_CODES.items():
        assert f"`{code}`" in text and str(close) in text, code


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("", "bad_message", "JSON"),
        ("[]", "bad_message", "object"),
        ('{"type":"session.begin"}', "bad_message", "session.start"),
        ('{"type":"session.start","prompt":"x","fps":NaN}', "bad_message", "fps"),
        ('{"type":"session.start","prompt":"x","fps":1e400}', "bad_message", "fps"),
        ('{"type":"session.start","prompt":"x","seconds":3}', "bad_message", "seconds"),
        ('{"type":"session.start","prompt":""}', "bad_message", "prompt"),
        ('{"type":"session.steps"}', "bad_message", "steps"),
        ('{"type":"session.playback","position_seconds":-1}', "bad_message", "position_seconds"),
        ("[" * 100_000, "bad_message", "recursion"),
        (json.dumps({"type": "session.start", "prompt": "x" * p.MAX_CONTROL_BYTES}), "too_large", "131072"),
    ],
)
def test_refused(text: str, code: str, words: str) -> None:
    with pytest.raises(p.Refusal, match=words) as refusal:
        p.parse_client(text)
    assert refusal.value.code == code


def test_a_start_has_the_defaults_of_the_document() -> None:
    start = p.parse_client('{"type":"session.start","prompt":"a red star"}')
    assert (start.format, start.drop, start.queue_seconds, start.streaming_buffer_seconds) == ("jpeg", "oldest", 2, 1.5)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({name for schema in p.CLIENT.json_schema()["$defs"].values() for name in schema.get("properties", {})})
TYPES = re.findall(r'"const": "(session[a-z._]+)"', json.dumps(p.CLIENT.json_schema()))


def anything() -> st.SearchStrategy[str]:
    """Texts that are nearly messages."""
    fields = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4)
    nearly = st.builds(lambda kind, rest: json.dumps({"type": kind, **rest}), st.sampled_from(TYPES), fields)
    return nearly | JSON.map(json.dumps) | st.text(max_size=40)


@settings(max_examples=400)
@given(anything())
def test_any_text_is_a_message_or_a_refusal(text: str) -> None:
    try:
        message = p.parse_client(text)
    except p.Refusal as refusal:
        assert refusal.code in ("bad_message", "too_large") and str(refusal)
        assert p.parse_server(p.error_of(refusal).model_dump_json()).code == refusal.code
    else:
        assert message.type in TYPES


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 71), st.integers(0, 255))
def test_any_bytes_are_a_frame_or_a_refusal(noise: bytes, at: int, value: int) -> None:
    good = bytearray(p.pack_frame(HEADER, b"abc"))
    good[min(at, len(good) - 1)] = value
    for message in (noise, bytes(good), bytes(good)[:at]):
        try:
            header, payload = p.unpack_frame(message)
        except p.Refusal as refusal:
            assert refusal.code == "bad_message"
        else:
            assert header.byte_length == len(payload)
