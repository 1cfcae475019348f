"""Muon on the matrices of the blocks, AdamW on everything else, and the learning-rate schedule.

Muon: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). A matrix's
update is its Nesterov momentum with all singular values pushed towards 1 by five Newton-Schulz
iterations. Matrices of one shape (or its transpose) go through the iterations as one batch: at
these sizes the call overhead is what costs.

Of weights in shards (FSDP2) the momentum stays in shards, and the iterations need whole matrices: every process gathers
them, a batch at a time, makes the same iterations and keeps its part of the result.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from streamgen.parallel.tensors import like, local, whole
from streamgen_train.config import OptimConfig, ScheduleConfig
from streamgen_train.precision import DTYPES, fastest_seconds

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of the reference implementation
BATCH_NUMBERS = 2**26  # largest batch of matrices, in numbers: beyond it only memory grows


def lr_factor(step: int, max_steps: int, config: ScheduleConfig) -> float:
    """Multiplier of the learning rate for `step` (from 0): linear warm-up, then the named shape,
    ending at `final` at max_steps.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    shrinks_over = config.decay_steps if config.kind == "constant" else max_steps
    length = min(shrinks_over, max_steps - config.warmup_steps)
    left = min(1.0, max(0, max_steps - step) / length) if length > 0 else 1.0
    shape = 0.5 - 0.5 * math.cos(math.pi * left) if config.kind == "cosine" else left
    return config.final + (1.0 - config.final) * shape


def orthogonalise(matrices_BRC: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Newton-Schulz towards U V^T of each [R, C] matrix, R <= C; singular values end within about
    [0.7, 1.2].
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices_BRC.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x.to(matrices_BRC.dtype)


def probe_newton_schulz(shapes: list[tuple[int, int]], device: torch.device) -> str:
    """Name of the dtype in which Newton-Schulz of one matrix of each shape is faster here."""
    probes = [torch.randn(4, min(s), max(s), device=device) for s in sorted(set(shapes))]
    seconds = {
        name: fastest_seconds(partial(_orthogonalise_all, probes, dtype), device) for name, dtype in DTYPES.items()
    }
    return min(seconds, key=lambda name: seconds[name])


def _orthogonalise_all(matrices: list[Tensor], dtype: torch.dtype) -> None:
    for matrix in matrices:
        orthogonalise(matrix, dtype)


class Muon:
    """The reference rule on named 2-D tensors: m <- mu m + g; u = NS(g + mu m); w <- (1 - lr wd) w
    - lr sqrt(max(1, R/C)) u.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        self.tensors, self.momentum, self.weight_decay, self.dtype = (
            dict(tensors),
            momentum,
            weight_decay,
            dtype,
        )
        self.buffers = {name: torch.zeros_like(t) for name, t in self.tensors.items()}
        self._groups: dict[tuple[int, int, bool], list[str]] = defaultdict(list)
        for name, tensor in self.tensors.items():
            rows, columns = tensor.shape
            self._groups[min(rows, columns), max(rows, columns), isinstance(tensor, DTensor)].append(name)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for (rows, columns, _), group in self._groups.items():
            length = max(1, BATCH_NUMBERS // (rows * columns))
            for start in range(0, len(group), length):
                self._step_batch(group[start : start + length], lr)

    def _step_batch(self, group: list[str], lr: float) -> None:
        grad_of = {name: self.tensors[name].grad for name in group}
        named = [(name, grad) for name, grad in grad_of.items() if grad is not None]
        if not named:
            return
        names, grads = [name for name, _ in named], [grad for _, grad in named]
        buffers = [self.buffers[name] for name in names]
        torch._foreach_mul_(buffers, self.momentum)
        torch._foreach_add_(buffers, grads)
        nesterov = [whole(update) for update in torch._foreach_add(grads, buffers, alpha=self.momentum)]
        tall = [self.tensors[name].shape[0] > self.tensors[name].shape[1] for name in names]
        stack = torch.stack([u.mT if t else u for u, t in zip(nesterov, tall, strict=True)])
        for name, is_tall, update in zip(names, tall, orthogonalise(stack, self.dtype), strict=True):
            weight = self.tensors[name]
            rows, columns = weight.shape
            weight.mul_(1.0 - lr * self.weight_decay)
            weight.add_(like(update.mT if is_tall else update, weight), alpha=-lr * max(1.0, rows / columns) ** 0.5)


class Optimizer:
    """Splits the masters between Muon and AdamW and steps both with the scheduled learning rate."""

    def __init__(self, masters: Mapping[str, Tensor], config: OptimConfig, newton_schulz: str) -> None:
        self.config, self._masters = config, dict(masters)
        muon = muon_names(masters, config)
        rest = {name: t for name, t in masters.items() if name not in muon}
        groups: dict[tuple[bool, bool], list[str]] = {}  # one update takes tensors of one kind
        for name, tensor in rest.items():
            groups.setdefault((tensor.ndim < 2, isinstance(tensor, DTensor)), []).append(name)
        self._adamw_names = [name for _, names in sorted(groups.items()) for name in names]
        settings = [
            {"params": [rest[name] for name in names], "weight_decay": 0.0 if plain else config.weight_decay}
            for (plain, _), names in sorted(groups.items())
        ]
        self.adamw = (
            torch.optim.AdamW(settings, lr=config.lr, betas=config.betas, eps=config.eps, fused=True) if rest else None
        )
        self.muon = Muon(
            {n: masters[n] for n in muon},
            config.muon_momentum,
            config.muon_weight_decay,
            DTYPES[newton_schulz],
        )

    def step(self, factor: float) -> None:
        if self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = self.config.lr * factor
            self.adamw.step()
        self.muon.step(self.config.muon_lr * factor)

    def tensors(self) -> dict[str, Tensor]:
        """Its moments by kind and parameter name, so that a state can be read, compared and refused by name."""
        found = {f"muon/{name}": buffer for name, buffer in self.muon.buffers.items()}
        if self.adamw is not None:
            for name in self._adamw_names:
                moments = self.adamw.state.get(self._masters[name], {})
                found |= {f"adamw/{name}/{moment}": tensor for moment, tensor in moments.items()}
        return found

    def bytes_to_come(self) -> int:
        """Of the moments that the first step makes."""
        if self.adamw is None:
            return 0
        masters = [self._masters[name] for name in self._adamw_names]
        return sum(2 * local(master).nbytes for master in masters if master not in self.adamw.state)

    def prepare_for(self, names: Collection[str]) -> None:
        """Make room for the moments of a state that has these names; a parameter that never learned has none."""
        if self.adamw is None:
            return
        for name in self._adamw_names:
            if f"adamw/{name}/step" in names:
                master = self._masters[name]
                self.adamw.state[master] = {
                    "step": torch.zeros((), device=master.device),
                    "exp_avg": torch.zeros_like(master),
                    "exp_avg_sq": torch.zeros_like(master),
                }


def muon_names(tensors: Mapping[str, Tensor], config: OptimConfig) -> list[str]:
    """Names that Muon optimises: 2-D tensors whose name contains `muon_match`."""
    if config.kind != "muon":
        return []
    return [name for name, t in tensors.items() if t.ndim == 2 and config.muon_match in name]
