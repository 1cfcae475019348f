"""Exponential moving average of the weights: fp32 shadows, and modules in the compute dtype that
show them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamgen_train.objective import Modules
from streamgen_train.precision import Masters, named_trainable


def ema_decay(decay: float, updates: int, warmup: float) -> float:
    """min(decay, (1 + n) / (warmup + n)): early averages forget the initial weights quickly; warmup
    <= 1 turns that off.
    """
    return min(decay, (1 + updates) / (max(warmup, 1.0) + updates))


class Ema:
    """shadow <- d shadow + (1 - d) master, with d = ema_decay(decay, n) at the n-th update (from
    0).

    `modules` are frozen copies in eval mode; `refresh` brings them up to date with shadows and with
    the buffers of the trained modules. In fp32 their parameters are the shadows themselves.
    """

    def __init__(self, modules: Modules, masters: Masters, decay: float, warmup: float = 10.0) -> None:
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.shadow: dict[str, Tensor] = {n: t.detach().clone() for n, t in masters.tensors.items()}
        self._source = modules
        twins = copy.deepcopy(dict(modules))
        self._twins = named_trainable(twins)
        self.modules: dict[str, nn.Module] = {k: m.eval().requires_grad_(False) for k, m in twins.items()}
        if masters.dtype == torch.float32:
            for name, parameter in self._twins.items():
                parameter.data = self.shadow[name]
        self._shared = masters.dtype == torch.float32

    @torch.no_grad()
    def update(self, masters: Masters) -> None:
        decay = ema_decay(self.decay, self.updates, self.warmup)
        torch._foreach_lerp_(
            list(self.shadow.values()),
            [masters.tensors[n].detach() for n in self.shadow],
            1.0 - decay,
        )
        self.updates += 1

    @torch.no_grad()
    def refresh(self) -> Mapping[str, nn.Module]:
        """The EMA modules, up to date."""
        if not self._shared:
            torch._foreach_copy_(list(self._twins.values()), [self.shadow[n] for n in self._twins])
        for key, module in self.modules.items():
            for name, buffer in self._source[key].named_buffers():
                module.get_buffer(name).copy_(buffer)
        return self.modules

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = int(state["updates"])
        for name, tensor in self.shadow.items():
            tensor.copy_(state["shadow"][name])
