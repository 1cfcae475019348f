"""What the server says: the messages of `streamgen.v1` towards a client; import them from protocol.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from streamgen_infer.serve.client_messages import Drop, Message, State
from streamgen_infer.serve.frame_header import Format
from streamgen_infer.serve.refusal import Code


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
    """With `failed`: of what. With `queued` for a place: what is short."""
    place: int | None = None
    """With `queued`: 1 is next; None while it is not waiting for a place."""


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
SERVER: TypeAdapter[Any] = TypeAdapter(ServerMessage)
