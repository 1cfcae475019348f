"""The processes of one program, as torchrun starts them: rank, agreement, and an end for all when one ends.

Backends: gloo for tensors on the CPU (and for everything said here), NCCL besides for tensors on CUDA.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from streamgen.errors import UserError

T = TypeVar("T")
START_S = 300
"""How long processes wait for each other to start."""
LOST = ("gloo", "Connection closed", "Connection reset", "pair closure", "Timed out", "NCCL", "Broken pipe")
"""Words in the RuntimeErrors of collectives whose other side is gone."""


class ProcessError(RuntimeError):
    """Another process of the program failed, was killed or does not answer."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among all; one process alone needs no process group and says everything to itself."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Number on its machine."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all, by rank. Plain data."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        """The first process's value, in all."""
        if self.count == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def first_does(self, call: Callable[[], T]) -> T:
        """Let the first process alone do it; -> its result in all, or its error raised in all."""
        if self.count == 1:
            return call()
        result: T | None = None
        error: Exception | None = None
        if self.is_first:
            try:
                result = call()
            except Exception as caught:  # noqa: BLE001 (raised below, in every process)
                error = caught
        result, message = self.from_first((result, None if error is None else (type(error), str(error))))
        if error is not None:
            raise error
        if message is not None:
            kind, text = message
            raise kind(text) if issubclass(kind, UserError | RuntimeError) else RuntimeError(f"{kind.__name__}: {text}")
        return result  # type: ignore[return-value]

    def largest(self, number: int) -> int:
        """Over all."""
        if self.count == 1:
            return number
        votes = torch.tensor([number])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return int(votes.item())

    def mean_(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over all."""
        if self.count > 1:
            dist.all_reduce(tensor)
            tensor.div_(self.count)

    def copy_from_first_(self, tensor: Tensor) -> None:
        if self.count > 1:
            dist.broadcast(tensor, src=0)


ALONE = Processes()


def started_by_torchrun() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank_from_environment() -> int:
    """0 without torchrun; for what is decided before the processes have joined."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def joined(on_cuda: bool, timeout_s: float, *, group_of_one: bool = False) -> Iterator[Processes]:
    """Join the other processes for the length of the body; alone when torchrun (or the caller) started no others.

    A process that fails says why before it leaves (which it should do by `leave`). When another one is gone, the next
    collective raises within `timeout_s` (at once, if its connections closed), and what leaves here is a ProcessError
    that says what is known.
    `group_of_one`: have a process group even when alone (sharding needs one).
    """
    ours = not dist.is_initialized()
    if ours and not started_by_torchrun() and not group_of_one:
        yield ALONE
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_cuda:
        torch.cuda.set_device(local_rank)
    if ours:
        _start_group(on_cuda, timeout_s)
    processes = Processes(dist.get_rank(), dist.get_world_size(), local_rank)
    try:
        yield processes
    except BaseException as error:
        if processes.count > 1 and isinstance(error, RuntimeError) and _is_loss(error):
            raise ProcessError(_what_happened(processes, timeout_s)) from error
        _leave_word(processes.rank, error)
        raise
    if ours:  # but not after an error: taking broken connections down may wait or abort
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process without taking down what torch's threads still hold. After an error, connections may hang or
    abort when others are gone (the others notice by their being closed); after a good end, threads of the group that
    are not joined sometimes abort the interpreter's exit ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _start_group(on_cuda: bool, timeout_s: float) -> None:
    """Meet first, for as long as starting programs may take; `timeout_s` is for those that are there."""
    if started_by_torchrun():
        try:
            store, rank, count = next(rendezvous("env://", timeout=timedelta(seconds=START_S)))
            store.set(f"here/{rank}", "1")
            store.wait([f"here/{other}" for other in range(count)], timedelta(seconds=START_S))
        except (dist.DistError, RuntimeError) as error:
            raise ProcessError(
                f"the processes did not all come within {START_S} s ({_first_line(error)}); "
                "start them with torchrun, and see what the others say"
            ) from error
    else:
        store, rank, count = dist.HashStore(), 0, 1  # type: ignore[attr-defined]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=store,
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=timeout_s),
    )


def _is_loss(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in LOST)


def _leave_word(rank: int, error: BaseException) -> None:
    """Tell the store why this process leaves, for the others to read."""
    reason = f"{type(error).__name__}: {_first_line(error)}"
    try:
        _store().set(f"failed/{rank}", reason)
    except RuntimeError as gone:
        error.add_note(f"(the other processes could not be told: {_first_line(gone)})")


def _what_happened(processes: Processes, timeout_s: float) -> str:
    found = []
    try:
        store = _store()
        for rank in range(processes.count):
            if rank != processes.rank and store.check([f"failed/{rank}"]):
                found.append(f"process {rank} of {processes.count} failed: {store.get(f'failed/{rank}').decode()}")
    except RuntimeError as gone:
        found.append(f"the store of the processes is gone too: {_first_line(gone)}")
    return "; ".join(found) or (
        f"another of the {processes.count} processes ended without a word (killed?), "
        f"or did not answer for {timeout_s:g} s"
    )


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0]
