"""How fast a run trains, beside what the device could do: tokens and arithmetic per second, and MFU (PaLM, arXiv
2204.02311, appendix B): the arithmetic that a step needs, counted from the config, over what a large matrix product
of the same numbers reaches here in the same time. Where the count has recomputed activations in it
(`streamgen.costs.RECOMPUTED`) that is what the paper calls hardware utilisation.
The count is a mean over the kinds of steps that an objective mixes: while it makes one kind only, it is off.
"""

from __future__ import annotations

import math
import time

import torch

from streamgen.costs import work_flops
from streamgen_train.config import TrainConfig
from streamgen_train.objective import Objective

CPU_SIZE, CUDA_SIZE = 1024, 8192
"""Of the square product: large enough for the device's best, small enough to be over in a moment."""
REPEATS = 5


class Throughput:
    """Of a run on `processes` devices like this one. Objectives that do not say what a step computes have none."""

    def __init__(
        self, config: TrainConfig, objective: Objective, dtype: torch.dtype, device: torch.device, processes: int = 1
    ) -> None:
        works = [work for _, work in objective.work()]
        self.tokens = config.accumulate * sum(work.passes * work.tokens for work in works if work.factor > 1)
        """Of a step: those that pass the network with gradients, copies of teacher forcing included."""
        self.flops = step_flops(config, objective)
        self.peak_flops_per_s = processes * product_flops_per_s(dtype, device) if self.flops else math.nan

    def of(self, step_s: float) -> dict[str, float]:
        """tokens_per_s, tflop_per_s (1e12 operations per second) and mfu (a share), over all processes."""
        if not self.flops:
            return {}
        rate = self.flops / step_s
        return {
            "tokens_per_s": self.tokens / step_s,
            "tflop_per_s": rate / 1e12,
            "mfu": rate / self.peak_flops_per_s,
        }


def step_flops(config: TrainConfig, objective: Objective) -> float:
    """Arithmetic of one step over all processes."""
    return config.accumulate * sum(work_flops(model, work) for model, work in objective.work())


def product_flops_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """Of a large matrix product with as many threads as are set: the best of a few. Draws no random numbers."""
    size = CUDA_SIZE if device.type == "cuda" else CPU_SIZE
    values = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
    best_s = math.inf
    for _ in range(REPEATS):
        _wait(device)
        start_s = time.perf_counter()
        values @ values
        _wait(device)
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size**3 / best_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
