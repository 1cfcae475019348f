"""Training in several processes: who makes which microbatches, where weights live, how gradients meet.

    ddp     every process has all weights; after the last microbatch the fp32 gradients are averaged
    fsdp2   modules with `blocks` are in shards (FSDP2), gradients averaged as they are made; other modules as in ddp

`train.accumulate` counts the microbatches of a step over all processes, and process r of n makes r, r + n, ...: a step
is the same to rounding in any number of processes. Frozen parts of an objective (teachers, codec) stay whole.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from streamgen.errors import UserError
from streamgen.parallel.processes import Processes
from streamgen_train.config import TrainConfig
from streamgen_train.objective import Modules


def device_of(name: str, processes: Processes) -> torch.device:
    """`train.device`; with several processes each takes the CUDA device of its number."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"train.device={name!r} is not a device; use cpu or cuda") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("train.device=cuda, but torch sees no CUDA device here; use train.device=cpu")
        if processes.count > 1:
            return torch.device("cuda", processes.local_rank)
    return device


def is_cuda(name: str) -> bool:
    """Of `train.device`, which may be nonsense still."""
    return name.split(":")[0] == "cuda"


def sharding_of(config: TrainConfig, processes: Processes) -> str:
    """none, ddp or fsdp2; refuses what this number of processes cannot do."""
    count = processes.count
    if config.accumulate % count:
        raise UserError(
            f"train.accumulate is {config.accumulate}, but must be a multiple of the {count} processes: "
            "it counts the microbatches of a step over all of them"
        )
    if config.sharding == "auto":
        return "none" if count == 1 else "ddp"
    if config.sharding == "none" and count > 1:
        raise UserError(f"train.sharding=none is for one process, but there are {count}; set auto, ddp or fsdp2")
    return config.sharding


def own_microbatches(accumulate: int, processes: Processes) -> range:
    return range(processes.rank, accumulate, processes.count)


def shard_modules(
    modules: Modules, device: torch.device, dtype: torch.dtype, processes: Processes
) -> tuple[list[str], dict[str, nn.Module]]:
    """Spread what can be spread; -> the names of those, and copies of all modules, spread alike."""
    from streamgen.parallel.fsdp import can_shard, mesh_of_all, shard

    names = [name for name, module in modules.items() if can_shard(module)]
    if not names:
        raise UserError(
            f"train.sharding=fsdp2 needs a module with blocks, and {', '.join(modules)} have none; "
            "set train.sharding=ddp"
        )
    # We take no output in place: the model's own code does not, and the rule is written in objective.py.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    copies = copy.deepcopy(dict(modules))
    mesh = mesh_of_all(device, processes.count)
    for name in names:
        shard(modules[name], mesh, dtype)
        shard(copies[name], mesh, dtype)
    return names, copies


def release(module: nn.Module) -> None:
    """Let go of what a module in shards has gathered."""
    from streamgen.parallel import fsdp

    fsdp.release(module)


def equalise(modules: Modules, processes: Processes) -> None:
    """The first process's weights and buffers in all, whatever their initial random numbers were."""
    for module in modules.values():
        for tensor in (*module.parameters(), *module.buffers()):
            processes.copy_from_first_(tensor.detach())


def average_gradients(tensors: Mapping[str, Tensor], processes: Processes) -> None:
    """Mean over the processes of the gradients of whole tensors (of those in shards FSDP has made it).

    A tensor that only some processes used in their microbatches had a gradient of zero in the others.
    """
    mine = [tensor for tensor in tensors.values() if not isinstance(tensor, DTensor)]
    if processes.count == 1 or not mine:
        return
    used = torch.tensor([tensor.grad is not None for tensor in mine], dtype=torch.uint8)
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    chosen = [tensor for tensor, is_used in zip(mine, used.tolist(), strict=True) if is_used]
    if not chosen:
        return
    flat = torch.cat([(torch.zeros_like(t) if t.grad is None else t.grad).flatten() for t in chosen])
    processes.mean_(flat)
    for tensor, grad in zip(chosen, flat.split([t.numel() for t in chosen]), strict=True):
        tensor.grad = grad.view_as(tensor)
