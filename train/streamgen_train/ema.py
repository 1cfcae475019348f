"""Exponential moving average of the weights: fp32 shadows, and modules in the compute dtype that
show them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from streamgen.parallel.tensors import local
from streamgen_train.config import EmaConfig
from streamgen_train.objective import Modules
from streamgen_train.precision import Masters, named_trainable


def ema_decay(decay: float, updates: int, warmup: float) -> float:
    """min(decay, (1 + n) / (warmup + n)): early averages forget the initial weights quickly; warmup
    <= 1 turns that off.
    """
    return min(decay, (1 + updates) / (max(warmup, 1.0) + updates))


def copy_modules(modules: Modules) -> dict[str, nn.Module]:
    """Copies with trainable parameters of their own; frozen ones are the same objects."""
    frozen = {id(p): p for module in modules.values() for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(dict(modules), frozen)


class Ema:
    """shadow <- d shadow + (1 - d) master, with d = ema_decay(decay, n) at a player's n-th average (from 0), on its own
    turns; before `start_step` the shadow is a copy of the master.

    `modules` are frozen copies in eval mode; `refresh` brings them up to date with shadows and with
    the buffers of the trained modules. Where masters are the parameters, the copies' parameters are the shadows.
    """

    def __init__(self, modules: Modules, masters: Masters, config: EmaConfig, copies: Modules | None = None) -> None:
        """`copies` of the modules are made here, except of modules in shards: those must be made before."""
        self.config = config
        self.updates: dict[str, int] = {}
        """Averages taken so far, by player."""
        self._source = modules
        twins = copy_modules(modules) if copies is None else copies
        shown = named_trainable(twins)
        self._frozen = [
            (twin, source)
            for key in modules
            for twin, source in zip(twins[key].parameters(), modules[key].parameters(), strict=True)
            if not source.requires_grad and twin is not source
        ]
        self.modules: dict[str, nn.Module] = {k: m.eval().requires_grad_(False) for k, m in twins.items()}
        for name in masters.apart:
            shown[name].data = shown[name].data.to(masters.params[name].dtype)
        self.shadow: dict[str, Tensor] = {}
        for name, master in masters.tensors.items():
            self.shadow[name] = master.detach().clone() if name in masters.apart else shown[name].detach()
            self.shadow[name].copy_(master.detach())
        self._shown = {name: shown[name].detach() for name in masters.apart}

    @torch.no_grad()
    def update(self, player: str, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take in the masters of a player after its turn of `step`."""
        shadows = [local(self.shadow[name]) for name in tensors]
        masters = [local(t.detach()) for t in tensors.values()]
        if step < self.config.start_step:
            torch._foreach_copy_(shadows, masters)
            return
        updates = self.updates.get(player, 0)
        decay = ema_decay(self.config.decay, updates, self.config.warmup)
        torch._foreach_lerp_(shadows, masters, 1.0 - decay)
        self.updates[player] = updates + 1

    @torch.no_grad()
    def take_frozen(self) -> None:
        """Take over weights that do not learn, after a checkpoint was loaded."""
        for twin, source in self._frozen:
            local(twin).copy_(local(source))

    @torch.no_grad()
    def refresh(self) -> Mapping[str, nn.Module]:
        """The EMA modules, up to date."""
        if self._shown:
            torch._foreach_copy_(list(self._shown.values()), [self.shadow[n] for n in self._shown])
        for key, module in self.modules.items():
            for name, buffer in self._source[key].named_buffers():
                module.get_buffer(name).copy_(buffer)
        return self.modules
