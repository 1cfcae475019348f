"""Binary messages of streamgen.v1: a fixed header, little-endian, and one encoded frame. See docs/protocol.md."""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass
from typing import Literal

from streamgen_infer.serve.refusal import Refusal

MAGIC = b"SGFR"
HEADER_VERSION = 1
_HEADER = struct.Struct("<4sHHIIIIdddfHHHHBBBBI")
HEADER_BYTES = _HEADER.size
Format = Literal["jpeg", "webp", "m4s", "rgb"]
FORMATS: tuple[Format, ...] = ("jpeg", "webp", "m4s", "rgb")
ENCODINGS: dict[Format, int] = {"jpeg": 1, "webp": 2, "m4s": 3, "rgb": 4}
MEDIA, INIT = 0, 1
"""Kinds of a payload: a frame, or the opening bytes of a fragmented MP4, which come once before the first frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameHeader:
    """Opens every binary message; fixed, little-endian. Fields in the order of the wire."""

    epoch: int
    block: int
    frame: int
    prompt_version: int
    media_s: float
    deadline_s: float
    """When it must be on screen, on the server's clock since acceptance."""
    sent_s: float
    """When it was handed to the socket, on the same clock."""
    slack_s: float
    """Time that was left when its block was ready; negative: late."""
    steps: int
    dropped: int
    """Frames left out for this viewer just before this one (65535: that many or more)."""
    width: int
    height: int
    flags: int
    """Bits of streamgen_infer.requests: 1 fewer steps, 2 preview codec, 4 repeated, 8 late."""
    encoding: int
    kind: int
    byte_length: int
    """Of the payload that follows."""


def pack_frame(header: FrameHeader, payload: bytes) -> bytes:
    """The binary message of one frame."""
    fields = astuple(header)
    assert header.byte_length == len(payload)
    return _HEADER.pack(MAGIC, HEADER_VERSION, HEADER_BYTES, *fields[:-1], 0, fields[-1]) + payload


def unpack_frame(message: bytes) -> tuple[FrameHeader, memoryview]:
    """Header and payload; Refusal if it is not a frame of this version, whole."""
    if len(message) < HEADER_BYTES:
        raise Refusal("bad_message", f"a frame of {len(message)} bytes; the header alone has {HEADER_BYTES}")
    magic, version, size, *fields, _reserved, length = _HEADER.unpack_from(message)
    if magic != MAGIC or version != HEADER_VERSION or size < HEADER_BYTES:
        raise Refusal("bad_message", f"no frame of streamgen.v1: magic {magic!r}, header version {version}")
    if len(message) != size + length:
        raise Refusal("bad_message", f"a frame of {len(message)} bytes, its header says {size} + {length}")
    names = [name for name in FrameHeader.__slots__ if name != "byte_length"]
    header = FrameHeader(**dict(zip(names, fields, strict=True)), byte_length=length)
    return header, memoryview(message)[size:]
