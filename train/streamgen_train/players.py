"""Who learns: every player has its modules, its masters, its optimiser and its place in the seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from streamgen.errors import UserError
from streamgen_train.config import OptimConfig, TrainConfig, nearest
from streamgen_train.objective import MODEL, Objective
from streamgen_train.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Player:
    name: str
    seed_index: int
    """0 for the player "model", so that its random numbers do not depend on who else plays."""
    tensors: dict[str, Tensor]
    """Its masters, by full name."""
    optimizer: Optimizer

    @property
    def grad_clip(self) -> float:
        return self.optimizer.config.grad_clip

    @property
    def prefix(self) -> str:
        """Of its numbers in the log."""
        return "" if self.name == MODEL else f"{self.name}/"


def optim_configs(config: TrainConfig, players: Mapping[str, tuple[str, ...]]) -> dict[str, OptimConfig]:
    """`train.optim` with the keys of `train.optim_of` that are set for a player."""
    for name in config.optim_of:
        if name not in players:
            raise UserError(
                f"train.optim_of names the player {name!r}{nearest(name, players)} "
                f"Players of this objective: {', '.join(players)}"
            )
    return {name: config.optim_for(name) for name in players}


def owners(objective: Objective, masters: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Player -> its masters; every module that has any must belong to exactly one player."""
    players = objective.players()
    names = [name for modules in players.values() for name in modules]
    twice = sorted({name for name in names if names.count(name) > 1})
    trained = dict.fromkeys(full_name.split(".", 1)[0] for full_name in masters)
    lost = [name for name in trained if name not in names]
    unknown = [name for name in names if name not in objective.modules()]
    if twice or lost or unknown:
        raise ValueError(
            f"players() of {type(objective).__name__}: "
            f"modules of two players {twice}, of none {lost}, not in modules() {unknown}"
        )
    found = {
        player: {n: t for n, t in masters.items() if n.split(".", 1)[0] in modules}
        for player, modules in players.items()
    }
    idle = [player for player, tensors in found.items() if not tensors]
    if idle:
        raise ValueError(f"players {idle} of {type(objective).__name__} have no parameter with requires_grad")
    return found


def make_players(
    objective: Objective, masters: Mapping[str, Tensor], configs: Mapping[str, OptimConfig], newton_schulz: str
) -> dict[str, Player]:
    """`newton_schulz` is the format for those whose config says auto."""
    made = {}
    for index, (name, tensors) in enumerate(owners(objective, masters).items()):
        config = configs[name]
        choice = newton_schulz if config.newton_schulz == "auto" else config.newton_schulz
        made[name] = Player(name, 0 if name == MODEL else index + 1, tensors, Optimizer(tensors, config, choice))
    return made
