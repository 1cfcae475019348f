"""`dry_run=true`: what a run costs, before it is bought. Built on the meta device, nothing is allocated or trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from streamgen.costs import work_flops
from streamgen_train.config import RunConfig, TrainConfig
from streamgen_train.lora import adapt
from streamgen_train.objective import Objective
from streamgen_train.throughput import product_flops_per_s, step_flops

DEVICES = {"A100 (312 TFLOP/s in bf16, 40 % of it)": 125e12, "H100 (989 TFLOP/s in bf16, 40 % of it)": 396e12}
"""Dense peak from the makers' data sheets; 40 % is what well-tuned training reaches, not a measurement."""
COUNTS = (1, 8, 64)


def costs_table(config: RunConfig, objective: Objective) -> str:
    """Parameters, arithmetic of a step, memory and time by number of devices."""
    modules = objective.modules()
    adapt(modules, config.train.lora, seed=0)
    lines = [f"experiment {config.experiment}: nothing was allocated or trained"]
    trainable = total = 0
    for name, module in modules.items():
        count, train_count = _count(module)
        total, trainable = total + count, trainable + train_count
        lines.append(f"  {name:<24} {count / 1e6:10.3f} M parameters, {train_count / 1e6:.3f} M trained")
    for name, count in objective.frozen_parameters().items():
        lines.append(f"  {name:<24} {count / 1e6:10.3f} M parameters, frozen")
    held, state = state_bytes(config.train, total, trainable)
    moments = 8 if config.train.optim.kind == "adamw" else 4
    rows = {
        "total (M parameters)": total / 1e6,
        "trained (M parameters)": trainable / 1e6,
        "weights, gradients, moments, EMA (MB)": (held + state) / 1e6,
        "one checkpoint (MB)": (4 * total + trainable * (4 + moments)) / 1e6,
        "released in fp16 (MB)": total * 2 / 1e6,
        "clips in all": config.train.max_steps * config.train.accumulate * objective.clips_per_batch,
        **objective.costs(),
    }
    lines += [f"  {name:<42} {value:,.3f}" for name, value in rows.items()]
    return "\n".join([*lines, *_arithmetic(config.train, objective), *_devices(config.train, objective, held + state)])


def state_bytes(train: TrainConfig, total: int, trainable: int) -> tuple[int, int]:
    """(bytes of weights, bytes of masters, gradients, moments and EMA)."""
    weight = 2 if train.precision == "bf16" else 4
    moments = 8 if train.optim.kind == "adamw" else 4  # Muon keeps one moment; its AdamW share is small
    masters = 4 if train.precision == "bf16" else 0
    return total * weight, trainable * (weight + masters + moments + 4)


def _arithmetic(train: TrainConfig, objective: Objective) -> list[str]:
    parts = [(work.what, train.accumulate * work_flops(model, work)) for model, work in objective.work()]
    whole = sum(flops for _, flops in parts)
    if not whole:
        return []
    lines = [f"  arithmetic of a step: {whole / 1e12:,.3f} TFLOP over all devices"]
    return lines + [f"    {what:<40} {flops / 1e12:12,.3f} TFLOP {flops / whole:6.1%}" for what, flops in parts]


def _devices(train: TrainConfig, objective: Objective, state: int) -> list[str]:
    """Memory and time of a step by number of devices."""
    flops = step_flops(train, objective)
    if not flops:
        return []
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    frozen = sum(objective.frozen_parameters().values()) * dtype.itemsize
    working = objective.working_bytes(dtype.itemsize)
    speed = _here(dtype, train.threads)
    lines = [
        f"  memory of a device: state {state / 1e9:,.2f} GB (shared out by fsdp2) + frozen parts {frozen / 1e9:,.2f} GB"
        f" + activations and caches of a microbatch {working / 1e9:,.2f} GB",
        f"  {'devices':>8} {'memory GB':>10} {'s a step: here':>15} " + " ".join(f"{name:>42}" for name in DEVICES),
    ]
    for count in _possible(COUNTS, train.accumulate):
        shards = count if train.sharding == "fsdp2" else 1
        memory = (state / shards + frozen + working) / 1e9
        times = [flops / (count * rate) for rate in (speed, *DEVICES.values())]
        lines.append(f"  {count:>8} {memory:>10,.2f} {times[0]:>15,.2f} " + " ".join(f"{t:>42,.3f}" for t in times[1:]))
    if objective.recompute == "auto":
        least = objective.least_working_bytes(dtype.itemsize)
        lines.append(
            f"  objective.recompute=auto: activations {working / 1e9:,.2f} GB with no layer recomputed,"
            f" {least / 1e9:,.2f} GB and a third more time with all; a run takes the fewest layers that fit"
        )
    lines.append(f"  'here' is this CPU at the {speed / 1e9:,.0f} GFLOP/s of a large matrix product, times the devices")
    return lines


def _possible(counts: Sequence[int], accumulate: int) -> list[int]:
    """Numbers of processes that microbatches can be shared out over."""
    return [count for count in counts if accumulate % count == 0]


def _here(dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of a matrix product on this CPU with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return product_flops_per_s(dtype, torch.device("cpu"))
    finally:
        torch.set_num_threads(before)


def _count(module: nn.Module) -> tuple[int, int]:
    """Parameters in all and those that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
