"""How many layers to recompute in the backward, by what one pass is measured to keep for it.

A layer that is recomputed keeps its input alone, and costs a second forward pass of itself. So the fewest are taken
that make the largest batch fit what is free on the device. They are the first layers: their turn comes last,
when the others have let go of what they kept.
Under train.compile the pass is measured uncompiled, which keeps more: the choice is then on the safe side.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from streamgen.errors import UserError
from streamgen.memory import free_bytes
from streamgen.parallel.processes import ALONE, Processes
from streamgen.parallel.tensors import local
from streamgen_train.objective import HeaviestPass, Objective

USABLE_SHARE = {"cpu": 0.5, "cuda": 0.8}
"""Of the free memory: the rest is for what the allocator cannot fill, and for what others on the machine take. On a CPU
steps of 1.14 GB of tensors at a time made the process grow by 2.07 GB (glibc)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What autograd keeps of one pass for its backward, parameters left out."""

    layers_bytes: tuple[int, ...]
    """Of each layer, its inputs left out."""
    rest_bytes: int
    """Kept whether or not layers are recomputed: inputs of layers, and what is outside them."""
    layer_s: float
    """Median time of a layer's forward."""


def needed_bytes(kept: Kept, recomputed: int) -> int:
    """At the worst moment of the backward: one more layer's worth stands for the gradients on their way."""
    largest = max(kept.layers_bytes)
    later = sum(kept.layers_bytes[recomputed:])
    return kept.rest_bytes + max(later, largest if recomputed else 0) + largest


def fewest_layers(kept: Kept, free: int, share: float) -> int | None:
    """Layers to recompute so that a share of the free memory is enough; None: all of it is not, with all layers."""
    layers = len(kept.layers_bytes)
    for count in range(layers + 1):
        if needed_bytes(kept, count) <= share * free:
            return count
    return layers if needed_bytes(kept, layers) <= free else None


def fit(objective: Objective, device: torch.device, to_come_bytes: int, processes: Processes = ALONE) -> list[str]:
    """Settle `objective.recompute`, alike in all processes; -> what the run should say about it.

    to_come_bytes: what the run is going to take besides activations. Random numbers stay as they are.
    UserError when the largest batch does not fit with every layer recomputed.
    """
    heaviest = objective.heaviest_pass() if objective.recompute == "auto" else None
    if heaviest is None:
        return []
    free = free_bytes(device)
    if free is None:
        return [f"activations: how much memory is free on {device} is not known, so nothing is recomputed"]
    shared_by = processes.count if device.type == "cpu" else 1
    free = max(free // shared_by - to_come_bytes, 0)
    kept = measure(heaviest, device)
    chosen, layers = fewest_layers(kept, free, USABLE_SHARE.get(device.type, 0.5)), len(kept.layers_bytes)
    count = processes.largest(layers + 1 if chosen is None else chosen)
    if count > layers:
        raise UserError(
            f"the largest batch ({heaviest.size}) does not fit: it needs {_gb(needed_bytes(kept, layers))} with every "
            f"layer recomputed, and {_gb(free)} are free on {device} for activations; lower "
            f"{heaviest.size.partition('=')[0]}"
        )
    objective.recompute_layers(count)
    return [describe(kept, free, count, heaviest.size)]


def describe(kept: Kept, free: int, recomputed: int, size: str) -> str:
    """The run's note."""
    layers = len(kept.layers_bytes)
    line = (
        f"activations ({size}): a layer keeps {_gb(max(kept.layers_bytes))} for the backward, the rest "
        f"{_gb(kept.rest_bytes)}; {_gb(free)} free; "
    )
    if not recomputed:
        return line + "no layer is recomputed"
    longer_s = recomputed * kept.layer_s
    return line + f"{recomputed} of {layers} layers are recomputed, about {longer_s:.3g} s more for each such batch"


def measure(heaviest: HeaviestPass, device: torch.device) -> Kept:
    """Run the pass once. What it would keep is counted and let go, so measuring needs no memory for it."""
    ledger = _Ledger()
    device_list = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(device_list), torch.enable_grad(), _watched(heaviest.model, ledger, device):
        heaviest.run()
    layers = len(heaviest.model.blocks)
    return Kept(
        layers_bytes=tuple(ledger.bytes_of.get(layer, 0) for layer in range(layers)),
        rest_bytes=ledger.bytes_of.get(None, 0),
        layer_s=statistics.median(ledger.seconds),
    )


@dataclass(slots=True)
class _Ledger:
    """Bytes kept, by the layer that is running (None: none)."""

    layer: int | None = None
    bytes_of: dict[int | None, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    started_s: float = 0.0
    _seen: dict[int, StorageWeakRef] = field(default_factory=dict)
    """A weak reference keeps the storage's identity from being given to another, and none of its memory."""

    def is_new(self, tensor: Tensor) -> bool:
        """Is this the first tensor of its storage? From now on it is not."""
        reference = StorageWeakRef(local(tensor).untyped_storage())
        if reference.cdata in self._seen:
            return False
        self._seen[reference.cdata] = reference
        return True

    def pack(self, tensor: Tensor) -> None:
        """In place of keeping it: there will be no backward."""
        self.add(self.layer, tensor)

    def add(self, layer: int | None, tensor: Tensor) -> None:
        if self.is_new(tensor):
            self.bytes_of[layer] = self.bytes_of.get(layer, 0) + local(tensor).untyped_storage().nbytes()

    def enter(self, layer: int, device: torch.device, block: nn.Module, args: tuple[Any, ...]) -> None:
        for parameter in block.parameters():  # of a module in shards, they have been gathered by now
            self.is_new(parameter)
        for leaf in tree_leaves(args):
            if isinstance(leaf, Tensor):
                self.add(None, leaf)
        self.layer, self.started_s = layer, _now_s(device)

    def leave(self, device: torch.device, *_: Any) -> None:
        self.seconds.append(_now_s(device) - self.started_s)
        self.layer = None


@contextmanager
def _watched(model: nn.Module, ledger: _Ledger, device: torch.device) -> Iterator[None]:
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.is_new(tensor)
    handles: list[RemovableHandle] = []
    for layer, block in enumerate(model.get_submodule("blocks").children()):
        handles.append(block.register_forward_pre_hook(partial(ledger.enter, layer, device)))
        handles.append(block.register_forward_hook(partial(ledger.leave, device)))
    try:
        with torch.autograd.graph.saved_tensors_hooks(ledger.pack, _unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _unpack(packed: Any) -> Tensor:
    raise AssertionError("a measured pass has no backward")


def _now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _gb(number: float) -> str:
    """In MB below a gigabyte."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
