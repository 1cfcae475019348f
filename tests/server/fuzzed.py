"""What a client could say and a frame could be, right or nearly right: hypothesis strategies."""

from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import strategies as st

from streamgen_infer import protocol as p

HEADER = p.FrameHeader(
    epoch=1,
    block=2,
    frame=2**32 - 1,
    prompt_version=4,
    media_s=0.5,
    deadline_s=1.5,
    sent_s=1.25,
    slack_s=0.25,
    steps=4,
    dropped=3,
    width=64,
    height=48,
    flags=5,
    encoding=1,
    kind=0,
    byte_length=3,
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)
_SCHEMA = p.CLIENT.json_schema()
FIELDS = sorted({name for schema in _SCHEMA["$defs"].values() for name in schema.get("properties", {})})
TYPES = sorted(set(re.findall(r'"const": "(session[a-z._]+)"', json.dumps(_SCHEMA))))


def _interaction(text: str, how: str, where: str, at_s: float | None) -> dict[str, Any]:
    inner: dict[str, Any] = {"event": {"prompt": text}, "transition": how, "apply_at": where}
    return {"type": "session.interaction", "interaction": inner | ({} if at_s is None else {"at_seconds": at_s})}


def commands() -> st.SearchStrategy[dict[str, Any]]:
    """Messages that are ones, most of which a session obeys."""
    return st.one_of(
        st.sampled_from([{"type": f"session.{name}"} for name in ("pause", "play", "branch", "ping")]),
        st.sampled_from(
            [{"type": "session.start", "prompt": "again"}, {"type": "session.resume", "resume_token": "x"}]
        ),
        st.sampled_from([{"type": "session.steps", "steps": count} for count in (2, 3, 4, None)]),
        st.builds(lambda s: {"type": "session.seek", "position_seconds": s}, st.floats(0, 20)),
        st.builds(lambda s: {"type": "session.playback", "position_seconds": s}, st.floats(0, 20)),
        st.builds(
            _interaction,
            st.sampled_from(["a red star", "unknown"]),
            st.sampled_from(["cut", "recache", "blend", "scene"]),
            st.sampled_from(["next_block", "playhead"]),
            st.none() | st.floats(0, 20),
        ),
    )


def _named(message: dict[str, Any], name: int) -> str:
    return json.dumps(message if message["type"] == "session.playback" else {**message, "id": f"m{name}"})


def _spoilt(text: str, at: int, letter: str) -> str:
    at %= len(text)
    return text[:at] + letter + text[at + 1 :]


def messages() -> st.SearchStrategy[str]:
    """Commands, commands with a letter changed, types with wrong fields, any JSON, any text. Few end a session."""
    good = st.builds(_named, commands(), st.integers(0, 2**31))
    spoilt = st.builds(_spoilt, good, st.integers(0, 200), st.characters())
    fields = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3)
    typed = st.builds(lambda kind, rest: json.dumps({"type": kind, **rest}), st.sampled_from(TYPES), fields)
    wrong = spoilt | typed | JSON.map(json.dumps) | st.text(max_size=40)
    stop = st.just(json.dumps({"type": "session.stop", "id": "stop"}))
    kinds = [good] * 12 + [wrong] * 3 + [stop]
    return st.integers(0, len(kinds) - 1).flatmap(lambda at: kinds[at])


def frames() -> st.SearchStrategy[bytes]:
    """Bytes: frames, frames with a byte changed or an end missing, any bytes."""
    good = p.pack_frame(HEADER, b"abc")

    def spoilt(at: int, value: int, end: int) -> bytes:
        wire = bytearray(good)
        wire[at % len(good)] = value
        return bytes(wire[:end])

    ends = st.just(len(good)) | st.integers(0, len(good))
    return st.just(good) | st.builds(spoilt, st.integers(0, 100), st.integers(0, 255), ends) | st.binary(max_size=120)
