"""Tensors in shards (DTensor) beside ordinary ones, handled alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor (all of an ordinary one), sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered if it is in shards: every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, spread_as: Tensor) -> Tensor:
    """A whole tensor that all processes have, spread as `spread_as` is; nothing is sent."""
    if not isinstance(spread_as, DTensor):
        return tensor
    return distribute_tensor(tensor, spread_as.device_mesh, spread_as.placements, src_data_rank=None)


def by_kind(tensors: Iterable[Tensor], call: Callable[[list[Tensor]], Tensor]) -> list[Tensor]:
    """`call` on the ordinary tensors and on those in shards, each if there are any; results whole."""
    items = list(tensors)
    kinds: list[list[Tensor]] = [
        [t for t in items if not isinstance(t, DTensor)],
        [t for t in items if isinstance(t, DTensor)],
    ]
    return [whole(call(kind)) for kind in kinds if kind]
