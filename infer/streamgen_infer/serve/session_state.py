"""Which states a session may go through, and what a session needs of the runtime's streams. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from streamgen_infer.protocol import State
from streamgen_infer.requests import ApplyAt, MadeBlock, Receipt, RuntimeStats, StreamEvent, StreamRequest

TRANSITIONS: dict[State, frozenset[State]] = {
    "created": frozenset({"queued", "closed", "failed"}),
    "queued": frozenset({"warming", "draining", "closed", "failed"}),
    "warming": frozenset({"playing", "paused", "draining", "closed", "failed"}),
    "playing": frozenset({"paused", "draining", "closed", "failed"}),
    "paused": frozenset({"playing", "draining", "closed", "failed"}),
    "draining": frozenset({"closed", "failed"}),
    "closed": frozenset(),
    "failed": frozenset(),
}
LIVE: frozenset[State] = frozenset({"warming", "playing", "paused"})
"""Commands are taken."""
OVER: frozenset[State] = frozenset({"closed", "failed"})


@dataclass(slots=True)
class Lifecycle:
    """The state of a session; a step that TRANSITIONS does not name is a bug of ours."""

    state: State = "created"

    def go(self, state: State) -> bool:
        """Whether it is a change."""
        if state == self.state:
            return False
        assert state in TRANSITIONS[self.state], f"a session went from {self.state} to {state}"
        self.state = state
        return True


class Live(Protocol):
    """What a session calls of `streamgen_infer.live_stream.LiveStream`; nothing here blocks for long."""

    @property
    def geometry(self) -> Any: ...

    @property
    def fps(self) -> float: ...

    @property
    def warnings(self) -> tuple[str, ...]: ...

    def prompt(
        self,
        text: str,
        transition: str = "recache",
        *,
        apply_at: ApplyAt = "next_block",
        at_media_s: float | None = None,
        blend_blocks: int = 4,
    ) -> Receipt: ...

    def playhead(self, media_s: float) -> None: ...

    def pause(self) -> None: ...

    def play(self) -> None: ...

    def seek(self, media_s: float) -> Receipt: ...

    def branch(self) -> dict[str, Any]: ...

    def steps(self, count: int | None) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Engine(Protocol):
    """What the server calls of `streamgen_infer.runtime.Runtime`."""

    @property
    def pipe(self) -> Any: ...

    @property
    def failure(self) -> BaseException | None: ...

    def start(self) -> None: ...

    def open(
        self,
        request: StreamRequest,
        *,
        on_block: Callable[[MadeBlock], None],
        on_event: Callable[[StreamEvent], None],
    ) -> Live: ...

    def stats(self) -> RuntimeStats: ...

    def close(self) -> None: ...
