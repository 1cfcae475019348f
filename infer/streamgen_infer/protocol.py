"""What client and frame server say to each other: `streamgen.v1`, told at length in docs/protocol.md.

Text messages are JSON with a `type`; names follow vllm-omni's `/v1/realtime/video` where it has them. Binary messages
are a `FrameHeader` of 68 bytes and the encoded frame. Times ending in `_seconds` on the wire are media time (frame
index / fps) unless they say otherwise; the server's clock counts from the acceptance of the session. No torch here.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

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

SUBPROTOCOL = "streamgen.v1"
TOKEN_SUBPROTOCOL = "streamgen.token."
"""A browser cannot set headers on a websocket: it offers this, followed by the token, as a second subprotocol."""
PATH = "/v1/realtime/video"

MAX_CONTROL_BYTES = 128 * 1024
MAX_PROMPT_CHARACTERS = 2000
MAX_TIMELINE = 256
MAX_SECONDS = 1e7

Drop = Literal["oldest", "newest", "stall"]
Transition = Literal["cut", "recache", "blend", "scene"]
State = Literal["created", "queued", "warming", "playing", "paused", "draining", "closed", "failed"]
STATES: tuple[State, ...] = get_args(State)


class Message(BaseModel):
    """Unknown fields are refused, so that a typo is an answer and not a surprise; inf and nan likewise."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


Identifier = Annotated[str, Field(min_length=1, max_length=64)]
Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
MediaSeconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]


# What a client says.


class Command(Message):
    id: Identifier | None = None
    """The client's own name for this message; whatever answers it carries it."""


class TimelineEntry(Message):
    at_seconds: MediaSeconds
    prompt: Prompt
    transition: Transition = "recache"
    transition_chunks: int = Field(default=4, ge=1, le=64)
    """With `blend`: over so many blocks."""


class Start(Command):
    """Asks for a stream; the answer is `video.start`, or `error` and the end."""

    type: Literal["session.start"]
    prompt: Prompt | None = None
    """Needed unless `branch` is given."""
    seed: int = Field(default=0, ge=0, le=2**64 - 1)
    fps: float | None = Field(default=None, ge=1, le=240)
    steps: int | None = Field(default=None, ge=1, le=1000)
    cache: Literal["relative", "window", "ema_sink"] | None = None
    """How old keys are placed in time; by default as the model was trained."""
    format: Format = "jpeg"
    quality: int = Field(default=85, ge=1, le=100)
    """Of jpeg and webp."""
    drop: Drop = "oldest"
    """What gives way when this viewer is slower than its stream."""
    queue_seconds: float = Field(default=2.0, gt=0, le=10)
    """How much media may wait for this viewer on the server before `drop` acts."""
    window_seconds: float | None = Field(default=None, gt=0, le=10)
    """How much media may be under way, sent and not yet confirmed by `session.playback`; None: no limit."""
    streaming_buffer_seconds: float = Field(default=1.5, gt=0, le=30)
    """How much may be made ahead of the playhead."""
    start_seconds: float = Field(default=1.0, gt=0, le=30)
    """Allowed time to the first frame: deadlines count from there."""
    max_seconds: float | None = Field(default=None, gt=0, le=MAX_SECONDS)
    timeline: tuple[TimelineEntry, ...] = Field(default=(), max_length=MAX_TIMELINE)
    """Prompts that follow the first, in the order of their time."""
    branch: Identifier | None = None
    """Go on from a branch that `session.branch` named; `prompt`, if given, takes over there."""


class Resume(Command):
    """Continue a session whose connection was lost; instead of `session.start`."""

    type: Literal["session.resume"]
    resume_token: Identifier
    last_frame: int = Field(default=-1, ge=-1, lt=2**32)
    """Number of the last frame received, -1 for none: the next one sent is `last_frame + 1`."""
    epoch: int = Field(default=0, ge=0, lt=2**32)
    """Epoch of that frame."""
    format: Format | None = None
    """Another one than before."""


class Event(Message):
    prompt: Prompt


class Interaction(Message):
    event_id: Identifier | None = None
    event: Event
    transition: Transition = "recache"
    transition_chunks: int = Field(default=4, ge=1, le=64)
    apply_at: Literal["next_block", "playhead"] = "next_block"
    """`playhead`: un-make what was made ahead and not yet shown; the epoch goes up."""
    at_seconds: MediaSeconds | None = None
    """Instead: from this media time on."""


class Interact(Command):
    type: Literal["session.interaction"]
    interaction: Interaction


class Playback(Message):
    """What is on the viewer's screen; sent about ten times a second, never answered."""

    type: Literal["session.playback"]
    position_seconds: MediaSeconds
    received_frame: int | None = Field(default=None, ge=0, lt=2**32)
    """Number of the newest frame received: frees the window and the frames kept for a resume."""


class Pause(Command):
    type: Literal["session.pause"]


class Play(Command):
    type: Literal["session.play"]


class Seek(Command):
    """Back to an earlier moment, from where the stream is made anew."""

    type: Literal["session.seek"]
    position_seconds: MediaSeconds


class Branch(Command):
    """Keep the stream's present state under a name, for `session.start`."""

    type: Literal["session.branch"]


