"""What the training loop asks of a thing that can be trained: the door between run machinery and
mathematics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from streamgen.costs import Work
from streamgen.errors import UserError
from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig

Modules = Mapping[str, nn.Module]
MODEL = "model"
"""The usual player; its numbers are logged without a prefix."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One microbatch of one player's optimiser step."""

    step: int
    rng: torch.Generator
    """CPU generator of this microbatch, seeded from (seed, step, player, micro)."""
    shared: torch.Generator
    """The same numbers in every microbatch and every process of the step: for what all must do alike, such as the exit
    step or the length of a rollout (processes that differ there wait for each other for ever)."""
    player: str = MODEL
    micro: int = 0
    """Number of the microbatch in the step, counted over all processes."""


class HeaviestPass(NamedTuple):
    """Of the passes without a cache that a step differentiates, the one that keeps most for its backward."""

    model: CausalWanModel
    run: Callable[[], Tensor]
    """On clips of zeros: draws no random numbers, reads no data."""
    size: str
    """What makes it so large, as a person set it: "objective.clips=4"."""


class Objective(ABC):
    """A loss with the modules it trains and the data it needs.

    Build it cheaply (it is also built on the meta device for `dry_run`); open files and move frozen
    parts in `prepare`. Everything random is drawn from the generators of the turn, or from
    torch's global generators: the loop seeds all from (seed, step, player, microbatch) before each call,
    so a batch is a function of the turn alone and resuming is exact.
    """

    needs_ema: bool = False
    """True: `loss` gets the EMA modules (in the compute dtype, refreshed after every step);
    otherwise None.
    """
    clips_per_batch: int = 1
    """Clips (or images) in one microbatch; only used to print a throughput."""
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    run_dir: Path | None = None
    """The run's folder, set before `prepare`: what is found on the way may be noted there."""
    recompute: int | Literal["auto"] = 0
    """Layers whose activations are made again in the backward; auto: the run measures how many (`activations.py`)."""

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """Trainable modules by name. Their parameters with requires_grad are optimised, saved and
        averaged.
        """

    def players(self) -> dict[str, tuple[str, ...]]:
        """Who learns what: player -> names of the modules that its optimiser steps change.

        One player with all modules by default; a student and its critic are two, with an optimiser and a loss each.
        """
        return {MODEL: tuple(self.modules())}

    def turns(self, step: int) -> tuple[str, ...]:
        """Players that make an optimiser step at `step`, in this order; a function of `step` alone."""
        return tuple(self.players())

    @abstractmethod
    def batch(self, turn: Turn) -> Any:
        """The data of one microbatch, a function of `turn` only (and of `state_dict`, for objectives that have one)."""

    @abstractmethod
    def loss(self, batch: Any, turn: Turn, ema: Modules | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss of `turn.player` and detached scalar metrics to log."""

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs besides weights and the step: streams that live on over iterations, say.

        Plain containers and tensors, keyed so that another number of processes can share it out: by `Turn.micro`.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        if state:
            raise UserError(f"the checkpoint holds a state ({', '.join(map(str, state))}) that this objective has not")

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Called before the first batch: `device` to run on and compute dtype that the trainable
        parameters are about to have.

        Override to load and move frozen parts; call super().prepare first. It may be called twice
        (precision probe).
        """
        self.device, self.dtype = device, dtype
        for module in self.modules().values():
            module.to(device)

    def compile(self, modules: Modules) -> None:
        """Compile in place what `loss` calls; the default compiles the forward of each module, once per shape."""
        for module in modules.values():
            module.compile(dynamic=False)

    def transformers(self) -> dict[str, CausalWanModel]:
        """Every transformer that a step runs, trained or frozen, by name."""
        return {name: module for name, module in self.modules().items() if isinstance(module, CausalWanModel)}

    def recompute_layers(self, count: int) -> None:
        """From now on the first so many layers of each transformer are recomputed in the backward."""
        for model in self.transformers().values():
            model.recomputed_layers = count

    def heaviest_pass(self) -> HeaviestPass | None:
        """What `recompute="auto"` measures; None: there is nothing to choose."""
        return None

    def notes(self) -> list[str]:
        """What the start of a run should say, once everything is prepared and compiled."""
        return []

    def after_step(self, step: int) -> None:  # noqa: B027 (doing nothing is a valid answer)
        """Called after the optimiser and EMA updates of `step`."""

    def sample(self, step: int, modules: Modules) -> dict[str, np.ndarray]:
        """Pictures to keep, uint8 [height, width, 3] by file name, and videos, uint8 [frames, height, width, 3];
        `modules` are the EMA modules in eval mode.
        """
        return {}

    def validate(self, step: int, modules: Modules) -> dict[str, float]:
        """Numbers on data that is never trained on; `modules` are the EMA modules in eval mode."""
        return {}

    def work(self) -> list[tuple[TransformerConfig, Work]]:
        """Passes of a microbatch, mean over steps, with the sizes of the network that makes them; for `dry_run`."""
        return []

    def working_bytes(self, bytes_per_value: int) -> float:
        """Activations and caches of a microbatch, about; for `dry_run`."""
        return 0.0

    def least_working_bytes(self, bytes_per_value: int) -> float:
        """The same with every layer recomputed that `recompute="auto"` may choose."""
        return self.working_bytes(bytes_per_value)

    def frozen_parameters(self) -> dict[str, int]:
        """Numbers of parameters that are held and not trained, besides those of `modules`; for `dry_run`."""
        return {}

    def costs(self) -> dict[str, float]:
        """Extra lines for `dry_run`, name with unit -> number; must work on the meta device."""
        return {}

    def export(self, modules: Modules, folder: Path) -> None:
        """Write what was trained (fp32, on the CPU, in eval mode) as a model folder or a component of one."""
        raise UserError("this objective makes nothing that can be exported")
