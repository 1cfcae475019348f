"""What a client says: the messages of `streamgen.v1` towards the server; import them from protocol.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from streamgen_infer.serve.frame_header import Format

MAX_PROMPT_CHARACTERS = 2000
MAX_TIMELINE = 256
MAX_SECONDS = 1e7
MAX_WAIT_SECONDS = 600.0

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
    wait_seconds: float = Field(default=0.0, ge=0, le=MAX_WAIT_SECONDS)
    """When the machine is full: wait so long for a place, in the order of coming, rather than be refused."""
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
CLIENT: TypeAdapter[Any] = TypeAdapter(ClientMessage)