class Steps(Command):
    type: Literal["session.steps"]
    steps: int | None = Field(default=..., ge=1, le=1000)
    """null: the scheduler's choice."""


class Record(Command):
    """Record what is made from here on; stopping gives an address to download from."""

    type: Literal["session.record"]
    action: Literal["start", "stop"]
    format: Literal["mp4", "webm", "gif"] = "mp4"


class Stop(Command):
    type: Literal["session.stop"]


class Ping(Command):
    type: Literal["session.ping"]


ClientMessage = Annotated[
    Start | Resume | Interact | Playback | Pause | Play | Seek | Branch | Steps | Record | Stop | Ping,
    Field(discriminator="type"),
]
_CLIENT: TypeAdapter[Any] = TypeAdapter(ClientMessage)


# What the server says.


class VideoConfig(Message):
    width: int
    height: int
    fps: float
    seed: int
    block_frames: int
    """Frames of an ordinary block; the first may have fewer."""
    model: str
    trained_steps: tuple[int, ...]
    drop: Drop
    queue_seconds: float
    mime: str
    """Of one payload; of m4s with its codecs, for MediaSource."""


class VideoStart(Message):
    """The session is accepted (or resumed); frames follow."""

    type: Literal["video.start"] = "video.start"
    id: str | None = None
    request_id: str
    """The session's id, in every log line about it."""
    resume_token: str
    resume_within_seconds: float
    """How long a lost connection may take to come back."""
    format: Format
    config: VideoConfig
    epoch: int
    next_frame: int
    """Number of the first frame that will be sent."""
    lost_frames: int = 0
    """With a resume: frames that nobody kept; 0 unless the client was away for too long."""
    state: State
    prompt: str
    prompt_version: int
    """Of the newest frame made; the first prompt's is 0."""
    warnings: list[str] = Field(default_factory=list)
    """What is odd about the request: unknown words, step counts that the model was not trained for."""


class ChunkMetadata(Message):
    """Announces the frames of one block."""

    type: Literal["video.chunk_metadata"] = "video.chunk_metadata"
    kind: Literal["media"] = "media"
    epoch: int
    generation_chunk_index: int
    """The block."""
    first_frame: int
    num_frames: int
    media_seconds: float
    slack_seconds: float
    steps: int
    prompt_version: int
    flags: int
    started_event_ids: tuple[str, ...] = ()
    """Interactions that this block is the first to show."""


class Received(Message):
    """A command was understood and will hold."""

    type: Literal["session.received"] = "session.received"
    id: str | None = None
    command: str
    version: int
    """Counts the commands that this session accepted."""


class InteractionQueued(Message):
    """A prompt was received."""

    type: Literal["session.interaction.queued"] = "session.interaction.queued"
    id: str | None = None
    event_id: str
    version: int
    prompt_version: int
    """Frames with this version, or a higher one, show it."""
    block: int
    media_seconds: float
    warnings: list[str] = Field(default_factory=list)
    """Words of the prompt that the model does not know, and the like."""


class Applied(Message):
    """A command holds from this block on."""

    type: Literal["session.applied"] = "session.applied"
    id: str | None = None
    command: str
    version: int
    block: int
    media_seconds: float
    epoch: int
    branch: str | None = None
    """Of `session.branch`: for `session.start`."""
    url: str | None = None
    """Of `session.record` with stop: the recording, for a GET with the same token."""


class InteractionApplied(Message):
    """The first block that shows a prompt is made."""

    type: Literal["session.interaction.applied"] = "session.interaction.applied"
    id: str | None = None
    event_id: str
    version: int
    prompt_version: int
    block: int
    media_seconds: float
    epoch: int


class SessionState(Message):
    """Where the session is now; sent at every change."""

    type: Literal["session.state"] = "session.state"
    state: State
    message: str = ""
    """With `failed`: of what."""


class Done(Message):
    type: Literal["session.done"] = "session.done"
    id: str | None = None
    chunks: int
    frames: int
    dropped_frames: int
    stopped: bool
    """By the client, rather than by its own end."""


class Pong(Message):
    type: Literal["session.pong"] = "session.pong"
    id: str | None = None
    server_seconds: float
    """The server's clock since the session was accepted, as in frame headers."""


class Error(Message):
    """Something was refused or failed. If `fatal`, the connection ends with the code of CLOSE_CODES."""

    type: Literal["error"] = "error"
    id: str | None = None
    code: Code
    message: str
    fatal: bool = False
    retry_after_seconds: float | None = None
    numbers: dict[str, float] = Field(default_factory=dict)
    """With `memory` and `overload`: what was short."""


ServerMessage = Annotated[
    VideoStart
    | ChunkMetadata
    | Received
    | InteractionQueued
    | Applied
    | InteractionApplied
    | SessionState
    | Done
    | Pong
    | Error,
    Field(discriminator="type"),
]
_SERVER: TypeAdapter[Any] = TypeAdapter(ServerMessage)


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
    return _parse(_CLIENT, text)


def parse_server(text: str | bytes) -> Any:
    """One message of the server; Refusal for what is none."""
    return _parse(_SERVER, text)


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
