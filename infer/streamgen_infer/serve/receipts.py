"""Commands between *received* and *applied*: which block is the first that obeys each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from streamgen_infer import protocol as p
from streamgen_infer.serve.viewer_queue import BlockInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A command that was received. It is applied by the first block that fits the one condition given."""

    command: str
    version: int
    id: str | None
    event_id: str | None = None
    prompt_version: int | None = None
    """A block with this prompt or a later one, from `from_block` on: one for later is not shown by one for now."""
    from_block: int = 0
    above_epoch: int | None = None
    """A block of a later epoch."""
    steps: int | None = None
    """A block of so many steps; with no condition at all: the next block."""

    def holds(self, info: BlockInfo) -> bool:
        if self.prompt_version is not None:
            return info.block >= self.from_block and info.prompt_version >= self.prompt_version
        if self.above_epoch is not None:
            return info.epoch > self.above_epoch
        return self.steps is None or info.steps == self.steps

    def applied(self, block: int, media_s: float, epoch: int, **more: str | None) -> p.Message:
        common: dict[str, Any] = {"id": self.id, "version": self.version, "block": block}
        common |= {"media_seconds": media_s, "epoch": epoch, **more}
        if self.event_id is None:
            return p.Applied(command=self.command, **common)
        return p.InteractionApplied(event_id=self.event_id, prompt_version=self.prompt_version or 0, **common)


@dataclass(slots=True)
class Receipts:
    """The accepted commands of one session."""

    version: int = 0
    waiting: list[Waiting] = field(default_factory=list)
    _events: dict[int, list[str]] = field(default_factory=dict)
    """Block -> interactions that it is the first to show, until it is announced."""

    def accept(self, command: str, id: str | None, **condition: Any) -> Waiting:
        self.version += 1
        return Waiting(command=command, version=self.version, id=id, **condition)

    def supersede_steps(self) -> None:
        """Other steps are asked for: those before may never be seen, so the next block answers for them."""
        self.waiting = [replace(item, steps=None) if item.command == "session.steps" else item for item in self.waiting]

    def block(self, info: BlockInfo, media_s: float) -> list[p.Message]:
        """What to say when this block is made."""
        now = [item for item in self.waiting if item.holds(info)]
        self.waiting = [item for item in self.waiting if not item.holds(info)]
        for item in now:
            if item.event_id is not None:
                self._events.setdefault(info.block, []).append(item.event_id)
        return [item.applied(info.block, media_s, info.epoch) for item in now]

    def started(self, block: int) -> tuple[str, ...]:
        """The interactions to name with this block; those of blocks before it were never announced."""
        for old in [index for index in self._events if index < block]:
            del self._events[old]
        return tuple(self._events.pop(block, ()))
