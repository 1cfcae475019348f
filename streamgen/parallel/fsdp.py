"""A module in shards over processes: FSDP2 (`fully_shard`), the weights gathered for as long as they are used.

FSDP gathers the weights of a unit when the unit's forward is called. A method that is called from outside and uses
weights must gather them too, and so must a part that is called past its unit's forward: both stand in `PLANS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from streamgen.transformer import CausalWanModel

BLOCKS = "blocks"


@dataclass(frozen=True, slots=True)
class Plan:
    """What of a module gathers its weights by itself, and which methods gather them besides forward."""

    parts: tuple[str, ...] = ()
    """Submodules of each block that are units of their own, for they are also called past the block's forward."""
    part_methods: tuple[str, ...] = ()
    root_methods: tuple[str, ...] = ()


PLANS: dict[type[nn.Module], Plan] = {
    # encode_text goes to the cross-attention of every block, for its keys and values
    CausalWanModel: Plan(parts=("cross_attn",), part_methods=("encode",), root_methods=("encode_text",)),
}


def can_shard(module: nn.Module) -> bool:
    """Modules with a list of blocks are worth it; FSDP needs a forward to hook on."""
    has_forward = type(module).forward is not nn.Module.forward
    return has_forward and isinstance(getattr(module, BLOCKS, None), nn.ModuleList)


def shard(module: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Spread a module over the processes of `mesh`, in place: a unit for each block, and one for the rest.

    Parameters stay in their dtype (fp32: they are the masters), and are gathered in `compute_dtype`; gradients are
    averaged in fp32. Inputs are not cast: the model does that where it must, and a timestep must not become bf16.
    Call `release` before the weights change and after passes without gradient.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    plan = next((PLANS[kind] for kind in type(module).__mro__ if kind in PLANS), Plan())
    for block in module.get_submodule(BLOCKS).children():
        for part in plan.parts:
            unit = block.get_submodule(part)
            fully_shard(unit, reshard_after_forward=True, **options)
            _register(unit, plan.part_methods)
        fully_shard(block, reshard_after_forward=True, **options)
    # What is outside of blocks stays gathered after a forward until its backward, for a loss may use the outputs of
    # blocks alone (a GAN's features), and then nothing tells FSDP to gather it again. `release` ends that.
    root = fully_shard(module, reshard_after_forward=False, **options)
    _register(module, plan.root_methods)
    # FSDP notes at the first forward in what dtype to reduce, and for parameters that are frozen just then it notes
    # nothing, for ever; modules that learn in turns are therefore shown to it now, while all require gradients.
    root._get_fsdp_state()._lazy_init()


def release(module: nn.Module) -> None:
    """Let go of gathered weights, which would be used as they were when the weights change."""
    if isinstance(module, FSDPModule):
        module.reshard()


def _register(module: nn.Module, methods: Iterable[str]) -> None:
    for method in methods:
        register_fsdp_forward_method(module, method)


def mesh_of_all(device: torch.device, count: int) -> DeviceMesh:
    """One line of all processes."""
    return init_device_mesh(device.type, (count,), mesh_dim_names=("data",))
