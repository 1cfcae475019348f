"""Several replicas as one engine: the frame server's `Engine` over any number of processes. No torch, no Ray here.

    session -> MovingStream -> Handle ... Replica -> Runtime
    one thread for each replica takes what its streams made; no answer in time: the replica is dead, its streams move

New streams go to the least loaded replica that admits them and stay there, until it drains or dies.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from streamgen.errors import UserError
from streamgen_infer.requests import MadeBlock, Refused, RuntimeStats, StreamEvent, StreamRequest
from streamgen_infer.serve.moving_stream import Dead, Handle, MovingStream, Place
from streamgen_infer.serve.placement import ClockOffset, ReplicaView, candidates, refusal, total
from streamgen_infer.serve.replica import Answer, Card, Handed, Released

log = logging.getLogger("streamgen.serve")
TAKE_WAIT_S = 0.5
DEAD_AFTER_S = 10.0
START_S = 600.0
"""Loading and warming up."""
OPEN_S = 60.0
RECOVER_S = 60.0
"""So long a stream that lost its replica may look for another."""
SETTLE_S = 5.0
"""After a loss, before another replica is started."""
DRAIN_ROUND_S = 5.0
CLOSE_S = 10.0
MAX_FALLS = 3
"""So many replicas in a row may die before they are of use; then no more are started."""


@dataclass(slots=True)
class _Member:
    """A replica and what is on it."""

    name: str
    handle: Handle
    card: Card
    streams: dict[str, MovingStream] = field(default_factory=dict)
    """By their names there."""
    offset: ClockOffset = field(default_factory=ClockOffset)
    stats: RuntimeStats = field(default_factory=RuntimeStats)
    leaving: int = 0
    """Streams that it released and that no replica has yet."""
    draining: bool = False
    alive: bool = True

    def view(self) -> ReplicaView:
        return ReplicaView(name=self.name, streams=len(self.running()), draining=self.draining, alive=self.alive)

    def running(self) -> dict[str, MovingStream]:
        return {there: stream for there, stream in self.streams.items() if not stream.ended}

    @property
    def empty(self) -> bool:
        return not self.leaving and not self.running()


class Fleet:
    """See the module. spawn: a replica of this name, not started yet.

    dead_after_s: a replica that says nothing for so long is ended, and its streams are made elsewhere.
    """

    def __init__(
        self,
        spawn: Callable[[str], Handle],
        replicas: int,
        *,
        dead_after_s: float = DEAD_AFTER_S,
        recover_s: float = RECOVER_S,
        settle_s: float = SETTLE_S,
        on_close: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spawn, self._count, self._on_close, self._clock = spawn, replicas, on_close, clock
        self._dead_after_s, self._recover_s, self._settle_s = dead_after_s, recover_s, settle_s
        self.failure: BaseException | None = None
        self._card: Card | None = None
        self._members: dict[str, _Member] = {}
        self._past = RuntimeStats()
        """Counters of the replicas that are no more."""
        self._replica_numbers, self._stream_numbers = itertools.count(), itertools.count()
        self._falls = 0
        self._closing = False
        self._changed = threading.Condition(threading.RLock())

    @property
    def pipe(self) -> Card:
        """What the server asks of the pipeline."""
        assert self._card is not None, "start comes first"
        return self._card

    def start(self) -> None:
        """Start all replicas, at once; the first error of them is raised."""
        with ThreadPoolExecutor(self._count) as pool:
            for started in [pool.submit(self._add) for _ in range(self._count)]:
                started.result()
        with self._changed:  # in the order of their names, whichever was the quickest
            self._members = dict(sorted(self._members.items(), key=lambda one: int(one[0][1:])))

    def open(
        self,
        request: StreamRequest,
        *,
        on_block: Callable[[MadeBlock], None],
        on_event: Callable[[StreamEvent], None],
    ) -> MovingStream:
        """A stream on the least loaded replica that admits it; Refused when none does, UserError as the runtime's."""
        stream = MovingStream(
            f"s{next(self._stream_numbers)}",
            request,
            self.pipe.geometry,
            on_block=on_block,
            on_event=on_event,
            on_dead=self._dead,
            on_homeless=self._homeless,
        )
        self._place(stream, moving=False)
        return stream

    def process_of(self, name: str) -> int:
        """The process of a replica, on its machine."""
        return self._members[name].card.process

    def replicas(self) -> list[ReplicaView]:
        """Those that are alive."""
        with self._changed:
            return [one.view() for one in self._members.values()]

    def drain(self, name: str, *, replace: bool = True, within_s: float = RECOVER_S) -> bool:
        """Let a replica end without a viewer noticing: no new streams, the ones it has go to others.

        replace: another is started first. False if streams are still there after `within_s`, because nobody else
        admits them; they go on there, and the replica takes no new ones.
        """
        with self._changed:
            member = self._members.get(name)
            if member is None:
                there = ", ".join(self._members) or "none"
                raise UserError(f"there is no replica {name!r}; there are: {there}")
            member.draining = True
        if replace:
            self._add()
        until_s = self._clock() + within_s
        while not member.empty and member.alive:
            left_s = until_s - self._clock()
            if left_s <= 0:
                return False
            for stream in member.running().values():
                stream.release()
            with self._changed:  # one that nobody else admits comes back, and is asked to go again
                self._changed.wait_for(lambda: member.empty or not member.alive, min(left_s, DRAIN_ROUND_S))
        with self._changed:
            self._remove(member)
        self._end(member)
        log.info("replica %s is drained", name)
        return True

    def renew(self) -> None:
        """Replace all replicas, one after the other, while their streams go on."""
        with self._changed:
            names = list(self._members)
        for name in names:
            try:
                if not self.drain(name):
                    log.error("replica %s is not replaced: no other takes its streams; it takes no new ones", name)
            except Exception:
                log.exception("replica %s is not replaced", name)

    def stats(self) -> RuntimeStats:
        """The counters of all replicas together, as they were last heard."""
        with self._changed:
            return total([self._past, *(one.stats for one in self._members.values())])

    def close(self) -> None:
        """End all replicas."""
        with self._changed:
            self._closing = True
            members = list(self._members.values())
            for member in members:
                self._remove(member)
            self._changed.notify_all()
        if members:
            with ThreadPoolExecutor(len(members)) as pool:
                list(pool.map(self._end, members))
        self._on_close()

    # Replicas come and go.

    def _add(self) -> None:
        """Start one more, and listen to it."""
        name = f"r{next(self._replica_numbers)}"
        handle = self._spawn(name)
        try:
            card: Card = handle.call("start", timeout_s=START_S)
        except BaseException:
            handle.kill()
            raise
        with self._changed:
            if self._closing:
                handle.kill()
                return
            self._card = self._card or card
            member = self._members[name] = _Member(name, handle, card)
            self._changed.notify_all()
        threading.Thread(target=self._listen, args=(member,), name=f"streamgen-{name}", daemon=True).start()
        log.info("replica %s is ready: process %d on %s", name, card.process, card.host)

    def _listen(self, member: _Member) -> None:
        """Pass on what a replica has, until it is no more."""
        while member.alive:
            try:
                handed: Handed = member.handle.call("take", TAKE_WAIT_S, timeout_s=self._dead_after_s)
            except Exception as error:  # noqa: BLE001 (whatever it is, this replica is of no use any more)
                self._dead(member.name, f"{type(error).__name__}: {error}")
                return
            member.offset.heard(handed.now_s, self._clock())
            member.stats = handed.stats
            if handed.items:
                self._falls = 0
            for name, item in handed.items:
                with self._changed:
                    stream = member.streams.get(name)
                if stream is None:
                    continue
                if isinstance(item, Released):
                    self._leave(member, name, stream, item)
                    continue
                try:
                    stream.take(name, item, member.offset.offset_s)
                except Exception:  # a viewer's callback that raises ends its own stream and nobody else's
                    log.exception("stream %s ends", stream.id)
                    stream.close()
            self._let_go(member)
            if handed.failure is not None:
                self._dead(member.name, f"its runtime failed: {handed.failure}")

    def _dead(self, name: str, why: str) -> None:
        """A replica is lost: end what is left of it, move its streams, start another. A second call does nothing."""
        with self._changed:
            member = self._members.get(name)
            if member is None or self._closing:
                return
            self._remove(member)
            self._falls += 1
            again = self._falls <= MAX_FALLS
            streams = list(member.streams.items())
        log.error("replica %s is lost with %d streams: %s", name, len(streams), why)
        member.handle.kill()
        for there, stream in streams:
            self._leave(member, there, stream, None)
        if again:
            threading.Thread(target=self._replace, args=(member,), name="streamgen-replace", daemon=True).start()
        else:
            self._give_up(f"{self._falls} replicas were lost in a row; the last: {why}")

    def _replace(self, member: _Member) -> None:
        with self._changed:  # its streams first: a model that is being loaded takes the time that they need
            self._changed.wait_for(lambda: self._closing or not self._members, self._settle_s)
            if self._closing:
                return
        try:
            self._add()
        except Exception as error:
            log.exception("no replica in place of %s", member.name)
            self._give_up(f"no replica can be started: {type(error).__name__}: {error}")

    def _give_up(self, why: str) -> None:
        """Without any replica left the server is of no use, and /readyz says so."""
        with self._changed:
            if not self._members and not self._closing:
                self.failure = RuntimeError(why)

    def _remove(self, member: _Member) -> None:
        """With the lock held: it counts no more."""
        member.alive = False
        if self._members.pop(member.name, None) is not None:
            self._past = total([self._past, member.stats])
            self._past.streams = self._past.bytes_held = 0
        self._changed.notify_all()

    def _end(self, member: _Member) -> None:
        try:
            member.handle.call("close", timeout_s=CLOSE_S)
        except Dead as error:
            log.warning("replica %s did not close: %s", member.name, error)
        member.handle.kill()

    # Streams come, go and move.

    def _place(self, stream: MovingStream, *, moving: bool) -> str:
        """On the first replica that admits it, and which that is; Refused if there is none."""
        with self._changed:
            names = candidates((one.view() for one in self._members.values()), moving=moving)
        refusals: list[Refused] = []
        for replica in names:
            there, order = stream.order()
            with self._changed:
                member = self._members.get(replica)
                if member is None:
                    continue
                member.streams[there] = stream
            answer = self._open_there(member, there, order)
            if answer is not None and answer.refused is None and answer.mistake is None:
                if not stream.enter(Place(replica, member.handle, there), answer):
                    member.handle.send("forget", there)
                if member.alive or not stream.leave(there):
                    return replica
                continue  # it died just now, and nobody else saw to it
            with self._changed:
                member.streams.pop(there, None)
            if answer is not None and answer.mistake is not None:
                raise UserError(answer.mistake)
            if answer is not None and answer.refused is not None:
                resource, message, retry_s, numbers = answer.refused
                refusals.append(Refused(resource, message, retry_after_s=retry_s, numbers=numbers))
        raise refusal(refusals)

    def _open_there(self, member: _Member, there: str, order: object) -> Answer | None:
        try:
            answer: Answer = member.handle.call("open", there, order, timeout_s=OPEN_S)
        except Dead as error:
            with self._changed:
                member.streams.pop(there, None)
            self._dead(member.name, str(error))
            return None
        except BaseException:
            with self._changed:
                member.streams.pop(there, None)
            raise
        return answer

    def _leave(self, member: _Member, there: str, stream: MovingStream, released: Released | None) -> None:
        """A stream has no replica; look for another in a thread of its own."""
        with self._changed:
            member.streams.pop(there, None)
            member.leaving += 1
        if stream.leave(there, released):
            self._go_on(stream, member)
        else:
            self._left(member)

    def _homeless(self, stream: MovingStream, place: Place) -> None:
        """It left by itself, to go on from elsewhere in its own time."""
        with self._changed:
            member = self._members.get(place.replica)
            if member is not None:
                member.streams.pop(place.name, None)
                member.leaving += 1
        self._go_on(stream, member)

    def _go_on(self, stream: MovingStream, member: _Member | None) -> None:
        def move() -> None:
            try:
                self._move(stream)
            finally:
                self._left(member)

        threading.Thread(target=move, name=f"streamgen-move-{stream.id}", daemon=True).start()

    def _left(self, member: _Member | None) -> None:
        with self._changed:
            if member is not None:
                member.leaving -= 1
            self._changed.notify_all()

    def _move(self, stream: MovingStream) -> None:
        until_s = self._clock() + self._recover_s
        while not stream.closed:
            try:
                replica = self._place(stream, moving=True)
                log.info("stream %s goes on at replica %s", stream.id, replica)
                return
            except Refused as error:
                if self._closing or self.failure is not None or self._clock() > until_s:
                    return stream.fail(f"its replica was lost, and no other takes it: {error}")
                with self._changed:
                    self._changed.wait(min(error.retry_after_s, 1.0))
            except Exception as error:
                log.exception("stream %s does not go on", stream.id)
                return stream.fail(f"its replica was lost: {type(error).__name__}: {error}")

    def _let_go(self, member: _Member) -> None:
        """Forget the streams that viewers closed."""
        with self._changed:
            for there, stream in list(member.streams.items()):
                if stream.closed:
                    del member.streams[there]
            self._changed.notify_all()
