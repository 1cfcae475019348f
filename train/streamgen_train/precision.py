"""fp32 masters for bf16 weights, and the measured choice between the two.

In bf16 the modules themselves hold bf16 parameters (no autocast: its casts cost more than the
products at these sizes); the optimiser sees fp32 masters, and `publish` copies them back after each
step. In fp32 the masters are the parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from streamgen_train.objective import Modules, Objective, Turn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_MUST_WIN_BY = 1.15  # a tie goes to fp32, which is the better number format


def named_trainable(modules: Modules) -> dict[str, nn.Parameter]:
    """`module.parameter` -> parameter with requires_grad; shared parameters appear once, under
    their first name.
    """
    return {
        f"{key}.{name}": parameter
        for key, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


class Masters:
    """fp32 tensors that are optimised, one for each trainable parameter, in a fixed order.

    Modules in shards keep fp32 parameters whatever the dtype (they are gathered in it): those are their own masters.
    """

    def __init__(self, modules: Modules, dtype: torch.dtype, in_shards: Collection[str] = ()) -> None:
        self.params = named_trainable(modules)
        if not self.params:
            raise ValueError(f"nothing to train: no parameter of {sorted(modules)} has requires_grad")
        self.tensors: dict[str, Tensor] = dict(self.params)
        self.apart = [n for n in self.params if dtype != torch.float32 and n.split(".", 1)[0] not in in_shards]
        """Names whose master is not the parameter itself."""
        for name in self.apart:
            parameter = self.params[name]
            self.tensors[name] = parameter.detach().float().clone()
            parameter.data = parameter.data.to(dtype)

    def collect_grads(self) -> None:
        """Add the gradients of one microbatch to the masters' (in fp32), and clear them on the
        parameters.
        """
        for name in self.apart:
            parameter = self.params[name]
            if parameter.grad is None:
                continue
            master, grad = self.tensors[name], parameter.grad
            master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

    def train_only(self, names: Collection[str]) -> None:
        """Gradients for these parameters alone; the others let them through to what is before them."""
        for name, parameter in self.params.items():
            parameter.requires_grad_(name in names)

    def grads(self) -> dict[str, Tensor]:
        return {name: t.grad for name, t in self.tensors.items() if t.grad is not None}

    def zero_grad(self) -> None:
        for tensor in self.tensors.values():
            tensor.grad = None

    @torch.no_grad()
    def publish(self, names: Collection[str]) -> None:
        """Copy these masters into the parameters that the forward uses."""
        apart = [name for name in self.apart if name in names]
        if apart:
            torch._foreach_copy_([self.params[n] for n in apart], [self.tensors[n] for n in apart])

    def restore(self) -> None:
        """Make the modules fp32 again, from the masters."""
        for name in self.apart:
            self.params[name].data = self.tensors[name].detach()


def fastest_seconds(call: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Shortest of `repeats` timed calls, after one call that allocates and picks algorithms."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def probe_precision(objective: Objective, device: torch.device) -> tuple[str, dict[str, float]]:
    """Time loss + backward of the objective itself in both dtypes; -> ("fp32" | "bf16", seconds of
    each).
    """
    seconds: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        objective.prepare(device, dtype)
        modules = objective.modules()
        masters = Masters(modules, dtype)
        ema = modules if objective.needs_ema else None
        first = next(iter(objective.players()))
        turn = Turn(0, torch.Generator().manual_seed(0), torch.Generator().manual_seed(0), first)
        batch = objective.batch(turn)

        call = partial(_forward_backward, objective, batch, turn, ema, masters)
        # What fits is not known yet; recomputed layers cost both formats the same.
        heaviest = objective.heaviest_pass() if objective.recompute == "auto" else None
        if heaviest is not None:
            objective.recompute_layers(len(heaviest.model.blocks))
        seconds[name] = fastest_seconds(call, device)
        if heaviest is not None:
            objective.recompute_layers(0)
        masters.restore()
    return ("bf16" if seconds["bf16"] * BF16_MUST_WIN_BY < seconds["fp32"] else "fp32"), seconds


def _forward_backward(objective: Objective, batch: Any, turn: Turn, ema: Modules | None, masters: Masters) -> None:
    objective.loss(batch, turn, ema)[0].backward()
    for parameter in masters.params.values():
        parameter.grad = None
