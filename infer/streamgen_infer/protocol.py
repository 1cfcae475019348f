"""What client and frame server say to each other: `streamgen.v1`, told at length in docs/protocol.md.

Text messages are JSON with a `type`; names follow vllm-omni's `/v1/realtime/video` where it has them. Binary messages
are a `FrameHeader` of 68 bytes and the encoded frame. Times ending in `_seconds` on the wire are media time (frame
index / fps) unless they say otherwise; the server's clock counts from the acceptance of the session. No torch here.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError

from streamgen_infer.serve.client_messages import CLIENT as CLIENT
from streamgen_infer.serve.client_messages import MAX_PROMPT_CHARACTERS as MAX_PROMPT_CHARACTERS
from streamgen_infer.serve.client_messages import MAX_WAIT_SECONDS as MAX_WAIT_SECONDS
from streamgen_infer.serve.client_messages import STATES as STATES
from streamgen_infer.serve.client_messages import Branch as Branch
from streamgen_infer.serve.client_messages import Command as Command
from streamgen_infer.serve.client_messages import Drop as Drop
from streamgen_infer.serve.client_messages import Event as Event
from streamgen_infer.serve.client_messages import Interact as Interact
from streamgen_infer.serve.client_messages import Interaction as Interaction
from streamgen_infer.serve.client_messages import Message as Message
from streamgen_infer.serve.client_messages import Pause as Pause
from streamgen_infer.serve.client_messages import Ping as Ping
from streamgen_infer.serve.client_messages import Play as Play
from streamgen_infer.serve.client_messages import Playback as Playback
from streamgen_infer.serve.client_messages import Record as Record
from streamgen_infer.serve.client_messages import Resume as Resume
from streamgen_infer.serve.client_messages import Seek as Seek
from streamgen_infer.serve.client_messages import Start as Start
from streamgen_infer.serve.client_messages import State as State
from streamgen_infer.serve.client_messages import Steps as Steps
from streamgen_infer.serve.client_messages import Stop as Stop
from streamgen_infer.serve.frame_header import ENCODINGS as ENCODINGS
from streamgen_infer.serve.frame_header import FORMATS as FORMATS
from streamgen_infer.serve.frame_header import HEADER_BYTES as HEADER_BYTES
from streamgen_infer.serve.frame_header import INIT as INIT
from streamgen_infer.serve.frame_header import MEDIA as MEDIA
from streamgen_infer.serve.frame_header import Format as Format
from streamgen_infer.serve.frame_header import FrameHeader as FrameHeader
from streamgen_infer.serve.frame_header import pack_frame as pack_frame
from streamgen_infer.serve.frame_header import unpack_frame as unpack_frame
from streamgen_infer.serve.refusal import CLOSE_CODES as CLOSE_CODES
from streamgen_infer.serve.refusal import Code as Code
from streamgen_infer.serve.refusal import Refusal as Refusal
from streamgen_infer.serve.server_messages import SERVER as SERVER
from streamgen_infer.serve.server_messages import Applied as Applied
from streamgen_infer.serve.server_messages import ChunkMetadata as ChunkMetadata
from streamgen_infer.serve.server_messages import Done as Done
from streamgen_infer.serve.server_messages import Error as Error
from streamgen_infer.serve.server_messages import InteractionApplied as InteractionApplied
from streamgen_infer.serve.server_messages import InteractionQueued as InteractionQueued
from streamgen_infer.serve.server_messages import Pong as Pong
from streamgen_infer.serve.server_messages import Received as Received
from streamgen_infer.serve.server_messages import SessionState as SessionState
from streamgen_infer.serve.server_messages import VideoConfig as VideoConfig
from streamgen_infer.serve.server_messages import VideoStart as VideoStart

SUBPROTOCOL = "streamgen.v1"
TOKEN_SUBPROTOCOL = "streamgen.token."
"""A browser cannot set headers on a websocket: it offers this, followed by the token, as a second subprotocol."""
PATH = "/v1/realtime/video"

MAX_CONTROL_BYTES = 128 * 1024


def error_of(refusal: Refusal, command_id: str | None = None) -> Error:
    """What is said of a refusal."""
    return Error(
        id=command_id,
        code=refusal.code,
        message=str(refusal)[:2000],
        fatal=refusal.fatal,
        retry_after_seconds=refusal.retry_after_s,
        numbers=refusal.numbers,
    )


def parse_client(text: str | bytes) -> Any:
    """One message of a client; Refusal for what is none."""
    return _parse(CLIENT, text)


def parse_server(text: str | bytes) -> Any:
    """One message of the server; Refusal for what is none."""
    return _parse(SERVER, text)


def dump(message: dict[str, Any]) -> str:
    """What a client says, as text."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False)


def _parse(adapter: TypeAdapter[Any], text: str | bytes) -> Any:
    size = len(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    if size > MAX_CONTROL_BYTES:
        raise Refusal("too_large", f"a control message of {size} bytes; at most {MAX_CONTROL_BYTES}")
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Refusal("bad_message", f"{where}: {first['msg']}" if where else first["msg"]) from None
    except (RecursionError, UnicodeError) as error:
        raise Refusal("bad_message", f"not a message: {type(error).__name__}") from None
