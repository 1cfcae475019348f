"""Clients that wait for a place on a full machine: first come, first served, and nobody overtakes.

Only the first in line tries. It tries again when a session ends, and every `POLL_S` besides: streams also end, and
costs change, without a word. All of it on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from streamgen_infer.protocol import Refusal
from streamgen_infer.requests import Refused
from streamgen_infer.serve.session_state import Engine

if TYPE_CHECKING:
    from streamgen_infer.serve.session import Session

POLL_S = 0.5
SETTLE_S = 0.02
"""A stream that was closed leaves the runtime between two launches."""
RETRY_S = 5.0
"""Said to those for whom the line has no end."""


class Turn:
    """One client's wait. `leave` (the client is gone) may be said at any time; `changed` is set with every `place`."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.until_s, self.clock = clock() + seconds, clock
        self.place: int | None = None
        """1 is next; None before and after the line."""
        self.short = ""
        """What the machine is short of, in words."""
        self.gone = False
        self.changed, self.wake = asyncio.Event(), asyncio.Event()

    def leave(self) -> None:
        """Give up the wait."""
        self.gone = True
        self.wake.set()

    @property
    def left_s(self) -> float:
        return self.until_s - self.clock()


class WaitingLine:
    """Those who wait, in order; at most `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._turns: list[Turn] = []

    def __len__(self) -> int:
        return len(self._turns)

    async def wait(self, turn: Turn, short: str, *, tried: bool) -> None:
        """Until this turn may try; Refusal when its time is over, the client is gone, or the line is full.

        A first call joins the line; `leave` takes out of it. tried: just now, in vain.
        """
        turn.short = short
        if turn not in self._turns:
            if len(self._turns) >= self.most:
                raise self._refusal(f"{short}; {len(self._turns)} clients wait already, no more may")
            self._turns.append(turn)
            self._count()
        while not turn.gone and turn.left_s > 0:
            first = self._turns[0] is turn
            if first and not tried:
                return
            tried = False
            with suppress(TimeoutError):
                async with asyncio.timeout(min(turn.left_s, POLL_S if first else turn.left_s)):
                    await turn.wake.wait()
                    await asyncio.sleep(SETTLE_S)
            turn.wake.clear()
        raise self._refusal(f"no place was free in time: {short}")

    def leave(self, turn: Turn) -> None:
        """Admitted, refused or gone: the next is first."""
        if turn in self._turns:
            self._turns.remove(turn)
            turn.place = None
            self._count()
            self.poke()

    def poke(self) -> None:
        """A place may be free."""
        if self._turns:
            self._turns[0].wake.set()

    def wake_all(self) -> None:
        """Everybody looks whether it is still worth waiting."""
        for turn in self._turns:
            turn.wake.set()

    def check(self) -> None:
        """Refusal for a client that does not wait, while others do."""
        if self._turns:
            raise self._refusal(f"the machine is full, and clients wait for a place ({len(self)}): use wait_seconds")

    def _refusal(self, message: str) -> Refusal:
        return Refusal("overload", message, fatal=True, retry_after_s=RETRY_S, numbers={"waiting": float(len(self))})

    def _count(self) -> None:
        for at, turn in enumerate(self._turns, 1):
            if turn.place != at:
                turn.place = at
                turn.changed.set()


async def open_in_turn(
    session: Session,
    engine: Engine,
    saved: dict[str, Any] | None,
    line: WaitingLine,
    turn: Turn | None,
    *,
    check: Callable[[], object],
) -> None:
    """Open a session now, if there is a place; with a turn, when there is one. Refusal if it is not to be had.

    check: raises if no session can begin any more.
    """
    since_s, tries, waited = session.clock(), 0, False

    async def wait(short: str, *, tried: bool) -> None:
        nonlocal waited
        assert turn is not None
        waited = True
        await line.wait(turn, short, tried=tried)
        check()
        if session.life.state != "queued":
            raise Refusal("illegal_state", "the session was ended while it waited", fatal=True)

    async def again(refused: Refused) -> bool:
        nonlocal tries
        tries += 1
        alone = refused.resource != "replicas" and engine.stats().streams == 0
        if turn is None or (alone and tries > 1):  # nobody's end would help
            return False
        await wait(str(refused), tried=not alone)
        return True

    session.go("queued")
    try:
        if turn is None:
            line.check()
        elif len(line):
            await wait("clients wait for a place", tried=False)
        await session.open(engine, saved, again=again)
        if waited:
            session.metrics.waited.observe(session.clock() - since_s)
    except Refusal:
        session.go("closed")
        raise
    finally:
        if turn is not None:
            line.leave(turn)
